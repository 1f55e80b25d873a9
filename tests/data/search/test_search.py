"""The search for scans ends, whatever lies in the folder: special files, links in a circle, folders
that may not be read, and disks that do not answer.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from scan_files import make_ct, write_nifti

from tapct.base.exits import UserError
from tapct.data.index import finding
from tapct.data.index.build import build_manifest
from tapct.data.packed.pack import pack
from tapct.data.search import discover, folder_entries, passed_over
from tapct.data.search.discover import find_source, search
from tapct.data.workers import time_limit
from tapct.data.workers.process_pool import ScanLimits
from tapct.data.workers.time_limit import NoAnswer, TimeLimit
from tapct.types import Refused


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with one scan."""
    (tmp_path / "scans").mkdir()
    write_nifti(tmp_path / "scans" / "a.nii.gz", make_ct())
    return tmp_path / "scans"


@pytest.fixture
def blocking() -> Iterator[Callable[..., Any]]:
    """`blocking(function, names)` is a function that waits for files and folders of these names
    until the test ends, and `function` for others.
    """
    end = threading.Event()

    def blocked(function: Callable[..., Any], names: set[str]) -> Callable[..., Any]:
        def call(path: Path, *more: Any) -> Any:
            if path.name in names:
                end.wait(30)
            return function(path, *more)

        return call

    yield blocked
    end.set()


def test_special_files_are_counted_by_kind_and_never_opened(root: Path) -> None:
    for name in ("b.nii.gz", "c.dcm", "IM0001"):
        os.mkfifo(root / name)
    (root / "null.dcm").symlink_to("/dev/null")
    (root / "zero.nii").symlink_to("/dev/zero")
    (root / "gone.dcm").symlink_to("nowhere")
    (root / "loop.dcm").symlink_to("loop.dcm")
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(root)  # the path of a socket has at most 107 bytes
        try:
            server.bind("s.dcm")
        finally:
            os.chdir(here)
        built = build_manifest(root, root.parent / "m.parquet")
    assert [row.path for row in built.rows] == ["a.nii.gz"]
    assert built.passed_over == {"FIFO": 3, "device": 2, "broken link": 2, "socket": 1}
    assert passed_over.summary(built.passed_over) == (
        "8 files (3 FIFO, 2 broken link, 2 device, 1 socket)"
    )


def test_one_special_file_is_refused_without_being_opened(root: Path) -> None:
    os.mkfifo(root / "b.nii.gz")
    with pytest.raises(Refused, match="neither a regular file nor a folder"):
        find_source(root / "b.nii.gz")
    built = build_manifest(root, root.parent / "m.parquet")
    (root / "a.nii.gz").unlink()
    os.mkfifo(root / "a.nii.gz")
    with pytest.raises(UserError, match=r"none of the 1 .*a\.nii\.gz: vanished"):
        pack(built, root.parent / "store")


def test_links_in_a_circle_end_and_each_folder_is_visited_once(root: Path) -> None:
    deep = root / "p" / "q"
    deep.mkdir(parents=True)
    (deep / "up").symlink_to(root)
    (deep / "here").symlink_to(deep)
    (root / "again").symlink_to(deep)
    write_nifti(deep / "b.nii.gz", make_ct(seed=1))
    paths = [source.path.relative_to(root).as_posix() for source in search(root).sources]
    assert paths == ["a.nii.gz", "again/b.nii.gz"]


def test_a_folder_that_may_not_be_listed_is_refused_and_the_others_are_searched(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("closed", "open"):
        (root / name).mkdir()
        write_nifti(root / name / "b.nii.gz", make_ct(seed=len(name)))
    real = os.scandir

    def scandir(folder: Path | int) -> Any:  # root could list the folder whatever its mode
        if str(folder).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(folder))
        return real(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    built = build_manifest(root, root.parent / "m.parquet", workers=0)
    assert [(row.path, row.reason) for row in built.rows] == [
        ("a.nii.gz", ""),
        ("closed", "unreadable"),
        ("open/b.nii.gz", ""),
    ]


def test_a_file_without_an_answer_does_not_stop_the_search(
    root: Path, monkeypatch: pytest.MonkeyPatch, blocking: Callable[..., Any]
) -> None:
    for name in ("IM1", "IM2.dcm", "answers.txt", "notes.txt"):
        (root / name).write_bytes(b"some bytes that are no DICOM")
    late = {"IM1", "IM2.dcm", "notes.txt"}
    monkeypatch.setattr(discover, "read_head", blocking(discover.read_head, late))
    limits = ScanLimits(seconds=0.2)
    built = build_manifest(root, root.parent / "m.parquet", limits=limits)
    refused = [(row.path, row.reason) for row in built.rows if row.status == "refused"]
    assert refused == [("IM1", "timed_out"), ("IM2.dcm", "timed_out")]
    assert "no answer within 0.2 s (--timeout)" in built.rows[0].detail
    assert built.passed_over == {"without an answer": 1, ".txt": 1}
    assert len(built.accepted) == 1


def test_after_three_files_without_an_answer_the_others_of_a_folder_are_not_tried(
    root: Path, monkeypatch: pytest.MonkeyPatch, blocking: Callable[..., Any]
) -> None:
    (root / "dead").mkdir()
    names = {f"IM{i:02d}" for i in range(20)}
    for name in names:
        (root / "dead" / name).write_bytes(b"x")
    (root / "dead" / "z.nii.gz").write_bytes((root / "a.nii.gz").read_bytes())
    monkeypatch.setattr(discover, "read_head", blocking(discover.read_head, names))
    began = time.monotonic()
    listing = search(root, seconds=0.1)
    assert time.monotonic() - began < 1.5  # 20 * 0.1 would be 2
    late = [source for source in listing.sources if source.reason == "timed_out"]
    assert {source.path.name for source in late} == names
    assert sum("was not opened" in source.detail for source in late) == 17
    assert len(listing.sources) == 22


def test_a_folder_without_an_answer_is_refused(
    root: Path, monkeypatch: pytest.MonkeyPatch, blocking: Callable[..., Any]
) -> None:
    (root / "mount").mkdir()
    monkeypatch.setattr(folder_entries, "read", blocking(folder_entries.read, {"mount"}))
    listing = search(root, seconds=0.1)
    assert [(s.path.name, s.reason) for s in listing.sources] == [
        ("a.nii.gz", ""),
        ("mount", "timed_out"),
    ]
    assert find_source(root / "a.nii.gz").kind == "nifti"


def test_label_tables_without_an_answer_end_the_index_with_one_line(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = threading.Event()
    write_nifti(root / "a_seg.nii.gz", make_ct())
    monkeypatch.setattr(finding, "pair_labels", lambda *_: end.wait(30))
    monkeypatch.setattr(finding, "_PAIRING_SECONDS", 0.0)
    with pytest.raises(UserError, match=r"no answer within 0\.1 s \(--timeout\); check the disk"):
        build_manifest(root, root.parent / "m.parquet", workers=0, limits=ScanLimits(seconds=0.1))
    end.set()


def test_a_time_limit_gives_results_and_errors_of_the_function_itself() -> None:
    limit = TimeLimit(30)
    assert [limit.call(divmod, 7, n) for n in (2, 3)] == [(3, 1), (2, 1)]
    with pytest.raises(ZeroDivisionError):
        limit.call(divmod, 7, 0)
    assert limit.call(threading.get_ident) == limit.call(threading.get_ident)
    limit.close()
    assert TimeLimit().call(threading.get_ident) == threading.get_ident()


def test_a_late_call_halves_the_limit_and_its_answer_is_not_taken_for_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(time_limit, "LEAST_SECONDS", 0.02)
    limit = TimeLimit(0.06)
    ends = [threading.Event() for _ in range(3)]
    seen = []
    for end in ends:
        with pytest.raises(NoAnswer, match=f"within {limit.seconds:.3g} s"):
            limit.call(end.wait)
        seen.append(limit.seconds)
    assert seen == [0.03, 0.02, 0.02]
    limit.seconds = 30.0
    for end in ends:
        end.set()
    assert [limit.call(str, n) for n in range(20)] == [str(n) for n in range(20)]
    limit.close()
