"""Lines of the manifest are without names, and otherwise as they were written."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tapct.base.marks import file_name, quoted
from tapct.data.scans import plain_facts
from tapct.data.scans.plain_facts import without_names

ROOT = Path("/data/archive")


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("e.dcm", "1 of 9 slices equal another one, e.g. 3 and 4"),
        ("tilt/1.dcm", "axes are 5 degrees off a right angle (gantry tilt?); slice 1 of 20"),
        ("slices/rule", "3 slices; rule: at least 16 (--min-depth)"),
        ("file/data/slice.nii.gz", "the data file has 3 volumes; slice 2 is a file"),
    ],
)
def test_words_of_a_sentence_are_kept_whatever_files_are_called(path: str, line: str) -> None:
    scan = ROOT / path
    assert without_names(line, ROOT, (scan, scan.parent)) == line
    named = f"{file_name(scan)} of {file_name(scan.parent)}: {line}"
    assert without_names(named, ROOT, (scan, scan.parent)) == f"<file> of <file>: {line}"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"RescaleType is {quoted('ED')}", "RescaleType is 'ED'"),
        (f"RescaleType is {quoted('MEYER')}", "RescaleType is '<5 characters>'"),
        (f"kind {quoted('ED')}", "kind '<2 characters>'"),
        (f"Modality is {quoted('PT')}", "Modality is 'PT'"),
        (
            f"ImageType is {quoted('ORIGINAL/PRIMARY/AXIAL')}",
            "ImageType is 'ORIGINAL/PRIMARY/AXIAL'",
        ),
        (f"ImageType is {quoted('LOCALIZER/MEYER')}", "ImageType is '<15 characters>'"),
        (f"text {quoted(chr(39) + 'Meyer' + chr(39))}", "text '<7 characters>'"),
    ],
)
def test_only_terms_of_the_standard_are_quoted(text: str, shown: str) -> None:
    assert without_names(text, ROOT, ()) == shown


def test_whole_paths_are_hidden_without_marks_too() -> None:
    scan = ROOT / "Meyer" / "Meyer_1.nii.gz"
    for text in (str(scan), "Meyer/Meyer_1.nii.gz", "Meyer_1.nii.gz"):
        assert without_names(f"cannot read {text}.", ROOT, (scan,)) == "cannot read <file>."


@pytest.mark.parametrize(
    "name", ["Zebedee", "O'Zebedee Jim", "Jones' Zebedee", "Zebedee'", "'Zebedee", 'Zebe"dee']
)
@pytest.mark.parametrize(
    "line",
    [
        "Modality is '{}'; rule: CT",
        "'labels' in dataset.json has '{}': '1'; rule: a value and a name",
        "'labels' beside x has 'y': '{{'name': '{}'}}'; rule: a value and a name",
    ],
)
def test_a_quoted_name_is_replaced(line: str, name: str) -> None:
    shown = without_names(line.format(name), ROOT, [])
    assert "ebe" not in shown and "rule: " in shown


def test_a_quoted_list_is_replaced() -> None:
    line = f"space units are {['mm', chr(39) + 'Zebedee']}; rule: mm"
    assert "Zebedee" not in without_names(line, ROOT, [])


def test_words_of_headers_and_apostrophes_in_sentences_stay() -> None:
    line = "the body's axis of 'space' is 3 degrees off the scanner's 'LPS'"
    assert without_names(line, ROOT, []) == line


def test_no_text_of_an_exception_becomes_part_of_a_message() -> None:
    """Libraries quote files in their errors, so only facts about an error may be used."""
    data = Path(plain_facts.__file__).parent.parent
    folders = [data / name for name in ("readers", "labels", "scans", "search")]
    files = [file for folder in folders for file in folder.rglob("*.py")]
    assert {file.parent for file in files} >= set(folders)
    found = []
    for file in files:
        for handler in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(handler, ast.ExceptHandler) and handler.name:
                found += [f"{file.name}:{line}" for line in _quoted_errors(handler)]
    assert found == []


def _quoted_errors(handler: ast.ExceptHandler) -> list[int]:
    """Lines in which the text of the exception of a handler is used."""
    lines = []
    for node in ast.walk(handler):
        used: list[ast.expr] = []
        if isinstance(node, ast.FormattedValue):
            used = [node.value]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            used = node.args if node.func.id in ("str", "repr", "single_line") else []
        elif isinstance(node, ast.Attribute) and node.attr in ("args", "msg", "message"):
            used = [node.value]
        for value in used:
            if isinstance(value, ast.Name) and value.id == handler.name:
                lines.append(value.lineno)
    return lines
