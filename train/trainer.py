"""The training loop: the Trainer with our loss, our validation score and our checkpoints.

Knows steps and packs; knows nothing of settings, stages or folders but its own checkpoints.
"""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from copydesk.network import CopydeskModel
from copydesk.predictor import move_batch
from train import checkpoints
from train.loss import LossWeights, loss_of
from train.packs import Pack
from train.processes import mean_over_processes, same_for_all

log = logging.getLogger(__name__)


def only_item(items: list[Pack]) -> dict[str, Pack]:
    """Return a pack as the Trainer hands it on."""
    return {"pack": items[0]}


class CheckpointCallback(TrainerCallback):
    """Writes a checkpoint after each validation, and logs before each checkpoint.

    A logged loss is a mean since the one before: so cut, it does not depend on where training was broken off.
    """

    def on_step_end(
        self,
        args: TrainingArguments,  # noqa: ARG002 (the Trainer's signature)
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Set what is to be done after this step."""
        control.should_save |= control.should_evaluate
        control.should_log |= control.should_save


class CopydeskTrainer(Trainer):
    """The Trainer with our loss, our validation score and checkpoints that are whole or not there."""

    def __init__(
        self, *, validate: Callable[[CopydeskModel], dict[str, float]], weights: LossWeights, **arguments: Any
    ) -> None:
        super().__init__(**arguments)
        self.network: CopydeskModel = arguments["model"]  # the Trainer's own `model` may get wrapped
        self.validate, self.weights = validate, weights
        self._partial: Path | None = None

    def train_from(self, checkpoint: Path | None) -> None:
        """Train, from where a checkpoint was written; one that was written when training was over is only loaded."""
        if checkpoint:
            self.state = TrainerState.load_from_json(str(checkpoint / checkpoints.STATE))
            saved: Any = self.state.stateful_callbacks
            if (
                saved["TrainerControl"]["args"]["should_training_stop"]
                or self.state.global_step == self.state.max_steps
            ):
                self._load_from_checkpoint(str(checkpoint))
                return
            log.info("continuing after step %d of %d", self.state.global_step, self.state.max_steps)
        self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    def training_step(self, *arguments: Any, **keywords: Any) -> torch.Tensor:
        """Learn from a pack; what drops out is, like the order of rows, a function of the seed and the step alone."""
        place = [self.args.seed, self.state.global_step, self.args.process_index]
        torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0]))
        return super().training_step(*arguments, **keywords)

    def _save_rng_state(self, output_dir: str) -> None:
        """Save no random state: each step has its own."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the mean loss of all steps, not only of those since training was continued."""
        if "train_loss" in logs:
            last = total = 0.0
            for entry in self.state.log_history:
                if "loss" in entry:
                    last, total = entry["step"], total + entry["loss"] * (entry["step"] - last)
            logs["train_loss"] = total / max(1, last)
        super().log(logs, start_time)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,  # noqa: FBT001, FBT002 (the Trainer's signature)
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the weighted sum of what is lost on a pack."""
        del num_items_in_batch
        batch: Pack = inputs["pack"]
        device = self.args.device
        views = [move_batch(view, device) for view in batch.views]
        sections, own_text, topics = model(views=views, articles=batch.articles)
        targets = [targets.to(device) for targets in (batch.classes, batch.holds, batch.decided)]
        loss = loss_of(
            sections,
            own_text,
            topics,
            *targets,
            weights=self.weights,
            over_processes=mean_over_processes,
        )
        return (loss, {"sections": sections, "topics": topics}) if return_outputs else loss

    def evaluate(self, *arguments: Any, **keywords: Any) -> dict[str, float]:
        """Score the validation rows."""
        del arguments, keywords
        metrics = same_for_all(self.validate(self.network) if self.is_world_process_zero() else {})
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._partial.parent) if self._partial else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint under a temporary name, then rename it; keep the last two and the best ones."""
        output = Path(str(self.args.output_dir))
        folder = output / checkpoints.name_of(self.state.global_step)
        with checkpoints.writing(folder) if self.args.should_save else nullcontext() as self._partial:
            super()._save_checkpoint(model, trial)
            if self._partial:
                self.state.best_model_checkpoint = None  # a path below the temporary name; the step says enough
                self.state.save_to_json(str(self._partial / checkpoints.STATE))
        self._partial = None
        if self.args.should_save:
            checkpoints.prune(output)
        self.accelerator.wait_for_everyone()

    def best_model(self) -> CopydeskModel:
        """Return the model with the weights that scored best."""
        best = Path(str(self.args.output_dir)) / checkpoints.name_of(self.state.best_global_step or 0)
        self.network.load_state_dict(load_file(best / "model.safetensors"))
        return self.network
