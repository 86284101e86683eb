"""`System`: what a recipe builds and what every verb takes first; and finding a recipe by its name."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from nextscale.condition import Condition
from nextscale.contracts import Model, Objective, Output, Pyramid, Reader, Sampling, Stepper, Tokenizer
from nextscale.modules import as_module, replaced, usual_defaults
from nextscale.output import Images
from nextscale.pixels import as_images, warn_of_range
from nextscale.schedule import Schedule
from nextscale.settings import Settings, brief, cut
from nextscale.tokenizer.pyramid import teacher_inputs
from nextscale.tokens import Soft, Tokens, each, first_tensor

# What is told of images: class names, class numbers or texts, None for nothing, one entry each; or several such lists by name.
Labels = Sequence[Any] | Tensor | str | int | None | Mapping[str, Any]


# What stays float32 in a system of lower precision: codes and distances between them, logits and their probabilities. A rounded
# number there is another token.
FLOAT32 = ("tokenizer.pyramid", "model.head")

Role = Literal["trained", "frozen", "external"]


@dataclass(frozen=True)
class Part:
    """A network beside tokenizer and model: a refiner, a teacher, a text encoder.

    trained: `train_model` trains it with the model; its weights are saved with the system. frozen: saved, not trained.
    external: its weights are somebody else's; the recipe's `build` gets them again when the system is loaded.
    """

    module: nn.Module
    role: Role = "frozen"

    def __post_init__(self) -> None:
        as_module(self.module)
        if self.role not in get_args(Role):
            raise ValueError(f"the role of a part is one of {', '.join(get_args(Role))}, got {self.role!r}")


@dataclass(frozen=True)
class Change:
    """A method that changed a system: the recipe's name, its settings, and the system before it."""

    recipe: str
    config: Settings
    before: System


class System(nn.Module):
    """What a recipe builds and every verb takes first. Saving and loading need `recipe` and `config`, which say how it was
    built, the `changes` made to it since, and the weights.

    Args:
        recipe, config: name of the recipe and its settings.
        schedule: sizes of the scales.
        tokenizer, model: see `contracts`; model is None before one is trained.
        classes: names of the classes.
        sampling: how it samples by default.
        objective: what the model is trained for.
        readers: who reads what it is told, by name; the first one reads plain labels.
        output: what its decoder makes; None: images.
        stepper: its own loop; None: scale by scale.
        parts: further networks by name. They follow `.to(...)` like all others.

    Raises ValueError for names of parts that two have, or that no file can have.
    """

    def __init__(
        self,
        recipe: str,
        config: Settings,
        schedule: Schedule,
        tokenizer: Tokenizer,
        model: Model | None,
        classes: Sequence[str] = (),
        *,
        sampling: Sampling,
        objective: Objective,
        readers: Mapping[str, Reader],
        output: Output | None = None,
        stepper: Stepper | None = None,
        parts: Mapping[str, Part] | None = None,
    ) -> None:
        super().__init__()
        self.recipe = recipe
        self.config: Any = config
        self.schedule = schedule
        # Parts are known by their contracts, not by a base class.
        self.tokenizer: Tokenizer
        self.model: Model | None
        self.register_module("tokenizer", as_module(tokenizer))
        self.register_module("model", None if model is None else as_module(model))
        self.classes = tuple(classes)
        self.sampling = sampling
        self.objective = objective
        self.readers = dict(readers)
        self.output: Output = output or Images(self.tokenizer.channels)
        self.stepper = stepper
        parts = parts or {}
        _check_names(parts)
        self.parts = nn.ModuleDict({name: part.module for name, part in parts.items()})
        self.roles: dict[str, Role] = {name: part.role for name, part in parts.items()}
        for name, role in self.roles.items():
            if role != "trained":
                self.parts[name].requires_grad_(False)
        self.changes: tuple[Change, ...] = ()
        self.eval()

    def with_model(self, model: Model) -> System:
        """The same system around another model of the same weights' names: nothing is copied."""
        return replaced(self, model=as_module(model))

    def changed(
        self,
        recipe: str,
        config: Settings,
        *,
        model: Model | None = None,
        stepper: Stepper | None = None,
        sampling: Sampling | None = None,
    ) -> System:
        """This system after a method changed its model, its loop or how it samples by default; it shares all weights and goes
        on in the same mode. The recipe's name and settings are kept, so that the result can be saved, loaded and changed
        again."""
        known = set(self.modules())
        for module in () if model is None else as_module(model).modules():
            if module not in known:  # new ones are in training mode
                module.training = as_module(self.need_model()).training
        other = replaced(self) if model is None else replaced(self, model=as_module(model))
        other.stepper = self.stepper if stepper is None else stepper
        other.sampling = self.sampling if sampling is None else sampling
        other.changes = (*self.changes, Change(recipe, config, self))
        return other

    def half_(self, dtype: torch.dtype) -> System:
        """Weights and activations in bfloat16 or float16 from now on, for sampling; what `FLOAT32` names stays float32."""
        check_dtype(dtype)
        self.to(dtype)
        for name in FLOAT32:
            owner, _, leaf = name.partition(".")
            part = getattr(self, owner)
            if part is not None:
                getattr(part, leaf).float()
        return self

    @property
    def base(self) -> System:
        """The system before all changes."""
        return self.changes[0].before if self.changes else self

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels of the images that the schedule makes."""
        if isinstance(self.output, Images):
            _, height, width = self.output.shape(self.schedule, self.tokenizer.stride)
            return height, width
        h, w = self.schedule[-1]
        return h * self.tokenizer.stride, w * self.tokenizer.stride

    @property
    def texts(self) -> list[str]:
        """The names of those readers that read texts: what they are told has no shape, and is no choice out of a list."""
        return [name for name, reader in self.readers.items() if reader.shape is None and not reader.choices]

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def need_model(self) -> Model:
        """The model, or a clear error for a system that has a tokenizer alone."""
        if self.model is None:
            raise ValueError(
                "this system has a tokenizer but no generator; train one with `nextscale train generator`, "
                "or load a system that has one"
            )
        return self.model

    def condition(self, labels: Labels) -> Condition:
        """What the model is told, one row each; `labels` as for `told`."""
        told = self.told(labels)
        read = {name: reader(told[name]).to(self.device) for name, reader in self.readers.items()}
        return self.need_model().conditioner(read)

    def told(self, labels: Labels, rows: int | None = None) -> dict[str, list[Any]]:
        """What is said under the name of each reader, one entry a row.

        `labels` are for the first reader, or a mapping by name; names that it leaves out say nothing, and a value alone is for
        all rows. `rows`: how many there must be. Raises ValueError for unknown names and numbers that do not fit.
        """
        self.need_model()
        given = labels if isinstance(labels, Mapping) else {next(iter(self.readers), "label"): labels}
        if unknown := [name for name in given if name not in self.readers]:
            raise ValueError(
                f"this system is told {' and '.join(map(repr, self.readers)) or 'nothing'}, got {unknown[0]!r}; "
                "leave it out, or use a system that reads it"
            )
        listed = {name: _listed(given.get(name), reader.shape) for name, reader in self.readers.items()}
        counts = {name: len(values) for name, values in listed.items() if isinstance(values, list)}
        if empty := [name for name, n in counts.items() if n == 0]:
            raise ValueError(f"expected one {empty[0]}, or one for each image, got an empty list; None says nothing")
        count = rows or max(counts.values(), default=1)
        if any(n != count for n in counts.values()):
            got = " and ".join(f"{n} ({name})" if len(counts) > 1 else str(n) for name, n in counts.items())
            more = "; for more results of an image, repeat it: `x.repeat(n, 1, 1, 1)`" if rows else ""
            raise ValueError(f"expected one label, or one for each of {count} images, got {got}{more}")
        return {name: values if isinstance(values, list) else [values] * count for name, values in listed.items()}

    def check_told(self, labels: Labels) -> None:
        """Raise ValueError if a reader cannot read what it is told."""
        for name, values in self.told(labels).items():
            self.readers[name].check(values)


def check_system(system: Any) -> None:
    """Raise TypeError unless it is a system, which every verb takes first."""
    if not isinstance(system, System):
        raise TypeError(f"expected a system first, got {brief(system)}; load one: system = ns.load('emoji-64')")


def _check_names(parts: Mapping[str, Part]) -> None:
    """A part's name is that of its file, also where files do not tell capitals apart, and of its place in a `ModuleDict`."""
    taken, methods = {"tokenizer", "model"}, nn.ModuleDict()
    for name in parts:
        if not re.fullmatch(r"\w+", name) or hasattr(methods, name) or name.lower() in taken:
            raise ValueError(
                f"a part needs a name of its own of letters, digits and underscores (not tokenizer, model, or a method of "
                f"ModuleDict), since its weights are saved as NAME.safetensors, got {name!r}"
            )
        taken.add(name.lower())


def _listed(values: Any, shape: tuple[int, ...] | None) -> Any:
    """A list with one entry a row, or a value alone, which has the reader's `shape`. Of readers that have none, tensors and
    arrays become numbers."""
    if isinstance(values, set | frozenset | bytes):
        raise ValueError(f"expected one label, or a list of one for each image, got {brief(values)}")
    if isinstance(values, Tensor) and values.is_meta:
        raise ValueError("expected labels that are numbers, got some on the device meta, which has none")
    if getattr(values, "ndim", None) == 0:
        return values.tolist()
    if isinstance(values, str) or not hasattr(values, "__iter__"):
        return values
    if shape is not None and _dimensions(values) == len(shape):
        return tuple(values) if isinstance(values, list) else values
    if shape is not None:
        return list(values)
    return values.tolist() if hasattr(values, "tolist") and values.ndim < 2 else list(values)


def _dimensions(values: Any) -> int:
    """Of a tensor, an array or nested lists; a list with None in it has one entry a row."""
    if isinstance(values, list | tuple):
        return -1 if not len(values) or any(value is None for value in values) else 1 + _dimensions(values[0])
    return getattr(values, "ndim", 0)


# ---- verbs: images to tokens, tokens to images, tokens to logits ------------------------------------------------------


@torch.no_grad()
@usual_defaults()
def encode(system: System, images: Any, schedule: Schedule | None = None) -> list[Tokens]:
    """Token maps of images [B, 3, H, W] in [-1, 1] of the system's size (also bytes, arrays, Pillow images): a list of K int64
    tensors [B, h_k * w_k] (of bits uint8 [B, h_k * w_k, d]). With a schedule of one's own, images may have any size that fits
    it. Of other outputs: of content with the output's shape. Raises ValueError for what does not fit."""
    schedule = _usable(system, schedule) if schedule is not None else None
    check_system(system)
    wanted = system.output.shape(system.schedule, system.tokenizer.stride)
    if isinstance(system.output, Images):
        images = as_images(images, wanted[0])
        warn_of_range(images, stacklevel=5)  # past the two decorators
    elif not images.isfinite().all():
        raise ValueError(f"this system encodes {system.output.field}s of finite numbers, got NaN or inf")
    if images.ndim != 1 + len(wanted) or (schedule is None and tuple(images.shape[1:]) != wanted):
        field = system.output.field
        channels = f", channels={wanted[0]}" if wanted[0] != 3 else ""
        hint = f"; read them with `ns.read_images(paths, size={wanted[1:]}{channels})`" if field == "image" else ""
        raise ValueError(
            f"this system encodes {field}s [B, {', '.join(map(str, wanted))}], got {list(images.shape)}{hint}"
        )
    return system.tokenizer.encode(images.to(system.device), schedule or system.schedule).tokens


@torch.no_grad()
@usual_defaults()
def decode(system: System, tokens: Sequence[Tokens], schedule: Schedule | None = None) -> Tensor:
    """Images [B, 3, H, W] in [-1, 1] of the token maps of all scales, or of any first ones.

    A token map holds ids [B, l_k], or soft weights over the codebook (`ns.Soft`, [B, l_k, V]). Raises ValueError for token maps
    of other shapes, kinds or ranges.
    """
    schedule = _usable(system, schedule)
    tokens = _checked(system, tokens, schedule)
    return system.output.finish(system.tokenizer.decode(system.tokenizer.f_hat(tokens, schedule)))


@torch.no_grad()
@usual_defaults()
def logits(system: System, tokens: Sequence[Tokens], labels: Labels, schedule: Schedule | None = None) -> Tensor:
    """Teacher-forced logits float32 [B, L, V] (of bits [B, L, d, 2]) of given token maps (all scales, or any first ones)
    under labels, one for all or one an image."""
    schedule = _usable(system, schedule)
    tokens = _checked(system, tokens, schedule)
    condition = system.condition(system.told(labels, len(first_tensor(tokens[0]))))
    return teacher_logits(system, tokens, condition, schedule)


def _usable(system: System, schedule: Schedule | None) -> Schedule:
    """The schedule of a caller, or the system's own."""
    check_system(system)
    if schedule is not None and not isinstance(schedule, Schedule):
        raise ValueError(f"schedule: expected ns.Schedule.squares(1, 2, 4) or the like, got {brief(schedule)}")
    return schedule or system.schedule


def _checked(system: System, tokens: Any, schedule: Schedule) -> list[Tokens]:
    """Token maps on the system's device, if they are what its pyramid adds up."""
    if not isinstance(tokens, list | tuple) or isinstance(tokens, Soft):
        got = f"a tensor {list(tokens.shape)}" if isinstance(tokens, Tensor) else brief(tokens)
        raise ValueError(f"expected a list of token maps [B, l], one a scale, got {got}")
    maps = [_token_map(token_map, system.tokenizer.pyramid) for token_map in tokens]
    lengths = [first_tensor(token_map).shape[1] for token_map in maps]
    if not lengths or tuple(lengths) != schedule.lengths[: len(lengths)]:
        raise ValueError(
            f"expected token maps of {list(schedule.lengths)} tokens, or the first of them, got {brief(lengths)}"
        )
    rows = [len(first_tensor(token_map)) for token_map in maps]
    if len(set(rows)) > 1 or rows[0] == 0:
        raise ValueError(f"expected as many images at every scale, got {rows}")
    return [each(lambda part: part.to(system.device), token_map) for token_map in maps]


def _token_map(tokens: Any, pyramid: Pyramid) -> Tokens:
    """The tokens of a scale, if they are of the pyramid's kind, shape and range."""
    kind, dims = pyramid.kind, () if pyramid.kind == "ids" else (pyramid.code_dim,)
    if kind == "mixed":
        if pyramid.token_type is None or type(tokens) is not pyramid.token_type:
            raise ValueError(f"this system's tokens are mixed, got {type(tokens).__name__}")
        return tokens
    if hasattr(tokens, "__array__") and not isinstance(tokens, Tensor):
        try:
            tokens = torch.as_tensor(tokens)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"expected a list of token maps [B, l], one a scale, got {brief(tokens)}") from None
    soft = isinstance(tokens, Soft) and kind != "vectors"
    values = tokens.weights if isinstance(tokens, Soft) and soft else tokens
    if not isinstance(values, Tensor):
        raise ValueError(
            f"expected a list of token maps [B, l], one a scale, got {type(tokens).__name__}: {brief(tokens)}"
        )
    whole = not (values.is_floating_point() or values.is_complex() or (kind == "ids" and values.dtype == torch.bool))
    if whole == (soft or kind == "vectors"):
        hint = "; soft weights over the choices are ns.Soft(weights)" if kind in ("ids", "bits") else ""
        raise ValueError(f"this system's tokens are {kind}, got {values.dtype}{hint}")
    dims = (*dims, pyramid.codes) if soft else dims
    if values.ndim != 2 + len(dims) or tuple(values.shape[2:]) != dims:
        shape = ", ".join(["B", "l", *map(str, dims)])
        raise ValueError(f"expected a list of token maps [{shape}], one a scale, got one of {list(values.shape)}")
    if values.is_meta:
        raise ValueError("expected token maps with numbers, got some on the device meta, which has none")
    if values.numel():
        _check_values(values, kind, pyramid.codes, soft)
    if whole and values.dtype not in (torch.int32, torch.int64):
        return values.long() if kind == "ids" else values.to(torch.uint8)
    return tokens


def _check_values(values: Tensor, kind: str, codes: int, soft: bool) -> None:
    """Raise ValueError for tokens that there are not."""
    if values.is_floating_point():
        if not values.isfinite().all():
            raise ValueError(f"this system's tokens are {kind}, got numbers that are not finite (NaN or inf)")
        if soft and bool(((values.sum(dim=-1) - 1).abs() > 0.05).any() or (values < 0).any()):
            raise ValueError(
                "soft weights are at least 0 and sum to 1 for each token, got others; make them with logits.softmax(dim=-1)"
            )
        return
    least, most = int(values.min()), int(values.max())
    if least < 0 or most >= codes:
        wrong = least if least < 0 else most
        raise ValueError(f"this system's tokens are {kind} from 0 to {codes - 1}, got {wrong}")


def teacher_logits(system: System, tokens: Sequence[Tokens], condition: Condition, schedule: Schedule) -> Tensor:
    """Logits of all given scales at once, float32 [B, l, V] (of bits [B, l, d, 2])."""
    inputs = teacher_inputs(system.tokenizer.pyramid, tokens, schedule)
    model = system.need_model()
    return model.head(model.hidden(inputs, model.prepare(condition), schedule.span(0, len(tokens))))


def recipe_names() -> dict[str, str]:
    """Names of all recipes and the modules that hold them: the files of `nextscale/recipes/`, and what other packages offer as
    entry points of the group `nextscale.recipes`."""
    room = importlib.import_module("nextscale.recipes")
    found = pkgutil.walk_packages(room.__path__, room.__name__ + ".")
    names = {module.name.rsplit(".", 1)[-1]: module.name for module in found if not module.ispkg}
    return {point.name: point.value for point in metadata.entry_points(group="nextscale.recipes")} | names


def check_dtype(dtype: Any) -> None:
    """Raise ValueError unless weights may have it."""
    if not isinstance(dtype, torch.dtype) or dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"dtype: expected torch.bfloat16, float16 or float32, got {brief(dtype)}")


def check_device(device: str | torch.device, name: str = "device") -> None:
    """Raise ValueError for a device that this machine does not have, and for `mps`: PyTorch cannot average there to sizes that
    do not divide, as pyramids do."""
    try:
        kind = torch.device(device).type
    except (RuntimeError, TypeError):
        raise ValueError(f"cannot compute on {name} {cut(str(device), 60)}; expected cpu, cuda or cuda:1") from None
    if kind == "mps":
        raise ValueError(
            "the device mps is not supported: PyTorch lacks area pooling there to sizes that do not divide, which the pyramids "
            "need; use cpu or cuda"
        )
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError, OverflowError):
        there = ", ".join(["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))])
        raise ValueError(f"cannot compute on {name} {cut(str(device), 60)}; this machine has {there}") from None


def find_recipe(name: str) -> Any:
    """The module of a recipe: `Config`, `tiny()`, and `build(config)` or `apply(system, config)`."""
    names = recipe_names()
    if not isinstance(name, str) or name not in names:
        raise ValueError(f"unknown recipe {brief(name)}; there are {', '.join(sorted(names))}")
    return importlib.import_module(names[name])


def find_method(name: str) -> Any:
    """The module of a recipe that changes systems: `Config`, `apply(system, config)`, `tiny()`."""
    recipe = find_recipe(name)
    if not hasattr(recipe, "apply"):
        raise ValueError(f"the recipe {name} builds systems and changes none")
    return recipe
