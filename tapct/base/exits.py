"""Errors that a person can mend, and how they end a process: one line on standard error and an exit
code.

| code | meaning |
|---|---|
| 0 | done |
| 1 | a fault of tapct or of a plug-in; a traceback is printed |
| 2 | bad input or a disk that refuses; one line says what to change |
| 3 | the run ended because another rank was lost |
| 130 | interrupted by Ctrl-C |
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from tapct.base import console, ranks

LOST_RANK = 3  # exit code of a process whose run ended because of another rank
INTERRUPTED = 130


class UserError(ValueError):
    """Bad input from a person: the command line prints its one line and exits with 2, without a
    traceback.
    """

    exit_code = 2


class SharedError(UserError):
    """Bad input that every rank of a run finds at once: only the first rank prints it."""


class Interrupted(Exception):
    """Ctrl-C where nothing catches it; typer would end a KeyboardInterrupt without a word."""


def exit_code_of(work: Callable[[], object]) -> int:
    """Run `work`; errors that a person can mend become one line, faults of our own a traceback.

    With TAPCT_DEBUG=1 in the environment every error is printed with its traceback.

    Args:
        work: function without arguments; its result is ignored. A SystemExit that it raises gives
            the exit code.
    Returns:
        The exit code of the process; see the table above.
    """
    try:
        work()
        return 0
    except SystemExit as leave:
        return leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    except SharedError as error:
        return _print_error(
            str(error) if ranks.from_environment(os.environ).is_first else "",
            error,
            error.exit_code,
        )
    except UserError as error:
        return _print_error(str(error), error, error.exit_code)
    except (Interrupted, KeyboardInterrupt) as error:
        return _print_error("interrupted", error, INTERRUPTED)
    except OSError as error:
        place = f": {error.filename}" if error.filename else ""
        return _print_error(f"{error.strerror or error}{place}", error, 2)
    except Exception as error:
        sys.excepthook(type(error), error, error.__traceback__)
        return 1


def leave(code: int) -> NoReturn:
    """End this process; at once where something has failed on one of several ranks."""
    if code and ranks.from_environment(os.environ).world > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        # connections to other ranks would keep this process alive until their time-outs
        os._exit(code)
    sys.exit(code)


def _print_error(line: str, error: BaseException, code: int) -> int:
    if os.environ.get("TAPCT_DEBUG") == "1":
        traceback.print_exception(error)
    if line:
        console.error(line)
    return code
