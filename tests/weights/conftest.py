"""One store for the runs of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_run import make_store


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("data"))
