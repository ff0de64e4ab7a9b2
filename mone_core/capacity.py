"""From a compute budget to whole tokens per nested expert.

A budget is the *effective capacity* e_c: the mean width that a token is computed at, as a
fraction of the full model. A *capacity distribution* c says which share of an image's
tokens each nested expert gets; `token_counts` turns shares into whole tokens. Which tokens
those are is decided elsewhere (`routing`).

Pure Python: everything here is known before a step is traced, so that shapes never depend
on data. Experts are listed narrowest first.

Source: arXiv 2407.19985, section 4.3 and eq. 3.
"""

import math
from collections.abc import Sequence
from typing import Literal, get_args

from mone_core.errors import CapacityError

NESTED_WIDTHS = (0.125, 0.25, 0.5, 1.0)
Form = Literal["fraction", "product"]

# A share of tokens such as .25 * 196 may come out of the solver a hair below 49.
_FLOOR_GUARD = 1e-6
_BISECTIONS = 200


def capacity_distribution(
    effective_capacity: float,
    widths: Sequence[float] = NESTED_WIDTHS,
    *,
    delta: float = 2.0,
    beta: float = 10.0,
    form: Form = "fraction",
) -> tuple[float, ...]:
    """Choose the share of tokens that each nested expert handles.

    Maximises `sum(c[i] * w[i]) + beta * entropy(c)` under two linear constraints: shares add
    up to 1, and the mean width is the effective capacity. The optimum is a softmax of
    `w[i] / beta + lam * widths[i]` with one unknown `lam`, found by bisection, so there is no
    solver to depend on and the answer is the same on every host.

    Args:
        effective_capacity: Mean width per token as a fraction of the full width, from
            the first to the last of `widths`.
        widths: Width of each expert as a fraction of the full width, rising.
        delta: Base of the preference `w` between neighbouring experts, above 1.
        beta: Weight of the entropy, above 0; large values even the shares out.
        form: How eq. 3 is read for expert i counted from 0: "fraction" is
            `w[i] = delta ** -i`, the formula as printed; "product" is `w[i] = delta ** i`,
            the prose around it. At the defaults they differ by less than 0.008 per share.

    Returns:
        One share per expert, narrowest first, adding up to 1.

    Raises:
        CapacityError: The budget is out of reach, or a parameter is outside its range.
    """
    check_widths(widths)
    check_reachable(effective_capacity, widths)
    if not (delta > 1 and beta > 0):
        raise CapacityError(f"delta must be above 1 and beta above 0, got {delta=} and {beta=}")
    if form not in get_args(Form):
        raise CapacityError(f"form {form!r} does not exist; it must be one of {get_args(Form)}")
    if effective_capacity in (widths[0], widths[-1]):  # the ends are one-hot, lam infinite
        return tuple(float(width == effective_capacity) for width in widths)
    sign = {"fraction": -1, "product": 1}[form]
    preference = [delta ** (sign * i) / beta for i in range(len(widths))]
    return _tilted_to(effective_capacity, preference, widths)


def token_counts(c: Sequence[float], num_tokens: int) -> tuple[int, ...]:
    """Turn shares into whole tokens of one image or frame.

    Every share is rounded down; what is left over goes to the narrowest expert
    (arXiv 2407.19985, algorithm 1).

    Args:
        c: Share per expert, narrowest first, adding up to 1.
        num_tokens: Tokens of the image or frame, N.

    Returns:
        Tokens per expert, narrowest first, adding up to `num_tokens`.
    """
    if any(share < 0 for share in c) or not math.isclose(sum(c), 1.0, abs_tol=1e-6):
        raise CapacityError(f"shares must be 0 or more and add up to 1, got {tuple(c)}")
    wider = [math.floor(share * num_tokens + _FLOOR_GUARD) for share in c[1:]]
    return (num_tokens - sum(wider), *wider)


def effective_capacity_of(counts: Sequence[int], widths: Sequence[float] = NESTED_WIDTHS) -> float:
    """The effective capacity that whole tokens per expert come to."""
    spent = sum(count * width for count, width in zip(counts, widths, strict=True))
    return spent / sum(counts)


def _tilted_to(
    effective_capacity: float, preference: Sequence[float], widths: Sequence[float]
) -> tuple[float, ...]:
    """Softmax of `preference + lam * widths` with the `lam` that spends the budget."""
    low, high = -1.0, 1.0
    while _mean_width(_softmax(preference, low, widths), widths) > effective_capacity:
        low *= 2
    while _mean_width(_softmax(preference, high, widths), widths) < effective_capacity:
        high *= 2
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        if middle in (low, high):  # neighbouring floats: as exact as it gets
            break
        below = _mean_width(_softmax(preference, middle, widths), widths) < effective_capacity
        low, high = (middle, high) if below else (low, middle)
    return _softmax(preference, 0.5 * (low + high), widths)


def _softmax(preference: Sequence[float], lam: float, widths: Sequence[float]) -> tuple[float, ...]:
    logits = [p + lam * width for p, width in zip(preference, widths, strict=True)]
    top = max(logits)
    weights = [math.exp(logit - top) for logit in logits]
    total = sum(weights)
    return tuple(weight / total for weight in weights)


def _mean_width(shares: Sequence[float], widths: Sequence[float]) -> float:
    return sum(share * width for share, width in zip(shares, widths, strict=True))


def check_widths(widths: Sequence[float]) -> None:
    """Refuse widths that do not rise to 1."""
    rising = list(widths) == sorted(set(widths))
    if not widths or not rising or widths[0] <= 0 or widths[-1] != 1.0:
        raise CapacityError(
            f"widths must rise strictly from above 0 to 1.0 (the full model), got {tuple(widths)}"
        )


def check_reachable(effective_capacity: float, widths: Sequence[float]) -> None:
    """Refuse a budget outside of the narrowest and the full width."""
    if len(widths) == 1 and effective_capacity != widths[0]:
        raise CapacityError(
            f"effective capacity {effective_capacity} is out of reach: a model of the one width "
            f"{widths[0]} has that budget only"
        )
    if not widths[0] <= effective_capacity <= widths[-1]:
        raise CapacityError(
            f"effective capacity {effective_capacity} is out of reach: with widths "
            f"{tuple(widths)} it must lie between {widths[0]} (all tokens at the narrowest) "
            f"and {widths[-1]} (all at the full width)"
        )
