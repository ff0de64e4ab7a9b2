"""Who stands where: every rank in one row and one column, every expert once in a row."""

import pytest

from cluster.errors import LaunchError
from cluster.topology import Mesh, meshes

TABLES = [Mesh(1, 1), Mesh(4, 1), Mesh(1, 4), Mesh(2, 3), Mesh(3, 2), Mesh(8, 8)]


def test_ranks_are_numbered_along_the_rows():
    mesh = Mesh(data=2, expert=3)

    assert mesh.world == 6
    assert [mesh.place(rank) for rank in range(6)] == [
        (0, 0),
        (0, 1),
        (0, 2),
        (1, 0),
        (1, 1),
        (1, 2),
    ]
    assert [mesh.row(rank) for rank in (0, 2, 4)] == [(0, 1, 2), (0, 1, 2), (3, 4, 5)]
    assert [mesh.column(rank) for rank in (0, 3, 5)] == [(0, 3), (0, 3), (2, 5)]
    assert [mesh.experts(rank, 6) for rank in (0, 2, 5)] == [range(2), range(4, 6), range(4, 6)]


@pytest.mark.parametrize("mesh", TABLES)
def test_rows_and_columns_share_out_the_ranks_and_meet_once(mesh):
    ranks = range(mesh.world)

    for of in (mesh.row, mesh.column):
        assert sorted(rank for each in {of(rank) for rank in ranks} for rank in each) == list(ranks)
    assert all(set(mesh.row(rank)) & set(mesh.column(rank)) == {rank} for rank in ranks)
    assert all(len(mesh.row(rank)) == mesh.expert for rank in ranks)
    assert all(len(mesh.column(rank)) == mesh.data for rank in ranks)


@pytest.mark.parametrize("mesh", TABLES)
def test_a_row_holds_every_expert_once_in_order_and_a_column_the_same_ones(mesh):
    num_experts = 2 * mesh.expert

    for rank in range(mesh.world):
        in_row = [e for other in mesh.row(rank) for e in mesh.experts(other, num_experts)]
        assert in_row == list(range(num_experts))
        of_column = {mesh.experts(other, num_experts) for other in mesh.column(rank)}
        assert of_column == {mesh.experts(rank, num_experts)}


def test_a_table_is_made_of_ranks_and_columns():
    assert Mesh.of(6, 2) == Mesh(data=3, expert=2)
    assert Mesh.of(1, 1) == Mesh(data=1, expert=1)


@pytest.mark.parametrize(
    ("world", "expert", "message"),
    [
        (
            6,
            4,
            r"^experts cannot be spread over 4 of 6 ranks; set parallel\.expert to one of "
            r"1, 2, 3, 6, or parallel\.num_workers to a multiple of 4$",
        ),
        (2, 4, r"over 4 of 2 ranks; set parallel\.expert to one of 1, 2, or .* multiple of 4$"),
        (2, 0, r"over 0 of 2 ranks; set parallel\.expert to one of 1, 2, or .* multiple of 1$"),
    ],
)
def test_columns_that_do_not_divide_the_ranks_are_refused(world, expert, message):
    with pytest.raises(LaunchError, match=message):
        Mesh.of(world, expert)


def test_experts_that_columns_cannot_share_evenly_are_refused():
    with pytest.raises(
        LaunchError,
        match=r"^6 experts cannot be spread evenly over 4 ranks; set parallel\.expert to one of "
        r"1, 2, 3, 6$",
    ):
        Mesh(data=1, expert=4).experts(0, 6)


@pytest.mark.parametrize(
    ("world", "num_experts", "columns"),
    [(1, 8, [1]), (4, 8, [1, 2, 4]), (6, 8, [1, 2]), (8, 4, [1, 2, 4]), (12, 6, [1, 2, 3, 6])],
)
def test_all_tables_that_share_out_experts_evenly_are_listed_fewest_columns_first(
    world, num_experts, columns
):
    assert [mesh.expert for mesh in meshes(world, num_experts)] == columns
    assert {mesh.world for mesh in meshes(world, num_experts)} == {world}
