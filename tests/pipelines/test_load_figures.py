"""Pictures of the experts' load: what they show of which steps, and when a report has them."""

import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest
import torch

from mone_core.load import FIELDS
from pipelines.load import LoadTable, append_load, read_loads
from pipelines.load_figures import (
    CROSS,
    any_dropped,
    any_unreached,
    drop_curve,
    expert_load,
    unreached_curve,
)
from pipelines.report import ReportContent, figure_files, write_report

LAYERS = (1, 3)
EVEN = {"tokens": 100, "slots": 60, "wanted": 50, "used": 50, "importance": 25, "entropy": 30}
NOTHING = ReportContent(
    title="run", summary=(), rows=(), results=(), routing=None, verdict=None, config_yaml=""
)


def table(step, experts=4, dims=(16,), **changes):
    """Two blocks with every token at the widest width, all experts alike but for `changes`."""
    sums = torch.zeros(len(LAYERS), len(dims), experts, len(FIELDS), dtype=torch.float64)
    for name, value in (EVEN | changes).items():
        sums[:, -1, :, FIELDS.index(name)] = torch.as_tensor(value).double()
    return LoadTable(step=step, layers=LAYERS, dims=dims, sums_LWEF=sums)


def tables(count=20, **changes):
    return [table(5 * (row + 1), **changes) for row in range(count)]


def text_in(svg):
    """All comments of an SVG: matplotlib writes there what it draws as paths."""
    parser = ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True))
    root = ElementTree.fromstring(svg, parser)
    return [each.text.strip() for each in root.iter() if each.tag is ElementTree.Comment]


def test_the_map_writes_fill_and_share_of_every_expert():
    words = text_in(expert_load([table(5, used=(60, 30, 30, 0), wanted=(90, 30, 30, 0))]))

    assert {"100", "50", "0"} <= set(words)  # percent of slots
    assert {"2.0", "1.0", CROSS} <= set(words)  # times the even share
    assert {"block", "expert", "1", "3"} <= set(words)


def test_the_map_shows_the_last_tenth_of_the_steps():
    early, late = tables(20, used=50), [table(100, used=30)]

    assert "Sparse experts, steps 91 to 100 of training" in text_in(expert_load(early))
    assert "Sparse experts, steps 1 to 5 of training" in text_in(expert_load(early[:1]))
    words = text_in(expert_load([*early[:18], table(95, used=30), *late]))
    assert words.count("50") == 8 + 1  # of 60 slots; and a tick of the scale
    assert "83" not in words


def test_a_nested_model_has_a_map_for_every_width_that_has_tokens():
    words = text_in(expert_load([table(5, dims=(4, 8, 16))]))

    assert words.count("tokens of 16 features") == 2  # filled, and taken
    assert "tokens of 8 features" not in words


def test_a_layer_without_tokens_of_a_width_is_left_blank():
    both = table(5, dims=(8, 16))
    both.sums_LWEF[1, 0] = both.sums_LWEF[1, 1]

    words = text_in(expert_load([both]))

    assert words.count("tokens of 8 features") == 2
    assert words.count("83") == 12  # two layers of full width, one of half: four experts each


def test_many_experts_have_colours_and_crosses_but_no_numbers():
    used = [50.0] * 63 + [0.0]
    words = text_in(expert_load([table(5, experts=64, used=used)]))

    assert words.count(CROSS) == 2  # one a block
    assert "83" not in words


@pytest.mark.parametrize("draw", [drop_curve, unreached_curve])
def test_the_curves_have_a_line_with_a_name_for_every_block(draw):
    words = text_in(draw(tables(used=40, unreached=5)))

    assert {"block 1", "block 3", "training step"} <= set(words)


def test_of_many_blocks_some_have_names_the_last_among_them():
    one = table(5)
    many = [
        LoadTable(
            step=step,
            layers=tuple(range(30)),
            dims=(16,),
            sums_LWEF=one.sums_LWEF[:1].repeat(30, 1, 1, 1),
        )
        for step in (5, 10)
    ]

    names = [word for word in text_in(drop_curve(many)) if word.startswith("block")]

    assert names == [f"block {layer}" for layer in range(2, 30, 3)]


def test_whether_there_is_something_to_draw_is_known_from_the_sums():
    assert not any_dropped(tables())
    assert not any_unreached(tables())
    assert any_dropped([*tables(), table(100, used=49)])
    assert any_unreached([*tables(), table(100, unreached=1)])


def test_the_same_tables_give_the_same_bytes():
    for draw in (expert_load, drop_curve, unreached_curve):
        assert draw(tables()) == draw(tables())


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, ["experts.svg"]),
        ({"used": 40, "unreached": 3}, ["experts.svg", "dropped-choices.svg"]),
        ({"unreached": 3}, ["experts.svg", "unreached-tokens.svg"]),
    ],
)
def test_a_report_shows_the_map_and_what_was_lost_if_anything_was(tmp_path, changes, names):
    content = replace(NOTHING, loads=tuple(tables(**changes)))
    path = tmp_path / "report.html"

    write_report(path, content)

    assert list(figure_files(content)) == names
    assert "How full the experts are" in path.read_text()
    assert path.read_text().count("<figure") == len(names)


def test_a_report_of_a_model_without_sparse_experts_does_not_speak_of_them(tmp_path):
    path = tmp_path / "report.html"

    write_report(path, NOTHING)

    assert "experts" not in path.read_text()


def test_one_row_has_a_map_and_no_curve():
    assert list(figure_files(replace(NOTHING, loads=(table(5, used=40),)))) == ["experts.svg"]


def test_what_a_run_recorded_is_what_is_drawn(tmp_path):
    for each in tables(used=40):
        append_load(tmp_path, each)

    assert expert_load(read_loads(tmp_path)) == expert_load(tables(used=40))
