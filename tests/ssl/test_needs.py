"""What the core asks of losses and backbones; a user's own are asked as tapct's are."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tapct.base.exits import UserError
from tapct.cluster import submit
from tapct.cluster.resources import Resources
from tapct.config import ConfigError, load_config
from tapct.config.plugins import Plugin
from tapct.losses import dino, ibot, koleo
from tapct.nn import heads
from tapct.plan import command
from tapct.run.config import RunConfig
from tapct.ssl import needs

SPREAD = """
    from dataclasses import dataclass

    from tapct.extend import Loss, LossResult, Term, setting


    @dataclass(frozen=True)
    class Config:
        least: int = setting(3, "samples that are compared", ge=1)
        alone: bool = setting(False, "whether a rank compares its own samples only")


    class Spread(Loss):
        head_of = ""
        min_samples_reason = "it compares the samples of all ranks, with alone=true its own"

        def __init__(self, config):
            super().__init__()
            self.config = config

        def forward(self, sets, student_head, teacher_head):
            return LossResult((Term("spread", sets.student_global.cls_BD.std()),))

        def min_samples(self, world):
            return self.config.least if self.config.alone else -(-self.config.least // world)

        def finish_step(self, apply):
            pass


    def build(config):
        return Spread(config)
"""
HEADED = """
    from dataclasses import dataclass, field

    from tapct.extend import HeadConfig, Loss, LossResult, Term


    @dataclass(frozen=True)
    class Config:
        head: HeadConfig = field(default_factory=HeadConfig)


    class Headed(Loss):
        head_of = "lab_needs.headed"

        def __init__(self, config):
            super().__init__()
            self.config = config

        def forward(self, sets, student_head, teacher_head):
            return LossResult((Term("headed", student_head(sets.student_global.cls_BD).mean()),))

        def finish_step(self, apply):
            pass


    def build(config):
        return Headed(config)
"""
OWN = "losses[lab_needs.spread]={}"
FEW = ("losses.koleo=null", OWN, "train.accumulation=1")


@pytest.fixture(autouse=True)
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "lab_needs").mkdir()
    for name, text in (("spread", SPREAD), ("headed", HEADED)):
        (tmp_path / "lab_needs" / f"{name}.py").write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.startswith("lab_needs")]:
        del sys.modules[name]


def test_a_users_loss_has_its_say_in_config_stages_submit_and_plan() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(RunConfig, None, [*FEW, "train.global_batch=2"])
    line = str(caught.value)
    assert (
        "losses[lab_needs.spread] needs at least 3 samples in a micro-batch of a rank (it compares "
        "the samples of all ranks, with alone=true its own), which on 1 rank holds 2; raise "
        "train.global_batch" in line
    )
    stage = "stages=" + json.dumps([{"start": 2, "set": ["losses[lab_needs.spread].least=9"]}])
    with pytest.raises(ConfigError, match=r"stages\[0\]: .*lab_needs.spread\] needs at least 9"):
        load_config(RunConfig, None, [*FEW, "train.global_batch=8", stage])

    resolved = load_config(RunConfig, None, [*FEW, "train.global_batch=8"])
    resolved.value.check_share(4)  # 2 of each rank, and 1 would do
    alone = load_config(
        RunConfig, None, [*FEW, "losses[lab_needs.spread].alone=true", "train.global_batch=8"]
    )
    with pytest.raises(UserError, match="on 4 ranks holds 2"):
        submit.check_run(alone, Resources(minutes=60, gpus_per_node=4))
    losses = needs.build_losses(alone.value.losses)
    assert [needs.min_samples(list(losses.values()), world) for world in (1, 4)] == [3, 3]


def test_plan_leaves_out_gpu_counts_at_which_a_users_loss_has_too_little() -> None:
    config = load_config(
        RunConfig,
        Path(__file__).parents[2] / "configs" / "smoke.yaml",
        ["losses.koleo=null", OWN, "losses[lab_needs.spread].alone=true", "train.global_batch=8"],
    ).value
    options = command.Options(gpus="1,8")
    request = command.request_of(config, options)
    estimate = command.estimate_of(config, command.costs_of(config), request)
    assert [memory.gpus for memory in estimate.as_set] == [1]
    ((reason, counts),) = estimate.left_out
    assert counts == (8,) and "losses[lab_needs.spread] needs at least 3 samples" in reason


def test_a_loss_with_a_head_of_unknown_rows_is_refused_by_plan_alone() -> None:
    config = load_config(RunConfig, None, ["losses[lab_needs.headed]={}"]).value
    with pytest.raises(
        UserError, match=r"losses\[lab_needs.headed\].*override Loss.prototype_rows"
    ):
        command.costs_of(config)


def test_koleo_needs_a_neighbour_on_its_rank_or_on_another() -> None:
    alone, across = (
        koleo.build(koleo.Config(cross_rank=cross_rank)) for cross_rank in (False, True)
    )
    assert [alone.min_samples(world) for world in (1, 2, 64)] == [2, 2, 2]
    assert [across.min_samples(world) for world in (1, 2, 64)] == [2, 1, 1]


def test_losses_are_asked_without_memory_and_without_moving_torchs_draws() -> None:
    head = heads.Config(num_prototypes=2**40)  # 4 TB of float32 centres
    sections = [Plugin("dino", dino.Config(head=head)), Plugin("ibot", ibot.Config())]
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    losses = needs.build_losses(sections)
    assert torch.equal(torch.rand(2), expected)
    assert [loss.head_of for loss in losses.values()] == ["dino", "ibot"]


def test_a_backbone_without_a_patch_in_its_config_is_refused_with_a_one_line_error() -> None:
    with pytest.raises(UserError, match=r"model.name lab.net: its Config has no patch; add it"):
        needs.patch_of(Plugin("lab.net", object()))


def test_a_backbone_with_several_channels_is_refused_with_the_config() -> None:
    with pytest.raises(ConfigError, match=r"model.in_chans is 2; a run needs 1.*model.in_chans=1"):
        load_config(RunConfig, Path("smoke"), ["model.in_chans=2"])
    config = load_config(RunConfig, Path("smoke"), ["model.in_chans=1"]).value
    needs.check_channels(config.model)


def test_a_backbone_without_a_setting_for_channels_is_accepted() -> None:
    needs.check_channels(Plugin("mylab.models.other", object()))
