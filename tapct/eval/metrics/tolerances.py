"""Tolerances of the surface Dice (NSD) by organ, where published ones are known.

A tolerance is meant to be the disagreement between two experts. A table of results names the
tolerance of each organ, since NSD at another tolerance is another metric.

Sources:
    FLARE22, abdomen: the evaluation program of the challenge, FLARE22/Evaluation/
        FLARE22_DSC_NSD_Eval.py of github.com/JunMa11/FLARE. All values were compared with it.
    Nikolov et al. 2021 (doi:10.2196/26151), head and neck: 95th percentile of the distance between
        two observers. The table of the paper could not be read. Brainstem, mandible, optic nerve
        and parotid are the same in a public evaluation program for head and neck; the others have
        not been compared with anything (`_UNVERIFIED`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from tapct.base.exits import UserError

DEFAULT_MM = 2.0  # about two voxels in the slices of a CT scan
_NIKOLOV = "Nikolov et al. 2021"
_FLARE = "FLARE22"
# entered from memory; compare them with the paper before you publish an NSD
_UNVERIFIED = frozenset(
    {
        *("brain", "cochlea", "lacrimal gland", "lens", "lung", "orbit", "spinal canal"),
        *("spinal cord", "submandibular"),
    }
)

_HEAD_AND_NECK_MM = {
    "brain": 1.01,
    "brainstem": 2.5,
    "cochlea": 1.25,
    "lacrimal gland": 2.5,
    "lens": 0.98,
    "lung": 2.42,
    "mandible": 1.01,
    "optic nerve": 2.5,
    "orbit": 1.65,
    "parotid": 2.85,
    "spinal canal": 1.17,
    "spinal cord": 2.93,
    "submandibular": 2.02,
}
_ABDOMEN_MM = {
    "liver": 5.0,
    "kidney": 3.0,
    "spleen": 3.0,
    "pancreas": 5.0,
    "aorta": 2.0,
    "inferior vena cava": 2.0,
    "adrenal gland": 2.0,
    "gallbladder": 2.0,
    "esophagus": 3.0,
    "stomach": 5.0,
    "duodenum": 7.0,
}
# other names of the same organs, after sides and word order are removed
_SYNONYMS = MappingProxyType(
    {
        "brain stem": "brainstem",
        "cord": "spinal cord",
        "gall bladder": "gallbladder",
        "ivc": "inferior vena cava",
        "postcava": "inferior vena cava",
        "lacrimal": "lacrimal gland",
        "oesophagus": "esophagus",
        "opticnerve": "optic nerve",
        "parotid gland": "parotid",
        "spinalcord": "spinal cord",
        "spinalcanal": "spinal canal",
        "submandibular gland": "submandibular",
        "adrenal": "adrenal gland",
    }
)
_SIDES = frozenset({"left", "right", "l", "r", "lt", "rt"})


@dataclass(frozen=True)
class Tolerance:
    """Tolerance of one organ.

    Args:
        mm: the tolerance.
        source: publication that it is from, with `unverified` where the value was not compared with
            it; `default` where none is known.
    """

    mm: float
    source: str

    def __str__(self) -> str:
        return f"{self.mm:g} mm ({self.source})"


def tolerance_of(organ: str, own_mm: Mapping[str, float] | None = None) -> Tolerance:
    """Find the tolerance of an organ.

    Args:
        organ: its name in the label map; case, `_`, `-`, the side (left, right, l, r) and a plural
            s are ignored, e.g. `Parotid_L`, `lungs`.
        own_mm: tolerances that the user has set, by organ as it is written in the label map, in any
            case.
    """
    for name, mm in (own_mm or {}).items():
        if name.lower() == organ.lower():
            return Tolerance(mm, "set")
    words = [word for word in re.split(r"[\s_\-.,()]+", organ.lower()) if word]
    name = " ".join(word for word in words if word not in _SIDES)
    name = _SYNONYMS.get(name, name)
    if name.removesuffix("s") in _HEAD_AND_NECK_MM | _ABDOMEN_MM:
        name = name.removesuffix("s")  # lungs, kidneys
    for table, source in ((_HEAD_AND_NECK_MM, _NIKOLOV), (_ABDOMEN_MM, _FLARE)):
        if name in table:
            doubt = ", unverified" if name in _UNVERIFIED else ""
            return Tolerance(table[name], source + doubt)
    return Tolerance(DEFAULT_MM, "default")


def parse(words: Sequence[str]) -> dict[str, float]:
    """Tolerances in mm by organ, from settings such as `liver=2`.

    Raises:
        UserError: an entry has another form, or its number is no tolerance.
    """
    found = {}
    for word in words:
        organ, _, number = word.rpartition("=")
        try:
            mm = float(number)
        except ValueError:
            mm = math.nan
        if not organ or not (math.isfinite(mm) and mm >= 0):
            raise UserError(
                f"the setting tolerances has {word!r}; write ORGAN=MM with a number of "
                "mm from 0 on, e.g. [liver=2,Parotid_L=2.85]"
            )
        found[organ.strip()] = mm
    return found


def check_named(own_mm: Mapping[str, float], organs: Sequence[str]) -> None:
    """Raise UserError where a tolerance is set for something that is no organ of the training
    scans, since it would have no effect.
    """
    known = {organ.lower() for organ in organs}
    for name in own_mm:
        if name.lower() not in known:
            raise UserError(
                f"the setting tolerances names {name!r}, which is no organ of the "
                f"training scans; they have {', '.join(organs)}"
            )
