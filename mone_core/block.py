"""The pre-norm transformer block whose tokens each have a width of their own.

At full width and gate 1 it is the plain ViT block. Attention itself is not nested: queries,
keys and values of every token are full width, so all tokens attend to all tokens.

Axes: N tokens sorted by width, B images, D model width, H heads.

Source: arXiv 2407.19985, section 3.1, eq. 1 and 5 to 7; the place of the layer norms
(before each branch, over all D features) follows the ViTs that it starts from.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from mone_core.nested import Layout, nested_in, nested_mlp, nested_out

Gelu = Literal["tanh", "erf"]


class NestedAttention(nn.Module):
    """Multi-head self-attention with nested projections in and out."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = _linear(dim, 3 * dim)
        for projection in self.qkv.weight.detach().chunk(3):  # each as if it were alone
            nn.init.xavier_uniform_(projection)
        self.out = _linear(dim, dim)

    def forward(self, residual_NBD: Tensor, x_NBD: Tensor, layout: Layout) -> Tensor:
        """Attend among `x` (normalised) and add the result to `residual`."""
        num_tokens, batch, dim = x_NBD.shape
        qkv = nested_in(x_NBD, self.qkv.weight, self.qkv.bias, layout)
        q, k, v = _Heads.apply(qkv, self.heads)  # type: ignore[no-untyped-call]
        mixed_BHNd = F.scaled_dot_product_attention(q, k, v)
        mixed_NBD = mixed_BHNd.permute(2, 0, 1, 3).reshape(num_tokens, batch, dim)
        return nested_out(residual_NBD, mixed_NBD, self.out.weight, self.out.bias, layout)


class _Heads(Function):
    """Queries, keys and values `BHNd` as views of `NB3D`; their gradients meet in one copy each.

    Left to autograd, the three are stacked and what is stacked is copied once more.
    """

    @staticmethod
    def forward(_ctx: Any, qkv_NBX: Tensor, heads: int) -> tuple[Tensor, ...]:
        num_tokens, batch, _ = qkv_NBX.shape
        return qkv_NBX.view(num_tokens, batch, 3, heads, -1).permute(2, 1, 3, 0, 4).unbind(0)

    @staticmethod
    @once_differentiable
    def backward(_ctx: Any, *grads_BHNd: Tensor) -> tuple[Tensor, None]:
        batch, heads, num_tokens, per_head = grads_BHNd[0].shape
        grad_NB3Hd = grads_BHNd[0].new_empty(num_tokens, batch, 3, heads, per_head)
        for index, grad_BHNd in enumerate(grads_BHNd):
            grad_NB3Hd[:, :, index].copy_(grad_BHNd.permute(2, 0, 1, 3))
        return grad_NB3Hd.flatten(2), None


class NestedMlp(nn.Module):
    """Two-layer perceptron with a full hidden layer, nested in and out, and a gate per token."""

    def __init__(self, dim: int, hidden: int, gelu: Gelu) -> None:
        super().__init__()
        self.approximate = "tanh" if gelu == "tanh" else "none"
        self.up = _linear(dim, hidden)
        self.down = _linear(hidden, dim)

    def forward(
        self, residual_NBD: Tensor, x_NBD: Tensor, layout: Layout, gate_NB1: Tensor | None
    ) -> Tensor:
        """Transform `x` (normalised) and add the result, gated, to `residual`."""
        weights = (self.up.weight, self.up.bias, self.down.weight, self.down.bias)
        return nested_mlp(
            residual_NBD, x_NBD, *weights, layout, gate_NB1, approximate=self.approximate
        )


class NestedBlock(nn.Module):
    """Attention and MLP, each behind a layer norm over all D features."""

    def __init__(self, dim: int, heads: int, hidden: int, *, gelu: Gelu, norm_eps: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim, eps=norm_eps)
        self.attention = NestedAttention(dim, heads)
        self.mlp_norm = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = NestedMlp(dim, hidden, gelu)

    def forward(self, x_NBD: Tensor, layout: Layout, gate_NB1: Tensor | None = None) -> Tensor:
        """One layer: `NBD` in, `NBD` out.

        Args:
            gate_NB1: Factor on the MLP branch of each token, `alpha * r + 1` (eq. 1); None is 1.
        """
        x_NBD = self.attention(x_NBD, self.attention_norm(x_NBD), layout)
        out_NBD: Tensor = self.mlp(x_NBD, self.mlp_norm(x_NBD), layout, gate_NB1)
        return out_NBD


class BoundedScale(nn.Module):
    """alpha of eq. 1: learnable, starts at 0, stays in [0, 1) and cannot freeze the router.

    At alpha = 0 the router gets no gradient, so a hard clamp would freeze it for good
    whenever the first push is downward. Here alpha is |a| / (1 + |a|) with slope +1 at a = 0: a
    push below 0 comes out on the other side as a small positive alpha, and the router goes on
    learning. It nears 1 slowly, where tanh would reach it and stay.
    """

    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.zeros(()))

    def forward(self) -> Tensor:
        """alpha as a scalar tensor."""
        size = torch.where(self.raw >= 0, self.raw, -self.raw)  # abs() would have slope 0 at 0
        return size / (1 + size)


def _linear(fan_in: int, fan_out: int) -> nn.Linear:
    """A linear layer that starts as ViTs do: Xavier-uniform weights, zero bias."""
    layer = nn.Linear(fan_in, fan_out)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
