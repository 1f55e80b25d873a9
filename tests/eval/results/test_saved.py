"""Which evaluation of a run is shown, and the link to the newest one."""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tapct.base.exits import UserError
from tapct.eval.results import saved
from tapct.run_folder import RunFolder

OWN, OTHER, THIRD = "mine-11111111", "mine-22222222", "theirs-33333333"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with evaluations on three data sets; results.json holds nothing useful."""
    folder = RunFolder(tmp_path / "run")
    for name in (OWN, OTHER, THIRD):
        for step in (4, 12):
            place = folder.evaluation(name, step)
            place.path.mkdir(parents=True)
            place.results.write_text("{}")
    folder.provenance.write_text(json.dumps({"manifest": {"digest": "1" * 32}}))
    return folder.path


def test_the_beginning_of_a_name_must_mean_one_data_set(run: Path) -> None:
    found = saved.find(run)
    chosen = {wanted: saved.pick(found, wanted) for wanted in ("", "theirs", OTHER, "mine-2", "x")}
    names = {wanted: one.dataset if one else "" for wanted, one in chosen.items()}
    assert names == {"": OWN, "theirs": THIRD, OTHER: OTHER, "mine-2": OTHER, "x": ""}
    for ask in (saved.pick, saved.check_wanted):
        with pytest.raises(UserError) as caught:
            ask(found, "mine")
        assert (
            f"--data mine: the names of several data sets begin in this way: {OWN}, {OTHER};"
            in (str(caught.value))
        )
    with pytest.raises(UserError, match="there is no evaluation on a data set of that name"):
        saved.check_wanted(found, "x")


def test_an_equal_name_is_meant_although_another_one_begins_with_it() -> None:
    assert saved.dataset_of("a", ["a", "ab"]) == "a"
    assert saved.dataset_of("b", ["a", "ab"]) == ""


def test_many_processes_make_one_link_and_leave_nothing(run: Path) -> None:
    link = RunFolder(run).newest_results
    old = link.with_name(f".{link.name}.4711")  # of a process of an earlier version
    old.symlink_to("nowhere")
    killed = link.with_name(f".{link.name}.killed")
    killed.mkdir()
    os.utime(killed, (time.time() - 2 * saved.LEFTOVER_S,) * 2)
    # threads share a process ID, as processes on two machines or in two containers can
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(saved.link_newest, [run] * 40))  # raises what one of them raises
    assert link.resolve() == RunFolder(run).evaluation(OWN, 12).results.resolve()
    assert {path.name for path in link.parent.iterdir()} == {OWN, OTHER, THIRD, link.name}
    RunFolder(run).evaluation(OWN, 20).path.mkdir()
    RunFolder(run).evaluation(OWN, 20).results.write_text("{}")
    saved.link_newest(run)
    assert os.readlink(link) == f"{OWN}/step_00000020/results.json"
