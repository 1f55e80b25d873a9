"""Compiled blocks give the numbers of eager ones, under the same names, for any subset of crops."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from many_ranks import good, largest_difference, largest_state_difference, launch
from stopped import STEPS, stopped_run
from tiny_run import config_of, numbers_of

from tapct.base.exits import UserError
from tapct.config.plugins import Plugin
from tapct.engine import compiled, loop
from tapct.losses import koleo
from tapct.models import vit
from tapct.nn.layers import DropKey
from tapct.run import pretrain
from tapct.ssl.student_teacher import StudentTeacher
from tapct.types import Tokens

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LEARNED = vit.Config(
    window=(8, 32, 32), dim=64, depth=3, heads=2, registers=2, layer_scale=1.0, drop_path=0.3
)
ROPE = vit.Config(
    window=(8, 32, 32), dim=64, depth=2, heads=2, registers=2, layer_scale=1.0, drop_path=0.3,
    positions="rope",
    ffn="swiglu", qk_norm=True,
)  # fmt: skip
WORDS = ("train.precision=fp64", "model.drop_path=0.4")


def test_auto_is_no_on_a_cpu_and_yes_on_a_gpu_with_a_compiler(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compiled.shutil, "which", lambda name: f"/bin/{name}")
    asked = {
        (wanted, device.type): compiled.decide(wanted, device)
        for wanted in compiled.WANTED
        for device in (CPU, CUDA)
    }
    assert asked == {
        ("auto", "cpu"): False, ("auto", "cuda"): True, ("always", "cpu"): True, ("always",
        "cuda"): True,
        ("never", "cpu"): False, ("never", "cuda"): False,
    }  # fmt: skip
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    assert not compiled.decide("auto", CUDA)
    assert "continuing without it" in capsys.readouterr().out


def test_no_compiler_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, store: Path
) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    with pytest.raises(
        UserError, match=r"needs a compiler for this cpu, and /nowhere/c\+\+ is not on the PATH"
    ):
        pretrain.train(config_of(tmp_path, store, "train.compile=always"))


def test_what_the_compiler_cannot_do_is_one_line_and_other_errors_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    block = torch.nn.Linear(2, 2)
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda *args, **more: 1 / 0)
    compiled.compile_forward(block)
    with (
        pytest.raises(UserError, match=r"could not compile a block .*=never"),
        compiled.naming_failures(),
    ):
        block(torch.randn(3, 2))
    with pytest.raises(RuntimeError, match="disk"), compiled.naming_failures():
        raise RuntimeError("disk")


def test_compiled_blocks_keep_the_names_of_their_parameters() -> None:
    pair = StudentTeacher(Plugin("vit", LEARNED), [Plugin("koleo", koleo.Config())], seed=0)
    names = list(pair.state_dict())
    compiled.compile_blocks(pair)
    assert list(pair.state_dict()) == names and any(".blocks.2." in name for name in names)
    assert all(
        "forward" in vars(block)
        for net in (pair.student, pair.teacher)
        for block in net.backbone.blocks
    )


def value_of(tokens: list[Tokens]) -> torch.Tensor:
    """A scalar on which every token has an influence of its own."""
    parts = [
        part for each in tokens for part in (each.cls_BD, each.registers_BRD, each.patches_BND)
    ]
    return torch.stack(
        [(part * torch.linspace(0, 99, part.numel()).sin().view_as(part)).sum() for part in parts]
    ).sum()


@pytest.mark.slow
@pytest.mark.parametrize("config", [LEARNED, ROPE], ids=["learned", "rope"])
def test_compiled_blocks_equal_eager_ones_for_every_subset(config: vit.Config) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    eager, fast = vit.build(config), vit.build(config)
    for block in fast.blocks:
        compiled.compile_forward(block)
    worst, graphs = 0.0, []
    for step in range(8):
        crops = [torch.randn(8, 8, 32, 32), torch.randn(12, 8, 16, 16)]
        masks = [torch.rand(8, 32) < 0.3, None]
        for model in (eager, fast):
            model.train().zero_grad()
            value_of(model(crops, masks, DropKey(0, step))).backward()
        for mine, other in zip(fast.parameters(), eager.parameters(), strict=True):
            assert mine.grad is not None and other.grad is not None
            worst = max(worst, float((mine.grad - other.grad).abs().max() / other.grad.abs().max()))
        with torch.no_grad():  # as the teacher
            mine_D, other_D = (model.eval()(crops[:1])[0].patches_BND for model in (fast, eager))
        worst = max(worst, float((mine_D - other_D).abs().max()))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert worst < 1e-5
    assert not torch._dynamo.utils.counters["graph_break"]
    assert graphs[-1] == graphs[3] <= 8, (
        "other numbers of crops must not need graphs of their own for ever"
    )


@pytest.mark.slow
def test_compiled_blocks_under_autocast_round_as_eager_ones_do() -> None:
    eager, fast = vit.build(LEARNED), vit.build(LEARNED)
    for block in fast.blocks:
        compiled.compile_forward(block)
    crops, found = [torch.randn(8, 8, 32, 32), torch.randn(12, 8, 16, 16)], []
    for model in (eager, fast):
        with torch.autocast("cpu", torch.bfloat16):
            value_of(model.train()(crops, key=DropKey(0, 1))).backward()
        found.append(
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        )
    assert found[0].dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(found[0], found[1], dim=0) > 0.999


@pytest.mark.slow
def test_a_compiled_run_is_an_eager_one_and_an_eager_one_resumes_from_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, store: Path
) -> None:
    assert pretrain.train(config_of(tmp_path / "eager", store, *WORDS)) == loop.Stop(STEPS)
    stopped_run(monkeypatch, tmp_path, store, 5, *WORDS, "train.compile=always")
    assert len(numbers_of(tmp_path / "run")) == 5
    assert pretrain.train(config_of(tmp_path, store, *WORDS, "train.compile=never")) == loop.Stop(
        STEPS
    )
    eager = tmp_path / "eager" / "run"
    assert largest_difference(tmp_path / "run", eager, ("loss/", "ce/", "grad_norm/")) < 1e-9
    assert (
        largest_state_difference(tmp_path / "run", eager, tmp_path) < 1e-9
    )  # by name, of all that is saved


@pytest.mark.slow
@pytest.mark.dist
def test_two_sharded_ranks_compile_and_change_nothing(tmp_path: Path, store: Path) -> None:
    for wanted in ("never", "always"):
        good(
            launch(
                2,
                tmp_path / wanted,
                store,
                *WORDS,
                "train.steps=4",
                f"train.compile={wanted}",
                timeout=900,
            )
        )
    always, never = (tmp_path / wanted / "run" for wanted in ("always", "never"))
    assert largest_difference(always, never, ("loss/", "ce/", "grad_norm/")) < 1e-9
    assert largest_state_difference(always, never, tmp_path) < 1e-9
