"""Checkpoints, and results of stages, that are whole or not there.

Knows folders, hashes and names; knows nothing of weights. A checkpoint is written under a temporary name, synced, given
a manifest with the hash of each file, and renamed: whatever ends the process, what bears the final name is whole.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from copydesk.encoder import sha256_of

log = logging.getLogger(__name__)

MANIFEST, PARTIAL = "manifest.json", "partial"
STATE = "trainer_state.json"
_PREFIX = "checkpoint-"


class CheckpointError(OSError):
    """Something could not be written, or a checkpoint is of another experiment. The message says what to do."""


@contextmanager
def writing(folder: Path) -> Iterator[Path]:
    """Give a folder to write to, which then gets the name `folder`.

    Raises:
        CheckpointError: it could not be written; nothing of it stays.
    """
    partial = folder.parent / PARTIAL / folder.name
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        seal(partial, folder)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own for a full disk
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"cannot write {folder}: {error}. What was written before is whole: make room, then run with --resume"
        ) from error


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Give a folder to write to, which then takes the place of `folder`.

    Raises:
        CheckpointError: it could not be written; `folder` is what it was.
    """
    partial = folder.with_name(f".{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        _sync_within(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        _sync(folder.parent)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot write {folder}: {error}. What was there before is whole: make room, then run it again"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def seal(partial: Path, folder: Path) -> None:
    """Sync a written folder, add the manifest last, and give it its name."""
    files = _sync_within(partial)
    write_whole(partial / MANIFEST, {file.relative_to(partial).as_posix(): sha256_of(file) for file in files})
    shutil.rmtree(folder, ignore_errors=True)  # one that was passed over
    partial.rename(folder)
    _sync(folder.parent)


def write_whole(file: Path, content: Mapping[str, Any]) -> None:
    """Write JSON so that the file has all of it or is not there."""
    partial = file.with_name(f".{file.name}")
    partial.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    _sync(partial)
    partial.replace(file)
    _sync(file.parent)


def _sync_within(folder: Path) -> list[Path]:
    """Sync all in a folder, and return its files."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    for path in (*files, *(path for path in folder.rglob("*") if path.is_dir())):
        _sync(path)
    return files


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fault_of(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint; None if it is whole."""
    try:
        manifest: dict[str, str] = json.loads((folder / MANIFEST).read_text("utf-8"))
        for name, sha256 in manifest.items():
            if sha256_of(folder / name) != sha256:
                return f"{name} is not what was written"
    except (OSError, ValueError, AttributeError) as error:
        return f"it cannot be read ({error})"
    return None


def newest_whole(output: Path) -> Path | None:
    """Return the newest checkpoint that is whole, and so is the best one that it counts on; say what is passed over."""
    for checkpoint in reversed(_checkpoints(output)):
        fault = fault_of(checkpoint)
        if fault is None and (best := _best_of(checkpoint)) != checkpoint:
            fault = fault_of(best)
            fault = fault and f"of {best.name}, the best one before it, {fault}"
        if fault is None:
            return checkpoint
        log.warning("%s is passed over: %s", checkpoint, fault)
    return None


def prune(output: Path) -> None:
    """Delete all but the last two checkpoints and the best ones that they count on."""
    checkpoints = _checkpoints(output)
    kept = {path for last in checkpoints[-2:] for path in (last, _best_of(last))}
    for checkpoint in checkpoints:
        if checkpoint not in kept:
            shutil.rmtree(checkpoint)


def name_of(step: int) -> str:
    """Return the name of the checkpoint of a step."""
    return f"{_PREFIX}{step}"


def _checkpoints(output: Path) -> list[Path]:
    """Return all checkpoints, oldest first."""
    return sorted(output.glob(f"{_PREFIX}*"), key=lambda path: int(path.name.removeprefix(_PREFIX)))


def _best_of(checkpoint: Path) -> Path:
    try:
        step = json.loads((checkpoint / STATE).read_text("utf-8"))["best_global_step"]
    except (OSError, ValueError, KeyError):  # altered: it counts on nothing
        step = None
    return checkpoint if step is None else checkpoint.with_name(name_of(step))


def check_same(file: Path, made_of: Mapping[str, Any]) -> bool:
    """Tell whether checkpoints can be continued; where there are none yet, note what they will be made of.

    Args:
        file: where it is noted.
        made_of: settings and hashes on which every step depends.

    Raises:
        CheckpointError: they were made of something else.
    """
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, made_of)
        return False
    before = json.loads(file.read_text("utf-8"))
    changed = sorted(name for name in before.keys() | made_of.keys() if before.get(name) != made_of.get(name))
    if changed:
        raise CheckpointError(
            f"{file.parent} was begun with other {', '.join(changed)}: restore them, or run without --resume"
        )
    return True
