"""Faults in settings and files of strangers, in plain words."""

import json

import pytest
from pydantic import ValidationError

from nextscale.files import read_json
from nextscale.recipes.generators import var
from nextscale.settings import brief, faults
from nextscale.training.config import TrainConfig

FAULTS = [
    (TrainConfig, {"steps": -1}, "--steps must be at least 1, got -1"),
    (TrainConfig, {"steps": 1.5}, "--steps must be a whole number, got 1.5"),
    (TrainConfig, {"log_every": "x"}, "--log-every must be a whole number, got 'x'"),
    (TrainConfig, {"stepz": 3}, "--stepz is not known here; did you mean steps?"),
    (TrainConfig, {"lr": float("inf")}, "--lr must be finite, got inf"),
    (TrainConfig, {"lr": float("nan")}, "--lr must be finite, got nan"),
    (TrainConfig, {"betas": (1, 2, 3)}, "--betas takes at most 2 values, got (1, 2, 3)"),
    (TrainConfig, {"precision": "int8"}, "--precision must be 'float32', 'bfloat16' or 'float16', got 'int8'"),
    (var.Config, {"sizes": (1, "a")}, "--sizes.1 must be a whole number or a list, got 'a'"),
    (var.Config, {"autoencoder": {"widht": 3}}, "--autoencoder.widht is not known here; did you mean width?"),
    (var.Config, {"pyramid": {"phi": "some"}}, "--pyramid.phi must be a whole number or 'each', got 'some'"),
    (var.Config, {"classes": ("a", "a")}, "--classes: class names must differ from each other"),
]


@pytest.mark.parametrize(("kind", "values", "said"), FAULTS)
def test_faults_are_said_in_one_sentence(kind, values, said):
    with pytest.raises(ValidationError) as error:
        kind.model_validate(values)
    assert faults(error.value, "--", kind) == said


def test_values_are_shown_cut_short():
    assert brief("a" * 10_000) == "'" + "a" * 56 + "..."
    assert brief([1] * 1000) == "list of 1,000"
    assert brief("\x1b[31mred\n") == r"'\x1b[31mred\n'" and brief(10**10_000) == "int"


FILES = {
    "not UTF-8": (b'{"a": "\xff"}', "is not UTF-8"),
    "cut": (b'{"a": [1', "is not JSON: .* line 1"),
    "not finite": (b'{"a": NaN}', "holds NaN"),
    "nested": (b"[" * 200 + b"]" * 200, "nested too deep"),
    "nested deeper than Python reads": (b"[" * 100_000 + b"]" * 100_000, "nested too deep"),
    "one key twice": (b'{"a": 1, "a": 2}', "names 'a' twice"),
    "large": (b" " * 2000, "2,000 bytes, more than the 1,000"),
    "empty": (b"", "is not JSON"),
    "a number of too many digits": (b"1" * 900_0, "is not JSON|bytes"),
}


@pytest.mark.parametrize("name", FILES)
def test_json_of_strangers_is_refused_in_one_sentence(name, tmp_path):
    content, said = FILES[name]
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=said) as error:
        read_json(path, most=1000 if name == "large" else 1_000_000)
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)


def test_absence_is_told_from_other_reasons(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing; expected a JSON file"):
        read_json(tmp_path / "a.json")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        read_json(tmp_path)
    with pytest.raises(FileNotFoundError, match="no name of a file"):
        read_json(tmp_path / ("a" * 10_000))
    (tmp_path / "b.json").write_text(json.dumps({"a": [1.5, None]}))
    assert read_json(tmp_path / "b.json") == {"a": [1.5, None]}


def unbounded(schema, path=""):
    """Paths of numbers, lists and texts without a largest value in a JSON schema."""
    for name, inner in schema.get("properties", {}).items():
        yield from unbounded(inner, f"{path}.{name}")
    for key in ("anyOf", "prefixItems", "allOf"):
        for inner in schema.get(key, ()):
            yield from unbounded(inner, path)
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            yield from unbounded(schema[key], f"{path}.{key}")
    kind, chosen = schema.get("type"), "enum" in schema or "const" in schema
    if kind in ("integer", "number") and not chosen and not {"maximum", "exclusiveMaximum"} & set(schema):
        yield path
    if (kind == "array" and "maxItems" not in schema) or (
        kind == "string" and not chosen and "maxLength" not in schema
    ):
        yield path


def bounded_kinds():
    from nextscale.data.transforms import AugmentSettings
    from nextscale.system import find_recipe, recipe_names
    from nextscale.training.config import GeneratorLoss, TokenizerLoss

    yield from (TrainConfig, TokenizerLoss, GeneratorLoss, AugmentSettings)
    yield from (find_recipe(name).Config for name in recipe_names())


@pytest.mark.parametrize("kind", list(bounded_kinds()), ids=lambda kind: f"{kind.__module__}.{kind.__name__}")
def test_every_setting_has_a_largest_value(kind):
    """So that no config of a stranger asks for more than a machine has, and a slip of the hand is named."""
    schema = kind.model_json_schema()
    assert not [
        *unbounded(schema),
        *(path for name, part in schema.get("$defs", {}).items() for path in unbounded(part, name)),
    ]
