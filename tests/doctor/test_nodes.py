"""`tapct doctor` on several nodes: one table with names, one exit code."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from tapct.base.exits import UserError
from tapct.doctor import nodes
from tapct.doctor.facts import AllReduce, Broken, Finding
from tapct.doctor.nodes import NodeReport, NodeTable, Rank, merged

OK = Finding("cpu", "ok", "8 cores")
BAD = Finding("store", "fail", "data/store holds no store.parquet", "pack one")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port


def test_ranks_of_two_nodes_meet_and_get_one_exit_code() -> None:
    port = free_port()
    table = NodeTable(3, port)

    def one(rank: int, node: str, leads: bool) -> tuple[list[int], int]:
        own = Rank(rank, ("127.0.0.1", port))
        met = own.ask("hello", node=node, leads=leads)
        assert abs(own.skew_s()) < 0.5 and met["missing"] == []
        if leads:
            found = nodes.as_json([OK, BAD])
            answer = own.ask("report", node=node, findings=found, skew_s=0.0)
        else:
            answer = own.ask("verdict")
        return met["leaders"], answer["code"]

    with ThreadPoolExecutor(3) as pool:
        ranks = [
            pool.submit(one, rank, node, leads)
            for rank, node, leads in ((0, "n0", True), (1, "n0", False), (2, "n1", True))
        ]
        reports = table.collect()
        table.close(1)
        assert [rank.result(20) for rank in ranks] == [([0, 2], 1)] * 3
    assert [report.node for report in reports] == ["n0", "n1"]
    assert reports[1].findings == (OK, BAD)


def test_a_rank_that_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "MEET_SECONDS", 0.3)
    port = free_port()
    table = NodeTable(3, port)
    met = Rank(0, ("127.0.0.1", port)).ask("hello", node="n0", leads=True)
    assert met == {"leaders": [0], "missing": [1, 2]}
    table.close(1)
    first, *_ = merged([NodeReport("n0", (OK,), 0.0)], [1, 2])
    assert (first.name, first.state) == ("ranks", "fail") and "2 ranks: 1, 2" in first.text
    with pytest.raises(UserError, match=rf"cannot reach rank 0 at 127.0.0.1:{port}"):
        Rank(1, ("127.0.0.1", port))


def test_a_check_that_is_ok_everywhere_is_one_line_and_each_bad_node_has_one() -> None:
    reports = [
        NodeReport("n0", (OK, Finding("store", "ok", "4 scans")), 0.0),
        NodeReport("n1", (OK, BAD), -7.25),
        NodeReport("n2", (OK, BAD), 0.1),
    ]
    found = [(one.name, one.state, one.text) for one in merged(reports, [])]
    assert found == [
        ("cpu", "ok", "all 3 nodes: 8 cores"),
        ("store", "ok", "n0: 4 scans"),
        ("store", "fail", "n1: data/store holds no store.parquet"),
        ("store", "fail", "n2: data/store holds no store.parquet"),
        ("clocks", "warn", "n1 is 7.2 s behind n0"),
    ]


@pytest.mark.parametrize(
    ("found", "state", "part"),
    [
        (AllReduce(2, True, 2.4e9), "ok", "gloo all-reduce over 2 nodes, bus 2.4 GB/s"),
        (AllReduce(2, False, 2.4e9), "fail", "the sum is wrong"),
        (Broken("no response within 60 s"), "fail", "no response within 60 s"),
    ],
)
def test_the_sum_between_nodes(found: AllReduce | Broken, state: str, part: str) -> None:
    finding = nodes.between_nodes(found, "gloo")
    assert finding.state == state and part in finding.text
    assert bool(finding.remedy) == (state == "fail")
