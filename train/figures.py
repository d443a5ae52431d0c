"""Figures of an evaluation.

Knows matplotlib; knows nothing of models or files.
"""

from collections.abc import Iterable, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from sklearn.metrics import average_precision_score, precision_recall_curve

mpl.use("Agg")


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


def precision_recall(true: np.ndarray, scores: np.ndarray, names: Sequence[str]) -> Figure:
    """Draw a curve for each name that has positives, with its average precision.

    Args:
        true: (rows, names) of bool.
        scores: (rows, names).
        names: of the columns.
    """
    figure, axes = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    colours = plt.get_cmap("turbo")(np.linspace(0.05, 0.95, len(names)))
    for column, name in enumerate(names):
        if not true[:, column].any():
            continue
        precision, recall, _ = precision_recall_curve(true[:, column], scores[:, column])
        average = average_precision_score(true[:, column], scores[:, column])
        axes.plot(recall, precision, color=colours[column], linewidth=1, label=f"{name} {average:.2f}")
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02), title="Precision against recall")
    axes.legend(fontsize=6, ncols=1 + len(names) // 15, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


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
    axes.bar(middles, counts / counts.sum(), width=1 / num_bins, color="lightgrey", label="share of sections")
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":")
    axes.plot(middles[counts > 0], accuracy[counts > 0], marker="o", label="accuracy")
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.02), title="Calibration")
    axes.legend(loc="upper left")
    return figure


def close(drawn: Iterable[Figure]) -> None:
    """Free figures."""
    for figure in drawn:
        plt.close(figure)
