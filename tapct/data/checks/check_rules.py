"""Thresholds of the checks that a scan's values must pass to be read as CT in Hounsfield units.

`CheckRules` is the one place of their defaults; docs/ingest.md lists every rule with its reason
code. `tapct index --rule NAME=VALUE` and `--rules FILE.yaml` replace single thresholds.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tapct.base.exits import UserError, single_line
from tapct.config.fields import checked, setting
from tapct.config.repeated_keys import parse


@dataclass(frozen=True)
class CheckRules:
    """Thresholds of the checks of values.

    The defaults lie between 92 real and synthetic scans (with crops, metal, contrast, noise and
    padding added) and the same scans with wrong values (docs/ingest.md). Shares are shares of the
    voxels, from 0 to 1.
    """

    min_air: float = setting(
        5e-4, "smallest share of air and lung, for files that nothing declares as CT", ge=0, le=1
    )
    min_tissue: float = setting(
        5e-3, "smallest share of soft tissue; a plastic test object has 0.055", ge=0, le=1
    )
    min_voxels: int = setting(
        1000,
        "fewest voxels of a scan; the checks need a histogram, and no real scan has fewer",
        ge=1,
    )
    max_clamped: float = setting(
        0.95, "largest share of voxels at or below -1024 HU; padded real scans reach 0.76", gt=0
    )
    max_fill: float = setting(
        0.1,
        "largest share of one exact value above -900 HU, such as padding with 0 (water); a rotated "
        "real scan has 0.06",
        ge=0,
    )
    mark_fill: float = setting(
        0.01, "a scan is marked values_filled if the share of such a value is larger", ge=0
    )
    refuse_windows: str = setting(
        "narrow",
        "clipped scans to refuse: those clipped above air (narrow), all or none; the others are "
        "marked values_windowed",
        choices=("narrow", "all", "none"),
    )
    max_flat: float = setting(
        0.4,
        "largest share of neighbouring voxels in the body that are equal; real scans reach 0.13",
        gt=0,
    )
    max_noise: float = setting(
        0.7,
        "largest variance of differences of neighbours, relative to independent voxels (1); real "
        "scans reach 0.25",
        gt=0,
    )
    max_dense: float = setting(
        0.75, "largest share of values above 300 HU among those above -300 HU", gt=0
    )
    min_tissue_mode: float = setting(
        0.25,
        "smallest size of the peak of soft tissue, relative to the largest peak from -600 to 1500 "
        "HU; real scans have 1",
        ge=0,
    )
    min_tissue_peak: float = setting(
        5.0,
        "smallest density of the peak of soft tissue, as a multiple of an even spread over -600 to "
        "1500 HU; real scans have 11 and more, with much noise 5.5, a scaled MR 1 to 6",
        ge=0,
    )
    min_declared_peak: float = setting(
        3.5, "the same for files that are declared as CT, such as DICOM", ge=0
    )
    mark_tissue_peak: float = setting(
        6.2, "a scan is marked values_unusual if the density of this peak is smaller", ge=0
    )
    max_valley: float = setting(
        0.75,
        "largest density between air and soft tissue, relative to the lower of the two peaks; real "
        "scans reach 0.53",
        gt=0,
    )
    max_narrow_air: float = setting(
        0.6,
        "only for scans with almost no values below -850 HU (no air): largest share of "
        "the values from -850 to -300 HU that may lie within one range of 40 HU; a narrower peak "
        "is air at a wrong place; lung has at most 0.45",
        gt=0,
    )
    max_narrow_fat: float = setting(
        0.3,
        "only for scans without air: largest share of the values from -250 to -30 HU that may lie "
        "within one range of 6 HU between -115 and -80 HU; a narrower peak is air with a slope of "
        "0.1; fat has at most 0.1",
        gt=0,
    )
    max_fat_shift: float = setting(
        1.6,
        "largest height of a peak from -280 to -160 HU, divided by the height of the peak of fat "
        "(-140 to -60 HU); only for scans with few values between this peak and air; real scans "
        "reach 1.4",
        gt=0,
    )
    max_fat_shift_coarse: float = setting(
        0.5,
        "the same for scans with coarse steps (all differences between values are multiples of a "
        "number of 2 HU or more)",
        gt=0,
    )
    max_step: int = setting(
        8,
        "largest step between grey levels, in HU: the number of which all differences between "
        "values are multiples",
        ge=1,
    )
    max_turned: float = setting(
        1.2,
        "largest number of values from 900 to 1100 HU, divided by the number of values from 700 "
        "to 900 and from 1100 to 1300 HU; a peak at 1000 HU is air with the wrong sign; bone "
        "reaches 0.6",
        gt=0,
    )
    max_empty_slices: float = setting(
        0.5, "largest share of constant slices at the ends of a scan", ge=0, le=1
    )
    max_repeated_slices: float = setting(
        0.02, "largest share of slices that equal another slice; fewer are marked", ge=0, le=1
    )
    max_slice_order: float = setting(
        0.65,
        "largest difference of neighbouring slices, relative to slices a third of the scan apart; "
        "for 16 slices and more; real scans reach 0.61",
        gt=0,
    )
    min_axis_order: float = setting(
        0.6,
        "difference of neighbouring voxels if two sizes of the header are exchanged, divided by "
        "the difference in the order of the header; a scan below this value is refused; real scans "
        "have 1 or more",
        ge=0,
    )


DEFAULT_RULES = CheckRules()


def read_rules(file: Path | None, overrides: Sequence[str] = ()) -> CheckRules:
    """The rules of a YAML file and of NAME=VALUE texts, which win over the file.

    Args:
        file: YAML file with one table of names and values, or None.
        overrides: texts such as `max_clamped=0.9`.
    Raises:
        UserError: the file cannot be read, or a name or value is wrong.
    """
    import yaml

    given: dict[str, tuple[Any, str]] = {}
    if file is not None:
        try:
            text = file.read_text(encoding="utf-8")
            parse(text, yaml.SafeLoader)
            content = yaml.safe_load(text)
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise UserError(f"cannot read rules {file}: {single_line(error, 200)}") from error
        if not isinstance(content, Mapping):
            raise UserError(f"rules {file} must be a table such as 'max_clamped: 0.9'")
        given.update({str(name): (value, str(file)) for name, value in content.items()})
    for text in overrides:
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--rule {text} must be NAME=VALUE, such as max_clamped=0.9")
        try:
            given[name.strip()] = (yaml.safe_load(value), f"--rule {text}")
        except yaml.YAMLError as error:
            raise UserError(f"--rule {text} has no readable value") from error
    hints = typing.get_type_hints(CheckRules)
    fields = {field.name: field for field in dataclasses.fields(CheckRules)}
    values = {}
    for name, (value, source) in given.items():
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"rules are {', '.join(fields)}"
            raise UserError(f"{source}: there is no rule '{name}'; {hint}")
        try:
            values[name] = checked(hints[name], value, fields[name].metadata)
        except ValueError as error:
            raise UserError(f"{source}: rule {name} is {value!r}; it {error}") from error
    return CheckRules(**values)
