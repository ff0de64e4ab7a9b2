"""The V-MoE layer against a dense MLP that does the same products.

`python -m tests.benchmarks.bench_moe_layer [--device cpu|cuda] [--threads N] [--quick]`

The shapes of B/16: 8 images of 196 tokens, D = 768, F = 3072, 8 experts, capacity ratio 1.05. The
baseline is a dense MLP of torch's own layers on K times as many tokens; router, dispatch, combine,
residual and the empty slots (5 % of the products) are on the layer's side. Dropped tokens are
not compensated for: their share is printed.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mone_core.capacity import capacity_distribution, token_counts
from mone_core.experts import ExpertsConfig, SparseMlp
from mone_core.models import VIT_SIZES
from mone_core.nested import Layout
from tests.benchmarks.harness import BenchRow, Case, Setting, compare, main

BATCH, TOKENS, EXPERTS, CAPACITY_RATIO = 8, 196, 8, 1.05
CONFIG = VIT_SIZES["B"]
NESTED = 0.5


class PlainMlp(nn.Module):
    """The dense MLP as it is commonly written: the baseline."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(CONFIG.dim, CONFIG.hidden)
        self.down = nn.Linear(CONFIG.hidden, CONFIG.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Layer(nn.Module):
    """A sparse layer at one budget, `NBD` in and out, no auxiliary losses."""

    def __init__(self, k: int, budget: float) -> None:
        super().__init__()
        config = ExpertsConfig(
            placement="every",
            num_experts=EXPERTS,
            k=k,
            capacity_ratio=CAPACITY_RATIO,
            group_images=BATCH,
        )
        self.sparse = SparseMlp(CONFIG.dim, CONFIG.hidden, config, "tanh").eval()
        self.layout = Layout.of(token_counts(capacity_distribution(budget), TOKENS), CONFIG.dims)

    def forward(self, x_NBD: Tensor) -> Tensor:
        out_NBD: Tensor = self.sparse(x_NBD, x_NBD, self.layout, None)[0]
        return out_NBD

    @torch.no_grad()
    def dropped(self, x_NBD: Tensor) -> float:
        """Share of choices that found no slot."""
        _, told = self.sparse(x_NBD, x_NBD, self.layout, None)
        kept = torch.cat([each.kept_GSK.flatten() for each in told.assignments])
        return 1 - kept.float().mean().item()


def measure(setting: Setting) -> list[BenchRow]:
    """All rows, one group per baseline."""
    torch.manual_seed(0)
    rows = []
    for k in (1, 2):
        for training in (False, True):
            rows += compare_layers(setting, k, training=training)
    return rows


def compare_layers(setting: Setting, k: int, *, training: bool) -> list[BenchRow]:
    """The layer, flat and nested, against the dense MLP on K * T tokens."""
    case = "moe_layer/train" if training else "moe_layer/forward"

    def of(module: nn.Module, what: str, tokens: int) -> Case:
        module.to(setting.device, setting.dtype)
        shape = (tokens, BATCH, CONFIG.dim)
        x_NBD = torch.randn(shape, device=setting.device, dtype=setting.dtype)
        if isinstance(module, Layer):
            what += f", {module.dropped(x_NBD):.1%} dropped"
        run = _trainer(module, x_NBD) if training else _forwarder(module, x_NBD)
        return Case(case=case, shape=f"B/16 B={BATCH} N={TOKENS} K={k} {what}", run=run)

    layers = [
        of(Layer(k, 1.0), f"E={EXPERTS} C={CAPACITY_RATIO}", TOKENS),
        of(Layer(k, NESTED), f"E={EXPERTS} C={CAPACITY_RATIO} e_c={NESTED}", TOKENS),
    ]
    return compare(of(PlainMlp(), "dense", k * TOKENS), layers, setting)


def _forwarder(module: nn.Module, x: Tensor) -> Callable[[], None]:
    @torch.inference_mode()
    def run() -> None:
        module(x)

    return run


def _trainer(module: nn.Module, x: Tensor) -> Callable[[], None]:
    """Forward and backward to weights and input, gradients made anew."""
    x.requires_grad_()
    seed = torch.randn_like(x)

    def run() -> None:
        module.zero_grad(set_to_none=True)
        x.grad = None
        module(x).backward(seed)

    return run


if __name__ == "__main__":
    main("moe_layer", measure)
