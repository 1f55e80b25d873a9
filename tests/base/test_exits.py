"""How errors end a process: one line or a traceback, the exit code of the table, several ranks."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tapct.base import exits
from tapct.base.exits import Interrupted, SharedError, UserError
from tapct.distributed.world import LostRank

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TAPCT_DEBUG", "SLURM_PROCID", *RANK_VARIABLES):
        monkeypatch.delenv(name, raising=False)


def raises(error: BaseException) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


def read_missing_file() -> None:
    Path("no/such/file").read_bytes()


@pytest.mark.parametrize(
    ("work", "code", "line"),
    [
        (lambda: "a result is ignored", 0, ""),
        (raises(UserError("lr is -1; it must be above 0")), 2, "lr is -1; it must be above 0"),
        (raises(SharedError("no such store")), 2, "no such store"),
        (raises(LostRank("rank 3 is gone")), 3, "rank 3 is gone"),
        (raises(KeyboardInterrupt()), 130, "interrupted"),
        (raises(Interrupted()), 130, "interrupted"),
        (read_missing_file, 2, "No such file or directory: no/such/file"),
        (raises(OSError("a message without a number")), 2, "a message without a number"),
        (raises(SystemExit()), 0, ""),
        (raises(SystemExit(0)), 0, ""),
        (raises(SystemExit(7)), 7, ""),
        (raises(SystemExit("a text, as sys.exit takes it")), 1, "a text, as sys.exit takes it"),
    ],
)
def test_an_error_becomes_one_line_and_the_code_of_the_table(
    work: Callable[[], object], code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exits.exit_code_of(work) == code
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"error: {line}\n" if line else "")


def test_every_exit_code_stands_in_the_table() -> None:
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", exits.__doc__ or "", re.MULTILINE)}
    assert codes == {
        *(0, exits.BUG, exits.WRONG_INPUT, exits.LOST_RANK, exits.INCOMPLETE),
        *(exits.INTERRUPTED, exits.TERMINATED),
    }
    assert (UserError.exit_code, LostRank.exit_code) == (exits.WRONG_INPUT, exits.LOST_RANK)


@pytest.mark.parametrize("error", [RuntimeError("a bug"), ValueError("not for the user")])
def test_a_bug_is_printed_with_its_traceback(
    error: Exception, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # torch puts the rank before each line, once a test of this process has had a process group
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    assert exits.exit_code_of(raises(error)) == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and err.rstrip().endswith(f"{type(error).__name__}: {error}")


@pytest.mark.parametrize(
    "error", [UserError("x is wrong"), OSError("full"), KeyboardInterrupt(), SystemExit("x")]
)
def test_debugging_shows_the_traceback_of_every_error(
    error: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TAPCT_DEBUG", "1")
    exits.exit_code_of(raises(error))
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and "in work" in err and err.splitlines()[-1][:6] == "error:"


@pytest.mark.parametrize(
    ("error", "line"),
    [(SharedError("no store"), ""), (UserError("mine alone"), "error: [rank 1] mine alone\n")],
)
def test_only_the_first_rank_prints_what_all_ranks_find(
    error: UserError, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in zip(RANK_VARIABLES, ("1", "2", "1"), strict=True):
        monkeypatch.setenv(name, value)
    assert exits.exit_code_of(raises(error)) == 2
    assert capsys.readouterr().err == line


HANGING_AT_EXIT = """
import atexit, time
from tapct.base import exits
atexit.register(time.sleep, 60)
atexit.register(print, " and cleaned up", flush=True)
print("flushed", end="")
exits.leave({code})
"""


def leaving(code: int, world: int) -> subprocess.Popen[str]:
    """A process that leaves, although something at its exit waits for a minute."""
    root = Path(exits.__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    environment |= dict(zip(RANK_VARIABLES, ("0", str(world), "0"), strict=True))
    program = [sys.executable, "-c", HANGING_AT_EXIT.format(code=code)]
    return subprocess.Popen(program, env=environment, stdout=subprocess.PIPE, text=True)


def test_a_failed_rank_of_several_ends_at_once() -> None:
    began = time.monotonic()
    process = leaving(code=2, world=2)
    out, _ = process.communicate(timeout=50)
    assert (process.returncode, out) == (2, "flushed") and time.monotonic() - began < 50


@pytest.mark.parametrize(("code", "world"), [(2, 1), (0, 2)])
def test_a_single_process_and_a_rank_that_is_done_clean_up(code: int, world: int) -> None:
    process = leaving(code, world)
    assert process.stdout is not None
    assert process.stdout.readline() == "flushed and cleaned up\n"
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.2)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_a_message_becomes_a_single_line_of_limited_length() -> None:
    assert exits.single_line(" a\n b\t\tc ") == "a b c"
    assert exits.single_line(ValueError("x\ny")) == "x y"
    assert exits.single_line("abcdefgh", 8) == "abcdefgh"
    assert exits.single_line("abcdefghi", 8) == "abcde..."
