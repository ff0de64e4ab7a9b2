"""Other ways to write nested layers and their gradients, against the ones that `nested` has.

    python -m tests.benchmarks.bench_forms --threads 1

Each form computes the same numbers; what lost is told in LOG.md.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mone_core.capacity import capacity_distribution, token_counts
from mone_core.gemm import linear_grad_parameters
from mone_core.models import VIT_SIZES
from mone_core.nested import Layout, nested_in, nested_mlp, nested_out
from tests.benchmarks.harness import BenchRow, Case, Setting, compare, main

BATCH, TOKENS = 8, 196


class Operands:
    """An MLP's two layers on random tokens: D in, 4D hidden, D out."""

    def __init__(self, setting: Setting, size: str, budget: float) -> None:
        config = VIT_SIZES[size]
        dim, hidden = config.dim, 4 * config.dim
        counts = token_counts(capacity_distribution(budget), TOKENS)
        self.layout = Layout.of(counts, config.dims)

        def random(*shape: int) -> Tensor:
            return 0.02 * torch.randn(*shape, device=setting.device, dtype=setting.dtype)

        self.x_NBD, self.h_NBF = random(TOKENS, BATCH, dim), random(TOKENS, BATCH, hidden)
        self.up_FD, self.up_bias_F = random(hidden, dim), random(hidden)
        self.down_DF, self.down_bias_D = random(dim, hidden), random(dim)
        self.gate_NB1 = random(TOKENS, BATCH, 1)
        self.mask_N1D = torch.zeros_like(self.x_NBD[:, :1])
        for segment in self.layout.segments:
            self.mask_N1D[segment.start : segment.stop, :, : segment.dim] = 1

    def up_dense(self) -> Tensor:
        """Full width for every token: not the same numbers, the baseline."""
        return F.linear(self.x_NBD, self.up_FD, self.up_bias_F)

    def up_nested(self) -> Tensor:
        """What `mone_core.nested` does: one product per width class, written in place."""
        return nested_in(self.x_NBD, self.up_FD, self.up_bias_F, self.layout)

    def up_masked(self) -> Tensor:
        """Full width on tokens with zeros past their width."""
        return F.linear(self.x_NBD * self.mask_N1D, self.up_FD, self.up_bias_F)

    def up_joined(self) -> Tensor:
        """One product per width class, then joined by a copy."""
        parts = [
            F.linear(
                self.x_NBD[s.start : s.stop, :, : s.dim], self.up_FD[:, : s.dim], self.up_bias_F
            )
            for s in self.layout.segments
        ]
        return torch.cat(parts)

    def down_dense(self) -> Tensor:
        """Full width for every token: not the same numbers, the baseline."""
        return self.x_NBD + self.gate_NB1 * F.linear(self.h_NBF, self.down_DF, self.down_bias_D)

    def down_nested(self) -> Tensor:
        """What `mone_core.nested` does: one product per width class, added where it belongs."""
        weights = (self.down_DF, self.down_bias_D)
        return nested_out(self.x_NBD, self.h_NBF, *weights, self.layout, self.gate_NB1)

    def down_masked(self) -> Tensor:
        """Full width, then zeros past each token's width."""
        branch = F.linear(self.h_NBF, self.down_DF, self.down_bias_D)
        return self.x_NBD + self.gate_NB1 * self.mask_N1D * branch

    def down_banded(self) -> Tensor:
        """One product per band of features, each for all tokens at least that wide."""
        out = self.x_NBD.clone()
        for tokens, columns in bands(self.layout):
            branch = F.linear(self.h_NBF[:tokens], self.down_DF[columns], self.down_bias_D[columns])
            out[:tokens, :, columns].addcmul_(branch, self.gate_NB1[:tokens])
        return out

    def mlp_dense(self) -> Tensor:
        """Full width for every token: not the same numbers, the baseline."""
        h_NBF = F.gelu(self.up_dense(), approximate="tanh")
        return self.x_NBD + self.gate_NB1 * F.linear(h_NBF, self.down_DF, self.down_bias_D)

    def mlp_nested(self) -> Tensor:
        """What `mone_core.nested` does: in, GELU and out class by class."""
        weights = (self.up_FD, self.up_bias_F, self.down_DF, self.down_bias_D)
        return nested_mlp(self.x_NBD, self.x_NBD, *weights, self.layout, self.gate_NB1)

    def mlp_apart(self) -> Tensor:
        """All classes in, then torch's GELU of everything, then all classes out."""
        h_NBF = F.gelu(self.up_nested(), approximate="tanh")
        weights = (self.down_DF, self.down_bias_D)
        return nested_out(self.x_NBD, h_NBF, *weights, self.layout, self.gate_NB1)

    def grad_dense(self) -> Tensor:
        """Full width for every token: not the same numbers, the baseline."""
        h_RF, x_RD = self.h_NBF.flatten(0, 1), self.x_NBD.flatten(0, 1)
        grad_FD, _ = h_RF.t() @ x_RD, h_RF.sum(0)  # weight and bias
        return grad_FD

    def grad_nested(self) -> Tensor:
        """What `mone_core.nested` does: one product per width class, added to its prefix."""
        h_RF, x_RD = self.h_NBF.flatten(0, 1), self.x_NBD.flatten(0, 1)
        grad_FD, grad_F = torch.empty_like(self.up_FD), torch.empty_like(self.up_bias_F)
        for s in self.layout.segments:
            rows = slice(s.start * BATCH, s.stop * BATCH)
            parameters = (grad_FD[:, : s.dim], grad_F)
            linear_grad_parameters(
                h_RF[rows], x_RD[rows, : s.dim], *parameters, accumulate=s.start > 0
            )
        return grad_FD

    def grad_banded(self) -> Tensor:
        """One product per band of features, each element written once."""
        h_RF, x_RD = self.h_NBF.flatten(0, 1), self.x_NBD.flatten(0, 1)
        grad_FD, _ = torch.empty_like(self.up_FD), h_RF.sum(0)
        for tokens, columns in bands(self.layout):
            rows = slice(tokens * BATCH)
            torch.mm(h_RF[rows].t(), x_RD[rows, columns], out=grad_FD[:, columns])
        return grad_FD


def bands(layout: Layout) -> list[tuple[int, slice]]:
    """Features cut where a width class ends, and how many tokens have those of each cut."""
    narrowest_first = layout.segments[::-1]
    lows = (0, *(segment.dim for segment in narrowest_first))
    return [
        (segment.stop, slice(low, segment.dim))
        for segment, low in zip(narrowest_first, lows, strict=False)
    ]


FORMS = {
    "up": ("masked", "joined", "nested"),
    "down": ("masked", "banded", "nested"),
    "mlp": ("apart", "nested"),
    "grad": ("banded", "nested"),
}


def measure(setting: Setting) -> list[BenchRow]:
    """All rows, one group per layer, size and budget."""
    torch.manual_seed(0)
    rows = []
    for size in ("S",) if setting.quick else ("S", "B"):
        for budget in (0.3,) if setting.quick else (0.3, 0.5):
            operands = Operands(setting, size, budget)
            for layer, forms in FORMS.items():
                dense, *others = (
                    Case(
                        case=f"forms/{layer}",
                        shape=f"{size}/16 B={BATCH} N={TOKENS} e_c={budget} {form}",
                        run=_inference(getattr(operands, f"{layer}_{form}")),
                    )
                    for form in ("dense", *forms)
                )
                rows += compare(dense, others, setting)
    return rows


def _inference(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return torch.inference_mode()(run)


if __name__ == "__main__":
    main("forms", measure)
