"""One step's gradient: parts of a batch give that of the whole, and a norm counts experts once.

Here with one process, and with two for what differs by rank; that many processes have the
gradients of one is proved in `test_parity`.
"""

import copy

import pytest
import torch
from torch import nn

from cluster.backends import get_backend
from mone_core.bank import ExpertBank
from mone_core.losses import softmax_loss
from mone_core.models import ExpertsConfig, ModelConfig, build_model
from mone_core.parallel import expert_parameters, spread
from pipelines.gradients import clip_gradients, compute_gradients
from tests.pipelines import tiny

IMAGES = 8
MODEL = ModelConfig(
    image_size=16,
    patch_size=4,
    num_classes=3,
    dim=16,
    depth=2,
    heads=2,
    experts=ExpertsConfig(placement="every", num_experts=4, group_images=2),
)
BUDGETS = (0.3, 1.0)


def batch():
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(IMAGES, 3, 16, 16, generator=generator, dtype=torch.float64)
    return pixels, torch.randint(3, (IMAGES,), generator=generator)


def model_with_gradients(backend, microbatches, seen=None):
    """A sparse model after one step over both budgets, and the loss that the step told."""
    torch.manual_seed(0)
    core = build_model(MODEL).double()
    with torch.no_grad():
        for parameter in core.parameters():  # a fresh head is zero, and behind it all gradients
            parameter.add_(0.1 * torch.randn_like(parameter))
    spread(core, backend)
    placed = backend.place(core, expert_parameters(core))
    pixels, labels = (each.tensor_split(backend.world)[backend.rank] for each in batch())

    def losses_of(index):
        torch.manual_seed(2)
        if seen is not None:
            seen.append((index, backend.parts))
        losses = []
        for budget in BUDGETS:
            core.set_effective_capacity(budget)
            output = placed(pixels.tensor_split(microbatches)[index])
            labels_B = labels.tensor_split(microbatches)[index]
            losses.append(softmax_loss(output.logits_BK, labels_B).mean() + output.aux_loss)
        return torch.stack(losses)

    return core, compute_gradients(placed, backend, microbatches, losses_of)


def gradients_of(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("microbatches", [2, 4])
def test_parts_of_a_batch_give_the_gradient_and_loss_of_the_whole(microbatches):
    backend, seen = get_backend("cpu"), []

    whole, loss = model_with_gradients(backend, 1)
    parts, same = model_with_gradients(backend, microbatches, seen)

    assert seen == [(index, microbatches) for index in range(microbatches)]
    assert backend.parts == 1
    assert same == pytest.approx(loss.item(), rel=1e-12)
    assert not loss.requires_grad
    right = gradients_of(whole)
    assert all(gradient.any() for gradient in right.values())
    for name, gradient in gradients_of(parts).items():
        torch.testing.assert_close(gradient, right[name], rtol=1e-10, atol=1e-12, msg=name)


def test_the_loss_told_is_the_mean_over_budgets_and_the_gradient_that_of_their_sum():
    layer = nn.Linear(1, 1, bias=False)
    nn.init.ones_(layer.weight)
    backend = get_backend("cpu")
    placed = backend.place(layer, ())

    def losses_of(index):
        return torch.cat([placed(torch.full((1,), x)) for x in (2.0, 4.0)])

    loss = compute_gradients(placed, backend, 1, losses_of)

    assert loss.item() == 3
    assert layer.weight.grad.item() == 6


def test_a_step_forgets_the_gradient_of_the_one_before():
    backend, layer = get_backend("cpu"), nn.Linear(2, 1)
    placed = backend.place(layer, ())

    for _ in range(2):
        compute_gradients(placed, backend, 2, lambda _: placed(torch.ones(1, 2)).reshape(1))

    assert torch.equal(layer.weight.grad, torch.ones(1, 2))


@pytest.mark.parametrize("max_norm", [1e-3, 1e6])
@pytest.mark.parametrize("named", ["none", "experts", "all"])
def test_alone_the_norm_and_what_is_left_are_torchs(max_norm, named):
    backend = get_backend("cpu")
    core, _ = model_with_gradients(backend, 1)
    experts = {
        "none": (),
        "experts": frozenset(expert_parameters(core)),
        "all": [name for name, _ in core.named_parameters()],
    }[named]
    same = copy.deepcopy(core)
    for left, right in zip(core.parameters(), same.parameters(), strict=True):
        right.grad = left.grad.clone()

    norm = clip_gradients(core, experts, max_norm, backend)

    right = nn.utils.clip_grad_norm_(same.parameters(), max_norm)
    assert norm.item() == pytest.approx(right.item(), rel=1e-12)
    for name, gradient in gradients_of(same).items():
        torch.testing.assert_close(core.get_parameter(name).grad, gradient, msg=name)


def test_a_parameter_without_gradient_counts_nothing():
    layer = nn.Linear(2, 1)
    layer.weight.grad = torch.tensor([[3.0, 4.0]])

    assert clip_gradients(layer, ("bias",), 1.0, get_backend("cpu")).item() == 5
    torch.testing.assert_close(layer.weight.grad, torch.tensor([[0.6, 0.8]]))


def test_the_parameters_of_experts_are_those_of_every_bank():
    core = build_model(MODEL)

    assert expert_parameters(core).keys() == {
        f"encoder.blocks.1.mlp.bank.{name}"
        for name, _ in ExpertBank(4, 16, 64, "tanh").named_parameters()
    }


# Two processes.


def norm_and_loss(backend, microbatches):
    """Of all ranks, after one step."""
    core, loss = model_with_gradients(backend, microbatches)
    experts = frozenset(expert_parameters(core))
    norm = clip_gradients(core, experts, 1e-3, backend)
    assert clip_gradients(core, experts, 1.0, backend).item() == pytest.approx(1e-3, rel=1e-4)
    mean = backend.sum_over_ranks(loss, "the loss") / backend.world
    return [norm.item(), mean.item()]


def as_one_process(backend, right):
    """What each of two ranks asserts: on every mesh, in one part and in several."""
    for expert in (1, 2):
        ranks = get_backend("cpu", expert=expert)
        for microbatches in (1, 2):
            norm, loss = norm_and_loss(ranks, microbatches)
            assert [norm, loss] == pytest.approx(right, rel=1e-10)
            both = backend.sum_over_ranks(torch.tensor(norm, dtype=torch.float64), "the norm")
            assert both.item() == 2 * norm  # the same bits on both


def test_two_processes_have_the_norm_and_loss_of_one(tmp_path):
    """What must hold is asserted in `as_one_process`; a process that fails raises here."""
    tiny.on_ranks(as_one_process, tmp_path, norm_and_loss(get_backend("cpu"), 1))
