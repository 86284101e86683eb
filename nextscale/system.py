"""`System`: what a recipe builds and what every verb takes first; and finding a recipe by its name."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nextscale.condition import Condition
from nextscale.sampling.defaults import SamplingDefaults
from nextscale.schedule import Schedule
from nextscale.settings import Settings
from nextscale.tokenizer.pyramid import teacher_inputs
from nextscale.tokens import Tokens, each, first_tensor
from nextscale.training.objective import Objective, TeacherForcing

Labels = Sequence[str | int | None] | Tensor | str | int | None


class Reader(Protocol):
    """Turns what a user says of images into what a conditioner takes.

    `field` is the key of a data item that says it: `label` (class numbers) or `caption` (texts).
    """

    field: str

    def __call__(self, values: Sequence[str | int | None]) -> Any:
        """One entry an image; None says nothing. The result has `.to(device)`."""


class System(nn.Module):
    """A tokenizer, a model (None before one is trained), the schedule, the names of the classes, sampling defaults, how
    the model is trained, who reads its labels (None: they are names or numbers of classes), and how many of the last
    scales sampling leaves out.

    `recipe` and `config` say how it was built; saving and loading need nothing else but the weights.
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
        skipped: int = 0,
    ) -> None:
        super().__init__()
        self.recipe = recipe
        self.config: Any = config
        self.schedule = schedule
        # Parts are known by their contracts, not by a base class.
        self.tokenizer: Any = tokenizer
        self.model: Any = model
        self.classes = tuple(classes)
        self.sampling = sampling
        self.objective = objective
        self.reader = reader
        self.skipped = skipped
        self.eval()

    def with_model(self, model: nn.Module, skipped: int = 0) -> System:
        """The same system around another model, which may leave out the last scales: nothing is copied."""
        s = self
        parts = s.recipe, s.config, s.schedule, s.tokenizer, model, s.classes, s.sampling, s.objective, s.reader
        return System(*parts, skipped)

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
def decode(system: System, tokens: Sequence[Tokens], schedule: Schedule | None = None) -> Tensor:
    """Images [B, 3, H, W] in [-1, 1] of the token maps of all scales, or of any first ones.

    A token map holds ids [B, l_k], or soft weights over the codebook (`ns.Soft`, [B, l_k, V]).
    """
    schedule = schedule or system.schedule
    tokens = _checked(system, tokens, schedule)
    return system.tokenizer.decode(system.tokenizer.f_hat(tokens, schedule)).clamp(-1, 1)


@torch.no_grad()
def logits(system: System, tokens: Sequence[Tokens], labels: Labels, schedule: Schedule | None = None) -> Tensor:
    """Teacher-forced logits float32 [B, L, V] (of bits [B, L, d, 2]) of given token maps (all scales, or any first ones)
    under labels."""
    schedule = schedule or system.schedule
    return teacher_logits(system, _checked(system, tokens, schedule), system.condition(labels), schedule)


def _checked(system: System, tokens: Sequence[Tokens], schedule: Schedule) -> list[Tokens]:
    lengths = [first_tensor(token_map).shape[1] for token_map in tokens]
    if not lengths or tuple(lengths) != schedule.lengths[: len(lengths)]:
        raise ValueError(f"expected token maps of {list(schedule.lengths)} tokens, or the first of them, got {lengths}")
    return [each(lambda part: part.to(system.device), token_map) for token_map in tokens]


def teacher_logits(system: System, tokens: Sequence[Tokens], condition: Condition, schedule: Schedule) -> Tensor:
    """Logits of all given scales at once, float32 [B, l, V] (of bits [B, l, d, 2])."""
    inputs = teacher_inputs(system.tokenizer.pyramid, tokens, schedule)
    model = system.need_model()
    return model.head(model.hidden(inputs, model.prepare(condition), schedule.span(0, len(tokens))))


def recipe_names() -> dict[str, str]:
    """Names of all recipes and the modules that hold them, found by looking at the files of `recipes/`."""
    import nextscale.recipes as room

    found = pkgutil.walk_packages(room.__path__, room.__name__ + ".")
    return {module.name.rsplit(".", 1)[-1]: module.name for module in found if not module.ispkg}


def find_recipe(name: str) -> Any:
    """The module of a recipe: `Config`, `build(config)`, `tiny()`."""
    names = recipe_names()
    if name not in names:
        raise ValueError(f"unknown recipe {name!r}; there are {', '.join(sorted(names))}")
    return importlib.import_module(names[name])
