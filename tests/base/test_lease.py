"""One process writes a folder at a time: living holders are respected, dead ones replaced, and one
that has lost its lease notices it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tapct.base import lease as leases
from tapct.base.exits import UserError
from tapct.base.lease import Lease, LostLease

BEAT_S, STALE_S = 0.05, 0.6
Make = Callable[..., Lease]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Makes leases of one folder, as processes of several machines would."""
    made: list[Lease] = []

    def one(machine: str = "", printed: list[str] | None = None, **environment: str) -> Lease:
        lines = [] if printed is None else printed
        if machine:
            monkeypatch.setattr(leases, "machine", lambda: machine)
        lease = Lease(
            tmp_path / "run" / "lease.json",
            "the run folder run",
            environment,
            beat_s=BEAT_S,
            stale_s=STALE_S,
            say=lines.append,
        )
        made.append(lease)
        return lease

    yield one
    for lease in made:
        lease.release()


def stop_heart(lease: Lease) -> None:
    """What a suspended or killed process does: nothing more."""
    lease.over.set()
    assert lease.heart is not None
    lease.heart.join()


def left(lease: Lease) -> list[str]:
    return sorted(path.name for path in lease.path.parent.iterdir())


def test_a_second_process_on_the_same_machine_is_refused_at_once(make: Make) -> None:
    first = make(SLURM_JOB_ID="77")
    first.acquire()
    began = time.monotonic()
    with pytest.raises(UserError) as caught:
        make().acquire()
    line = str(caught.value)
    assert time.monotonic() - began < STALE_S / 2
    assert f"process {os.getpid()}, job 77, since 20" in line and "choose another out=" in line
    assert first.holder.host in line and "\n" not in line
    first.check()
    assert left(first) == ["lease.json"]


def test_a_lease_that_was_given_back_leaves_nothing_and_can_be_taken_again(make: Make) -> None:
    first, second = make(), make()
    first.acquire()
    first.release()
    assert not first.path.parent.exists(), "it was made for the lease alone"
    second.acquire()
    second.check()
    first.check()  # it holds none and writes nothing
    first.release()
    second.check()


def test_a_holder_that_was_killed_on_this_machine_is_replaced_at_once(
    make: Make, tmp_path: Path
) -> None:
    code = (
        "import os, signal; from pathlib import Path; from tapct.base.lease import Lease\n"
        f"Lease(Path({str(tmp_path / 'run' / 'lease.json')!r}), 'x', {{}}).acquire()\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    printed: list[str] = []
    began, lease = time.monotonic(), make(printed=printed)
    lease.acquire()
    lease.check()
    assert time.monotonic() - began < STALE_S / 2
    assert left(lease) == ["lease.json"] and "that process has ended" in printed[0]


def test_another_process_with_the_id_of_the_holder_is_not_the_holder(make: Make) -> None:
    first = make()
    first.acquire()
    stop_heart(first)
    head = {**json.loads(first.path.read_bytes().partition(b"\n")[0]), "born": "1"}
    first.path.write_text(json.dumps(head) + "\n0000000000\n")
    second = make()
    second.acquire()
    second.check()
    with pytest.raises(LostLease):
        first.check()


def test_a_holder_on_another_machine_is_alive_while_its_heart_beats(make: Make) -> None:
    first = make("a")
    first.acquire()
    with pytest.raises(UserError, match="its heartbeat continues"):
        make("b").acquire()
    first.check()


def test_a_holder_on_another_machine_without_a_heartbeat_is_replaced_and_notices_it(
    make: Make,
) -> None:
    first, printed = make("a"), list[str]()
    first.acquire()
    stop_heart(first)
    second = make("b", printed)
    began = time.monotonic()
    second.acquire()
    assert time.monotonic() - began >= STALE_S
    assert "waiting up to" in printed[0] and "no heartbeat for" in printed[1]
    with pytest.raises(LostLease, match="it belongs to host"):
        first.check()
    first.release()  # must not remove the lease of the other
    second.check()


def test_a_holder_that_wakes_up_does_not_write_into_the_lease_of_the_next(make: Make) -> None:
    first = make("a")
    first.acquire()
    stop_heart(first)
    second = make("b")
    second.acquire()
    content = second.path.read_bytes().partition(b"\n")[0]
    first.over.clear()
    heart = threading.Thread(target=first._beat)
    heart.start()
    time.sleep(4 * BEAT_S)
    stop_heart(first)
    first.over.set()
    heart.join()
    assert first.is_lost, "the heartbeat notices it too"
    assert second.path.read_bytes().partition(b"\n")[0] == content
    second.check()


def test_a_job_that_slurm_has_requeued_takes_over_at_once(make: Make) -> None:
    first = make("a", SLURM_JOB_ID="5")
    first.acquire()
    began = time.monotonic()
    second = make("b", SLURM_JOB_ID="5", SLURM_RESTART_COUNT="1")
    second.acquire()
    assert time.monotonic() - began < STALE_S / 2
    with pytest.raises(LostLease):
        first.check()


def test_two_steps_of_one_job_do_not_share_a_folder(make: Make) -> None:
    make("a", SLURM_JOB_ID="5").acquire()
    with pytest.raises(UserError, match="being written by another process"):
        make("b", SLURM_JOB_ID="5").acquire()


def test_of_many_processes_that_find_a_dead_holder_exactly_one_takes_over(make: Make) -> None:
    first = make("a")
    first.acquire()
    stop_heart(first)
    others = [make(f"b{number}") for number in range(8)]
    outcomes: list[str] = []

    def take(lease: Lease) -> None:
        try:
            lease.acquire()
            outcomes.append("taken")
        except UserError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=take, args=[lease]) for lease in others]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(outcomes) == 8 and outcomes.count("taken") == 1
    holders = [lease for lease in others if lease.file >= 0]
    assert len(holders) == 1
    holders[0].check()
    assert left(first) == ["lease.json"]


def test_a_process_that_died_while_it_took_over_does_not_block_the_next(make: Make) -> None:
    first = make("a")
    first.acquire()
    stop_heart(first)
    assert make("b")._claim(first.holder)
    third = make("c")
    third.acquire()
    third.check()


@pytest.mark.parametrize("content", ["", "not a lease\n", '{"host": "a"}\n'])
def test_a_broken_lease_is_replaced_after_a_while(make: Make, content: str) -> None:
    lease = make()
    lease.path.parent.mkdir()
    lease.path.write_text(content)
    lease.acquire()
    lease.check()


def test_a_lease_that_was_removed_is_lost(make: Make) -> None:
    lease = make()
    lease.acquire()
    lease.path.unlink()
    with pytest.raises(LostLease, match="its lease was removed"):
        lease.check()


def test_without_links_a_lease_works_as_well(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_link(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_link)
    first = make()
    first.acquire()
    with pytest.raises(UserError, match="it is running"):
        make().acquire()
    first.check()
    (first.path.parent / "file").touch()
    first.release()
    assert left(first) == ["file"]


def test_a_link_that_reports_a_failure_after_a_lost_answer_counts(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def repeated(source: Path, target: Path) -> None:
        link(source, target)
        raise FileExistsError

    monkeypatch.setattr(os, "link", repeated)
    lease = make()
    lease.acquire()
    lease.check()


def test_leases_of_many_folders_are_looked_at_together(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [Path(name) for name in "abcdefgh"]
    arrived = threading.Barrier(len(paths))

    def look(path: Path) -> str:
        arrived.wait(timeout=20)
        return path.name

    monkeypatch.setattr(leases, "living_holder", look)
    assert leases.living_holders(paths) == list("abcdefgh")
    assert leases.living_holders([]) == []
