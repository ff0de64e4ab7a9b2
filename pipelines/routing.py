"""What the router does with a few validation images or clips, at several budgets."""

from collections.abc import Sequence

import numpy as np
import torch

from mone_core.models import ViT
from pipelines.data.batch import Batch, model_input
from pipelines.data.stream import EvalStream
from pipelines.routing_examples import RoutingExamples

STEPS = 4  # of a clip, one below the other; as many fewer clips are shown


@torch.no_grad()
def routing_examples(
    model: ViT,
    stream: EvalStream,
    budgets: Sequence[float],
    class_names: Sequence[str],
    *,
    count: int = 8,
) -> RoutingExamples:
    """Route the first samples of a validation set, which lie there in shuffled order.

    Of a clip several temporal steps are shown, evenly spaced: the first frame of each.

    Args:
        model: On CPU; its budget is changed on the way.
        stream: The validation set; its batches hold at least one sample.
        budgets: Effective capacities.
        class_names: Name of each label.
        count: How many pictures; fewer when a batch has fewer.
    """
    video, grid = model.config.video, model.config.grid
    class_names = without_common_words(class_names)
    steps = np.linspace(0, video.steps - 1, min(video.steps, STEPS)).round().astype(int)
    batch = next(iter(stream))
    clips_BTHWC, labels = _first_samples(batch, max(1, count // len(steps)))
    experts, predictions = [], []
    for budget in budgets:
        model.set_effective_capacity(budget)
        output = model(model_input(clips_BTHWC))
        expert = output.routed[0].expert_BN.reshape(-1, video.steps, grid, grid)
        experts.append(expert[:, steps].flatten(0, 1).numpy())
        predictions.append([class_names[k] for k in output.logits_BK.argmax(dim=1).tolist()])
    by_sample = list(zip(*predictions, strict=True))
    return RoutingExamples(
        images_uint8=clips_BTHWC[:, steps * video.tubelet].flatten(0, 1).numpy(),
        labels=tuple(class_names[label] for label in labels for _ in steps),
        predictions=tuple(names for names in by_sample for _ in steps),
        budgets=tuple(budgets),
        expert=np.stack(experts),
        widths=model.config.nesting.widths,
    )


def without_common_words(names: Sequence[str]) -> list[str]:
    """Names without the words that all of them begin with: there is little room below a picture."""
    words = [name.split() for name in names]
    common = 0
    while all(len(each) > common + 1 for each in words) and len({w[common] for w in words}) == 1:
        common += 1
    return [" ".join(each[common:]) for each in words] if common else list(names)


def _first_samples(batch: Batch, count: int) -> tuple[torch.Tensor, list[int]]:
    """Pixels and labels of a few samples, if there are so many; of several views the middle one."""
    rows = batch.valid_B.nonzero().flatten()[:count] * batch.views + batch.views // 2
    return batch.pixels_RTHWC[rows], batch.labels_R[rows].tolist()
