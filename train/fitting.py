"""Fine-tuning of one network: what learns and at which rate, warm-up, validation score.

Knows settings, rows and what is optimised; knows nothing of stages or of single steps.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel, EarlyStoppingCallback, TrainingArguments, set_seed

from copydesk.encode import collate_pages
from copydesk.labels import CLASSES, SectionLabel, TopicList
from copydesk.network import CopydeskConfig, CopydeskModel
from copydesk.predictor import choose_device, move_batch, native_bfloat16
from copydesk.ragged import TokenRows
from train import checkpoints
from train.config import TransformerFit
from train.loss import LossWeights
from train.metrics import label_confusion, labels_of, macro_f1, precision_recall_f1, topic_counts, topic_f1
from train.packs import Packs, batches_of
from train.processes import join
from train.rows import Rows
from train.trainer import CheckpointCallback, CopydeskTrainer, only_item
from train.warm_up import warm_up

log = logging.getLogger(__name__)

SCORE = "step_macro_f1"
"""By which the best step is chosen; apart from the score of the released folder, which evaluation logs."""


_DROPOUTS = (
    "attention_dropout",
    "attention_probs_dropout_prob",
    "dropout",
    "embedding_dropout",
    "hidden_dropout_prob",
    "mlp_dropout",
)
"""As configs of text encoders name them; any of them leaves the fast attention of the CPU."""


class Fitting:
    """All that the runs of one experiment share."""

    def __init__(self, settings: TransformerFit, encoder: Path, topics: TopicList, *, num_hints: int) -> None:
        self.settings, self.encoder, self.topics, self.num_hints = settings, encoder, topics, num_hints
        self.device = choose_device(settings.device)
        self.processes = join(self.device)
        if self.device.type == "cuda" and (count := torch.cuda.device_count()) > self.processes.num_processes:
            raise ValueError(
                f"there are {count} GPUs and {self.processes.num_processes} process(es): start one for each with "
                f"`torchrun --nproc-per-node {count} -m train.fit …`, or choose one by CUDA_VISIBLE_DEVICES=0"
            )
        self.bfloat16 = settings.precision == "bfloat16" or (
            settings.precision == "auto" and native_bfloat16(self.device)
        )
        log.info("training on %s in %s", self.device, "bfloat16" if self.bfloat16 else "float32")

    def new_model(self) -> CopydeskModel:
        """Return a network on the pretrained encoder, with what is not to learn frozen."""
        settings = self.settings
        set_seed(settings.seed)
        config, kept = AutoConfig.from_pretrained(self.encoder), settings.encoder_layers
        if kept is not None:
            if kept > (depth := config.num_hidden_layers):
                raise ValueError(
                    f"fit.encoder_layers is {kept}, expected at most {depth}: {settings.encoder} has no more"
                )
            config.num_hidden_layers = kept
        for name in _DROPOUTS:
            if hasattr(config, name):
                setattr(config, name, 0.0)
        pretrained = AutoModel.from_pretrained(self.encoder, config=config, dtype=torch.float32)
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
    ) -> CopydeskTrainer:
        """Train one model; without validation rows the last weights are the best.

        Continues from the newest whole checkpoint in `output`.
        """
        settings = self.settings
        model = self.new_model().to(self.device)
        packs = Packs(
            train.pages,
            train.articles,
            settings=settings,
            epochs=epochs,
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
            data_collator=only_item,
            optimizers=(self.optimizer(model), None),
            callbacks=[
                *callbacks,
                CheckpointCallback(),
                *([EarlyStoppingCallback(settings.patience)] if validation else []),
            ],
            validate=lambda model: validation_scores(self, model, validation or Rows([], [])),
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

    def loss_weights(self, counts: np.ndarray) -> LossWeights:
        """Return the weights of the loss, from how often each class is shown; the commonest weighs 1."""
        settings = self.settings
        classes = (counts.max() / np.maximum(counts, 1)) ** settings.class_weight_power
        return LossWeights(
            torch.tensor(classes, dtype=torch.float32, device=self.device),
            topics=settings.topic_weight,
            own_text=settings.own_text_weight,
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
        sections, topics = [], [np.zeros((0, len(self.topics)), dtype=np.float32)]
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bfloat16):
            for batch in batches_of(rows.pages, [page.encoded.num_tokens for page in rows.pages]):
                pages = collate_pages([page.encoded for page in batch])
                sections.append(model.section_logits(move_batch(pages, self.device)).float().cpu().numpy())
            articles = [article.tokens for article in rows.articles]
            batches = batches_of(articles, [len(tokens) for tokens in articles])
            topics += [model.topic_logits(TokenRows.of(batch)).cpu().numpy() for batch in batches]
        model.train(was_training)
        return np.concatenate([np.zeros((0, len(CLASSES)), dtype=np.float32), *sections]), np.concatenate(topics)


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
