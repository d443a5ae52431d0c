"""What fitting writes is what it says: whole checkpoints, the same weights again, rows that were held out."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import DistilBertConfig, DistilBertModel

from copydesk.encode import TextEncoder, collate_pages
from copydesk.saved import SavedModel, load_saved
from train.arguments import ConfigError, load_experiment
from train.config import Experiment
from train.fit import fit
from train.fitting import Fitting
from train.metrics import label_confusion, labels_of, macro_f1
from train.prepare import prepare
from train.release import release
from train.rows import load_rows, resplit
from train.sources.articles import read_topics

pytestmark = pytest.mark.usefixtures("workplace")


def tiny(*overrides: str) -> Experiment:
    return load_experiment("tiny.yaml", list(overrides))


def weights(experiment: Experiment) -> dict[str, torch.Tensor]:
    return load_file(experiment.fitted / "trained.safetensors")


def held_out(experiment: Experiment) -> dict[str, np.ndarray]:
    with np.load(experiment.fitted / "held_out.npz", allow_pickle=False) as file:
        return dict(file)


def rows_of(experiment: Experiment, split_name: str) -> list[dict[str, Any]]:
    return list(load_rows(experiment.prepared, "pages", split_name))


def logits_of(saved: SavedModel, rows: list[dict[str, Any]]) -> np.ndarray:
    encoder = TextEncoder(saved.tokenizer, saved.description.encoding, saved.description.hints)
    with torch.inference_mode():
        return saved.model.section_logits(collate_pages([encoder.encode_page(resplit(row)) for row in rows])).numpy()


def network_of(experiment: Experiment) -> torch.nn.Module:
    topics = read_topics(experiment.prepare.topics)
    return Fitting(experiment.fit, Path(experiment.fit.encoder), topics, num_hints=8).new_model()


@pytest.mark.parametrize("tuning", ["full", "lora", "heads"])
def test_a_released_model_gives_the_logits_of_the_fitted_one(tuning):
    experiment = tiny(f"fit.tuning={tuning}", "fit.epochs=1", "fit.precision=float32", "release.weights=float32")
    fit(experiment)
    release(experiment)

    expected = held_out(experiment)["section_logits"]
    found = logits_of(load_saved(experiment.released), rows_of(experiment, "validation"))
    assert np.ptp(expected) > 0.5
    np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_weights_stored_in_bfloat16_give_nearly_the_same_logits(tuning):
    experiment = tiny(f"fit.tuning={tuning}", "fit.epochs=1", "fit.precision=float32")
    fit(experiment)
    release(experiment)

    expected = held_out(experiment)["section_logits"]
    found = logits_of(load_saved(experiment.released), rows_of(experiment, "validation"))
    np.testing.assert_allclose(found, expected, atol=0.02 * np.ptp(expected))


def test_full_tuning_changes_the_encoder_but_not_its_embeddings(tiny_encoder):
    experiment = tiny("fit.epochs=1")
    fit(experiment)
    trained, base = weights(experiment), load_file(tiny_encoder / "model.safetensors")

    changed = {name for name in trained if name.startswith("encoder.")}
    assert not any("embeddings" in name for name in changed)
    moved = "encoder.encoder.layer.1.output.dense.weight"
    assert not torch.allclose(trained[moved], base[moved.removeprefix("encoder.")], atol=1e-3)


def test_low_rank_updates_are_learnt_and_stored_as_such():
    experiment = tiny("fit.tuning=lora", "fit.lora_rank=4", "fit.epochs=1", "fit.warm_up_epochs=1")
    fit(experiment)

    of_encoder = {name: tensor for name, tensor in weights(experiment).items() if name.startswith("encoder.")}
    assert len(of_encoder) == 2 * 2 * 6  # A and B, two layers, six linear maps
    assert all(name.endswith((".weight.lora_A", ".weight.lora_B")) for name in of_encoder)
    assert all(4 in tensor.shape and tensor.any() for tensor in of_encoder.values())


def test_heads_alone_leave_the_encoder_to_the_base():
    experiment = tiny("fit.tuning=heads", "fit.epochs=1")
    fit(experiment)

    assert not [name for name in weights(experiment) if name.startswith("encoder.")]


def test_frozen_layers_do_not_learn():
    learning = {
        name
        for name, parameter in network_of(tiny("fit.frozen_layers=1")).named_parameters()
        if parameter.requires_grad
    }

    assert not any("encoder.layer.0." in name for name in learning)
    assert any("encoder.layer.1." in name for name in learning)


@pytest.mark.parametrize("depth", [0, 1])
def test_a_small_model_keeps_the_lowest_layers_of_the_encoder(depth: int):
    experiment = tiny(f"fit.encoder_layers={depth}", "fit.epochs=1")
    fit(experiment)
    release(experiment)

    encoder, name = load_saved(experiment.released).model.encoder, "embeddings.word_embeddings.weight"
    assert len(encoder.encoder.layer) == depth
    pretrained = load_file(Path(experiment.fit.encoder) / "model.safetensors")
    assert torch.equal(encoder.state_dict()[name].float(), pretrained[name])
    assert any(name.startswith("encoder.") for name in weights(experiment)) == (depth > 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["fit.encoder_layers=1", "fit.frozen_layers=2"], "encoder_layers keeps only 1"),
        (["fit.encoder_layers=0", "fit.tuning=lora"], "leaves nothing to adapt"),
        (["fit.own_text_weight=0.3"], "network.own_text_readers is 0"),
    ],
)
def test_layers_that_are_not_there_cannot_be_frozen_or_adapted(settings: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        tiny(*settings)


def test_an_encoder_of_another_family_is_tuned_without_dropout(tmp_path):
    tokenizer = Tokenizer.from_file(f"{tiny().fit.encoder}/tokenizer.json")
    config = DistilBertConfig(vocab_size=tokenizer.get_vocab_size(), dim=32, hidden_dim=64, n_heads=2, n_layers=2)
    DistilBertModel(config).save_pretrained(tmp_path)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    experiment = tiny("fit.epochs=1", f"fit.encoder={tmp_path}", "fit.frozen_layers=1")
    fit(experiment)
    release(experiment)

    saved = load_saved(experiment.released)
    assert isinstance(saved.model.encoder, DistilBertModel)
    assert (saved.model.encoder.config.dropout, saved.model.encoder.config.attention_dropout) == (0, 0)
    assert saved.description.ranges is None
    trained = {name for name in weights(experiment) if name.startswith("encoder.")}
    assert trained
    assert all(".layer.1." in name for name in trained)


def test_a_split_without_pages_is_named_before_training_begins():
    experiment = tiny("fit.epochs=1")
    file = experiment.prepared / "pages" / "validation.parquet"
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(file)[:0], file)

    with pytest.raises(ValueError, match="has no validation pages, expected some of each split"):
        fit(experiment)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["fit.encoder=no/such/encoder"], "the encoder no/such/encoder is no local folder"),
        (["fit.encoder_layers=99"], "expected at most 2"),
        (["fit.network.page_width=65"], "expected a multiple of 64"),
        (["prepare.topics=none.yaml"], r"the topic list none\.yaml cannot be used"),
        (["fit={kind: baseline}", "prepare.topics=none.yaml"], r"the topic list none\.yaml cannot be used"),
        (["fit={kind: baseline}"], "has no validation pages"),
    ],
)
def test_a_fit_that_is_refused_leaves_the_one_before(settings: list[str], message: str):
    folder = tiny().fitted
    folder.mkdir(parents=True)
    (folder / "trained.safetensors").write_text("fitted")
    if message == "has no validation pages":
        file = tiny().prepared / "pages" / "validation.parquet"
        pyarrow.parquet.write_table(pyarrow.parquet.read_table(file)[:0], file)

    with pytest.raises(ValueError, match=message):
        fit(tiny(*settings))
    assert [path.name for path in folder.iterdir()] == ["trained.safetensors"]


def test_a_fit_without_prepared_rows_leaves_the_one_before():
    folder = tiny().fitted
    folder.mkdir(parents=True)
    (folder / "trained.safetensors").write_text("fitted")
    tiny().prepared.rename("elsewhere")

    with pytest.raises(FileNotFoundError, match=r"run `python -m train\.prepare`"):
        fit(tiny())
    assert [path.name for path in folder.iterdir()] == ["trained.safetensors"]


def test_an_encoder_keeps_no_more_layers_than_it_has():
    with pytest.raises(ValueError, match=r"fit\.encoder_layers is 9, expected at most 2"):
        network_of(tiny("fit.encoder_layers=9"))


def test_norms_are_computed_in_float32_where_all_else_is_in_bfloat16():
    experiment = tiny()
    network, kinds = network_of(experiment), []
    for module in network.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.register_forward_hook(lambda _, inputs, output: kinds.append((inputs[0].dtype, output.dtype)))
    tokenizer = Tokenizer.from_file(str(Path(experiment.fit.encoder) / "tokenizer.json"))
    pages = [TextEncoder(tokenizer, experiment.fit.encoding, []).encode_page(resplit(rows_of(experiment, "train")[0]))]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        network.section_logits(collate_pages(pages))

    assert len(kinds) > 5
    assert set(kinds) == {(torch.float32, torch.float32)}


def test_the_same_config_and_seed_give_the_same_weights():
    experiment = tiny()
    fit(experiment)
    first = weights(experiment)
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002 (the global state must not matter)
    fit(experiment)
    again = weights(experiment)

    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    fit(tiny("fit.seed=1"))
    assert not torch.equal(first["section_heads.0.weight"], weights(experiment)["section_heads.0.weight"])


def test_held_out_rows_are_those_of_validation():
    experiment = tiny("fit.epochs=1")
    summary = fit(experiment)
    found = held_out(experiment)

    rows = rows_of(experiment, "validation")
    assert found["classes"].tolist() == [label for row in rows for label in row["classes"]]
    assert found["section_sites"].tolist() == [row["site"] for row in rows for _ in row["classes"]]
    assert len(found["topic_logits"]) == len(rows) + len(load_rows(experiment.prepared, "articles", "validation"))
    assert summary == json.loads((experiment.fitted / "fit.json").read_text("utf-8"))
    assert 0 <= summary["validation_macro_f1"] <= 1


def test_scores_of_the_other_folds_are_added_by_models_that_did_not_see_them():
    experiment = tiny("fit.epochs=1", "fit.out_of_fold_epochs=1", "fit.folds_at_once=1")
    fit(experiment)
    found = held_out(experiment)

    validation, train = rows_of(experiment, "validation"), rows_of(experiment, "train")
    expected = [*validation, *(row for fold in (1, 2) for row in train if row["fold"] == fold)]
    assert {row["fold"] for row in train} == {1, 2}
    assert found["classes"].tolist() == [label for row in expected for label in row["classes"]]
    assert set(found["section_sites"]) == {row["site"] for row in [*validation, *train]}
    assert not set(found["section_sites"]) & {row["site"] for row in rows_of(experiment, "test")}
    assert len(found["section_logits"]) == len(found["classes"])
    articles = [load_rows(experiment.prepared, "articles", name) for name in ("validation", "train")]
    assert len(found["holds"]) == len(expected) + sum(map(len, articles))
    assert not (experiment.fitted / "folds").exists()


def test_nothing_but_results_stays_when_fitting_is_done():
    experiment = tiny()
    summary = fit(experiment)

    assert {path.name for path in experiment.fitted.iterdir()} == {
        "trained.safetensors",
        "fit.json",
        "held_out.npz",
        "made_of.json",
        "run.json",
    }
    assert summary["best_step"] in (summary["steps"] // 2, summary["steps"])


def test_the_best_weights_are_kept_not_the_last():
    # At such a rate later epochs destroy what earlier ones have learnt.
    experiment = tiny("fit.epochs=6", "fit.patience=1", "fit.head_learning_rate=0.3", "fit.precision=float32")
    summary = fit(experiment)

    assert summary["best_step"] < summary["steps"]
    found = held_out(experiment)
    predicted = labels_of(found["section_logits"].argmax(axis=1))
    assert macro_f1(label_confusion(labels_of(found["classes"]), predicted)) == pytest.approx(
        summary["validation_macro_f1"]
    )


def test_warm_up_trains_the_heads_and_leaves_the_encoder_alone():
    experiment = tiny("fit.tuning=heads", "fit.epochs=1", "fit.head_learning_rate=1e-12", "fit.warm_up_epochs=3")
    fit(experiment)
    trained, fresh = weights(experiment), network_of(experiment).state_dict()

    assert not torch.allclose(trained["section_heads.0.weight"], fresh["section_heads.0.weight"], atol=1e-3)
    assert not torch.allclose(trained["topic_head.weight"], fresh["topic_head.weight"], atol=1e-3)


def test_training_lowers_the_loss_on_what_was_trained_on():
    experiment = tiny("fit.epochs=5", "fit.patience=5", "fit.tokens_per_batch=3_000")
    summary = fit(experiment)
    release(experiment)

    rows = rows_of(experiment, "train")
    saved = load_saved(experiment.released)
    predicted = logits_of(saved, rows).argmax(axis=1)
    assert len(saved.description.ranges) == saved.model.encoder.config.num_hidden_layers
    width = saved.model.encoder.config.hidden_size
    for layer in saved.description.ranges:
        assert all(low < 0 < high for low, high in (layer.attention, layer.attended, layer.feed, layer.inner))
        assert [len(widths) for widths in layer.widths.values()] == [width] * 3
    true = np.concatenate([row["classes"] for row in rows])
    assert (predicted == true).mean() > np.bincount(true).max() / len(true) + 0.05
    assert summary["validation_macro_f1"] > 0.3


@pytest.mark.parametrize(("power", "weights"), [(0, [1, 1, 1]), (0.5, [1, 2, 10]), (1, [1, 4, 100])])
def test_rare_classes_weigh_by_the_power_asked_for(power, weights):
    fitting = Fitting(
        tiny(f"fit.class_weight_power={power}").fit, Path(), read_topics(tiny().prepare.topics), num_hints=8
    )

    assert fitting.loss_weights(np.array([100, 25, 1])).classes.tolist() == weights
    assert torch.isfinite(fitting.loss_weights(np.array([100, 0, 1])).classes).all()


def test_more_gpus_than_processes_are_refused_with_what_to_do(monkeypatch):
    monkeypatch.setattr("train.fitting.choose_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr("train.fitting.join", lambda _: SimpleNamespace(num_processes=1))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    experiment = tiny()

    with pytest.raises(ValueError, match=r"there are 2 GPUs and 1 process\(es\): .*`torchrun --nproc-per-node 2"):
        Fitting(experiment.fit, Path(), read_topics(experiment.prepare.topics), num_hints=8)


def test_the_optimizer_decays_matrices_only_and_knows_two_rates():
    experiment = tiny("fit.learning_rate=1e-3", "fit.head_learning_rate=1e-2", "fit.weight_decay=0.1")
    topics = read_topics(experiment.prepare.topics)
    fitting = Fitting(experiment.fit, Path(experiment.fit.encoder), topics, num_hints=8)
    model = fitting.new_model()
    groups = fitting.optimizer(model).param_groups

    assert {(group["lr"], group["weight_decay"]) for group in groups} == {
        (1e-3, 0.1),
        (1e-3, 0.0),
        (1e-2, 0.1),
        (1e-2, 0.0),
    }
    assert all((parameter.ndim > 1) == bool(group["weight_decay"]) for group in groups for parameter in group["params"])
    assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("with_articles", [False, True], ids=["no articles", "articles in training only"])
def test_pages_whose_topics_nobody_judged_can_be_trained_on(with_articles):
    settings = json.loads(Path("tiny.yaml").read_text("utf-8"))["prepare"]
    (source,) = settings["pages"]
    lines = Path(source["annotations"]).read_text("utf-8").splitlines()
    unjudged = [json.loads(line) | {"topics": None} for line in lines]
    Path("unjudged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in unjudged), "utf-8")
    pages = json.dumps([source | {"annotations": "unjudged.jsonl"}])
    # One site of articles, too large to be held out.
    one_site = settings["articles"][0] | {"url_column": None}
    given = json.dumps([one_site] if with_articles else [])
    experiment = tiny(
        f"prepare.pages={pages}", f"prepare.articles={given}", "prepare.large_site_rows=20", "fit.epochs=1"
    )
    report = prepare(experiment)
    assert [report["splits"][name]["articles"] for name in ("validation", "test")] == [0, 0]

    assert fit(experiment)["validation_macro_f1"] >= 0
    calibration = release(experiment)
    assert calibration.num_articles == 0
    assert np.isfinite([calibration.topic_temperature, *calibration.thresholds]).all()


def test_fitting_before_preparing_says_what_to_run():
    with pytest.raises(FileNotFoundError, match=r"run `python -m train\.prepare`"):
        fit(tiny("name=other"))


def test_releasing_before_fitting_says_what_to_run():
    with pytest.raises(FileNotFoundError, match=r"run `python -m train\.fit`"):
        release(tiny())


def test_the_tokenizer_of_the_encoder_frames_text():
    ids = Tokenizer.from_file(f"{tiny().fit.encoder}/tokenizer.json").encode("news").ids

    assert (ids[0], ids[-1]) == (2, 3)
