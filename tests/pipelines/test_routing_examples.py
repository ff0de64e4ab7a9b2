"""The record of routed images, and the arithmetic on its pixels."""

import numpy as np
import pytest

from pipelines.routing_examples import RoutingExamples, highlighted, outline


def examples(**changes):
    fields = {
        "images_uint8": np.zeros((2, 8, 8, 3), np.uint8),
        "labels": ("cat", "dog"),
        "predictions": (("cat", "cat"), ("cat", "dog")),
        "budgets": (0.3, 1.0),
        "expert": np.array([[[[0, 1], [2, 3]]] * 2, [[[3, 3], [3, 3]]] * 2]),
        "widths": (0.125, 0.25, 0.5, 1.0),
    }
    return RoutingExamples(**{**fields, **changes})


def test_full_names_the_tokens_of_the_widest_expert():
    assert examples().full(0, 1).tolist() == [[False, False], [False, True]]
    assert examples().full(1, 0).all()


@pytest.mark.parametrize(
    "changes",
    [
        {"labels": ("cat",)},
        {"predictions": (("cat",), ("dog",))},
        {"expert": np.full((2, 2, 2, 2), 4)},
        {"expert": np.zeros((2, 2, 4), int)},
        {"images_uint8": np.zeros((2, 8, 8, 3), np.float32)},
        {"images_uint8": np.zeros((2, 8, 8, 1), np.uint8)},
    ],
    ids=["labels", "predictions", "expert index", "expert rank", "pixel type", "channels"],
)
def test_parts_that_do_not_fit_each_other_are_refused_with_their_shapes(changes):
    with pytest.raises(ValueError, match=r"routing examples do not fit each other: .* expected"):
        examples(**changes)


def test_chosen_tokens_keep_their_pixels_and_the_others_turn_pale_grey():
    picture = np.full((4, 4, 3), (200, 30, 10), np.uint8)

    shown = highlighted(picture, np.array([[True, False], [False, False]]))

    assert (shown[:2, :2] == picture[:2, :2]).all()
    pale = shown[2:, 2:].reshape(-1, 3)
    assert (pale == pale[0, 0]).all()
    assert pale[0, 0] > 180


def test_a_grid_that_does_not_divide_the_picture_is_stretched_over_it():
    shown = highlighted(np.zeros((7, 5, 3), np.uint8), np.array([[True, False]]))

    assert shown[:, :, 0].astype(bool).tolist() == [[False, False, False, True, True]] * 7


def test_the_outline_of_one_token_has_four_edges():
    segments = outline(np.array([[False, False], [False, True]]))

    edges = {tuple(map(tuple, segment.astype(int).tolist())) for segment in segments}
    assert edges == {((1, 1), (2, 1)), ((1, 2), (2, 2)), ((1, 1), (1, 2)), ((2, 1), (2, 2))}


def test_tokens_that_touch_share_one_outline():
    assert len(outline(np.ones((3, 3), bool))) == 12
    assert len(outline(np.zeros((3, 3), bool))) == 0
