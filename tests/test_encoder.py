import hashlib
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest

from copydesk.encoder import MINILM, MINILM_PACKAGE, EncoderError, encoder_folder, sha256_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make a folder with the files of a pretrained encoder, whatever they hold."""
    return make_encoder(tmp_path / "encoder")


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make sure that the hub is neither asked nor found in a cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def make_encoder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_text(name)
    return folder


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_the_hash_of_a_file_is_that_of_its_bytes(tmp_path):
    path = tmp_path / "large"
    path.write_bytes(b"ab" * 500_000)

    assert sha256_of(path) == sha256("ab" * 500_000)


def test_a_local_folder_is_taken_as_it_is(folder):
    assert encoder_folder(str(folder)) == folder
    assert encoder_folder(str(folder), sha256=sha256("model.safetensors")) == folder


def test_a_local_folder_with_other_weights_is_refused_with_both_hashes(folder):
    with pytest.raises(EncoderError, match=rf"{sha256('model.safetensors')}, expected {sha256('x')}: .* version"):
        encoder_folder(str(folder), sha256=sha256("x"))


def test_all_that_a_local_folder_lacks_is_named(folder):
    (folder / "config.json").unlink()
    (folder / "model.safetensors").unlink()

    with pytest.raises(EncoderError, match=r"lacks config\.json, model\.safetensors: complete it, or name a hub id"):
        encoder_folder(str(folder))


def test_a_local_folder_comes_before_the_hub(folder, monkeypatch):
    make_encoder(folder / "some-one" / "encoder")
    monkeypatch.chdir(folder)

    assert encoder_folder("some-one/encoder") == Path("some-one/encoder")


def test_the_packaged_encoder_is_found_without_running_its_code_and_its_weights_are_checked(tmp_path, monkeypatch):
    make_encoder(tmp_path / MINILM_PACKAGE / "model")
    (tmp_path / MINILM_PACKAGE / "__init__.py").write_text("raise RuntimeError('was run')")
    monkeypatch.syspath_prepend(tmp_path)

    with pytest.raises(EncoderError, match=rf"{MINILM} in {tmp_path}.*{sha256('model.safetensors')}"):
        encoder_folder(MINILM)

    found = encoder_folder(MINILM, sha256=sha256("model.safetensors"))
    assert found == tmp_path / MINILM_PACKAGE / "model"


@pytest.mark.usefixtures("offline")
def test_what_neither_a_folder_nor_the_hub_has_is_refused_with_what_to_do():
    with pytest.raises(EncoderError, match=r"some-one/no-such is no local folder .*: name a folder with config"):
        encoder_folder("some-one/no-such")


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["no such/folder!", "a/b/c", "../encoder", ""])
def test_a_name_that_the_hub_cannot_have_is_refused_like_any_other(name, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")

    with pytest.raises(EncoderError, match=r"name (a folder with config\.json|a hub id)|complete it"):
        encoder_folder(name)


@pytest.mark.usefixtures("offline")
def test_without_its_package_the_released_encoder_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, MINILM_PACKAGE, None)

    with pytest.raises(EncoderError, match=r"pip install copydesk\[encoder\]"):
        encoder_folder(MINILM)
