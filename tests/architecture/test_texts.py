"""Texts: no path of one machine, no unfilled message, no unread message, no pickle from a file."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

from tests.architecture.source import PACKAGES, ROOT, Source, report, sources

# Folders of one developer's machine; a container's own users have their homes under infra/.
MACHINE_PATH = re.compile(r"(?<![\w.-])/(?:work|root|Users|home)/[\w.-]+")
PLACEHOLDER = re.compile(r"\{[A-Za-z_][\w.\[\]]*(?:![rsa])?(?::[^{}]*)?\}")
TEXT_SUFFIXES = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".sh", ".j2", ".jsonl", ".cpu"}
WORDLESS = {"KeyboardInterrupt", "SystemExit"}  # Ctrl-C says nothing, and an exit is a number
PICKLES = {"pickle", "cPickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}


def test_no_text_holds_a_path_of_one_machine():
    findings = [
        f"{path.relative_to(ROOT)}:{number}: {match.group()}"
        for path in _texts()
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if (match := MACHINE_PATH.search(line)) and not _is_containers_home(path, match.group())
    ]
    assert not findings, report(findings)


def test_no_raised_message_holds_an_unfilled_placeholder():
    findings = [
        f"{source.path}:{line}: is this text meant to be an f-string? {text}"
        for source in sources(*PACKAGES)
        for line, text in _unfilled(source)
    ]
    assert not findings, report(findings)


def test_every_check_that_something_raises_reads_the_message():
    findings = [
        source.at(node, "pytest.raises without match=")
        for source in sources("tests")
        for node in _calls(source)
        if _name(node.func) == "pytest.raises"
        and not any(keyword.arg == "match" for keyword in node.keywords)
        and _name(node.args[0]) not in WORDLESS
    ]
    assert not findings, report(findings)


def test_no_package_reads_or_writes_pickles():
    findings = [
        source.at(node, f"{module}: files are JSON, Parquet or safetensors")
        for source in sources(*PACKAGES)
        for node in ast.walk(source.tree)
        for module in _imported_names(node)
        if PICKLES & set(module.split("."))
    ]
    assert not findings, report(findings)


def test_nothing_is_loaded_that_could_run_code():
    findings = []
    for source in sources(*PACKAGES):
        for node in _calls(source):
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if _name(node.func) == "torch.load" and given.get("weights_only") != "True":
                findings.append(source.at(node, "torch.load without weights_only=True"))
            if given.get("allow_pickle", "False") != "False":
                findings.append(source.at(node, "allow_pickle"))
            if _name(node.func) in ("yaml.load", "yaml.load_all") and (
                given.get("Loader") not in _safe_loaders(source)
            ):
                findings.append(source.at(node, "yaml.load without a SafeLoader"))
    assert not findings, report(findings)


def test_the_searches_find_what_they_look_for():
    text = 'raise E(\n"no {name!r} in " f"{folder} {{x}}"\n"{size:.2f}" "{}", "{a}".format(a=1))'

    assert _unfilled(Source(Path("a.py"), text)) == [(2, '"no {name!r} in "'), (3, '"{size:.2f}"')]
    assert MACHINE_PATH.search("see " + "/".join(("", "root", "data")))
    assert not MACHINE_PATH.search("a/root/b, ./root/c, https://example.org/home/d")


def _safe_loaders(source: Source) -> set[str]:
    """yaml's own, and the classes of this file that derive from it."""
    names = {"yaml.SafeLoader", "yaml.CSafeLoader"}
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ClassDef) and names & {_name(base) for base in node.bases}:
            names.add(node.name)
    return names


def _texts() -> Iterator[Path]:
    """Every text file of the repository that people write."""
    for folder in (*PACKAGES, "tests", "infra", ".ci"):
        for path in sorted((ROOT / folder).rglob("*")):
            by_name = path.suffix in TEXT_SUFFIXES or "." not in path.name
            if path.is_file() and by_name and "__pycache__" not in path.parts:
                yield path
    for path in sorted(ROOT.iterdir()):
        if path.is_file() and (path.suffix in TEXT_SUFFIXES or path.name == "Makefile"):
            yield path


def _is_containers_home(path: Path, text: str) -> bool:
    return text.startswith("/home/") and path.is_relative_to(ROOT / "infra")


def _unfilled(source: Source) -> list[tuple[int, str]]:
    """Plain strings inside a `raise` with a {name} that nothing fills in.

    Read from the tokens: a syntax tree joins a plain string to the f-string beside it.
    """
    raised = [node for node in ast.walk(source.tree) if isinstance(node, ast.Raise)]
    filled = [node for node in _calls(source) if _name(node.func).endswith("format")]
    if not raised:
        return []
    tokens = tokenize.generate_tokens(io.StringIO(source.text).readline)
    return [
        (token.start[0], token.string)
        for token in tokens
        if token.type == tokenize.STRING
        and "f" not in token.string[: token.string.index(token.string[-1])].lower()
        and PLACEHOLDER.search(token.string)
        and any(_holds(node, token.start) for node in raised)
        and not any(_holds(node, token.start) for node in filled)
    ]


def _holds(node: ast.stmt | ast.expr, place: tuple[int, int]) -> bool:
    end = (node.end_lineno or node.lineno, node.end_col_offset or 0)
    return (node.lineno, node.col_offset) <= place < end


def _calls(source: Source) -> Iterator[ast.Call]:
    return (node for node in ast.walk(source.tree) if isinstance(node, ast.Call))


def _name(node: ast.expr) -> str:
    """`torch.load` of a call to it; `.load` where what stands before the dot is no name."""
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def _imported_names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []
