"""A training step on a GPU never makes the host wait, shown on fake CUDA tensors without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tapct.config import load_config
from tapct.doctor.fake_cuda import DEVICE, HostWaits, NeedsValue, fake_cuda, run_backward
from tapct.doctor.host_waits import host_waits
from tapct.run.config import RunConfig

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SHRUNK = ("model.depth=2", "model.dim=64", "model.heads=1")
# one of small volumes and one of the published recipe; the others differ in sizes and settings
QUICK = ("smoke", "tap_s_3d")


def shipped() -> list[object]:
    """Names of all shipped configs of a run; those that are not quick are marked slow."""
    names = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", shipped())
def test_no_step_of_a_shipped_config_waits_for_the_gpu(name: str) -> None:
    config = load_config(RunConfig, CONFIGS / f"{name}.yaml", list(SHRUNK)).value
    found = host_waits(config, steps=1)
    assert found.operations > 1000
    assert not found.lines()


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        [
            "losses.dino.targets.kind=sinkhorn",
            "losses.ibot.targets.kind=sinkhorn",
            "losses.dino.head.last_layer=plain",
            "train.accumulation=2",
            "model.drop_path=0.3",
            "model.ffn=swiglu",
            "model.qk_norm=true",
        ],
        [
            "losses.gram.start=0",
            "losses.gram.tokens=masked",
            "model.positions=both",
            "model.rope.coordinates=mm",
            "model.rope.jitter=2",
            "train.recompute=1",
        ],
        [f"views.ops.{op}.p=[0,1,1]" for op in ("gamma", "noise", "rotation", "window_jitter")],
    ],
)
def test_no_step_with_other_settings_waits_for_the_gpu(changes: list[str]) -> None:
    config = load_config(RunConfig, CONFIGS / "smoke.yaml", [*SHRUNK, *changes]).value
    assert not host_waits(config).lines()


WAITING: dict[str, Callable[[Tensor], object]] = {
    "a number of the device": lambda x: x.sum().item(),
    "a condition": lambda x: bool((x > 0).all()),
    "the number of hits": lambda x: (x > 0).nonzero(),
    "rows by a mask": lambda x: x[x > 0],
    "values by a mask": lambda x: x.masked_select(x > 0),
    "a copy to the host": lambda x: x.cpu(),
    "a number of the host": lambda x: x.new_tensor(2.0),
    "a list of the host": lambda x: torch.tensor([1.0], device=x.device),
    "a number assigned to an entry": lambda x: x.__setitem__(0, 2.0),
    "repeats of unknown sum": lambda x: x.repeat_interleave(x.long()),
}
NOT_WAITING: dict[str, Callable[[Tensor], object]] = {
    "arithmetic": lambda x: (x * 2 + 1).sum(),
    "filling": lambda x: x[0].fill_(2.0),
    "rows by number": lambda x: x[torch.arange(2, device=x.device)],
    "a copy beside the computation": lambda x: torch.zeros(3).to(x.device, non_blocking=True),
    "repeats of known sum": lambda x: x.repeat_interleave(x.long(), output_size=7),
    "a choice": lambda x: torch.where(x > 0, x, 0.0),
}


def recorded(work: Callable[[Tensor], object]) -> list[str]:
    """Operations of a function that wait."""
    with fake_cuda(), HostWaits() as spy:
        x = torch.empty(4, device=DEVICE)
        try:
            work(x)
        except NeedsValue:
            pass
    return [name for name, _ in spy.waits]


@pytest.mark.parametrize("name", WAITING)
def test_what_waits_is_recorded(name: str) -> None:
    assert recorded(WAITING[name])


@pytest.mark.parametrize("name", NOT_WAITING)
def test_what_does_not_wait_is_not_recorded(name: str) -> None:
    assert not recorded(NOT_WAITING[name])


def test_the_backward_pass_in_python_gives_the_gradients_of_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    layers = torch.nn.Sequential(
        torch.nn.Linear(6, 8), torch.nn.LayerNorm(8), torch.nn.GELU(), torch.nn.Linear(8, 6)
    ).double()
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)

    def loss() -> Tensor:
        twice = layers(layers(x) + x)  # shared weights, and a residual
        first, rest = twice.split([2, 4], dim=1)
        return first.square().mean() + (rest * x[:, :1]).sin().sum() + twice[1:3].norm()

    wanted = torch.autograd.grad(loss(), [x, *layers.parameters()])
    loss().backward()
    added = [x.grad, *(parameter.grad for parameter in layers.parameters())]
    monkeypatch.setattr(torch.autograd, "_engine_run_backward", run_backward)
    torch.testing.assert_close(
        torch.autograd.grad(loss(), [x, *layers.parameters()]), wanted, rtol=1e-13, atol=1e-13
    )
    layers.zero_grad()
    x.grad = None
    loss().backward()
    again = [x.grad, *(parameter.grad for parameter in layers.parameters())]
    torch.testing.assert_close(again, added, rtol=1e-13, atol=1e-13)


def test_afterwards_torch_is_as_before() -> None:
    before = torch.cuda.Stream, Tensor.pin_memory, torch.autograd._engine_run_backward
    with pytest.raises(ZeroDivisionError), fake_cuda():
        raise ZeroDivisionError
    assert before == (torch.cuda.Stream, Tensor.pin_memory, torch.autograd._engine_run_backward)
    x = torch.ones(2, requires_grad=True)
    x.sum().backward()
    assert x.grad is not None
