"""Patients by columns are those of the plain rules, scan by scan."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from plain_patients import patients_of as plain_patients_of

from tapct.data.patients import near_copies
from tapct.data.patients.columns import roots
from tapct.data.patients.identity import SOURCES, Known, PatientRules, patients_of
from tapct.data.readers.raw import Header
from tapct.data.scans.headers import facts_of

KEY, ROOT = b"k" * 16, Path("/archive")
PLACES = ("", "Meyer/", "p{n}/2019/", "sub-{n}/ses-1/", "case{n}_v2_", "imagesTr/liver_{n}_0000_")


def drawn(draw: random.Random) -> Known:
    """A scan that shares its facts with others."""
    number = draw.randrange(4)
    place = draw.choice(PLACES).format(n=number)
    is_series = draw.random() < 0.5
    path = ROOT / f"{place}x{draw.randrange(100)}{'' if is_series else '.nii.gz'}"
    header = Header(
        patient_id=draw.choice(["", "REMOVED", f"P{number}", f"ANON{number}", "Hospital"]),
        study_uid=draw.choice(["", f"1.{draw.randrange(5)}"]),
        series_uid=draw.choice(["", f"2.{draw.randrange(6)}"]),
    )
    facts = facts_of(header, KEY, draw.choice(["header", "side_car"]))
    sketch = np.array([draw.randrange(60) for _ in range(draw.randrange(3))], np.uint64)
    digest = draw.choice(["", f"d{draw.randrange(12)}"])
    known = Known(path, is_series, facts, digest, np.unique(sketch).tobytes())
    return known if draw.random() < 0.9 else replace(known, facts=None, digest="")


@pytest.mark.parametrize("hashes_at_once", [1, 1 << 20])
def test_patients_are_those_of_the_plain_rules(
    monkeypatch: pytest.MonkeyPatch, hashes_at_once: int
) -> None:
    monkeypatch.setattr(near_copies, "_HASHES_AT_ONCE", hashes_at_once)
    draw = random.Random(0)
    sources, marks, num_joined = set(), [0, 0, 0], 0
    for seed in range(300):
        scans = [drawn(draw) for _ in range(draw.randrange(12))]
        column = {s.path.relative_to(ROOT).as_posix(): f"T{i % 3}" for i, s in enumerate(scans)}
        options: list[dict[str, object]] = [
            *({}, {}, {"regex": r"(?:case|liver_|p)(\d+)"}, {"folder": 1}),
            *({"column": dict(list(column.items())[::3])}, {"trusts_header": True}),
        ]
        rules = replace(PatientRules(ROOT, KEY), **options[seed % 6])  # type: ignore[arg-type]
        found = patients_of(scans, rules)
        assert list(found) == plain_patients_of(scans, rules), seed
        sources |= {each.source for each in found}
        flags = [(e.has_stand_in, e.has_several_ids, e.has_near_copy) for e in found]
        marks = [count + any(column) for count, column in zip(marks, zip(*flags))] or marks
        num_joined += sum(each.hash != each.given for each in found)
    assert sources == {"", *SOURCES} and num_joined > 200


def test_roots_are_the_smallest_members_of_connected_sets() -> None:
    draw = random.Random(1)
    for _ in range(200):
        num = draw.randrange(1, 40)
        pairs = [(draw.randrange(num), draw.randrange(num)) for _ in range(draw.randrange(40))]
        sets = {number: {number} for number in range(num)}
        for one, other in pairs:
            both = sets[one] | sets[other]
            sets.update(dict.fromkeys(both, both))
        ones, others = (np.array([pair[i] for pair in pairs], np.int64) for i in (0, 1))
        assert roots(num, ones, others).tolist() == [min(sets[number]) for number in range(num)]
