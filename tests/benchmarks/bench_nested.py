"""What a smaller budget saves in time: nested models and blocks against full width.

    python -m tests.benchmarks.bench_nested --threads 1

Two questions. Does a whole ViT-S/16 get faster as its budget shrinks (forward, batch 8, against
itself at e_c 1)? And what do two nested blocks cost, forward and in training, against two dense
blocks of torch's own layers that know nothing of nesting? On a processor also with products by
oneDNN, at half the budget and at full width, which is what a dense block would gain by it. On
CUDA the batch is 128.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mone_core.block import NestedBlock
from mone_core.capacity import capacity_distribution, token_counts
from mone_core.gemm import has_onednn
from mone_core.models import VIT_SIZES, build_model
from mone_core.nested import Layout
from tests.benchmarks.harness import (
    BenchRow,
    Case,
    Setting,
    compare,
    forward,
    forward_backward,
    main,
    through_onednn,
)
from tests.benchmarks.roofline import block_ms

TOKENS, DEPTH = 196, 2
BUDGETS = (0.3, 0.5, 0.7)


class PlainBlock(nn.Module):
    """The dense pre-norm ViT block as it is commonly written: the baseline."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(dim, eps=1e-6)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.mlp_norm = nn.LayerNorm(dim, eps=1e-6)
        self.up = nn.Linear(dim, 4 * dim)
        self.down = nn.Linear(4 * dim, dim)

    def forward(self, x_BND: Tensor) -> Tensor:
        batch, num_tokens, _ = x_BND.shape
        qkv = self.qkv(self.attention_norm(x_BND)).view(batch, num_tokens, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed_BND = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x_BND = x_BND + self.out(mixed_BND)
        h_BNF = F.gelu(self.up(self.mlp_norm(x_BND)), approximate="tanh")
        return x_BND + self.down(h_BNF)


def plain_stack(size: str) -> nn.Sequential:
    """Two dense blocks, `BND` in and out."""
    config = VIT_SIZES[size]
    return nn.Sequential(*(PlainBlock(config.dim, config.heads) for _ in range(DEPTH)))


class NestedStack(nn.Module):
    """Two nested blocks at one budget, `NBD` in and out, with a gate that is trained."""

    def __init__(self, size: str, budget: float, images: int) -> None:
        super().__init__()
        config = VIT_SIZES[size]
        counts = token_counts(capacity_distribution(budget), TOKENS)
        self.layout = Layout.of(counts, config.dims)
        self.gate_NB1 = nn.Parameter(torch.ones(TOKENS, images, 1))
        self.blocks = nn.ModuleList(
            NestedBlock(config.dim, config.heads, 4 * config.dim, gelu="tanh", norm_eps=1e-6)
            for _ in range(DEPTH)
        )

    def forward(self, x_NBD: Tensor) -> Tensor:
        for block in self.blocks:
            x_NBD = block(x_NBD, self.layout, self.gate_NB1)
        return x_NBD


def measure(setting: Setting) -> list[BenchRow]:
    """All rows, one group per baseline."""
    torch.manual_seed(0)
    rows = compare_models(setting)
    for size in ("S",) if setting.quick else ("S", "B"):
        rows += compare_blocks(setting, size, training=False)
        rows += compare_blocks(setting, size, training=True)
    return rows


def compare_models(setting: Setting) -> list[BenchRow]:
    """One whole ViT-S/16 at several budgets, against itself at full width."""
    model = build_model(VIT_SIZES["S"])
    model.to(setting.device, setting.dtype)
    images = torch.randn(setting.images, 3, 224, 224).to(setting.device, setting.dtype)

    def at(budget: float) -> Case:
        @torch.inference_mode()
        def run() -> None:
            model.set_effective_capacity(budget)
            model(images)

        shape = f"S/16 224px B={setting.images} e_c={budget}"
        return Case(case="nested/vit/forward", shape=shape, run=run)

    return compare(at(1.0), [at(budget) for budget in BUDGETS], setting)


def compare_blocks(setting: Setting, size: str, *, training: bool) -> list[BenchRow]:
    """Two nested blocks at several budgets, against two dense ones."""
    case = "nested/blocks/train" if training else "nested/blocks/forward"
    shape = f"{size}/16 L={DEPTH} B={setting.images} N={TOKENS}"
    dim, device = VIT_SIZES[size].dim, setting.accelerator

    def of(stack: nn.Module, what: str, layout: Layout, *leading: int) -> Case:
        stack.to(setting.device, setting.dtype)
        x = torch.randn(*leading, dim).to(setting.device, setting.dtype)
        return Case(
            case=case,
            shape=f"{shape} {what}",
            run=forward_backward(stack, x) if training else forward(stack, x),
            floor_ms=device and DEPTH * block_ms(device, layout, setting.images, training=training),
        )

    def nested_at(budget: float) -> Case:
        stack = NestedStack(size, budget, setting.images)
        return of(stack, f"e_c={budget}", stack.layout, TOKENS, setting.images)

    full = Layout.of((TOKENS,), (dim,))
    dense = of(plain_stack(size), "dense", full, setting.images, TOKENS)
    nested = [nested_at(budget) for budget in (*BUDGETS, 1.0)]
    if setting.device == "cpu" and has_onednn():
        nested += [through_onednn(nested[BUDGETS.index(0.5)]), through_onednn(nested[-1])]
    return compare(dense, nested, setting)


if __name__ == "__main__":
    main("nested", measure)
