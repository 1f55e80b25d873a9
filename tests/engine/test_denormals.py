"""No part of a step makes denormal floats, with which some CPUs are eighty times as slow; and a
process that trains or evaluates flushes those that come with time to 0 on every thread.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from tiny_run import config_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tapct.base.ranks import Ranks
from tapct.config import load_config
from tapct.distributed.world import World
from tapct.doctor import short_run
from tapct.run import pretrain
from tapct.run.config import RunConfig

# After training or evaluation: which threads still compute 1e-39 * 0.5 as a denormal and not as 0.
# 1e-39 is made from its bits, since a thread that flushes would make 0 of it.
CODE = """
import json, pathlib, sys
from concurrent.futures import ThreadPoolExecutor
import torch
from tapct import config
from tapct.run import finished, pretrain
from tapct.run.config import RunConfig

what, place = sys.argv[1], pathlib.Path(sys.argv[2])
if what == "train":
    pretrain.train(config.load_config(RunConfig, place, ["train.steps=1"]))
elif what == "eval":
    fewer = ["eval.tasks.segmentation.steps=5", "eval.max_scans=2", "eval.num_pictures=0"]
    finished.evaluate(place, fewer)
else:
    torch.ones(1 << 22) * 2  # large enough to be split over two threads

def kept(size=1):
    product = torch.full((size,), 713624, dtype=torch.int32).view(torch.float32) * 0.5
    return (product.view(torch.int32) != 0).double().mean().item()

found = {"this thread": kept(), "both threads of OpenMP": kept(1 << 22)}
with ThreadPoolExecutor(1) as pool:
    found["a new thread"] = pool.submit(kept).result()
weight = torch.ones(1, requires_grad=True)
weight.register_hook(lambda gradient: found.update(backward=kept()))
(weight * 1).sum().backward()
print(json.dumps(found))
"""


def kept_after(*words: str | Path) -> dict[str, float]:
    """Share of products that stay denormal in a process of two threads after its work."""
    ended = forked.run(["-c", CODE, *words], {**os.environ, "OMP_NUM_THREADS": "2"})
    assert ended.returncode == 0, ended.stderr
    found: dict[str, float] = json.loads(ended.stdout.splitlines()[-1])
    return found


@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="this CPU cannot flush denormals")
def test_training_and_evaluation_flush_on_all_threads(store: Path, tmp_path: Path) -> None:
    assert set(kept_after("nothing", tmp_path).values()) == {1.0}, "or the test could not fail"
    resolved = config_of(tmp_path, store, "train.steps=1")
    none = {"this thread": 0.0, "both threads of OpenMP": 0.0, "a new thread": 0.0, "backward": 0.0}
    assert kept_after("train", tmp_path / "tiny.yaml") == none
    assert (resolved.value.out / "checkpoints").is_dir()
    assert kept_after("eval", resolved.value.out) == none


def test_the_setting_is_made_before_anything_is_computed(store: Path, tmp_path: Path) -> None:
    """OpenMP's threads never change what they inherited when they started."""
    with pytest.MonkeyPatch.context() as patch:
        order: list[str] = []

        def pick_device(name: str, local_rank: int) -> torch.device:
            order.append("device")
            return torch.device("cpu")

        patch.setattr(torch, "set_flush_denormal", lambda flush: order.append(f"flush {flush}"))
        patch.setattr(pretrain, "pick_device", pick_device)
        pretrain.train(config_of(tmp_path, store, "train.steps=1"))
    assert order == ["flush True", "device"]


def num_denormal(x: Tensor) -> int:
    """Denormal numbers in a float32 tensor, by their bits: arithmetic may take them for 0."""
    magnitude = x.detach().contiguous().view(torch.int32) & 0x7FFFFFFF
    return int(((magnitude > 0) & (magnitude < 0x00800000)).sum())


class Denormals(TorchDispatchMode):
    """Counts the denormal results of every operation that computes.

    Memory that has not been written yet, and views, which may be of such memory, do not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.numbers = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the operation, then count in its results."""
        out = func(*args, **(kwargs or {}))
        if "empty" in str(func) or func.is_view:
            return out
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor) and x.dtype == torch.float32:
                self.numbers += x.numel()
                self.found[str(func)] += num_denormal(x)
        return out


SHARP = (
    "losses.dino.targets.kind=sinkhorn",
    "losses.ibot.targets.kind=sinkhorn",
    "optim.teacher_temp=[0.01,0.01]",
)


@pytest.mark.parametrize(
    ("settings", "allowed"),
    # a temperature of 0.01 with Sinkhorn gives tails of exp(-90); training flushes them
    [((), 0.0), pytest.param(SHARP, 1e-5, marks=pytest.mark.slow)],
    ids=["smoke", "sharp targets"],
)
def test_no_operation_of_a_step_makes_denormals(settings: tuple[str, ...], allowed: float) -> None:
    """Blur matrices, views, activations, softmax tails, gradients, weights and moments."""
    smoke = Path(__file__).resolve().parents[2] / "configs" / "smoke.yaml"
    words = ["device=cpu", "train.precision=fp32", *settings]
    config = short_run.shrunk(load_config(RunConfig, smoke, words).value, 2, 1)
    run = short_run.start(config, World(Ranks(), torch.device("cpu")))
    with Denormals() as seen:
        run.trainer.optimizer_step(0, run.feed)
    assert seen.numbers > 1e6
    assert seen.found.total() <= allowed * seen.numbers, +seen.found
    for state in run.trainer.updater.optimizer.state.values():
        assert num_denormal(state["exp_avg"]) == num_denormal(state["exp_avg_sq"]) == 0


def steps_with_denormal_moments(flush: bool, steps: int = 1100) -> int:
    """Steps after which the moments of a parameter without a gradient hold denormals.

    The parameter has received one gradient and then only zeros, as the prototype of a class that no
    token chooses any more: AdamW multiplies its first moment by 0.9 in every step.
    """
    weight = torch.nn.Parameter(torch.ones(64))
    optimizer = torch.optim.AdamW([weight], lr=1e-3, fused=True)
    weight.grad = torch.full((64,), 1e-3)
    optimizer.step()
    weight.grad.zero_()
    found = 0
    torch.set_flush_denormal(flush)
    try:
        for _ in range(steps):
            optimizer.step()
            state = optimizer.state[weight]
            found += bool(num_denormal(state["exp_avg"]) or num_denormal(state["exp_avg_sq"]))
    finally:
        torch.set_flush_denormal(False)
    return found


@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="this CPU cannot flush denormals")
def test_moments_of_a_dead_parameter_become_zero() -> None:
    assert steps_with_denormal_moments(flush=False) > 100, "or the test could not fail"
    assert steps_with_denormal_moments(flush=True) == 0
