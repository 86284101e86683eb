"""What documents and help tell their readers to type can be typed: commands parse, files exist, Python calls what there is.

Nothing is run: the functions that commands lead to are replaced by some of the same arguments that do nothing.
"""

import ast
import builtins
import importlib
import inspect
import io
import re
import runpy
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache, wraps
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import tyro

import nextscale as ns
from nextscale import cli
from nextscale.checkpoint import recipe_of

ROOT = Path(__file__).parent.parent
GUIDES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
SCRIPTS = [*sorted((ROOT / "benchmarks").glob("*.py")), *sorted((ROOT / "tools").glob("*.py"))]
HELP = sorted((ROOT / "nextscale" / "cli").glob("*.py"))
PLACEHOLDER = re.compile(r"\.\.\.|[A-Z]{2,}|N")  # a word that the reader replaces


@dataclass(frozen=True)
class Piece:
    """Something to type, and where it stands."""

    place: str
    text: str
    inline: bool = False


def pieces(path: Path, languages: tuple[str, ...]) -> Iterator[Piece]:
    """Blocks of a document in these languages, and what it quotes inside lines."""
    text, name = path.read_text(encoding="utf-8"), path.relative_to(ROOT)
    fence = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.S | re.M)
    for found in fence.finditer(text):
        if found[1] in languages:
            yield Piece(f"{name}:{text[: found.start(2)].count(chr(10)) + 1}", found[2])
    lines_alone = ours_alone(fence.sub(lambda found: "\n" * found[0].count("\n"), text))
    for found in re.finditer(r"`([^`]+)`", lines_alone):
        line = lines_alone[: found.start()].count("\n") + 1
        yield Piece(f"{name}:{line}", " ".join(found[1].split()), inline=True)


def ours_alone(text: str) -> str:
    """Without the first column of tables that set other code beside ours (`| there | here |`), line for line."""
    theirs, left = False, []
    for line in text.splitlines():
        theirs = line.startswith("| there |") or (theirs and line.startswith("|"))
        left.append("|".join(["", "", *line.split("|")[2:]]) if theirs else line)
    return "\n".join(left)


# --- commands ---


def shell() -> Iterator[Piece]:
    """Each line that a shell would read, wherever it is written."""
    for path in GUIDES:
        for piece in pieces(path, ("sh",)):
            yield from [piece] if piece.inline else lines(piece.place, piece.text)
    for path in sorted((ROOT / "docs").rglob("*.sh")):
        yield from lines(f"{path.relative_to(ROOT)}:1", path.read_text(encoding="utf-8"))
    for path in [*HELP, *SCRIPTS]:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if found := re.match(
                r"\s*(?:(?:Try|Then|Or|Example|And back): )?((?:nextscale|torchrun|python) \S.*)", line
            ):
                yield Piece(f"{path.relative_to(ROOT)}:{number}", found[1])


def lines(place: str, text: str) -> Iterator[Piece]:
    """The lines of a block, those that end in a backslash together with the next."""
    name, _, first = place.rpartition(":")
    begun, whole = int(first), ""
    for number, line in enumerate(text.splitlines(), int(first)):
        begun = begun if whole else number
        whole += line.removesuffix("\\")
        if not line.endswith("\\"):
            yield Piece(f"{name}:{begun}", whole)
            whole = ""


def commands(piece: Piece) -> Iterator[list[str]]:
    """The words of each command of a line that this file knows; other programs' and plain English are left out."""
    marks = shlex.shlex(piece.text, posix=True, punctuation_chars=";")
    marks.whitespace_split = True
    try:
        words = list(marks)
    except ValueError:  # an apostrophe: no command
        return
    while words:
        command, words = split_at(words, ";")
        while command and re.match(r"[A-Z_]+=", command[0]):
            del command[0]
        if command and command[0].rpartition("/")[2] in CHECKS:
            yield [command[0].rpartition("/")[2], *command[1:]]


def split_at(words: list[str], mark: str) -> tuple[list[str], list[str]]:
    """What comes before a word and what comes behind it; all of it before, where it is not there."""
    place = words.index(mark) if mark in words else len(words)
    return words[:place], words[place + 1 :]


def check_make(words: list[str]) -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.M)
    assert not set(words) - set(targets) - {"-s", "-C", "path/to/nextscale"}


def check_pytest(words: list[str]) -> None:
    assert all((ROOT / word).is_file() for word in words if word.endswith(".py"))


def check_python(words: list[str]) -> None:
    if words[:1] == ["-m"] and words[1] in CHECKS:
        CHECKS[words[1]](words[2:])
    elif words and words[0].startswith(("benchmarks/", "tools/")):
        check_words(words, lambda words: run_script(words))


def check_torchrun(words: list[str]) -> None:
    options, ours = split_at(words, "-m")
    if ours and "..." not in options:
        from torch.distributed.run import parse_args

        assert parse_args(words).training_script_args == ours[1:]
    if ours and ours[0] == "nextscale":
        check_nextscale(ours[1:])


def check_nextscale(words: list[str]) -> None:
    check_words(words, cli.main)


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "nextscale": check_nextscale,
    "python": check_python,
    "torchrun": check_torchrun,
    "make": check_make,
    "pytest": check_pytest,
}


def check_words(words: list[str], run: Callable[[list[str]], int]) -> None:
    """That a program takes the words; or has the options, where a word is one that the reader replaces."""
    if any(PLACEHOLDER.fullmatch(word.rpartition(".")[2] or word) for word in words):
        kept = [word for word in words if not PLACEHOLDER.fullmatch(word)]
        verbs = list(takewhile(lambda word: not word.startswith("-"), kept))
        assert options_of(kept) <= options_told(run, tuple(verbs[:2]))
        return
    status, said = ended(run, words)
    assert status == 0, said


def ended(run: Callable[[list[str]], int], words: list[str]) -> tuple[int, str]:
    """The exit status of a command line, and what it says."""
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        try:
            status = run(list(words))
        except SystemExit as end:  # as help and tyro's parsers end
            status = int(end.code or 0)
    return status, said.getvalue()


def run_script(words: list[str]) -> int:
    """A script, up to where it would begin to work."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        patch.syspath_prepend(ROOT / Path(words[0]).parent)
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    return 0


def options_of(words: Iterable[str]) -> set[str]:
    return {word.partition("=")[0] for word in words if re.match(r"--[a-z]", word) and not re.search("[A-Z]", word)}


def options_told(run: Callable[[list[str]], int], words: Sequence[str]) -> set[str]:
    """The options that the help of a command line names."""
    status, said = ended(run, [*words, "--help"])
    assert status == 0, said
    return {"--help", *re.findall(r"--[a-z][\w.-]*", said)}


ALL = [
    pytest.param(piece, command, id=f"{piece.place} {shlex.join(command)[:60]}")
    for piece in shell()
    for command in commands(piece)
]


def test_the_commands_of_all_documents_are_found():
    """A mistake in the search would let every document pass."""
    places = {param.id.partition(":")[0] for param in ALL}
    assert {"README.md", "docs/train-your-own.md", "docs/emoji-64/commands.sh", "nextscale/cli/run.py"} <= places
    assert {"tools/ship.py", "docs/results.md"} <= places and len(ALL) > 100


def nothing_of(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of the same arguments that does nothing, and so leads to nothing."""

    @wraps(function)
    def does_nothing(*arguments: Any, **named: Any) -> Callable[[], None]:
        return lambda: None

    return does_nothing


@pytest.fixture
def parses_only(monkeypatch):
    """Commands are read to the end, and not run."""
    call, subcommands = tyro.cli, tyro.extras.subcommand_cli_from_dict
    training = importlib.import_module("nextscale.cli.train")
    monkeypatch.setattr(sys.modules["nextscale.cli.parse"], "_deferred", nothing_of)
    monkeypatch.setattr(training, "recipe_of", named_recipe)
    monkeypatch.setattr(training, "keep_freed_memory", lambda: None)
    # Scripts parse with tyro itself. The command line names its program, and has what it defers.
    monkeypatch.setattr(tyro, "cli", lambda to, **how: call(to if "prog" in how else nothing_of(to), **how))
    monkeypatch.setattr(
        tyro.extras,
        "subcommand_cli_from_dict",
        lambda named: subcommands({name: nothing_of(to) for name, to in named.items()}),
    )


def named_recipe(name: str) -> str:
    """The recipe of a system: of one that the documents' readers have made, as the name of its folder says."""
    if name in ns.shipped():
        return recipe_of(name)
    kinds = {"bits": "infinity", "text": "infinity", "infinity": "infinity", "flexvar": "flexvar"}
    return next((recipe for part, recipe in kinds.items() if part in name), "var")


@pytest.mark.parametrize("piece, command", ALL)
def test_a_command_of_the_documents_parses(piece, command, parses_only):
    program, *words = command
    try:
        CHECKS[program](words)
    except AssertionError:
        verbs = [word for word in words[:2] if re.fullmatch("[a-z-]+", word)]
        # A line of text may name a command without its values.
        if not piece.inline or program != "nextscale" or not verbs:
            raise
        assert options_of(words) <= options_told(cli.main, verbs if verbs[0] in ("train", "bench") else verbs[:1])


def test_options_that_documents_name_are_options(parses_only):
    """In lines of text, without their command."""
    from torch.distributed.run import get_args_parser

    known = set(re.findall(r"--[a-z][\w-]*", get_args_parser().format_help()))  # torchrun's
    for verb in cli.COMMANDS:
        known |= options_told(cli.main, [verb])
    known |= options_told(cli.main, ["bench", "train"])
    for recipe in (name for name, module in recipes().items() if hasattr(module, "PRESETS")):
        for kind in ("tokenizer", "generator", "encode"):
            known |= options_told(cli.main, ["train", kind, "--recipe", recipe])
    for name, module in recipes().items():
        if hasattr(module, "apply"):
            known |= options_told(cli.main, ["sample", "--with", name])
    for path in SCRIPTS:
        known |= set(re.findall(r"--[a-z][\w.-]*", path.read_text(encoding="utf-8")))
    for path in GUIDES:
        for piece in pieces(path, ()):
            for option in options_of(piece.text.split()) if piece.text.startswith("--") else ():
                begun = option.removesuffix("*")
                whole = option in known or (begun != option and any(name.startswith(begun) for name in known))
                assert whole or any(name.startswith(f"{option}.") for name in known), f"{piece.place}: {option}"


@pytest.mark.parametrize("path", GUIDES, ids=[str(path.relative_to(ROOT)) for path in GUIDES])
def test_links_and_files_of_the_documents_lead_somewhere(path):
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
    for file in re.findall(r"`([\w/.-]+\.(?:py|md|sh|txt|toml))`", text):
        known = file in THEIR_FILES or PLACEHOLDER.fullmatch(Path(file).stem)
        assert known or any(there.as_posix().endswith(f"/{file}") for there in files()), f"{path.name}: {file}"
    for name in re.findall(r"`(test_\w+)`", text):
        assert any(f"def {name}(" in each.read_text(encoding="utf-8") for each in files_of_tests()), (
            f"{path.name}: {name}"
        )


# Users' files and the reference's.
THEIR_FILES = {"1.txt", "log.txt"}


@cache
def files() -> list[Path]:
    tops = (path for path in ROOT.iterdir() if not path.name.startswith("."))
    return [ROOT / "pyproject.toml", *(path for top in tops for path in [top, *top.rglob("*")])]


def files_of_tests() -> list[Path]:
    return sorted((ROOT / "tests").glob("*.py"))


# --- Python ---


class Unknown:
    """A name that a document's own line makes, of which no more is known."""


def python() -> Iterator[tuple[Path, list[Piece]]]:
    for path in GUIDES:
        yield path, list(pieces(path, ("python",)))
    for path in SCRIPTS:
        yield path, [Piece(f"{path.relative_to(ROOT)}:1", path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("path, found", [pytest.param(*both, id=str(both[0].relative_to(ROOT))) for both in python()])
def test_python_of_the_documents_calls_what_there_is(path, found, monkeypatch):
    """Blocks compile, imports resolve, names are imported before their members are asked for, and functions of ours have the
    arguments that they are called with. Quoted calls, too."""
    if path in SCRIPTS:
        monkeypatch.syspath_prepend(path.parent)
    known: dict[str, Any] = {}
    for piece in sorted(found, key=lambda piece: piece.inline):  # quoted calls use what all blocks import
        if piece.inline:
            try:
                tree: ast.AST = ast.parse(piece.text, mode="eval")
            except (SyntaxError, ValueError):
                continue
            if piece.text.endswith(".py"):
                continue
            names = {"ns": ns, "nextscale": ns, **recipes(), **known}
        else:
            tree = ast.parse(piece.text, piece.place)
            known |= imported(tree, piece)
            names = known
        for fault in faults(tree, names, strict=not piece.inline):
            pytest.fail(f"{piece.place}: {fault}", pytrace=False)
        if not piece.inline:
            known |= {name: Unknown for name in stored(tree) if name not in known}


@cache
def recipes() -> dict[str, Any]:
    """The recipes, as documents call them inside a line."""
    return {name: ns.find_recipe(name) for name in ("var", "flexvar", "infinity", "fastvar", "inside", "negative")}


def imported(tree: ast.AST, piece: Piece) -> dict[str, Any]:
    """What a block imports; what is not there fails."""
    found: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                module = importlib.import_module(alias.name)
                found[alias.asname or alias.name.partition(".")[0]] = (
                    module if alias.asname else importlib.import_module(alias.name.partition(".")[0])
                )
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                try:
                    value = getattr(module, alias.name, None) or importlib.import_module(f"{node.module}.{alias.name}")
                except ImportError:
                    pytest.fail(f"{piece.place}: {node.module} has no {alias.name}", pytrace=False)
                found[alias.asname or alias.name] = value
    return found


def stored(tree: ast.AST) -> set[str]:
    """Names that a piece of Python gives a value."""
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    makers = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    names |= {node.name for node in ast.walk(tree) if isinstance(node, makers)}
    names |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    return names | {node.name for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler) and node.name}


def faults(tree: ast.AST, known: dict[str, Any], *, strict: bool) -> Iterator[str]:
    """What is wrong with the names and calls. `strict`: a member of a name that nothing made is a missing import."""
    own = stored(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            root: ast.AST = node
            while isinstance(root, ast.Attribute):
                root = root.value
            if not isinstance(root, ast.Name) or root.id in own:
                continue
            if root.id not in known:
                if strict and not hasattr(builtins, root.id):
                    yield f"{root.id} in `{ast.unparse(node)}` is not imported"
            elif value_of(node, known) is None and ours(value_of(node.value, known)):
                yield f"there is no `{ast.unparse(node)}`"
        elif isinstance(node, ast.Call):
            function = None if root_name(node.func) in own else value_of(node.func, known)
            known_function = ours(function) and callable(function) and function is not Unknown
            if known_function and (fault := misfit(function, node)):
                yield f"`{ast.unparse(node)[:120]}`: {fault}"


def root_name(node: ast.AST) -> str:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def value_of(node: ast.AST, known: dict[str, Any]) -> Any:
    """What a dotted name stands for; `Unknown` behind a name of which no more is known, None where there is nothing."""
    if isinstance(node, ast.Name):
        return known.get(node.id, Unknown)
    if not isinstance(node, ast.Attribute):
        return Unknown
    value = value_of(node.value, known)
    if value is Unknown or value is None:
        return value
    if inspect.ismodule(value):
        try:
            return getattr(value, node.attr, None) or importlib.import_module(f"{value.__name__}.{node.attr}")
        except ImportError:
            return None
    if inspect.isclass(value):
        fields = {**getattr(value, "model_fields", {}), **getattr(value, "__annotations__", {})}
        return Unknown if node.attr in fields else getattr(value, node.attr, None)
    return Unknown


def ours(value: Any) -> bool:
    name = value.__name__ if inspect.ismodule(value) else getattr(value, "__module__", "")
    return isinstance(name, str) and name.partition(".")[0] == "nextscale"


def misfit(function: Callable[..., Any], call: ast.Call) -> str:
    """Why a call does not fit its function; empty if it does. A literal `...` stands for any arguments."""
    try:
        signature = inspect.signature(function)
    except ValueError:
        return ""
    rest = [
        isinstance(word, ast.Starred) or (isinstance(word, ast.Constant) and word.value is ...) for word in call.args
    ]
    rest += [keyword.arg is None for keyword in call.keywords]
    positional = [] if any(rest) else call.args
    named = {keyword.arg: None for keyword in call.keywords if keyword.arg}
    try:
        if any(rest):
            signature.bind_partial(**named)
        else:
            signature.bind(*positional, **named)
    except TypeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    "wrong, fault",
    [
        ("nextscale sample --lable cat", "error: unknown option --lable"),
        ("nextscale trian tokenizer", "error: unknown command 'trian'"),
        ("nextscale train tokenizer --data photos --system.size 1 2", "error: unknown option --system.size"),
        ("python benchmarks/sampling.py --bach 3", "--bach"),
        ("nextscale train tokenizer --recipe NAME --view 3", "--view"),
        ("pytest tests/test_nothing.py", "False"),
        ("make dmeo", "dmeo"),
    ],
)
def test_a_misspelled_command_fails(wrong, fault, parses_only):
    """What this file would be worth nothing without."""
    program, *words = shlex.split(wrong)
    with pytest.raises(AssertionError, match=re.escape(fault)):
        CHECKS[program](words)


@pytest.mark.parametrize(
    "wrong, fault",
    [
        ("ns.sample(system, [1], sead=0)", "sead"),
        ("ns.smaple(system)", "there is no `ns.smaple`"),
        ("torch.zeros(3)", "torch in `torch.zeros` is not imported"),
        ("var.Config(siezs=(1, 2))", "siezs"),
        ("ns.TrainConfig(stepz=1, lr=1.0)", "stepz"),
    ],
)
def test_a_call_of_what_is_not_there_fails(wrong, fault):
    (found,) = faults(ast.parse(wrong), {"ns": ns, "var": ns.find_recipe("var"), "system": Unknown}, strict=True)
    assert fault in found
