"""Lines about a scan hold no text that may be a name, however it is quoted."""

from __future__ import annotations

from pathlib import Path

import pytest

from tapct.data.plain_facts import without_names

ROOT = Path("/archive")


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


def test_a_file_of_the_scan_is_not_named() -> None:
    file = ROOT / "Zebedee" / "Zebedee_1.nii.gz"
    line = without_names("Zebedee_1.nii.gz in Zebedee is cut off", ROOT, [file])
    assert line == "<file> in <folder> is cut off"
