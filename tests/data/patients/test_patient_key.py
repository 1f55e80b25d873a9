"""All commands of one archive have one key, also those that start at the same moment."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

from tapct.base.exits import UserError
from tapct.data.patients import key as module
from tapct.data.patients.key import KEY_BYTES, KEY_FILE, KEY_VARIABLE, patient_key


@pytest.fixture(autouse=True)
def no_key_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


def _keys(folders: list[Path], start: Any, queue: Any) -> None:
    found = []
    for folder in folders:
        start.wait()
        found.append(patient_key(folder))
    queue.put(found)


def test_two_processes_that_start_together_have_one_key(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start, queue = context.Barrier(2), context.Queue()
    folders = [tmp_path / str(number) for number in range(100)]
    children = [
        context.Process(target=_keys, args=(folders, start, queue), daemon=True) for _ in range(2)
    ]
    for child in children:
        child.start()
    one, other = queue.get(timeout=60), queue.get(timeout=60)
    for child in children:
        child.join(60)
    assert one == other and len(set(one)) == 100
    assert [(folder / KEY_FILE).read_bytes() for folder in folders] == one
    assert {tuple(os.listdir(folder)) for folder in folders} == {(KEY_FILE,)}


@pytest.mark.parametrize("has_links", [True, False])
def test_threads_that_start_together_have_one_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_links: bool
) -> None:
    if not has_links:

        def link(source: Path, target: Path) -> None:
            raise PermissionError(1, "Operation not permitted", str(target))

        monkeypatch.setattr(os, "link", link)
    start = Barrier(8)

    def key(_: int) -> bytes:
        start.wait()
        return patient_key(tmp_path)

    for _ in range(20):
        with ThreadPoolExecutor(8) as pool:
            (found,) = set(pool.map(key, range(8)))
        path = tmp_path / KEY_FILE
        assert found == path.read_bytes() and len(found) == KEY_BYTES
        assert path.stat().st_mode & 0o777 == 0o600
        assert os.listdir(tmp_path) == [KEY_FILE]
        path.unlink()


def test_a_key_that_another_process_is_writing_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / KEY_FILE
    path.touch()
    monkeypatch.setattr(module.time, "sleep", lambda _: path.write_bytes(b"k" * KEY_BYTES))
    assert patient_key(tmp_path) == b"k" * KEY_BYTES


@pytest.mark.parametrize("has_links", [True, False])
def test_a_full_disk_leaves_no_key_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_links: bool
) -> None:
    synced: list[int] = []

    def full(descriptor: int) -> None:
        synced.append(descriptor)
        if has_links or len(synced) > 1:
            raise OSError(28, "No space left on device")

    def no_link(source: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted", str(target))

    if not has_links:
        monkeypatch.setattr(os, "link", no_link)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="cannot read or write the patient key"):
        patient_key(tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_short_key_is_refused(tmp_path: Path) -> None:
    (tmp_path / KEY_FILE).write_bytes(b"short")
    with pytest.raises(UserError, match="holds 5 bytes"):
        patient_key(tmp_path)
