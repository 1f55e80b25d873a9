"""Facts about a scan from its header and its JSON side-car."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from tapct.data.discover import stem_of
from tapct.data.patients import keyed_hash, patient_id_of
from tapct.data.readers.raw import Header, one_line
from tapct.types import Refused, ScanFacts


def read_sidecar(path: Path) -> dict[str, Any]:
    """The JSON object NAME.json beside NAME, or an empty one where there is none."""
    sidecar = path.with_name(stem_of(path) + ".json")
    if not sidecar.is_file():
        return {}
    try:
        content = json.loads(sidecar.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Refused("bad_sidecar", one_line(f"{sidecar.name} is not JSON: {error}")) from error
    if not isinstance(content, dict):
        raise Refused(
            "bad_sidecar", f"{sidecar.name} holds a {type(content).__name__}; rule: one JSON object"
        )
    return content


def merge_facts(header: Header, sidecar: dict[str, Any]) -> Header:
    """What the file says, completed by its side-car (BIDS and dcm2niix keys)."""
    keys = {
        "patient_id": "PatientID",
        "study_uid": "StudyInstanceUID",
        "series_uid": "SeriesInstanceUID",
        "study_date": "StudyDate",
        "modality": "Modality",
        "manufacturer": "Manufacturer",
        "kernel": "ConvolutionKernel",
        "sex": "PatientSex",
        "age": "PatientAge",
        "body_part": "BodyPartExamined",
    }
    told = {
        field: one_line(sidecar[key])
        for field, key in keys.items()
        if sidecar.get(key) not in (None, "", [])
    }
    return replace(header, **told)


def facts_from_header(header: Header, key: bytes | None) -> ScanFacts:
    """The facts that tapct keeps of a header; identifiers only as keyed hashes, and not at all
    without a key.
    """

    def hashed(text: str) -> str:
        return keyed_hash(key, text) if key and text else ""

    date = re.sub(r"\D", "", header.study_date)
    sex = header.sex.strip()[:1].upper()
    return ScanFacts(
        patient=hashed(patient_id_of(header.patient_id)),
        study=hashed(header.study_uid),
        series=hashed(header.series_uid),
        study_date=date if len(date) == 8 else "",
        modality=header.modality,
        manufacturer=header.manufacturer,
        kernel=header.kernel,
        sex=sex if sex in ("M", "F", "O") else "",
        age_years=_age_years(header.age),
        body_part=header.body_part,
    )


def _age_years(text: str) -> float:
    """Years from DICOM's `063Y`, `018M`, `012W`, `003D` or a plain number; NaN for anything
    else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([YMWD]?)\s*", text.upper())
    if not match:
        return float("nan")
    return (
        float(match[1])
        * {"": 1.0, "Y": 1.0, "M": 1 / 12, "W": 7 / 365.25, "D": 1 / 365.25}[match[2]]
    )


def label_names(path: Path, sidecar: dict[str, Any]) -> tuple[tuple[int, str], ...]:
    """Names from {"labels": {"1": "liver"}} or, as some data sets write it, {"labels": {"liver":
    1}}.
    """
    table = sidecar.get("labels", {})
    if not isinstance(table, dict):
        raise Refused(
            "bad_sidecar", f"'labels' beside {path.name} is no JSON object of value and name"
        )
    pairs = []
    for left, right in table.items():
        value, name = (left, right) if str(left).isdigit() else (right, left)
        if not str(value).isdigit():
            raise Refused(
                "bad_sidecar",
                f"'labels' beside {path.name} has '{left}': '{right}'; rule: value and name",
            )
        pairs.append((int(value), str(name)))
    return tuple(sorted(pairs))
