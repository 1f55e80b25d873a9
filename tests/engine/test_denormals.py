"""A process that trains or evaluates flushes denormal floats to 0 on every thread that computes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import forked
import pytest
import torch
from tiny_run import config_of

from tapct.run import pretrain

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
