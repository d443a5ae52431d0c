"""The rule by which a model takes another's place.

Knows counts by page, costs and margins; knows nothing of where they come from.

The challenger is promoted if, over the four labels on the pages that both models were scored on,

- its macro F1 is better: p < 0.05, one-sided, by a paired bootstrap over sites, then pages; or
- it is not worse, the lower end of the difference (its 5 % quantile) being above -margin, and it is cheaper: 5 % fewer
  parameters, or 5 % fewer bytes with no more parameters (a wider table of hints alone is no cost);

and F1 of no label, nor micro F1 of the topics, is lower by more than the label margin, as measured.
"""

from dataclasses import dataclass

import numpy as np

from copydesk.labels import SectionLabel
from train.counts import Counts
from train.metrics import macro_f1, precision_recall_f1, resample, topic_f1

LEVEL = 0.05
CHEAPER = 0.95
"""Share of the champion's parameters, or bytes, from which a challenger is cheaper."""
MACRO = "macro_f1"
NAMES = (MACRO, *(f"{label}_f1" for label in SectionLabel), "topics_micro_f1")


@dataclass(frozen=True, slots=True)
class Cost:
    """What a model takes to keep and to run."""

    parameters: int
    """Of the whole network, its base included."""
    bytes: int
    """Of its folder."""

    def is_below(self, other: "Cost") -> bool:
        """Tell whether it is cheaper than another one by enough to count."""
        fewer = self.parameters <= CHEAPER * other.parameters
        return fewer or (self.parameters <= other.parameters and self.bytes <= CHEAPER * other.bytes)


@dataclass(frozen=True, slots=True)
class Difference:
    """One score of both models, and the interval of challenger less champion."""

    champion: float
    challenger: float
    low: float
    """5 % quantile of the resampled differences."""
    high: float
    """95 % quantile."""
    p: float
    """Share of the resampled differences that are no gain."""

    @property
    def gain(self) -> float:
        """By how much the challenger is higher."""
        return self.challenger - self.champion


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether the challenger is promoted, and why."""

    promoted: bool
    reason: str


def scores_of(counts: Counts, weights: np.ndarray) -> np.ndarray:
    """Return the scores of `NAMES`, each page counted as often as its weight (pages,) says."""
    confusion = np.tensordot(weights, counts.confusions, axes=1)
    topics = np.tensordot(weights, counts.topics, axes=1)[None]
    return np.array([macro_f1(confusion), *precision_recall_f1(confusion)[2], topic_f1(topics)[0]])


def compare(challenger: Counts, champion: Counts, *, samples: int, seed: int = 0) -> dict[str, Difference]:
    """Compare two models on the same pages.

    Args:
        challenger: its counts.
        champion: its counts, of the same pages in the same order.
        samples: how often to resample.
        seed: of the draws.

    Returns:
        By name, in the order of `NAMES`.
    """
    if challenger.keys != champion.keys:
        raise ValueError("the counts are of different pages: select those that both have")
    once = np.ones(len(champion.keys))
    before, after = scores_of(champion, once), scores_of(challenger, once)
    draws = resample(
        champion.sites,
        lambda weights: scores_of(challenger, weights) - scores_of(champion, weights),
        samples=samples,
        seed=seed,
    )
    low, high = np.quantile(draws, [LEVEL, 1 - LEVEL], axis=0)
    p = ((draws <= 0).sum(axis=0) + 1) / (samples + 1)
    columns = np.stack([before, after, low, high, p], axis=1).tolist()
    return {name: Difference(*values) for name, values in zip(NAMES, columns, strict=True)}


def judge(
    differences: dict[str, Difference], *, challenger: Cost, champion: Cost, margin: float, label_margin: float
) -> Verdict:
    """Apply the rule.

    Args:
        differences: as `compare` found them.
        challenger: its cost.
        champion: its cost.
        margin: of macro F1, within which a cheaper model may be worse.
        label_margin: by which no label's F1 may be lower.
    """
    macro = differences[MACRO]
    is_better, is_not_worse, is_cheaper = macro.p < LEVEL, macro.low > -margin, challenger.is_below(champion)
    found = f"macro F1 {macro.gain:+.4f}, at least {macro.low:+.4f} with 95 % confidence, p = {macro.p:.4f}"
    worse = {name: one.gain for name, one in differences.items() if name != MACRO and one.gain < -label_margin}
    if worse:
        listed = ", ".join(f"{name} {gain:+.4f}" for name, gain in worse.items())
        return Verdict(promoted=False, reason=f"worse by more than {label_margin}: {listed} ({found})")
    if is_better:
        return Verdict(promoted=True, reason=f"better: {found}")
    if is_not_worse and is_cheaper:
        return Verdict(promoted=True, reason=f"cheaper, and not worse by {margin}: {found}")
    lacking = "worse" if not is_not_worse else "no cheaper"
    return Verdict(promoted=False, reason=f"not better at p < {LEVEL}, and {lacking} (margin {margin}): {found}")
