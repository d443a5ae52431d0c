"""A training that is broken off anywhere and resumed ends with the weights, and the losses, of an unbroken one."""

import json
import os
import resource
import shutil
import signal
import sys
from collections import defaultdict
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from copydesk.encoder import sha256_of
from train import checkpoints, fit, fitting, tracking, trainer, warm_up
from train.arguments import load_experiment

LONG = (  # warm-up; 12 steps, a checkpoint every second one and after each epoch; then two models for the other folds
    "fit.epochs=2 fit.patience=9 fit.tokens_per_batch=3_000 fit.checkpoint_steps=2 fit.warm_up_epochs=1 "
    "fit.consistency_weight=1 fit.out_of_fold_epochs=1 fit.folds_at_once=1 fit.network.dropout=0.1 "
    "fit.network.own_text_readers=1 fit.network.topic_width=16 fit.own_text_weight=0.5"
).split()
SHORT = "fit.epochs=1 fit.tokens_per_batch=3_000 fit.checkpoint_steps=1".split()
FITTED = Path("models/tiny/fit")
MAIN = FITTED / "checkpoints/main"


def dies_at(count: int, call: Callable, *, tearing: Callable | None) -> Callable:
    """Return `call`, which kills the process the `count`-th time: before its work, or with half a file written."""
    left = count

    def called(*arguments: Any, **keywords: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            if tearing:
                call(*arguments, **keywords)
                file = tearing(*arguments)
                os.truncate(file, file.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **keywords)

    return called


PLACES: dict[str, tuple[Any, str, Callable | None]] = {
    "warm-up step": (warm_up, "loss_of", None),
    "weights of the warm-up": (fitting, "save_file", lambda _, file: file),
    "step": (trainer.CopydeskTrainer, "training_step", None),
    "end of step": (trainer.CheckpointCallback, "on_step_end", None),
    "validation": (fitting, "validation_scores", None),
    "weights": (safetensors.torch, "save_file", lambda _, file: Path(file)),
    "optimizer": (torch, "save", lambda _, file: Path(file)),
    "seal": (checkpoints, "seal", None),
    "sync": (os, "fsync", None),
    "manifest": (checkpoints, "write_whole", lambda file, _: file),
    "rename": (Path, "rename", None),
    "prune": (checkpoints, "prune", None),
    "trained": (fit, "save_file", lambda _, file: file),
    "held out": (np, "savez_compressed", None),
    "clean": (shutil, "rmtree", None),
}
KILLS = [
    ("sync", 1),  # before it is noted what the checkpoints are made of
    ("warm-up step", 3),
    ("weights of the warm-up", 1),
    ("step", 1),
    ("step", 2),
    ("weights", 1),
    ("end of step", 2),
    ("optimizer", 1),
    ("seal", 1),
    ("sync", 4),
    ("manifest", 1),
    ("rename", 2),
    ("prune", 2),
    ("validation", 1),
    ("step", 4),
    ("trained", 1),
    ("step", 3),  # of a model for other folds
    ("rename", 2),
    ("held out", 1),
    ("clean", 1),
]


def train(folder: Path, overrides: list[str], kill: tuple[str, int] | None, limit: int | None) -> None:
    """Fit with --resume, noting the loss of each step; the body of a process."""
    os.chdir(folder)
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = Path("output.txt").open("a", encoding="utf-8")
    for name in ("start_run", "resume_run"):
        setattr(tracking, name, lambda _: tracking.Run(None))
    compute = trainer.CopydeskTrainer.compute_loss

    def compute_and_note(self: trainer.CopydeskTrainer, *arguments: Any, **keywords: Any) -> torch.Tensor:
        loss = compute(self, *arguments, **keywords)
        with Path("losses.txt").open("a", encoding="utf-8") as file:
            file.write(f"{Path(self.args.output_dir).name}/{self.state.global_step} {loss.item().hex()}\n")
        return loss

    trainer.CopydeskTrainer.compute_loss = compute_and_note
    if limit:  # stands for a full disk
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if kill:
        owner, name, tearing = PLACES[kill[0]]
        setattr(owner, name, dies_at(kill[1], getattr(owner, name), tearing=tearing))
    fit.fit(load_experiment("tiny.yaml", overrides), resume=True)


@pytest.fixture(scope="module")
def run(apart: ForkServerContext) -> Callable[..., int]:
    """Give a function that fits in a process of its own and returns its exit code."""

    def run(
        folder: Path, overrides: list[str], *, kill: tuple[str, int] | None = None, limit: int | None = None
    ) -> int:
        process = apart.Process(target=train, args=(folder, overrides, kill, limit))
        process.start()
        process.join()
        return process.exitcode

    return run


def copied(folder: Path, target: Path) -> Path:
    """Return a copy of a prepared folder."""
    return Path(shutil.copytree(folder, target, ignore=shutil.ignore_patterns("cache", "output.txt")))


def losses(folder: Path) -> dict[str, set[str]]:
    """Return all losses that were seen at each step of each model."""
    found = defaultdict(set)
    for line in (folder / "losses.txt").read_text("utf-8").splitlines():
        step, loss = line.split()
        found[step].add(loss)
    return found


def hashes(folder: Path) -> dict[str, str]:
    """Return the hash of each result."""
    return {path.name: sha256_of(path) for path in (folder / FITTED).iterdir()}


@pytest.fixture(scope="module")
def short(prepared: Path, tmp_path_factory: pytest.TempPathFactory, run: Callable[..., int]) -> dict[str, str]:
    """Give the hashes of an unbroken short training."""
    folder = copied(prepared, tmp_path_factory.mktemp("short") / "unbroken")
    assert run(folder, SHORT) == 0
    return hashes(folder)


@pytest.fixture(scope="module")
def broken(prepared: Path, tmp_path_factory: pytest.TempPathFactory, run: Callable[..., int]) -> Path:
    """Give a folder in which a short training was killed after some checkpoints."""
    folder = copied(prepared, tmp_path_factory.mktemp("short") / "broken")
    assert run(folder, SHORT, kill=("step", 4)) == -signal.SIGKILL
    assert {path.name for path in (folder / MAIN).glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-3"}
    return folder


@pytest.fixture
def broken_off(broken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Move to a copy of it."""
    folder = copied(broken, tmp_path / "broken")
    monkeypatch.chdir(folder)
    return folder


def test_killed_at_twenty_points_it_ends_with_the_same_weights_and_losses(workplace: Path, run: Callable[..., int]):
    unbroken = copied(workplace, workplace.parent / "unbroken")
    assert run(unbroken, LONG) == 0

    for kill in KILLS:
        assert run(workplace, LONG, kill=kill) == -signal.SIGKILL, kill
    assert run(workplace, LONG) == 0

    expected = losses(unbroken)
    assert {len(seen) for seen in expected.values()} == {1}
    assert len(expected) > 20
    assert losses(workplace) == expected
    assert hashes(workplace) == hashes(unbroken)
    assert set(hashes(workplace)) == {"trained.safetensors", "held_out.npz", "fit.json", "made_of.json"}
    assert len(KILLS) == 20


def test_training_twice_gives_files_of_the_same_hash(workplace: Path, run: Callable[..., int], short: dict[str, str]):
    assert run(workplace, SHORT) == 0

    assert hashes(workplace) == short


@pytest.mark.parametrize(
    ("file", "damage"),
    [("model.safetensors", "altered"), ("optimizer.pt", "truncated"), ("trainer_state.json", "altered")],
)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    broken_off: Path, run: Callable[..., int], short: dict[str, str], file: str, damage: str
):
    damaged = MAIN / "checkpoint-3" / file
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 4
    damaged.write_bytes(content[: len(content) // 2] if damage == "truncated" else content)

    assert run(broken_off, SHORT) == 0

    assert f"{MAIN / 'checkpoint-3'} is passed over: " in Path("output.txt").read_text("utf-8")
    assert hashes(broken_off) == short


@pytest.mark.parametrize("full_at", ["model.safetensors", "optimizer.pt"])
def test_a_full_disk_leaves_the_last_checkpoint_whole(
    broken_off: Path, run: Callable[..., int], short: dict[str, str], full_at: str
):
    limit = (MAIN / "checkpoint-3" / full_at).stat().st_size - 1_000

    assert run(broken_off, SHORT, limit=limit) == 1

    assert "make room, then run with --resume" in Path("output.txt").read_text("utf-8")
    assert checkpoints.newest_whole(MAIN) == MAIN / "checkpoint-3"
    assert not list((MAIN / "partial").iterdir())
    assert run(broken_off, SHORT) == 0
    assert hashes(broken_off) == short


def test_checkpoints_of_other_settings_are_not_continued(broken_off: Path):
    with pytest.raises(checkpoints.CheckpointError, match=r"other fit\.seed: restore them, or run without --resume"):
        fit.fit(load_experiment("tiny.yaml", [*SHORT, "fit.seed=1"]), resume=True)


def test_a_checkpoint_whose_best_one_is_damaged_is_passed_over(tmp_path: Path):
    for step, best in ((1, 1), (2, 2), (3, 2), (4, 2)):
        with checkpoints.writing(tmp_path / checkpoints.name_of(step)) as folder:
            (folder / checkpoints.STATE).write_text(json.dumps({"best_global_step": best}), "utf-8")
    (tmp_path / "checkpoint-2" / checkpoints.STATE).write_text("{}", "utf-8")

    assert checkpoints.newest_whole(tmp_path) == tmp_path / "checkpoint-1"


def test_the_last_two_checkpoints_and_the_best_ones_are_kept(tmp_path: Path):
    for step, best in ((2, 2), (4, 4), (6, 4), (8, 8), (10, 8)):
        with checkpoints.writing(tmp_path / checkpoints.name_of(step)) as folder:
            (folder / checkpoints.STATE).write_text(json.dumps({"best_global_step": best}), "utf-8")
    checkpoints.prune(tmp_path)

    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-8"]
