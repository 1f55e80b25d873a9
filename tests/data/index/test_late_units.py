"""Files of many folders that one worker reads: a disk without an answer, and a decoder that never
returns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tapct.data.index import head_units, listing
from tapct.data.index.build import build_manifest
from tapct.data.index.head_units import FolderFiles, HeadUnit, read_unit
from tapct.data.search.discover import Looked
from tapct.data.workers.process_pool import DEFAULT_LIMITS, map_unordered


def unit_of(num_folders: int) -> HeadUnit:
    """Folders with two files each."""
    folders = (
        FolderFiles(Path(f"/{k}"), ("a", "b"), (b"0" * 16, b"1" * 16), 10)
        for k in range(num_folders)
    )
    return HeadUnit(Path("/"), tuple(folders), 120.0, b"")


@pytest.mark.parametrize(("answers", "num_opened"), [((), 4), ((2,), 7), ((0, 9), 5)])
def test_a_disk_without_an_answer_is_waited_for_in_a_few_folders(
    monkeypatch: pytest.MonkeyPatch, answers: tuple[int, ...], num_opened: int
) -> None:
    opened: list[int] = []

    def look(folder: Path, names: Sequence[str], *_: Any) -> Iterator[Looked]:
        opened.append(int(folder.name))
        late = "" if int(folder.name) in answers else "has no answer"
        yield from (Looked(name, late=late) for name in names)

    monkeypatch.setattr(head_units, "look_into", look)
    found = read_unit(unit_of(20)).looked
    assert opened == list(range(num_opened))
    assert [[one.name for one in some] for some in found] == [["a", "b"]] * 20
    for number, some in enumerate(found):
        is_late = number not in answers or number not in opened
        assert all(bool(one.late) == is_late for one in some)


def test_the_time_limit_of_a_worker_does_not_grow_with_the_folders_of_a_unit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sizes: list[Any] = []

    def noted(*given: Any, num_bytes: Any, limits: Any, **more: Any) -> Any:
        sizes.append((num_bytes, limits))
        return map_unordered(*given, num_bytes=num_bytes, limits=limits, **more)

    monkeypatch.setattr(listing, "map_unordered", noted)
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "broken.dcm").write_bytes(b"no DICOM")
    build_manifest(tmp_path / "scans", tmp_path / "m.parquet")
    num_bytes, limits = sizes[0]
    one, many = (limits.seconds_for(num_bytes(unit_of(num))) for num in (1, 1024))
    assert 4 * DEFAULT_LIMITS.seconds <= one < many < one + 200
