"""The V-MoE layer against a dense MLP that does the same products.

`python -m tests.benchmarks.bench_moe_layer [--device cpu|cuda] [--threads N] [--quick]`

The shapes of B/16: 8 images of 196 tokens (128 on CUDA), D = 768, F = 3072, 8 experts, capacity
ratio 1.05, groups of 8 images. The baseline is a dense MLP of torch's own layers on K times as
many tokens; router, dispatch, combine, residual and the empty slots (5 % of the products) are on
the layer's side. Dropped tokens are not compensated for: their share is printed.

On a processor the same again with products by oneDNN. The dense MLP is then `mone_core`'s, at
one width, since torch's own layers have no such choice.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mone_core.block import NestedMlp
from mone_core.capacity import capacity_distribution, token_counts
from mone_core.experts import ExpertsConfig, SparseMlp
from mone_core.gemm import has_onednn
from mone_core.models import VIT_SIZES, ModelConfig
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
from tests.benchmarks.roofline import Accelerator, experts_ms, mlp_ms

TOKENS, EXPERTS, CAPACITY_RATIO, GROUP = 196, 8, 1.05, 8
NESTED = 0.5


class PlainMlp(nn.Module):
    """The dense MLP as it is commonly written: the baseline."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.dim, config.hidden)
        self.down = nn.Linear(config.hidden, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))

    def floor_ms(self, device: Accelerator, rows: int, *, training: bool) -> float:
        """What the accelerator leaves it for so many tokens."""
        return mlp_ms(
            device, [(rows, self.up.in_features)], self.up.out_features, training=training
        )


class OwnMlp(nn.Module):
    """`mone_core`'s MLP with all tokens at full width, and its residual sum: `NBD` in and out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.mlp = NestedMlp(config.dim, config.hidden, "tanh")

    def forward(self, x_NBD: Tensor) -> Tensor:
        layout = Layout.of(x_NBD.shape[:1], x_NBD.shape[2:])
        out_NBD: Tensor = self.mlp(x_NBD, x_NBD, layout, None)
        return out_NBD


class Layer(nn.Module):
    """A sparse layer at one budget, `NBD` in and out, no auxiliary losses."""

    def __init__(self, config: ModelConfig, k: int, budget: float) -> None:
        super().__init__()
        experts = ExpertsConfig(
            placement="every",
            num_experts=EXPERTS,
            k=k,
            capacity_ratio=CAPACITY_RATIO,
            group_images=GROUP,
        )
        self.hidden = config.hidden
        self.sparse = SparseMlp(config.dim, config.hidden, experts, "tanh").eval()
        self.layout = Layout.of(token_counts(capacity_distribution(budget), TOKENS), config.dims)

    def forward(self, x_NBD: Tensor) -> Tensor:
        out_NBD: Tensor = self.sparse(x_NBD, x_NBD, self.layout, None)[0]
        return out_NBD

    @torch.no_grad()
    def dropped(self, x_NBD: Tensor) -> float:
        """Share of choices that found no slot."""
        _, told = self.sparse(x_NBD, x_NBD, self.layout, None)
        kept = torch.cat([each.assignment.kept_GSK.flatten() for each in told.classes])
        return 1 - kept.float().mean().item()

    def slots(self, images: int) -> list[tuple[int, int]]:
        """Slots of all experts, filled or not, and their width, for each width class."""
        return [
            (images // GROUP * EXPERTS * self.sparse.capacity(of_class, TOKENS), segment.dim)
            for segment in self.layout.segments
            for of_class in (GROUP * (segment.stop - segment.start),)
        ]

    def floor_ms(self, device: Accelerator, rows: int, *, training: bool) -> float:
        """What the accelerator leaves it for so many tokens."""
        return experts_ms(
            device,
            self.slots(rows // TOKENS),
            self.hidden,
            experts=EXPERTS,
            out_features=rows * self.layout.dim,
            training=training,
        )


def measure(setting: Setting) -> list[BenchRow]:
    """All rows, one group per baseline."""
    torch.manual_seed(0)
    rows = []
    for k in (1,) if setting.quick else (1, 2):
        for training in (False, True):
            rows += compare_layers(setting, "S" if setting.quick else "B", k, training=training)
    return rows


def compare_layers(setting: Setting, size: str, k: int, *, training: bool) -> list[BenchRow]:
    """The layer, flat and nested, against the dense MLP on K * T tokens."""
    case = "moe_layer/train" if training else "moe_layer/forward"
    config, device = VIT_SIZES[size], setting.accelerator

    def of(module: nn.Module, what: str, tokens: int) -> Case:
        module.to(setting.device, setting.dtype)
        x_NBD = torch.randn(tokens, setting.images, config.dim)
        x_NBD = x_NBD.to(setting.device, setting.dtype)
        if isinstance(module, Layer):
            what += f", {module.dropped(x_NBD):.1%} dropped"
        return Case(
            case=case,
            shape=f"{size}/16 B={setting.images} N={TOKENS} K={k} {what}",
            run=forward_backward(module, x_NBD) if training else forward(module, x_NBD),
            floor_ms=device and module.floor_ms(device, tokens * setting.images, training=training),
        )

    layers = [
        of(Layer(config, k, 1.0), f"E={EXPERTS} C={CAPACITY_RATIO}", TOKENS),
        of(Layer(config, k, NESTED), f"E={EXPERTS} C={CAPACITY_RATIO} e_c={NESTED}", TOKENS),
    ]
    if setting.device == "cpu" and has_onednn():
        own = of(OwnMlp(config), "dense", k * TOKENS)
        layers += [through_onednn(each) for each in (own, *layers)]
    return compare(of(PlainMlp(config), "dense", k * TOKENS), layers, setting)


if __name__ == "__main__":
    main("moe_layer", measure)
