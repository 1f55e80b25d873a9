"""An input may end, block or fill its worker; the other inputs and the parent do not notice."""

from __future__ import annotations

import ctypes
import importlib
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tapct.data.workers.process_pool import Failure, ScanLimits, machine_memory, map_unordered


def _deep(number: int) -> int:
    return _deep(number + 1) + 1


def _noise(stream: int) -> str:
    for _ in range(10):
        os.write(stream, b"a library that warns a lot\n" * 1000)
    print("and a print", file=sys.stderr)
    return "noise"


def _endless_noise() -> None:
    while True:
        os.write(2, b"a library that does not end\n" * 10_000)


def _segmentation_fault() -> None:
    os.write(2, b"first line\nthe library prints why\n")
    ctypes.string_at(0)


def _warn() -> str:
    warnings.warn("advice of a library", stacklevel=1)
    return "warned"


def _raise(error: BaseException) -> None:
    raise error


KINDS: dict[str, Callable[[], object]] = {
    "segmentation fault": _segmentation_fault,
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "hang": lambda: time.sleep(100),
    "hang without python": lambda: ctypes.CDLL(None).sleep(100),
    "memory": lambda: np.ones(1 << 33, np.int8),
    "exit": lambda: sys.exit(3),
    "deep": lambda: _deep(0),
    "interrupt": lambda: _raise(OSError(5, "Input/output error", "/x/y")),
    "noise": lambda: _noise(1),
    "noise on stderr": lambda: _noise(2),
    "endless noise": _endless_noise,
    "warning": _warn,
}


def work(name: str) -> object:
    """Do what the name asks for, or return it."""
    return KINDS[name]() if name in KINDS else name


def failed(name: str, failure: Failure) -> Failure:
    return failure


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_whatever_an_input_does_costs_only_itself(
    workers: int, capfd: pytest.CaptureFixture[str]
) -> None:
    names = [f"good {k}" for k in range(3)] + list(KINDS) + [f"good {k}" for k in range(3, 6)]
    limits = ScanLimits(seconds=1.5, memory_bytes=1 << 31)
    results = dict(map_unordered(work, names, workers, failed, limits=limits))
    found = {name: results[k] for k, name in enumerate(names)}
    assert {name: found[name] for name in names if name.startswith("good")} == {
        f"good {k}": f"good {k}" for k in range(6)
    }
    reasons = {name: result.reason for name, result in found.items() if isinstance(result, Failure)}
    assert reasons == {
        "segmentation fault": "crashed",
        "killed": "crashed",
        "hang": "timed_out",
        "hang without python": "timed_out",
        "memory": "out_of_memory",
        "exit": "unreadable",
        "deep": "unreadable",
        "interrupt": "unreadable",
        "endless noise": "crashed",
    }
    details = [result.detail for result in found.values() if isinstance(result, Failure)]
    assert all(detail and "\n" not in detail for detail in details)
    crash = found["segmentation fault"]
    assert "SIGSEGV" in crash.detail and crash.printed == "the library prints why"
    assert [found[name] for name in ("noise", "noise on stderr", "warning")] == [
        *("noise", "noise", "warned")
    ]
    assert capfd.readouterr() == ("", "")


def test_an_input_that_exhausts_its_share_is_tried_again_alone() -> None:
    big = 600 << 20
    limits = ScanLimits(memory_bytes=1 << 30)
    assert dict(map_unordered(allocate, [big, big], 2, failed, limits=limits)) == {0: big, 1: big}


def allocate(num_bytes: int) -> int:
    return len(np.zeros(num_bytes, np.int8))


def test_the_time_limit_grows_with_the_bytes() -> None:
    assert ScanLimits(10, 2.0).seconds_for(50_000_000) == 35
    limits, sizes = ScanLimits(seconds=0.2, mb_per_second=1.0), {"small": 0, "large": 60_000_000}
    results = map_unordered(wait, list(sizes), 2, failed, num_bytes=sizes.get, limits=limits)
    by_name = {list(sizes)[k]: result for k, result in results}
    assert by_name["large"] == "large"
    assert isinstance(by_name["small"], Failure) and by_name["small"].reason == "timed_out"


def wait(name: str) -> str:
    time.sleep(1.0)
    return name


def test_the_process_itself_survives_what_python_can_survive_without_workers() -> None:
    names = ["a", "exit", "deep", "interrupt", "b"]
    results = dict(map_unordered(work, names, 0, failed))
    assert [results[0], results[4]] == ["a", "b"]
    assert [results[k].reason for k in (1, 2, 3)] == ["unreadable"] * 3


def test_a_worker_has_the_folder_and_the_path_of_its_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert list(map_unordered(folder_of, [""], 1, failed)) == [(0, str(tmp_path))]


def folder_of(_: str) -> str:
    return os.getcwd()


def test_a_pool_that_is_closed_early_leaves_no_worker() -> None:
    results = map_unordered(process_id, list(range(8)), 2, failed)
    pids = {next(results)[1], next(results)[1]}
    results.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def process_id(_: int) -> int:
    return os.getpid()


def test_a_script_without_a_main_guard_is_not_run_again(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from operator import neg\nfrom tapct.data.workers.process_pool import map_unordered\n"
        "print(sorted(map_unordered(neg, [1, 2], 2, None)))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "[(0, -1), (1, -2)]\n", "")


def test_a_function_that_no_worker_can_load_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="cannot load its work.*missing_module"):
        list(map_unordered(Unloadable(), [1], 1, failed))


class Unloadable:
    """A function that can be pickled, and not the other way round."""

    def __call__(self, _: int) -> int:
        return 0

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return importlib.import_module, ("missing_module",)


def test_the_memory_of_the_machine_is_plausible() -> None:
    assert 1 << 28 < machine_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
