"""`mone plan`'s formulas against numbers worked out by hand, and against what the models do."""

import dataclasses
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cluster.topology import Mesh
from mone_core.models import (
    DENSE,
    VIT_SIZES,
    VMOE_SIZES,
    ExpertsConfig,
    ModelConfig,
    NestingConfig,
    SkippingConfig,
    VideoConfig,
    build_model,
)
from pipelines.errors import UsageError
from pipelines.planning.clusters import Cluster, Numbers, cluster_names, load_cluster
from pipelines.planning.compute import calls, expert_seconds
from pipelines.planning.estimate import estimate
from pipelines.planning.links import exchange, reduction
from pipelines.planning.meshes import as_plain, plan_run
from pipelines.planning.work import work_of

H100, A100, SLOW = (989e12, 450e9), (312e12, 300e9), (989e12, 50e9)  # FLOP/s, bytes/s of a link
ROW = Mesh(1, 8)
SMALL = ModelConfig(image_size=28, patch_size=4, num_classes=10, dim=64, depth=4, heads=4)
EXPERTS = ExpertsConfig(placement="every", num_experts=4, k=2, group_images=2)


def machine(flops=1e12, link=1e9, **changes):
    """A cluster of one island whose memory and latencies cost nothing, and whose shares are 1."""
    facts = {"devices": 64, "island": 64, "dtype": "bfloat16", "overlap": False}
    given = {name: changes.pop(name) for name in facts if name in changes}
    ones = {each.name: 1.0 for each in dataclasses.fields(Numbers) if each.name.endswith("_share")}
    numbers = ones | {
        "flops_per_second": flops,
        "memory_bytes": 1e15,
        "memory_bytes_per_second": 1e30,
        "call_seconds": 0.0,
        "fast_bytes_per_second": link,
        "fast_latency_seconds": 0.0,
        "slow_bytes_per_second": link,
        "slow_latency_seconds": 0.0,
    }
    return Cluster(
        name="test",
        what="a machine on paper",
        numbers=Numbers(**(numbers | changes)),
        sources={},
        **(facts | given),
    )


def one_sparse_layer(dim=768, hidden=3072, nesting=DENSE, **experts):
    """Two blocks of 196 tokens, the second with 8 experts; 128 images are routed together."""
    usual = {"num_experts": 8, "k": 2, "capacity_ratio": 1.05, "group_images": 128}
    return ModelConfig(
        dim=dim,
        depth=2,
        heads=6,
        mlp_dim=hidden,
        nesting=nesting,
        experts=ExpertsConfig(placement="every", **(usual | experts)),
    )


@pytest.mark.parametrize(
    ("peaks", "gemm_ms", "exchange_ms"),
    [(H100, 0.50, 0.31), (A100, 1.59, 0.47), (SLOW, 0.50, 2.8)],
)
def test_the_worked_example_of_a_layer_of_v_moe_b16(peaks, gemm_ms, exchange_ms):
    """8 experts on 8 ranks, K = 2, C = 1.05, 128 images a rank, forward, at full speed."""
    config, cluster = one_sparse_layer(), machine(*peaks)
    layer = work_of(config, 1.0).layers[1]

    found = estimate(config, 8 * 128, ROW, cluster)

    assert 1e3 * sum(expert_seconds(layer, config, 128, 8, cluster)) == pytest.approx(
        gemm_ms, abs=0.006
    )
    assert found.exchange_bytes / 2 == pytest.approx(142e6, abs=0.5e6)  # backward as much again
    assert 1e3 * found.exchange_seconds / 2 == pytest.approx(exchange_ms, abs=0.04)


@pytest.mark.parametrize(("dim", "hidden"), [(384, 1536), (768, 3072), (1024, 4096)])
@pytest.mark.parametrize(
    ("flops", "link", "column"),
    [(312e12, 300e9, 0), (989e12, 450e9, 1), (989e12, 50e9, 2), (312e12, 25e9, 3)],
)
def test_exchange_over_products_depends_on_hidden_width_and_machine_alone(
    dim, hidden, flops, link, column
):
    """60 % of peak, 80 % of the link, 8 ranks: the table for ViTs S, B and L."""
    table = {1536: (0.44, 0.94, 8.4, 5.3), 3072: (0.22, 0.47, 4.2, 2.7)}
    table[4096] = (0.17, 0.35, 3.2, 2.0)
    cluster = machine(flops, link, product_share=0.6, exchange_share=0.8)

    for k, images in ((1, 128), (2, 256)):
        config = one_sparse_layer(dim - dim % 6, hidden, k=k)
        slots = work_of(config, 1.0).layers[1].rows_of_experts(images)
        seconds = expert_seconds(work_of(config, 1.0).layers[1], config, images, 8, cluster)
        found = exchange(slots, seconds, ROW, cluster)

        assert found.seconds / sum(seconds) == pytest.approx(table[hidden][column], rel=0.03)


@pytest.mark.parametrize(
    ("budget", "megabytes"), [(1.0, 67.4), (0.7, 47.1), (0.5, 33.5), (0.3, 19.9)]
)
def test_only_the_features_of_a_width_travel(budget, megabytes):
    """ViT-B, 128 images, one expert a token, 8 ranks, forward both ways."""
    nesting = NestingConfig(effective_capacity=budget)
    config = one_sparse_layer(nesting=nesting, k=1, capacity_ratio=1.0)

    found = estimate(config, 8 * 128, ROW, machine())

    assert found.exchange_bytes / 2 == pytest.approx(1e6 * megabytes, abs=0.15e6)
    realised = sum(
        (each.stop - each.start) * each.dim / 768 / 196
        for each in work_of(config, budget).layers[1].tokens.segments
    )
    assert found.exchange_bytes / 2 == pytest.approx(67.4e6 * realised, rel=2e-3)
    assert realised == pytest.approx(budget, abs=0.01)


def test_products_are_the_operations_of_the_model_over_its_share_of_peak():
    config = VIT_SIZES["B"]
    macs = build_model(SMALL).macs()

    found = estimate(SMALL, 64, Mesh(4, 1), machine(1e12, product_share=0.5))

    assert work_of(SMALL, 0.5).macs == macs
    assert found.gemm_seconds == pytest.approx(6 * macs * 16 / 0.5e12)
    dense = dataclasses.replace(config, nesting=DENSE)
    assert work_of(dense, 1.0).macs == pytest.approx(17.6e9, rel=0.01)  # as published


def test_what_memory_costs_comes_on_top():
    """A dense ViT block of one token and D = 2, F = 8, where nothing but memory takes time."""
    config = ModelConfig(
        image_size=1, patch_size=1, num_classes=1, dim=2, depth=1, heads=1, nesting=DENSE
    )
    free = machine(1e30, dtype="float32", memory_bytes_per_second=1.0, traffic_share=0.5)
    linears = (2 + 6 + 12) + (2 + 2 + 4) + 2 * (2 + 8 + 16)
    core, stream, gelu = (4 + 8) * 2, (10 + 12) * 2, 5 * 8
    parameters = work_of(config, 1.0).dense_parameters

    found = estimate(config, 1, Mesh(1, 1), free)

    beside = 4 * (3 * linears + core + stream + gelu)
    assert found.other_seconds == pytest.approx(beside / 0.5 + 40 * parameters)
    assert found.efficiency < 1e-6


def test_softmax_lets_the_core_of_attention_run_at_half_speed():
    found = estimate(dataclasses.replace(SMALL, nesting=DENSE), 1, Mesh(1, 1), machine(1e12))

    forward = 4 * 4 * 49 * 49 * 64 / 1e12  # 4 blocks of 49 tokens
    assert found.other_seconds == pytest.approx(forward * (3.5 / 0.5 - 3), rel=1e-6)


@pytest.mark.parametrize(("dtype", "bytes_of_a_weight"), [("float32", 4), ("bfloat16", 6)])
def test_experts_are_spread_and_everything_else_is_on_every_rank(dtype, bytes_of_a_weight):
    config = dataclasses.replace(SMALL, experts=EXPERTS)
    model = build_model(config)
    experts = 2 * 4 * (2 * 64 * 256 + 256 + 64)
    dense = sum(each.numel() for each in model.parameters()) - experts

    for columns in (1, 2, 4):
        memory = estimate(config, 32, Mesh(4 // columns, columns), machine(dtype=dtype)).memory

        held = dense + experts / columns
        assert memory.weights == bytes_of_a_weight * held
        assert (memory.gradients, memory.moments) == (4 * held, 8 * held)
        parts = (memory.weights, memory.gradients, memory.moments, memory.activations)
        assert memory.total == sum(parts) + memory.exchange
        assert (memory.exchange > 0) == (columns > 1)


@pytest.mark.parametrize("nesting", [DENSE, NestingConfig()], ids=["dense", "nested"])
@pytest.mark.parametrize("experts", [ExpertsConfig(), EXPERTS], ids=["mlp", "experts"])
def test_activations_are_what_autograd_keeps(nesting, experts):
    config = dataclasses.replace(SMALL, dim=128, nesting=nesting, experts=experts)
    model = build_model(config)
    weights = {each.untyped_storage().data_ptr() for each in model.parameters()}
    pixels = torch.randn(16, 3, 28, 28)
    kept = {pixels.untyped_storage().data_ptr(): pixels.untyped_storage().nbytes()}
    alive = []

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            alive.append(tensor)
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(pixels).logits_BK.sum()

    told = estimate(config, 16, Mesh(1, 1), machine(dtype="float32")).memory.activations
    assert told == pytest.approx(sum(kept.values()), rel=0.06)


@pytest.mark.parametrize("num_experts", [0, 2, 8])
@pytest.mark.parametrize("widths", [(1.0,), (0.5, 1.0), (0.125, 0.25, 0.5, 1.0)])
def test_calls_are_those_that_torch_gets(widths, num_experts):
    """Of two more blocks, the second with experts, in forward and backward pass."""
    nesting = DENSE if len(widths) == 1 else NestingConfig(widths=widths, effective_capacity=0.6)
    experts = dataclasses.replace(EXPERTS, num_experts=num_experts) if num_experts else None
    config = dataclasses.replace(SMALL, nesting=nesting, experts=experts or ExpertsConfig())

    counted = [_count_calls(dataclasses.replace(config, depth=depth)) for depth in (2, 4)]

    two = work_of(config, nesting.effective_capacity).layers[:2]
    told = sum(calls(layer, num_experts) for layer in two)
    assert told == pytest.approx(counted[1] - counted[0], rel=0.1)


def _count_calls(config):
    class Count(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            name = operator.overloadpacket.__name__
            self.seen += not operator.is_view and "empty" not in name and name != "_unsafe_view"
            return operator(*args, **(kwargs or {}))

    model = build_model(config)
    with Count() as count:
        output = model(torch.randn(4, 3, 28, 28))
        (output.logits_BK.sum() + output.aux_loss).backward()
    return count.seen


def test_a_width_class_travels_while_those_before_it_are_computed():
    """Two classes that take 1 s on the wire, each way, and 10 s to compute."""
    classes = [(8, 8), (16, 4)]  # of as many bytes
    link = 2 * 64 * 3 / 4  # what leaves a rank of four per second
    row = Mesh(1, 4)

    def exposed(classes, seconds, *, overlap):
        found = exchange(classes, seconds, row, machine(link=link, overlap=overlap))
        assert found.seconds == 2 * len(classes)
        assert found.num_bytes == 2 * len(classes) * link
        return found.exposed_seconds

    assert exposed(classes, [10.0, 10.0], overlap=False) == 4
    assert exposed(classes, [10.0, 10.0], overlap=True) == 2  # the first there, the last back
    assert exposed(classes, [0.0, 0.0], overlap=True) == 4
    assert exposed(classes[:1], [10.0], overlap=True) == 2


def test_nothing_travels_where_every_rank_has_all_experts():
    config = dataclasses.replace(SMALL, experts=EXPERTS)

    found = estimate(config, 32, Mesh(4, 1), machine(fast_latency_seconds=1.0))

    assert (found.exchange_bytes, found.exchange_seconds) == (0, 0)


@pytest.mark.parametrize(
    ("island", "seconds"),
    [
        (4, 3 / 100 + 0.5),  # all inside: a quarter of the buffer to each of three
        (2, 2 / 10 + 7),  # one inside, two outside, at once
        (1, 3 / 10 + 7),
        (3, 3 / 10 + 7),  # of islands (0 1 2) (3 4 5) (6 7 ..) rank 3 has no neighbour in its row
    ],
)
def test_peers_on_another_island_are_reached_by_the_slow_link(island, seconds):
    links = {"fast_bytes_per_second": 100.0, "slow_bytes_per_second": 10.0}
    waits = {"fast_latency_seconds": 0.5, "slow_latency_seconds": 7.0}
    cluster = machine(devices=12, island=island, **links, **waits)

    found = exchange([(2, 1)], [0.0], Mesh(3, 4), cluster)  # 4 bytes, one to each rank

    assert found.seconds == pytest.approx(2 * seconds)


def test_gradients_are_summed_over_all_ranks_and_those_of_experts_over_a_column():
    links = {"fast_bytes_per_second": 1e3, "slow_bytes_per_second": 10.0}
    cluster = machine(devices=16, island=4, reduction_share=0.5, **links)
    mesh = Mesh(4, 4)  # a row is an island: a column has one rank on each

    dense = reduction(100, 0, mesh, cluster)
    experts = reduction(0, 100, mesh, cluster)

    ring = 2 * 3 / 4 * 400  # over four
    assert dense[0] == 2 * 15 / 16 * 400
    assert dense[1] == pytest.approx(max(ring / 1e3, ring / 4 / 10) / 0.5)  # four share the way out
    assert experts == pytest.approx((ring, ring / 10 / 0.5))
    assert reduction(100, 100, mesh, cluster) == pytest.approx(
        (dense[0] + experts[0], dense[1] + experts[1])
    )
    assert reduction(100, 100, Mesh(1, 1), cluster) == (0, 0)
    assert reduction(0, 100, Mesh(1, 4), cluster) == (0, 0)


def test_every_25_mib_of_gradients_wait_once():
    cluster = machine(link=1e30, devices=4, island=4, fast_latency_seconds=1.0)

    assert reduction(6_553_600, 0, Mesh(4, 1), cluster)[1] == pytest.approx(1)
    assert reduction(6_553_601, 0, Mesh(4, 1), cluster)[1] == pytest.approx(2)


def test_the_sum_of_gradients_hides_behind_the_backward_pass_where_it_can():
    def exposed(**changes):
        found = estimate(SMALL, 64, Mesh(4, 1), machine(1e9, 1e5, **changes))
        return found.exposed_seconds, found

    shown, found = exposed(overlap=False)
    hidden, _ = exposed(overlap=True)

    assert shown == pytest.approx(found.reduction_seconds)
    assert hidden == pytest.approx(found.reduction_seconds - found.gemm_seconds * 2 / 3)
    assert found.step_seconds == found.gemm_seconds + found.other_seconds + shown
    assert found.images_per_second == 64 / found.step_seconds


def test_a_step_at_one_of_several_budgets_takes_their_mean_and_room_for_the_largest():
    config = dataclasses.replace(SMALL, experts=EXPERTS)
    cluster = machine(memory_bytes_per_second=1e9)
    mesh = Mesh(2, 2)

    def step(*budgets, together=False):
        return estimate(config, 16, mesh, cluster, budgets=budgets, together=together)

    low, high, mean, both = step(0.2), step(0.9), step(0.2, 0.9), step(0.2, 0.9, together=True)

    for name in ("gemm_seconds", "exchange_bytes", "exchange_seconds"):
        total = getattr(low, name) + getattr(high, name)
        assert getattr(mean, name) == pytest.approx(total / 2)
        assert getattr(both, name) == pytest.approx(total)
    assert mean.step_seconds == pytest.approx((low.step_seconds + high.step_seconds) / 2)
    assert both.step_seconds < low.step_seconds + high.step_seconds  # one update, one reduction
    assert mean.memory == high.memory
    assert both.memory.activations == pytest.approx(
        low.memory.activations + high.memory.activations
    )
    assert step(0.5) == estimate(config, 16, mesh, cluster)


@pytest.mark.parametrize(
    ("changes", "budget"),
    [
        ({"nesting": DENSE, "skipping": SkippingConfig(every=2, capacity=0.5)}, 1.0),
        ({"nesting": NestingConfig(assignment="constant", slices="hidden")}, 0.5),
        ({"nesting": NestingConfig(allocation="mod_greedy")}, 0.5),
        ({"nesting": NestingConfig(router_layers=(2,))}, 0.3),
    ],
    ids=["mixture-of-depths", "matformer", "skipped tokens", "late router"],
)
def test_every_kind_of_block_costs_less_than_the_dense_one(changes, budget):
    dense = dataclasses.replace(SMALL, nesting=DENSE)

    less = estimate(dataclasses.replace(SMALL, **changes), 8, ROW, machine(), budgets=[budget])
    full = estimate(dense, 8, ROW, machine())

    assert less.gemm_seconds < full.gemm_seconds
    assert less.memory.activations < full.memory.activations * 1.02
    assert less.other_seconds <= full.other_seconds


def test_meshes_come_best_first_and_each_refusal_says_why():
    experts = dataclasses.replace(EXPERTS, group_images=8)
    config = dataclasses.replace(SMALL, experts=experts)
    cluster = machine(1e13, 1e9, devices=16, island=2, slow_bytes_per_second=1e8)

    plan = plan_run(config, 128, cluster)

    assert [each.mesh.expert for each in plan.fitting] == sorted(
        (each.mesh.expert for each in plan.fitting),
        key=lambda n: estimate(config, 128, Mesh(16 // n, n), cluster).step_seconds,
    )
    assert {each.mesh for each in plan.fitting} == {Mesh(16, 1), Mesh(8, 2), Mesh(4, 4)}
    assert [(each.mesh, each.reason) for each in plan.refused] == [
        (Mesh(2, 8), "experts not divisible: 4 over 8 ranks"),
        (Mesh(1, 16), "experts not divisible: 4 over 16 ranks"),
    ]
    reasons = {each.reason for each in plan_run(config, 64, cluster).refused}
    assert "routing group not divisible: 4 images of a rank in groups of 8" in reasons
    reasons = {each.reason for each in plan_run(config, 100, cluster).refused}
    assert reasons == {"batch not divisible: 100 images over 16 ranks"}


def test_spreading_experts_can_make_a_model_fit():
    config = dataclasses.replace(VMOE_SIZES["B/16"], num_classes=1000)
    experts = estimate(config, 64, Mesh(8, 1), machine()).memory.total
    spread = estimate(config, 64, Mesh(1, 8), machine()).memory.total
    cluster = machine(devices=8, island=8, memory_bytes=(experts + spread) / 2 / 0.9)
    cluster = dataclasses.replace(
        cluster, numbers=dataclasses.replace(cluster.numbers, memory_share=0.9)
    )

    plan = plan_run(config, 64, cluster)

    assert plan.fitting[0].mesh.expert > 1
    assert plan.refused[0].mesh == Mesh(8, 1)
    assert plan.refused[0].reason == (
        f"does not fit memory: {experts / 1e9:.1f} GB of {cluster.room / 1e9:.1f} GB a device"
    )


def test_a_model_without_sparse_experts_has_data_ranks_alone():
    plan = plan_run(SMALL, 64, machine(devices=8, island=8))

    assert [each.mesh for each in plan.fitting] == [Mesh(8, 1)]
    assert plan.refused == ()


def test_workers_are_devices():
    cluster = machine(devices=8, island=4)

    assert plan_run(SMALL, 64, cluster, workers=2).fitting[0].mesh == Mesh(2, 1)
    for workers in (0, 9):
        with pytest.raises(
            UsageError, match=rf"--workers must be 1 to 8, .* of test, got {workers};"
        ):
            plan_run(SMALL, 64, cluster, workers=workers)


def test_clips_are_refused():
    config = dataclasses.replace(SMALL, video=VideoConfig(frames=4))

    with pytest.raises(
        UsageError, match=r"a plan is for images: model\.video\.frames must be 1, got 4"
    ):
        estimate(config, 8, ROW, machine())


@pytest.mark.parametrize("name", cluster_names())
def test_every_described_cluster_can_be_planned_for_and_names_its_sources(name):
    cluster = load_cluster(name)
    config = dataclasses.replace(
        VIT_SIZES["S"], experts=dataclasses.replace(EXPERTS, num_experts=8)
    )

    plan = plan_run(config, cluster.devices * 8, cluster)

    assert set(cluster.sources) == {each.name for each in dataclasses.fields(Numbers)}
    assert all(map(str.strip, cluster.sources.values()))
    assert plan.fitting
    for each in plan.fitting:
        assert 0 < each.efficiency < 1
        assert math.isfinite(each.step_seconds)
    assert as_plain(plan)["meshes"][0]["step_seconds"] == plan.fitting[0].step_seconds
