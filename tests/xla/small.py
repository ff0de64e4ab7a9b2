"""Models of a few features, and a training of a few steps, for one device or many."""

from dataclasses import dataclass, replace

import torch
from torch import nn

from mone_core.experts import ExpertsConfig
from mone_core.losses import softmax_loss
from mone_core.models import DENSE, ModelConfig, NestingConfig, build_model
from mone_core.parallel import expert_parameters, spread
from pipelines.gradients import clip_gradients, compute_gradients
from pipelines.optim import set_learning_rate

IMAGES = 16
NESTING = NestingConfig(widths=(0.5, 1.0), effective_capacity=0.75)
EXPERTS = ExpertsConfig(
    placement="every", num_experts=4, group_images=2, noise=0, load_weight=0, z_weight=0.1
)
BASE = ModelConfig(
    image_size=8,
    patch_size=2,
    num_classes=5,
    dim=8,
    depth=2,
    heads=2,
    nesting=DENSE,
)
CONFIGS = {
    "nested": replace(BASE, nesting=NESTING, pool="cls"),
    "top 1": replace(BASE, experts=replace(EXPERTS, k=1, capacity_ratio=0.5)),
    "batch priority": replace(BASE, experts=replace(EXPERTS, batch_priority=True)),
    "experts choose": replace(BASE, experts=replace(EXPERTS, routing="experts_choose")),
    "nested sparse": replace(BASE, nesting=NESTING, experts=EXPERTS),
    "noisy": replace(BASE, nesting=NESTING, experts=replace(EXPERTS, noise=1.0, load_weight=0.01)),
}


def new_model(config):
    """A model in float64 whose weights are all different: the same for the same configuration."""
    torch.manual_seed(0)
    model = build_model(config).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.1 * noise)
    return model


def images_and_labels(step):
    generator = torch.Generator().manual_seed(step)
    pixels = torch.randn(IMAGES, 3, 8, 8, generator=generator, dtype=torch.float64)
    return pixels, (torch.arange(IMAGES) + step) % BASE.num_classes


class OneDevice:
    """What training asks of a backend and of a placed model, for one device that has it all."""

    def __init__(self, device, seed=torch.manual_seed, submit=lambda: None):
        self.device, self.seed, self.submit = device, seed, submit
        self.parts = 1

    def put(self, tensor):
        return tensor.to(self.device)

    def take_part(self, _index, of):
        self.parts = of

    def sum_over_experts(self, values, _what):
        return values

    def place(self, model):
        self.model = model.to(self.device)
        return self

    def __call__(self, pixels):
        return self.model(pixels)

    def zero_gradients(self):
        self.model.zero_grad()

    def last_backward(self):
        pass

    def finish_gradients(self):
        pass


@dataclass
class Training:
    """A model in training: `core` has the weights, `model` is called."""

    backend: object
    core: nn.Module
    model: object
    optimizer: torch.optim.Optimizer

    def step(self, number, *, microbatches=1):
        """One update; output of the last microbatch, loss, norm and gradients by name."""
        pixels, labels = map(self.backend.put, images_and_labels(number))
        each_pixels, each_labels = pixels.chunk(microbatches), labels.chunk(microbatches)
        outputs = []

        def losses_of(index):
            self.backend.seed(number)
            outputs.append(self.model(each_pixels[index]))
            loss_B = softmax_loss(outputs[-1].logits_BK, each_labels[index])
            return (loss_B.mean() + outputs[-1].aux_loss).unsqueeze(0)

        loss = compute_gradients(self.model, self.backend, microbatches, losses_of)
        norm = clip_gradients(self.core, expert_parameters(self.core), 1.0, self.backend)
        set_learning_rate(self.optimizer, 0.1 / (number + 1))
        self.optimizer.step()
        self.backend.submit()
        gradients = {name: p.grad for name, p in self.core.named_parameters()}
        return outputs[-1], loss, norm, gradients


def spread_out(config, backend, optimizer=torch.optim.SGD, *, shard=False):
    """A training on all devices of a backend; `shard` splits dense weights too."""
    core = new_model(config)
    spread(core, backend)
    blocks = core.encoder.blocks if shard else ()
    model = backend.place(core, expert_parameters(core), blocks)
    return Training(backend, core, model, optimizer(core.parameters(), lr=0.1))


def alone(config, backend, optimizer=torch.optim.SGD):
    """The same training on one device: `backend` is a `OneDevice`."""
    core = new_model(config)
    model = backend.place(core)
    return Training(backend, core, model, optimizer(core.parameters(), lr=0.1))


def tensors(value):
    """All tensors in tuples of tuples, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [each for part in value for each in tensors(part)] if isinstance(value, tuple) else []


def far(found, expected):
    """Largest difference, relative to the largest number expected."""
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12)).item()
