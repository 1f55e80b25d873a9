"""Memory of this process, for scripts that measure; Linux only."""

from __future__ import annotations

from pathlib import Path


def resident_mib(key: str) -> float:
    """Resident memory of this process: VmRSS, now, or VmHWM, the peak since `reset_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{key}:"))


def reset_peak() -> float:
    """Begin to measure the peak; returns the memory now. ru_maxrss has no such reset, and begins
    with the peak of the parent process.
    """
    Path("/proc/self/clear_refs").write_text("5")
    return resident_mib("VmRSS")
