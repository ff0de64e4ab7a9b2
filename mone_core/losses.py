"""What training minimises, one number per image; the caller averages."""

import torch
import torch.nn.functional as F
from torch import Tensor


def softmax_loss(logits_BK: Tensor, targets: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Cross entropy in nats between class scores and targets, shape B, float32 at least.

    Args:
        logits_BK: Class scores before softmax.
        targets: Class indices, int64, shape B, or shares of classes, floats, shape [B, K].
        label_smoothing: Share of the target spread evenly over all classes, 0 to 1.
    """
    logits_BK = _at_least_float32(logits_BK)
    if targets.dim() == 2:
        targets = targets.to(logits_BK.dtype)
    return F.cross_entropy(logits_BK, targets, label_smoothing=label_smoothing, reduction="none")


def sigmoid_loss(logits_BK: Tensor, targets: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Binary cross entropy in nats of every class, summed over classes, shape B, float32 at least.

    Args:
        logits_BK: Class scores before the sigmoid.
        targets: Class indices, int64, shape B, or shares of classes, floats, shape [B, K].
        label_smoothing: Share of the target spread evenly over all classes, 0 to 1.

    Source: arXiv 2106.05974, as its published configurations train on ImageNet-21k.
    """
    logits_BK = _at_least_float32(logits_BK)
    classes = logits_BK.shape[1]
    if targets.dim() == 1:
        # Not one_hot, which looks at the labels on the host.
        zeros_BK = torch.zeros_like(logits_BK)
        shares_BK = zeros_BK.scatter(1, targets[:, None], 1.0)
    else:
        shares_BK = targets.to(logits_BK.dtype)
    shares_BK = shares_BK * (1.0 - label_smoothing) + label_smoothing / classes
    # binary_cross_entropy_with_logits loses the small losses of many rightly low scores: it is off
    # by 8e-4 of the sum over 21,843 classes in float32.
    hit_BK, miss_BK = F.logsigmoid(logits_BK), F.logsigmoid(-logits_BK)
    return -torch.lerp(miss_BK, hit_BK, shares_BK).sum(dim=1)


def importance_loss(probs_GSE: Tensor) -> Tensor:
    """How unevenly probability is spread over experts: squared coefficient of variation.

    Args:
        probs_GSE: Router probabilities without noise; G groups of S tokens, E experts.

    Returns:
        Mean over groups, 0 when every expert gets the same.

    Source: arXiv 2106.05974, appendix on auxiliary losses.
    """
    return _squared_variation(probs_GSE.sum(dim=1)).mean()


def load_loss(logits_GSE: Tensor, noisy_GSE: Tensor, k: int, noise_std: float) -> Tensor:
    """How unevenly tokens would choose experts if the noise were drawn again.

    An expert's load is the expected number of tokens that have it among their best k: the
    chance that a fresh draw of its own noise lifts it over the k-th largest noisy logit.

    Args:
        logits_GSE: Router logits without noise.
        noisy_GSE: The logits that the choice was made from.
        k: Choices of a token.
        noise_std: Standard deviation of the noise, above 0.

    Returns:
        Squared coefficient of variation of the load, mean over groups. Gradient flows
        through the threshold too.

    Source: arXiv 2106.05974, appendix on auxiliary losses.
    """
    at_k_GS1 = noisy_GSE.detach().topk(k, dim=2).indices[..., -1:]
    threshold_GS1 = noisy_GSE.gather(2, at_k_GS1)
    chance_GSE = torch.special.ndtr((logits_GSE - threshold_GS1) / noise_std)
    return _squared_variation(chance_GSE.mean(dim=1)).mean()


def gshard_loss(probs_GSE: Tensor) -> Tensor:
    """Share of tokens whose favourite an expert is, times its mean probability; 1 at balance.

    Source: arXiv 2006.16668, section 2.2, scaled by the number of experts.
    """
    num_experts = probs_GSE.shape[2]
    favourite_GS1 = probs_GSE.argmax(dim=2, keepdim=True)
    # Not one_hot, which looks at the indices on the host.
    is_favourite_GSE = torch.zeros_like(probs_GSE).scatter(2, favourite_GS1, 1.0)
    balance_GE = is_favourite_GSE.mean(dim=1) * probs_GSE.mean(dim=1)
    return num_experts**2 * balance_GE.mean()


def router_z_loss(logits_GSE: Tensor) -> Tensor:
    """Mean squared log-sum-exp of router logits: keeps them small.

    Source: arXiv 2202.08906, eq. 5.
    """
    return logits_GSE.logsumexp(dim=2).square().mean()


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _squared_variation(amount_GE: Tensor) -> Tensor:
    """(standard deviation / mean)^2 over experts, population form."""
    mean_G = amount_GE.mean(dim=1)
    return amount_GE.var(dim=1, correction=0) / mean_G.square()
