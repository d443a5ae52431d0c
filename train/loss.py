"""What training makes small. Tensors in, one number out."""

from collections.abc import Callable

import torch
from torch.nn import functional


def loss_of(
    sections: torch.Tensor,
    topics: torch.Tensor,
    classes: torch.Tensor,
    holds: torch.Tensor,
    decided: torch.Tensor,
    *,
    class_weights: torch.Tensor,
    topic_weight: float,
    over_processes: Callable[[torch.Tensor], torch.Tensor] = lambda number: number,
) -> torch.Tensor:
    """Return the section loss plus the weighted topic loss: each a sum over its rows by the sum of their weights.

    Args:
        sections: logits (P, S, C) of P page encoders; each learns by its own loss.
        topics: logits (A, T).
        classes: (S,).
        holds: (A, T), 1 where a topic holds.
        decided: (A, T), 1 where it is known.
        class_weights: (C,).
        topic_weight: of the topic loss.
        over_processes: returns the mean of a number over all processes that share the batch.
    """
    loss = sections.sum() * 0 + topics.sum() * 0  # every weight takes part, whatever the pack holds
    weight = over_processes(class_weights[classes].sum() * len(sections))
    if len(classes):
        each = functional.cross_entropy(
            sections.flatten(0, 1), classes.repeat(len(sections)), weight=class_weights, reduction="sum"
        )
        loss = loss + each / weight
    num_decided = over_processes(decided.sum())
    if num_decided:
        each = functional.binary_cross_entropy_with_logits(topics, holds, reduction="none")
        loss = loss + topic_weight * (each * decided).sum() / num_decided
    return loss
