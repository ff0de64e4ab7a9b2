"""What the XLA backend promises training, on one process with four devices."""

import pytest
import torch
import torch_xla
import torch_xla.debug.metrics as xla_metrics
from torch.optim import SGD, AdamW

from cluster.backends.xla import XlaBackend
from cluster.errors import LaunchError
from mone_core.parallel import expert_parameters
from tests.xla.small import CONFIGS, images_and_labels, spread_out

DEVICES = 4


def sharding(tensor):
    return torch_xla._XLAC._get_xla_sharding_spec(tensor).strip("{}")


def compiled():
    """Programs compiled so far."""
    return xla_metrics.counter_value("UncachedCompile") or 0


def test_one_process_is_one_rank_whatever_its_devices():
    backend = XlaBackend(2)
    values = torch.tensor([1.5, 2.5], device=backend.device)

    assert (backend.rank, backend.world, backend.device.type) == (0, 1, "xla")
    assert (backend.mesh.data, backend.mesh.expert, backend.parts) == (2, 2, 1)
    assert backend.host_ranks == 1
    backend.barrier("a test")
    backend.synchronize()
    assert backend.sum_over_ranks(values, "a test").tolist() == [1.5, 2.5]
    assert backend.sum_over_experts(values, "a test").tolist() == [1.5, 2.5]


def test_every_device_gets_its_own_images_only():
    backend = XlaBackend(2)
    pixels = torch.arange(8 * 3, dtype=torch.uint8).view(8, 3)

    put = backend.put(pixels)

    assert sharding(put) == "devices=[4,1]0,1,2,3"
    assert torch.equal(put.cpu(), pixels)


def test_a_seed_repeats_what_devices_draw():
    backend = XlaBackend(2)

    def draw(seed):
        backend.seed(seed)
        return torch.randn(16, device=backend.device).cpu()

    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))


def test_slots_reach_their_experts_in_the_order_of_senders():
    backend = XlaBackend(2)
    experts, slots = 4, 3
    # Of every device a tensor EQd that says who sends, to whom, which slot.
    sender = torch.arange(DEVICES).view(-1, 1, 1)
    expert = torch.arange(experts).view(1, -1, 1)
    slot = torch.arange(slots).view(1, 1, -1)
    sent = (100 * sender + 10 * expert + slot).unsqueeze(-1).double()

    seen = _on_devices(lambda x: backend.to_experts(x, "a test")(), sent, backend)
    back = _on_devices(
        lambda x: backend.to_tokens(backend.to_experts(x, "a test")(), "a test")(), sent, backend
    )

    rows, each = ((0, 1), (2, 3)), experts // 2
    for device in range(DEVICES):
        row, column = rows[device // 2], device % 2
        mine = slice(column * each, (column + 1) * each)
        expected = torch.cat([sent[sender, mine] for sender in row], dim=1)
        assert torch.equal(seen[device], expected)
    assert torch.equal(back, sent)


def _on_devices(compute, parts, backend):
    """What `compute` makes of `parts[device]` on each device."""
    module = _Each(compute)
    model = backend.place(module, ())
    return model(backend.put(parts)).cpu()


class _Each(torch.nn.Module):
    def __init__(self, compute):
        super().__init__()
        self._compute = compute

    def forward(self, part):
        return self._compute(part[0].contiguous()).unsqueeze(0)


def test_bytes_of_exchanges_are_counted():
    backend = XlaBackend(2)
    sent = torch.zeros(DEVICES, 4, 3, 1, dtype=torch.float32)

    _on_devices(lambda x: backend.to_experts(x, "a test")(), sent, backend)

    assert backend.sent_bytes == sent.nbytes


def test_nothing_is_recompiled_after_the_second_step_and_moments_lie_with_their_weights():
    training = spread_out(CONFIGS["noisy"], XlaBackend(2), AdamW)
    seen = []
    for number in range(6):
        training.step(number)  # another learning rate, other noise
        seen.append(compiled())

    assert seen[-1] == seen[1]
    experts = set(expert_parameters(training.core))
    assert len(experts) == 4
    for name, parameter in training.core.named_parameters():
        state = training.optimizer.state[parameter]
        for tensor in (parameter, state["exp_avg"], state["exp_avg_sq"]):
            cut = sharding(tensor)
            assert cut.startswith("devices=[2,1,") if name in experts else cut == "replicated"


def test_split_weights_stay_split_through_training():
    training = spread_out(CONFIGS["nested sparse"], XlaBackend(2), AdamW, shard=True)
    training.step(0)
    training.step(1)

    experts = set(expert_parameters(training.core))
    for name, parameter in training.core.named_parameters():
        if name in experts or not parameter.ndim or parameter.shape[0] % DEVICES:
            continue
        state = training.optimizer.state[parameter]
        for tensor in (parameter, state["exp_avg"], state["exp_avg_sq"]):
            assert sharding(tensor).startswith("devices=[4"), name


def test_rows_of_any_number_are_refused():
    with pytest.raises(LaunchError, match="block 1: XLA programs have fixed shapes"):
        XlaBackend(2).send_rows(torch.zeros(2, 1), (1, 1), (1, 1), "block 1")


def test_experts_that_the_devices_cannot_share_are_refused():
    with pytest.raises(LaunchError, match="cannot be spread over 3 of 4 ranks"):
        XlaBackend(3)
    with pytest.raises(LaunchError, match="6 experts cannot be spread evenly over 4 ranks"):
        XlaBackend(4).held(6)


def test_images_that_the_devices_cannot_share_are_refused():
    training = spread_out(CONFIGS["top 1"], XlaBackend(1), SGD)
    pixels = images_and_labels(0)[0][:6].to(training.backend.device)

    with pytest.raises(LaunchError, match="6 images at once cannot be shared out over 4 devices"):
        training.model(pixels)
