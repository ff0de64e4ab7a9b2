"""Recipes: a function per setting that returns a whole `RunConfig`.

A recipe's docstring says where its values come from, the command, and what was
measured with it, or that it has not been run yet.
"""

from collections.abc import Callable

from pipelines.config import RunConfig
from pipelines.errors import UsageError, unknown_name
from pipelines.recipes.clips import clips
from pipelines.recipes.digits import digits
from pipelines.recipes.digits_vmoe import digits_nested_vmoe, digits_vmoe
from pipelines.recipes.mone_vit import mone_vit_b16, mone_vit_l16, mone_vit_s16
from pipelines.recipes.mone_vivit import mone_vivit_k400, mone_vivit_ssv2
from pipelines.recipes.motion import motion_vivit
from pipelines.recipes.photos import photos
from pipelines.recipes.vmoe import vmoe_b16_i21k

RECIPES: dict[str, Callable[[], RunConfig]] = {
    recipe.__name__: recipe
    for recipe in (
        digits,
        digits_vmoe,
        digits_nested_vmoe,
        motion_vivit,
        photos,
        clips,
        mone_vit_s16,
        mone_vit_b16,
        mone_vit_l16,
        vmoe_b16_i21k,
        mone_vivit_k400,
        mone_vivit_ssv2,
    )
}


def get_recipe(name: str) -> RunConfig:
    """The configuration of a recipe.

    Raises:
        UsageError: No such recipe; names near matches.
    """
    if name not in RECIPES:
        raise UsageError(
            unknown_name("recipe", name, RECIPES, next_step="`mone recipes` lists them all.")
        )
    return RECIPES[name]()
