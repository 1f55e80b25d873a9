"""Forms of the cluster side: time limits, memory, and the product of a sweep."""

from __future__ import annotations

import pytest

from tapct.base.exits import UserError
from tapct.cluster import slurm, sweep


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("90", 90),
        ("90 minutes", 90),
        ("90min", 90),
        ("2 hours", 120),
        ("1 day", 1440),
        ("12:00:00", 720),
        ("100:30:00", 6030),
        ("30:00", 30),
        ("0:30", 1),
        ("2-00", 2880),
        ("2-00:00", 2880),
        ("1-06:30", 1830),
        ("1-06:30:01", 1831),
        (" 7-0 ", 10080),
    ],
)
def test_a_time_limit_is_read_as_sbatch_reads_it(text: str, minutes: int) -> None:
    assert slurm.time_limit_minutes(text) == minutes


@pytest.mark.parametrize(
    "text",
    [
        "",
        "soon",
        "2d12h",
        "1.5",
        "-5",
        "1-25:00",
        "1-00:60",
        "12:60:00",
        "5:99",
        "1:2:3:4",
        "2 weeks",
    ],
)
def test_what_is_no_time_limit_is_reported_with_the_forms(text: str) -> None:
    with pytest.raises(UserError, match=r"--time .*2-00:00.*12:00:00.*90"):
        slurm.time_limit_minutes(text)


@pytest.mark.parametrize("text", ["0", "0:00", "0-00:00"])
def test_no_time_at_all_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="leaves no time to run"):
        slurm.time_limit_minutes(text)


def test_memory_has_a_unit_that_slurm_knows() -> None:
    assert [slurm.memory_size(text) for text in ("64G", "500m", "4000", "1TB")] == [
        "64G",
        "500M",
        "4000",
        "1TB",
    ]
    for text in ("64 gigs", "-1G", "1.5G", "lots"):
        with pytest.raises(UserError, match="64G"):
            slurm.memory_size(text)


def test_a_sweep_is_the_product_of_its_values() -> None:
    points = sweep.product(["optim.lr=1e-4,2e-4", "views.num_locals=4,8"])
    assert [point.values for point in points] == [
        (("optim.lr", lr), ("views.num_locals", num))
        for lr in ("1e-4", "2e-4")
        for num in ("4", "8")
    ]
    assert points[0].name == "lr=1e-4,num_locals=4" and len({point.name for point in points}) == 4
    assert sweep.product(["optim.lr=1e-4,2e-4 views.num_locals=4,8"]) == points


def test_commas_within_brackets_and_quotes_belong_to_a_value() -> None:
    points = sweep.product(["views.global_area=[0.1, 0.2],[0.3,0.4] a.b={x: 1, y: 2},'p,q'"])
    found = [[value for _, value in point.values] for point in points]
    assert found == [
        [area, other] for area in ("[0.1, 0.2]", "[0.3,0.4]") for other in ("{x: 1, y: 2}", "'p,q'")
    ]
    assert points[0].name == "global_area=0.1-0.2,b=x-1-y-2"
    assert all("/" not in point.name for point in sweep.product(["a=x/y,../z"]))


def test_equal_short_names_grow_until_they_differ() -> None:
    (point,) = sweep.product(["losses.dino.weight=1", "losses.ibot.weight=2", "optim.lr=3"])
    assert point.name == "dino.weight=1,ibot.weight=2,lr=3"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["optim.lr"], "key=value,value"),
        (["=1,2"], "key=value,value"),
        (["optim.lr=1,,2"], "key=value,value"),
        (["optim.lr="], "key=value,value"),
        (["optim.lr=1", "optim.lr=2"], "twice"),
        (["optim.lr=1,1"], "twice"),
        (["out=a,b"], "folder of its own"),
        (["a=[1,2"], "not closed"),
    ],
)
def test_a_wrong_sweep_is_reported(words: list[str], named: str) -> None:
    with pytest.raises(UserError, match=named):
        sweep.product(words)
