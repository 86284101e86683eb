"""A ladder of generators on one tokenizer: models of the same proportions in growing sizes, trained on the same tokens for
the same steps, for scaling laws (Sec. 4.2 of VAR)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from nextscale.checkpoint import load
from nextscale.data.source import DataSource
from nextscale.data.transforms import AugmentSettings
from nextscale.files import as_path
from nextscale.modules import as_module
from nextscale.settings import Settings, whole_number
from nextscale.system import System, find_recipe
from nextscale.training.config import GeneratorLoss, TrainConfig
from nextscale.training.memory import built_to_train
from nextscale.training.verbs import train_model

DROP_PATH = 0.1 / 24  # times the depth, Sec. 3.2 of VAR


@dataclass(frozen=True)
class Rung:
    """One training of a ladder: `depth` blocks, `depth` heads, a width of `width * depth`."""

    depth: int
    width: int
    seed: int
    folder: Path


def rungs(out: str | os.PathLike[str], depths: Sequence[int], width: int, seeds: Sequence[int]) -> list[Rung]:
    """The trainings of a ladder in the folder `out`, small ones first. Raises ValueError for sizes that no transformer has."""
    out = as_path(out, "the folder of a ladder")
    whole_number("width", width, 2, 4096)
    for name, numbers, most in (("depths", depths, 1024), ("seeds", seeds, 2**62 - 1)):
        for number in numbers:
            whole_number(name, number, int(name == "depths"), most)
        if not numbers or len(set(numbers)) < len(numbers):
            raise ValueError(f"{name}: expected one whole number or more, each once, got {list(numbers)}")
    return [Rung(depth, width, seed, out / f"d{depth}-s{seed}") for depth in sorted(depths) for seed in seeds]


def shape(settings: Settings, rung: Rung) -> Any:
    """The transformer's settings of a rung: VAR's proportions and drop path, everything else as in `settings`."""
    changes = {
        "depth": rung.depth,
        "dim": rung.width * rung.depth,
        "num_heads": rung.depth,
        "drop_path": DROP_PATH * rung.depth,
    }
    return type(settings).model_validate(settings.model_dump() | changes)


def parameters(system: System) -> int:
    """N, the parameters of a generator without embeddings and head, as the scaling laws count them: those of its blocks,
    which are 18 d w^2 and a few biases where each has its own AdaLN."""
    model: Any = system.need_model()
    shared = getattr(model, "shared_modulation", None)
    modules = [*map(as_module, model.blocks), *([] if shared is None else [shared])]
    return sum(p.numel() for module in modules for p in module.parameters())


def build(base: System, settings: Settings, rung: Rung, classes: Sequence[str]) -> System:
    """The system of a rung before it is trained, on the tokenizer of `base`; for data with these classes."""
    module = find_recipe(base.recipe)
    config = type(base.config).model_validate(base.config.model_dump() | {"transformer": shape(settings, rung)})
    system = module.build(config.for_classes(classes), seed=rung.seed)
    system.tokenizer = base.tokenizer
    return system


def train_ladder(
    base: System,
    settings: Settings,
    ladder: Sequence[Rung],
    data: Dataset,
    config: TrainConfig,
    *,
    classes: Sequence[str],
    val: Dataset,
    loss: GeneratorLoss = GeneratorLoss(),
    augmentation: AugmentSettings | None = None,
    views: int = 1,
    cache: str | os.PathLike[str],
    about: Mapping[str, Any] | None = None,
    source: DataSource | None = None,
) -> None:
    """Train all rungs, one after the other; one that was stopped goes on, and one that is done stays as it is.

    Args:
        base: a system whose tokenizer all share.
        settings: of the transformer; depth, width, heads and drop path are the rung's.
        config: of each training but the seed, which is the rung's.
        data, val, loss, augmentation, views, cache, about, source: as for `train_model`.
    """
    for rung in ladder:
        own = config.model_copy(update={"seed": rung.seed})
        system = built_to_train(lambda rung=rung: build(base, settings, rung, classes), "model", own)  # type: ignore[misc]
        train_model(
            system,
            data,
            own,
            out=rung.folder,
            val=val,
            loss=loss,
            augmentation=augmentation,
            views=views,
            cache=Path(cache) / f"s{rung.seed}",  # views of the images are drawn from the seed
            about=about,
            source=source,
        )


def loaded(rung: Rung) -> System:
    """The trained system of a rung."""
    return load(rung.folder / "system")


def flop_per_image(system: System) -> float:
    """Floating-point operations of one image in training, forward and backward."""
    with torch.no_grad():
        return 3 * system.need_model().flop(system.schedule)
