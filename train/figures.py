"""Figures of an evaluation.

Knows matplotlib; knows nothing of models or files.
"""

import io
import re
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import average_precision_score, precision_recall_curve

mpl.use("Agg")

_COUNTED_ID = re.compile(r' id="[a-z0-9.]+_\d+"')
"""Ids that matplotlib counts, and so repeats in every figure."""


def confusion(counts: np.ndarray, labels: Sequence[str]) -> Figure:
    """Draw (labels, labels): rows are true, shaded by their share of the row."""
    figure, axes = plt.subplots(figsize=(5, 4.4), layout="constrained")
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        colour = "white" if shares[row, column] > 0.5 else "black"
        text = f"{int(count)}\n{shares[row, column]:.1%}"
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(range(len(labels)), labels, rotation=20)
    axes.set_yticks(range(len(labels)), labels)
    axes.set(xlabel="predicted", ylabel="true", title="Sections")
    return figure


def precision_recall(true: np.ndarray, scores: np.ndarray, chosen: np.ndarray, names: Sequence[str]) -> Figure:
    """Draw a curve for each name that has positives, with its average precision and a dot where the model stands on it.

    Args:
        true: (rows, names) of bool.
        scores: (rows, names).
        chosen: (rows, names) of bool: what the model decided.
        names: of the columns.
    """
    figure, axes = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    colours = plt.get_cmap("turbo")(np.linspace(0.05, 0.95, len(names)))
    for column, name in enumerate(names):
        if true[:, column].any():
            average = average_precision_score(true[:, column], scores[:, column])
            columns = (true[:, column], scores[:, column], chosen[:, column])
            _add_curve(axes, *columns, color=colours[column], label=f"{name} {average:.2f}")
    axes.set(xlabel="recall", ylabel="precision", title="Precision against recall")
    if axes.lines:
        axes.legend(
            fontsize=6, ncols=1 + len(names) // 15, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False
        )
    return figure


def small_precision_recall(true: np.ndarray, scores: np.ndarray, chosen: np.ndarray) -> Figure:
    """Draw one such curve, small, to stand beside others.

    Args:
        true: (rows,) of bool, some of them true.
        scores: (rows,).
        chosen: (rows,) of bool.
    """
    figure, axes = plt.subplots(figsize=(2.3, 2), layout="constrained")
    _add_curve(axes, true, scores, chosen, color="tab:blue")
    axes.set(xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
    axes.set_xlabel("recall", fontsize=8)
    axes.set_ylabel("precision", fontsize=8)
    axes.tick_params(labelsize=8)
    return figure


def _add_curve(axes: Axes, true: np.ndarray, scores: np.ndarray, chosen: np.ndarray, **style: Any) -> None:
    precision, recall, _ = precision_recall_curve(true, scores, drop_intermediate=True)
    axes.plot(recall, precision, linewidth=1, drawstyle="steps-post", **style)
    hits = (true & chosen).sum()
    if chosen.any():
        axes.plot(hits / true.sum(), hits / chosen.sum(), "o", markersize=4, color=style["color"])
    axes.set(xlim=(0, 1.02), ylim=(0, 1.04))


def reliability(scores: np.ndarray, correct: np.ndarray, *, num_bins: int = 15) -> Figure:
    """Draw accuracy against confidence over equal-width bins, with the share of sections in each.

    Args:
        scores: (sections,) confidence of the chosen label.
        correct: (sections,) of bool.
        num_bins: of equal width.
    """
    figure, axes = plt.subplots(figsize=(4.6, 4.4), layout="constrained")
    bins = np.minimum((scores * num_bins).astype(int), num_bins - 1)
    counts = np.bincount(bins, minlength=num_bins)
    accuracy = np.bincount(bins, correct, num_bins) / np.maximum(counts, 1)
    middles = (np.arange(num_bins) + 0.5) / num_bins
    axes.bar(middles, counts / counts.sum(), width=1 / num_bins, color="grey", alpha=0.4, label="share of sections")
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":")
    axes.plot(middles[counts > 0], accuracy[counts > 0], marker="o", label="accuracy")
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.02), title="Calibration")
    axes.legend(loc="upper left", frameon=False)
    return figure


def svg(figure: Figure, *, title: str) -> Markup:
    """Return a figure as an SVG element to stand in a page: without a ground, in the page's own ink.

    Args:
        figure: whose black becomes the colour of the text around it.
        title: what it shows, for those who cannot see it; no other figure of the page may have the same.
    """
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    _, _, content = buffer.getvalue().partition("<svg ")
    content = _COUNTED_ID.sub("", content).replace("#000000", "currentColor")
    return Markup('<svg role="img" aria-label="{}" {}').format(title, Markup(content))  # noqa: S704 (matplotlib's own)


def close(drawn: Iterable[Figure]) -> None:
    """Free figures."""
    for figure in drawn:
        plt.close(figure)
