"""Times and sizes as people read them."""

from __future__ import annotations

from collections.abc import Mapping

UNITS = ("B", "kB", "MB", "GB", "TB")


def size(count: int) -> str:
    """Bytes in powers of 1000: 24.4 GB."""
    value, unit = float(count), 0
    while value >= 999.5 and unit < len(UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.0f} B" if unit == 0 else f"{value:.3g} {UNITS[unit]}"


def clock_text(seconds: float) -> str:
    """12.3 s, 4 min 05 s, 1 h 02 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def stages(seconds: Mapping[str, float]) -> list[tuple[str, float]]:
    """Longest first."""
    return sorted(seconds.items(), key=lambda pair: (-pair[1], pair[0]))
