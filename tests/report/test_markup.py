"""Numbers as people read them."""

from __future__ import annotations

import math

import pytest

from tapct.report import markup


@pytest.mark.parametrize(
    ("value", "shown"),
    [(718, "718"), (5744, "5744"), (1_250_000, "1\u2009250\u2009000"), (0.21449, "0.2145"),
     (-0.0111, "\u22120.0111"), (1e-6, "1e-6"), (0.0, "0"), (math.nan, "not finite"),
     (37.204, "37.20"), (3.14e7 + 0.5, "3.14e7"), (-2.5e-5, "\u22122.5e-5")],
)  # fmt: skip
def test_numbers_are_written_for_people(value: float, shown: str) -> None:
    assert markup.number(value) == shown


def test_a_name_for_an_anchor_has_no_spaces_and_no_signs() -> None:
    assert markup.slug("Dice of each organ (5)") == "dice-of-each-organ-5"
