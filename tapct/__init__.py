"""tapct: volumetric self-supervised pretraining of foundation models on CT."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tapct.data.scans.ingest import read_volume as read_volume
    from tapct.types import Volume as Volume
    from tapct.weights.pretrained import load_pretrained as load_pretrained
    from tapct.weights.pyramid import PyramidEncoder as PyramidEncoder

__version__ = "0.1.0"
__all__ = ["PyramidEncoder", "Volume", "__version__", "load_pretrained", "read_volume"]

_HOMES = {
    "PyramidEncoder": "tapct.weights.pyramid",
    "Volume": "tapct.types",
    "load_pretrained": "tapct.weights.pretrained",
    "read_volume": "tapct.data.scans.ingest",
}  # torch is loaded on first use


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tapct' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
