"""Every file of the torture folder gets its verdict, with a reason that docs/ingest.md lists."""

from __future__ import annotations

from pathlib import Path

import pytest
import torture
from torture_cases import CASES

from tapct.data.index.build import build_manifest
from tapct.data.manifest import ACCEPTED, Row


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Row]]:
    """Rows of the manifest by the name of the case."""
    root = tmp_path_factory.mktemp("torture")
    torture.write_all(root / "archive", CASES)
    manifest = build_manifest(root / "archive", root / "manifest.parquet", workers=0)
    by_case: dict[str, list[Row]] = {}
    for row in manifest.rows:
        by_case.setdefault(Path(row.path).parts[0], []).append(row)
    return by_case


def test_there_are_many_cases_with_names_of_their_own() -> None:
    assert len(CASES) >= 60
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_verdict(rows: dict[str, list[Row]], case: torture.Case) -> None:
    (row,) = rows[case.name]
    verdict = row.reason
    if row.status == ACCEPTED:
        verdict = f"accepted:{row.marks}" if row.marks else "accepted"
    assert verdict == case.verdict, row.detail
    assert (row.status == ACCEPTED) == (row.detail == "")
    assert "\n" not in row.detail
