"""Turns, medians, exponents and the table.

Knows numbers and goals; knows nothing of what is measured.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Goal:
    """What a number should reach."""

    limit: float
    at_most: bool = False

    def met_by(self, value: float) -> bool:
        """Tell whether a number reaches it."""
        return value <= self.limit if self.at_most else value >= self.limit

    def __str__(self) -> str:
        return f"{'≤' if self.at_most else '≥'} {number(self.limit)}"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. What could not be measured is None, and no goal is met by it."""

    what: str
    ours: float | None = None
    theirs: float | None = None
    unit: str = ""
    more_is_better: bool = False
    goal: Goal | None = None
    of_ratio: bool = False
    """Whether the goal is about the ratio; else it is about ours."""
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """How many times better ours is than theirs."""
        if self.ours is None or self.theirs is None:
            return None
        return self.ours / self.theirs if self.more_is_better else self.theirs / self.ours

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None without a goal or without the number that it is about."""
        value = self.ratio if self.of_ratio else self.ours
        return None if self.goal is None or value is None else self.goal.met_by(value)

    def as_dict(self, *, judged: bool) -> dict[str, Any]:
        """Return what the JSON file says of it; where nothing is `judged`, no goal is met or missed."""
        goal = None if self.goal is None else str(self.goal)
        return asdict(self) | {"ratio": self.ratio, "goal": goal, "met": self.met if judged else None}

    def line(self, *, judged: bool) -> str:
        """Return the row in Markdown."""
        values = [f"{number(value)} {self.unit}".strip() if value is not None else "" for value in self._values()]
        ratio = "" if self.ratio is None else number(self.ratio)
        met = "" if self.goal is None else "not judged"
        if self.goal is not None and judged:
            met = {True: "yes", False: "no", None: "not measured"}[self.met]
        what = f"{self.what} ({self.note})" if self.note else self.what
        return f"| {what.replace('|', '/')} | {' | '.join(values)} | {ratio} | {self.goal or ''} | {met} |"

    def _values(self) -> tuple[float | None, float | None]:
        return self.ours, self.theirs


def number(value: float) -> str:
    """Write a number with three digits, or all of a larger one."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(rows: Iterable[Row], *, judged: bool) -> str:
    """Return rows as a Markdown table."""
    head = ["| what | ours | theirs | ratio | goal | met |", "|---|---|---|---|---|---|"]
    return "\n".join([*head, *(row.line(judged=judged) for row in rows)])


def alternate(sides: Mapping[str, Callable[[], Result]], *, repeats: int) -> dict[str, list[Result]]:
    """Let sides take turns, every other round backwards: a machine that gets slower should favour none.

    Returns:
        For each side what each of its runs gave.
    """
    results: dict[str, list[Result]] = {name: [] for name in sides}
    for turn in range(repeats):
        for name in list(sides)[:: 1 if turn % 2 == 0 else -1]:
            results[name].append(sides[name]())
    return results


def median(samples: Iterable[Mapping[str, Any]], name: str) -> float:
    """Return the median of a number that each run gave."""
    return float(np.median([sample[name] for sample in samples]))


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Return the exponent with which time grows with size: the slope of a line through the logarithms.

    Raises:
        ValueError: fewer than two sizes, or one that is not positive.
    """
    if len(set(sizes)) < 2 or len(sizes) != len(seconds) or min(*sizes, *seconds) <= 0:
        raise ValueError(
            f"sizes {list(sizes)} and seconds {list(seconds)}: expected pairs, two sizes at least, all > 0"
        )
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])
