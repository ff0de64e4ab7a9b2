"""What a forward pass costs, by formula, in multiply-accumulates (MACs) of one image.

MACs, not FLOPs: one multiplication and one addition count once, as the papers count them.
Norms, activations and softmax are left out, as there.

Source: arXiv 2407.19985, section 4; dense figures agree with those of the ViT papers.
"""

from collections.abc import Sequence


def nested_block_macs(counts: Sequence[int], dims: Sequence[int], *, dim: int, hidden: int) -> int:
    """One nested block on one image.

    Args:
        counts: Tokens per expert, narrowest first.
        dims: Features per expert, narrowest first.
        dim: Full model width D.
        hidden: Hidden width F of the MLP.
    """
    num_tokens = sum(counts)
    nested_features = sum(count * d for count, d in zip(counts, dims, strict=True))
    projections = (3 * dim + dim + 2 * hidden) * nested_features  # qkv, out, both MLP layers
    scores_and_mixing = 2 * num_tokens * num_tokens * dim  # full width, whatever the budget
    return projections + scores_and_mixing


def linear_macs(tokens: int, fan_in: int, fan_out: int) -> int:
    """A dense linear layer on `tokens` tokens."""
    return tokens * fan_in * fan_out
