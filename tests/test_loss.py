"""What training makes small: each part of the loss by itself, and what it must not count."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from train.loss import LossWeights, loss_of


def test_topics_that_are_undecided_add_no_loss():
    topics = torch.tensor([[5.0, -3.0]], requires_grad=True)
    nothing = *torch.zeros(2, 1, 0, 5), topics, torch.zeros(0, dtype=torch.long), torch.tensor([[0.0, 1.0]])
    weights = LossWeights(torch.ones(5), topics=2.0)

    loss = loss_of(*nothing, torch.tensor([[0.0, 1.0]]), weights=weights)
    assert loss.item() == pytest.approx(2.0 * np.log1p(np.exp(3.0)))
    loss.backward()
    assert topics.grad[0, 0] == 0
    assert loss_of(*nothing, torch.zeros(1, 2), weights=weights) == 0


def test_the_own_text_of_sections_adds_its_cross_entropy_to_the_loss():
    random = torch.Generator().manual_seed(0)
    sections, own_text = torch.randn(2, 2, 6, 5, generator=random)
    classes, weights = torch.randint(0, 5, (6,), generator=random), torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    no_topics = torch.zeros(0, 3)

    def loss(weight: float) -> float:
        all_weights = LossWeights(weights, topics=1.0, own_text=weight)
        return loss_of(sections, own_text, no_topics, classes, no_topics, no_topics, weights=all_weights).item()

    each = [functional.cross_entropy(logits, classes, weight=weights).item() for logits in own_text]
    assert loss(0.3) - loss(0.0) == pytest.approx(0.3 * np.mean(each), rel=1e-4)


def test_readings_that_differ_add_to_the_loss_by_their_divergence_from_the_mean():
    random = torch.Generator().manual_seed(0)
    sections = torch.randn(2, 6, 5, generator=random, requires_grad=True)
    classes, weights = torch.randint(0, 5, (6,), generator=random), torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    no_topics = torch.zeros(0, 3)

    def loss(logits: torch.Tensor, consistency: float) -> torch.Tensor:
        all_weights = LossWeights(weights, topics=1.0, consistency=consistency)
        return loss_of(logits, logits, no_topics, classes, no_topics, no_topics, weights=all_weights)

    added = loss(sections, 3.0) - loss(sections, 0.0)
    each = sections.detach().double().softmax(dim=-1).numpy()
    mean = each.mean(axis=0)
    apart, share = (mean * np.log(mean / each)).sum(axis=-1), (weights[classes] / weights[classes].sum()).numpy()
    assert added.item() == pytest.approx(3.0 * (apart.mean(axis=0) * share).sum(), rel=1e-4)
    added.backward()
    np.testing.assert_allclose(sections.grad, 1.5 * (each - mean) * share[:, None], atol=1e-6)
    same = sections[:1].detach().expand(2, 6, 5)
    assert loss(same, 3.0).item() == pytest.approx(loss(same, 0.0).item(), abs=1e-6)
