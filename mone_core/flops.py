"""What a forward pass costs, by formula, in multiply-accumulates (MACs) of one image or clip.

MACs, not FLOPs: one multiplication and one addition count once, as the papers count them.
Norms, activations and softmax are left out, as there.

Source: arXiv 2407.19985, section 4; dense figures agree with those of the ViT papers.
"""

from mone_core.nested import Layout


def linear_macs(tokens: int, fan_in: int, fan_out: int) -> int:
    """A dense linear layer on `tokens` tokens."""
    return tokens * fan_in * fan_out


def attention_macs(layout: Layout) -> int:
    """Nested projections in and out; scores and mixing at full width, whatever the budget."""
    num_tokens = layout.segments[-1].stop
    return 4 * layout.dim * nested_features(layout) + 2 * num_tokens * num_tokens * layout.dim


def mlp_macs(layout: Layout, hidden: int) -> int:
    """Both layers of a nested MLP; with experts, the slots of one expert."""
    return 2 * hidden * nested_features(layout)


def nested_features(layout: Layout) -> int:
    """Features that all tokens together are computed at."""
    return sum((segment.stop - segment.start) * segment.dim for segment in layout.segments)
