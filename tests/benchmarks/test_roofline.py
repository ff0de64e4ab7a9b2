"""Floors of layers by formula, against tables worked out elsewhere."""

import pytest

from mone_core.capacity import capacity_distribution, token_counts
from mone_core.models import VIT_SIZES
from mone_core.nested import Layout
from tests.benchmarks.roofline import ACCELERATORS, Accelerator, block_ms, experts_ms, mlp_ms

A100 = ACCELERATORS["NVIDIA A100-SXM4-80GB"]
H100 = ACCELERATORS["NVIDIA H100 80GB HBM3"]
H200 = ACCELERATORS["NVIDIA H200"]
IMAGES, TOKENS, DIM, HIDDEN = 128, 196, 768, 3072

# Time of a nested block over the dense one at e_c .3, .5 and .7.
ROOFLINES = {
    ("S", 196): {A100: (0.56, 0.68, 0.80), H100: (0.76, 0.82, 0.89), H200: (0.64, 0.73, 0.83)},
    ("B", 196): {A100: (0.42, 0.59, 0.75), H100: (0.53, 0.65, 0.79), H200: (0.46, 0.61, 0.76)},
    ("L", 196): {A100: (0.39, 0.56, 0.74), H100: (0.46, 0.61, 0.77), H200: (0.41, 0.58, 0.75)},
    ("B", 576): {A100: (0.49, 0.64, 0.78), H100: (0.58, 0.69, 0.81), H200: (0.52, 0.66, 0.79)},
}


@pytest.mark.parametrize(("size", "num_tokens"), ROOFLINES)
def test_a_nested_block_saves_what_the_table_of_rooflines_says(size, num_tokens):
    config = VIT_SIZES[size]
    dense = Layout.of((num_tokens,), (config.dim,))

    for device, expected in ROOFLINES[size, num_tokens].items():
        ratios = [
            block_ms(device, _nested(budget, num_tokens, config.dims), IMAGES, training=False)
            / block_ms(device, dense, IMAGES, training=False)
            for budget in (0.3, 0.5, 0.7)
        ]
        assert ratios == pytest.approx(expected, abs=0.007)


def test_a_block_takes_its_operations_where_memory_is_free():
    """Products at 70 % and attention's core at 35 % of peak, backward twice and 2.5 times that."""
    endless = Accelerator(flops=1e12, bandwidth=float("inf"))
    layout = Layout.of((49, 49, 49, 49), VIT_SIZES["B"].dims)
    products = 24 * DIM * 2 * 49 * (96 + 192 + 384 + 768)
    core = 2 * 2 * 2 * TOKENS * TOKENS * DIM

    forward = block_ms(endless, layout, 2, training=False)
    training = block_ms(endless, layout, 2, training=True)

    assert forward == pytest.approx(1e3 * (products / 0.7e12 + core / 0.35e12))
    assert training == pytest.approx(1e3 * (3 * products / 0.7e12 + 3.5 * core / 0.35e12))


def test_a_block_takes_its_bytes_where_operations_are_free():
    """One image of one token, D = 2: weights, operands, then what is full width whatever."""
    free = Accelerator(flops=float("inf"), bandwidth=1.0)
    linears = (2 + 6 + 12) + (2 + 2 + 4) + 2 * (2 + 8 + 16)  # qkv, out; up and down
    layout = Layout.of((1,), (2,))

    forward = block_ms(free, layout, 1, training=False)
    training = block_ms(free, layout, 1, training=True)

    assert forward == pytest.approx(2e3 * (linears + 4 * 2 + 10 * 2))
    assert training == pytest.approx(2e3 * (3 * linears + (4 + 8) * 2 + (10 + 12) * 2))


@pytest.mark.parametrize(("device", "gemm_ms"), [(A100, 1.59), (H100, 0.50), (H200, 0.50)])
def test_experts_are_bound_by_their_products_in_the_worked_example(device, gemm_ms):
    """V-MoE-B/16, K = 2, C = 1.05, 128 images, on one of 8 devices: one expert's weights."""
    slots = [(round(2 * 1.05 * IMAGES * TOKENS), DIM)]
    moved_ms = 1e3 * 2 * (3 * slots[0][0] + IMAGES * TOKENS) * DIM / device.bandwidth
    sizes = {"experts": 1, "out_features": IMAGES * TOKENS * DIM}

    forward = experts_ms(device, slots, HIDDEN, **sizes, training=False)
    training = experts_ms(device, slots, HIDDEN, **sizes, training=True)

    assert forward - moved_ms == pytest.approx(gemm_ms, abs=0.005)
    assert training - 2 * moved_ms == pytest.approx(3 * (forward - moved_ms))


def test_experts_move_the_bytes_of_the_worked_example():
    """1.75 GB, of which the hidden layer twice more where activations are not fused."""
    free = Accelerator(flops=float("inf"), bandwidth=1e9)
    slots = [(round(2 * 1.05 * IMAGES * TOKENS), DIM)]
    sizes = {"experts": 1, "out_features": IMAGES * TOKENS * DIM}

    gigabytes = experts_ms(free, slots, HIDDEN, **sizes, training=False) / 1e3
    unfused = 2 * 2 * slots[0][0] * HIDDEN / 1e9

    assert gigabytes + unfused == pytest.approx(1.75, abs=0.005)


def test_narrow_slots_are_bound_by_memory_and_wide_ones_by_products():
    def by(slots):
        return mlp_ms(H200, slots, HIDDEN, training=False)

    narrow, wide = [(100_000, 96)], [(100_000, 768)]

    assert by(narrow) == pytest.approx(2e3 * 2 * (1e5 * (96 + HIDDEN) + 96 * HIDDEN) / 4.8e12)
    assert by(wide) == pytest.approx(2e3 * 2 * 1e5 * 768 * HIDDEN / 989e12)
    assert by(narrow + wide) == pytest.approx(by(narrow) + by(wide))


def test_every_expert_reads_its_own_weights():
    free = Accelerator(flops=float("inf"), bandwidth=1.0)

    one, eight = (mlp_ms(free, [(8, 2)], 4, experts=n, training=False) for n in (1, 8))

    assert eight - one == pytest.approx(1e3 * 7 * 2 * 2 * 2 * 4)


def _nested(budget, num_tokens, dims):
    return Layout.of(token_counts(capacity_distribution(budget), num_tokens), dims)
