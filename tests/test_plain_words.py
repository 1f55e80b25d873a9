"""The list of words that we do not use: it finds what it should, and leaves code alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from plain_words import FORBIDDEN, findings, prose, prose_of_code

ROOT = Path(__file__).resolve().parent.parent
# these hold the words as examples
THE_LIST = ("plain_words.py", "test_plain_words.py")


def test_a_word_is_found_with_its_line_and_with_what_to_write_instead() -> None:
    assert findings("All is well.\nThe run is told to stop.") == [
        "line 2: 'told': write print, report, log, show, distinguish"
    ]


def test_a_phrase_is_found_across_a_line_break_and_not_across_a_paragraph() -> None:
    assert findings("it will go\non later") == ["line 1: 'go on': write resume, continue"]
    assert findings("where to go\n\nOn Monday") == []


@pytest.mark.parametrize("text", ["`task.judge`", "see ``judge`` and `tell`", "`a\nb` is code"])
def test_code_spans_are_left_alone(text: str) -> None:
    assert findings(text) == []


def test_a_code_span_over_two_lines_does_not_move_the_line_numbers() -> None:
    assert findings("`a\nb`\ntold") == [
        "line 3: 'told': write print, report, log, show, distinguish"
    ]


def test_words_that_only_hold_a_forbidden_one_are_left_alone() -> None:
    assert findings("An ongoing judgement; a foretold intellect. Sayings aside.") == []


def test_of_a_page_only_prose_and_the_comments_of_commands_are_left() -> None:
    page = "Text [here](told.md).\n```python\ntold = 1\n```\n    tapct told  # a comment\nend"
    assert prose(page) == "Text [here].\n\n\n\na comment\nend"


def test_every_pattern_is_valid_and_names_an_alternative() -> None:
    for pattern, better in FORBIDDEN:
        re.compile(pattern)
        assert better and not re.search(pattern, better, re.IGNORECASE), pattern


def test_of_a_python_file_comments_docstrings_and_names_are_left() -> None:
    source = (
        '"""Told.\n\nSaid."""\nsaid = 1  # tells\n\n\nclass A:\n    # says\n'
        '    def test_goes_on(self):\n        """Anew."""\n        return "told"\n'
    )
    lines = ["Told.", "", "Said.", "tells", "", "", "A", "says", "test goes on", "Anew.", "", ""]
    assert prose_of_code(source).splitlines() == lines[:-1]
    assert [line.split(":")[0] for line in findings(prose_of_code(source))] == [
        f"line {number}" for number in (1, 3, 4, 8, 9, 10)
    ]


@pytest.mark.parametrize("folder", ["tapct", "tests", "scripts"])
def test_python_files_use_plain_words(folder: str) -> None:
    files = [file for file in (ROOT / folder).rglob("*.py") if file.name not in THE_LIST]
    assert files
    wrong = {}
    for file in files:
        found = findings(prose_of_code(file.read_text(encoding="utf-8")))
        if found:
            wrong[file.relative_to(ROOT).as_posix()] = found
    assert wrong == {}
