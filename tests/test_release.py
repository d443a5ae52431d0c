"""Temperatures and thresholds are those that the held-out rows ask for; what was not fitted is not released."""

import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from sklearn.metrics import f1_score

from copydesk.decode import class_probabilities, topic_probabilities
from copydesk.encoder import sha256_of
from copydesk.labels import CLASSES, TopicInfo, TopicList
from copydesk.saved import read_manifest
from train import evaluate as evaluate_stage
from train import release as release_stage
from train import tracking
from train.arguments import load_experiment
from train.config import Experiment
from train.evaluate import evaluate
from train.fit import fit
from train.prepare import prepare
from train.release import GRID, calibrate, choose_thresholds, headline_share, release

FLAT = TopicList([TopicInfo(id=f"t:{i}", slug=f"s{i}", name=f"n{i}") for i in range(3)])
FAMILY = TopicList(
    [
        TopicInfo(id="t:0", slug="politics", name="politics"),
        TopicInfo(id="t:1", slug="diplomacy", name="diplomacy", parent="t:0"),
        TopicInfo(id="t:2", slug="sport", name="sport"),
    ]
)


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


def sections(random: np.random.Generator, *, count: int, temperature: float) -> dict[str, np.ndarray]:
    """Draw classes from known probabilities, and return their logits overconfident by the temperature."""
    logits = random.normal(scale=2, size=(count, len(CLASSES)))
    drawn = [random.choice(len(CLASSES), p=row) for row in class_probabilities(logits, temperature=1.0)]
    return {"section_logits": logits * temperature, "classes": np.array(drawn)}


def articles(random: np.random.Generator, *, count: int, temperature: float = 1.0) -> dict[str, np.ndarray]:
    logits = random.normal(scale=2, size=(count, 3))
    holds = random.random((count, 3)) < 1 / (1 + np.exp(-logits))
    return {
        "topic_logits": logits * temperature,
        "holds": holds.astype(np.float32),
        "decided": np.ones((count, 3), dtype=np.float32),
        "article_sites": np.array([f"site{i % 50}" for i in range(count)]),
    }


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_a_known_temperature_is_recovered(random, temperature):
    held_out = sections(random, count=4_000, temperature=temperature) | articles(
        random, count=4_000, temperature=temperature
    )
    found = calibrate(held_out, topics=FLAT, min_positives=20)

    assert found.section_temperature == pytest.approx(temperature, rel=0.07)
    assert found.topic_temperature == pytest.approx(temperature, rel=0.07)
    assert found.section_ece < 0.03


def test_what_is_undecided_has_no_say_in_the_temperature(random):
    held_out = sections(random, count=200, temperature=1.0) | articles(random, count=3_000, temperature=2.0)
    half = calibrate(
        {name: value[::2] if len(value) == 3_000 else value for name, value in held_out.items()},
        topics=FLAT,
        min_positives=20,
    )
    held_out["decided"][1::2] = 0
    held_out["topic_logits"][1::2] = 40  # far off, were it counted

    assert calibrate(held_out, topics=FLAT, min_positives=20).topic_temperature == pytest.approx(half.topic_temperature)


def test_what_was_chosen_from_is_counted(random):
    held_out = sections(random, count=300, temperature=1.0) | articles(random, count=100)
    held_out["decided"][:40, 0] = 0
    found = calibrate(held_out, topics=FLAT, min_positives=20)

    assert (found.num_sections, found.num_articles) == (300, 100)
    assert found.positives.tolist() == (held_out["holds"] * held_out["decided"]).sum(axis=0).tolist()


def test_only_pages_with_body_text_say_how_many_have_a_headline():
    headline, body, boilerplate = map(CLASSES.index, ("headline", "body", "boilerplate"))
    articles = [[headline, body], [boilerplate, body, body], [body, headline, headline]]

    assert headline_share([*articles, [headline, boilerplate], []]) == pytest.approx(3 / 5)
    assert headline_share([]) == 0.5


def choose(probabilities: np.ndarray, holds: np.ndarray, **changes: Any) -> tuple[np.ndarray, np.ndarray]:
    given = {
        "decided": np.ones_like(holds),
        "sites": np.array([f"site{i % 40}" for i in range(len(holds))]),
        "min_positives": 20,
    } | changes
    return choose_thresholds(probabilities, holds, given.pop("decided"), **given)


def test_a_threshold_parts_what_can_be_parted():
    probabilities = np.linspace(0, 1, 401)[:, None]
    thresholds, shared = choose(probabilities, probabilities >= 0.3)

    assert thresholds == pytest.approx([0.3], abs=0.02)
    assert not shared.any()


def test_thresholds_have_the_best_f1_of_all(random):
    probabilities = random.random((3_000, 3))
    holds = random.random((3_000, 3)) < probabilities ** np.array([1, 2, 4])
    thresholds, _ = choose(probabilities, holds)

    for topic in range(3):
        best = max(f1_score(holds[:, topic], probabilities[:, topic] >= cut) for cut in GRID[::3])
        assert f1_score(holds[:, topic], probabilities[:, topic] >= thresholds[topic]) == pytest.approx(best, abs=0.01)
    assert thresholds[0] < thresholds[1] < thresholds[2]


def test_rare_topics_share_the_threshold_that_is_best_for_them_all(random):
    probabilities = random.random((2_000, 3))
    holds = probabilities >= np.array([0.3, 0.995, 0.995])
    assert (holds.sum(axis=0) < 20).tolist() == [False, True, True]
    thresholds, shared = choose(probabilities, holds)

    assert shared.tolist() == [False, True, True]
    assert thresholds[0] == pytest.approx(0.3, abs=0.02)
    assert thresholds[1] == thresholds[2] > 0.9


def test_positives_that_are_undecided_do_not_make_a_topic_frequent(random):
    probabilities = random.random((400, 1))
    holds = probabilities >= 0.5
    decided = np.zeros_like(holds)
    decided[:20] = True

    assert choose(probabilities, holds)[1].tolist() == [False]
    assert choose(probabilities, holds, decided=decided)[1].tolist() == [True]


def test_a_topic_that_never_holds_gets_one_half():
    probabilities = np.linspace(0, 1, 100)[:, None]

    assert choose(probabilities, np.zeros_like(probabilities, dtype=bool))[0].tolist() == [0.5]


def test_one_site_alone_cannot_decide_its_own_threshold(random):
    # All sites part at 0.6 but one large site, which parts at 0.2: it weighs in four of the five folds at most.
    probabilities = random.random((1_000, 1))
    sites = np.array(["large" if i < 300 else f"site{i % 40}" for i in range(1_000)])
    holds = probabilities >= np.where(sites == "large", 0.2, 0.6)[:, None]

    (threshold,), _ = choose(probabilities, holds, sites=sites)
    (of_large,), _ = choose(probabilities[:300], holds[:300])
    assert of_large == pytest.approx(0.2, abs=0.03)
    assert of_large < threshold <= 0.62


def test_thresholds_are_the_same_every_time(random):
    probabilities = random.random((500, 3))
    holds = random.random((500, 3)) < probabilities

    assert np.array_equal(choose(probabilities, holds)[0], choose(probabilities, holds)[0])


def test_a_few_articles_of_one_site_are_enough_to_choose_at_all():
    thresholds, shared = choose(np.array([[0.9], [0.1]]), np.array([[True], [False]]), sites=np.array(["a", "a"]))

    assert shared.tolist() == [True]
    assert 0 < thresholds[0] < 1


def test_a_parents_threshold_is_chosen_on_what_its_children_lend_it(random):
    # The parent's own logit says nothing; it holds where its child does.
    child = random.normal(scale=3, size=1_000)
    held_out = sections(random, count=100, temperature=1.0) | articles(random, count=1_000)
    held_out["topic_logits"] = np.stack([np.full(1_000, -8.0), child, random.normal(size=1_000)], axis=1)
    held_out["holds"][:, 0] = held_out["holds"][:, 1] = child > 0
    found = calibrate(held_out, topics=FAMILY, min_positives=20)

    probabilities = topic_probabilities(held_out["topic_logits"], temperature=found.topic_temperature, topics=FAMILY)
    assert f1_score(child > 0, probabilities[:, 0] >= found.thresholds[0]) > 0.98


BASELINE = "fit={kind: baseline}"
EXTRA = {"id": "t:0", "slug": "extra", "name": "extra"}


def tiny(*overrides: str) -> Experiment:
    return load_experiment("tiny.yaml", list(overrides))


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_settings_rows_and_topics_that_were_not_fitted_are_not_released(workplace: Path):
    experiment = tiny("fit.epochs=1")
    fit(experiment)
    release(experiment)
    before = files_of(experiment.released)
    rows = experiment.prepared / "pages/train.parquet"
    assert read_manifest(experiment.released).run["data/pages/train"] == sha256_of(rows)
    content = yaml.safe_load(experiment.prepare.topics.read_text("utf-8"))
    Path("reversed.yaml").write_text(yaml.safe_dump({"topics": content["topics"][::-1]}), "utf-8")

    for setting, changed in [
        ("fit.encoding.head_tokens=3", r"fit\.encoding"),
        ("fit.epochs=2", r"fit\.epochs"),
        (BASELINE, r"fit\.kind"),
        ("prepare.topics=reversed.yaml", "topics"),
    ]:
        with pytest.raises(ValueError, match=rf"tiny/fit was fitted with other {changed}.*: restore them"):
            release(tiny("fit.epochs=1", setting))
    prepare(tiny("prepare.seed=1"))
    with pytest.raises(ValueError, match=r"fitted with other data/prepared/tiny/articles/"):
        release(experiment)
    assert files_of(experiment.released) == before


def test_settings_of_the_release_itself_may_change(workplace: Path):
    fit(tiny(BASELINE))
    release(tiny(BASELINE))

    release(tiny(BASELINE, "release.min_topic_positives=3", "release.name=other", "evaluate.seed=3"))

    assert '"other"' in (tiny().released / "baseline.json").read_text("utf-8")


@pytest.mark.parametrize("settings", [[BASELINE], ["fit.epochs=1"]], ids=["baseline", "transformer"])
def test_pages_that_were_split_anew_are_not_scored(workplace: Path, settings: list[str]):
    experiment = tiny(*settings)
    fit(experiment)
    release(experiment)
    prepare(tiny("prepare.seed=1"))

    message = r"fitted on other rows than data/prepared/tiny .*data/pages/train.*: run train\.fit and train\.release"
    with pytest.raises(ValueError, match=message):
        evaluate(experiment)

    prepare(experiment)
    evaluate(experiment)


@pytest.mark.parametrize("settings", [[BASELINE], ["fit.epochs=1"]], ids=["baseline", "transformer"])
def test_a_release_of_another_fit_is_not_scored(workplace: Path, settings: list[str]):
    first, second = tiny(*settings), tiny(*settings, "prepare.topics=more.yaml")
    content = yaml.safe_load(first.prepare.topics.read_text("utf-8"))
    Path("more.yaml").write_text(yaml.safe_dump({"topics": [*content["topics"], EXTRA]}), "utf-8")
    fit(first)
    release(first)
    fit(second)
    with pytest.raises(ValueError, match=r"tiny/release is of another fit: .*\. Run train\.release"):
        evaluate(first)

    next(second.fitted.glob("*.s*")).unlink()
    with pytest.raises(ValueError, match=r"is of another fit than models/tiny/fit, which was not finished"):
        evaluate(first)


def test_a_release_without_its_fit_is_scored(workplace: Path):
    fit(tiny(BASELINE))
    release(tiny(BASELINE))
    shutil.rmtree(tiny().fitted)

    for _ in range(2):  # the first makes a folder for the run
        assert evaluate(tiny(BASELINE))["pages"] > 0


def on_a_full_disk(main: Callable[[], None], folder: Path, settings: list[str], limit: int) -> None:
    """Run a stage that can write no file larger than the limit; the body of a process."""
    os.chdir(folder)
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = Path("output.txt").open("w", encoding="utf-8")
    sys.argv = ["stage", "--config", "tiny.yaml", *(word for setting in settings for word in ("--set", setting))]
    tracking.continue_run = lambda *_, **__: tracking.Run(None)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    main()


@pytest.mark.parametrize("settings", [[BASELINE], ["fit.epochs=1"]], ids=["baseline", "transformer"])
def test_a_full_disk_leaves_the_release_and_the_evaluation_before(
    workplace: Path, settings: list[str], apart: ForkServerContext
):
    experiment = tiny(*settings)
    fit(experiment)
    release(experiment)
    evaluate(experiment)

    for stage, folder in [(release_stage, experiment.released), (evaluate_stage, experiment.evaluated)]:
        before = files_of(folder)
        process = apart.Process(target=on_a_full_disk, args=(stage.main, workplace, settings, 10_000))
        process.start()
        process.join()
        said = Path("output.txt").read_text("utf-8").splitlines()[-1]
        assert said.startswith(f"{stage.__name__.removeprefix('train.')}: cannot write {folder}: ")
        assert process.exitcode == 1
        assert files_of(folder) == before
        assert not folder.with_name(f".{folder.name}").exists()
