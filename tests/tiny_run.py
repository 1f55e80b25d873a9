"""A whole pretraining run in half a second: archive, store, config, and what two runs have in
common.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tapct.config import Resolved, load_config
from tapct.data.index.build import build_manifest
from tapct.data.packed import pack
from tapct.data.patients.key import KEY_FILE
from tapct.data.phantom import archive as phantom
from tapct.run.config import RunConfig
from tapct.run_folder import EvaluationFolder, RunFolder, step_of

CONFIG = """
out: {out}
device: cpu
data: {{store: {store}, loader: {{slab_depth: 6, workers: 1}}}}
views: {{global_window: [4, 16, 16], num_locals: 2, local_window: [4, 8, 8], candidates: 1}}
model: {{name: vit, window: [4, 16, 16], patch: [2, 8, 8], dim: 16, depth: 2, heads: 2,
  registers: 1}}
losses:
  dino: {{head: {{num_prototypes: 16, hidden: 16, bottleneck: 8}}}}
  ibot: {{head: {{num_prototypes: 16, hidden: 16, bottleneck: 8}}}}
optim: {{lr: 1e-2, lr_scaling: none}}
train: {{steps: 12, global_batch: 4}}
checkpoint: {{every: 4}}
log: {{every: 3, tensorboard: false}}
eval: {{num_pictures: 1,
  preprocess: {{size_yx: [64, 64], window: [4, 16, 16], stride: [4, 16, 16]}}}}
"""
# with the key of this text, patients are on both sides of the split for any usual number of scans
KEY = "tiny scans"
CLOCK = re.compile(
    r"time$|seconds/|samples_per_second$|^ranks/"
)  # what two equal runs may differ in


def make_archive(folder: Path, num: int = 4, seed: int = 0, dicom_share: float = 0.0) -> Path:
    """A phantom archive of small scans with labels, written once for all tests of a process."""
    written = _archive(num, seed, dicom_share)
    return Path(shutil.copytree(written, folder, copy_function=shutil.copy))  # files of this moment


@functools.cache
def _archive(num: int, seed: int, dicom_share: float) -> Path:
    folder, owner = Path(tempfile.mkdtemp(prefix="tapct-archive-")), os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # and not in a process forked from it
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    sizes = phantom.Config(
        num=num, seed=seed, slices=(12, 16), in_plane=(48, 64), dicom_share=dicom_share, workers=1
    )
    phantom.write(folder / "archive", sizes)
    return folder / "archive"


def make_store(folder: Path, num: int = 4, seed: int = 0, key: str = KEY) -> Path:
    """The archive, indexed and packed; returns the store. Its patients are divided in the same way
    every time: with a random key, all of them could be on one side.

    Args:
        key: text that the key of the patients is made of; another hospital has another one.
    """
    archive = make_archive(folder / "archive", num, seed)
    if not (folder / KEY_FILE).exists():
        (folder / KEY_FILE).write_bytes(hashlib.blake2b(key.encode(), digest_size=32).digest())
    found = build_manifest(
        archive,
        folder / "manifest.parquet",
        labels=None,
        patient_regex=None,
        min_depth=1,
        workers=0,
        progress=None,
    )
    pack.pack(found, folder / "store", workers=0)
    return folder / "store"


def write_config(folder: Path, store: Path) -> Path:
    """FOLDER/tiny.yaml, whose run folder is FOLDER/run."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny.yaml"
    path.write_text(CONFIG.format(out=folder / "run", store=store))
    return path


def config_of(folder: Path, store: Path, *overrides: str) -> Resolved:
    """The tiny config of a run in FOLDER/run."""
    return load_config(RunConfig, write_config(folder, store), overrides)


def evaluation_of(run: Path, step: int) -> EvaluationFolder:
    """The evaluation of a step of a run that was evaluated on one data set."""
    found = [folder for _, folder in RunFolder(run).evaluations_of_steps()]
    (one,) = (folder for folder in found if step_of(folder.path) == step)
    return one


def own_plugin(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, text: str) -> None:
    """A user's own file, which the config calls `mylab.NAME`."""
    package = folder / "code" / "mylab"
    package.mkdir(parents=True)
    (package / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(folder / "code")
    for module in ("mylab", f"mylab.{name}"):
        monkeypatch.delitem(sys.modules, module, raising=False)


def numbers_of(run: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl without what the clock wrote."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not CLOCK.search(name)} for row in rows]


def state_of(checkpoint: Path, scratch: Path) -> dict[str, Any]:
    """Everything in a checkpoint by dotted name, read by torch's own converter and not by tapct."""
    dcp_to_torch_save(str(checkpoint), str(scratch))
    return flat(torch.load(scratch, weights_only=False))


def state_of_reference(checkpoint: Path) -> dict[str, Any]:
    """The same, read once for the many tests that compare with one checkpoint."""
    return _state_written_at(checkpoint, (checkpoint / ".metadata").stat().st_mtime_ns)


@functools.lru_cache(maxsize=16)
def _state_written_at(checkpoint: Path, time_ns: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        return state_of(checkpoint, Path(scratch) / "state.pt")


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts and lists -> dotted names."""
    items = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree)
        if isinstance(tree, list)
        else None
    )
    if items is None:
        return {prefix: tree}
    return {
        name: leaf for key, value in items for name, leaf in flat(value, f"{prefix}.{key}").items()
    }


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Names whose values are not the same bits."""

    def same(x: Any, y: Any) -> bool:
        return torch.equal(x, y) and x.dtype == y.dtype if isinstance(x, Tensor) else bool(x == y)

    return [
        name for name in {**a, **b} if name not in a or name not in b or not same(a[name], b[name])
    ]


def assert_equal_runs(run: Path, reference: Path, scratch: Path) -> None:
    """Both have the same rows in metrics.jsonl and the same newest checkpoint, bit for bit."""
    rows, wanted = numbers_of(run), numbers_of(reference)
    assert [row["step"] for row in rows] == [row["step"] for row in wanted]
    for row, other in zip(rows, wanted, strict=True):
        assert differences(row, other) == [], f"step {row['step']}"
    newest, expected = (
        folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text().strip()
        for folder in (run, reference)
    )
    assert newest.name == expected.name
    state, other_state = state_of(newest, scratch / "a.pt"), state_of_reference(expected)
    assert differences(state, other_state) == []
    assert len([name for name in state if name.startswith(".optimizer")]) > 100
    assert (newest / "teacher.safetensors").read_bytes() == (
        expected / "teacher.safetensors"
    ).read_bytes()
