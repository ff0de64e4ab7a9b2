"""Products by torch and by oneDNN agree, the choice is the process's, and GELU equals torch's."""

import pytest
import torch
import torch.nn.functional as F

from mone_core import gemm
from mone_core.errors import ConfigError, MoneError

ROWS, FEATURES_IN, FEATURES_OUT = 7, 48, 20

needs_onednn = pytest.mark.skipif(not gemm.has_onednn(), reason="this build of torch has no oneDNN")


@pytest.fixture(autouse=True)
def _choice_is_put_back():
    before = gemm.chosen_gemm()
    yield
    gemm.use_gemm(before)


def all_products(dtype):
    """Every product of a linear layer on strided operands, as nested layers have them."""
    torch.manual_seed(0)
    wide_x = torch.randn(ROWS, 2 * FEATURES_IN, dtype=dtype)
    wide_weight = torch.randn(FEATURES_OUT, 2 * FEATURES_IN, dtype=dtype)
    x, weight = wide_x[:, :FEATURES_IN], wide_weight[:, :FEATURES_IN]
    bias, grad = torch.randn(FEATURES_OUT, dtype=dtype), torch.randn(ROWS, FEATURES_OUT).to(dtype)
    placed = torch.zeros(ROWS, 2 * FEATURES_OUT, dtype=dtype)
    grad_weight, grad_bias = torch.full_like(wide_weight, 1.0), torch.ones_like(bias)
    first, again = grad_weight[:, :FEATURES_IN], grad_weight[:, FEATURES_IN:]
    gemm.linear(x, weight, bias, out=placed[:, :FEATURES_OUT])
    gemm.linear_grad_parameters(grad, x, first, grad_bias, accumulate=False)
    gemm.linear_grad_parameters(grad, x, again, grad_bias, accumulate=True)
    return {
        "linear": gemm.linear(x, weight, bias),
        "without bias": gemm.linear(x, weight, None),
        "placed": placed,
        "grad of input": gemm.linear_grad_input(grad, weight),
        "grads of weight": grad_weight,
        "grad of bias": grad_bias,
    }


def test_products_are_those_of_a_linear_layer():
    x = torch.randn(ROWS, FEATURES_IN, dtype=torch.float64, requires_grad=True)
    layer = torch.nn.Linear(FEATURES_IN, FEATURES_OUT).double()
    y, grad = layer(x), torch.randn(ROWS, FEATURES_OUT, dtype=torch.float64)
    y.backward(grad)
    weight, bias = layer.weight.detach(), layer.bias.detach()
    grad_weight, grad_bias = torch.empty_like(weight), torch.empty_like(bias)
    gemm.linear_grad_parameters(grad, x.detach(), grad_weight, grad_bias, accumulate=False)

    for ours, theirs in (
        (gemm.linear(x.detach(), weight, bias), y),
        (gemm.linear_grad_input(grad, weight), x.grad),
        (grad_weight, layer.weight.grad),
        (grad_bias, layer.bias.grad),
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


@needs_onednn
def test_torch_and_onednn_agree_on_every_product():
    """Sums of at most 48 products of order 1 in float32: 48 * 2**-24 is 3e-6, twice that holds."""
    with gemm.gemm("torch"):
        expected = all_products(torch.float32)
    with gemm.gemm("onednn"):
        got = all_products(torch.float32)

    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=2e-5, msg=name)


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_stay_with_torch_to_the_last_bit(dtype):
    with gemm.gemm("torch"):
        expected = all_products(dtype)
    with gemm.gemm("onednn"):
        got = all_products(dtype)

    for name, value in expected.items():
        assert torch.equal(got[name], value), name


@needs_onednn
def test_a_choice_gives_the_same_bits_every_time():
    with gemm.gemm("onednn"):
        once, twice = all_products(torch.float32), all_products(torch.float32)

    assert all(torch.equal(once[name], twice[name]) for name in once)


def test_torch_is_the_choice_until_another_is_made():
    assert gemm.chosen_gemm() == "torch"


@needs_onednn
def test_a_choice_for_a_block_ends_with_it_even_by_an_error():
    seen = []

    def fails():
        with gemm.gemm("onednn"):
            seen.append(gemm.chosen_gemm())
            raise ZeroDivisionError("within")

    with pytest.raises(ZeroDivisionError, match="within"):
        fails()
    assert seen == ["onednn"]
    assert gemm.chosen_gemm() == "torch"


def test_an_unknown_choice_lists_the_known_ones_and_changes_nothing():
    with pytest.raises(
        ConfigError, match=r"gemm must be one of \('torch', 'onednn'\), got 'cublas'"
    ):
        gemm.use_gemm("cublas")

    assert gemm.chosen_gemm() == "torch"
    assert issubclass(ConfigError, MoneError)


def test_onednn_is_refused_where_torch_was_built_without_it(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)

    with pytest.raises(ConfigError, match="this build of torch has no oneDNN; use gemm 'torch'"):
        gemm.use_gemm("onednn")
    assert gemm.fastest_gemm() == "torch"


def test_measuring_names_a_choice_and_changes_nothing():
    before = torch.get_rng_state()

    assert gemm.fastest_gemm() in ("torch", "onednn")
    assert gemm.chosen_gemm() == "torch"
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 4e-14), (torch.float32, 4e-6), (torch.bfloat16, 2**-7)],
)
def test_gelu_and_its_gradient_equal_torchs(approximate, dtype, tolerance):
    """More elements than are worked on at once, values far out on both sides, float64's truth."""
    h = torch.linspace(-30, 30, 600 * 512).to(dtype).view(600, 512)
    grad = torch.randn(600, 512).to(dtype)
    exact = h.double().requires_grad_()
    expected = F.gelu(exact, approximate=approximate)
    (expected_grad,) = torch.autograd.grad(expected, exact, grad.double())

    kept, out, in_place = h.detach().clone(), torch.empty_like(h), h.detach().clone()
    gemm.gelu(kept, approximate, out=out)
    gemm.gelu(in_place, approximate, out=in_place)
    gemm.gelu_grad(grad, kept, approximate, out=kept)

    close = {"rtol": tolerance, "atol": tolerance, "check_dtype": False}
    torch.testing.assert_close(out, expected, **close)
    assert torch.equal(in_place, out)
    torch.testing.assert_close(kept, expected_grad, **close)
