"""Sizes and words: no function or file too long, nothing public without a docstring and types."""

import ast
from collections.abc import Iterator

from tests.architecture.source import PACKAGES, Source, functions, report, sources

FUNCTION_LINES = 80
FILE_LINES = 500


def test_no_function_is_over_80_lines():
    findings = [
        source.at(node, f"{node.name} has {lines} lines")
        for source in sources(*PACKAGES, "tests")
        for node in functions(source)
        if (lines := (node.end_lineno or 0) - node.lineno + 1) > FUNCTION_LINES
    ]
    assert not findings, report(findings)


def test_no_file_is_over_500_lines():
    findings = [
        f"{source.path}: {lines} lines"
        for source in sources(*PACKAGES, "tests")
        if (lines := len(source.text.splitlines())) > FILE_LINES
    ]
    assert not findings, report(findings)


def test_every_file_says_what_it_is():
    findings = [
        str(source.path)
        for source in sources(*PACKAGES, "tests")
        if not ast.get_docstring(source.tree)
    ]
    assert not findings, report(findings)


def test_every_public_function_and_class_has_a_docstring():
    findings = [
        source.at(node, f"{node.name} has no docstring")
        for source in sources(*PACKAGES)
        for node in _public(source)
        if not ast.get_docstring(node)
    ]
    assert not findings, report(findings)


def test_every_function_is_fully_annotated():
    findings = [
        source.at(node, f"{node.name}: no type for {', '.join(missing)}")
        for source in sources(*PACKAGES)
        for node in functions(source)
        if (missing := _without_type(node))
    ]
    assert not findings, report(findings)


def _public(source: Source) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """Functions and classes at the top of a file whose names have no underscore."""
    for node in source.tree.body:
        named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        if named and not node.name.startswith("_") and not _is_overload(node):
            yield node


def _is_overload(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> bool:
    return any(ast.unparse(decorator).endswith("overload") for decorator in node.decorator_list)


def _without_type(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    arguments = node.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    every += [rest for rest in (arguments.vararg, arguments.kwarg) if rest]
    missing = [a.arg for a in every if not a.annotation and a.arg not in ("self", "cls")]
    return missing if node.returns else [*missing, "the result"]
