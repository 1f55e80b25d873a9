"""Check that a scan is CT in Hounsfield units, by its values: NIfTI and NRRD name no modality.

CT is the one common modality with an absolute scale: air is near -1000 HU and soft tissue between
-200 and 300 HU. MR, PET, label maps, photographs and rescaled floats have no values near -1000. A
file that declares CT (DICOM, or a side-car's Modality) needs no air, since a crop inside the body
has none, but it still needs fat or air below zero.
"""

from __future__ import annotations

import numpy as np

from tapct.data.checks.check_rules import DEFAULT_RULES, CheckRules
from tapct.data.checks.hu_histogram import PADDING_BELOW, TOP_HU, HuHistogram
from tapct.data.checks.slice_check import check_slices
from tapct.types import AIR_HU, Refused

AIR_RANGE = (-1150.0, -300.0)  # air and lung, with noise
TISSUE_RANGE = (-200.0, 300.0)
BODY_ABOVE = -500.0  # HU; voxels above it count as body in the manifest's statistics
_UNIT_SPAN = 64.0  # fractional values that span less are shares, z-scores or logarithms
_SAMPLE = 1 << 18  # voxels of a histogram
_LINE_SAMPLE = 1 << 17  # voxels of the rows whose neighbours are compared
_MIN_PAIRS = 100
_MIN_NOISE_HU = 120.0  # noise of a scanner inside of a body stays below it
_METAL_HU = 1500
_MAX_LEVELS = 16  # different values of a label map, whatever its texture
_FEW_LEVELS = 512  # different values; CT has more
_MAX_WINDOW_HU = 2000  # 12-bit scans end at 2976 or 3071 HU by themselves
_MAX_BETWEEN = 0.5
_MIN_TURNED = 0.05  # share of voxels
_MAX_BONE_AT_END = 0.1  # share of voxels at the upper end of a window above 300 HU
_SOFT_TISSUE = (-200, 300)
_TISSUE_PEAK = (-200, 250)
_BODY_RANGE = (-600, 1500)


def subsample(voxels: np.ndarray, limit: int = 1 << 20) -> np.ndarray:
    """A strided subsample of at most about `limit` voxels, same axes; the stride is the same along
    all axes.
    """
    stride = 1
    while np.prod([-(-size // stride) for size in voxels.shape]) > limit:
        stride += 1
    return voxels[tuple(slice(None, None, stride) for _ in voxels.shape)]


def check_is_ct(
    voxels: np.ndarray,
    slope: float,
    intercept: float,
    declared_ct: bool,
    rules: CheckRules = DEFAULT_RULES,
) -> None:
    """Refuse voxels whose values cannot be HU.

    Args:
        voxels: stored voxels along three axes, any real dtype.
        slope: factor to HU.
        intercept: offset in HU.
        declared_ct: whether the file or its side-car gives Modality CT.
        rules: thresholds.
    Raises:
        Refused: not_finite, constant, normalised, label_map, no_rescale, not_hu, not_ct.
    """
    values = subsample(voxels, _SAMPLE).astype(np.float64) * slope + intercept
    if not np.isfinite(values).all():
        raise Refused("not_finite", "voxels hold NaN or infinity; write air (-1024) there")
    low, high = float(values.min()), float(values.max())
    span = f"values run from {low:g} to {high:g}"
    if low == high:
        raise Refused("constant", f"every voxel is {low:g}")
    if high - low < _UNIT_SPAN and (values != np.rint(values)).any():
        raise Refused(
            "normalised", f"{span}; HU span hundreds; export the scan without normalisation"
        )
    if low >= 0 and _is_label_map(voxels, values):
        raise Refused("label_map", f"{span} in flat regions, so these are labels and not a scan")
    air, tissue = _share(values, AIR_RANGE), _share(values, TISSUE_RANGE)
    if air < rules.min_air and low > -300 and high > 900:
        shifted = values - 1024
        if _share(shifted, AIR_RANGE) >= 0.05 and _share(shifted, TISSUE_RANGE) >= 0.05:
            raise Refused(
                "no_rescale",
                f"{span}, which are not HU; if the rescale intercept was lost, subtract 1024",
            )
    if declared_ct:
        if low > -20:
            raise Refused(
                "not_hu",
                f"Modality is CT, but {span}, without air or fat; check the rescale intercept",
            )
        return
    if air < rules.min_air:
        raise Refused(
            "not_ct",
            f"{span}, {air:.2%} are air or lung (-1150 to -300 HU); rule: at least "
            f"{rules.min_air:.2%} (min_air)",
        )
    _check_padding(values)
    if tissue < rules.min_tissue:
        raise Refused(
            "not_ct",
            f"{span}, {tissue:.2%} are soft tissue (-200 to 300 HU); rule: {rules.min_tissue:.1%}",
        )


def check_hu(
    hu_ZYX: np.ndarray, declared_ct: bool, rules: CheckRules = DEFAULT_RULES
) -> tuple[str, ...]:
    """Refuse a scan whose HU, after clamping, do not look like a body in a CT scanner.

    Args:
        hu_ZYX: int16 HU, every value >= AIR_HU.
        declared_ct: whether the file or its side-car gives Modality CT.
        rules: thresholds.
    Returns:
        Marks of what is unusual about an accepted scan, see docs/ingest.md.
    Raises:
        Refused: constant, clamped, too_small, empty_slices, repeated_slices, slice_order,
            label_map, noise, filled, windowed, no_rescale, not_hu, not_ct.
    """
    histogram = HuHistogram(subsample(hu_ZYX, _SAMPLE))
    if histogram.low == histogram.high and (hu_ZYX == hu_ZYX.flat[0]).all():
        raise Refused("constant", f"every voxel is {histogram.low} HU after clamping")
    if histogram.clamped > rules.max_clamped:
        raise Refused(
            "clamped",
            f"{histogram.clamped:.1%} of the voxels are {AIR_HU} HU or below; rule: at most "
            f"{rules.max_clamped:.0%} (max_clamped); check slope and intercept",
        )
    if hu_ZYX.size < rules.min_voxels:
        raise Refused(
            "too_small",
            f"{hu_ZYX.size} voxels are too few for a histogram, so nothing shows that they are CT; "
            f"rule: at least {rules.min_voxels} (min_voxels)",
        )
    _check_texture(hu_ZYX, histogram, rules)
    marks = [*check_slices(hu_ZYX, rules)]
    marks += _check_fills(histogram, rules)
    _check_intercept(histogram)
    marks += _check_window(histogram, rules)
    _check_scale(histogram, rules)
    marks += _check_tissue(histogram, declared_ct, rules)
    if histogram.step > 1:
        marks.append("values_coarse")
    return tuple(dict.fromkeys(marks))


def _check_texture(hu_ZYX: np.ndarray, histogram: HuHistogram, rules: CheckRules) -> None:
    """Refuse flat regions (scaled label maps) and values without spatial order (noise)."""
    lines = _lines(hu_ZYX)
    first, second = lines[..., :-1], lines[..., 1:]
    difference = second - first
    variance = float(lines.var())
    if variance > _MIN_NOISE_HU**2:
        noise = float((difference * difference).mean()) / (2.0 * variance)
        if noise > rules.max_noise:
            raise Refused(
                "noise",
                f"neighbouring voxels differ as much as any two ({noise:.2f}); rule: at most "
                f"{rules.max_noise} (max_noise); these are random values and not a scan",
            )
    body = (first > BODY_ABOVE) & (second > BODY_ABOVE)
    # one repeated value may be padding or the end of a window, which have rules of their own
    for hu in {histogram.low, histogram.high, *(fill.hu for fill in histogram.fills[:1])}:
        body &= (first != hu) & (second != hu)
    distinct = int((histogram.counts > 0).sum())
    # a scan that was enlarged by repeating voxels is flat too, but has many values
    if distinct <= _FEW_LEVELS and int(body.sum()) >= _MIN_PAIRS:
        flat = float((difference[body] == 0).mean())
        if flat > rules.max_flat:
            raise Refused(
                "label_map",
                f"{flat:.0%} of the neighbours in the body are equal; rule: at most "
                f"{rules.max_flat:.0%} (max_flat); these are labels or few grey levels",
            )
    if distinct <= _MAX_LEVELS:
        raise Refused(
            "label_map",
            f"the voxels have only {distinct} different values; rule: more than {_MAX_LEVELS}",
        )


def _lines(hu_ZYX: np.ndarray) -> np.ndarray:
    """A sample of whole rows of the scan as float32, cut at a value that metal exceeds."""
    stride = max(1, int(np.sqrt(hu_ZYX.size / _LINE_SAMPLE)))
    planes = hu_ZYX if hu_ZYX.shape[0] < 2 * stride else hu_ZYX[::stride]
    lines = planes[:, ::stride] if hu_ZYX.shape[1] >= 2 * stride else planes
    return np.minimum(lines, _METAL_HU).astype(np.float32)


def _check_fills(histogram: HuHistogram, rules: CheckRules) -> list[str]:
    """One exact value above air, such as 0 (water), must not pad the scan."""
    for fill in histogram.fills:
        is_end = fill.hu in (histogram.low, histogram.high)
        if fill.hu <= PADDING_BELOW or is_end and fill.hu != 0:
            continue
        if fill.share > rules.max_fill:
            raise Refused(
                "filled",
                f"{fill.share:.1%} of the voxels are exactly {fill.hu} HU, which is not air; rule: "
                f"at most {rules.max_fill:.0%} (max_fill); write {AIR_HU} there",
            )
        if fill.share > rules.mark_fill:
            return ["values_filled"]
    return []


def _check_intercept(histogram: HuHistogram) -> None:
    """Refuse HU + 1024 (or + 1000): soft tissue near 1064 HU, and nothing between air and fat."""
    tissue = histogram.share(850, 1200)
    if (
        histogram.share(-850, -30) < 0.01
        and tissue > 0.02
        and tissue > 1.5 * histogram.share(450, 850)
    ):
        raise Refused(
            "no_rescale",
            f"{tissue:.0%} of the values lie from 850 to 1200 HU and less than 1% from -850 to -30 "
            "HU, so the rescale intercept was lost; subtract 1024",
        )


def _check_window(histogram: HuHistogram, rules: CheckRules) -> list[str]:
    """Values that were clipped to a display window pile up at its ends."""
    counts, total = histogram.counts, histogram.num_voxels
    low, high = histogram.low - AIR_HU, histogram.high - AIR_HU

    def piles_up(index: int, beside: np.ndarray, share: float) -> bool:
        count = counts[index]
        return bool(count >= max(20.0, share * total, 10.0 * float(beside.mean())))

    cut_low = histogram.low > PADDING_BELOW and piles_up(low, counts[low + 1 : low + 9], 2e-3)
    cut_high = histogram.high < _MAX_WINDOW_HU and piles_up(high, counts[high - 8 : high], 2e-4)
    if not (cut_low or cut_high):
        return []
    if cut_high and histogram.high > 300 and counts[high] > _MAX_BONE_AT_END * total:
        raise Refused(
            "not_hu",
            f"{counts[high] / total:.0%} of the voxels are {histogram.high} HU, the largest value; "
            "that is no bone; check slope and sign",
        )
    if rules.refuse_windows == "all" or (rules.refuse_windows == "narrow" and cut_low):
        side = f"{histogram.low} HU" if cut_low else f"{histogram.high} HU"
        raise Refused(
            "windowed",
            f"the values from {histogram.low} to {histogram.high} HU pile up at {side}, so the "
            "scan was clipped; export it without a window, or give --rule refuse_windows=none",
        )
    return ["values_windowed"]


def _check_scale(histogram: HuHistogram, rules: CheckRules) -> None:
    """Refuse peaks of air, fat and bone at places where another slope or sign puts them."""
    if histogram.step > rules.max_step:
        raise Refused(
            "not_hu",
            f"all values are {histogram.step} HU or a multiple of it apart; rule: at most "
            f"{rules.max_step} (max_step); these are grey levels or HU with a wrong slope",
        )
    dense = histogram.total(300, TOP_HU + 1) / max(histogram.total(-300, TOP_HU + 1), 1e-9)
    if dense > rules.max_dense:
        raise Refused(
            "not_hu",
            f"{dense:.0%} of the body lie above 300 HU; rule: at most {rules.max_dense:.0%} "
            "(max_dense); check slope, intercept and sign",
        )
    above = histogram.total(900, 1100)
    beside = histogram.total(700, 900) + histogram.total(1100, 1300)
    if above > _MIN_TURNED and above > rules.max_turned * beside:
        raise Refused(
            "not_hu",
            f"{above:.0%} of the values form a peak at 1000 HU, where no tissue lies; check the "
            "sign (air is -1000 HU)",
        )
    low = histogram.share(-850, -300)
    if low > 0.05 and histogram.share(AIR_HU, -850) < 0.01:
        narrow = 40.0 * histogram.peak(40, -830, -320) / low
        if narrow > rules.max_narrow_air:
            raise Refused(
                "not_hu",
                f"{narrow:.0%} of the values from -850 to -300 HU lie within 40 HU, which is air "
                "at a wrong place; check slope and intercept",
            )
    if histogram.total(AIR_HU, -250) < 1e-3:
        around_fat = histogram.total(-250, -30)
        narrow = max(histogram.total(hu, hu + 6) for hu in range(-115, -85))
        if around_fat > 0.02 and narrow > rules.max_narrow_fat * around_fat:
            raise Refused(
                "not_hu",
                f"{narrow / around_fat:.0%} of the values from -250 to -30 HU lie within 6 HU, "
                "which is air with a slope of 0.1; correct the slope",
            )
    fat = histogram.peak(24, -140, -60)
    shifted = histogram.peak(24, -280, -160)
    between = histogram.share(-850, -320) / max(histogram.share(-320, -30), 1e-9)
    # a whole factor leaves gaps between the values, so that less evidence is enough
    limit = rules.max_fat_shift if histogram.step == 1 else rules.max_fat_shift_coarse
    if shifted > limit * fat and between < _MAX_BETWEEN:
        raise Refused(
            "not_hu",
            "fat lies from -280 to -160 HU instead of -140 to -60 HU; the slope is too large",
        )


def _check_tissue(histogram: HuHistogram, declared_ct: bool, rules: CheckRules) -> list[str]:
    """The peak of soft tissue must be there, stand out, and be apart from air."""
    reason = "not_hu" if declared_ct else "not_ct"
    tissue = histogram.share(*_SOFT_TISSUE)
    if tissue < rules.min_tissue:
        raise Refused(
            reason,
            f"{tissue:.2%} are soft tissue (-200 to 300 HU); rule: at least {rules.min_tissue:.1%}",
        )
    peak = histogram.peak(100, *_TISSUE_PEAK)
    mode = histogram.peak(100, *_BODY_RANGE)
    if peak < rules.min_tissue_mode * mode:
        raise Refused(
            reason,
            f"the peak of soft tissue is {peak / mode:.2f} of the largest peak; rule: at least "
            f"{rules.min_tissue_mode} (min_tissue_mode); check slope, intercept and sign",
        )
    spread = histogram.share(*_BODY_RANGE) / (_BODY_RANGE[1] - _BODY_RANGE[0])
    density = histogram.peak(12, *_TISSUE_PEAK) / max(spread, 1e-12)
    least = rules.min_declared_peak if declared_ct else rules.min_tissue_peak
    if density < least:
        raise Refused(
            reason,
            f"soft tissue is {density:.1f} times as frequent as an even spread of values; rule: at "
            f"least {least}; the values are spread as in MR and not as in CT",
        )
    if not declared_ct:
        _check_valley(histogram, rules)
    return ["values_unusual"] if density < rules.mark_tissue_peak else []


def _check_valley(histogram: HuHistogram, rules: CheckRules) -> None:
    """Refuse values that are as frequent between air and soft tissue as there."""
    counts = histogram.counts / histogram.num_voxels  # with padding, which is air too
    density = np.convolve(counts, np.full(50, 1 / 50), "same")
    air = float(density[: -700 - AIR_HU].max())
    tissue = float(density[-150 - AIR_HU : 150 - AIR_HU].max())
    valley = float(density[-700 - AIR_HU : -200 - AIR_HU].min())
    if valley > rules.max_valley * min(air, tissue):
        raise Refused(
            "not_ct",
            "air and soft tissue are no peaks of the histogram: values between them are "
            f"{valley / max(min(air, tissue), 1e-12):.2f} times as frequent; rule: at most "
            f"{rules.max_valley} (max_valley)",
        )


def _share(values: np.ndarray, bounds: tuple[float, float]) -> float:
    """Share of values between two bounds."""
    return float(((values >= bounds[0]) & (values <= bounds[1])).mean())


def _is_label_map(voxels: np.ndarray, values: np.ndarray) -> bool:
    """Whether values are few whole numbers, and most neighbours in the foreground are equal."""
    if (values != np.rint(values)).any():
        return False
    num_distinct = len(np.unique(values))
    if num_distinct <= 2:
        return True
    axis = int(np.argmax(voxels.shape))
    lines = np.moveaxis(voxels, axis, 0)
    stride = max(1, int(np.sqrt(lines[0].size * lines.shape[0] / _SAMPLE)))
    lines = lines[:, ::stride, ::stride]  # neighbours stay neighbours along the first axis
    first, second = lines[:-1], lines[1:]
    foreground = (first != 0) | (second != 0)
    equal = ((first == second) & foreground).sum() / max(1, foreground.sum())
    return num_distinct <= 4096 and bool(equal > 0.5)


def _check_padding(values: np.ndarray) -> None:
    """Refuse a peak of many different values below air, which means a shifted scale.

    Padding is one or two constants, and the noise of air lies about -1000 HU.
    """
    below = values[values < AIR_RANGE[0]]
    if below.size > 0.02 * values.size:
        constants, counts = np.unique(below, return_counts=True)
        commonest = np.argsort(counts)[-2:]
        if counts[commonest].sum() >= 0.5 * below.size:
            return
        outside = values[values < -700]
        outside = outside[~np.isin(outside, constants[commonest])]
        # the noise of air has its middle at -1000 HU, however wide it is
        if float(np.median(outside)) < AIR_RANGE[0] + 50:
            raise Refused(
                "not_hu",
                f"{below.size / values.size:.0%} of the values lie below air and are not constant, "
                "so the scale is shifted; check slope and intercept",
            )
