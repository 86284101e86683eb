"""The base class of every settings model, and its faults in plain words. Free of torch, so the command line is quick."""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

MOST_FAULTS = 3  # named in one message
STYLE = "style"  # what a system is told its second class by


class Settings(BaseModel):
    """Numbers that configure a part; immutable, finite, stored as JSON, equal when all fields are equal."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def brief(value: object, most: int = 60) -> str:
    """A value as a message shows it: its repr on one line, without control characters, cut to `most` characters."""
    if isinstance(value, str):
        value = value[: 4 * most]  # a repr of megabytes is not made to be thrown away
    elif isinstance(value, (list, tuple, dict, set)) and len(value) > most:
        return f"{type(value).__name__} of {len(value):,}"
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an int of too many digits, an endless nesting
        return type(value).__name__
    return cut(text, most)


def cut(text: str, most: int) -> str:
    """A text on one line of at most `most` characters, control characters escaped; what is cut leaves three dots."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: most + 1])
    return text if len(text) <= most else text[: max(0, most - 3)] + "..."


def as_int(value: Any) -> int:
    """A whole number of Python, numpy or torch as an int. Raises TypeError for all else, True and False too."""
    if isinstance(value, bool) or getattr(value, "ndim", None) or "bool" in str(getattr(value, "dtype", "")):
        raise TypeError(f"expected a whole number, got {brief(value)}")
    return operator.index(value)


def whole_number(name: str, value: Any, least: int, most: int, hint: str = "") -> int:
    """A whole number of any kind in a range as an int, or ValueError."""
    try:
        number = as_int(value)
    except TypeError:
        number = least - 1
    if not least <= number <= most:
        raise ValueError(f"{name}: expected a whole number from {least} to {most}, got {brief(value)}{hint}")
    return number


def finite_number(name: str, value: Any, least: float, most: float, hint: str = "") -> float:
    """A number of any kind in a range as a float, or ValueError."""
    kind = str(getattr(value, "dtype", ""))
    try:
        if isinstance(value, (bool, str, bytes)) or getattr(value, "ndim", None) or "bool" in kind:
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = math.nan
    if not least <= number <= most:
        raise ValueError(f"{name}: expected a finite number from {least:g} to {most:g}, got {brief(value)}{hint}")
    return number


def faults(error: ValidationError, prefix: str = "", kind: type[BaseModel] | None = None) -> str:
    """What is wrong with settings, in one sentence: `loss.l1 must be at least 0, got -1`.

    prefix: what stands before each name ("--" for options). kind: the settings, to offer the nearest name for unknown ones.
    """
    said: list[str] = []
    musts: dict[str, list[str]] = {}  # of one value, which may be of several types
    found = error.errors(include_url=False)
    for fault in found:
        place = fault["loc"]
        deeper = any(len(other["loc"]) > len(place) and other["loc"][: len(place)] == place for other in found)
        if deeper and fault["type"] == "too_short":  # since what is wrong was left out
            continue
        name, words, got = _fault(fault, prefix, kind)
        if words.startswith("must be "):
            key = f"{name} must be {{}}, got {got}"
            musts.setdefault(key, []).append(words.removeprefix("must be "))
            words = key
        else:
            words = f"{name} {words}" + (f", got {got}" if got else "")
        if words not in said:
            said.append(words)
    said = [words.replace("{}", " or ".join(_closest(musts[words])), 1) if words in musts else words for words in said]
    more = f"; and {len(said) - MOST_FAULTS} more" if len(said) > MOST_FAULTS else ""
    return "; ".join(said[:MOST_FAULTS]) + more


def _closest(musts: list[str]) -> list[str]:
    """Of what a value of several types must be: the bound that it misses, if it is of one of them."""
    return [must for must in musts if must.startswith(("at ", "more ", "less "))] or musts


# What pydantic calls a fault, and what to say of it. `ctx` fills the braces.
_BOUNDS = {
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be more than {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be less than {lt}",
    "multiple_of": "must be a multiple of {multiple_of}",
    "too_short": "needs {min_length} values or more",
    "too_long": "takes at most {max_length} values",
    "string_too_short": "needs at least {min_length} characters",
    "string_too_long": "takes at most {max_length} characters",
    "literal_error": "must be {expected}",
    "enum": "must be {expected}",
    "int_from_float": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "int_parsing_size": "is too large a number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "finite_number": "must be finite",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "string_type": "must be a text",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "dict_type": "must be a table of names and values",
    "model_type": "must be a table of names and values",
    "model_attributes_type": "must be a table of names and values",
    "string_pattern_mismatch": "must look like {pattern}",
    "recursion_loop": "is nested in itself",
}


def _fault(fault: Any, prefix: str, kind: type[BaseModel] | None) -> tuple[str, str, str]:
    """The name of what is wrong, what is wrong with it, and what it is."""
    # Tags of unions ('int', 'tuple[int, int]') are no names: numbers of places and names of fields are.
    path = [str(part) for part in fault["loc"] if isinstance(part, int) or str(part).isidentifier()]
    path = [part for part in path if part not in ("int", "str", "float", "bool", "each")]
    name = prefix + ".".join(path).replace("_", "-" if prefix.startswith("--") else "_")
    context = fault.get("ctx", {})
    if own := context.get("error"):  # what our own check says
        return (f"{name}:" if path else ""), str(own), ""
    name = name or "the value"
    if fault["type"] == "extra_forbidden":
        near = difflib.get_close_matches(path[-1], _names(kind, path[:-1]), n=1)
        return name, "is not known here" + (f"; did you mean {near[0]}?" if near else ""), ""
    if fault["type"] == "missing":
        return name, "is missing", ""
    words = _BOUNDS.get(fault["type"])
    context = {key: f"{bound:g}" if isinstance(bound, float) else bound for key, bound in context.items()}
    said = words.format(**context) if words else fault["msg"][:1].lower() + fault["msg"][1:]
    got = fault["input"]
    return name, said, f"{got:g}" if isinstance(got, float) else brief(got)


def _names(kind: type[BaseModel] | None, path: list[str]) -> Iterator[str]:
    """Names of the fields of the settings at a path."""
    for part in path:
        field = kind.model_fields.get(part) if kind else None
        inner = field.annotation if field else None
        kind = inner if isinstance(inner, type) and issubclass(inner, BaseModel) else None
    yield from (kind.model_fields if kind else ())
