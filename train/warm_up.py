"""Teach the page encoder and the heads alone, before all learn together.

A page encoder that starts at random sends noise into the text encoder, which then forgets what it knew: *linear
probing, then fine-tuning* (arXiv:2202.10054). With the text encoder fixed, each text is encoded once, and each page
encoder reads the pages in an order of its own: the less they have in common, the more their mean is worth.
"""

import logging

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from copydesk.encode import collate_encoded
from copydesk.network import CopydeskModel
from copydesk.predictor import move_batch
from copydesk.ragged import TokenRows
from train.config import TransformerFit
from train.loss import LossWeights, loss_of
from train.packs import Packs, batches_of

log = logging.getLogger(__name__)


def warm_up(
    model: CopydeskModel,
    packs: Packs,
    *,
    settings: TransformerFit,
    device: torch.device,
    bfloat16: bool,
    weights: LossWeights,
) -> None:
    """Train page encoder and heads on fixed vectors of the encoder as it is.

    Args:
        model: the network; all but its encoder learns.
        packs: what it reads, in the order of its own epochs.
        settings: epochs and rate of the warm-up.
        device: where the model is.
        bfloat16: compute in it.
        weights: of the loss.
    """
    _use_adapters(model, enabled=False)  # they add nothing yet, and cost as much as the encoder
    pages, articles = _vectors(model, packs, device=device, bfloat16=bfloat16)
    _use_adapters(model, enabled=True)
    parameters = [parameter for name, parameter in model.named_parameters() if not name.startswith("encoder.")]
    optimizer = torch.optim.AdamW(parameters, weight_decay=settings.weight_decay)
    steps = packs.num_steps * settings.warm_up_epochs
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.warm_up_learning_rate, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    log.info("warming up: %d epochs of %d steps", settings.warm_up_epochs, packs.num_steps)
    readers = range(len(model.page_encoders))

    def loss_in(step: int, reader: int) -> torch.Tensor:
        chosen, read = packs.rows_of_step(step, reader)  # of all processes: each does the same warm-up
        views = [
            collate_encoded([packs.with_dropped_hints(i, step // packs.num_steps, view).encoded for i in chosen])
            for view in range(reader, settings.num_views, len(readers))
        ]
        rows = torch.cat([torch.zeros(0, pages[0].shape[1]), *[pages[i] for i in chosen]]).to(device)
        classes = np.concatenate([np.zeros(0, dtype=np.int64), *[packs.pages[i].classes for i in chosen]])
        targets = np.stack([[packs.articles[i].holds, packs.articles[i].decided] for i in read]) if read else None
        marks = torch.zeros(0, 2, packs.num_topics) if targets is None else torch.from_numpy(targets)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bfloat16):
            return loss_of(
                *model.section_logits_of(reader, rows, [move_batch(view, device) for view in views]),
                model.topic_head(articles[read].to(device)).float(),
                torch.from_numpy(classes).to(device),
                marks[:, 0].to(device),
                marks[:, 1].to(device),
                weights=weights,
            )

    for step in range(steps):
        optimizer.zero_grad()
        loss = torch.stack([loss_in(step, reader) for reader in readers]).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % packs.num_steps == 0:
            log.info("warm-up epoch %d: loss %.3f", (step + 1) // packs.num_steps, loss.item())


def _use_adapters(model: CopydeskModel, *, enabled: bool) -> None:
    for module in model.encoder.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(enabled)


@torch.no_grad()
def _vectors(
    model: CopydeskModel, packs: Packs, *, device: torch.device, bfloat16: bool
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return the vectors of each page's distinct sections, (rows, D) each, and of all articles, (A, D)."""
    index: dict[tuple[int, ...], int] = {}  # what several pages say is encoded once
    rows_of = [[index.setdefault(tuple(row), len(index)) for row in page.encoded.tokens] for page in packs.pages]
    texts, articles = list(index), [article.tokens for article in packs.articles]
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bfloat16):
        vectors, read = (
            torch.cat(
                [
                    torch.zeros(0, model.encoder.config.hidden_size),
                    *(
                        model.encode_rows(TokenRows.of(batch)).cpu()
                        for batch in batches_of(rows, [len(row) for row in rows])
                    ),
                ]
            )
            for rows in (texts, articles)
        )
    return [vectors[rows] for rows in rows_of], read
