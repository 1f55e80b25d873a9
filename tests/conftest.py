"""What all tests share: few threads, fixed seeds, and where the real scans are."""

from __future__ import annotations

import gc
import os
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

gc.disable()  # nothing that is imported or collected below is garbage
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for this process and those that tests start

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from forked import SHARED, start_nest  # noqa: E402

REPOSITORY = Path(__file__).resolve().parent.parent

torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """Processes of pytest-xdist share one nest, which loads torch while they do."""
    if getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput"):
        os.environ[SHARED] = start_nest()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests of several ranks, the longest: at the end, workers would wait for one.

    They come to one worker, since pytest-xdist gives each a part of the list: two runs of several
    ranks at the same time would disturb each other.
    """
    items.sort(key=lambda item: item.get_closest_marker("dist") is None)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Collect garbage from now on, but never search what is loaded, which lives to the end."""
    gc.freeze()
    gc.enable()


def pytest_sessionfinish() -> None:
    """Save what scripts/coverage.sh measures: pytest-xdist gives a process ten seconds to end, and
    then it is killed.
    """
    if "coverage" in sys.modules and (measured := sys.modules["coverage"].Coverage.current()):
        measured.save()


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Tests that draw without a key draw the same numbers every time, alone or in company."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def denormals_are_kept() -> Iterator[None]:
    """A run makes its process flush denormal floats; every test begins without that."""
    torch.set_flush_denormal(False)
    yield
    torch.set_flush_denormal(False)


@pytest.fixture(autouse=True)
def same_signal_handlers() -> Iterator[None]:
    """A test that leaves a handler behind would fail another one, far from the cause."""
    watched = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    before = [signal.getsignal(number) for number in watched]
    yield
    assert [signal.getsignal(number) for number in watched] == before


@pytest.fixture(scope="session")
def real_ct() -> Path:
    """Folder of real scans: the environment variable TAPCT_TEST_CT, or ../shared/data/ct beside the
    repository.
    """
    folder = Path(os.environ.get("TAPCT_TEST_CT") or REPOSITORY.parent / "shared" / "data" / "ct")
    if not folder.is_dir():
        pytest.skip(f"no real scans at {folder}; set TAPCT_TEST_CT")
    return folder
