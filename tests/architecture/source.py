"""The repository's Python files as syntax trees: what the architecture tests read. Runs nothing."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("mone_core", "cluster", "pipelines")


@dataclass(frozen=True, eq=False)
class Source:
    """One Python file.

    Attributes:
        path: Relative to the root of the repository.
        text: What it holds.
    """

    path: Path
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, filename=str(self.path))

    @property
    def module(self) -> str:
        """Its dotted name: `mone_core.models` for `mone_core/models/__init__.py`."""
        parts = self.path.with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    def at(self, node: ast.AST, what: str) -> str:
        """A finding, to be clicked on in a terminal."""
        return f"{self.path}:{getattr(node, 'lineno', 1)}: {what}"


@dataclass(frozen=True)
class Import:
    """One imported module.

    Attributes:
        module: Dotted name; for `from a import b`, `a.b` where that is a file, else `a`.
        node: Where it stands.
        at_load: True if it runs when the file is loaded: in no function, not for types only.
    """

    module: str
    node: ast.stmt
    at_load: bool

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]


def sources(*folders: str) -> list[Source]:
    """Every Python file below the folders, in order."""
    return [source for folder in folders for source in _below(folder)]


@cache
def _below(folder: str) -> tuple[Source, ...]:
    paths = sorted((ROOT / folder).rglob("*.py"))
    assert paths, f"no Python files below {folder}: these tests would pass on nothing"
    return tuple(Source(path.relative_to(ROOT), path.read_text()) for path in paths)


@cache
def imports(source: Source) -> tuple[Import, ...]:
    """Everything that a file imports, wherever in the file."""
    return tuple(_imports_below(source.tree, at_load=True))


def _imports_below(node: ast.AST, *, at_load: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, child, at_load)
        elif isinstance(child, ast.ImportFrom):
            assert not child.level, "imports are absolute: ruff's own rules and ours say so"
            for alias in child.names:
                yield Import(_module_named(child.module or "", alias.name), child, at_load)
        else:
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for_types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            yield from _imports_below(child, at_load=at_load and not inside and not for_types)


@cache
def _module_named(module: str, name: str) -> str:
    """`from module import name`: the submodule where `name` is one of ours, else `module`."""
    below = ROOT / Path(*module.split(".")) / name
    return f"{module}.{name}" if below.is_dir() or below.with_suffix(".py").is_file() else module


def functions(source: Source) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every `def` of a file, nested ones too."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def report(findings: list[str]) -> str:
    """A list to read, as an assertion message."""
    return f"{len(findings)} to mend:\n  " + "\n  ".join(findings)
