"""Models on four XLA devices compute what one device does: outputs, gradients, three updates."""

import pytest
import torch
import torch_xla

from cluster.backends.xla import XlaBackend
from mone_core.load import load_sums
from tests.xla.small import CONFIGS, OneDevice, alone, far, spread_out, tensors

STEPS = 3
ACROSS_LIBRARIES = 1e-6  # torch_xla's GELU has constants of eight digits, in float64 too
SAME_LIBRARY = 1e-12


def assert_train_alike(many, one, tolerance, *, microbatches=1):
    """Three updates of both, compared after each."""
    for number in range(STEPS):
        output, *found, gradients = many.step(number, microbatches=microbatches)
        reference, *expected, reference_gradients = one.step(number)
        if microbatches == 1:
            pairs = list(zip(tensors(output), tensors(reference), strict=True))
            assert len(pairs) > 1
            assert max(far(*pair) for pair in pairs) < tolerance
        assert max(far(*pair) for pair in zip(found, expected, strict=True)) < tolerance
        for name, expected_gradient in reference_gradients.items():
            assert far(gradients[name], expected_gradient) < tolerance, name
    weights = dict(many.core.named_parameters())
    for name, expected_weight in one.core.named_parameters():
        assert far(weights[name], expected_weight) < tolerance, name
    return output, reference


@pytest.mark.parametrize(
    ("name", "expert"),
    [
        ("nested", 1),
        ("top 1", 4),
        ("batch priority", 2),
        ("experts choose", 2),
        ("nested sparse", 1),
        ("nested sparse", 2),
        ("nested sparse", 4),
    ],
)
def test_four_devices_train_as_torch_does_on_a_processor(name, expert):
    many = spread_out(CONFIGS[name], XlaBackend(expert))
    one = alone(CONFIGS[name], OneDevice(torch.device("cpu")))

    output, reference = assert_train_alike(many, one, ACROSS_LIBRARIES)

    if output.dispatched:
        config = CONFIGS[name]
        found, expected = (
            load_sums(each.dispatched, config.dims, routing=config.experts.routing)
            for each in (output, reference)
        )
        assert far(found, expected) < ACROSS_LIBRARIES


def test_split_weights_train_as_whole_ones():
    many = spread_out(CONFIGS["nested"], XlaBackend(1), shard=True)
    one = alone(CONFIGS["nested"], OneDevice(torch.device("cpu")))

    assert_train_alike(many, one, ACROSS_LIBRARIES)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_noise_is_drawn_once_for_all_devices_and_microbatches(microbatches):
    backend = XlaBackend(2)
    many = spread_out(CONFIGS["noisy"], backend)
    one = alone(
        CONFIGS["noisy"], OneDevice(backend.device, seed=backend.seed, submit=backend.submit)
    )

    assert_train_alike(many, one, SAME_LIBRARY, microbatches=microbatches)


def test_a_model_that_is_evaluated_gives_the_same_answers():
    many = spread_out(CONFIGS["nested sparse"], XlaBackend(2))
    one = alone(CONFIGS["nested sparse"], OneDevice(torch.device("cpu")))
    many.core.eval(), one.core.eval()
    pixels = torch.randn(8, 3, 8, 8, dtype=torch.float64)

    with torch.no_grad():
        found, expected = many.model(many.backend.put(pixels)), one.model(pixels)
    torch_xla.sync()

    assert found.aux_loss.item() == 0
    assert far(found.logits_BK, expected.logits_BK) < ACROSS_LIBRARIES
