"""What training makes small. Tensors in, one number out."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional


class LossWeights(NamedTuple):
    """How much each part of the loss counts beside the others."""

    classes: torch.Tensor
    """(C,): of a section of each class."""
    topics: float
    """Of the topic loss beside the section loss."""
    own_text: float = 0.0
    """Of what a section's own text says, beside what its page says too (deep supervision, arXiv:1409.5185)."""
    consistency: float = 0.0
    """Of the divergence of each reading from the mean of all, which does not learn from it: a reading of bare text
    learns what one with tags knows, and the other way round."""


def loss_of(
    sections: torch.Tensor,
    own_text: torch.Tensor,
    topics: torch.Tensor,
    classes: torch.Tensor,
    holds: torch.Tensor,
    decided: torch.Tensor,
    *,
    weights: LossWeights,
    over_processes: Callable[[torch.Tensor], torch.Tensor] = lambda number: number,
) -> torch.Tensor:
    """Return the weighted sum of section losses, divergence and topic loss, each by the sum of the weights of its rows.

    Args:
        sections: logits (V, S, C) of V readings; each learns by its own loss.
        own_text: logits (V', S, C) of the sections' own text, of the readings that have them.
        topics: logits (A, T).
        classes: (S,).
        holds: (A, T), 1 where a topic holds.
        decided: (A, T), 1 where it is known.
        weights: of the parts.
        over_processes: returns the mean of a number over all processes that share the batch.
    """
    loss = (sections.sum() + own_text.sum() + topics.sum()) * 0  # every weight takes part, whatever the pack holds
    weight = over_processes(weights.classes[classes].sum() * len(sections))
    if len(classes):
        loss = loss + _cross_entropy(sections, classes, weights) / weight
        if weights.own_text:
            loss = loss + weights.own_text * _cross_entropy(own_text, classes, weights) / weight
        if weights.consistency:
            apart = (_divergence(sections) * weights.classes[classes]).sum()
            loss = loss + weights.consistency * apart / weight
    num_decided = over_processes(decided.sum())
    if num_decided:
        each = functional.binary_cross_entropy_with_logits(topics, holds, reduction="none")
        loss = loss + weights.topics * (each * decided).sum() / num_decided
    return loss


def _cross_entropy(logits: torch.Tensor, classes: torch.Tensor, weights: LossWeights) -> torch.Tensor:
    """Return the weighted sum over all readings and sections."""
    return functional.cross_entropy(
        logits.flatten(0, 1), classes.repeat(len(logits)), weight=weights.classes, reduction="sum"
    )


def _divergence(logits: torch.Tensor) -> torch.Tensor:
    """Return (V, S): the Kullback-Leibler divergence of each reading from the mean of all."""
    each = functional.log_softmax(logits, dim=-1)
    mean = (each.logsumexp(dim=0) - math.log(len(each))).detach()
    return functional.kl_div(each, mean.expand_as(each), reduction="none", log_target=True).sum(dim=-1)
