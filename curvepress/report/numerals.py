"""Numbers as a person writes them: few digits, units, a true minus sign."""

from __future__ import annotations

import math

NBSP = "\N{NO-BREAK SPACE}"
"""Between a number and its unit, so that no line breaks there."""
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def count(n: float) -> str:
    """A number of things with three digits and a prefix: ``270 k``, ``1.02 M``."""
    for least, limit, unit in ((999.5e9, 1e12, "T"), (999.5e6, 1e9, "G"), (999.5e3, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(n) >= least:
            return f"{_three(n / limit)}{NBSP}{unit}"
    return exact(n)


def exact(n: float) -> str:
    """A number of things in full, thousands apart: ``269 722``."""
    return f"{n:,.0f}".replace(",", "\u202f")


def size(n: float) -> str:
    """A number of bytes: ``512 B``, ``1.03 MiB``."""
    for limit, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if n >= limit:
            return f"{_three(n / limit)}{NBSP}{unit}"
    return f"{n:.0f}{NBSP}B"


def percent(ratio: float) -> str:
    """A ratio in per cent: ``50 %``, ``7.3 %``."""
    p = ratio * 100
    return signed(f"{p:.0f}{NBSP}%" if abs(p) >= 10 or p == 0 else f"{p:.2g}{NBSP}%")


def times(ratio: float) -> str:
    """A ratio as a factor: ``0.61×``."""
    return f"{signed(f'{ratio:.2f}' if 0.0095 <= ratio < 99.5 else f'{ratio:.2g}')}×"


def metric(value: float) -> str:
    """A metric with four digits: ``91.73``, ``0.2841``; ``not finite`` where it is not."""
    if not math.isfinite(value):
        return "not finite"
    if value == 0 or abs(value) >= 1e-3:
        digits = 4 - 1 - (math.floor(math.log10(abs(value))) if value else 0)
        return signed(f"{value:.{min(max(digits, 0), 4)}f}")
    return rise(value)


def rise(value: float) -> str:
    """A small quantity with three digits, as a power of ten where it is far from one: ``0.0123``, ``1.2×10⁻⁵``."""
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 999.5:
        return signed(f"{value:#.3g}".rstrip("."))
    if abs(value) < 1e4 and abs(value) > 1:
        return signed(f"{value:.0f}")
    digits, exponent = f"{value:.1e}".split("e")
    return signed(f"{digits}×10{str(int(exponent)).translate(SUPERSCRIPT)}")


def uncertain(value: float, error: float) -> str:
    """A quantity and its standard error, both to two digits of the error: ``0.0123 ± 0.0011``, ``(1.20 ± 0.31)×10⁻⁵``."""
    if not (math.isfinite(value) and math.isfinite(error)) or error <= 0:
        return rise(value)
    largest = max(abs(value), error)
    exponent = 0 if 1e-3 <= largest < 1e4 else math.floor(math.log10(largest))
    v, e = value / 10.0**exponent, error / 10.0**exponent
    digits = min(max(1 - math.floor(math.log10(e)), 0), 6)
    plain = signed(f"{v:.{digits}f}{NBSP}± {e:.{digits}f}")
    return f"({plain})×10{str(exponent).translate(SUPERSCRIPT)}" if exponent else plain


def tick(value: float) -> str:
    """A label of an axis: like :func:`rise`, without the digits that a power of ten or a round number does not need."""
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return signed(f"{value:.4g}")
    digits, exponent = f"{value:.3e}".split("e")
    digits = digits.rstrip("0").rstrip(".")
    power = f"10{str(int(exponent)).translate(SUPERSCRIPT)}"
    return signed({"1": power, "-1": f"-{power}"}.get(digits, f"{digits}×{power}"))


def seconds(t: float) -> str:
    """A duration: ``340 ms``, ``12.4 s``, ``3 min 20 s``, ``1 h 05 min``."""
    if t < 1:
        return f"{t * 1000:.0f}{NBSP}ms"
    if t < 60:
        return f"{t:.1f}{NBSP}s"
    minutes, rest = divmod(round(t), 60)
    return f"{minutes}{NBSP}min {rest:02d}{NBSP}s" if minutes < 60 else f"{minutes // 60}{NBSP}h {minutes % 60:02d}{NBSP}min"


def milliseconds(t: float) -> str:
    """Milliseconds with three digits: ``0.0503 ms``, ``12.4 ms``."""
    return f"{_three(t)}{NBSP}ms"


def signed(text: str) -> str:
    """The text with a true minus sign."""
    return text.replace("-", "−")


def shortened(name: str, length: int = 22) -> str:
    """The name with its middle left out where it is longer than ``length``."""
    if len(name) <= length:
        return name
    head = (length - 1) // 3
    return f"{name[:head]}…{name[len(name) - (length - 1 - head) :]}"


def _three(value: float) -> str:
    value = float(f"{value:.3g}")
    digits = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.{max(digits, 0)}f}"
