"""Manifests whose lists of files need more than 2 GiB, the most of one array of text in Arrow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from tapct.data import manifest as manifests
from tapct.data.manifest import ACCEPTED, Manifest, Row, RowTable, rows_as_table, write_table
from tapct.data.packed.pack_scan import PackOutcome
from tapct.data.packed.pack_table import PackTable
from tapct.data.packed.scan_list import StoredScan


def rows_of(num: int, num_files: int) -> list[Row]:
    """Rows of DICOM series; the number of files grows from row to row."""
    return [
        Row(
            *(f"{i:016x}", f"series {i}", "dicom", ACCEPTED),
            **dict.fromkeys(("depth", "height", "width"), 4),
            digest=f"{i:032x}",
            patient=f"p{i}",
            file_paths=tuple(f"study/{j:050d}.dcm" for j in range(num_files + i)),
        )
        for i in range(num)
    ]


@pytest.fixture(scope="module")
def large() -> RowTable:
    """350,000 rows whose lists need 2.7 GB. They are one chunk of 30 MB many times over."""
    part = rows_as_table([replace(row, id="") for row in rows_of(10, 120)] * 350)
    table = pa.concat_tables([part] * 100)
    ids = pa.array([f"{i:016x}" for i in range(len(table))])
    table = table.set_column(0, table.schema.field("id"), ids)
    assert table.column("file_paths").nbytes > 1 << 31
    return RowTable(table)


def test_rows_are_found_in_a_table_above_2_gib(large: RowTable) -> None:
    table = PackTable(large, np.ones(len(large), bool))
    numbers = [0, 1, 255, 256, 200_000, len(large) - 1]
    found = [repr(row) for row in table.some(np.array(numbers))]  # NaN != NaN
    assert found == [repr(large[i]) for i in numbers] and len(set(found)) == len(numbers)
    assert not list(table.some([]))


def test_the_list_of_a_store_is_made_of_a_table_above_2_gib(large: RowTable) -> None:
    table = PackTable(large, np.ones(len(large), bool))
    for i in (7, 349_999):
        row = large[i]
        scan = StoredScan(row.id, (4, 4, 4), (1.0, 2.0, 3.0), "", row.patient, "", row.digest)
        table.take(i, PackOutcome(scan))
    columns = table.store_columns()
    assert columns["id"].to_pylist() == [large[7].id, large[349_999].id]
    assert columns["spacing_x_mm"].to_pylist() == [3.0, 3.0]


def test_a_file_has_groups_of_rows_that_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # pyarrow cannot read a group of rows whose lists of text need more than 2 GiB
    monkeypatch.setattr(manifests, "_GROUP_BYTES", 20_000)
    rows, file = tuple(rows_of(20, 30)), tmp_path / "m.parquet"
    whole = Manifest(rows, tmp_path)
    write_table(whole, file)
    with pyarrow.parquet.ParquetFile(file) as content:
        assert content.num_row_groups > 1
        for k in range(content.num_row_groups):
            assert content.read_row_group(k).nbytes < 40_000
    found = Manifest.read(file)
    assert repr(found.rows) == repr(rows) and found.digest == whole.digest
