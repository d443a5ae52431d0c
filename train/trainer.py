"""The fine-tuning itself: network, optimiser, loss, checkpoints.

Knows the loop and what it optimises; knows nothing of stages or folders but its own checkpoints.
"""

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from copydesk.encode import chunk, collate_pages
from copydesk.labels import CLASSES, SectionLabel, TopicList
from copydesk.network import CopydeskConfig, CopydeskModel
from copydesk.predictor import choose_device, move_batch, move_chunks, native_bfloat16
from train import checkpoints
from train.config import TransformerFit
from train.loss import LossWeights, loss_of
from train.metrics import label_confusion, labels_of, macro_f1, precision_recall_f1, topic_counts, topic_f1
from train.packs import Pack, Packs, TrainingArticle, TrainingPage, batches_of
from train.processes import join, mean_over_processes, same_for_all
from train.warm_up import warm_up

log = logging.getLogger(__name__)

SCORE = "step_macro_f1"
"""By which the best step is chosen; apart from the score of the released folder, which evaluation logs."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Encoded rows of one side of a split."""

    pages: list[TrainingPage]
    articles: list[TrainingArticle]

    def marks(self, name: str, *, num_topics: int) -> np.ndarray:
        """Return (articles, topics): `holds` or `decided`."""
        marks = [getattr(article, name) for article in self.articles]
        return np.array(marks, dtype=np.float32).reshape(-1, num_topics)

    def inside(self, folds: frozenset[int]) -> "Rows":
        """Return the rows of these folds."""
        return Rows(
            [row for row in self.pages if row.fold in folds], [row for row in self.articles if row.fold in folds]
        )

    def outside(self, folds: frozenset[int]) -> "Rows":
        """Return the rows of no such fold."""
        return Rows(
            [row for row in self.pages if row.fold not in folds],
            [row for row in self.articles if row.fold not in folds],
        )


class Fitting:
    """All that the runs of one experiment share."""

    def __init__(self, settings: TransformerFit, encoder: Path, topics: TopicList, *, num_hints: int) -> None:
        self.settings, self.encoder, self.topics, self.num_hints = settings, encoder, topics, num_hints
        self.device = choose_device(settings.device)
        self.processes = join(self.device)
        self.bfloat16 = settings.precision == "bfloat16" or (
            settings.precision == "auto" and native_bfloat16(self.device)
        )
        log.info("training on %s in %s", self.device, "bfloat16" if self.bfloat16 else "float32")

    def new_model(self) -> CopydeskModel:
        """Return a network on the pretrained encoder, with what is not to learn frozen."""
        settings = self.settings
        set_seed(settings.seed)
        kept = settings.encoder_layers
        if kept is not None and kept > (depth := AutoConfig.from_pretrained(self.encoder).num_hidden_layers):
            raise ValueError(f"fit.encoder_layers is {kept}, expected at most {depth}: {settings.encoder} has no more")
        # Any dropout leaves the fast attention of the CPU: none in the encoder.
        pretrained = AutoModel.from_pretrained(
            self.encoder,
            dtype=torch.float32,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            **({} if kept is None else {"num_hidden_layers": kept}),
        )
        model = CopydeskModel(
            CopydeskConfig(
                encoder=pretrained.config.to_diff_dict() | {"model_type": pretrained.config.model_type},
                num_topics=len(self.topics),
                num_hints=max(1, self.num_hints),
                **settings.network.model_dump(),
            )
        )
        weights = pretrained.state_dict()
        model.encoder.load_state_dict({name: weights[name] for name in model.encoder.state_dict()})  # all but a pooler
        if settings.tuning != "full":
            model.encoder.requires_grad_(requires_grad=False)
        if settings.tuning == "lora":
            linear = [name for name, module in model.encoder.named_modules() if isinstance(module, nn.Linear)]
            adapter = LoraConfig(r=settings.lora_rank, lora_alpha=settings.lora_rank, target_modules=linear)
            inject_adapter_in_model(adapter, model.encoder)
        embeddings = getattr(model.encoder, "embeddings", None) or model.encoder.get_input_embeddings()
        embeddings.requires_grad_(requires_grad=False)
        if settings.frozen_layers:
            for layer in _layers(model.encoder)[: settings.frozen_layers]:
                layer.requires_grad_(requires_grad=False)
        _normalise_in_float32(model)
        return model

    def run(
        self, train: Rows, validation: Rows | None, *, epochs: int, output: Path, callbacks: Sequence[Any] = ()
    ) -> "CopydeskTrainer":
        """Train one model; without validation rows the last weights are the best.

        Continues from the newest whole checkpoint in `output`.
        """
        settings = self.settings
        model = self.new_model()
        packs = Packs(
            train.pages,
            train.articles,
            settings=settings,
            epochs=epochs,
            pad_id=self.pad_id(model),
            num_topics=len(self.topics),
            num_processes=self.processes.num_processes,
        )
        checkpoint = checkpoints.newest_whole(output)
        if settings.warm_up_epochs and not checkpoint:
            self.warm_up(model, packs, output=output)
            if validation:
                scores = validation_scores(self, model, validation)
                log.info("after warm-up macro F1 %.4f", scores[f"eval_{SCORE}"])
        steps = packs.num_steps
        arguments = TrainingArguments(
            output_dir=str(output),
            per_device_train_batch_size=1,
            num_train_epochs=1,  # the data set runs through its own epochs
            train_sampling_strategy="sequential",
            warmup_steps=round(settings.warmup_fraction * steps * epochs),
            lr_scheduler_type="linear",
            max_grad_norm=1.0,
            logging_steps=max(1, steps // 10),
            eval_strategy="steps" if validation else "no",
            eval_steps=steps,
            save_strategy="steps",
            save_steps=settings.checkpoint_steps,
            restore_callback_states_from_checkpoint=True,  # patience
            metric_for_best_model=SCORE if validation else None,
            greater_is_better=True,
            report_to=[],
            remove_unused_columns=False,
            seed=settings.seed,
            bf16=self.bfloat16,
            use_cpu=self.device.type == "cpu",
            dataloader_pin_memory=False,
        )
        trainer = CopydeskTrainer(
            model=model,
            args=arguments,
            train_dataset=packs,
            eval_dataset=validation.pages if validation else None,
            data_collator=_only_item,
            optimizers=(self.optimizer(model), None),
            callbacks=[
                *callbacks,
                CheckpointCallback(),
                *([EarlyStoppingCallback(settings.patience)] if validation else []),
            ],
            fitting=self,
            validation=validation,
            weights=self.loss_weights(packs.class_counts),
        )
        log.info(
            "%d pages, %d articles, %d steps an epoch, %d epochs", len(train.pages), len(train.articles), steps, epochs
        )
        trainer.train_from(checkpoint)
        return trainer

    def warm_up(self, model: CopydeskModel, packs: Packs, *, output: Path) -> None:
        """Warm up, or take what an earlier attempt ended its warm-up with: an unfinished one is done again."""
        folder = output / "warm-up"
        if folder.is_dir() and checkpoints.fault_of(folder) is None:
            model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
            return
        warm_up(
            model,
            packs,
            settings=self.settings,
            device=self.device,
            bfloat16=self.bfloat16,
            weights=self.loss_weights(packs.class_counts),
        )
        if self.processes.is_main_process:
            warm = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("encoder.")}
            with checkpoints.writing(folder) as partial:
                save_file(warm, partial / "model.safetensors")

    def pad_id(self, model: CopydeskModel) -> int:
        """Return the token that fills up rows."""
        return model.encoder.config.pad_token_id or 0

    def loss_weights(self, counts: np.ndarray) -> LossWeights:
        """Return the weights of the loss, from how often each class is shown; the commonest weighs 1."""
        settings = self.settings
        classes = (counts.max() / np.maximum(counts, 1)) ** settings.class_weight_power
        return LossWeights(
            torch.tensor(classes, dtype=torch.float32, device=self.device),
            topics=settings.topic_weight,
            consistency=settings.consistency_weight,
        )

    def optimizer(self, model: CopydeskModel) -> torch.optim.Optimizer:
        """Return AdamW: one rate for the encoder, one for the rest; no decay of biases and norms."""
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                key = (name.startswith("encoder."), parameter.ndim > 1)
                groups.setdefault(key, []).append(parameter)
        return torch.optim.AdamW(
            [
                {
                    "params": parameters,
                    "lr": self.settings.learning_rate if in_encoder else self.settings.head_learning_rate,
                    "weight_decay": self.settings.weight_decay if decays else 0.0,
                }
                for (in_encoder, decays), parameters in groups.items()
            ]
        )

    @torch.inference_mode()
    def logits(self, model: CopydeskModel, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        """Return section logits (sections, classes) and topic logits (articles, topics), in the order of the rows."""
        was_training = model.training
        model.eval()
        sections, pad_id, num_topics = [], self.pad_id(model), len(self.topics)
        topics = np.zeros((len(rows.articles), num_topics), dtype=np.float32)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bfloat16):
            for batch in batches_of(rows.pages, [page.encoded.num_tokens for page in rows.pages]):
                pages = collate_pages([page.encoded for page in batch], pad_id=pad_id)
                sections.append(model.section_logits(move_batch(pages, self.device)).float().cpu().numpy())
            order = sorted(range(len(rows.articles)), key=lambda i: len(rows.articles[i].tokens))
            for indices in batches_of(order, [len(rows.articles[i].tokens) for i in order]):
                chunks = chunk([rows.articles[i].tokens for i in indices], pad_id=pad_id)
                topics[indices] = model.topic_logits(move_chunks(chunks, self.device)).float().cpu().numpy()
        model.train(was_training)
        return np.concatenate([np.zeros((0, len(CLASSES)), dtype=np.float32), *sections]), topics


def _normalise_in_float32(model: nn.Module) -> None:
    """Keep layer norms out of autocast: summed over thousands of rows in bfloat16, gradients come out a third wrong."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))


def _layers(encoder: nn.Module) -> nn.ModuleList:
    """Return the encoder's transformer layers: the first list of equal blocks in it."""
    for module in encoder.modules():
        if isinstance(module, nn.ModuleList) and len({type(layer) for layer in module}) == 1:
            return module
    raise ValueError(f"{type(encoder).__name__} has no list of layers: set fit.frozen_layers to 0")


def _only_item(items: list[Pack]) -> dict[str, Pack]:
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

    def __init__(self, *, fitting: Fitting, validation: Rows | None, weights: LossWeights, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.network: CopydeskModel = arguments["model"]  # the Trainer's own `model` may get wrapped
        self.fitting, self.validation, self.weights = fitting, validation, weights
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
        """Return the section loss plus the weighted topic loss of a pack."""
        del num_items_in_batch
        batch: Pack = inputs["pack"]
        device = self.args.device
        views = [move_batch(view, device) for view in batch.views]
        sections, topics = model(views=views, articles=move_chunks(batch.articles, device))
        targets = [targets.to(device) for targets in (batch.classes, batch.holds, batch.decided)]
        loss = loss_of(
            sections,
            topics,
            *targets,
            teachers=batch.teachers.to(device),
            weights=self.weights,
            over_processes=mean_over_processes,
        )
        return (loss, {"sections": sections, "topics": topics}) if return_outputs else loss

    def evaluate(self, *arguments: Any, **keywords: Any) -> dict[str, float]:
        """Score the validation rows."""
        del arguments, keywords
        metrics: dict[str, float] = {}
        if self.fitting.processes.is_main_process:
            metrics = validation_scores(self.fitting, self.network, self.validation or Rows([], []))
        metrics = same_for_all(metrics)
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


def validation_scores(fitting: Fitting, model: CopydeskModel, rows: Rows) -> dict[str, float]:
    """Return macro F1 over the four labels, F1 of each, and topics micro F1 at probability one half."""
    sections, topics = fitting.logits(model, rows)
    true = labels_of(np.concatenate([page.classes for page in rows.pages]))
    confusion = label_confusion(true, labels_of(sections.argmax(axis=1)))
    holds = rows.marks("holds", num_topics=len(fitting.topics)) > 0
    decided = rows.marks("decided", num_topics=len(fitting.topics)) > 0
    return {
        f"eval_{SCORE}": float(macro_f1(confusion)),
        "eval_step_topics_micro_f1": float(topic_f1(topic_counts(holds, topics > 0, decided))[0]),
        **_label_scores(confusion),
    }


def _label_scores(confusion: np.ndarray) -> dict[str, float]:
    f1 = precision_recall_f1(confusion)[2]
    return {f"eval_step_{label}_f1": float(f1[i]) for i, label in enumerate(SectionLabel)}


def trained_tensors(model: CopydeskModel) -> dict[str, torch.Tensor]:
    """Return what training may have changed, under the names that a model folder uses."""
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {
        name.replace(".base_layer", "")
        .replace(".lora_A.default.weight", ".weight.lora_A")
        .replace(".lora_B.default.weight", ".weight.lora_B"): tensor.detach().cpu().contiguous()
        for name, tensor in model.state_dict().items()
        if name in names
    }
