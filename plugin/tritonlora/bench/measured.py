# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The results of a benchmark: measured values and ratios of them, as a table and as a plot."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

MILLI, MICRO = 1e3, 1e6  # seconds to ms and to µs
MEGA = 1e6


@dataclass(frozen=True, slots=True)
class Series:
    """Percentiles of a quantity that was measured many times."""

    name: str
    unit: str
    p50: float
    p99: float


@dataclass(frozen=True, slots=True)
class Ratio:
    """A result with a target: a quotient of two series of the same run, or a value with its unit in the name."""

    name: str
    value: float
    target: float
    at_most: bool  # whether the target is the largest value allowed; False: the smallest

    @property
    def is_reached(self) -> bool:
        """Whether the value meets the target."""
        return self.value <= self.target if self.at_most else self.value >= self.target


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a benchmark."""

    name: str
    title: str
    series: tuple[Series, ...]
    ratios: tuple[Ratio, ...]
    notes: tuple[str, ...] = ()


def series(name: str, unit: str, values: Sequence[float], *, scale: float = 1.0) -> Series:
    """The series of `values`. Multiplied by `scale` they are in `unit`."""
    ordered = sorted(values)
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return Series(name, unit, scale * statistics.median(ordered), scale * p99)


def seconds_of(call: Callable[[], object]) -> float:
    """The time that a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def at_most(name: str, value: float, target: float) -> Ratio:
    """A ratio that meets its target when it is not above it."""
    return Ratio(name, value, target, at_most=True)


def at_least(name: str, value: float, target: float) -> Ratio:
    """A ratio that meets its target when it is not below it."""
    return Ratio(name, value, target, at_most=False)


def series_rows(parts: Sequence[Part]) -> list[tuple[str, ...]]:
    """Rows of: part, what, p50, p99, unit."""
    return [
        (part.name, one.name, _number(one.p50), _number(one.p99), one.unit) for part in parts for one in part.series
    ]


def ratio_rows(parts: Sequence[Part]) -> list[tuple[str, ...]]:
    """Rows of: part, what, value, target, reached."""
    return [
        (
            part.name,
            one.name,
            f"{one.value:.3g}",
            f"{'at most' if one.at_most else 'at least'} {one.target:g}",
            "yes" if one.is_reached else "NO",
        )
        for part in parts
        for one in part.ratios
    ]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def draw(parts: Sequence[Part], path: Path) -> None:
    """A row of bars for each part, p50 with p99 as a line, and its ratios below, into a PNG file."""
    import matplotlib as mpl

    mpl.use("agg")  # no display
    from matplotlib import pyplot

    heights = [1.6 + 0.3 * len(part.series) + 0.2 * len(part.ratios) for part in parts]
    figure, rows = pyplot.subplots(
        len(parts), figsize=(8, sum(heights)), height_ratios=heights, layout="constrained", squeeze=False
    )
    for part, axes in zip(parts, rows[:, 0], strict=True):
        places = range(len(part.series))
        axes.barh(places, [one.p50 for one in part.series], 0.6)
        axes.hlines(places, [one.p50 for one in part.series], [one.p99 for one in part.series], color="tab:red")
        for place, one in zip(places, part.series, strict=True):
            axes.annotate(
                f" {_number(one.p50)}, p99 {_number(one.p99)} {one.unit}", (max(one.p50, one.p99), place), va="center"
            )
        axes.set_yticks(places, [one.name for one in part.series])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.5 * max(max(one.p50, one.p99) for one in part.series))
        axes.set_title(part.title)
        axes.set_xlabel("\n".join(" ".join(row[1:4]) for row in ratio_rows([part])))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
