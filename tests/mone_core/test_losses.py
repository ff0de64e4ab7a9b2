"""Losses: one number per image, the textbook formula, float32 at least."""

import pytest
import torch

from mone_core.losses import softmax_loss


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_the_softmax_loss_is_cross_entropy_in_nats_per_image(smoothing):
    logits = torch.randn(4, 7, dtype=torch.float64)
    labels = torch.tensor([0, 6, 3, 3])
    target = torch.full((4, 7), smoothing / 7, dtype=torch.float64)
    target[torch.arange(4), labels] += 1 - smoothing
    by_hand = -(target * (logits.exp() / logits.exp().sum(1, keepdim=True)).log()).sum(1)

    loss_B = softmax_loss(logits, labels, label_smoothing=smoothing)

    torch.testing.assert_close(loss_B, by_hand)


def test_equal_scores_cost_the_logarithm_of_the_classes():
    loss_B = softmax_loss(torch.zeros(2, 10), torch.tensor([1, 9]))

    torch.testing.assert_close(loss_B, torch.full((2,), 10.0).log())


def test_half_precision_scores_are_scored_in_float32():
    logits = torch.randn(3, 1000).bfloat16()
    labels = torch.tensor([1, 2, 3])

    loss_B = softmax_loss(logits, labels)

    assert loss_B.dtype == torch.float32
    torch.testing.assert_close(loss_B, softmax_loss(logits.float(), labels))
