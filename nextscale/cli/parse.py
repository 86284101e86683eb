"""Words of a command line to a call, and what is wrong with them in one sentence.

tyro draws what is wrong as a box of many lines, in the words of its own machinery. Here words are parsed first and run
afterwards, so that what tyro says is read, put in one sentence, and never mixed up with what a command says.
"""

from __future__ import annotations

import difflib
import functools
import io
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from typing import Any

import tyro

from nextscale.settings import cut, faults

Call = Callable[[], Any]
CONFIG = (tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone)


def parse(function: Callable[..., None], words: Sequence[str], prog: str) -> Call:
    """The call of a function that a command line means. Raises ValueError, in one sentence, for words that mean none."""
    with _in_one_sentence(words, prog):
        return tyro.cli(_deferred(function), prog=prog, args=list(words), config=CONFIG, use_underscores=False)


# Options of several values, whose absence tyro takes for none. An empty value is most often a shell's unset variable.
SEVERAL = ("--labels", "--prompt", "--sizes", "--loss.scale-weights")


def check_values(words: Sequence[str], prog: str) -> None:
    """Refuse options without the value that they need."""
    for word, following in zip(words, [*words[1:], "--"], strict=False):
        empty = word.startswith("--") and word != "--prompt" and (not following or word.endswith("="))
        if empty or (word in SEVERAL and following.startswith("--")):
            raise ValueError(f"{word.rstrip('=')} needs a value; `{prog} --help` explains all options")


def parse_one_of(functions: Mapping[str, Callable[..., None]], words: Sequence[str], prog: str, about: str) -> Call:
    """The same where the first word names the function."""
    app = tyro.extras.SubcommandApp()
    for name, function in functions.items():
        app.command(name=name)(_deferred(function))
    with _in_one_sentence(words, " ".join([prog, *[word for word in words[:1] if word in functions]])):
        return app.cli(prog=prog, description=about, args=list(words))


def _deferred(function: Callable[..., None]) -> Callable[..., Call]:
    """A function of the same arguments that returns the call instead of making it."""

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Call:
        return functools.partial(function, *arguments, **named)

    return call


@contextmanager
def _in_one_sentence(words: Sequence[str], prog: str) -> Iterator[None]:
    from pydantic import ValidationError

    if {"-h", "--help"} & set(words):  # which ends by itself
        yield
        return
    check_values(words, prog)
    said = io.StringIO()
    try:
        with redirect_stderr(said), _wide():
            yield
    except ValidationError as error:
        raise ValueError(faults(error, "--")) from error
    except SystemExit as end:
        if not end.code:
            raise
        raise ValueError(_sentence(end, said.getvalue(), prog)) from end


@contextmanager
def _wide() -> Iterator[None]:
    """Lines that are not broken: their words are read again."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100000"
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


def _sentence(end: SystemExit, box: str, prog: str) -> str:
    """What tyro's box and the exceptions behind it say."""
    from pydantic import ValidationError

    where: object = ""
    behind: BaseException | None = end
    while behind is not None:
        where = getattr(behind, "arg", where)
        if isinstance(behind, ValidationError):
            path = [part for part in str(where).split(".") if part and not part.startswith("__")]
            return faults(behind, "--" + "".join(f"{part.replace('_', '-')}." for part in path))
        behind = behind.__cause__ or behind.__context__
    lines = [re.sub(r"^[\s│|]+|[\s│|]+$", "", line) for line in box.splitlines()]
    lines = [line for line in lines if line and not re.fullmatch(r"[-─━═╭╮╰╯+]+", line)]
    text = " ".join(lines[1:])  # without the title
    told = f"; `{prog} --help` explains all options"
    if found := re.search(
        r"Error parsing (--\S+): (?:invalid literal for int\(\).*?|could not convert.*?): ('.*?'|\".*?\")", text
    ):
        kind = "whole number" if "int()" in found[0] else "number"
        return f"{found[1]} must be a {kind}, got {cut(found[2], 60)}"
    if found := re.search(r"Error parsing (--\S+): no type matching (\w+) could be instantiated from \[(.*?)\]", text):
        kind = {"INT": "a whole number", "FLOAT": "a number"}.get(found[2], f"of the kind {found[2]}")
        return f"{found[1]} must be {kind}, got {cut(found[3], 60)}"
    if found := re.search(r"Error parsing (--\S+): Could not find valid parse for arguments: \[(.*?)\]", text):
        kind = (
            "whole numbers" if f"{found[1]} [INT" in text else "numbers" if f"{found[1]} [FLOAT" in text else "values"
        )
        return f"{found[1]} must be {kind} with spaces between, got {cut(found[2], 60)}"
    if found := re.search(r"Missing value for argument '(\S+)'", text):
        return f"{found[1]} needs a value{told}"
    if found := re.search(r"invalid choice (.*?) for argument '(\S+)'. Expected one of \((.*?),?\)", text):
        return f"{found[2]} must be {_or(found[3].replace(chr(39), '').split(', '))}, got {cut(found[1], 60)}"
    if found := re.search(r"Unrecognized (?:or misplaced )?options: (.*)", text):
        listed = [word for line in lines if (word := line.removeprefix("Unrecognized options:").strip()) != line]
        tokens = (listed[0] if listed else found[1]).replace(",", " ").split()
        wrong = next((token for token in tokens if token.startswith("--")), tokens[0] if tokens else "")
        if subcommands := re.search(r"Available subcommands: ([\w, -]+?)(?: For full|$)", text):
            return f"expected {_or(subcommands[1].split(', '))}, got {cut(repr(wrong), 60)}{told}"
        if not wrong.startswith("-"):
            return f"{cut(repr(wrong), 60)} belongs to no option{told}"
        options = [line.split()[0] for line in lines if line.startswith("--") and line.split()[0] not in tokens]
        near = difflib.get_close_matches(wrong, options, n=1)
        return f"unknown option {cut(wrong, 60)}" + (f", did you mean {near[0]}?" if near else "") + told
    title, *rest = [line for line in lines if not line.startswith("For full helptext")] or ["unreadable options"]
    return cut(" ".join(rest) or title, 300) + told


def _or(names: Sequence[str]) -> str:
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
