"""What `tapct index` accepts beyond plain scans, and the fewest slices of a scan."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tapct.data.checks.check_rules import DEFAULT_RULES, CheckRules

# A single slice has no third dimension to learn from: a 3D crop of it is padding but for one slice.
MIN_DEPTH = 2
# A choice: up to 8:1 the loss in CT of the body is mostly noise, beyond it texture goes too.
MAX_LOSSY_RATIO = 8.0


@dataclass(frozen=True)
class ReadRules:
    """What is accepted beyond plain scans. An accepted scan of this kind has a mark in its row.

    Args:
        derived: True to accept images that were computed from others: projections, reformats, maps
            of materials.
        max_lossy_ratio: largest ratio of a lossy compression.
        resample_tilt: True to resample scans with gantry tilt to a grid with right angles.
        checks: thresholds of the checks of values; None leaves these checks out.
    """

    derived: bool = False
    max_lossy_ratio: float = MAX_LOSSY_RATIO
    resample_tilt: bool = False
    checks: CheckRules | None = DEFAULT_RULES


PLAIN = ReadRules()
# For a scan that was accepted before: the digest in its row shows that it is the same scan.
AS_INDEXED = ReadRules(derived=True, max_lossy_ratio=math.inf, resample_tilt=True, checks=None)
