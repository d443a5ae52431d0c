"""Article bodies: ours beside trafilatura's, on the same pages.

Run `python -m bench.bodies --config configs/pages.yaml [--set evaluate.split=test]` after the release stage.
"""

import numpy as np
import trafilatura

from copydesk.labels import CLASSES
from copydesk.predictor import Document
from train.arguments import experiment_from_arguments
from train.evaluate import load_predictor, score_pages
from train.metrics import body_f1, bootstrap
from train.rows import load_rows, resplit
from train.sources.articles import read_topics


def main() -> None:
    """Print mean word F1 and 4-gram F1 of both, with intervals, over all pages and over English news."""
    experiment = experiment_from_arguments("Article bodies beside trafilatura's.")
    rows = [row for row in load_rows(experiment.prepared, "pages", experiment.evaluate.split) if row["kind"] == "html"]
    raws = [resplit(row) for row in rows]
    predictor = load_predictor(experiment)
    read = predictor.predict([Document(row["content"], kind=row["kind"]) for row in rows])
    ours = score_pages(predictor, read, rows, raws, topics=read_topics(experiment.prepare.topics))
    scores = np.zeros((len(rows), 2, 2))  # (pages, who, n-gram)
    for i, (row, raw, page) in enumerate(zip(rows, raws, ours, strict=True)):
        scores[i, 0] = page.body_word_f1, page.body_4gram_f1
        gold = "\n\n".join(
            text for text, label in zip(raw.texts(), row["classes"], strict=True) if CLASSES[label] == "body"
        )
        theirs = trafilatura.extract(row["content"], include_comments=False, include_tables=True) or ""
        scores[i, 1] = body_f1(gold, theirs, n=1), body_f1(gold, theirs, n=4)
    news = np.array([row["genre"] == "news" and row["language"] == "en" for row in rows])
    for name, chosen in (("all", np.ones(len(rows), dtype=bool)), ("English news", news)):
        values = scores[chosen]

        def mean(weights: np.ndarray, values: np.ndarray = values) -> np.ndarray:
            return np.tensordot(weights, values, axes=1) / weights.sum()

        sites = [row["site"] for row, kept in zip(rows, chosen, strict=True) if kept]
        low, high = bootstrap(sites, mean, samples=1_000, seed=0)
        for who, label in enumerate(("copydesk", "trafilatura")):
            shown = (
                f"{n} F1 {values[:, who, g].mean():.3f} ({low[who, g]:.3f}–{high[who, g]:.3f})"
                for g, n in enumerate(("word", "4-gram"))
            )
            print(f"{name} ({len(values)} pages), {label}:", ", ".join(shown))


if __name__ == "__main__":
    main()
