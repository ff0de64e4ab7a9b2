"""What training minimises, one number per image; the caller averages."""

import torch
import torch.nn.functional as F
from torch import Tensor


def softmax_loss(logits_BK: Tensor, labels_B: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Cross entropy in nats between class scores and labels, shape B, float32 at least.

    Args:
        logits_BK: Class scores before softmax.
        labels_B: int64 class indices.
        label_smoothing: Share of the target spread evenly over all classes, 0 to 1.
    """
    at_least_float32 = torch.promote_types(logits_BK.dtype, torch.float32)
    return F.cross_entropy(
        logits_BK.to(at_least_float32), labels_B, label_smoothing=label_smoothing, reduction="none"
    )
