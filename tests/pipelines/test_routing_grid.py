"""The routing grid as a picture: its size, what is coloured where, whose names it survives."""

import io

import numpy as np
import pytest
from PIL import Image

from pipelines.routing_examples import RoutingExamples
from pipelines.routing_grid import routing_grid, width_name


def examples(size=(32, 32), budgets=(0.3, 0.5), images=2, name="seven"):
    noise = np.random.default_rng(0)
    expert = noise.integers(0, 4, (len(budgets), images, 4, 4))
    return RoutingExamples(
        images_uint8=noise.integers(0, 255, (images, *size, 3), dtype=np.uint8),
        labels=(name,) * images,
        predictions=((name, *["one"] * (len(budgets) - 1)),) * images,
        budgets=budgets,
        expert=expert,
        widths=(0.125, 0.25, 0.5, 1.0),
    )


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def has_colour(picture, colour, within=6):
    return bool((np.abs(picture - np.array(colour)).max(axis=2) <= within).any())


def test_the_grid_is_a_png_with_right_and_wrong_in_their_colours():
    picture = pixels(routing_grid(examples()))

    assert has_colour(picture, (26, 127, 75))
    assert has_colour(picture, (180, 35, 24))


def test_one_more_image_adds_one_row():
    two = pixels(routing_grid(examples(images=2)))
    three = pixels(routing_grid(examples(images=3)))

    assert three.shape[1] == two.shape[1]
    assert three.shape[0] > two.shape[0]


def test_pictures_keep_their_proportions():
    square = pixels(routing_grid(examples(size=(32, 32))))
    flat = pixels(routing_grid(examples(size=(16, 32))))

    assert flat.shape[0] < 0.75 * square.shape[0]


@pytest.mark.parametrize("columns", [1, 6])
def test_few_or_many_budgets_fit_the_page(columns):
    budgets = (0.2, 0.3, 0.4, 0.5, 0.7, 1.0)[:columns]

    picture = pixels(routing_grid(examples(budgets=budgets)))

    assert picture.shape[1] <= 2000


@pytest.mark.parametrize("name", ["$x^{2$", "<b>", "日本", "n" * 200, ""])
def test_class_names_are_drawn_literally(name):
    picture = pixels(routing_grid(examples(name=name, images=1)))

    assert picture.shape == pixels(routing_grid(examples(name="cat", images=1))).shape


def test_widths_are_named_as_people_say_them():
    assert [width_name(width) for width in (0.125, 1 / 3, 0.4, 1.0)] == [
        "1/8",
        "1/3",
        "0.4",
        "full",
    ]
