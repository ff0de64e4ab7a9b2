"""A model as one of many ranks: which part of it a rank keeps, and which weights are whose.

Only sparse experts are spread. A nested model without them gains nothing from it: its experts
are prefixes of one set of weights that every rank needs anyway, and expert preferred routing
gives every image, so every rank, the same work. Data parallelism is its best case; sending its
tokens to ranks by width would add an exchange and save nothing.
"""

from torch import nn

from mone_core.bank import ExpertBank
from mone_core.experts import SparseMlp
from mone_core.models.encoder import Encoder
from mone_core.ranks import Ranks


def spread(model: nn.Module, ranks: Ranks) -> None:
    """Make a whole model this rank's part of it: its experts, its images' share of what is drawn.

    Call it once, on weights that are the same on all ranks.

    Args:
        model: Changed in place; parameters of experts become those of this rank.
        ranks: The ranks, this one among them.
    """
    for name, module in model.named_modules():
        if isinstance(module, SparseMlp):
            module.spread(ranks, name)
        elif isinstance(module, Encoder):
            module.ranks = ranks


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are stacked by expert, by name: those that ranks do not all hold."""
    return {
        f"{name}.{part}": parameter
        for name, module in model.named_modules()
        if isinstance(module, ExpertBank)
        for part, parameter in module.named_parameters()
    }
