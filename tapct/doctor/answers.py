"""How a probe in a process of its own answers, and how such a process is started, heard and ended.

Every answer is one line of JSON on standard output behind a mark, written at once: what was found
before a hang counts.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tapct.base import ranks
from tapct.base.exits import UserError
from tapct.doctor.facts import INSTALL, Broken
from tapct.doctor.machine import ended, kill, last_line, start

MARK = "@doctor "
CHILD_SECONDS = 60.0  # torch alone may take half a minute to load from a cold network disk


def answer(topic: str, probe: Callable[[], Any]) -> Any:
    """Run a probe and tell its facts, or in one line why it has none (then returns None)."""
    try:
        facts = probe()
    except (OSError, RuntimeError, ValueError, ImportError, AttributeError) as error:
        why = " ".join(str(error).split()) or type(error).__name__
        _tell(
            {
                "topic": topic,
                "broken": why
                if isinstance(error, UserError)
                else f"{type(error).__name__}: {why}"[:300],
            }
        )
        return None
    _tell({"topic": topic, "facts": asdict(facts)})
    return facts


def _tell(told: dict[str, Any]) -> None:
    print(
        f"\n{MARK}{json.dumps(told)}", flush=True
    )  # a line of its own, whatever libraries have printed before


class Child:
    """A process that runs one of the modules of this folder.

    Args:
        module: e.g. `tapct.doctor.device`.
        kind: what it is asked.
        arguments: JSON values.
        seconds: from now, after which it is ended.
    """

    def __init__(
        self, module: str, kind: str, arguments: dict[str, Any], seconds: float = CHILD_SECONDS
    ) -> None:
        self.end = time.monotonic() + seconds
        self.seconds = seconds
        package = str(Path(__file__).resolve().parents[2])
        kept = ranks.without_place(os.environ)  # or each child would believe that it is one of many
        path = os.pathsep.join(filter(None, [package, kept.get("PYTHONPATH", "")]))
        words = [sys.executable, "-m", module, kind, json.dumps(arguments)]
        self.process = start(words, {**kept, "PYTHONPATH": path})

    def answers(self) -> Answers:
        """Wait for its end, at most until its time is over."""
        out, err, by_itself = ended(self.process, self.end - time.monotonic())
        lines = [
            line
            for line in out.splitlines(keepends=True)
            if line.startswith(MARK) and line.endswith("\n")
        ]
        found = [json.loads(line.removeprefix(MARK)) for line in lines]
        if not by_itself:
            return Answers(found, Broken(f"no answer within {self.seconds:g} s; it was ended"))
        last = last_line(err) or f"exit code {self.process.returncode}"
        remedy = (
            INSTALL if last.startswith(("ImportError", "ModuleNotFoundError", "OSError")) else ""
        )
        return Answers(found, Broken(f"ended without an answer: {last}", remedy))

    def stop(self) -> None:
        """End it now, if it still runs."""
        if self.process.poll() is None:
            kill(self.process)


class Answers:
    """What a child told, and what stands for all that it did not tell."""

    def __init__(self, found: list[dict[str, Any]], missing: Broken) -> None:
        self._found = {one["topic"]: one for one in found}
        self.missing = missing

    def of(self, topic: str, kind: Callable[..., Any]) -> Any:
        """Facts of a topic as `kind`, or `Broken`."""
        one = self._found.get(topic)
        if one is None:
            return self.missing
        return kind(**_tuples(one["facts"])) if "facts" in one else Broken(one["broken"])


def _tuples(value: Any) -> Any:
    """JSON's lists as tuples, as the facts have them."""
    if isinstance(value, dict):
        return {key: _tuples(one) for key, one in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
