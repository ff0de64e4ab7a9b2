"""The image model: embed, encode, pool, classify. Dense, nested, sparse or both by configuration.

Clips with joint space-time attention are one long image to it; factorised ones are `vivit`'s.
At effective capacity 1 and alpha 0 (or with the single width 1.0) it is a plain pre-norm ViT.

Axes: B images or clips, N tokens, D model width, K classes.

Source: arXiv 2407.19985 (MoNE), 2106.05974 (V-MoE), 2010.11929 (ViT).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mone_core.errors import RoutingError
from mone_core.experts import Dispatched, SparseMlp
from mone_core.flops import linear_macs
from mone_core.models.config import ModelConfig
from mone_core.models.embed import PatchEmbedding
from mone_core.models.encoder import Encoded, Encoder, Routed


class Output(NamedTuple):
    """What a model says of a batch.

    Attributes:
        logits_BK: Class scores before softmax.
        aux_loss: What the sparse routers add to the training loss; 0 outside of training.
        routed: What the nested routers decided, the earliest first. Frames of factorised clips
            count as images, those of a clip next to each other.
        dispatched: What the sparse routers decided, the earliest first.
    """

    logits_BK: Tensor
    aux_loss: Tensor
    routed: tuple[Routed, ...]
    dispatched: tuple[Dispatched, ...]


class ViT(nn.Module):
    """A vision transformer.

    Shape: images `[B, 3, image_size, image_size]` or clips
    `[B, frames, 3, image_size, image_size]`, float -> `Output`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = PatchEmbedding(config)
        self.encoder = Encoder(config, config.num_patches)
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.head = Head(config)

    def set_effective_capacity(self, effective_capacity: float) -> None:
        """Choose the compute budget of the next forward passes; no weight changes.

        Raises:
            CapacityError: The budget is out of reach of the model's widths.
        """
        self.encoder.set_effective_capacity(effective_capacity)

    def set_capacity(
        self,
        *,
        k: int | None = None,
        capacity_ratio: float | None = None,
        batch_priority: bool | None = None,
    ) -> None:
        """Change how the sparse experts take tokens from now on; no weight changes.

        Args:
            k: Experts that a token chooses.
            capacity_ratio: Slots over choices, C.
            batch_priority: Fill slots by score instead of by position.

        Raises:
            RoutingError: The model has no sparse experts, or fewer than `k`.
            CapacityError: The ratio is not above 0.
        """
        layers = [layer for layer in self.modules() if isinstance(layer, SparseMlp)]
        if not layers:
            raise RoutingError(
                "this model has no sparse experts to set a capacity for; build one with "
                "experts.placement every or last"
            )
        for layer in layers:
            layer.set_capacity(k=k, capacity_ratio=capacity_ratio, batch_priority=batch_priority)

    @property
    def realised_effective_capacity(self) -> float:
        """The budget that whole tokens per image come to."""
        return self.encoder.realised_effective_capacity

    def features(self, pixels: Tensor) -> tuple[Tensor, Encoded]:
        """What the head reads, shape BD, and what the encoder did on the way."""
        encoded = self.encoder(self.embed(pixels))
        return pool(encoded.x_NBD, self.norm, self.config), encoded

    def forward(self, pixels: Tensor) -> Output:
        """Class scores, and what the routers did."""
        features_BD, encoded = self.features(pixels)
        logits_BK = self.head(features_BD)
        aux_losses = [told.aux_loss for told in encoded.dispatched]
        aux_loss = torch.stack(aux_losses).sum() if aux_losses else logits_BK.new_zeros(())
        return Output(logits_BK, aux_loss, encoded.routed, encoded.dispatched)

    def macs(self) -> int:
        """Multiply-accumulates of one image or clip at the present budget."""
        return self.embed.macs() + self.encoder.macs() + self.head.macs()


class Head(nn.Module):
    """Features to class scores, through a tanh layer if the configuration wants one."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.pre_logits = nn.Linear(config.dim, config.dim) if config.pre_logits else None
        self.classify = nn.Linear(config.dim, config.num_classes)
        nn.init.zeros_(self.classify.weight)
        nn.init.constant_(self.classify.bias, config.head_bias)

    def forward(self, x_BD: Tensor) -> Tensor:
        """`BD` -> `BK`."""
        if self.pre_logits is not None:
            x_BD = self.pre_logits(x_BD).tanh()
        logits_BK: Tensor = self.classify(x_BD)
        return logits_BK

    def macs(self) -> int:
        """Multiply-accumulates of one image."""
        layers = [self.classify] + ([] if self.pre_logits is None else [self.pre_logits])
        return sum(linear_macs(1, layer.in_features, layer.out_features) for layer in layers)


def pool(x_NBD: Tensor, norm: nn.LayerNorm, config: ModelConfig) -> Tensor:
    """Normalise, and take the class token or the mean of all tokens: `NBD` -> `BD`."""
    if config.pool == "cls":
        first_BD: Tensor = norm(x_NBD[0])
        return first_BD
    mean_BD: Tensor = norm(x_NBD).mean(dim=0)
    return mean_BD
