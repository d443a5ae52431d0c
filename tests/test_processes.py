"""Two processes under torchrun learn what one process learns from the same batches, also after they were killed."""

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from train.arguments import load_experiment
from train.fit import fit
from train.loss import LossWeights, loss_of

OVERRIDES = (
    "fit.epochs=4 fit.patience=9 fit.tokens_per_batch=3_000 fit.checkpoint_steps=2 fit.warm_up_epochs=1 "
    "fit.consistency_weight=1 fit.precision=float32 fit.learning_rate=1e-4 fit.head_learning_rate=1e-3"
).split()
FITTED = Path("models/tiny/fit")
ROOT = Path(__file__).parents[1]


def torchrun(*arguments: str) -> subprocess.Popen[str]:
    """Start to fit with two processes."""
    settings = [part for override in OVERRIDES for part in ("--set", override)]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "train.fit",
    ]
    with Path("output.txt").open("w", encoding="utf-8") as output:
        return subprocess.Popen(
            [*command, "--config", "tiny.yaml", *settings, *arguments],
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=output,
            text=True,
        )


@pytest.mark.usefixtures("workplace")
def test_two_processes_learn_what_one_does_killed_and_resumed_in_between():
    summary = fit(load_experiment("tiny.yaml", OVERRIDES))
    one = load_file(FITTED / "trained.safetensors")

    killed = torchrun()
    while not list(FITTED.glob("checkpoints/main/checkpoint-*")):
        assert killed.poll() is None, Path("output.txt").read_text("utf-8")
        time.sleep(0.01)
    for process in [psutil.Process(killed.pid), *psutil.Process(killed.pid).children(recursive=True)]:
        process.kill()  # workers are in sessions of their own
    killed.wait()
    assert not (FITTED / "fit.json").exists()
    resumed = torchrun("--resume")
    assert resumed.wait(timeout=500) == 0, Path("output.txt").read_text("utf-8")

    assert "continuing after step" in Path("output.txt").read_text("utf-8")
    two = load_file(FITTED / "trained.safetensors")
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=0)
    found = json.loads((FITTED / "fit.json").read_text("utf-8"))
    assert (found["steps"], found["best_step"]) == (summary["steps"], summary["best_step"])
    assert found["validation_macro_f1"] == pytest.approx(summary["validation_macro_f1"])


def test_the_mean_of_the_losses_of_two_unequal_shares_is_the_loss_of_all_rows():
    random = torch.Generator().manual_seed(0)
    sections, own_text = torch.randn(2, 2, 9, 5, generator=random)
    topics = torch.randn(4, 3, generator=random)
    classes = torch.randint(0, 5, (9,), generator=random)
    holds, decided = (torch.randint(0, 2, (4, 3), generator=random).float() for _ in range(2))
    weights = LossWeights(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), topics=2.0, own_text=0.5, consistency=3.0)
    shares = [(slice(0, 7), slice(0, 1)), (slice(7, 9), slice(1, 4))]

    def loss(rows: slice, articles: slice, over_processes: Callable) -> torch.Tensor:
        said = sections[:, rows], own_text[:, rows], topics[articles]
        return loss_of(
            *said, classes[rows], holds[articles], decided[articles], weights=weights, over_processes=over_processes
        )

    held: list[list[torch.Tensor]] = [[], []]
    for (rows, articles), numbers in zip(shares, held, strict=True):
        loss(rows, articles, lambda number, numbers=numbers: numbers.append(number) or number)
    means = [(one + other) / 2 for one, other in zip(*held, strict=True)]
    left = itertools.chain(means, means)
    each = [loss(rows, articles, lambda _: next(left)) for rows, articles in shares]

    torch.testing.assert_close(sum(each) / 2, loss(slice(None), slice(None), lambda number: number))
