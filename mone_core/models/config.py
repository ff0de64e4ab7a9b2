"""What a model is, as data: sizes, nesting, and the choices where the paper is silent."""

from dataclasses import dataclass
from typing import Literal, get_args

from mone_core.block import Gelu
from mone_core.capacity import NESTED_WIDTHS, Form, capacity_distribution
from mone_core.errors import CapacityError, ConfigError

Positions = Literal["normal", "sincos"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A MoNE ViT: nested widths of one ViT and a router before its first layer.

    Attributes:
        image_size: Pixels along each side of an input image.
        patch_size: Pixels along each side of a patch; divides `image_size`.
        num_classes: Outputs of the head.
        dim: Model width D.
        depth: Number of blocks.
        heads: Attention heads; divides `dim`.
        mlp_ratio: Hidden width of the MLP over D.
        widths: Width of each nested expert over D, rising to 1.
        effective_capacity: Compute budget that a fresh model starts with, e_c.
        capacity_form, capacity_delta, capacity_beta: How shares follow from a budget, see
            `mone_core.capacity.capacity_distribution`.
        gelu: "tanh" as the JAX families, "erf" as timm and Hugging Face.
        norm_eps: Epsilon of every layer norm.
        positions: What the learned position table starts from: "normal" noise of 0.02, or
            "sincos", 2-D sines and cosines, which learn faster where training is short.
        alpha_per_layer: One alpha (eq. 1) per layer, or one for the model.
    """

    image_size: int = 224
    patch_size: int = 16
    num_classes: int = 1000
    dim: int = 384
    depth: int = 12
    heads: int = 6
    mlp_ratio: int = 4
    widths: tuple[float, ...] = NESTED_WIDTHS
    effective_capacity: float = 0.5
    capacity_form: Form = "fraction"
    capacity_delta: float = 2.0
    capacity_beta: float = 10.0
    gelu: Gelu = "tanh"
    norm_eps: float = 1e-6
    positions: Positions = "normal"
    alpha_per_layer: bool = True

    def __post_init__(self) -> None:
        problems = self._size_problems()
        try:
            self.capacity(self.effective_capacity)
        except CapacityError as error:
            problems.append(str(error))
        if problems:
            raise ConfigError("model", problems)

    @property
    def dims(self) -> tuple[int, ...]:
        """Features of each nested expert, narrowest first."""
        return tuple(round(width * self.dim) for width in self.widths)

    @property
    def grid(self) -> int:
        """Patches along each side of an image."""
        return self.image_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        """Tokens of one image, N."""
        return self.grid * self.grid

    def capacity(self, effective_capacity: float) -> tuple[float, ...]:
        """The capacity distribution of a budget, with this model's widths and parameters."""
        return capacity_distribution(
            effective_capacity,
            self.widths,
            delta=self.capacity_delta,
            beta=self.capacity_beta,
            form=self.capacity_form,
        )

    def _size_problems(self) -> list[str]:
        sizes = ("image_size", "patch_size", "num_classes", "dim", "depth", "heads", "mlp_ratio")
        problems = [
            f"{name} must be 1 or more, got {value}"
            for name in sizes
            if (value := getattr(self, name)) < 1
        ]
        if problems:
            return problems
        if self.image_size % self.patch_size:
            problems.append(
                f"patch_size must divide image_size, got {self.patch_size} and {self.image_size}"
            )
        if self.dim % self.heads:
            problems.append(f"heads must divide dim, got {self.heads} and {self.dim}")
        if self.positions == "sincos" and (self.dim % 4 or self.dim < 8):
            problems.append(f"positions sincos need a dim of 8 or more by fours, got {self.dim}")
        problems += [
            f"{name} {value!r} does not exist; it must be one of {get_args(kind)}"
            for name, kind in (("gelu", Gelu), ("positions", Positions))
            if (value := getattr(self, name)) not in get_args(kind)
        ]
        if not self.norm_eps > 0:
            problems.append(f"norm_eps must be above 0, got {self.norm_eps}")
        if self.dims and self.dims[0] < 1:
            problems.append(
                f"the narrowest width must be a feature or more, got {self.widths[0]} of dim "
                f"{self.dim}"
            )
        split = [w for w in self.widths if abs(w * self.dim - round(w * self.dim)) > 1e-6]
        if split:
            problems.append(
                f"every width must be a whole number of features: widths {split} of dim "
                f"{self.dim} are not"
            )
        return problems
