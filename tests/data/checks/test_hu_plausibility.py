"""HU after clamping must look like a body in a CT scanner: wrong values are refused, and what real
scans are subjected to (crops, metal, contrast, noise, padding) is accepted.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scan_files import make_ct, write_nifti

from tapct.base.exits import UserError
from tapct.data.checks.check_rules import CheckRules, read_rules
from tapct.data.checks.ct_check import check_hu, check_is_ct
from tapct.data.checks.hu_histogram import HuHistogram
from tapct.data.index.build import build_manifest
from tapct.data.scans.ingest import read_volume
from tapct.data.scans.read_rules import ReadRules
from tapct.types import AIR_HU, Refused

SHAPE_ZYX = (20, 24, 26)
REAL = ("ts_body/example_ct.nii.gz", "elastix_lung/3DCT_lung.nrrd", "cip_chest/ct-64.nrrd")
Edit = Callable[[np.ndarray], np.ndarray]


def verdict(values: np.ndarray, declared_ct: bool = False, rules: CheckRules | None = None) -> str:
    """`accepted`, or the reason of the refusal."""
    rules = rules or CheckRules()
    try:
        check_is_ct(values, 1.0, 0.0, declared_ct, rules)
        check_hu(np.maximum(np.rint(values), AIR_HU).astype(np.int16), declared_ct, rules)
    except Refused as error:
        return error.reason
    return "accepted"


@pytest.fixture(scope="module")
def real_scans(real_ct: Path) -> list[np.ndarray]:
    return [read_volume(real_ct / name).hu_ZYX.astype(np.int32) for name in REAL]


def noisy(sd: float) -> Edit:
    def apply(hu: np.ndarray) -> np.ndarray:
        return hu + np.rint(np.random.default_rng(1).normal(0, sd, hu.shape)).astype(int)

    return apply


def with_metal(hu: np.ndarray) -> np.ndarray:
    hu = hu.copy()
    depth, height, width = (size // 2 for size in hu.shape)
    hu[depth - 3 : depth + 3, height - 4 : height + 4, width - 4 : width + 4] = 3071
    return hu


def with_contrast(hu: np.ndarray) -> np.ndarray:
    """Every fifth column of soft tissue enhanced by 250 HU."""
    hu = hu.copy()
    part = hu[:, :, ::5]
    part[(part > 0) & (part < 120)] += 250
    return hu


def in_a_circle(padding: int) -> Edit:
    def apply(hu: np.ndarray) -> np.ndarray:
        y, x = np.ogrid[-1 : 1 : hu.shape[1] * 1j, -1 : 1 : hu.shape[2] * 1j]
        return np.where(y**2 + x**2 > 1, padding, hu)

    return apply


def padded(padding: int) -> Edit:
    return lambda hu: np.pad(hu, ((3, 3), (20, 20), (20, 20)), constant_values=padding)


def thick(hu: np.ndarray) -> np.ndarray:
    return np.rint(hu[: len(hu) // 4 * 4].reshape(-1, 4, *hu.shape[1:]).mean(axis=1)).astype(int)


def twice_as_fine(hu: np.ndarray) -> np.ndarray:
    return np.rint((np.repeat(hu, 2, 2)[:, :, 1:] + np.repeat(hu, 2, 2)[:, :, :-1]) / 2).astype(int)


LEGITIMATE = {
    "as-it-is": lambda hu: hu,
    "left-half": lambda hu: hu[:, :, : hu.shape[2] // 2],
    "top-third": lambda hu: hu[-len(hu) // 3 :],
    "bottom-third": lambda hu: hu[: len(hu) // 3],
    "five-slices": lambda hu: hu[len(hu) // 2 : len(hu) // 2 + 5],
    "metal": with_metal,
    "contrast": with_contrast,
    "noise-60": noisy(60),
    "noise-100": noisy(100),
    "circle-3024": in_a_circle(-3024),
    "circle-1000": in_a_circle(-1000),
    "padded-1024": padded(-1024),
    "padded-2000": padded(-2000),
    "thick": thick,
    "every-third-voxel": lambda hu: hu[::3, ::3, ::3],
    "twice-as-fine": twice_as_fine,
    "voxels-repeated": lambda hu: hu.repeat(2, axis=1).repeat(2, axis=2),
    "fractional": lambda hu: hu + 0.25,
    "air-clipped": lambda hu: np.clip(hu, -1000, 1000),
}


@pytest.mark.parametrize("name", LEGITIMATE)
def test_what_happens_to_real_scans_is_accepted(real_scans: list[np.ndarray], name: str) -> None:
    for scan in real_scans:
        assert verdict(LEGITIMATE[name](scan)) == "accepted"


WRONG = {
    "lost-intercept": lambda hu: hu + 1024,
    "half-intercept": lambda hu: hu + 512,
    "intercept-twice": lambda hu: np.maximum(hu - 1024, AIR_HU),
    "slope-half": lambda hu: hu // 2,
    "slope-2": lambda hu: hu * 2,
    "slope-tenth": lambda hu: np.rint(hu / 10).astype(int),
    "slope-thousandth": lambda hu: hu / 1000,
    "sign-turned": lambda hu: -hu,
    "shares": lambda hu: (hu + 1024) / 4095,
    "eight-bits": lambda hu: np.rint((np.clip(hu, -1024, 3071) + 1024) / 16).astype(int),
    "soft-window": lambda hu: np.clip(hu, -160, 240),
    "brain-window": lambda hu: np.clip(hu, 0, 80),
    "noise": lambda hu: np.rint(np.random.default_rng(2).normal(0, 400, hu.shape)).astype(int),
    "voxels-permuted": lambda hu: (
        np.random.default_rng(3).permutation(hu.ravel()).reshape(hu.shape)
    ),
    "slices-permuted": lambda hu: np.random.default_rng(4).permutation(hu),
    "water-outside": in_a_circle(0),
    "all-clamped": lambda hu: np.full_like(hu, -9999),
    "second-slices-empty": lambda hu: np.where(np.arange(len(hu))[:, None, None] % 2, -1024, hu),
    "slices-twice": lambda hu: np.repeat(hu, 2, axis=0),
}


@pytest.mark.parametrize("declared_ct", [False, True])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_values_of_real_scans_are_refused(
    real_scans: list[np.ndarray], name: str, declared_ct: bool
) -> None:
    for scan in real_scans:
        assert verdict(WRONG[name](scan), declared_ct) != "accepted"


def test_the_histogram_agrees_with_plain_counts() -> None:
    hu = np.random.default_rng(5).integers(-1024, 4000, 20_000).astype(np.int16)
    hu[:6000] = -1000
    histogram = HuHistogram(hu)
    assert [(fill.hu, fill.share) for fill in histogram.fills] == [
        (-1000, (hu == -1000).sum() / hu.size),
        (3071, (hu >= 3071).sum() / hu.size),
    ]
    kept = hu[(hu != -1024) & (hu != -1000) & (hu < 3071)]
    assert histogram.share(-200, 300) == pytest.approx(((kept >= -200) & (kept < 300)).mean())
    assert histogram.total(-200, 300) == ((hu >= -200) & (hu < 300)).mean()
    densities = [((kept >= hu0) & (kept < hu0 + 100)).mean() / 100 for hu0 in range(-250, 200)]
    assert histogram.peak(100, -200, 249) == pytest.approx(max(densities))


def test_the_step_of_the_values_is_found() -> None:
    hu = np.maximum(make_ct(SHAPE_ZYX), -1000)
    assert HuHistogram(hu).step == 1
    assert HuHistogram(hu // 6 * 6).step == 6


@pytest.mark.parametrize(
    "policy, narrow, wide",
    [
        ("narrow", "windowed", "accepted"),
        ("all", "windowed", "windowed"),
        ("none", "accepted", "accepted"),
    ],
)
def test_clipped_scans_are_refused_or_marked_as_configured(
    policy: str, narrow: str, wide: str
) -> None:
    rules = CheckRules(refuse_windows=policy)
    clipped_narrow = np.clip(make_ct(SHAPE_ZYX), -160, 240)
    clipped_wide = np.clip(make_ct(SHAPE_ZYX), AIR_HU, 300)
    assert verdict(clipped_narrow, True, rules) == narrow
    assert verdict(clipped_wide, True, rules) == wide
    for hu in (clipped_narrow, clipped_wide):
        if policy == "none":
            assert check_hu(hu, True, rules) == ("values_windowed",)


def test_padding_with_water_is_refused_and_a_little_is_marked() -> None:
    for columns, reason in ((1, "accepted"), (4, "filled")):
        hu = make_ct(SHAPE_ZYX)
        hu[:, :, :columns] = 0
        assert verdict(hu) == reason
        if reason == "accepted":
            assert check_hu(hu, False) == ("values_filled",)


def test_rules_come_from_a_file_and_from_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text("max_clamped: 0.8\nrefuse_windows: all\n")
    rules = read_rules(tmp_path / "rules.yaml", ["max_clamped=0.7", "max_step=4"])
    assert rules == CheckRules(max_clamped=0.7, refuse_windows="all", max_step=4)
    assert read_rules(None) == CheckRules()


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["max_clampd=0.9"], "did you mean 'max_clamped'"),
        (["max_clamped"], "NAME=VALUE"),
        (["max_clamped=much"], "must be a number"),
        (["min_air=2"], "<= 1"),
        (["refuse_windows=some"], "must be one of"),
    ],
)
def test_wrong_rules_are_user_errors(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_rules(None, overrides)


@pytest.mark.parametrize("content", ["- 1", "a: [", "", "max_step: 1\nmax_step: 2\n"])
def test_wrong_files_of_rules_are_user_errors(tmp_path: Path, content: str) -> None:
    (tmp_path / "rules.yaml").write_text(content)
    with pytest.raises(UserError, match=r"rules\.yaml"):
        read_rules(tmp_path / "rules.yaml")
    with pytest.raises(UserError, match="cannot read"):
        read_rules(tmp_path / "missing.yaml")


def test_index_applies_rules_and_writes_marks(tmp_path: Path) -> None:
    (tmp_path / "archive").mkdir()
    write_nifti(tmp_path / "archive" / "a.nii", np.minimum(make_ct(SHAPE_ZYX), 400))
    for rules, expected in (
        (CheckRules(), ("accepted", "", "values_windowed")),
        (CheckRules(refuse_windows="all"), ("refused", "windowed", "")),
    ):
        manifest = build_manifest(
            tmp_path / "archive", tmp_path / "m.parquet", accept=ReadRules(checks=rules)
        )
        (row,) = manifest.rows
        assert (row.status, row.reason, row.marks) == expected
