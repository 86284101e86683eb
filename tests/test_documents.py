"""What documents say can be typed: every command is parsed, every name of the library exists with the arguments it is given."""

import ast
import inspect
import re
import shlex
from pathlib import Path

import pytest

import nextscale as ns
from nextscale import cli
from nextscale.cli import bench, train

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
IDS = [str(path.relative_to(ROOT)) for path in DOCUMENTS]


def blocks(path: Path, *languages: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.S | re.M)
    return [block for language, block in found if language in languages]


def commands(path: Path) -> list[list[str]]:
    """The command lines of a document, in blocks and in the running text."""
    lines = [
        line for block in blocks(path, "sh", "bash", "console") for line in block.replace("\\\n", " ").splitlines()
    ]
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.S | re.M)
    lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]
    found = []
    for line in lines:
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # no command
            continue
        whole = " ".join(words)
        for part in re.split(r" (?:;|&&|\|) |; ?", whole) if ";" in whole or "&&" in whole else [whole]:
            again = shlex.split(line, comments=True) if part == whole else part.split()
            while again and re.fullmatch(r"[A-Z_]+=\S*|\$", again[0]):  # variables, a prompt
                again = again[1:]
            found.append(again)
    return [words for words in found if words and not any(re.search(r"\.\.\.|<|\b[A-Z]{2,}\b", word) for word in words)]


def program(words: list[str]) -> list[str] | None:
    """What follows `nextscale`, however it was called."""
    if words[0].rpartition("/")[2] == "nextscale":
        return words[1:]
    if "-m" in words and words[words.index("-m") + 1 : words.index("-m") + 2] == ["nextscale"]:
        return words[words.index("-m") + 2 :]
    return None


@pytest.fixture
def parsed_alone(monkeypatch):
    """Commands end when they are parsed."""
    for module, name in ((cli, "parse"), (train, "parse_one_of"), (bench, "parse_one_of")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, real=real: real(*given) and (lambda: None))
    monkeypatch.setattr(train, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(train, "recipe_of", lambda name: "infinity" if "bits" in name else "var")


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_commands_are_understood(path, parsed_alone, capsys):
    for words in commands(path):
        asked = program(words)
        if not asked or (path.name == "decisions.md" and asked[-1].startswith("--")):  # names an option alone
            continue
        try:
            status = cli.main(asked)
        except SystemExit as end:  # --help
            status = end.code or 0
        assert status == 0, f"{path.name}: {shlex.join(words)}: {capsys.readouterr().err}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_scripts_and_tests_exist(path):
    for words in commands(path):
        for word in words:
            if re.fullmatch(r"(tests|benchmarks|tools|examples|scripts|docs|nextscale)/[\w/-]+\.\w+", word):
                assert (ROOT / word).exists(), f"{path.name}: {shlex.join(words)}"
        scripts = [word for word in words if re.fullmatch(r"(benchmarks|tools)/\w+\.py", word)]
        if words[0] == "python" and scripts:
            script = ast.parse((ROOT / scripts[0]).read_text(encoding="utf-8"))
            known = {
                arg.arg for node in ast.walk(script) if isinstance(node, ast.arguments) for arg in _arguments(node)
            }
            known |= {node.target.id for node in ast.walk(script) if isinstance(node, ast.AnnAssign) and _named(node)}
            known |= {node.value for node in ast.walk(script) if isinstance(node, ast.Constant)}
            for option in [word for word in words if word.startswith("--")]:
                name = option.removeprefix("--").partition("=")[0]
                names = {option.partition("=")[0], name.replace("-", "_"), name.removeprefix("no-").replace("-", "_")}
                assert names & known, f"{path.name}: {shlex.join(words)}: no {option}"


def _arguments(node: ast.arguments) -> list[ast.arg]:
    return [*node.posonlyargs, *node.args, *node.kwonlyargs]


def _named(node: ast.AnnAssign) -> bool:
    return isinstance(node.target, ast.Name)


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_python_names_what_there_is(path):
    for block in blocks(path, "python"):
        tree = ast.parse(block)
        for node in ast.walk(tree):
            where = f"{path.name}: {ast.unparse(node)[:100]}"
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "nextscale":
                module = __import__(node.module, fromlist=["x"])
                for name in node.names:
                    here = hasattr(module, name.name) or (Path(module.__file__).parent / f"{name.name}.py").exists()
                    assert here, where
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ns":
                assert hasattr(ns, node.attr), where
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and isinstance(node.func.value, ast.Name)
                and node.func.value.id == "ns"
            ):
                takes = inspect.signature(getattr(ns, node.func.attr)).parameters
                if not any(one.kind is one.VAR_KEYWORD for one in takes.values()):
                    assert {word.arg for word in node.keywords if word.arg} <= set(takes), where


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_links_lead_somewhere(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.S | re.M)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, place = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        there = (path.parent / file) if file else path
        assert there.exists(), f"{path.name}: {target}"
        if place and there.suffix == ".md":
            titles = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), flags=re.M)
            names = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert place in names, f"{path.name}: {target}"
