"""The list of formats is whole: every reader is in it, and every name of a scan leads to one."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from pathlib import Path

import pytest
from scan_files import make_ct, save_scan

from tapct.data import formats, readers
from tapct.data.index.build import build_manifest
from tapct.data.readers import stem_of
from tapct.data.readers.raw import Image
from tapct.data.search import passed_over
from tapct.data.search.discover import find_source

FOLDER = Path(readers.__file__).parent


def has_read(path: Path) -> bool:
    """Whether a file defines the function `read` of a format; other files are parts of readers."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return any(isinstance(node, ast.FunctionDef) and node.name == "read" for node in body)


def test_every_reader_file_is_listed_as_a_format() -> None:
    files = {path.stem for path in FOLDER.glob("*.py") if has_read(path)}
    listed = {known.read.__module__.rpartition(".")[2] for known in readers.FORMATS}
    assert listed == files


def test_names_and_suffixes_of_formats_are_distinct() -> None:
    names = [known.name for known in readers.FORMATS]
    suffixes = [suffix for known in readers.FORMATS for suffix in known.suffixes]
    assert len(set(names)) == len(names) and len(set(suffixes)) == len(suffixes)
    assert all(readers.format_named(name).name == name for name in names)


def test_every_format_has_a_title_in_the_light_module_of_help_texts() -> None:
    assert list(formats.TITLES) == [known.name for known in readers.FORMATS]
    *first, last = formats.TITLES.values()
    assert formats.listed("and") == f"{', '.join(first)} and {last}"
    *first, last = (title for title in formats.TITLES.values() if title != "DICOM")
    assert formats.listed("or", without="dicom") == f"{', '.join(first)} or {last}"


def test_every_format_is_named_where_a_user_looks_for_it() -> None:
    root = FOLDER.parents[2]
    for page in ("README.md", "docs/data.md", "docs/extending.md"):
        text = (root / page).read_text(encoding="utf-8")
        assert [title for title in formats.TITLES.values() if title not in text] == [], page


def test_what_is_read_is_not_listed_as_a_file_to_convert() -> None:
    """`passed_over` and the table of docs/ingest.md name files that no reader takes."""
    read = {suffix for known in readers.FORMATS for suffix in known.suffixes}
    rows = (FOLDER.parents[2] / "docs" / "ingest.md").read_text(encoding="utf-8").splitlines()
    (row,) = (line for line in rows if line.endswith("| convert them to NIfTI |"))
    named = re.findall(r"`(\.[\w.]+)`", row)
    assert named and not read & {*passed_over.NOT_READ, *named}


@pytest.mark.parametrize(
    "name, kind",
    [
        ("a.nii", "nifti"),
        ("a.NII.GZ", "nifti"),
        ("a.nrrd", "nrrd"),
        ("a.nhdr", "nrrd"),
        ("a.mha", "meta"),
        ("a.mhd", "meta"),
        ("a.dcm", None),
        ("a.gz", None),
        ("a", None),
    ],
)
def test_single_files_are_recognised_by_their_suffix(name: str, kind: str | None) -> None:
    known = readers.format_of(Path("folder.nii") / name)
    assert (known.name if known else None) == kind


def test_a_format_that_is_added_to_the_list_is_found_read_and_indexed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the docstring of `tapct.data.readers` promises to whoever adds a format."""
    save_scan(tmp_path / "a" / "x1.nii.gz", make_ct())
    (tmp_path / "a" / "x1.nii.gz").rename(tmp_path / "a" / "x1.invented")

    def read(files: tuple[Path, ...]) -> Image:
        return readers.nifti.read(files)

    invented = readers.Format("invented", (".invented",), read, ("json",))
    changed = (*readers.FORMATS, invented)
    monkeypatch.setattr(readers, "FORMATS", changed)
    (row,) = build_manifest(tmp_path / "a", tmp_path / "m.parquet").rows
    assert (row.path, row.kind, row.status) == ("x1.invented", "invented", "accepted")
    assert find_source(tmp_path / "a" / "x1.invented").kind == "invented"
    assert stem_of(Path("x1.invented")) == "x1"


def test_the_libraries_of_formats_can_be_loaded() -> None:
    readers.load_libraries()
    for known in readers.FORMATS:
        for library in known.libraries:
            assert importlib.import_module(library).__name__ in sys.modules
