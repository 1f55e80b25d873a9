"""One process at a time holds a lock, and a lock of a process that ended is taken over."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tapct.base.exits import UserError
from tapct.base.locks import Held, Holder, hold

TAKEN = "another `tapct pack` is writing to here"


def written_by(lock: Path, **changes: object) -> Holder:
    """A lock file as another process would have written it."""
    holder = dataclasses.replace(Holder.this_process(), **changes)  # type: ignore[arg-type]
    lock.write_text(json.dumps(dataclasses.asdict(holder)))
    return holder


def age(lock: Path, seconds: float) -> None:
    os.utime(lock, (time.time() - seconds,) * 2)


def test_a_held_lock_is_refused_in_one_line_that_names_the_holder(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    with hold(lock, TAKEN):
        with pytest.raises(Held, match=rf"{TAKEN} \(process {os.getpid()} on ") as error:
            with hold(lock, TAKEN):
                pytest.fail("two processes hold it")
        assert "\n" not in str(error.value)
        age(lock, 1e6)  # however old it is: its process lives
        with pytest.raises(Held):
            with hold(lock, TAKEN):
                pytest.fail("two processes hold it")
    assert not list(tmp_path.iterdir())
    with hold(lock, TAKEN):
        pass


def test_a_lock_of_a_process_that_was_killed_is_taken_over_at_once(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom tapct.base.locks import hold\n"
        "with hold(Path(sys.argv[1]), 'taken'):\n    os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", script, lock], check=False)
    assert lock.exists()
    with hold(lock, TAKEN) as ours:
        assert ours.is_ours()
    assert not list(tmp_path.iterdir())


def test_a_process_id_that_was_given_again_is_another_process(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    written_by(lock, started="12345")
    with hold(lock, TAKEN) as ours:
        assert ours.is_ours()


@pytest.mark.parametrize("changes", [{"machine": "another boot"}, {"machine": "", "host": "n2"}])
def test_a_lock_of_another_machine_is_taken_over_when_nobody_renews_it(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    lock = tmp_path / ".lock"
    written_by(lock, **changes, job="17")
    age(lock, 100)
    with pytest.raises(Held, match="of job 17"):
        with hold(lock, TAKEN):
            pytest.fail("two processes hold it")
    age(lock, 130)
    with hold(lock, TAKEN) as ours:
        assert ours.is_ours()


def test_a_lock_file_that_names_nobody_is_taken_over_when_it_is_old(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    lock.touch()  # of an earlier version, or of a process that writes it just now
    with pytest.raises(Held):
        with hold(lock, TAKEN):
            pytest.fail("two processes hold it")
    age(lock, 130)
    with hold(lock, TAKEN):
        pass


def test_a_held_lock_is_renewed_and_its_loss_is_noticed(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    with hold(lock, TAKEN, renew_seconds=0.01) as ours:
        age(lock, 100)
        deadline = time.monotonic() + 10
        while time.time() - lock.stat().st_mtime > 50 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert time.time() - lock.stat().st_mtime < 50
        ours.check()
        other = written_by(lock)
        with pytest.raises(UserError, match="belongs to another process"):
            ours.check()
    assert json.loads(lock.read_text())["token"] == other.token  # and it is left to the other


def test_of_many_that_find_a_stale_lock_one_gets_it(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    for _ in range(20):
        written_by(lock, machine="another boot")
        age(lock, 1000)
        barrier, holding, most = threading.Barrier(4), [], []

        def contend(
            barrier: threading.Barrier = barrier,
            holding: list[int] = holding,
            most: list[int] = most,
        ) -> None:
            barrier.wait()
            try:
                with hold(lock, TAKEN) as ours:
                    holding.append(1)
                    time.sleep(0.005)
                    if ours.is_ours():
                        most.append(len(holding))
                    holding.pop()
            except Held:
                pass

        threads = [threading.Thread(target=contend) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert most and max(most) == 1
        assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        with hold(tmp_path / "missing" / ".lock", TAKEN):
            pytest.fail("there is no folder")
