"""What a model computes, sends and keeps for one image: counts, without a machine.

The model is built without weights (torch's meta device), so that its own formulas for operations,
capacities and sizes are the ones used; none is written here again.

Axes: N tokens of an image, D model width, F hidden width, E experts, Q slots of an expert.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

from mone_core.baselines import SkippingBlock, SlicedBlock
from mone_core.experts import SparseBlock
from mone_core.models import ModelConfig, ViT, build_model
from mone_core.nested import Layout
from mone_core.parallel import expert_parameters
from pipelines.errors import UsageError


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """One block at one budget.

    Attributes:
        tokens: Tokens of one image that it computes, and their widths.
        hidden: F of its MLP, or of each of its experts.
        gated: Whether a router scales its MLP branch.
        slots: Slots of all experts for one routing group, and their width, for each width class,
            widest first; none: a plain MLP.
        group: Images of a routing group.
    """

    tokens: Layout
    hidden: int
    gated: bool
    slots: tuple[tuple[int, int], ...]
    group: int

    @property
    def num_tokens(self) -> int:
        """Tokens of one image, N."""
        return self.tokens.segments[-1].stop

    def rows_of_experts(self, images: int) -> list[tuple[int, int]]:
        """Slots of all experts that so many images fill, whole groups, and their width.

        A rank's experts get as many from its row: there are fewer of them, for more images.
        """
        return [(images // self.group * slots, dim) for slots, dim in self.slots]


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """A model at one budget.

    Attributes:
        config: The model.
        macs: Multiply-accumulates of one image, forward.
        dense_parameters: Those that every rank holds.
        expert_parameters: Those that are spread over the expert ranks.
        layers: Its blocks.
    """

    config: ModelConfig
    macs: int
    dense_parameters: int
    expert_parameters: int
    layers: tuple[Layer, ...]


def work_of(config: ModelConfig, effective_capacity: float) -> Work:
    """Count what a model does at a budget.

    Raises:
        CapacityError: The budget is out of reach.
        UsageError: The model takes clips, which runs do not.
    """
    if config.video.frames > 1:
        raise UsageError(
            f"a plan is for images: model.video.frames must be 1, got {config.video.frames}"
        )
    model = _without_weights(config)
    model.set_effective_capacity(effective_capacity)
    experts = sum(each.numel() for each in expert_parameters(model).values())
    return Work(
        config=config,
        macs=model.macs(),
        dense_parameters=sum(each.numel() for each in model.parameters()) - experts,
        expert_parameters=experts,
        layers=tuple(_layers(model)),
    )


@lru_cache(maxsize=8)
def _without_weights(config: ModelConfig) -> ViT:
    with torch.device("meta"):
        return build_model(config)


def _layers(model: ViT) -> Iterator[Layer]:
    config, encoder = model.config, model.encoder
    nesting = config.nesting
    first = nesting.router_layers[0] if nesting.routed else 0
    for index, block in enumerate(encoder.blocks):
        tokens = encoder.plan.routed if index >= first else encoder.plan.full
        yield Layer(
            tokens=block.layout if isinstance(block, SkippingBlock) else tokens,
            hidden=block.width if isinstance(block, SlicedBlock) else config.hidden,
            gated=nesting.learned and index >= first,
            slots=_slots(block, tokens) if isinstance(block, SparseBlock) else (),
            group=config.experts.group_images,
        )


def _slots(block: SparseBlock, tokens: Layout) -> tuple[tuple[int, int], ...]:
    """By the layer's own rule."""
    config, of_image = block.mlp.config, tokens.segments[-1].stop
    return tuple(
        (config.num_experts * block.mlp.capacity(config.group_images * each, of_image), dim)
        for each, dim in ((each.stop - each.start, each.dim) for each in tokens.segments)
    )
