"""A config is read whole, checked whole and refused with all its faults."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from train.arguments import ConfigError, experiment_from_arguments, load_experiment
from train.config import BaselineFit, Experiment, NewsroomSource, TransformerFit, Trial, with_settings

ROOT = Path(__file__).parents[1]
SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))
TINY = """
name: tiny
prepare:
  topics: topics.yaml
  pages:
    - {name: mine, annotations: mine.jsonl, folder: mine}
  test_fraction: 0.2
  num_folds: 4
fit:
  kind: transformer
  epochs: 2
  learning_rate: 2e-4
  head_learning_rate: 1.0e-3
  class_weight_power: 0
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY, "utf-8")
    return path


def faults_of(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as refused:
        load_experiment(path, list(overrides))
    return str(refused.value)


def test_configs_are_shipped():
    assert SHIPPED


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_config_loads_and_is_named_after_its_file(path):
    assert load_experiment(path).name == path.stem


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_config_says_in_its_head_what_it_is_for(path):
    assert path.read_text("utf-8").startswith("# ")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_what_a_shipped_config_reads_of_the_checkout_is_there(path):
    settings = load_experiment(path).prepare

    assert (ROOT / settings.topics).is_file()
    paths = [source.newsroom if isinstance(source, NewsroomSource) else source.annotations for source in settings.pages]
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_page_shares_of_a_shipped_config_name_its_sources(path):
    experiment = load_experiment(path)
    sources = {source.name for source in experiment.prepare.pages}

    assert set(getattr(experiment.fit, "page_share", {})) <= sources


def test_no_experiment_lies_where_the_published_model_does(config):
    assert "name: Value error, models/released is the published model: give" in faults_of(config, "name=released")


def test_folders_follow_from_the_name(config):
    experiment = load_experiment(config)

    assert [experiment.prepared, experiment.fitted, experiment.released, experiment.evaluated] == [
        Path("data/prepared/tiny"),
        Path("models/tiny/fit"),
        Path("models/tiny/release"),
        Path("models/tiny/evaluation"),
    ]


def test_the_kind_decides_which_settings_a_fit_has(config):
    assert isinstance(load_experiment(config).fit, TransformerFit)

    baseline = load_experiment(config, ["fit={kind: baseline}"]).fit
    assert isinstance(baseline, BaselineFit)
    assert baseline.inverse_regularisation == 1.0


@pytest.mark.parametrize(
    "key", ["colour", "prepare.colour", "fit.colour", "fit.network.colour", "fit.encoding.colour", "release.colour"]
)
def test_an_unknown_key_is_refused_wherever_it_stands(config, key):
    assert "colour: Extra inputs are not permitted (got 'red')" in faults_of(config, f"{key}=red")


def test_all_faults_are_told_at_once(config):
    told = faults_of(config, "fit.epochs=0", "prepare.num_folds=1", "evaluate.split=train", "nmae=x", "name=A b")

    assert "5 fault(s)" in told
    for place in ("fit.transformer.epochs", "prepare.num_folds", "evaluate.split", "nmae", "name"):
        assert f"  {place}: " in told


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("fit.page_share={mine: -1}", "page_share.mine: Input should be greater than 0"),
        ("fit.page_share={mine: 0}", "page_share.mine: Input should be greater than 0"),
        ("fit.page_share={mine: 3}", "page_share.mine: Input should be less than or equal to 1"),
        ("fit.page_share={mine: .nan}", "page_share.mine: Input should be a finite number"),
        ("fit.learning_rate=.inf", "learning_rate: Input should be a finite number"),
        ("fit.topic_weight=.inf", "topic_weight: Input should be a finite number"),
        ("fit.weight_decay=.inf", "weight_decay: Input should be a finite number"),
        ("fit.class_weight_power=.nan", "class_weight_power: Input should be a finite number"),
        ("fit.network.dropout=.nan", "network.dropout: Input should be"),
        ("prepare.test_fraction=.nan", "prepare.test_fraction: Input should be a finite number"),
        ("fit={kind: baseline, inverse_regularisation: .inf}", "inverse_regularisation: Input should be a finite"),
        ("fit.seed=-1", "seed: Input should be greater than or equal to 0"),
        ("fit.seed=4294967296", "seed: Input should be less than 4294967296"),
        ("prepare.seed=-1", "prepare.seed: Input should be greater"),
        ("evaluate.seed=-1", "evaluate.seed: Input should be greater"),
        ("fit.network.page_width=255", "network.page_width is 255, expected a multiple of 64"),
    ],
)
def test_a_value_that_no_stage_could_use_is_refused_at_once(config, override, fault):
    assert fault in faults_of(config, override)


def test_values_at_the_ends_of_what_is_possible_are_taken(config):
    fit = load_experiment(config, ["fit.page_share={mine: 1}", "fit.seed=4294967295", "fit.network.page_width=64"]).fit

    assert (fit.page_share, fit.seed, fit.network.page_width) == ({"mine": 1.0}, 4294967295, 64)
    assert load_experiment(config, ["fit.network={page_layers: 0, page_width: 255}"]).fit.network.page_width == 255


def test_an_experiment_cannot_be_changed(config):
    experiment = load_experiment(config)

    with pytest.raises(ValidationError, match="frozen"):
        experiment.name = "other"


@pytest.mark.parametrize("written", ["3e-5", "3.0e-5", "3E-5", "+3e-05", "0.00003", ".3e-4"])
def test_a_number_with_an_exponent_is_a_number(config, written):
    config.write_text(TINY.replace("2e-4", written), "utf-8")

    assert load_experiment(config).fit.learning_rate == pytest.approx(3e-5)
    assert load_experiment(config, [f"fit.head_learning_rate={written}"]).fit.head_learning_rate == pytest.approx(3e-5)


def test_plain_yaml_would_read_that_number_as_text():
    assert yaml.safe_load("3e-5") == "3e-5"  # the reason for our own loader


@pytest.mark.parametrize(("written", "read"), [("010", 10), ("1_000", 1_000), ("+3", 3)])
def test_a_whole_number_is_read_as_it_looks(config, written, read):
    assert load_experiment(config, [f"fit.epochs={written}"]).fit.epochs == read


@pytest.mark.parametrize("written", ["1:30", "0x", "0b"])
def test_what_only_old_yaml_takes_for_a_number_is_refused(config, written):
    assert "epochs: Input should be a valid integer" in faults_of(config, f"fit.epochs={written}")


def test_a_key_that_stands_twice_is_refused_with_its_line(config):
    config.write_text(TINY + "fit: {kind: baseline}\n", "utf-8")

    told = faults_of(config)
    assert "the key 'fit' stands on line 9 already" in told
    assert "line 15" in told


def test_words_that_begin_like_numbers_stay_words(config):
    experiment = load_experiment(config, ["release.name=3e-5b", "name=1.2.3"])

    assert (experiment.release.name, experiment.name) == ("3e-5b", "1.2.3")


def test_overrides_reach_into_groups_that_the_file_does_not_have(config):
    experiment = load_experiment(config, ["evaluate.split=test", "fit.network.page_layers=0", "prepare.articles=[]"])

    assert experiment.evaluate.split == "test"
    assert experiment.fit.network.page_layers == 0
    assert experiment.prepare.articles == []


def test_of_two_overrides_the_later_one_holds(config):
    assert load_experiment(config, ["fit.epochs=3", "fit.epochs=4"]).fit.epochs == 4


def test_a_value_may_hold_an_equals_sign(config):
    assert load_experiment(config, ["release.name=a=b"]).release.name == "a=b"


@pytest.mark.parametrize("override", ["fit.epochs", "=3", "name.first=x", "fit.epochs.first=3"])
def test_an_override_of_another_form_is_refused_with_its_text(config, override):
    assert repr(override) in faults_of(config, override)


def test_an_override_that_is_no_yaml_is_refused_with_its_text(config):
    assert "fit.epochs=[" in faults_of(config, "fit.epochs=[")


def test_a_missing_file_is_named_with_where_to_look(tmp_path):
    told = faults_of(tmp_path / "absent.yaml")

    assert "absent.yaml" in told
    assert "configs/" in told


@pytest.mark.parametrize("content", ["name: [", "a: b: c"])
def test_a_file_that_is_no_yaml_is_refused(config, content):
    config.write_text(content, "utf-8")

    assert "is no valid YAML" in faults_of(config)


@pytest.mark.parametrize("content", ["", "- a\n- b\n", "just text"])
def test_a_file_without_top_keys_is_refused(config, content):
    config.write_text(content, "utf-8")

    assert "expected settings under top keys" in faults_of(config)


def test_a_file_in_another_encoding_is_refused(config):
    config.write_bytes(TINY.replace("mine", "Zürich").encode("latin-1"))

    assert "tiny.yaml" in faults_of(config)


def test_the_command_line_reads_file_and_overrides(config):
    experiment = experiment_from_arguments(
        "Stage.", ["--config", str(config), "--set", "fit.epochs=7", "--set", "name=b"]
    )

    assert (experiment.fit.epochs, experiment.name) == (7, "b")


def test_the_command_line_ends_with_status_2_and_the_faults(config, capsys):
    with pytest.raises(SystemExit) as end:
        experiment_from_arguments("Stage.", ["--config", str(config), "--set", "fit.epochs=none"])

    assert end.value.code == 2
    assert "fit.transformer.epochs" in capsys.readouterr().err


def test_a_search_space_names_settings_and_possible_values(config):
    space = (
        "{fit.learning_rate: {low: 1e-5, high: 1, log: true}, fit.epochs: {low: 1, high: 4}, "
        "fit.tuning: {choices: [full, lora]}, fit.network.dropout: {low: 0, high: 0.9}}"
    )

    assert set(load_experiment(config, [f"sweep={{settings: {space}}}"]).sweep.settings) == {
        "fit.learning_rate",
        "fit.epochs",
        "fit.tuning",
        "fit.network.dropout",
    }


def test_all_faults_of_a_search_space_are_told_at_once(config):
    space = (
        "{fit.colour: {low: 1, high: 2}, prepare.seed: {low: 0, high: 2}, fit.kind: {choices: [baseline, none]}, "
        "fit.epochs: {low: 0, high: 2.5}, fit.patience: {low: 0, high: 3}, fit.tuning: {choices: [full, half]}, "
        "fit.encoder: {low: 1, high: 2}, fit.network.dropout: {low: 0, high: 1}, fit.epochs.first: {low: 1, high: 2}}"
    )

    told = faults_of(config, f"sweep={{settings: {space}}}")

    for fault in (
        "fit.colour is no setting",
        "prepare.seed is the same for all trials",
        "fit.kind is the same for all trials",
        "fit.epochs is a whole number, got ends 0 and 2.5",
        "fit.patience cannot be 0: Input should be greater than 0",
        "fit.tuning cannot be 'half'",
        "fit.encoder is 'sentence-transformers/all-MiniLM-L6-v2', which is no number: give choices",
        "fit.network.dropout cannot be 1: Input should be less than 1",
        "fit.epochs.first is no setting",
    ):
        assert fault in told


@pytest.mark.parametrize(
    ("space", "fault"),
    [
        ("{low: 3, high: 2}", "low must be less than high"),
        ("{low: 0, high: 2, log: true}", "low must be above 0"),
        ("{choices: [1]}", "at least 2 items"),
        ("{low: 1, high: 2, step: 1}", "Extra inputs are not permitted"),
        ("{low: 1}", "Field required"),
        ("3", "valid dictionary"),
    ],
)
def test_a_space_that_holds_nothing_is_refused(config, space, fault):
    assert fault in faults_of(config, f"sweep={{settings: {{fit.epochs: {space}}}}}")


def test_a_trial_shares_the_prepared_splits_and_has_folders_of_its_own(config):
    experiment = load_experiment(config)
    content = with_settings(experiment, {"fit.epochs": 9, "fit.network.page_layers": 0})

    trial = Trial.model_validate({**content, "trial": "trial-4", "parent": "a"})

    assert (trial.fit.epochs, trial.fit.network.page_layers) == (9, 0)
    assert trial.prepared == experiment.prepared
    assert trial.released == Path("models/tiny/sweep/trial-4/release")
    assert trial.title == "tiny-trial-4"
    assert Experiment.model_validate(with_settings(experiment, {})) == experiment
