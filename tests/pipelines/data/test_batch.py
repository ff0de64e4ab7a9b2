"""The hand-over from data to training."""

import torch

from pipelines.data.batch import Batch, model_input


def test_bytes_become_numbers_between_minus_one_and_one_channels_first():
    pixels_BHWC = torch.tensor([[[[0, 255, 51]]]], dtype=torch.uint8)

    x_BCHW = model_input(pixels_BHWC)

    assert x_BCHW.dtype == torch.float32
    assert x_BCHW.shape == (1, 3, 1, 1)
    torch.testing.assert_close(x_BCHW.flatten(), torch.tensor([-1.0, 1.0, -0.6]))
    assert pixels_BHWC.flatten().tolist() == [0, 255, 51]


def test_axes_keep_their_meaning():
    pixels_BHWC = torch.arange(2 * 4 * 5 * 3, dtype=torch.uint8).reshape(2, 4, 5, 3)

    x_BCHW = model_input(pixels_BHWC)

    assert x_BCHW.shape == (2, 3, 4, 5)
    assert x_BCHW[1, 2, 3, 4] == pixels_BHWC[1, 3, 4, 2] / 127.5 - 1


def test_a_batch_moves_whole():
    batch = Batch(
        pixels_BHWC=torch.zeros(2, 4, 4, 3, dtype=torch.uint8),
        labels_B=torch.zeros(2, dtype=torch.int64),
        valid_B=torch.ones(2, dtype=torch.bool),
    )

    moved = batch.moved(lambda tensor: tensor.to("meta"))

    assert {moved.pixels_BHWC.device, moved.labels_B.device, moved.valid_B.device} == {
        torch.device("meta")
    }
    assert moved.pixels_BHWC.shape == (2, 4, 4, 3)
