"""`tapct doctor` on several nodes, as srun or torchrun starts it: every node checks itself, and the
first rank prints one table.

The ranks meet at a socket of the first rank, and need no torch for it, which may be what is broken.

    hello    every rank names its node; answered once all are there, or their time is over
    clock    answered with the first rank's time
    report   the findings of a node, from its first rank; answered with the exit code of all
    verdict  from the other ranks; answered with the exit code of all
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tapct.base import ending, ranks
from tapct.base.counted import counted
from tapct.base.exits import UserError
from tapct.base.ranks import Ranks
from tapct.doctor.facts import AllReduce, Broken, Finding
from tapct.doctor.probes import Probe

MEET_SECONDS = 60.0
REPORT_SECONDS = 240.0  # of the slowest node
PORTS_LATER = 3  # behind the port at which the ranks of a run meet, which torchrun uses itself
SKEW_SECONDS = 1.0  # between the clocks of two nodes, above which a warning is printed
PINGS = 5


@dataclass(frozen=True)
class NodeReport:
    """What a node has found.

    Args:
        node: name of the node.
        findings: results of its checks.
        skew_s: seconds by which its clock is ahead of the first rank's.
    """

    node: str
    findings: tuple[Finding, ...]
    skew_s: float


def place_among(environment: Mapping[str, str]) -> Ranks | None:
    """Place of this process among several; None where it is alone.

    Args:
        environment: environment variables, `os.environ`.
    """
    place = ranks.from_environment(environment)
    return place if place.world > 1 else None


class NodeTable:
    """The first rank's side: collects what the ranks send.

    Args:
        world: number of ranks.
        port: port at which they connect.
    Raises:
        OSError: the port cannot be used.
    """

    def __init__(self, world: int, port: int) -> None:
        self.world = world
        self.nodes: dict[int, str] = {}  # rank -> its node
        self.leaders: list[int] = []  # the first rank of each node
        self.reports: dict[int, NodeReport] = {}
        self.code = 0
        self.changed, self.decided = threading.Condition(), threading.Event()
        self.began = time.monotonic()
        self.socket = socket.create_server(("", port), backlog=world, reuse_port=False)
        threading.Thread(target=self._accept, name="tapct-doctor", daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                connection, _ = self.socket.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rw", encoding="utf-8") as stream:
            for line in stream:
                json.dump(self._answer(json.loads(line)), stream)
                stream.write("\n")
                stream.flush()

    def _answer(self, message: dict[str, Any]) -> dict[str, Any]:
        kind, rank = message["kind"], message["rank"]
        if kind == "clock":
            return {"time": time.time()}
        if kind == "hello":
            with self.changed:
                self.nodes[rank] = message["node"]
                if message["leads"]:
                    self.leaders = sorted({*self.leaders, rank})
                self.changed.notify_all()
                left = self.began + MEET_SECONDS - time.monotonic()
                self.changed.wait_for(lambda: len(self.nodes) == self.world, max(left, 0.0))
            is_whole = len(self.nodes) == self.world
            return {"leaders": self.leaders, "missing": [] if is_whole else self.missing()}
        if kind == "verdict":
            self.decided.wait(2 * REPORT_SECONDS)
            return {"code": self.code}
        findings = tuple(Finding(**finding) for finding in message["findings"])
        with self.changed:
            self.reports[rank] = NodeReport(message["node"], findings, message["skew_s"])
            self.changed.notify_all()
        self.decided.wait(REPORT_SECONDS)
        return {"code": self.code}

    def missing(self) -> list[int]:
        """Ranks that have not connected."""
        return [rank for rank in range(self.world) if rank not in self.nodes]

    def collect(self) -> list[NodeReport]:
        """Wait for the reports of all nodes; returns those that came."""
        with self.changed:
            self.changed.wait_for(
                lambda: bool(self.leaders) and len(self.reports) == len(self.leaders),
                REPORT_SECONDS,
            )
            return [self.reports[rank] for rank in sorted(self.reports)]

    def close(self, code: int) -> None:
        """Send the exit code to all ranks."""
        self.code = code
        self.decided.set()
        time.sleep(0.5)  # the threads answer
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)  # ends the thread that accepts
        self.socket.close()


class Rank:
    """The side of every rank.

    Args:
        rank: this process.
        address: host and port of the first rank.
    Raises:
        UserError: the first rank cannot be reached.
    """

    def __init__(self, rank: int, address: tuple[str, int]) -> None:
        self.rank = rank
        until = time.monotonic() + MEET_SECONDS
        while True:
            try:
                self.socket = socket.create_connection(address, timeout=5.0)
                break
            except OSError as error:
                if time.monotonic() > until:
                    node = ending.node_name(os.environ)
                    raise UserError(
                        f"{node}: rank {rank} cannot reach rank 0 at {address[0]}:{address[1]} "
                        f"({error.strerror or error}); check the names and the network of the nodes"
                    ) from error
                time.sleep(0.2)
        self.socket.settimeout(MEET_SECONDS + 2 * REPORT_SECONDS)
        self.stream = self.socket.makefile("rw", encoding="utf-8")

    def ask(self, kind: str, **content: Any) -> dict[str, Any]:
        """Send a message and wait for its answer.

        Raises:
            UserError: the first rank has ended.
        """
        try:
            json.dump({"kind": kind, "rank": self.rank, **content}, self.stream)
            self.stream.write("\n")
            self.stream.flush()
            line = self.stream.readline()
        except OSError as error:
            line = ""
            cause: OSError | None = error
        else:
            cause = None
        if not line:
            raise UserError(
                "rank 0 of tapct doctor has ended; its output has the reason"
            ) from cause
        answer: dict[str, Any] = json.loads(line)
        return answer

    def skew_s(self) -> float:
        """Seconds by which this clock is ahead of the first rank's, from the fastest answer."""
        found: list[tuple[float, float]] = []
        for _ in range(PINGS):
            began = time.time()
            theirs = self.ask("clock")["time"]
            ended = time.time()
            found.append((ended - began, (began + ended) / 2 - theirs))
        return min(found)[1]


def all_reduce_between(
    leaders: Sequence[int], rank: int, host: str, port: int, backend: str, seconds: float
) -> Finding:
    """A sum over one process of each node.

    Args:
        leaders: the first rank of each node.
        rank: this one.
        host: node at which the processes meet.
        port: port there.
        backend: gloo or nccl.
        seconds: time after which it is ended.
    """
    arguments = {
        "backend": backend,
        "world": len(leaders),
        "rank": list(leaders).index(rank),
        "meeting": f"tcp://{host}:{port}",
    }
    probe = Probe("tapct.doctor.device", "all_reduce", arguments, seconds)
    try:
        found = probe.reports().of("all_reduce", AllReduce)
    finally:
        probe.stop()
    return between_nodes(found, backend)


def between_nodes(found: AllReduce | Broken, backend: str) -> Finding:
    """The line about the sum over nodes."""
    name = "between nodes"
    if isinstance(found, Broken):
        text, remedy = f"{backend} does not work: {found.why}", found.remedy
        remedy = (
            remedy or "check the network, its firewall and GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME"
        )
        return Finding(name, "fail", text, remedy)
    if not found.right:
        return Finding(name, "fail", f"{backend}: the sum is wrong", "check the network card")
    rate = f"{found.rate / 1e9:.2g} GB/s" if found.rate >= 1e9 else f"{found.rate / 1e6:.3g} MB/s"
    return Finding(name, "ok", f"{backend} all-reduce over {found.world} nodes, bus {rate}")


def clock(reports: Sequence[NodeReport]) -> Finding:
    """The line about the clocks of the nodes."""
    furthest = max(reports, key=lambda report: abs(report.skew_s))
    text = f"the clocks differ by at most {abs(furthest.skew_s):.2g} s"
    if abs(furthest.skew_s) < SKEW_SECONDS:
        return Finding("clocks", "ok", text)
    where = "ahead of" if furthest.skew_s > 0 else "behind"
    return Finding(
        "clocks",
        "warn",
        f"{furthest.node} is {abs(furthest.skew_s):.1f} s {where} {reports[0].node}",
        "synchronise the clocks (chrony or ntpd); the time limit of a job is read by the clock",
    )


def merged(reports: Sequence[NodeReport], missing: Sequence[int]) -> list[Finding]:
    """One table for all nodes: a check that is ok everywhere is one line, and each node where it is
    not has a line with its name.

    Args:
        reports: of the nodes, the first rank's first.
        missing: ranks that have not connected.
    """
    table: list[Finding] = []
    if missing:
        named = ", ".join(map(str, missing[:8])) + (" and others" if len(missing) > 8 else "")
        table.append(
            Finding(
                "ranks",
                "fail",
                f"no report from {counted(len(missing), 'rank')}: {named}",
                "see the output of srun, and run tapct doctor on their node",
            )
        )
    names: dict[str, None] = {}
    for report in reports:
        names.update(dict.fromkeys((finding.name for finding in report.findings), None))
    for name in names:
        found = [
            (report.node, finding)
            for report in reports
            for finding in report.findings
            if finding.name == name
        ]
        good = [(node, finding) for node, finding in found if finding.state == "ok"]
        if good:
            texts = {finding.text for _, finding in good}
            nodes = shortened([node for node, _ in good], len(reports))
            for node, finding in good[: len(good) if 1 < len(texts) <= 8 else 1]:
                shown = node if len(texts) > 1 and len(texts) <= 8 else nodes
                table.append(Finding(name, "ok", f"{shown}: {finding.text}"))
        for node, finding in found:
            if finding.state != "ok":
                text = f"{node}: {finding.text}"
                table.append(Finding(name, finding.state, text, finding.remedy))
    if reports:
        table.append(clock(reports))
    return table


def shortened(nodes: Sequence[str], total: int) -> str:
    """Names of nodes; `all N nodes` for all of them."""
    if len(nodes) == total:
        return f"all {total} nodes"
    return ", ".join(nodes[:4]) + (f" and {len(nodes) - 4} more" if len(nodes) > 4 else "")


def as_json(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """Findings for a message."""
    return [asdict(finding) for finding in findings]
