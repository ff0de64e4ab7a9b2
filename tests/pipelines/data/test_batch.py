"""The hand-over from data to training."""

import numpy as np
import pytest
import torch

from pipelines.data.batch import Batch, model_input
from pipelines.data.pixels.mixup import mixing_weights
from pipelines.data.settings import AugmentConfig

CLASSES = 6


def batch_of(pixels, labels, mix=None):
    """A batch of the last rows; the first are there to be mixed in."""
    samples = len(labels) if mix is None else len(mix)
    return Batch(
        pixels_RTHWC=pixels, labels_R=labels, valid_B=torch.ones(samples, dtype=bool), mix_BM=mix
    )


def global_batch(samples, images, *, frames=1, seed=0):
    """Pixels, labels and mixing weights of a whole step."""
    torch.manual_seed(seed)
    pixels = torch.randint(0, 256, (samples, frames, 4, 5, 3), dtype=torch.uint8)
    labels = torch.randint(0, CLASSES, (samples,))
    augment = AugmentConfig(mixup=0.7, mixup_images=images)
    weights = np.stack([mixing_weights(augment, seed, 0, sample) for sample in range(samples)])
    return pixels, labels, torch.from_numpy(weights)


def rank_batch(pixels, labels, weights, *, rank, world):
    """What a rank reads: its rows, and those before its first, around the end of the batch."""
    size, extra = len(labels) // world, weights.shape[1] - 1
    rows = torch.arange(rank * size - extra, (rank + 1) * size) % len(labels)
    return batch_of(pixels[rows], labels[rows], weights[rows[extra:]])


def slowly_mixed(pixels, labels, weights):
    """One sample and one image after the other, over the global batch."""
    samples, images = weights.shape
    x = [model_input(pixels[i : i + 1])[0].double() for i in range(samples)]
    inputs, targets = [], torch.zeros(samples, CLASSES, dtype=torch.float64)
    for i in range(samples):
        inputs.append(sum(weights[i, m].double() * x[(i - m) % samples] for m in range(images)))
        for m in range(images):
            targets[i, labels[(i - m) % samples]] += weights[i, m].double()
    return torch.stack(inputs), targets


def test_bytes_become_numbers_between_minus_one_and_one_channels_first():
    pixels_RTHWC = torch.tensor([[[[[0, 255, 51]]]]], dtype=torch.uint8)

    x_RCHW = model_input(pixels_RTHWC)

    assert x_RCHW.dtype == torch.float32
    assert x_RCHW.shape == (1, 3, 1, 1)
    torch.testing.assert_close(x_RCHW.flatten(), torch.tensor([-1.0, 1.0, -0.6]))
    assert pixels_RTHWC.flatten().tolist() == [0, 255, 51]


def test_axes_of_images_keep_their_meaning():
    pixels_RTHWC = torch.arange(2 * 4 * 5 * 3, dtype=torch.uint8).reshape(2, 1, 4, 5, 3)

    x_RCHW = model_input(pixels_RTHWC)

    assert x_RCHW.shape == (2, 3, 4, 5)
    assert x_RCHW[1, 2, 3, 4] == pixels_RTHWC[1, 0, 3, 4, 2] / 127.5 - 1


def test_axes_of_clips_keep_their_meaning():
    pixels_RTHWC = torch.arange(2 * 3 * 2 * 5 * 3, dtype=torch.uint8).reshape(2, 3, 2, 5, 3)

    x_RTCHW = model_input(pixels_RTHWC)

    assert x_RTCHW.shape == (2, 3, 3, 2, 5)
    assert x_RTCHW[1, 2, 0, 1, 4] == pixels_RTHWC[1, 2, 1, 4, 0] / 127.5 - 1


def test_numbers_have_the_dtype_that_new_weights_have():
    torch.set_default_dtype(torch.float64)
    try:
        x = model_input(torch.tensor([[[[[0, 255, 51]]]]], dtype=torch.uint8))
    finally:
        torch.set_default_dtype(torch.float32)

    assert x.dtype == torch.float64
    torch.testing.assert_close(x.flatten(), torch.tensor([-1.0, 1.0, -0.6], dtype=torch.float64))


@pytest.mark.parametrize("images", [1, 2])
def test_a_batch_moves_whole(images):
    pixels, labels, weights = global_batch(4, 2)
    batch = batch_of(pixels, labels, None if images == 1 else weights[1:])

    moved = batch.moved(lambda tensor: tensor.to("meta"))

    tensors = [moved.pixels_RTHWC, moved.labels_R, moved.valid_B]
    tensors += [] if images == 1 else [moved.mix_BM]
    assert {tensor.device for tensor in tensors} == {torch.device("meta")}
    assert (moved.mix_BM is None) == (images == 1)
    assert moved.pixels_RTHWC.shape == (4, 1, 4, 5, 3)
    assert moved.samples == batch.samples


def test_without_mixup_inputs_and_targets_are_the_rows_themselves():
    pixels, labels, _ = global_batch(6, 2)
    batch = batch_of(pixels, labels)

    assert (batch.samples, batch.views) == (6, 1)
    assert torch.equal(batch.inputs(), model_input(pixels))
    assert batch.targets(CLASSES) is labels


def test_views_of_a_sample_are_rows_next_to_each_other():
    pixels = torch.zeros(6, 2, 4, 4, 3, dtype=torch.uint8)
    valid = torch.tensor([True, False])
    labels = torch.tensor([3, 3, 3, 0, 0, 0])

    batch = Batch(pixels_RTHWC=pixels, labels_R=labels, valid_B=valid)

    assert (batch.samples, batch.views) == (2, 3)


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("images", [2, 3])
@pytest.mark.parametrize(("world", "parts"), [(1, 1), (1, 4), (2, 1), (2, 2), (4, 3), (12, 1)])
def test_mixing_is_that_of_a_slow_loop_over_the_global_batch(world, parts, images, frames):
    whole = global_batch(12, images, frames=frames)
    inputs, targets = slowly_mixed(*whole)

    ours = [
        part
        for rank in range(world)
        for part in rank_batch(*whole, rank=rank, world=world).parts(parts)
    ]

    assert {(part.samples, part.views) for part in ours} == {(12 // world // parts, 1)}
    mixed = torch.cat([part.inputs() for part in ours])
    torch.testing.assert_close(mixed.double(), inputs, rtol=0, atol=1e-6)
    shares = torch.cat([part.targets(CLASSES) for part in ours])
    assert shares.dtype == torch.float32
    torch.testing.assert_close(shares.double(), targets, rtol=0, atol=1e-6)
    torch.testing.assert_close(shares.sum(1), torch.ones(12))


def test_however_many_ranks_share_a_batch_it_is_mixed_to_the_same_bits():
    whole = global_batch(12, 3)
    alone = rank_batch(*whole, rank=0, world=1)

    for world in (2, 6):
        ranks = [rank_batch(*whole, rank=rank, world=world) for rank in range(world)]
        assert torch.equal(torch.cat([rank.inputs() for rank in ranks]), alone.inputs())
        targets = torch.cat([rank.targets(CLASSES) for rank in ranks])
        assert torch.equal(targets, alone.targets(CLASSES))


def test_parts_of_a_batch_without_mixup_share_its_rows_out():
    pixels, labels, _ = global_batch(6, 2)

    parts = list(batch_of(pixels, labels).parts(3))

    assert torch.equal(torch.cat([part.pixels_RTHWC for part in parts]), pixels)
    assert torch.equal(torch.cat([part.labels_R for part in parts]), labels)
    assert [part.samples for part in parts] == [2, 2, 2]


def test_mixing_changes_no_pixels_of_the_batch():
    pixels, labels, weights = global_batch(5, 2)
    batch = batch_of(pixels.clone(), labels, weights[1:])

    first = batch.inputs()

    assert torch.equal(batch.pixels_RTHWC, pixels)
    assert torch.equal(batch.inputs(), first)
