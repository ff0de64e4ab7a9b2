"""No recipe changes unseen: configuration, parameters and cost are compared with kept texts."""

import difflib

import pytest

from pipelines.recipes import RECIPES
from tests.golden.write import FOLDER, golden, golden_file

HINT = "If it is meant, run `python -m tests.golden.write` and look at the difference in git."


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_what_it_was(recipe):
    assert golden_file(recipe).is_file(), f"{recipe} has no text yet. {HINT}"

    before, now = golden_file(recipe).read_text(), golden(recipe)

    lines = difflib.unified_diff(before.splitlines(), now.splitlines(), "before", "now", n=0)
    assert before == now, "\n".join([f"recipe {recipe} changed:", *lines, HINT])


def test_every_kept_text_is_of_a_recipe():
    assert {path.stem for path in FOLDER.glob("*.txt")} == set(RECIPES), HINT
