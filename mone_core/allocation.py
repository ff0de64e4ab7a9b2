"""Other ways to spend a budget: the capacity distributions that MoNE's own is compared with.

The paper's distribution is `mone_core.capacity.capacity_distribution`; these are the simpler ones
of its table 2, and the constant width of MatViT. All list shares narrowest first, add up to 1
and refuse a budget that they cannot meet.

Source: arXiv 2407.19985, section 6 and table 2.
"""

import math
from collections.abc import Sequence
from typing import Literal

from mone_core.capacity import check_reachable, check_widths
from mone_core.errors import CapacityError

Allocation = Literal["entropy", "greedy", "uniform", "proportionate", "mod_greedy"]

# Budgets that one number alone can meet are named to two digits in the paper: .27 for 4/15.
_ROUNDED = 0.005


def greedy(effective_capacity: float, widths: Sequence[float]) -> tuple[float, ...]:
    """As many tokens as possible at full width, all others at the narrowest."""
    check_widths(widths)
    check_reachable(effective_capacity, widths)
    if len(widths) == 1:
        return (1.0,)
    full = (effective_capacity - widths[0]) / (widths[-1] - widths[0])
    return (1 - full, *(0.0 for _ in widths[1:-1]), full)


def mod_greedy(effective_capacity: float, widths: Sequence[float]) -> tuple[float, ...]:
    """A share e_c of the tokens at full width; the first share is of tokens that skip all blocks.

    Source: table 2, "MoD greedy".
    """
    check_widths(widths)
    if not 0 < effective_capacity <= 1:
        raise CapacityError(
            f"effective capacity {effective_capacity} is out of reach: with allocation "
            f"mod_greedy it must be above 0 (all tokens skip) and at most 1"
        )
    if len(widths) == 1:
        raise CapacityError(
            f"allocation mod_greedy needs a narrow expert whose tokens skip, got widths "
            f"{tuple(widths)}; use two widths or more"
        )
    return (1 - effective_capacity, *(0.0 for _ in widths[1:-1]), effective_capacity)


def uniform(effective_capacity: float, widths: Sequence[float]) -> tuple[float, ...]:
    """The same share for every expert: meets one budget only, the mean of `widths`."""
    return _only("uniform", effective_capacity, widths, [1.0] * len(widths))


def proportionate(effective_capacity: float, widths: Sequence[float]) -> tuple[float, ...]:
    """Every expert costs the same in all: shares inverse to width. Meets one budget only."""
    return _only("proportionate", effective_capacity, widths, [1 / width for width in widths])


def constant(effective_capacity: float, widths: Sequence[float]) -> tuple[float, ...]:
    """All tokens at the one width that equals the budget."""
    check_widths(widths)
    if effective_capacity not in widths:
        raise CapacityError(
            f"effective capacity {effective_capacity} is out of reach: at a constant width it must "
            f"be one of {tuple(widths)}"
        )
    return tuple(float(width == effective_capacity) for width in widths)


def _only(
    name: str, effective_capacity: float, widths: Sequence[float], weights: Sequence[float]
) -> tuple[float, ...]:
    check_widths(widths)
    shares = tuple(weight / sum(weights) for weight in weights)
    meets = sum(share * width for share, width in zip(shares, widths, strict=True))
    if not math.isclose(effective_capacity, meets, abs_tol=_ROUNDED):
        raise CapacityError(
            f"effective capacity {effective_capacity} is out of reach: allocation {name} with "
            f"widths {tuple(widths)} meets {meets:.4f} only"
        )
    return shares
