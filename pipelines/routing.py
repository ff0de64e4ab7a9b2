"""What the router does with a few validation images, at several budgets."""

from collections.abc import Sequence

import numpy as np
import torch

from mone_core.models import ViT
from pipelines.data.batch import model_input
from pipelines.data.stream import EvalStream
from pipelines.routing_examples import RoutingExamples


@torch.no_grad()
def routing_examples(
    model: ViT,
    stream: EvalStream,
    budgets: Sequence[float],
    class_names: Sequence[str],
    *,
    count: int = 8,
) -> RoutingExamples:
    """Route the first images of a validation set, which lie there in shuffled order.

    Args:
        model: On CPU; its budget is changed on the way.
        stream: The validation set; its batches hold at least one image.
        budgets: Effective capacities.
        class_names: Name of each label.
        count: How many images; fewer when a batch has fewer.
    """
    batch = next(iter(stream))
    shown = int(batch.valid_B[:count].sum())
    pixels, labels = batch.pixels_BHWC[:shown], batch.labels_B[:shown].tolist()
    experts, predictions = [], []
    for budget in budgets:
        model.set_effective_capacity(budget)
        output = model(model_input(pixels))
        expert_BN = output.routed[0].expert_BN
        experts.append(expert_BN.view(shown, model.config.grid, model.config.grid).numpy())
        predictions.append([class_names[k] for k in output.logits_BK.argmax(dim=1).tolist()])
    return RoutingExamples(
        images_uint8=pixels.numpy(),
        labels=tuple(class_names[label] for label in labels),
        predictions=tuple(zip(*predictions, strict=True)),
        budgets=tuple(budgets),
        expert=np.stack(experts),
        widths=model.config.nesting.widths,
    )
