"""Arguments of official constructors as two-way tables.

One row is one argument: its official name and default, the dotted path of our setting, and the ways there and back. From the
rows follow our settings, the official arguments that say the same, and the refusal of what one of both cannot express.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from nextscale.settings import Settings
from nextscale.system_settings import SystemSettings

S = TypeVar("S", bound=SystemSettings)


def _same(value: Any, others: Any) -> Any:
    return value


def _any(value: Any, arguments: Mapping[str, Any]) -> bool:
    return True


@dataclass(frozen=True)
class Argument:
    """One argument of an official constructor.

    Args:
        path: the setting that it says, `transformer.dim` for example; "": none, because it changes no number of the model or
            has but one value that we know. An argument that says two settings has two rows.
        ours: (its value, all arguments of the constructor) to the value of our setting.
        theirs: (our value, all our settings) to its value; None: the other row of the same argument says it.
        allowed: whether its value can be brought over, given all arguments of the constructor.
        only: what is allowed, in words.
    """

    name: str
    default: Any = None
    path: str = ""
    ours: Callable[[Any, Mapping[str, Any]], Any] = _same
    theirs: Callable[[Any, Any], Any] | None = _same
    allowed: Callable[[Any, Mapping[str, Any]], bool] = _any
    only: str = ""


def fixed(name: str, value: Any) -> Argument:
    """An argument with one value that we know how to build."""
    return Argument(name, value, allowed=lambda given, _: given == value, only=repr(value))


def ignored(name: str, default: Any = None) -> Argument:
    """An argument that changes no number which a model computes."""
    return Argument(name, default)


@dataclass(frozen=True)
class Constructor:
    """The arguments of an official class. `always`: settings that all its models have, where they are not our defaults."""

    name: str
    rows: tuple[Argument, ...]
    always: Mapping[str, Any] = field(default_factory=dict)

    @property
    def defaults(self) -> dict[str, Any]:
        """All arguments with their defaults."""
        return {row.name: row.default for row in self.rows}

    def complete(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments with defaults for those that are not given.

        Raises ValueError for arguments that the class does not have, and for values that cannot be brought over.
        """
        if unknown := set(given) - set(self.defaults):
            raise ValueError(f"unknown arguments of the {self.name}: {sorted(unknown)}; it has {sorted(self.defaults)}")
        arguments = self.defaults | {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
        refused = [
            f"{row.name}={arguments[row.name]!r} (only {row.only})"
            for row in self.rows
            if not row.allowed(arguments[row.name], arguments)
        ]
        if refused:
            raise ValueError(f"not supported, and set by no published {self.name}: {'; '.join(refused)}")
        return arguments

    def arguments(self, settings: Any, given: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments that say our settings, and of those that say none the given ones."""
        found = {name: value for name, value in given.items() if not any(r.path for r in self.rows if r.name == name)}
        for row in self.rows:
            if row.theirs is not None and (row.path or row.theirs is not _same):
                found[row.name] = row.theirs(_value(settings, row.path), settings)
        return found


def settings_of(kind: type[S], pairs: Collection[tuple[Constructor, Mapping[str, Any]]]) -> S:
    """Our settings for given arguments of several constructors.

    Raises ValueError for arguments that are unknown, cannot be brought over, or contradict each other.
    """
    said: dict[str, tuple[str, Any]] = {}  # by path: which argument says it, and what
    for constructor, given in pairs:
        arguments = constructor.complete(given)
        said |= {path: (path, value) for path, value in constructor.always.items()}
        for row in constructor.rows:
            if not row.path:
                continue
            value = row.ours(arguments[row.name], arguments)
            first, other = said.setdefault(row.path, (row.name, value))
            if other != value:
                raise ValueError(f"{first} and {row.name} must be the same, got {other} and {value}")
    return kind.model_validate(nested({path: value for path, (_, value) in said.items()}))


def nested(values: Mapping[str, Any], into: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Settings by dotted paths as dicts in dicts, over those of `into`."""
    whole: dict[str, Any] = dict(into or {})
    for path, value in values.items():
        head, _, rest = path.partition(".")
        whole[head] = nested({rest: value}, whole.get(head)) if rest else value
    return whole


def differences(settings: SystemSettings, other: SystemSettings, free: Collection[str]) -> Iterator[str]:
    """The settings, `path=value`, in which two differ, but for those of `free` and for initial weights."""
    if "sizes" not in free and settings.schedule != other.schedule:
        yield f"sizes={settings.schedule}"
    yield from _differences(settings, other, {*free, "sizes"}, "")


def _differences(settings: Settings, other: Settings, free: Collection[str], prefix: str) -> Iterator[str]:
    for name, value in settings:
        path, again = prefix + name, getattr(other, name)
        if path in free or name.startswith("init_") or value == again:
            continue
        if isinstance(value, Settings) and type(value) is type(again):
            yield from _differences(value, again, free, path + ".")
        else:
            yield f"{path}={value!r}"


def _value(settings: Any, path: str) -> Any:
    for name in path.split(".") if path else ():
        settings = getattr(settings, name)
    return settings
