"""Probes in processes of their own: how they report, and how they are started, read and ended.

Every report is one line of JSON on standard output behind a mark, written at once: what was
measured before a probe hangs counts.
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
PROBE_SECONDS = 60.0  # torch alone may take half a minute to load from a network disk
LONGEST_REASON = 300  # characters of an error message


def report(topic: str, measure: Callable[[], Any]) -> Any:
    """Run one measurement and write its facts, or the reason why there are none, to standard
    output.

    Args:
        topic: name under which `Reports` finds the facts.
        measure: function that returns a dataclass of `facts`.
    Returns:
        The facts; None where the measurement failed.
    """
    try:
        facts = measure()
    except UserError as error:
        _write({"topic": topic, "broken": _one_line(error)})
        return None
    except (OSError, RuntimeError, ValueError, ImportError, AttributeError) as error:
        reason = f"{type(error).__name__}: {_one_line(error)}"
        _write({"topic": topic, "broken": reason[:LONGEST_REASON]})
        return None
    _write({"topic": topic, "facts": asdict(facts)})
    return facts


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _write(line: dict[str, Any]) -> None:
    # the line begins with a line break, since libraries may have printed half a line before
    print(f"\n{MARK}{json.dumps(line)}", flush=True)


class Probe:
    """A process that runs one of the modules of this folder.

    Args:
        module: name of the module, e.g. `tapct.doctor.device`.
        kind: first argument of the module: what it measures.
        arguments: second argument, written as JSON.
        seconds: time from now after which the process is ended.
    """

    def __init__(
        self, module: str, kind: str, arguments: dict[str, Any], seconds: float = PROBE_SECONDS
    ) -> None:
        self.end = time.monotonic() + seconds
        self.seconds = seconds
        package = str(Path(__file__).resolve().parents[2])
        # without the launcher's variables, or each probe would take itself for one rank of many
        environment = ranks.without_place(os.environ)
        path = os.pathsep.join(filter(None, [package, environment.get("PYTHONPATH", "")]))
        command = [sys.executable, "-m", module, kind, json.dumps(arguments)]
        self.process = start(command, {**environment, "PYTHONPATH": path})

    def reports(self) -> Reports:
        """Wait until the process has ended, at most until its time is over."""
        out, err, by_itself = ended(self.process, self.end - time.monotonic())
        lines = []
        for line in out.splitlines(keepends=True):
            if line.startswith(MARK) and line.endswith("\n"):  # else it was cut off
                lines.append(json.loads(line.removeprefix(MARK)))
        if not by_itself:
            return Reports(lines, Broken(f"no response within {self.seconds:g} s; it was ended"))
        last = last_line(err) or f"exit code {self.process.returncode}"
        is_import = last.startswith(("ImportError", "ModuleNotFoundError", "OSError"))
        remedy = INSTALL if is_import else ""
        return Reports(lines, Broken(f"ended without a result: {last}", remedy))

    def stop(self) -> None:
        """End the process if it still runs."""
        if self.process.poll() is None:
            kill(self.process)


class Reports:
    """The reports of a probe.

    Args:
        lines: one dictionary per report, with `topic` and either `facts` or `broken`.
        missing: what `of` returns for every topic without a report.
    """

    def __init__(self, lines: list[dict[str, Any]], missing: Broken) -> None:
        self._by_topic = {line["topic"]: line for line in lines}
        self.missing = missing

    def of(self, topic: str, kind: Callable[..., Any]) -> Any:
        """The facts of a topic as `kind`, or `Broken`."""
        line = self._by_topic.get(topic)
        if line is None:
            return self.missing
        if "broken" in line:
            return Broken(line["broken"])
        return kind(**_tuples(line["facts"]))


def _tuples(value: Any) -> Any:
    """Turn JSON's lists back into the tuples of the facts."""
    if isinstance(value, dict):
        return {key: _tuples(each) for key, each in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
