"""The perceptrons of a layer of experts by themselves: what they read, write and remember."""

import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import mone_core.bank
from mone_core.bank import ExpertBank
from tests.mone_core.sparse_reference import leaf


def bank_and_slots(gelu, dims):
    bank = ExpertBank(4, 8, 5, gelu).double()
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.normal_(std=0.5)
    return bank, [leaf(4, slots, dim) for slots, dim in zip((3, 1, 6, 2), dims, strict=False)]


def plain(bank, slots):
    """What a bank is to compute, by torch's own operations and their gradients."""
    outs = []
    for x_EQd in slots:
        dim = x_EQd.shape[2]
        h_EQF = torch.einsum("eqd,efd->eqf", x_EQd, bank.up_weight_EFD[..., :dim])
        h_EQF = F.gelu(h_EQF + bank.up_bias_EF.unsqueeze(1), approximate=bank.approximate)
        y_EQd = torch.einsum("eqf,edf->eqd", h_EQF, bank.down_weight_EDF[:, :dim])
        outs.append(y_EQd + bank.down_bias_ED[:, None, :dim])
    return outs


def outputs_and_gradients(forward, bank, slots):
    outs = forward(slots)
    torch.manual_seed(1)
    grads = [torch.randn_like(each) for each in outs]
    return *outs, *torch.autograd.grad(outs, [*slots, *bank.parameters()], grads)


def test_slots_and_their_gradients_are_read_and_never_written():
    """A process alone is handed what the tokens' side still owns."""
    bank, slots = bank_and_slots("tanh", (8, 4))
    given = [*slots, *(torch.randn_like(each) for each in slots)]
    before = [each.detach().clone() for each in given]

    torch.autograd.grad(bank(slots), slots, given[2:])

    assert all(torch.equal(*pair) for pair in zip(given, before, strict=True))


class HiddenLayers(TorchDispatchMode):
    """Counts the hidden layers of experts (5 features) that are in memory at one time."""

    def __init__(self):
        super().__init__()
        self.alive, self.most = weakref.WeakSet(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.addmm.default and out.shape[1] == 5:
            self.alive.add(out)
            self.most = max(self.most, len(self.alive))
        return out


@pytest.mark.parametrize(("learning", "most"), [(True, 12), (False, 2)])
def test_hidden_layers_are_kept_for_a_backward_pass_only(learning, most):
    """Of four experts and three classes; without one, only the next takes over from the last."""
    bank, slots = bank_and_slots("erf", (8, 4, 2))

    with torch.set_grad_enabled(learning), HiddenLayers() as hidden:
        bank(slots)

    assert hidden.most == most


@pytest.mark.usefixtures("_dirty_memory")
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("gelu", ["tanh", "erf"])
@pytest.mark.parametrize("dims", [(8,), (8, 4, 2, 1), (4, 1), (2,)])
def test_experts_one_by_one_and_in_one_product_are_plain_perceptrons(
    dims, gelu, stacked, monkeypatch
):
    bank, slots = bank_and_slots(gelu, dims)
    expected = outputs_and_gradients(partial(plain, bank), bank, slots)
    if stacked:  # as on accelerators; there is none here to do it by itself
        monkeypatch.setattr(mone_core.bank, "_parts", lambda all_experts: (all_experts,))

    ours = outputs_and_gradients(bank, bank, slots)
    with torch.no_grad():
        unlearned = bank(slots)

    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    assert all(torch.equal(*pair) for pair in zip(unlearned, ours, strict=False))
    up, _, down, down_bias = ours[-4:]
    for past in (up[..., dims[0] :], down[:, dims[0] :], down_bias[:, dims[0] :]):
        assert (past == 0).all()


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += func.name().split("::")[1].split(".")[0] in ("addmm", "baddbmm", "mm", "bmm")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("device", "at_once"), [("cpu", 1), ("meta", 4)])
def test_experts_are_one_product_wherever_there_is_no_cache_to_stay_in(device, at_once):
    """Up and down, of four experts and two classes; the backward pass takes twice as many."""
    bank, slots = bank_and_slots("tanh", (8, 4))
    slots = [each.detach().to(device).requires_grad_() for each in slots]

    with Products() as products:
        outs = bank.to(device)(slots)
        forward = products.number
        sum(each.sum() for each in outs).backward()

    assert forward == 2 * 2 * 4 // at_once
    assert products.number == 3 * forward
    assert [each.grad.shape for each in slots] == [each.shape for each in slots]
