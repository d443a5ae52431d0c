"""A model card can be read by people and by the Hugging Face hub."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard

from copydesk.labels import CLASSES, SectionLabel, TopicInfo, TopicList
from train.arguments import load_experiment
from train.card import EXAMPLES, card_of, scored_card
from train.config import Experiment
from train.release import Calibration
from train.scores import SHOWN

ROOT = Path(__file__).parents[1]
TOPICS = TopicList([TopicInfo(id="t:0", slug="sport", name="sport"), TopicInfo(id="t:1", slug="wind", name="wind")])
CALIBRATION = Calibration(
    section_temperature=1.1,
    topic_temperature=0.9,
    thresholds=np.array([0.41, 0.3]),
    shared=np.array([False, True]),
    positives=np.array([40, 2]),
    section_ece=0.0123,
    num_sections=100,
    num_articles=20,
)
COUNTS = {name: dict.fromkeys(CLASSES, 7) for name in ("sections", "pages_with")}
VALIDATION = {"pages": 2, "articles": 1, "sites": 1, "sections": {"body": 5}, "pages_with": {"body": 2}}
REPORT = {"splits": {"train": {"pages": 12, "articles": 3, "sites": 5, **COUNTS}, "validation": VALIDATION}}
ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
SUMMARY = {"kind": "transformer", "encoder": ENCODER, "trained_parameters": 13}


def experiment(*overrides: str) -> Experiment:
    return load_experiment(ROOT / "configs" / "pages.yaml", list(overrides))


def card(*overrides: str, **changes: Any) -> str:
    summary = SUMMARY | changes
    return card_of(experiment(*overrides), topics=TOPICS, calibration=CALIBRATION, summary=summary, report=REPORT)


def result(split: str = "validation") -> dict[str, Any]:
    scores: dict[str, Any] = dict.fromkeys(SHOWN, 0.75)
    scores |= {f"{name}_low": 0.7 for name in SHOWN} | {f"{name}_high": 0.81 for name in SHOWN}
    scores |= {f"as_text_{name}": 0.6 for name in SHOWN}
    scores |= {"pages": 30, "sections": 900, "section_ece": 0.02, "body_exact": 0.25}
    scores |= {"seconds": 12.0, "pages_per_second": 2.5}
    confusion = {name: dict.fromkeys(SectionLabel, 0) | {name: 5} for name in SectionLabel}
    confusion["paywall"] |= {"boilerplate": 3, "body": 1}
    one = {"pages": 30, "sections": 900, "macro_f1": 0.75, "body_word_f1": 0.8, "topics_micro_f1": 0.0}
    rare = {"paywall_f1": 0.0, "sponsored_f1": 0.5, "paywall_sections": 0, "sponsored_sections": 4}
    measures = {"precision": 0.5, "recall": 0.5, "f1": 0.5}
    return {
        "experiment": "pages",
        "split": split,
        "model": {"name": "copydesk", "version": "0123456789ab"},
        "device": "a processor, 2 threads",
        "scores": scores,
        "tables": {
            "labels": [{"label": str(name), "sections": 5, **measures} for name in SectionLabel],
            "confusion": [{"label": str(name), **row} for name, row in confusion.items()],
            "topics": [{"topic": topic.slug, "pages": 1, "marked": 1, **measures} for topic in TOPICS.topics],
            "slices": [{"slice": "language: de", **one, **rare, "pages_with_topics": 0}],
        },
    }


def test_a_refit_counts_validation_pages_and_says_whose_scores_are_whose():
    before, after = card(), card("fit.refit=true")

    assert "12 pages and 3 articles of 5 sites" in before
    assert "14 pages and 4 articles of 6 sites" in after
    assert f"| body | {EXAMPLES['body']} | 12 | 9 |" in after
    assert f"| paywall | {EXAMPLES['paywall']} | 7 | 7 |" in after
    assert "fitted again" in after
    assert "fitted again" not in before


def test_the_front_matter_says_what_the_hub_asks_for():
    data = ModelCard(card()).data

    assert (data.license, data.language, data.base_model) == ("apache-2.0", ["en"], ENCODER)
    assert data.datasets == ["fundus", "wcxb", "readability", "newsroom", "judged"]
    assert (data.library_name, data.pipeline_tag, data.eval_results) == ("copydesk", "text-classification", None)
    assert "news" in data.tags


def test_the_front_matter_carries_scores_once_there_are_some():
    scored = ModelCard(scored_card(card(), result("test")))
    by_task: dict[str, list] = {}
    for found in scored.data.eval_results:
        by_task.setdefault(found.task_name, []).append(found)

    assert scored.data.model_name == "copydesk pages"
    assert {task: len(found) for task, found in by_task.items()} == {
        "Section labels": 7,
        "Article body": 2,
        "Topics": 2,
    }
    first = by_task["Section labels"][0]
    assert (first.metric_type, first.metric_value, first.dataset_split) == ("f1", 0.75, "test")
    assert first.metric_name == "macro F1, four labels, by section (95 %: 0.700–0.810)"
    assert "model-index" in scored.data.to_dict()
    assert ModelCard(str(scored)).data.to_dict() == scored.data.to_dict()


def test_license_and_languages_are_the_configs():
    data = ModelCard(card("release.license=mit", "release.languages=[de, fr]")).data

    assert (data.license, data.language) == ("mit", ["de", "fr"])
    assert "made for de, fr." in card("release.languages=[de, fr]")


@pytest.mark.parametrize("encoder", [None, "{folder}", "./{folder}"])
def test_an_encoder_that_the_hub_does_not_know_is_no_base_model(encoder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("encoders/mine").mkdir(parents=True)
    given = encoder and encoder.format(folder="encoders/mine")

    assert ModelCard(card(encoder=given)).data.base_model is None


def test_each_label_has_an_example_that_names_no_real_paper():
    text = card()

    assert list(EXAMPLES) == list(CLASSES)
    for label, example in EXAMPLES.items():
        assert f"| {label} | {example} | 7 | 7 |" in text


def test_thresholds_calibration_limits_and_use_are_said():
    text = card()

    assert "| sport | t:0 | 0.41 | 40 |" in text
    assert "| wind | t:1 | 0.30 (shared) | 2 |" in text
    assert "Expected calibration error of sections there:\n0.0123 (15 bins, four labels)" in text
    assert "more than 262,144 tokens" in text
    assert "`NOTICE`" in text
    for command in ("copydesk predict --model", "copydesk serve --model", "mlflow models serve -m models:/copydesk@"):
        assert command in text
    assert re.findall(r"^## (.*)", text, re.MULTILINE) == [
        "Use it",
        "Labels",
        "Calibration and thresholds",
        "Data and licences",
        "Limits",
    ]


def test_a_model_that_is_not_registered_is_not_said_to_be():
    assert "mlflow models serve" not in card("release.register_model=false")


@pytest.mark.parametrize(
    ("name", "sources", "scored"), [("pages", 1, False), ("newsroom", 1, True), ("baseline", 0, False)]
)
def test_composed_pages_are_said_to_be_synthetic_and_whether_the_model_is_scored_on_them(name, sources, scored):
    settings = load_experiment(ROOT / "configs" / f"{name}.yaml")
    text = card_of(settings, topics=TOPICS, calibration=CALIBRATION, summary=SUMMARY, report=REPORT)

    assert text.count("The pages of newsroom are synthetic: composed from texts about people and papers") == sources
    assert ("It is scored on such pages, too" in text) == scored


def test_the_baseline_is_not_said_to_be_served():
    settings = load_experiment(ROOT / "configs" / "baseline.yaml")
    text = card_of(settings, topics=TOPICS, calibration=CALIBRATION, summary={"kind": "baseline"}, report=REPORT)

    assert "copydesk serve" not in text
    assert "BaselinePredictor" in text
    assert ModelCard(text).data.base_model is None


def test_the_python_of_a_card_runs(tiny_model, tmp_path):
    (code,) = re.findall(r"^```python\n(.*?)^```", card(), re.DOTALL | re.MULTILINE)

    exec(code.replace('"FOLDER"', json.dumps(str(tiny_model))), {})  # noqa: S102


def test_scores_say_what_is_missed_and_how_fast_it_was():
    text = scored_card(card(), result())

    assert "- paywall: 4 of 9 sections (3 read as boilerplate, 1 read as body)." in text
    assert "- body: 0 of 5 sections." in text
    assert (
        "30 pages in 12.0 seconds, 2.5 pages a second, measured once, on one machine: a processor, 2 threads." in text
    )
    assert "| macro F1, four labels, by section | 0.750 | 0.700–0.810 | – | 0.600 |" in text
    assert "| language: de | 30 | 900 | 0.750 | – | 0.500 | 0.800 | – |" in text


@pytest.mark.parametrize(("split", "said"), [("validation", True), ("test", False)])
def test_scores_on_pages_that_choices_were_made_on_are_said_to_lean_high(split, said):
    text = scored_card(card(), result(split))

    assert f"of the {split} split" in text
    assert ("lean high" in text) is said


def test_a_card_without_front_matter_gets_some():
    scored = ModelCard(scored_card("# old\n", result()))

    assert len(scored.data.eval_results) == 11
    assert scored.text.startswith("# old\n")
