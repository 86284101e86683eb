"""`System`: what a recipe builds and what every verb takes first; and finding a recipe by its name."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nextscale.condition import Condition
from nextscale.sampling.defaults import SamplingDefaults
from nextscale.schedule import Schedule
from nextscale.settings import Settings
from nextscale.tokenizer.pyramid import teacher_inputs

if TYPE_CHECKING:
    from nextscale.contracts import Objective, Reader

# What is told of images: class names, class numbers or texts, None for nothing, one entry each; or several such lists by name.
Labels = Sequence[Any] | Tensor | str | int | None | Mapping[str, Any]


class System(nn.Module):
    """A tokenizer, a model (None before one is trained), the schedule, the names of the classes, sampling defaults, how
    the model is trained, who reads what it is told, by name (the first one reads plain labels), and how many of the last
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
        *,
        objective: Objective,
        readers: Mapping[str, Reader],
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
        self.readers = dict(readers)
        self.skipped = skipped
        self.eval()

    def with_model(self, model: nn.Module, skipped: int = 0) -> System:
        """The same system around another model, which may leave out the last scales: nothing is copied."""
        s = self
        parts = s.recipe, s.config, s.schedule, s.tokenizer, model, s.classes, s.sampling
        return System(*parts, objective=s.objective, readers=s.readers, skipped=skipped)

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
        listed = {name: _listed(given.get(name)) for name in self.readers}
        counts = {name: len(values) for name, values in listed.items() if isinstance(values, list)}
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


def _listed(values: Any) -> Any:
    """A list with one entry a row, or a value alone; tensors and arrays of numbers become numbers."""
    if hasattr(values, "tolist") and values.ndim < 2:
        return values.tolist()
    return values if values is None or isinstance(values, str | int | float) else list(values)


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
    return system.tokenizer.decode(system.tokenizer.f_hat(tokens, schedule)).clamp(-1, 1)


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


def find_recipe(name: str) -> Any:
    """The module of a recipe: `Config`, `build(config)`, `tiny()`."""
    names = recipe_names()
    if name not in names:
        raise ValueError(f"unknown recipe {name!r}; there are {', '.join(sorted(names))}")
    return importlib.import_module(names[name])
