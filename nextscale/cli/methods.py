"""`--with NAME --with.FIELD VALUE`: methods that change a system, for every command that loads one.

Methods stack in the order given, and options belong to the `--with` before them. On its way to a command each method is one
word, the JSON of a `checkpoint.ChangeConfig`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, make_dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin

import tyro

import nextscale as ns

if TYPE_CHECKING:
    from nextscale.settings import Settings
    from nextscale.system import System

Methods = Annotated[
    tuple[str, ...],
    tyro.conf.UseAppendAction,
    tyro.conf.arg(
        name="with",
        metavar="NAME",
        help="method that changes the system (`nextscale list` names them), followed by its own options --with.FIELD VALUE; "
        "--with NAME --help explains these; several methods change it one after another",
        help_behavior_hint="(default: none)",
    ),
]


@dataclass(frozen=True)
class Method:
    """A method that the user named, and the options that followed it."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> type[Settings]:
        return ns.find_recipe(self.name).Config

    def word(self) -> str:
        """All of it in one word. Raises ValueError for values that the method does not take."""
        from pydantic import ValidationError

        from nextscale.checkpoint import ChangeConfig
        from nextscale.settings import faults

        try:
            config = self.settings.model_validate(self.options)
        except ValidationError as error:
            raise ValueError(faults(error, "--with.", self.settings)) from error
        return ChangeConfig(recipe=self.name, config=config.model_dump(mode="json")).model_dump_json()


def recipe_files() -> dict[str, Path]:
    """The files of all recipes by name, as `system.recipe_names` finds them, but without torch."""
    own = {path.stem: path for path in sorted((Path(ns.__file__).parent / "recipes").rglob("[!_]*.py"))}
    others = {point.name: find_spec(point.value) for point in metadata.entry_points(group="nextscale.recipes")}
    return {name: Path(spec.origin) for name, spec in others.items() if spec and spec.origin} | own


def summary(path: Path) -> str:
    """The first paragraph of a module's docstring, without importing it."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.partition("\n\n")[0].split())


def applies_to(path: Path) -> str:
    """What systems a recipe changes, its `APPLIES_TO`, without importing it; empty for one that builds systems."""
    value = constant(path, "APPLIES_TO")
    return ast.literal_eval(value) if value is not None else ""


def constant(path: Path, name: str) -> ast.expr | None:
    """What a module assigns to a name at its top, without importing it."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                return node.value
    return None


def take_methods(words: Sequence[str]) -> tuple[list[str], list[Method]]:
    """The words of a command line without the methods, and the methods. Raises ValueError for unknown names and options."""
    left, others, methods = list(words), [], list[Method]()
    while left:
        word = left.pop(0)
        option, equals, value = word.partition("=")
        if not (option == "--with" or option.startswith("--with.")):
            others.append(word)
            continue
        if equals:
            left.insert(0, value)
        if option == "--with":
            methods.append(Method(_known(left.pop(0) if left and not _is_option(left[0]) else "")))
        elif not methods:
            raise ValueError(f"{option} belongs to a method; name it before: --with NAME {option} VALUE")
        else:
            method = methods[-1]
            name = option.removeprefix("--with.").replace("-", "_")
            method.options[name] = _take_value(method, name, option, left)
    return others, methods


def load_changed(name: str, device: str, methods: Sequence[str] = (), dtype: str = "float32") -> System:
    """The system of that name on a device and in a dtype, changed by methods."""
    import torch

    from nextscale.checkpoint import ChangeConfig

    system = ns.load(name, device=device, dtype=None if dtype == "float32" else getattr(torch, dtype))
    for word in methods:
        change = ChangeConfig.model_validate_json(word)
        recipe = ns.find_recipe(change.recipe)
        system = recipe.apply(system, recipe.Config.model_validate(change.config))
    return system


def explain(command: str, methods: Sequence[Method]) -> None:
    """Print the options of methods, as `--help` of a command prints its own."""
    for name in dict.fromkeys(method.name for method in methods):
        settings: Any = ns.find_recipe(name).Config
        named = Annotated[settings, tyro.conf.arg(name="with"), tyro.conf.FlagConversionOff]  # --with.FIELD
        options = make_dataclass("Options", [("config", named, settings())])
        text = f"{summary(recipe_files()[name])}\n\n`nextscale {command} --help` explains all other options."
        with suppress(SystemExit):  # as help ends
            prog = f"nextscale {command} --with {name}"
            tyro.cli(options, prog=prog, description=text, args=["--help"], use_underscores=False)


def _known(name: str) -> str:
    """The name of a recipe that changes systems."""
    files = recipe_files()
    names = [known for known, path in files.items() if applies_to(path)]
    if name in names:
        return name
    if name in files:
        raise ValueError(f"--with {name}: this recipe builds systems and changes none; there are {', '.join(names)}")
    wrong = f"unknown method {name!r}" if name else "--with needs the name of a method"
    raise ValueError(f"{wrong}; there are {', '.join(names)}: `nextscale list` explains them")


def _take_value(method: Method, name: str, option: str, left: list[str]) -> Any:
    """The words of an option's value, taken from those that are left: one, or of a tuple all up to the next option."""
    fields = method.settings.model_fields
    if name not in fields:
        known = ", ".join(f"--with.{field.replace('_', '-')}" for field in fields)
        raise ValueError(f"unknown option {option} of {method.name}; there are {known}")
    if not left or _is_option(left[0]):
        raise ValueError(f"{option} of {method.name} needs a value")
    types = set(_types(fields[name].annotation))
    if tuple not in types:
        return left.pop(0)
    words = []
    while left and not _is_option(left[0]):
        words.append(left.pop(0))
    if str in types:  # a text may hold commas
        return words
    return [part for word in words for part in word.split(",") if part]


def _is_option(word: str) -> bool:
    """Whether a word is no value; `-2` is one."""
    return word.startswith("--") or word == "-h"


def _types(annotation: Any) -> Iterator[Any]:
    """A type and all those inside it."""
    yield get_origin(annotation) or annotation
    for inner in get_args(annotation):
        yield from _types(inner)
