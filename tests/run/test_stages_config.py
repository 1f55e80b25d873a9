"""What a config may hold about stages, and the one line for what it may not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tapct.base.exits import UserError
from tapct.cluster import submit
from tapct.cluster.resources import Resources
from tapct.config import ConfigError, from_dict, load_config, to_dict
from tapct.run import stages
from tapct.run.config import RunConfig

FEW = "train.steps=10"


def word(*changes: tuple[int, tuple[str, ...]]) -> str:
    return "stages=" + json.dumps([{"start": start, "set": words} for start, words in changes])


def test_stages_follow_each_other_and_do_not_add_up() -> None:
    changes = word((2, ("views.num_locals=3",)), (5, ("optim.lr=1",)), (7, ()))
    config = load_config(RunConfig, None, [FEW, changes]).value
    resolved = config.resolved_stages()
    assert [(stage.start, stage.stop) for stage in resolved] == [(0, 2), (2, 5), (5, 7), (7, 10)]
    assert [stage.config.views.num_locals for stage in resolved] == [8, 3, 8, 8]
    assert [stage.config.optim.lr for stage in resolved] == [4e-3, 4e-3, 1.0, 4e-3]
    assert [stage.with_name("x") for stage in resolved] == [
        "x",
        "stages[0]: x",
        "stages[1]: x",
        "stages[2]: x",
    ]
    changed = ([], ["views.num_locals=3"], ["optim.lr=1"], [])
    for stage, overrides in zip(resolved, changed, strict=True):
        by_hand = load_config(RunConfig, None, [FEW, *overrides]).value
        assert {**to_dict(stage.config), "stages": []} == to_dict(by_hand)


def test_stages_of_a_file_come_back_from_its_resolved_yaml_and_from_a_checkpoint(
    tmp_path: Path,
) -> None:
    text = """
    train: {steps: 10}
    stages:
      - {start: 2, set: ["views.global_window=[12,384,384]", "losses.dino.weight=2"]}
      - start: 5
    """
    (tmp_path / "a.yaml").write_text(text)
    resolved = load_config(RunConfig, tmp_path / "a.yaml", [])
    assert resolved.value.stages[0] == stages.StageConfig(
        2, ("views.global_window=[12,384,384]", "losses.dino.weight=2")
    )
    assert resolved.sources["stages"].endswith("a.yaml:3")
    (tmp_path / "b.yaml").write_text(resolved.to_yaml())
    assert load_config(RunConfig, tmp_path / "b.yaml", []).value == resolved.value
    assert (
        from_dict(RunConfig, json.loads(json.dumps(resolved.to_dict())), "meta.json")
        == resolved.value
    )
    (line,) = [line for line in resolved.pretty().splitlines() if line.startswith("stages")]
    assert yaml.safe_load(line.split("  # ")[0])["stages"][1] == {"start": 5, "set": []}
    override = line.split("  # ")[0].strip().replace(": ", "=", 1)
    assert load_config(RunConfig, None, [FEW, override]).value.stages == resolved.value.stages


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ("stages=5", "override: stages = 5: must be a list, each item a section with start, set"),
        (
            "stages=[5]",
            "override: stages = [5]: must be a list, each item a section with start, set",
        ),
        (
            "stages=[{strat: 2, start: 1}]",
            "stages[0].strat = 2: unknown key; did you mean stages[0].start?",
        ),
        ("stages=[{set: []}]", "stages[0].start is missing"),
        (
            "stages=[{begin: 2, set: []}]",
            "stages[0].start is missing: it has no default, set it (a whole number); un",
        ),
        ("stages=[{start: 0}]", "stages[0].start = 0: must be >= 1"),
        ("stages=[{start: 1.5}]", "stages[0].start = 1.5: must be a whole number"),
        (word((2, ()), (2, ())), "stages[1].start 2 is not after 2, where stages[0] starts"),
        (word((10, ())), "stages[0].start 10 is not less than train.steps 10"),
        (word((2, ("optim.lr",))), "stages[0]: override: 'optim.lr' is not key=value"),
        (
            word((2, ()), (3, ("views.global_windw=1",))),
            "stages[1]: views.global_windw = 1: unknown key; did you mean",
        ),
        (word((2, ("views.num_locals=-1",))), "stages[0]: views.num_locals = -1: must be >= 0"),
        (
            word((2, ("views.local_window=[12,97,96]",))),
            "stages[0]: config: views.local_window 12x97x96 is no multiple of the patch",
        ),
        (
            word((2, ("views.global_window=[32,96,96]",))),
            "stages[0]: config: data.loader.slab_depth 24 is less",
        ),
    ],
)
def test_a_mistake_in_a_stage_is_one_line_that_names_it(changes: str, line: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(RunConfig, None, [FEW, changes])
    assert line in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("model.depth=3", "model.depth cannot change in a stage: the weights are built by it once"),
        ("seed=1", "seed cannot change in a stage: it decides which scan comes at which step"),
        ("train.steps=11", "train.steps cannot change in a stage: it decides which scan"),
        (
            "train.global_batch=8",
            "train.global_batch cannot change in a stage: it decides which scan",
        ),
        (
            "train.precision=bf16",
            "train.precision cannot change in a stage: it is of the whole run",
        ),
        ("data.store=elsewhere", "data.store cannot change in a stage: it decides which scan"),
        ("out=elsewhere", "out cannot change in a stage: it is of the whole run"),
        (
            "contract.mean=0",
            "contract.mean cannot change in a stage: the exported weights have one",
        ),
        (
            "optim.layer_decay=0.5",
            "optim.layer_decay cannot change in a stage: the optimizer's groups",
        ),
        (
            "losses.dino.head.hidden=8",
            "losses.dino.head.hidden cannot change in a stage: the heads are made once",
        ),
        (
            "losses.ibot.share_dino_head=true",
            "losses.ibot.share_dino_head cannot change in a stage: the heads",
        ),
        ("losses.koleo=null", "a stage cannot add or remove a loss; list the loss in the config"),
        ("stages=[{start: 3}]", "stages cannot change in a stage: it is of the whole run"),
    ],
)
def test_what_is_of_the_whole_run_is_refused_with_the_reason(change: str, line: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(RunConfig, None, [FEW, word((2, (change,)))])
    assert str(raised.value).startswith(f"stages[0]: {line}")


def test_every_key_that_may_change_in_a_stage_is_one_of_the_table() -> None:
    keys = load_config(RunConfig, None, []).sources
    assert all(any(key.startswith(start) for key in keys) for start in stages.MAY_CHANGE)


def test_a_job_whose_stage_cannot_share_the_batch_is_refused_before_it_waits() -> None:
    resolved = load_config(RunConfig, None, [FEW, word((2, ("train.accumulation=512",)))])
    with pytest.raises(
        UserError, match="train.global_batch 1024 cannot be shared equally by 4 ranks"
    ):
        submit.check_run(resolved, Resources(minutes=60, gpus_per_node=4))
