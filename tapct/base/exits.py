"""How errors end a process: one line on standard error and an exit code.

| code | meaning |
|---|---|
| 0 | success |
| 1 | a bug in tapct or in a plug-in, with a traceback; `tapct doctor` has found a problem, or a
      run of `tapct sweep` has failed |
| 2 | wrong input, or a file or disk that cannot be used; one line names the next step |
| 3 | another rank ended or hangs; the cause is in the log of that rank |
| 4 | `tapct pack` has packed what it can; accepted scans or their labels are missing or changed; or
      `tapct embed` has no result of some scans, or `tapct eval` of some tasks or models |
| 130 | interrupted by Ctrl-C |
| 143 | `tapct index`, `pack`, `phantom`, `embed` or `sweep` was ended by SIGTERM |
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from tapct.base import console, ranks
from tapct.base.console import printable as printable

BUG = 1
WRONG_INPUT = 2
LOST_RANK = 3
INCOMPLETE = 4
INTERRUPTED = 130
TERMINATED = 143


class UserError(ValueError):
    """Wrong input: the command line prints one line and exits with 2, without a traceback."""

    exit_code = WRONG_INPUT


class Incomplete(UserError):
    """The work is done and saved, except for a part that is missing from the input."""

    exit_code = INCOMPLETE


class SharedError(UserError):
    """Wrong input that every rank of a run finds at once: only the first rank prints it."""


class Interrupted(Exception):
    """Ctrl-C that nothing has caught; typer would end a KeyboardInterrupt without a message."""


def exit_code_of(work: Callable[[], object]) -> int:
    """Call a function and print the error that it raises.

    An error that the user can correct becomes one line; any other error is printed with its
    traceback. With TAPCT_DEBUG=1 in the environment, every error is printed with its traceback.

    Args:
        work: function without arguments; its result is ignored.
    Returns:
        Exit code of the process, see the table above. A SystemExit gives its own code; as in
        Python, None means 0, and a text is printed and means 1.
    """
    try:
        work()
        return 0
    except SystemExit as error:
        if error.code is None:
            return 0
        if isinstance(error.code, int):
            return error.code
        return _print_error(str(error.code), error, BUG)
    except SharedError as error:
        is_first = ranks.for_output(os.environ).is_first
        return _print_error(str(error) if is_first else "", error, error.exit_code)
    except UserError as error:
        return _print_error(str(error), error, error.exit_code)
    except ranks.LauncherError as error:
        return _print_error(str(error), error, WRONG_INPUT)
    except (Interrupted, KeyboardInterrupt) as error:
        return _print_error("interrupted", error, INTERRUPTED)
    except OSError as error:
        place = f": {error.filename}" if error.filename else ""
        return _print_error(f"{error.strerror or error}{place}", error, WRONG_INPUT)
    except Exception as error:
        sys.excepthook(type(error), error, error.__traceback__)
        return BUG


def single_line(text: object, limit: int | None = None) -> str:
    """A message without line breaks and control characters, cut where it is longer than `limit`."""
    line = printable(" ".join(str(text).split()))
    if limit is None or len(line) <= limit:
        return line
    return line[: limit - 3] + "..."


def leave(code: int) -> NoReturn:
    """End this process; without any clean-up where one of several ranks has failed, or after
    SIGTERM.

    Args:
        code: exit code.
    """
    # connections to other ranks would keep this process alive until their time-outs; and whoever
    # sends SIGTERM waits, while the interpreter needs a second to take itself apart
    if code == TERMINATED or (code and ranks.for_output(os.environ).world > 1):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _print_error(line: str, error: BaseException, code: int) -> int:
    if os.environ.get("TAPCT_DEBUG") == "1":
        traceback.print_exception(error)
    if line:
        console.error(line)
    return code
