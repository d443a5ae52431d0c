"""The model card: what a model is, what it learnt from, how it scores.

Knows Markdown and the front matter that the Hugging Face hub reads; knows nothing of how the numbers come about.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from copydesk.labels import SectionLabel, TopicList
from train.config import Experiment, NewsroomSource, TransformerFit
from train.scores import SHOWN

if TYPE_CHECKING:  # which imports this module
    from train.release import Calibration

TEMPLATE = Path(__file__).with_name("card.md")
EXAMPLES = {
    "headline": "Night ferry to Port Ansel sails again after nine weeks",
    "body": "The ferry left at ten on Monday with forty passengers, said its skipper, Josse Marlow.",
    "boilerplate": "© The Ansel Packet. Home, Tides, Letters, Contact the newsroom, Cookie settings",
    "paywall": "You have 1 free article left this month. Subscribe to The Ansel Packet for $2 a week.",
    "sponsored": "Paid content by Gannet Oilskins: the coat that skippers swear by, 30 % off until Sunday",
}
"""Made up, a text for each class."""
TAGS = ["news", "boilerplate-removal", "content-extraction", "paywall-detection", "iptc-media-topics"]
CALLED = {**SHOWN, "section_ece": "expected calibration error of sections, 15 bins"}
TASKS = {
    "Section labels": ("macro_f1", "characters_macro_f1", *(f"{label}_f1" for label in SectionLabel), "section_ece"),
    "Article body": ("body_word_f1", "body_4gram_f1"),
    "Topics": ("topics_micro_f1", "topics_macro_f1"),
}
"""What the front matter says of each task."""
CHOSEN_HERE = (
    " Checkpoint, temperatures and thresholds were chosen on these same pages, so the scores lean high, those of "
    "topics and calibration most."
)


def card_of(
    experiment: Experiment, *, topics: TopicList, calibration: "Calibration", summary: Mapping[str, Any], report: Any
) -> str:
    """Return the card of a model that has not been scored.

    Args:
        experiment: that made it.
        topics: in their order.
        calibration: temperatures and thresholds.
        summary: what the fit stage says of it.
        report: counts of the prepared data.
    """
    settings = experiment.release
    is_transformer = isinstance(experiment.fit, TransformerFit)
    sources = [source.name for source in (*experiment.prepare.pages, *experiment.prepare.articles)]
    synthetic = [source for source in experiment.prepare.pages if isinstance(source, NewsroomSource)]
    environment = jinja2.Environment(  # noqa: S701 (Markdown)
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    text = environment.from_string(TEMPLATE.read_text("utf-8")).render(
        experiment=experiment,
        name=settings.name,
        summary={"encoder": None, "trained_parameters": None, **summary},
        train=_counted([report["splits"][split] for split in experiment.learnt]),
        license=settings.license,
        languages=settings.languages,
        is_transformer=is_transformer,
        is_registered=settings.register_model,
        encoding=experiment.fit.encoding if isinstance(experiment.fit, TransformerFit) else None,
        examples=EXAMPLES,
        labels=list(SectionLabel),
        calibration=calibration,
        topics=topics.topics,
        sources=sources,
        synthetic=synthetic,
    )
    data = ModelCardData(
        license=settings.license,
        language=settings.languages,
        library_name="copydesk",
        pipeline_tag="text-classification",
        tags=TAGS,
        base_model=_hub_id(summary.get("encoder")),
        datasets=sources,
        metrics=["f1"],
    )
    return f"---\n{data.to_yaml()}\n---\n\n{text}"


def _counted(parts: Sequence[Any]) -> dict[str, Any]:
    """Add up what is said of splits, which share no site."""
    return {
        **{name: sum(part[name] for part in parts) for name in ("pages", "articles", "sites")},
        **{name: sum((Counter(part[name]) for part in parts), Counter()) for name in ("sections", "pages_with")},
    }


def _hub_id(encoder: str | None) -> str | None:
    """Return the encoder if the hub knows it by this name: a local folder means nothing to others."""
    return encoder if encoder and encoder.count("/") == 1 and not Path(encoder).exists() else None


def scored_card(card: str, result: Mapping[str, Any]) -> str:
    """Return a card with the scores of an evaluation, below its text and, for the hub, in its front matter.

    Args:
        card: from `card_of`.
        result: as `scores.json` holds it.
    """
    scored = ModelCard(card)
    scored.data["model_name"] = f"{result['model']['name']} {result['experiment']}"
    scored.data["eval_results"] = list(_eval_results(result))
    scored.text += "\n" + "\n".join(_score_lines(result)) + "\n"
    return str(scored)


def _eval_results(result: Mapping[str, Any]) -> Iterator[EvalResult]:
    scores = result["scores"]
    for task, metrics in TASKS.items():
        for name in metrics:
            low, high = scores.get(f"{name}_low"), scores.get(f"{name}_high")
            yield EvalResult(
                task_type="text-classification",
                task_name=task,
                dataset_type=result["experiment"],
                dataset_name=f"{result['experiment']}: pages of sites that training never saw",
                dataset_config=task.lower().replace(" ", "-"),  # the hub tells results apart by it
                dataset_split=result["split"],
                metric_type="f1" if name in SHOWN else "ece",
                metric_name=CALLED[name] + ("" if low is None else f" (95 %: {low:.3f}–{high:.3f})"),
                metric_value=round(scores[name], 4),
            )


def _score_lines(result: Mapping[str, Any]) -> Iterator[str]:
    scores, tables = result["scores"], result["tables"]
    yield from (
        "## Scores",
        "",
        (
            f"On {scores['pages']} pages ({scores['sections']} sections) of the {result['split']} split: sites that "
            "the model never trained on. Intervals (95 %) by bootstrap over sites, then pages."
            + CHOSEN_HERE
            * (result["split"] == "validation")
        ),
        "",
        "| | all | interval | English news | all, as plain text |",
        "|---|---|---|---|---|",
    )
    for name, text in SHOWN.items():
        interval = f"{scores[f'{name}_low']:.3f}–{scores[f'{name}_high']:.3f}"
        beside = " | ".join(_number(scores.get(f"{prefix}{name}")) for prefix in ("english_news_", "as_text_"))
        yield f"| {text} | {scores[name]:.3f} | {interval} | {beside} |"
    yield from (
        "",
        (
            f"Calibration error of sections: {scores['section_ece']:.4f} (15 bins, four labels). "
            f"Exact bodies: {scores['body_exact']:.2f}."
        ),
        "",
        (
            f"Speed: {scores['pages']} pages in {scores['seconds']:.1f} seconds, {scores['pages_per_second']:.1f} "
            f"pages a second, measured once, on one machine: {result['device']}."
        ),
        "",
        "What is missed:",
        "",
        *(_missed(row) for row in tables["confusion"]),
        "",
        "| slice | pages | sections | macro F1 | paywall | sponsored | body word F1 | topics micro F1 |",
        "|---|---|---|---|---|---|---|---|",
    )
    for row in tables["slices"]:
        rare = " | ".join(_number(row[f"{name}_f1"], row[f"{name}_sections"]) for name in ("paywall", "sponsored"))
        yield (
            f"| {row['slice']} | {row['pages']} | {row['sections']} | {row['macro_f1']:.3f} | {rare} "
            f"| {row['body_word_f1']:.3f} | {_number(row['topics_micro_f1'], row['pages_with_topics'])} |"
        )
    yield from (
        "",
        "| label | sections | precision | recall | F1 |",
        "|---|---|---|---|---|",
        *(
            f"| {row['label']} | {row['sections']} | {row['precision']:.3f} | {row['recall']:.3f} | {row['f1']:.3f} |"
            for row in tables["labels"]
        ),
        "",
        "| topic | pages | marked | precision | recall | F1 |",
        "|---|---|---|---|---|---|",
        *(
            f"| {row['topic']} | {row['pages']} | {row['marked']} | {row['precision']:.2f} | {row['recall']:.2f} "
            f"| {row['f1']:.2f} |"
            for row in tables["topics"]
        ),
    )


def _number(value: float | None, support: int = 1) -> str:
    """Return a score as text: a dash where nothing was there to score."""
    return f"{value:.3f}" if value is not None and support else "–"


def _missed(row: Mapping[str, Any]) -> str:
    label, total = row["label"], sum(row[name] for name in SectionLabel)
    others = sorted((name for name in SectionLabel if name != label and row[name]), key=lambda name: -row[name])
    read_as = ", ".join(f"{row[name]} read as {name}" for name in others)
    return f"- {label}: {total - row[label]} of {total} sections" + (f" ({read_as})" if others else "") + "."
