"""The options for the time and memory of one scan, which several commands have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tapct.data.workers.process_pool import ScanLimits

Timeout = Annotated[
    float,
    typer.Option(
        metavar="SECONDS",
        help="refuse a scan if reading it takes longer than this time plus 1 s per MB",
        min=1,
    ),
]
Memory = Annotated[
    float | None,
    typer.Option(
        "--memory-gb",
        metavar="GB",
        help="memory of all worker processes together; a scan that needs more is refused",
        min=0.1,
        show_default="80% of the machine's or the job's",
    ),
]


def limits_of(timeout: float, memory_gb: float | None) -> ScanLimits:
    """The limits of one scan as `process_pool` takes them."""
    from tapct.data.workers.process_pool import ScanLimits

    return ScanLimits(
        seconds=timeout, memory_bytes=None if memory_gb is None else int(memory_gb * 1e9)
    )
