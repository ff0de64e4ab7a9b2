"""Sparse experts on the demo's digits, flat and nested: small enough for two cores."""

from dataclasses import replace
from pathlib import Path

from mone_core.models import DENSE, ExpertsConfig
from pipelines.config import RunConfig
from pipelines.recipes.digits import digits


def digits_vmoe() -> RunConfig:
    """V-MoE on the demo's digits: every other MLP is four experts, of which a token takes one.

    Source: our own setting, in the manner of arXiv 2106.05974 (Every-2).
    Command: `mone train --recipe digits_vmoe --parallel.expert 2` spreads the experts over the
    two workers; without the flag each has all of them. Both train the same model.
    Not yet trained to its end: no number is claimed.
    """
    return _sparse("digits_vmoe", nested=False)


def digits_nested_vmoe() -> RunConfig:
    """Nested sparse experts on the demo's digits: the router gives each token a width too.

    Source: our own setting; `digits_vmoe` and `digits` at once.
    Command: `mone train --recipe digits_nested_vmoe --parallel.expert 2`.
    Not yet trained to its end: no number is claimed.
    """
    return _sparse("digits_nested_vmoe", nested=True)


def _sparse(name: str, *, nested: bool) -> RunConfig:
    base = digits()
    experts = ExpertsConfig(placement="every", spacing=2, num_experts=4, k=1, group_images=8)
    nesting = base.model.nesting if nested else DENSE
    plan = replace(base.train, steps=1200, eval_every=600)
    if not nested:
        plan = replace(plan, budgets=(1.0,), eval_budgets=(1.0,))
    return replace(
        base,
        recipe=name,
        out=Path("runs") / name,
        model=replace(base.model, nesting=nesting, experts=experts),
        train=plan,
    )
