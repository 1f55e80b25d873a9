"""From the label values of a scan to the classes of a segmentation: outside, body, then organs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tapct.config import setting
from tapct.eval.labels.truth import OUTSIDE as OUTSIDE_VALUE

OUTSIDE, BODY = "outside", "body"  # class 0: the air outside; class 1: the rest of the body
OUTSIDE_NAMES = ("table", "couch", "background")
BODY_NAMES = ("body", "body_trunc", "body_extremities", "skin", "external")


@dataclass(frozen=True)
class ClassWords:
    """Label names or values that decide which class a label belongs to.

    Args:
        organs: labels that count as organs; empty: all others.
        outside: labels that count as the air outside.
        body: labels for `inside the body, no organ`.
    """

    organs: Sequence[str]
    outside: Sequence[str]
    body: Sequence[str]

    def class_of(self, value: int, names: Mapping[int, str]) -> str:
        """The class that a label value of one scan belongs to.

        Args:
            value: label value, or `truth.OUTSIDE`.
            names: label value -> name, of that scan.
        """
        if value == OUTSIDE_VALUE:
            return OUTSIDE
        if value == 0:
            return OUTSIDE if self.body_labelled(names) else BODY
        name = names.get(value, f"label {value}")
        if is_called(value, name, self.outside):
            return OUTSIDE
        if is_called(value, name, self.body):
            return BODY
        wanted = not self.organs or is_called(value, name, self.organs)
        return name if wanted else BODY

    def body_labelled(self, names: Mapping[int, str]) -> bool:
        """True where the body has a label of its own, by name or by number, so that 0 is the air
        outside.
        """
        by_number = any(word.isdigit() for word in self.body)
        return by_number or any(is_called(value, name, self.body) for value, name in names.items())


@dataclass(frozen=True)
class ClassSettings:
    """Settings of a task on organs that decide which class a label belongs to."""

    organs: tuple[str, ...] = setting(
        (), "label names or values that count as organs; empty: all; other labels count as body"
    )
    outside: tuple[str, ...] = setting(
        OUTSIDE_NAMES, "label names or values that count as outside (air around the patient)"
    )
    body: tuple[str, ...] = setting(
        BODY_NAMES,
        "label names or values for `inside the body, no organ`; if one of these exists, label 0 "
        "means air",
    )

    def words(self) -> ClassWords:
        """The rule that gives the class of a label."""
        return ClassWords(self.organs, self.outside, self.body)

    def named_labels(self) -> dict[str, tuple[str, ...]]:
        """Setting -> words in it that must name a label; the defaults need not."""
        defaults = {*OUTSIDE_NAMES, *BODY_NAMES}
        found = {}
        for key in ("organs", "outside", "body"):
            words: tuple[str, ...] = getattr(self, key)
            found[key] = tuple(word for word in words if word not in defaults)
        return found


def is_called(value: int, name: str, words: Sequence[str]) -> bool:
    """Whether one of the words is the name of a label, in any case, or its value."""
    return any(word.lower() in (name.lower(), str(value)) for word in words)


def own_values(organs: Sequence[str], first: Mapping[str, int], body_value: int) -> dict[str, int]:
    """A label value for each organ, different from all others: the lowest that it has in the
    training scans, or a free one where scans number their organs differently.

    Args:
        organs: organs in order.
        first: organ -> its lowest label value.
        body_value: label value of the body; 0 where it has none.
    """
    found: dict[str, int] = {}
    free = max(body_value, *(first[organ] for organ in organs)) + 1
    for organ in organs:
        value = first[organ]
        if value == body_value or value in found.values():
            value, free = free, free + 1
        found[organ] = value
    return found
