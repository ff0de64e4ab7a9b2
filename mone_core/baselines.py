"""Blocks of the models that MoNE is compared with: MatFormer's and Mixture-of-Depths'.

Both are the block of `block.NestedBlock` with one thing changed, and the same parameters.

Axes: N tokens, B images, D model width, F hidden width, M tokens that a skipping block computes.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from mone_core.block import Gelu, NestedBlock, NestedMlp
from mone_core.nested import Layout


class SlicedMlp(NestedMlp):
    """An MLP that uses the first `width` hidden units, for all tokens alike."""

    def __init__(self, dim: int, hidden: int, gelu: Gelu) -> None:
        super().__init__(dim, hidden, gelu)
        self.width = hidden

    def forward(
        self, residual_NBD: Tensor, x_NBD: Tensor, layout: Layout, gate_NB1: Tensor | None
    ) -> Tensor:
        """Transform `x` (normalised) and add the result to `residual`."""
        assert len(layout.segments) == 1, "hidden slicing gives all tokens the same width"
        assert gate_NB1 is None, "hidden slicing has no router"
        m = self.width
        h_NBM = F.linear(x_NBD, self.up.weight[:m], self.up.bias[:m])
        h_NBM = F.gelu(h_NBM, approximate=self.approximate)
        return residual_NBD + F.linear(h_NBM, self.down.weight[:, :m], self.down.bias)


class SlicedBlock(NestedBlock):
    """The MatFormer block: attention at full width, a prefix of the MLP's hidden layer.

    Source: arXiv 2310.07707, section 3.
    """

    mlp: SlicedMlp

    def __init__(self, dim: int, heads: int, hidden: int, *, gelu: Gelu, norm_eps: float) -> None:
        super().__init__(dim, heads, hidden, gelu=gelu, norm_eps=norm_eps)
        self.mlp = SlicedMlp(dim, hidden, gelu)

    @property
    def width(self) -> int:
        """Hidden units in use."""
        return self.mlp.width

    def set_width(self, width: int) -> None:
        """Use the first `width` hidden units from now on."""
        self.mlp.width = width


class SkippingBlock(NestedBlock):
    """A Mixture-of-Depths block: only the tokens that score highest go through it.

    They attend among themselves; what the block changes is scaled by their score, so that the
    scorer learns. All other tokens pass unchanged.

    Args:
        num_tokens: Tokens of an image that go through, M.

    Source: arXiv 2404.02258, section 3.4 (expert choice per sequence), in the setting of
    arXiv 2407.19985, section 5: 12.5 % of the tokens in every second block.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        hidden: int,
        *,
        num_tokens: int,
        gelu: Gelu,
        norm_eps: float,
    ) -> None:
        super().__init__(dim, heads, hidden, gelu=gelu, norm_eps=norm_eps)
        self.score = nn.Linear(dim, 1, bias=False)
        nn.init.normal_(self.score.weight, std=0.02)
        self.layout = Layout.of((num_tokens,), (dim,))

    def forward(self, x_NBD: Tensor, layout: Layout, gate_NB1: Tensor | None = None) -> Tensor:
        """One layer: `NBD` in, `NBD` out."""
        assert len(layout.segments) == 1, "skipping blocks take dense tokens"
        assert gate_NB1 is None, "skipping blocks have a score of their own"
        score_NB1 = self.score(x_NBD)
        best_NB1 = score_NB1.detach().sort(dim=0, descending=True, stable=True).indices
        chosen_MB1 = best_NB1[: self.layout.segments[0].stop]
        chosen_MBD = chosen_MB1.expand(-1, -1, x_NBD.shape[2])
        x_MBD = x_NBD.gather(0, chosen_MBD)
        change_MBD = super().forward(x_MBD, self.layout) - x_MBD
        change_MBD = change_MBD * score_NB1.gather(0, chosen_MB1)
        return x_NBD.scatter_add(0, chosen_MBD, change_MBD.to(x_NBD.dtype))
