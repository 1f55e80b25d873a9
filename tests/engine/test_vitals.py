"""A run that goes bad is reported while it trains, once, with the next step; a healthy one prints
nothing.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from tiny_run import config_of, numbers_of

from tapct.engine.metrics import Record
from tapct.engine.vitals import Vitals, window_of
from tapct.run import pretrain
from tapct.ssl import health
from tapct.ssl.health import NEXT_STEP, TOO_EARLY, TermReading, verdict_at

LN_K = {"dino": math.log(256), "ibot": math.log(256)}
ALIVE, STUCK, COLLAPSED, FAINT = (
    (1.1, 5.3, 4.0),
    (0.0, 5.54, 5.53),
    (5.5, 0.02, 0.01),
    (0.1, 5.3, 5.2),
)
NOT_FOLLOWING, NO_TARGET = (-0.1, 5.3, 4.0), (math.log(256), 0.0, 0.0)


def record(
    step: int, dino: tuple[float, float, float], ibot: tuple[float, float, float] = ALIVE
) -> Record:
    row: Record = {"step": step}
    for name, numbers in (("dino", dino), ("ibot", ibot)):
        for what, number in zip(
            ("ln_k_minus_ce", "marginal_entropy", "target_entropy"), numbers, strict=True
        ):
            row[f"health/{name}_{what}"] = number
    return row


def warnings_of(vitals: Vitals, records: list[Record], every: int = 5) -> list[str]:
    """All that is printed when records are fetched every few steps."""
    lines = [vitals.update(records[i : i + every], LN_K) for i in range(0, len(records), every)]
    return [line for line in lines if line]


def test_a_healthy_and_a_faint_run_say_nothing() -> None:
    for life in (ALIVE, FAINT):
        assert warnings_of(Vitals(20, 20), [record(step, life) for step in range(1, 201)]) == []


@pytest.mark.parametrize(
    ("state", "numbers"),
    [("stuck", STUCK), ("collapsed", COLLAPSED), ("not following", NOT_FOLLOWING)],
)
def test_a_bad_run_is_reported_once_after_warmup_and_a_window_with_the_next_step(
    state: str, numbers: tuple[float, float, float]
) -> None:
    (line,) = warnings_of(Vitals(20, 20), [record(step, numbers) for step in range(1, 401)])
    assert line.startswith(f"health, steps 181 to 200: {state}. dino: ")
    assert line.endswith(NEXT_STEP[state]) and "\n" not in line


@pytest.mark.parametrize("warmup", [0, 20, 300])
def test_no_line_comes_before_it_can_be_known(warmup: int) -> None:
    vitals, lives = Vitals(warmup, 20), [STUCK] * 50 + [ALIVE] * 50 + [COLLAPSED] * 400
    spoken = {}
    for step, life in enumerate(lives, 1):
        line = vitals.update([record(step, life)], LN_K)
        if line:
            spoken[step] = line
    assert list(spoken) == [max(200, warmup + 20)]
    for step in (max(200, warmup) - 1, max(200, warmup)):  # in the report
        now = verdict_at([TermReading("dino", *COLLAPSED, LN_K["dino"])], step, warmup)
        assert now.state == ("collapsed" if step >= max(200, warmup) else TOO_EARLY)


def test_recovery_and_a_change_from_bad_to_worse_are_reported() -> None:
    lives = [STUCK] * 60 + [COLLAPSED] * 60 + [ALIVE] * 100
    lines = warnings_of(
        Vitals(0, 20), [record(step + 201, life) for step, life in enumerate(lives)]
    )
    assert [line.partition(": ")[2].partition(".")[0] for line in lines] == [
        "stuck",
        "collapsed",
        "no longer collapsed but alive",
    ]


def test_a_run_between_two_states_is_reported_at_most_once_per_window() -> None:
    lives = [(STUCK, ALIVE)[step // 20 % 2] for step in range(400)]
    assert (
        len(
            warnings_of(
                Vitals(0, 20), [record(step + 1, life) for step, life in enumerate(lives)], every=1
            )
        )
        <= 400 / 20
    )


def test_a_loss_without_targets_has_no_verdict() -> None:
    assert (
        warnings_of(Vitals(0, 20), [record(step, ALIVE, NO_TARGET) for step in range(1, 101)]) == []
    )
    assert warnings_of(Vitals(0, 20), [{"step": step} for step in range(1, 101)]) == []


def test_a_window_is_a_tenth_of_the_run_within_limits() -> None:
    assert [window_of(steps) for steps in (12, 600, 125_000)] == [20, 60, 200]


PROVOKED = {
    # a learning rate of nearly nothing, and targets that Sinkhorn keeps uniform
    "stuck": (
        "optim.lr=1e-5",
        "optim.warmup_share=0.0",
        "losses.dino.targets.kind=sinkhorn",
        "losses.ibot.targets.kind=sinkhorn",
    ),
    # a centre that does not move is no centring, and a fast teacher runs with the student
    "collapsed": (
        "losses.dino.targets.centre_momentum=0.9999999",
        "losses.ibot.targets.centre_momentum=0.9999999",
        "optim.momentum=[0.9,0.9]",
        "losses.koleo=null",
    ),
}


@pytest.mark.parametrize("state", PROVOKED)
def test_a_run_that_is_made_to_fail_reports_it_while_it_trains(
    tmp_path: Path,
    store: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    state: str,
) -> None:
    monkeypatch.setattr(health, "MIN_STEPS", 20)  # 200 steps would take long
    pretrain.train(
        config_of(
            tmp_path,
            store,
            "train.steps=50",
            "checkpoint.every=50",
            "log.every=5",
            *PROVOKED[state],
        )
    )
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("health, ")]
    assert (
        len(printed) == 1 and f": {state}. dino: " in printed[0] and NEXT_STEP[state] in printed[0]
    )
    assert len(numbers_of(tmp_path / "run")) == 50
