"""How a quantity is said to a person: the one home of bytes, seconds, numbers and the headline of a run.

The screen says them while a run goes on, the report after it. Programs read the plain numbers from the run folder.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def format_bytes(count: float) -> str:
    """Three significant digits in powers of 1000, as network rates are given.

    >>> format_bytes(0), format_bytes(999), format_bytes(1234), format_bytes(56_780_000)
    ('0 B', '999 B', '1.23 kB', '56.8 MB')
    """
    units = ("B", "kB", "MB", "GB", "TB", "PB")
    power = 0
    while power < len(units) - 1 and abs(count) >= 999.5:  # 999.5 would be said as 1000
        count, power = count / 1000, power + 1
    return f"{count:.0f} {units[power]}" if abs(count) >= 999.5 else f"{count:.3g} {units[power]}"


def format_seconds(seconds: float | None) -> str:
    """The two largest units that matter.

    >>> format_seconds(0.43), format_seconds(12.6), format_seconds(65), format_seconds(7260), format_seconds(None)
    ('0.43 s', '13 s', '1 min 05 s', '2 h 01 min', '-')
    """
    if seconds is None or not math.isfinite(seconds):
        return "-"
    if seconds < 9.95:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def format_number(value: float | None) -> str:
    """A loss or a metric: four decimals in everyday range, "-" for what was not measured, NaN said aloud.

    >>> format_number(0.81234), format_number(12345.6), format_number(0.00001234), format_number(None), format_number(math.nan)
    ('0.8123', '12346', '1.234e-05', '-', 'NaN')
    """
    if value is None:
        return "-"
    if math.isnan(value):
        return "NaN"
    size = abs(value)
    if size and (size < 1e-3 or math.isinf(size)):
        return f"{value:.4g}"
    return f"{value:.4f}" if size < 1000 else f"{value:.0f}"


def total_seconds(phases: Mapping[str, float]) -> float:
    """Seconds of all phases: the entry "total" where there is one, else their sum."""
    return float(phases["total"]) if "total" in phases else float(sum(phases.values()))


def one_line(text: str) -> str:
    """Text that may come from elsewhere (a client's reason, a file name) as one line without control characters."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def headline(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a person wants to know of a finished run, as (what, how much), from its summary.json."""
    primary = str(summary["primary_metric"])
    initial, final, best = (summary[key].get(primary) for key in ("initial", "metrics", "best"))
    trainable, base = summary["trainable_parameters"], summary["base_parameters"]
    rows = [
        (primary, f"{format_number(initial)} -> {format_number(final)}"),
        ("best", f"{format_number(best)} in round {summary['best'].get('round', '-')}"),
        ("rounds", f"{summary['rounds_completed']} ({one_line(str(summary['stopped_because']))})"),
        ("on the wire", f"{format_bytes(summary['bytes_up'])} up, {format_bytes(summary['bytes_down'])} down"),
        ("time", format_seconds(total_seconds(summary["seconds"]))),
        ("trained", f"{trainable:,} of {base:,} parameters ({trainable / max(base, 1):.2%})"),
        ("rejected updates", f"{summary['rejected_updates']:,}"),
    ]
    privacy = summary.get("privacy")
    if privacy:
        said = f"noise {privacy['noise']}" if privacy["epsilon"] is None else f"epsilon {privacy['epsilon']:.4g}"
        rows.append(("privacy", f"{said} at delta {privacy['delta']:g}, unit {privacy['unit']}"))
    return rows
