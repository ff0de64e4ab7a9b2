"""Which nested expert handles which token.

A `Router` scores tokens, `expert_preferred_routing` assigns them, and `sort_by_width` turns
the assignment into the order in which a model keeps its tokens from then on. No features
are computed here (`nested`), and how many tokens an expert gets is decided before
(`capacity`).

Axes: B images (or frames), N tokens of one image, D model width, E experts, narrowest first.

Counts are Python integers, so every shape is known before a step is traced: no host sync,
no recompilation.

Source: arXiv 2407.19985, section 4 and algorithm 1.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mone_core.errors import RoutingError


class Router(nn.Module):
    """Scores every token for every expert: linear, bias, softmax over experts (section 4.1).

    Args:
        dim: Model width D.
        num_experts: E.

    Shape: `x_BND` -> probabilities `BNE`, float32 whatever the dtype of the model, so that
    close scores are told apart in bfloat16 too.
    """

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__()
        self.score = nn.Linear(dim, num_experts)
        nn.init.normal_(self.score.weight, std=0.02)
        nn.init.zeros_(self.score.bias)

    def forward(self, x_BND: Tensor) -> Tensor:
        """Probabilities of every expert, adding up to 1 for each token."""
        logits_BNE = self.score(x_BND)
        at_least_float32 = torch.promote_types(logits_BNE.dtype, torch.float32)
        probs_BNE: Tensor = logits_BNE.softmax(dim=-1, dtype=at_least_float32)
        return probs_BNE


def expert_preferred_routing(probs_BNE: Tensor, counts: Sequence[int]) -> Tensor:
    """Let experts pick tokens in turn, widest first, each until its count is full.

    Every token is picked exactly once; equal scores go to the earlier token.

    Args:
        probs_BNE: Router probabilities, narrowest expert first.
        counts: Tokens per expert and image; adds up to N.

    Returns:
        Expert index of every token, shape BN, int64.

    Raises:
        RoutingError: `counts` does not share out exactly N tokens among E experts.

    Source: arXiv 2407.19985, algorithm 1.
    """
    _, num_tokens, num_experts = probs_BNE.shape
    if len(counts) != num_experts or sum(counts) != num_tokens:
        raise RoutingError(
            f"counts {tuple(counts)} share out {sum(counts)} tokens among {len(counts)} experts, "
            f"but the scores are for {num_tokens} tokens and {num_experts} experts"
        )
    expert_BN = torch.zeros(probs_BNE.shape[:2], dtype=torch.int64, device=probs_BNE.device)
    open_BNE = probs_BNE.detach()
    for expert in reversed(range(1, num_experts)):  # expert 0 takes whatever is left
        # A stable sort, not topk: topk leaves the order of equal scores open.
        by_score_BN = open_BNE[..., expert].sort(dim=1, descending=True, stable=True).indices
        picked_BK = by_score_BN[:, : counts[expert]]
        expert_BN = expert_BN.scatter(1, picked_BK, expert)
        taken_BN1 = (expert_BN > 0).unsqueeze(-1)
        open_BNE = probs_BNE.detach().masked_fill(taken_BN1, float("-inf"))
    return expert_BN


def sort_by_width(expert_BN: Tensor) -> Tensor:
    """Positions of an image's tokens, widest expert first, original order within an expert.

    Args:
        expert_BN: Expert index of every token.

    Returns:
        Token positions `order_BN`, int64: `tokens.gather(1, order)` puts them in that order.
    """
    return expert_BN.sort(dim=1, descending=True, stable=True).indices
