"""The fine-tuning itself: network, optimiser, loss, checkpoints.

Knows the loop and what it optimises; knows nothing of stages or folders but its own checkpoints.
"""

import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, EarlyStoppingCallback, Trainer, TrainingArguments, set_seed

from copydesk.labels import CLASSES, SectionLabel, TopicList
from copydesk.network import CopydeskConfig, CopydeskModel
from copydesk.predictor import choose_device, move_batch, move_chunks, native_bfloat16
from train.config import TransformerFit
from train.loss import loss_of
from train.metrics import label_confusion, labels_of, macro_f1, precision_recall_f1, topic_counts, topic_f1
from train.packs import Pack, Packs, TrainingArticle, TrainingPage, batches_of, pack
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
        self.bfloat16 = settings.precision == "bfloat16" or (
            settings.precision == "auto" and native_bfloat16(self.device)
        )
        log.info("training on %s in %s", self.device, "bfloat16" if self.bfloat16 else "float32")

    def new_model(self) -> CopydeskModel:
        """Return a network on the pretrained encoder, with what is not to learn frozen."""
        settings = self.settings
        set_seed(settings.seed)
        # Any dropout leaves the fast attention of the CPU: none in the encoder.
        encoder = AutoModel.from_pretrained(
            self.encoder, dtype=torch.float32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
        config = CopydeskConfig(
            encoder=encoder.config.to_diff_dict() | {"model_type": encoder.config.model_type},
            num_topics=len(self.topics),
            num_hints=max(1, self.num_hints),
            **settings.network.model_dump(),
        )
        model = CopydeskModel(config, encoder=encoder)
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
        return model

    def run(
        self, train: Rows, validation: Rows | None, *, epochs: int, output: Path, callbacks: Sequence[Any] = ()
    ) -> "CopydeskTrainer":
        """Train one model; without validation rows the last weights are the best."""
        settings = self.settings
        model = self.new_model()
        packs = Packs(
            train.pages,
            train.articles,
            settings=settings,
            epochs=epochs,
            pad_id=self.pad_id(model),
            num_topics=len(self.topics),
            num_processes=int(os.environ.get("WORLD_SIZE", "1")),
        )
        if settings.warm_up_epochs:
            warm_up(
                model,
                packs,
                settings=settings,
                device=self.device,
                bfloat16=self.bfloat16,
                class_weights=self.class_weights(packs.class_counts),
            )
            if validation:
                scores = validation_scores(self, model, validation)
                log.info("after warm-up macro F1 %.4f", scores[f"eval_{SCORE}"])
        steps = packs.num_packs // int(os.environ.get("WORLD_SIZE", "1"))
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
            save_strategy="steps" if validation else "no",
            save_steps=steps,
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
            callbacks=[*callbacks, *([EarlyStoppingCallback(settings.patience)] if validation else [])],
            fitting=self,
            validation=validation,
            class_weights=self.class_weights(packs.class_counts),
        )
        log.info(
            "%d pages, %d articles, %d steps an epoch, %d epochs", len(train.pages), len(train.articles), steps, epochs
        )
        trainer.train()
        return trainer

    def pad_id(self, model: CopydeskModel) -> int:
        """Return the token that fills up rows."""
        return model.encoder.config.pad_token_id or 0

    def class_weights(self, counts: np.ndarray) -> torch.Tensor:
        """Return (classes,): the weight of each class in the section loss, 1 for the commonest."""
        weights = (counts.max() / np.maximum(counts, 1)) ** self.settings.class_weight_power
        return torch.tensor(weights, dtype=torch.float32)

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
                pages = pack(batch, [], pad_id=pad_id, num_topics=num_topics).pages
                sections.append(model.section_logits(move_batch(pages, self.device)).float().cpu().numpy())
            order = sorted(range(len(rows.articles)), key=lambda i: len(rows.articles[i].tokens))
            for indices in batches_of(order, [len(rows.articles[i].tokens) for i in order]):
                chunks = pack([], [rows.articles[i] for i in indices], pad_id=pad_id, num_topics=num_topics).articles
                topics[indices] = model.topic_logits(move_chunks(chunks, self.device)).float().cpu().numpy()
        model.train(was_training)
        return np.concatenate([np.zeros((0, len(CLASSES)), dtype=np.float32), *sections]), topics


def _layers(encoder: nn.Module) -> nn.ModuleList:
    """Return the encoder's transformer layers: the first list of equal blocks in it."""
    for module in encoder.modules():
        if isinstance(module, nn.ModuleList) and len({type(layer) for layer in module}) == 1:
            return module
    raise ValueError(f"{type(encoder).__name__} has no list of layers: set fit.frozen_layers to 0")


def _only_item(items: list[Pack]) -> dict[str, Pack]:
    return {"pack": items[0]}


class CopydeskTrainer(Trainer):
    """The Trainer with our loss, our validation score and checkpoints that are whole or not there."""

    def __init__(
        self, *, fitting: Fitting, validation: Rows | None, class_weights: torch.Tensor, **arguments: Any
    ) -> None:
        super().__init__(**arguments)
        self.network: CopydeskModel = arguments["model"]  # the Trainer's own `model` may get wrapped
        self.fitting, self.validation = fitting, validation
        self.class_weights = class_weights.to(self.args.device)
        self._writing = False

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
        sections, topics = model(pages=move_batch(batch.pages, device), articles=move_chunks(batch.articles, device))
        targets = [targets.to(device) for targets in (batch.classes, batch.holds, batch.decided)]
        loss = loss_of(
            sections,
            topics,
            *targets,
            class_weights=self.class_weights,
            topic_weight=self.fitting.settings.topic_weight,
        )
        return (loss, {"sections": sections, "topics": topics}) if return_outputs else loss

    def evaluate(self, *arguments: Any, **keywords: Any) -> dict[str, float]:
        """Score the validation rows."""
        del arguments, keywords
        metrics = validation_scores(self.fitting, self.network, self.validation or Rows([], []))
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _get_output_dir(self, trial: Any) -> str:
        output = Path(super()._get_output_dir(trial))
        return str(output / "partial" if self._writing else output)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint under a temporary name, then rename it; keep the best and the last one."""
        self._writing = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._writing = False
        self.accelerator.wait_for_everyone()
        if not self.args.should_save:
            return
        output = Path(str(self.args.output_dir))
        name = f"checkpoint-{self.state.global_step}"
        written = output / "partial" / name
        for file in written.rglob("*"):
            if file.is_file():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
        shutil.rmtree(output / name, ignore_errors=True)
        written.rename(output / name)
        kept = {name, f"checkpoint-{self.state.best_global_step}"}
        for old in output.glob("checkpoint-*"):
            if old.name not in kept:
                shutil.rmtree(old)

    def best_model(self) -> CopydeskModel:
        """Return the model with the weights that scored best, and drop the checkpoints."""
        output = Path(str(self.args.output_dir))
        weights = load_file(output / f"checkpoint-{self.state.best_global_step}" / "model.safetensors")
        self.network.load_state_dict(weights)
        for checkpoint in (*output.glob("checkpoint-*"), output / "partial"):
            shutil.rmtree(checkpoint, ignore_errors=True)
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


def network_arguments(model: CopydeskModel) -> dict[str, Any]:
    """Return the arguments from which `CopydeskConfig` makes the config of this network again."""
    names = (
        "num_topics page_width page_layers page_encoders num_hints hint_width window_sections window_overlap dropout "
        "vector_dropout encoder"
    ).split()
    return {name: getattr(model.config, name) for name in names}


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
