"""`System`: what a recipe builds and what every verb takes first; and finding a recipe by its name."""

from __future__ import annotations

import copy
import difflib
import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from nextscale.condition import Condition
from nextscale.contracts import Output, Stepper
from nextscale.modules import replaced
from nextscale.output import Images
from nextscale.sampling.defaults import SamplingDefaults
from nextscale.schedule import Schedule
from nextscale.settings import Settings
from nextscale.tokenizer.pyramid import teacher_inputs
from nextscale.training.objective import Objective, TeacherForcing

Labels = Sequence[str | int | None] | Tensor | str | int | None


class Reader(Protocol):
    """Turns what a user says of images into what a conditioner takes.

    `field` is the key of a data item that says it: `label` (class numbers) or `caption` (texts).
    """

    field: str

    def __call__(self, values: Sequence[str | int | None]) -> Any:
        """One entry an image; None says nothing. The result has `.to(device)`."""


# What stays float32 in a system of lower precision: codes and distances between them, logits and their probabilities. A rounded
# number there is another token.
FLOAT32 = ("tokenizer.pyramid", "model.head")

Role = Literal["trained", "frozen", "external"]


@dataclass(frozen=True)
class Part:
    """A network beside tokenizer and model: a refiner, a teacher, a text encoder.

    trained, frozen: its weights are saved with the system. external: they are somebody else's; the recipe's `build` gets them
    again when the system is loaded.
    """

    module: nn.Module
    role: Role = "frozen"


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
        reader: who reads its labels (None: they are names or numbers of classes).
        output: what its decoder makes.
        stepper: its own loop; None: scale by scale.
        parts: further networks by name. They follow `.to(...)` like all others.
    """

    def __init__(
        self,
        recipe: str,
        config: Settings,
        schedule: Schedule,
        tokenizer: nn.Module,
        model: nn.Module | None,
        classes: Sequence[str] = (),
        sampling: SamplingDefaults = SamplingDefaults(),
        objective: Objective = TeacherForcing(),
        reader: Reader | None = None,
        *,
        output: Output = Images(),
        stepper: Stepper | None = None,
        parts: Mapping[str, Part] | None = None,
    ) -> None:
        super().__init__()
        self.recipe = recipe
        self.config: Any = config
        self.schedule = schedule
        # Parts are known by their contracts, not by a base class.
        self.tokenizer: Any = tokenizer
        self.model: Any
        self.register_module("model", model)
        self.classes = tuple(classes)
        self.sampling = sampling
        self.objective = objective
        self.reader = reader
        self.output, self.stepper = output, stepper
        self.parts = nn.ModuleDict({name: part.module for name, part in (parts or {}).items()})
        self.roles: dict[str, Role] = {name: part.role for name, part in (parts or {}).items()}
        for name, role in self.roles.items():
            if role != "trained":
                self.parts[name].requires_grad_(False)
        self.changes: tuple[Change, ...] = ()
        self.eval()

    def with_model(self, model: nn.Module) -> System:
        """The same system around another model of the same weights' names: nothing is copied."""
        return replaced(self, model=model)

    def changed(
        self, recipe: str, config: Settings, *, model: nn.Module | None = None, stepper: Stepper | None = None
    ) -> System:
        """This system after a method changed its model or its loop; it shares all weights and goes on in the same mode. The
        recipe's name and settings are kept, so that the result can be saved, loaded and changed again."""
        other = self if model is None else replaced(self, model=model)
        other = copy.copy(other)
        other.stepper = self.stepper if stepper is None else stepper
        other.changes = (*self.changes, Change(recipe, config, self))
        return other

    def half_(self, dtype: torch.dtype) -> System:
        """Weights and activations in bfloat16 or float16 from now on, for sampling; what `FLOAT32` names stays float32."""
        if dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(f"dtype: expected torch.bfloat16, float16 or float32, got {dtype}")
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
        h, w = self.schedule[-1]
        return h * self.tokenizer.stride, w * self.tokenizer.stride

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def need_model(self) -> Any:
        """The model, or a clear error for a system that has a tokenizer alone."""
        if self.model is None:
            raise ValueError(
                "this system has a tokenizer but no generator; train one with `nextscale train generator`, "
                "or load a system that has one"
            )
        return self.model

    def condition(self, labels: Labels) -> Condition:
        """What the model is told by labels (or prompts), one row each."""
        read = self.reader or self.label_ids
        return self.need_model().conditioner(read(_listed(labels)).to(self.device))

    def label_ids(self, labels: Labels) -> Tensor:
        """Class numbers int64 [B] of names, numbers or None (the null class, whose number is `num_classes`)."""
        num_classes = self.need_model().conditioner.num_classes
        return torch.tensor([self._label_id(label, num_classes) for label in _listed(labels)], device=self.device)

    def _label_id(self, label: str | int | None, num_classes: int) -> int:
        if label is None:
            return num_classes
        if isinstance(label, int):
            if not 0 <= label <= num_classes:
                raise ValueError(
                    f"class numbers go from 0 to {num_classes - 1} ({num_classes} or None: no class), got {label}"
                )
            return label
        if label not in self.classes:
            if not self.classes:
                raise ValueError(f"this system has no class names, got {label!r}; use a number below {num_classes}")
            close = difflib.get_close_matches(label, self.classes, n=3, cutoff=0.4) or self.classes[:3]
            raise ValueError(
                f"unknown label {label!r}; did you mean {' or '.join(map(repr, close))}? "
                f"`nextscale info` lists all {len(self.classes)}"
            )
        return self.classes.index(label)


def _listed(labels: Labels) -> list[str | int | None]:
    if isinstance(labels, Tensor):
        return labels.tolist()
    return [labels] if labels is None or isinstance(labels, str | int) else list(labels)


# ---- verbs: images to tokens, tokens to images, tokens to logits ------------------------------------------------------


@torch.no_grad()
def encode(system: System, images: Tensor, schedule: Schedule | None = None) -> list[Tensor]:
    """Token maps of images [B, 3, H, W] in [-1, 1] of the system's size: a list of K int64 tensors [B, h_k * w_k] (of bits
    uint8 [B, h_k * w_k, d]). With a schedule of one's own, images may have any size that fits it."""
    if images.ndim != 4 or (schedule is None and tuple(images.shape[-2:]) != system.image_size):
        raise ValueError(
            f"this system encodes images [B, C, {system.image_size[0]}, {system.image_size[1]}], got "
            f"{list(images.shape)}; read them with `ns.read_images(paths, size={system.image_size})`"
        )
    return system.tokenizer.encode(images.to(system.device), schedule or system.schedule).tokens


@torch.no_grad()
def decode(system: System, tokens: Sequence[Tensor], schedule: Schedule | None = None) -> Tensor:
    """Images [B, 3, H, W] in [-1, 1] of the token maps of all scales, or of any first ones.

    A token map holds ids [B, l_k], or soft weights over the codebook [B, l_k, V].
    """
    schedule = schedule or system.schedule
    tokens = _checked(system, tokens, schedule)
    return system.output.finish(system.tokenizer.decode(system.tokenizer.f_hat(tokens, schedule)))


@torch.no_grad()
def logits(system: System, tokens: Sequence[Tensor], labels: Labels, schedule: Schedule | None = None) -> Tensor:
    """Teacher-forced logits float32 [B, L, V] (of bits [B, L, d, 2]) of given token maps (all scales, or any first ones)
    under labels."""
    schedule = schedule or system.schedule
    return teacher_logits(system, _checked(system, tokens, schedule), system.condition(labels), schedule)


def _checked(system: System, tokens: Sequence[Tensor], schedule: Schedule) -> list[Tensor]:
    lengths = [token_map.shape[1] for token_map in tokens]
    if not lengths or tuple(lengths) != schedule.lengths[: len(lengths)]:
        raise ValueError(f"expected token maps of {list(schedule.lengths)} tokens, or the first of them, got {lengths}")
    return [token_map.to(system.device) for token_map in tokens]


def teacher_logits(system: System, tokens: list[Tensor], condition: Condition, schedule: Schedule) -> Tensor:
    """Logits of all given scales at once, float32 [B, l, V] (of bits [B, l, d, 2])."""
    inputs = teacher_inputs(system.tokenizer.pyramid, tokens, schedule)
    model = system.need_model()
    return model.head(model.hidden(inputs, model.prepare(condition), schedule.span(0, len(tokens))))


def recipe_names() -> dict[str, str]:
    """Names of all recipes and the modules that hold them, found by looking at the files of `recipes/`."""
    import nextscale.recipes as room

    found = pkgutil.walk_packages(room.__path__, room.__name__ + ".")
    return {module.name.rsplit(".", 1)[-1]: module.name for module in found if not module.ispkg}


def refuse_mps(device: str | torch.device) -> None:
    """Refuse `mps`: PyTorch cannot average there to sizes that do not divide, as pyramids do."""
    if torch.device(device).type == "mps":
        raise ValueError(
            "the device mps is not supported: PyTorch lacks area pooling there to sizes that do not divide, which the pyramids "
            "need; use cpu or cuda"
        )


def find_recipe(name: str) -> Any:
    """The module of a recipe: `Config`, `build(config)`, `tiny()`."""
    names = recipe_names()
    if name not in names:
        raise ValueError(f"unknown recipe {name!r}; there are {', '.join(sorted(names))}")
    return importlib.import_module(names[name])
