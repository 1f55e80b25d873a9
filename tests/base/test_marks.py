"""Names of files in messages are marked, so that the manifest can leave them out."""

from __future__ import annotations

import pickle
from pathlib import Path

from tapct.base.marks import file_name, quoted, unmarked, without_marked
from tapct.types import Refused


def test_a_refusal_shows_the_name_and_keeps_its_marks() -> None:
    refused = Refused("corrupt", f"{file_name(Path('in/e.dcm'))} is cut, e.g. in slice 1")
    for error in (refused, pickle.loads(pickle.dumps(refused))):
        assert error.detail == "e.dcm is cut, e.g. in slice 1"
        assert str(error) == f"corrupt: {error.detail}"
        assert without_marked(error.marked) == "<file> is cut, e.g. in slice 1"


def test_marks_and_quotes_inside_a_text_from_outside_do_not_end_it() -> None:
    name = file_name("a\x03Meyer\x02")
    assert without_marked(f"{name} ends") == "<file> ends"
    assert unmarked(name) == "aMeyer"
    assert without_marked(name[:3]) == "<file>"  # a line that was cut
    assert quoted("O'Brien's") == "'O\"Brien\"s'"
