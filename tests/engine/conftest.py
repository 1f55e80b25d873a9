"""A store, runs to which nothing happened, and a run that was stopped half-way.

Every test of this folder reads the same ones, which no test may change.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from stopped import STEPS, stopped_run
from tiny_run import config_of, make_store

from tapct.engine import loop
from tapct.run import pretrain


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Callable[..., Path]:
    """Run folder of an undisturbed run of a config; made once."""
    made: dict[tuple[str, ...], Path] = {}

    def of(*overrides: str) -> Path:
        if overrides not in made:
            folder = tmp_path_factory.mktemp("undisturbed")
            stop = pretrain.train(config_of(folder, store, *overrides))
            assert stop == loop.Stop(STEPS)
            made[overrides] = folder / "run"
        return made[overrides]

    return of


@pytest.fixture(scope="session")
def half_done(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Path:
    """A folder with a run that was stopped at step 5; copied, never changed."""
    folder = tmp_path_factory.mktemp("half")
    with pytest.MonkeyPatch.context() as patch:
        stopped_run(patch, folder, store, 5)
    return folder


@pytest.fixture
def copied(half_done: Path, tmp_path: Path) -> Path:
    shutil.copytree(half_done, tmp_path / "copy")
    return tmp_path / "copy"
