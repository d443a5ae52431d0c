"""Save and load a model folder.

Knows files, hashes and versions; knows nothing of pages. A folder holds `manifest.json` (format, name, run, the sha256
of each other file), `model.json` (what is no tensor), `weights.safetensors`, `tokenizer.json` and a card, `README.md`,
which nobody reads but people. Nothing in it is ever run.
"""

import hashlib
import json
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer

from copydesk.encode import BREAKS, Encoding
from copydesk.encoder import EncoderError, encoder_folder, sha256_of
from copydesk.int8 import LayerRanges
from copydesk.labels import CLASSES, TopicInfo, TopicList
from copydesk.network import CopydeskConfig, CopydeskModel

FORMAT, OLDEST_FORMAT = 6, 2
"""2: several page encoders. 3: ranges of what the text encoder's projections read, where they are known. 4: line breaks
around a section among its features. 5: page encoders that read a section by itself, too, and hidden layers below
logits. 6: widths of channels beside the ranges."""
WEIGHTS, DESCRIPTION, TOKENIZER, MANIFEST, CARD = (
    "weights.safetensors",
    "model.json",
    "tokenizer.json",
    "manifest.json",
    "README.md",
)
_HASHED = (WEIGHTS, DESCRIPTION, TOKENIZER)


class ModelError(ValueError):
    """A model folder cannot be trusted, understood or written. The message says why, and what to do."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Base(_Part):
    """The pretrained encoder that a folder builds on."""

    name: str
    sha256: str
    """Of its `model.safetensors`."""
    borrowed: list[str]
    """Tensors of our encoder that stand in the base only."""
    lora_scale: float | None = None
    """Factor of the low-rank updates (`NAME.lora_A`, `NAME.lora_B` among the weights); null without any."""


class Description(_Part):
    """What a model is, tensors apart."""

    network: CopydeskConfig
    encoding: Encoding
    hints: list[str]
    """Order of the hint embeddings: what the elements around a section may say that the model understands."""
    classes: list[str]
    """Order of the section logits."""
    topics: list[TopicInfo]
    """Order of the topic logits."""
    thresholds: list[float]
    """Probability from which each topic is assigned."""
    section_temperature: float = Field(gt=0)
    topic_temperature: float = Field(gt=0)
    headline_share: float = Field(default=0.0, ge=0, le=1)
    """Of the pages with body text, those that have a headline; 0: it is not known."""
    base: Base | None
    """Null: the folder stands alone."""
    ranges: list[LayerRanges] | None = None
    """Of each layer of the text encoder; null where it can only be run in floating point."""


class Manifest(_Part):
    """What a folder holds and where it comes from."""

    format: int
    name: str
    created: str
    run: dict[str, str]
    """The run that made it: git commit, data hashes, MLflow run id."""
    files: dict[str, str]
    """sha256 of each file but this and the card."""

    @property
    def version(self) -> str:
        """Twelve hex digits that tell this model from every other one."""
        return hashlib.sha256(json.dumps(self.files, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True, slots=True)
class SavedModel:
    """A model in memory with all it needs to read a page."""

    manifest: Manifest
    description: Description
    topics: TopicList
    tokenizer: Tokenizer
    model: CopydeskModel

    @property
    def thresholds(self) -> np.ndarray:
        """(topics,)."""
        return np.array(self.description.thresholds)


def read_manifest(folder: Path | str) -> Manifest:
    """Read what a folder holds and verify each file against its hash.

    Raises:
        ModelError: a file is missing, altered, unknown, or of a newer format.
    """
    folder = Path(folder)
    if not folder.is_dir():
        remedy = "train one, or name one with --model or COPYDESK_MODEL"
        if str(folder).startswith("models:/"):
            remedy = "`copydesk serve` takes such an address; copydesk.registry.fetch makes a folder of it"
        raise ModelError(f"there is no model folder {folder}: {remedy}")
    path = folder / MANIFEST
    if not path.is_file():
        raise ModelError(f"{folder} has no {MANIFEST}, so it is no copydesk model: name the folder that holds one")
    try:
        content = json.loads(path.read_text("utf-8"))
        version = content.get("format") if isinstance(content, dict) else None
        if isinstance(version, int) and not OLDEST_FORMAT <= version <= FORMAT:
            remedy = "upgrade copydesk" if version > FORMAT else "fetch a newer model, or train it again"
            known = f"{OLDEST_FORMAT} to {FORMAT}"
            raise ModelError(f"{folder} has the format {version}, this copydesk reads {known}: {remedy}")
        manifest = Manifest.model_validate(content)
    except (json.JSONDecodeError, UnicodeDecodeError, ValidationError) as error:
        raise ModelError(f"{path} is broken ({error}): fetch the folder again") from error
    if set(manifest.files) != set(_HASHED):
        raise ModelError(f"{path} lists {sorted(manifest.files)}, expected {sorted(_HASHED)}: fetch the folder again")
    for name, expected in manifest.files.items():
        file = folder / name
        if not file.is_file():
            raise ModelError(f"{folder} lacks {name}: fetch the folder again")
        if (found := sha256_of(file)) != expected:
            raise ModelError(
                f"{file} was altered: its sha256 is {found}, the manifest says {expected}. Fetch the folder again"
            )
    return manifest


def read_description(folder: Path | str) -> Description:
    """Read what a model is, without its tensors; verify the folder first with `read_manifest`.

    Raises:
        ModelError: the file says something this version cannot understand.
    """
    path = Path(folder) / DESCRIPTION
    try:
        description = Description.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ModelError(f"{path} cannot be understood ({error}): it was written by another version") from error
    if description.classes != list(CLASSES) or len(description.thresholds) != len(description.topics):
        raise ModelError(
            f"{path} lists the classes {description.classes} and {len(description.thresholds)} thresholds, "
            f"expected {list(CLASSES)} and {len(description.topics)}: train the model again"
        )
    layers = description.network.encoder.get("num_hidden_layers")
    if description.ranges is not None and len(description.ranges) != layers:
        raise ModelError(
            f"{path} has ranges for {len(description.ranges)} layers, its text encoder has {layers}: "
            "run fit and release again"
        )
    width = description.network.encoder.get("hidden_size")
    for name, widths in chain.from_iterable(layer.widths.items() for layer in description.ranges or ()):
        if len(widths) != width:
            raise ModelError(
                f"{path} has {len(widths)} widths of {name}, its text encoder has {width} channels: "
                "run fit and release again"
            )
    return description


def load_saved(folder: Path | str) -> SavedModel:
    """Load a model folder in float32 on the CPU.

    Raises:
        ModelError: the folder cannot be trusted or understood.
        EncoderError: it builds on a pretrained encoder that cannot be had.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    description = read_description(folder)
    try:
        model = _build(folder, description, manifest.format)
        topics = TopicList(description.topics)
        tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    except (ModelError, EncoderError):
        raise
    except Exception as error:  # safetensors, tokenizers and transformers raise many kinds, tokenizers a bare one
        raise ModelError(
            f"{folder} cannot be understood ({type(error).__name__}: {error}): it was written by another version, "
            "or is broken. Fetch the folder again"
        ) from error
    return SavedModel(
        manifest=manifest, description=description, topics=topics, tokenizer=tokenizer, model=model.eval()
    )


def _build(folder: Path, description: Description, version: int) -> CopydeskModel:
    with torch.random.fork_rng(devices=[]):  # on the meta device nothing would be drawn, but it takes seconds to import
        model = CopydeskModel(description.network)
    tensors = _tensors(folder / WEIGHTS, description.base)
    if version < 4:
        tensors = {name: _deaf_to_breaks(name, tensor) for name, tensor in tensors.items()}
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if found != expected:
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise ModelError(
            f"{folder / WEIGHTS} does not fit {DESCRIPTION}: {len(wrong)} tensors are missing, unexpected or of "
            f"another shape, the first {wrong[0]}. Fetch the folder again"
        )
    model.load_state_dict(tensors, assign=True)
    return model


def _deaf_to_breaks(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of a format before 4, with zeros for the features that it did not have."""
    if not name.endswith(".feature_projection.weight"):
        return tensor
    before, after = tensor[:, : BREAKS[0]], tensor[:, BREAKS[0] :]
    return torch.cat([before, torch.zeros(len(tensor), len(BREAKS)), after], dim=1)


def _tensors(weights: Path, base: Base | None) -> dict[str, torch.Tensor]:
    with safe_open(weights, framework="pt") as file:
        tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 (no mapping)
    if base is None:
        return tensors
    path = encoder_folder(base.name, sha256=base.sha256) / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        for name in base.borrowed:
            tensors[f"encoder.{name}"] = file.get_tensor(name).float()
    for name in [name for name in tensors if name.endswith(".lora_A")]:
        target = name.removesuffix(".lora_A")
        low, high = tensors.pop(name), tensors.pop(f"{target}.lora_B")
        tensors[target] = tensors[target] + (base.lora_scale or 1.0) * high @ low
    return tensors


def save_folder(
    folder: Path | str,
    *,
    tensors: dict[str, torch.Tensor],
    description: Description,
    tokenizer: str,
    name: str,
    created: str,
    run: dict[str, str],
    card: str,
) -> Manifest:
    """Write a model folder.

    Args:
        folder: to write to; made if it does not exist.
        tensors: all that the base does not hold, in the precision to store.
        description: the rest.
        tokenizer: content of `tokenizer.json`.
        name: of the model.
        created: date, ISO 8601.
        run: the run that made it.
        card: Markdown.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / WEIGHTS)
    (folder / WEIGHTS).chmod(0o644)  # safetensors lets nobody but the owner read
    (folder / DESCRIPTION).write_text(description.model_dump_json(indent=1) + "\n", "utf-8")
    (folder / TOKENIZER).write_text(tokenizer, "utf-8")
    (folder / CARD).write_text(card, "utf-8")
    manifest = Manifest(
        format=FORMAT,
        name=name,
        created=created,
        run=run,
        files={file: sha256_of(folder / file) for file in _HASHED},
    )
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n", "utf-8")
    return manifest


def export_standalone(source: Path | str, target: Path | str) -> Manifest:
    """Copy a model folder, in bfloat16, so that the copy needs no pretrained encoder beside it.

    Raises:
        ModelError: the source cannot be trusted or understood, or the target is not empty or cannot be written.
        EncoderError: the encoder that the source builds on cannot be had.
    """
    source, target = Path(source), Path(target)
    if target.exists() and not target.is_dir():
        raise ModelError(f"{target} is a file, expected a folder: name a new one")
    if target.exists() and any(target.iterdir()):
        raise ModelError(f"{target} is not empty: name a new folder")
    saved = load_saved(source)
    tokenizer = (source / TOKENIZER).read_text("utf-8")
    card = (source / CARD).read_text("utf-8") if (source / CARD).is_file() else ""
    is_new = not target.exists()
    try:
        target.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".part", dir=target) as part:  # inside, for the target may be a mount
            manifest = save_folder(
                part,
                tensors={key: tensor.bfloat16() for key, tensor in saved.model.state_dict().items()},
                description=saved.description.model_copy(update={"base": None}),
                tokenizer=tokenizer,
                name=saved.manifest.name,
                created=saved.manifest.created,
                run=saved.manifest.run,
                card=card,
            )
            for file in (*_HASHED, CARD, MANIFEST):  # the manifest last: without it, it is no model
                (Path(part) / file).replace(target / file)
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{target} cannot be written ({error}): name a folder that is yours to write, on a disk with room"
        ) from error
    finally:
        if is_new and target.is_dir() and not any(target.iterdir()):
            target.rmdir()
    return manifest
