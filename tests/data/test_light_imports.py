"""The commands that read an archive start without torch and without what draws and prints."""

from __future__ import annotations

import subprocess
import sys

import pytest

READERS = {"nibabel", "SimpleITK", "pydicom"}
HEAVY = {"torch", "matplotlib", "scipy", "wandb", "tensorboard"}


def loaded_by(module: str) -> set[str]:
    """Top-level packages in `sys.modules` after a fresh interpreter has imported a module."""
    program = f"import sys, {module}; print(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_index_loads_neither_torch_nor_rich_nor_the_readers_libraries() -> None:
    loaded = loaded_by("tapct.data.index.build")
    assert "pyarrow" in loaded and not loaded & {*HEAVY, *READERS, "rich", "blosc2"}


def test_pack_loads_no_torch() -> None:
    loaded = loaded_by("tapct.data.packed.pack")
    assert "blosc2" in loaded and not loaded & {*HEAVY, *READERS}


@pytest.mark.parametrize(
    "part", ["manifest", "patients.identity", "search.discover", "scans.ingest", "packed.store"]
)
def test_the_parts_that_read_a_manifest_or_store_load_no_torch(part: str) -> None:
    assert not loaded_by(f"tapct.data.{part}") & {*HEAVY, *READERS}


def test_rich_comes_into_pack_with_blosc2_alone() -> None:
    """blosc2 imports httpx, which imports rich; tapct's own files add neither."""
    assert loaded_by("tapct.data.packed.pack") & {"rich"} == loaded_by("blosc2") & {"rich"}
