"""Every published and small-batch config takes a step on a CPU; only batch and length are
smaller.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from tiny_run import make_store, numbers_of

from tapct.config import load_config
from tapct.engine import loop
from tapct.run import pretrain
from tapct.run.config import RunConfig

ROOT = Path(__file__).resolve().parents[1]
NAMES = [
    *(f"tap_{size}_{kind}" for kind in ("2d", "2p5d", "3d") for size in "sb"),
    "tap_s_3d_small_batch",
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("data"))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_config_takes_a_step(name: str, store: Path, tmp_path: Path) -> None:
    words = [
        "train.steps=1",
        "train.global_batch=2",
        "device=cpu",
        "data.loader.workers=0",
        "data.held_out=0",
    ]
    config = ROOT / "configs" / f"{name}.yaml"
    resolved = load_config(
        RunConfig, config, [*words, f"out={tmp_path}/run", f"data.store={store}"]
    )
    assert pretrain.train(resolved) == loop.Stop(1)
    (row,) = numbers_of(tmp_path / "run")
    terms = {"dino_global", "dino_local", "ibot", "koleo"}
    assert all(math.isfinite(row[f"loss/{term}"]) for term in terms)
    # untrained heads answer nearly alike to all prototypes, and the teacher's first centre is 0
    with_head = [loss for loss in resolved.value.losses if hasattr(loss.config, "head")]
    for loss, num_prototypes in (
        (each.name, each.config.head.num_prototypes) for each in with_head
    ):
        assert abs(row[f"health/{loss}_ln_k_minus_ce"]) < 0.1 * math.log(num_prototypes)
    assert (tmp_path / "run" / "checkpoints" / "step_00000001" / "teacher.safetensors").is_file()
