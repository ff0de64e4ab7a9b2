"""Load statistics equal plain counting over tokens, add up, and never make the host wait."""

import math
from dataclasses import replace

import pytest
import torch

from mone_core.errors import RoutingError
from mone_core.load import (
    FIELDS,
    dead_experts,
    drop_rates,
    load_rows,
    load_sums,
    summary,
    unreached_shares,
)
from mone_core.models import ModelConfig, build_model
from mone_core.nested import Layout
from tests.mone_core.no_sync import NoSync
from tests.mone_core.sparse_reference import CONFIG, FLAT, ROUTING, operands, random_layer

DIMS = (1, 2, 4, 8)
NESTED = Layout.of((2, 2, 1, 2), DIMS)
LAYOUTS = {"flat": (FLAT, (8,)), "nested": (NESTED, DIMS), "a width is absent": (FLAT, DIMS)}
RATIOS = (0.4, 1.05, 4.0)  # drops many, drops some, drops none


def who_chooses(routing):
    return "experts_choose" if routing == "experts_choose" else "tokens_choose"


def layers_ran(routing, layout, batch=5, ratio=1.05, depth=2, k=2):
    """What `depth` random layers report of a batch with a group that is not whole."""
    with torch.no_grad():
        return tuple(
            random_layer(capacity_ratio=ratio, k=k, **ROUTING[routing])(
                *operands(batch, layout)[:2], layout, None
            )[1]
            for _ in range(depth)
        )


def counted(dispatched, dims, routing):
    """The same sums from loops over lists of numbers: `[layer][width][expert][field]`."""
    table = [[[dict.fromkeys(FIELDS, 0.0) for _ in range(4)] for _ in dims] for _ in dispatched]
    for layer, told in enumerate(dispatched):
        for of in told.classes:
            cells = table[layer][dims.index(of.dim)]
            seats = of.assignment
            for group in range(of.probs_GSE.shape[0]):
                for cell, filled in zip(cells, seats.filled_GEC[group].tolist(), strict=True):
                    cell["slots"] += len(filled)
                    cell["used"] += sum(filled)
                rows = (of.probs_GSE, seats.expert_GSK, seats.kept_GSK)
                for token in zip(*(each[group].tolist() for each in rows), strict=True):
                    count_token(cells, *token, routing)
    return table


def count_token(cells, probs, experts, kept, routing):
    for cell, prob in zip(cells, probs, strict=True):
        cell["tokens"] += 1
        cell["unreached"] += sum(kept) == 0
        cell["reached_once"] += sum(kept) == 1
        cell["importance"] += prob
        cell["entropy"] -= prob * math.log(prob) if prob else 0
    for expert, has_slot in zip(experts, kept, strict=True):
        if has_slot or routing != "experts_choose":
            cells[expert]["wanted"] += 1
            cells[expert]["gate_wanted"] += probs[expert]
        if has_slot:
            cells[expert]["gate_kept"] += probs[expert]


def field(sums_LWEF, name):
    return sums_LWEF[..., FIELDS.index(name)]


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("routing", ROUTING)
def test_the_sums_are_those_of_counting_token_by_token(routing, layout, ratio):
    tokens, dims = LAYOUTS[layout]
    dispatched = layers_ran(routing, tokens, ratio=ratio)

    sums = load_sums(dispatched, dims, routing=who_chooses(routing))

    assert sums.shape == (2, len(dims), 4, len(FIELDS))
    assert sums.dtype == torch.float64
    cells = [
        [[list(cell.values()) for cell in width] for width in layer]
        for layer in counted(dispatched, dims, routing)
    ]
    expected = torch.tensor(cells, dtype=torch.float64)
    torch.testing.assert_close(sums, expected, rtol=1e-12, atol=1e-12)
    whole = [FIELDS.index(n) for n in FIELDS if not n.startswith(("gate", "imp", "ent"))]
    assert sums[..., whole].tolist() == expected[..., whole].tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("routing", ROUTING)
def test_every_choice_is_used_or_dropped_and_every_token_has_its_probability(routing, layout):
    tokens, dims = LAYOUTS[layout]
    dispatched = layers_ran(routing, tokens, ratio=0.4)
    sums = load_sums(dispatched, dims, routing=who_chooses(routing))

    dropped = field(sums, "wanted") - field(sums, "used")
    if routing == "experts_choose":
        assert dropped.abs().max() == 0
        assert (field(sums, "used") == field(sums, "slots")).all()
    else:
        choices = [of.assignment.kept_GSK for told in dispatched for of in told.classes]
        assert dropped.sum() == sum((~kept).sum() for kept in choices) > 0
        assert field(sums, "wanted").sum(2).equal(2 * field(sums, "tokens")[..., 0])
    assert (field(sums, "used") <= field(sums, "slots")).all()
    torch.testing.assert_close(field(sums, "importance").sum(2), field(sums, "tokens")[..., 0])


def test_steps_groups_and_ranks_just_add():
    """Two halves of a batch, cut between groups, are the whole batch: as on two ranks."""
    layer = random_layer(capacity_ratio=0.7)
    residual, x, _ = operands(8, NESTED)
    whole, *halves = (
        load_sums(
            (layer(residual[:, part], x[:, part], NESTED, None)[1],), DIMS, routing="tokens_choose"
        )
        for part in (slice(None), slice(0, 4), slice(4, None))
    )

    torch.testing.assert_close(halves[0] + halves[1], whole, rtol=1e-12, atol=0)


def test_layers_of_different_layouts_stand_side_by_side():
    """Ahead of the router all tokens have full width."""
    ahead, behind = layers_ran("vanilla", FLAT, depth=1), layers_ran("vanilla", NESTED, depth=1)

    sums = load_sums(ahead + behind, DIMS, routing="tokens_choose")

    assert field(sums, "tokens")[:, :, 0].tolist() == [[0, 0, 0, 35], [10, 10, 5, 10]]


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("routing", ROUTING)
def test_the_host_never_waits(routing, layout, depth):
    """The mode raises at any read of a number on the host, and at shapes that depend on one."""
    tokens, dims = LAYOUTS[layout]
    dispatched = layers_ran(routing, tokens, depth=depth)

    with NoSync():
        load_sums(dispatched, dims, routing=who_chooses(routing))


@pytest.mark.parametrize("routing", ROUTING)
def test_all_shapes_are_known_without_a_number(routing):
    """The meta device has no values that a host could read."""
    layer = random_layer(**ROUTING[routing]).to("meta")
    operand = torch.empty(7, 5, 8, dtype=torch.float64, device="meta")

    _, told = layer(operand, operand, NESTED, None)

    sums = load_sums((told, told), DIMS, routing=who_chooses(routing))
    assert sums.shape == (2, 4, 4, len(FIELDS))
    assert sums.device.type == "meta"


def test_no_gradient_is_kept():
    layer = random_layer().train()
    residual, x, _ = operands(4)

    _, told = layer(residual, x, FLAT, None)

    assert told.aux_loss.requires_grad
    assert not load_sums((told,), (8,), routing="tokens_choose").requires_grad


def test_probabilities_in_float32_are_summed_in_float64():
    layer = random_layer().float()
    operand = torch.randn(7, 4, 8)

    with torch.no_grad():
        _, told = layer(operand, operand, FLAT, None)
    importance = field(load_sums((told,), (8,), routing="tokens_choose"), "importance")

    expected = told.classes[0].probs_GSE.double().sum(dim=(0, 1))
    torch.testing.assert_close(importance[0, 0], expected, rtol=1e-12, atol=0)


def test_a_probability_of_zero_has_no_entropy_and_an_even_choice_the_most():
    layer = random_layer(k=1, capacity_ratio=4.0)
    even, sure = (torch.full((7, 4, 8), 1.0, dtype=torch.float64) for _ in range(2))
    with torch.no_grad():
        layer.router.weight.zero_()
        _, at_even = layer(even, even, FLAT, None)
        layer.router.weight[2] = 1e4
        _, at_sure = layer(sure, sure, FLAT, None)

    even_sums, sure_sums = (
        load_sums((told,), (8,), routing="tokens_choose") for told in (at_even, at_sure)
    )

    assert summary(even_sums)["moe/entropy"] == pytest.approx(math.log(4), rel=1e-12)
    assert summary(sure_sums)["moe/entropy"] == 0
    assert dead_experts(sure_sums) == [(0, 0), (0, 1), (0, 3)]


def test_a_model_without_experts_has_no_load():
    with pytest.raises(RoutingError, match=r"without sparse experts has no load.*every or last$"):
        load_sums((), (8,), routing="tokens_choose")


def test_a_width_that_the_model_does_not_have_is_refused():
    dispatched = layers_ran("vanilla", FLAT)

    with pytest.raises(
        RoutingError, match=r"8 features, but .* widths are \(2, 4\); give the dims"
    ):
        load_sums(dispatched, (2, 4), routing="tokens_choose")


def test_what_a_whole_model_reports_is_summed_by_its_own_layers_and_widths():
    experts = replace(CONFIG, num_experts=3, group_images=1, noise=1.0)
    config = ModelConfig(
        image_size=16, patch_size=4, num_classes=3, dim=16, depth=4, heads=2, experts=experts
    )
    model = build_model(config).eval()
    model.set_effective_capacity(0.5)

    with torch.no_grad():
        output = model(torch.randn(2, 3, 16, 16))
    sums = load_sums(output.dispatched, config.dims, routing=experts.routing)
    rows = load_rows(sums, experts.layers(config.depth), config.dims)

    assert {row.layer for row in rows} == {1, 3}
    assert {row.width for row in rows} <= {2, 4, 8, 16}
    assert field(sums, "tokens")[:, :, 0].sum(1).tolist() == [32, 32]


# One layer, two widths of which one has no tokens, three experts: every rate by hand.
BY_HAND = {
    "tokens": (10, 10, 10),
    "unreached": (1, 1, 1),
    "reached_once": (4, 4, 4),
    "slots": (8, 8, 8),
    "wanted": (12, 8, 0),
    "used": (8, 6, 0),
    "gate_wanted": (6.0, 2.0, 0.0),
    "gate_kept": (4.5, 1.5, 0.0),
    "importance": (6.0, 3.0, 1.0),
    "entropy": (2.0, 1.0, 0.5),
}


def sums_by_hand():
    present_FE = torch.tensor([BY_HAND[name] for name in FIELDS], dtype=torch.float64)
    return torch.stack([torch.zeros_like(present_FE.T), present_FE.T]).unsqueeze(0)


def test_rates_are_those_of_arithmetic_on_paper():
    rows = load_rows(sums_by_hand(), (5,), (4, 8))

    assert [(row.layer, row.width, row.expert) for row in rows] == [(5, 8, 0), (5, 8, 1), (5, 8, 2)]
    assert [row.fill for row in rows] == [1.0, 0.75, 0.0]
    assert [row.drop_rate for row in rows] == pytest.approx([1 / 3, 1 / 4, 0])
    assert [row.gate_dropped for row in rows] == pytest.approx([0.25, 0.25, 0])
    assert [row.token_share for row in rows] == pytest.approx([8 / 14, 6 / 14, 0])
    assert [row.entropy for row in rows] == pytest.approx([0.35] * 3)
    assert (rows[0].by_none, rows[0].by_one, rows[0].by_more) == pytest.approx((0.1, 0.4, 0.5))


def test_a_summary_is_that_of_arithmetic_on_paper():
    sums = sums_by_hand()

    assert summary(sums) == pytest.approx(
        {
            "moe/drop_rate": 6 / 20,
            "moe/gate_dropped": 2 / 8,
            "moe/unreached": 0.1,
            "moe/fill_min": 0.0,
            "moe/entropy": 0.35,
            "moe/dead_experts": 1.0,
        }
    )
    assert drop_rates(sums).tolist() == pytest.approx([0.3])
    assert unreached_shares(sums).tolist() == pytest.approx([0.1])


def test_an_expert_is_dead_below_a_hundredth_of_an_even_share():
    sums = torch.zeros(2, 2, 4, len(FIELDS), dtype=torch.float64)
    used = field(sums, "used")
    used[0, 0] = torch.tensor([100.0, 100.0, 197.0, 0.0])
    used[0, 1, 3] = 3.0  # at another width: 3 of 400, an even share being 100
    used[1, 1] = torch.tensor([0.0, 300.0, 99.0, 1.0])  # 1 of 400 is a hundredth of 100

    assert dead_experts(sums) == [(1, 0)]
