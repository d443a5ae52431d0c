import ast
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import copydesk
from copydesk.encoder import EncoderError, sha256_of
from copydesk.saved import (
    CARD,
    DESCRIPTION,
    FORMAT,
    MANIFEST,
    OLDEST_FORMAT,
    TOKENIZER,
    WEIGHTS,
    Base,
    Manifest,
    ModelError,
    export_standalone,
    load_saved,
    read_description,
    read_manifest,
    save_folder,
)

UPDATED = "encoder.layer.0.attention.self.query.weight"


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """Copy the tiny model to where it may be damaged."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def sign(folder: Path) -> None:
    """Make the manifest agree with the files, as if they had been saved like this."""
    edit(folder / MANIFEST, files={name: sha256_of(folder / name) for name in (WEIGHTS, DESCRIPTION, TOKENIZER)})


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def save_again(folder: Path, source: Path, tensors: dict[str, torch.Tensor], *, base: Base | None) -> Manifest:
    return save_folder(
        folder,
        tensors=tensors,
        description=read_description(source).model_copy(update={"base": base}),
        tokenizer=(source / TOKENIZER).read_text(),
        name="again",
        created="2026-01-02",
        run={"git": "1111111"},
        card="# again\n",
    )


@pytest.fixture
def base(tiny_model: Path, tmp_path: Path) -> Path:
    """Save the encoder of the tiny model as a pretrained encoder that other folders can build on."""
    folder = tmp_path / "base"
    folder.mkdir()
    saved = load_saved(tiny_model)
    save_file(saved.model.encoder.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(saved.description.network.encoder))
    shutil.copy(tiny_model / TOKENIZER, folder)
    return folder


def borrow(base: Path, **changes) -> Base:
    weights = base / "model.safetensors"
    return Base(**{"name": str(base), "sha256": sha256_of(weights), "borrowed": sorted(load_file(weights))} | changes)


@pytest.fixture
def borrowing(tiny_model: Path, base: Path, tmp_path: Path) -> Path:
    """Save the tiny model so that its encoder stands in the base only, with a low-rank update of one matrix."""
    tensors = {key: tensor for key, tensor in load_file(tiny_model / WEIGHTS).items() if not key.startswith("encoder.")}
    generator = torch.Generator().manual_seed(0)
    tensors[f"encoder.{UPDATED}.lora_A"] = torch.randn(2, 32, generator=generator)
    tensors[f"encoder.{UPDATED}.lora_B"] = torch.randn(32, 2, generator=generator)
    save_again(tmp_path / "borrowing", tiny_model, tensors, base=borrow(base, lora_scale=0.5))
    return tmp_path / "borrowing"


def test_a_model_comes_back_as_it_was_saved(tiny_model, tmp_path):
    saved = load_saved(tiny_model)

    save_again(tmp_path / "again", tiny_model, saved.model.state_dict(), base=None)
    again = load_saved(tmp_path / "again")

    assert again.description == saved.description
    assert again.topics.topics == saved.topics.topics
    assert again.tokenizer.to_str() == saved.tokenizer.to_str()
    assert again.thresholds.tolist() == [0.9, 0.1, 0.9]
    torch.testing.assert_close(dict(again.model.state_dict()), dict(saved.model.state_dict()), rtol=0, atol=0)


def test_a_loaded_model_is_ready_to_read_on_the_cpu(tiny_model):
    drawn = torch.random.get_rng_state()
    model = load_saved(tiny_model).model

    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert not model.training
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert tensor.device.type == "cpu", name
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_weights_in_half_precision_are_read_as_float32(tiny_model, tmp_path):
    tensors = {key: tensor.bfloat16() for key, tensor in load_file(tiny_model / WEIGHTS).items()}
    save_again(tmp_path / "half", tiny_model, tensors, base=None)

    model = load_saved(tmp_path / "half").model

    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_the_version_tells_models_apart_by_content_and_not_by_name(tiny_model, tmp_path):
    tensors = load_file(tiny_model / WEIGHTS)
    same = save_again(tmp_path / "same", tiny_model, tensors, base=None)
    tensors["topic_head.bias"] = tensors["topic_head.bias"] + 1
    other = save_again(tmp_path / "other", tiny_model, tensors, base=None)

    assert same.name != read_manifest(tiny_model).name
    assert same.version == read_manifest(tiny_model).version != other.version
    assert len(same.version) == 12
    assert same.format == FORMAT


def test_a_folder_without_its_card_is_read(folder):
    (folder / CARD).unlink()

    assert load_saved(folder).manifest.name == "tiny"


def test_what_is_no_folder_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"there is no model folder .*nowhere: train one, or name one with --model"):
        load_saved(tmp_path / "nowhere")


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"has no manifest\.json, so it is no copydesk model"):
        load_saved(tmp_path)


@pytest.mark.parametrize("name", [WEIGHTS, DESCRIPTION, TOKENIZER])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()

    with pytest.raises(ModelError, match=f"lacks {name}: fetch the folder again"):
        load_saved(folder)


@pytest.mark.parametrize("name", [WEIGHTS, DESCRIPTION, TOKENIZER])
def test_an_altered_file_is_named(folder, name):
    with (folder / name).open("ab") as file:
        file.write(b"\n")

    with pytest.raises(ModelError, match=f"{name} was altered: its sha256 is"):
        load_saved(folder)


def test_a_newer_format_asks_for_a_newer_copydesk_even_if_nothing_else_is_understood(folder):
    (folder / MANIFEST).write_text(json.dumps({"format": FORMAT + 1, "shards": []}))

    known = f"{OLDEST_FORMAT} to {FORMAT}"
    with pytest.raises(ModelError, match=f"has the format {FORMAT + 1}, this copydesk reads {known}: upgrade"):
        load_saved(folder)


@pytest.mark.parametrize("name", ["extra.bin", "../other/weights.safetensors"])
def test_a_file_that_no_model_has_is_refused(folder, name):
    files = json.loads((folder / MANIFEST).read_text())["files"]
    edit(folder / MANIFEST, files=files | {name: "0" * 64})

    with pytest.raises(ModelError, match=r"lists .* expected"):
        load_saved(folder)


def test_a_manifest_that_leaves_a_file_out_is_refused(folder):
    files = json.loads((folder / MANIFEST).read_text())["files"]
    del files[WEIGHTS]
    edit(folder / MANIFEST, files=files)

    with pytest.raises(ModelError, match=r"lists .* expected"):
        load_saved(folder)


def test_an_older_format_asks_for_a_newer_model(folder):
    (folder / MANIFEST).write_text(json.dumps({"format": OLDEST_FORMAT - 1}))

    with pytest.raises(ModelError, match=f"has the format {OLDEST_FORMAT - 1}, this copydesk reads .*: fetch a newer"):
        read_manifest(folder)


def test_a_folder_of_the_format_before_ranges_is_read_and_is_deaf_to_line_breaks(folder):
    description = json.loads((folder / DESCRIPTION).read_text())
    del description["ranges"]
    (folder / DESCRIPTION).write_text(json.dumps(description))
    name, tensors = "page_encoders.0.feature_projection.weight", load_file(folder / WEIGHTS)
    whole = tensors[name]
    tensors[name] = torch.cat([whole[:, :11], whole[:, 13:]], dim=1)
    save_file(tensors, folder / WEIGHTS)
    sign(folder)
    edit(folder / MANIFEST, format=2)

    saved = load_saved(folder)

    assert saved.description.ranges is None
    read = saved.model.state_dict()[name]
    assert not read[:, 11:13].any()
    assert torch.equal(torch.cat([read[:, :11], read[:, 13:]], dim=1), tensors[name].float())


def test_ranges_of_another_number_of_layers_are_refused(folder):
    layer = dict.fromkeys(("attention", "attended", "feed", "inner"), (-1.0, 1.0))
    edit(folder / DESCRIPTION, ranges=[layer] * 7)

    with pytest.raises(ModelError, match=r"has ranges for 7 layers, its text encoder has \d"):
        read_description(folder)


def test_widths_of_another_number_of_channels_are_refused(folder):
    layer = dict.fromkeys(("attention", "attended", "feed", "inner"), (-1.0, 1.0)) | {"widths": {"feed": [1.0] * 3}}
    layers = json.loads((folder / DESCRIPTION).read_text())["network"]["encoder"]["num_hidden_layers"]
    edit(folder / DESCRIPTION, ranges=[layer] * layers)

    with pytest.raises(ModelError, match=r"has 3 widths of feed, its text encoder has \d+ channels"):
        read_description(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'"x"', b"\xff", b"{}", b'{"format": 2, "name": "x"}'])
def test_a_broken_manifest_is_refused(folder, content):
    (folder / MANIFEST).write_bytes(content)

    with pytest.raises(ModelError, match="is broken"):
        load_saved(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"{}"])
def test_a_broken_description_is_refused(folder, content):
    (folder / DESCRIPTION).write_bytes(content)
    sign(folder)

    with pytest.raises(ModelError, match="cannot be understood"):
        load_saved(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"surprise": 1}, "surprise"),
        ({"section_temperature": 0}, "section_temperature"),
        ({"encoding": {"head": 3}}, "encoding"),
        ({"classes": ["body", "headline", "boilerplate", "paywall", "sponsored"]}, "lists the classes"),
        ({"thresholds": [0.5]}, "1 thresholds, expected .* and 3"),
    ],
)
def test_a_description_that_this_version_does_not_understand_is_refused(folder, changes, message):
    edit(folder / DESCRIPTION, **changes)
    sign(folder)

    with pytest.raises(ModelError, match=message):
        load_saved(folder)


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_weights_that_do_not_fit_the_description_are_refused(folder, change):
    tensors = load_file(folder / WEIGHTS)
    if change == "missing":
        del tensors["topic_head.bias"]
    else:
        tensors["extra"] = torch.zeros(1)
    save_file(tensors, folder / WEIGHTS)
    sign(folder)

    with pytest.raises(ModelError, match=r"does not fit model\.json"):
        load_saved(folder)


def damage_weights(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"\x80\x04K*." * 10)


def cut_weights(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def reshape_weights(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file(tensors | {"topic_head.bias": torch.zeros(4)}, folder / WEIGHTS)


def damage_tokenizer(folder: Path) -> None:
    (folder / TOKENIZER).write_text("{}")


def repeat_topic(folder: Path) -> None:
    topics = json.loads((folder / DESCRIPTION).read_text())["topics"]
    edit(folder / DESCRIPTION, topics=[topics[0], topics[0], topics[2]])


def change_network(folder: Path) -> None:
    network = json.loads((folder / DESCRIPTION).read_text())["network"]
    edit(folder / DESCRIPTION, network=network | {"encoder": {"model_type": "no such encoder"}})


def orphan_update(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file(tensors | {"topic_head.weight.lora_A": torch.zeros(2, 32)}, folder / WEIGHTS)


@pytest.mark.parametrize(
    "damage",
    [damage_weights, cut_weights, reshape_weights, damage_tokenizer, repeat_topic, change_network, orphan_update],
)
def test_a_folder_that_was_saved_broken_is_refused_by_our_own_error(folder, damage):
    damage(folder)
    sign(folder)

    with pytest.raises(ModelError, match=str(folder)):
        load_saved(folder)


def test_a_model_takes_from_its_base_what_it_does_not_hold(borrowing, base):
    model = load_saved(borrowing).model.state_dict()

    for name, tensor in load_file(base / "model.safetensors").items():
        assert torch.equal(model[f"encoder.{name}"], tensor) == (name != UPDATED), name


def test_low_rank_updates_are_added_with_their_scale(borrowing, base):
    held = load_file(borrowing / WEIGHTS)
    low, high = held[f"encoder.{UPDATED}.lora_A"], held[f"encoder.{UPDATED}.lora_B"]

    found = load_saved(borrowing).model.state_dict()[f"encoder.{UPDATED}"]

    torch.testing.assert_close(found, load_file(base / "model.safetensors")[UPDATED] + 0.5 * high @ low)


def test_a_base_with_other_weights_is_refused(borrowing, base):
    tensors = load_file(base / "model.safetensors")
    save_file(tensors | {UPDATED: tensors[UPDATED] + 1}, base / "model.safetensors")

    with pytest.raises(EncoderError, match=r"have the sha256 .*, expected .*another version"):
        load_saved(borrowing)


def test_a_base_that_is_incomplete_is_refused(borrowing, base):
    (base / "config.json").unlink()

    with pytest.raises(EncoderError, match=r"lacks config\.json"):
        load_saved(borrowing)


def test_a_tensor_that_the_base_does_not_have_is_named(tiny_model, base, tmp_path):
    save_again(tmp_path / "new", tiny_model, {}, base=borrow(base, borrowed=["no.such.weight"]))

    with pytest.raises((ModelError, EncoderError), match=r"no\.such\.weight"):
        load_saved(tmp_path / "new")


def test_a_standalone_copy_needs_no_base(borrowing, base, tmp_path):
    expected = load_saved(borrowing).model.state_dict()

    manifest = export_standalone(borrowing, tmp_path / "alone")
    shutil.rmtree(base)
    alone = load_saved(tmp_path / "alone")

    assert alone.description.base is None
    assert alone.manifest == manifest
    assert (manifest.name, manifest.created, manifest.run) == ("again", "2026-01-02", {"git": "1111111"})
    assert (tmp_path / "alone" / CARD).read_text() == "# again\n"
    for name, tensor in alone.model.state_dict().items():
        assert torch.equal(tensor, expected[name].bfloat16().float()), name


def test_a_standalone_copy_overwrites_nothing(tiny_model, tmp_path):
    (tmp_path / "precious").write_text("x")

    with pytest.raises(ModelError, match="is not empty: name a new folder"):
        export_standalone(tiny_model, tmp_path)

    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_a_standalone_copy_over_a_file_is_refused(tiny_model, tmp_path):
    (tmp_path / "page.html").write_text("x")

    with pytest.raises(ModelError, match=r"page\.html is a file, expected a folder"):
        export_standalone(tiny_model, tmp_path / "page.html")


@pytest.mark.parametrize("is_there", [True, False])
def test_a_standalone_copy_that_finds_the_disk_full_leaves_nothing(tiny_model, tmp_path, is_there, monkeypatch):
    def fill(tensors, path):
        path.write_bytes(b"half a mod")
        raise SafetensorError("Error while serializing: No space left on device")

    monkeypatch.setattr("copydesk.saved.save_file", fill)
    folder = tmp_path / "alone"
    if is_there:
        folder.mkdir()

    with pytest.raises(ModelError, match=r"alone cannot be written \(.*No space left.*a disk with room"):
        export_standalone(tiny_model, folder)

    assert list(tmp_path.rglob("*")) == [folder] * is_there


def test_the_address_of_a_registry_is_said_to_be_no_folder():
    with pytest.raises(ModelError, match=r"no model folder models:/copydesk@champion: `copydesk serve` takes"):
        load_saved("models:/copydesk@champion")


class Bomb:
    """Leaves a file where it was unpickled."""

    def __init__(self, crater: Path) -> None:
        self.crater = crater

    def __reduce__(self) -> tuple:
        return Path.touch, (self.crater,)


def test_a_pickle_in_the_folder_or_in_its_base_is_never_touched(borrowing, base, tmp_path):
    crater = tmp_path / "crater"
    bomb = pickle.dumps(Bomb(crater))
    for place in (borrowing, base):
        for name in ("model.pkl", "pytorch_model.bin", "weights.pt", "training_args.bin", "tokenizer.pkl"):
            (place / name).write_bytes(bomb)
        (place / "configuration.py").write_text(f"open({str(crater)!r}, 'w')")
    edit(base / "config.json", auto_map={"AutoConfig": "configuration.Config", "AutoModel": "configuration.Model"})

    load_saved(borrowing)
    export_standalone(borrowing, tmp_path / "alone")

    assert not crater.exists()
    assert sorted(path.name for path in (tmp_path / "alone").iterdir()) == sorted(
        [CARD, MANIFEST, DESCRIPTION, TOKENIZER, WEIGHTS]
    )


def test_nothing_in_the_package_can_unpickle():
    for path in Path(copydesk.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text("utf-8"))
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not names & {"pickle", "cloudpickle", "joblib", "dill", "shelve", "marshal"}, path.name
        assert "torch.load" not in path.read_text("utf-8"), path.name
