"""Imports point one way: who may import whom, read from the syntax trees."""

import sys

import pytest

from tests.architecture.source import PACKAGES, Source, imports, report, sources

STDLIB = frozenset(sys.stdlib_module_names)

# Every package's own rule: what it may import beside the standard library and itself.
MAY_IMPORT = {
    "mone_core": {"torch", "numpy"},
    "cluster": {"ray", "yaml", "aiohttp"},  # aiohttp: errors of Ray's own job client
}

# Where one of these may stand inside the packages; a folder ends in a slash.
ONLY_IN = {
    "mlflow": ("pipelines/tracking.py",),
    "ray": (
        "cluster/",
        "pipelines/data/ray_reader.py",
        "pipelines/data/sharding/shards.py",
        "pipelines/sweep.py",
    ),
    "torch_xla": ("cluster/backends/",),
}

# A bare GPU machine proves the mathematics with torch, numpy and pytest alone.
BARE_TESTS = ("tests/mone_core", "tests/benchmarks", "tests/accelerator")
BARE = STDLIB | {"torch", "numpy", "pytest", "mone_core"}
# Benchmarks of the data path need the whole house, and what they compare it with.
WHOLE_HOUSE = (
    "tests/benchmarks/bench_index.py",
    "tests/benchmarks/bench_shard.py",
    "tests/benchmarks/bench_video.py",
    "tests/benchmarks/peers/",
)
# How tokens travel between its devices is part of that; these need torch alone, and no Ray.
BARE_MODULES = {"cluster.backends", "cluster.backends.collectives", "cluster.topology"}


def test_the_wings_import_only_what_they_may():
    findings = []
    for package, allowed in MAY_IMPORT.items():
        for source in sources(package):
            in_backend = source.path.as_posix().startswith("cluster/backends/")
            may = STDLIB | allowed | {package} | ({"torch", "torch_xla"} if in_backend else set())
            findings += [
                source.at(each.node, f"{package} may not import {each.module}")
                for each in imports(source)
                if each.top not in may
            ]
    assert not findings, report(findings)


def test_the_wings_do_not_know_each_other_and_nothing_knows_the_hallway():
    forbidden = {
        "mone_core": {"cluster", "pipelines", "tests"},
        "cluster": {"mone_core", "pipelines", "tests"},
        "pipelines": {"tests"},
    }
    findings = [
        source.at(each.node, f"{package} may not import {each.module}")
        for package, others in forbidden.items()
        for source in sources(package)
        for each in imports(source)
        if each.top in others
    ]
    assert not findings, report(findings)


@pytest.mark.parametrize("name", ONLY_IN)
def test_a_framework_stays_in_its_room(name):
    findings = [
        source.at(each.node, f"{each.module} may be imported only in {', '.join(ONLY_IN[name])}")
        for source in sources(*PACKAGES)
        for each in imports(source)
        if each.top == name and not _stands_in(source, ONLY_IN[name])
    ]
    assert not findings, report(findings)


def test_modules_do_not_import_each_other_in_a_circle():
    edges = {source.module: _loads(source) for source in sources(*PACKAGES)}
    circles = sorted({_smallest_first(circle) for circle in _circles(edges)})

    assert not circles, report([" -> ".join([*circle, circle[0]]) for circle in circles])


def test_the_mathematics_is_tested_with_torch_numpy_and_pytest_alone():
    bare = [
        source
        for folder in BARE_TESTS
        for source in _if_there(folder)
        if not _stands_in(source, WHOLE_HOUSE)
    ]
    above = [source for source in sources("tests") if source.path.as_posix() == "tests/conftest.py"]
    findings = [
        source.at(each.node, f"{each.module} is not on a bare machine")
        for source in [*bare, *above]
        for each in imports(source)
        if each.top not in BARE
        and each.module not in BARE_MODULES
        and not each.module.startswith(_as_modules(BARE_TESTS))
    ]
    assert bare
    assert not findings, report(findings)


def test_a_circle_is_found():
    """The search itself, on a graph that has one."""
    edges = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}

    assert {_smallest_first(circle) for circle in _circles(edges)} == {("b", "c")}


def _stands_in(source: Source, places: tuple[str, ...]) -> bool:
    path = source.path.as_posix()
    return any(path.startswith(p) if p.endswith("/") else path == p for p in places)


def _if_there(folder: str) -> tuple[Source, ...]:
    return tuple(s for s in sources("tests") if s.path.as_posix().startswith(folder + "/"))


def _as_modules(folders: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(folder.replace("/", ".") + "." for folder in folders)


def _loads(source: Source) -> set[str]:
    """Our own modules that loading a file loads, by name."""
    ours = {other.module for other in sources(*PACKAGES)}
    return {each.module for each in imports(source) if each.at_load and each.module in ours}


def _circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """One circle through every back edge of a depth-first walk."""
    found: list[list[str]] = []
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> None:
        if module in path:
            found.append(path[path.index(module) :])
        elif module not in done:
            for target in sorted(edges.get(module, ())):
                walk(target, [*path, module])
            done.add(module)

    for module in sorted(edges):
        walk(module, [])
    return found


def _smallest_first(circle: list[str]) -> tuple[str, ...]:
    start = circle.index(min(circle))
    return tuple(circle[start:] + circle[:start])
