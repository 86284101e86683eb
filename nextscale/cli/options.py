"""What commands share: options with their help, and the checks at the door."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

import nextscale as ns
from nextscale.cli.methods import Methods, load_changed
from nextscale.files import check_name, target_of
from nextscale.sampling.defaults import SamplingDefaults
from nextscale.settings import brief, faults

if TYPE_CHECKING:
    from nextscale.data.source import DataSource
    from nextscale.system import System

SHIPPED = "emoji-64"
SHIPPED_TEXT = "emoji-64-text"
NUMBERS = ("guidance", "style_guidance", "top_k", "top_p", "temperature")  # of sampling settings
MOST_IMAGES = 4096  # in one grid
MOST_NUMBER = 1_000_000  # of anything that is counted
MOST_SINGLES = 100_000  # written one by one

Flat = tyro.conf.arg(name="")  # the fields become flags without a prefix
Own = tyro.conf.arg(help_behavior_hint="(default: the system's own)")


# ---- options: the strings below the fields are their help ------------------------------------------------------------


@dataclass(frozen=True)
class Loading:
    """Which system, and where it computes."""

    system: Annotated[str, tyro.conf.arg(help_behavior_hint=f"(default: {SHIPPED}; {SHIPPED_TEXT} for prompts)")] = ""
    """shipped name, folder, or hub name"""
    device: str = "cpu"
    """cpu, cuda, cuda:1"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """of weights and activations; what decides tokens stays float32"""
    methods: Methods = ()

    @property
    def name(self) -> str:
        """The system's name, as the user may write it again."""
        return self.system or SHIPPED

    def title(self, system: System) -> str:
        """What pictures of the loaded system call it: its name, and the methods that changed it."""
        name, changes = Path(self.system or SHIPPED).name, " and ".join(change.recipe for change in system.changes)
        return f"{name} with {changes}" if changes else name

    def load(self) -> System:
        """The system on the device, changed by the methods."""
        return load_changed(self.system or SHIPPED, self.device, self.methods, self.dtype)

    def told(self, prompt: Sequence[str]) -> Loading:
        """The same, with the shipped system that reads prompts where there are some and no system was named."""
        return replace(self, system=SHIPPED_TEXT) if prompt and not self.system else self


@dataclass(frozen=True)
class Source:
    """The images."""

    data: Annotated[str, tyro.conf.arg(help_behavior_hint="(default: openmoji)")] = ""
    """openmoji; emoji, the same as five sets draw them, or some of openmoji+noto+twemoji+fluent+emojione; a folder with one
    folder of images a class, or with train/ and val/; shards like "photos-{000..012}.tar"; a folder of Hugging Face
    datasets; an .npz of images (arr_0)"""
    val: Annotated[str, tyro.conf.arg(help_behavior_hint="(default: a tenth of the images)")] = ""
    """a validation set of one's own, which may be all that --data may be"""
    image_column: Annotated[str, tyro.conf.arg(help_behavior_hint="(default: image)")] = ""
    """of Hugging Face datasets"""
    label_column: Annotated[str, tyro.conf.arg(help_behavior_hint="(default: label, if there is one)")] = ""
    """of Hugging Face datasets; none: no labels"""
    caption_column: Annotated[str, tyro.conf.arg(help_behavior_hint="(default: caption or text, if there is one)")] = ""
    """of Hugging Face datasets; none: no captions"""

    def named(self) -> DataSource:
        """The same for those that read it."""
        from nextscale.data.source import DRAWINGS, DataSource

        return DataSource(self.data or DRAWINGS, self.val, self.image_column, self.label_column, self.caption_column)


@dataclass(frozen=True)
class Picking:
    """How tokens are drawn."""

    seed: int = 0
    """seed of the first image"""
    guidance: Annotated[float | None, Own] = None
    """weight of classifier-free guidance, of a ramp at the last scale; 1: off"""
    top_k: Annotated[int | None, Own] = None
    """keep the k most likely tokens; 0: all"""
    top_p: Annotated[float | None, Own] = None
    """keep the fewest tokens with this probability; 0: all"""
    temperature: Annotated[float | None, Own] = None
    """divides the logits; below 1 is sharper"""
    greedy: bool = False
    """always take the most likely token"""
    style_guidance: Annotated[float | None, Own] = None
    """weight of guidance for the style on its own, where there is one"""
    smooth: bool = False
    """mix tokens softly instead of drawing one (Gumbel softmax)"""

    def check(self) -> None:
        """Refuse what no system can do."""
        check_seed(self.seed)
        own_settings(SamplingDefaults(), self.given())
        own = (self.top_k, self.top_p, self.temperature)
        if self.greedy and (self.smooth or any(value is not None for value in own)):
            raise ValueError(
                "--greedy goes without --smooth, --top-k, --top-p and --temperature: it always takes the most likely token"
            )

    def given(self) -> dict[str, Any]:
        """The numbers that the user named."""
        numbers = {name: getattr(self, name) for name in NUMBERS}
        return {name: number for name, number in numbers.items() if number is not None}

    def resolve(self, system: System, preset: str = "") -> tuple[dict[str, Any], str]:
        """Arguments of `ns.sample`, the preset's or else the system's own where nothing is given; and what they are, in
        words."""
        own: Any = preset_of(system, preset) if preset else system.sampling
        changes = self.given()
        settings = own_settings(own, changes | ({"smooth": True} if self.smooth else {}))
        options, words = settings.options(), settings.words()
        if self.greedy:
            return options | {"pick": ns.greedy}, f"{words.partition(', top-k')[0]}, greedy"
        return options, words


def own_settings(own: Any, changes: Mapping[str, Any]) -> Any:
    """Settings with changes that options named. Raises ValueError in the words of the options."""
    from pydantic import ValidationError

    try:
        return type(own).model_validate(own.model_dump() | dict(changes))
    except ValidationError as error:
        raise ValueError(faults(error, "--")) from error


def preset_of(system: System, name: str) -> Any:
    """Sampling settings that the system's recipe knows by a name."""
    presets = getattr(ns.find_recipe(system.recipe), "SAMPLING", {})
    if name not in presets:
        raise ValueError(f"unknown --preset {name!r}; the recipe {system.recipe} has {', '.join(presets) or 'none'}")
    return presets[name]


# ---- checks at the door ----------------------------------------------------------------------------------------------


def at_least_one(**numbers: int | None) -> None:
    """Refuse numbers below 1, and such as nobody means; None is a number that was not given."""
    for name, number in numbers.items():
        option = f"--{name.replace('_', '-')}"
        if number is not None and number < 1:
            raise ValueError(f"{option} must be at least 1, got {number}")
        if number is not None and number > MOST_NUMBER:
            raise ValueError(f"{option} must be at most {MOST_NUMBER:,}, got {brief(number)}")


def check_seed(seed: int) -> None:
    """Refuse seeds that the generators of all images of a picture cannot take."""
    if not 0 <= seed < 2**63 - MOST_SINGLES:
        raise ValueError(f"--seed must be a whole number from 0 to about 9e18, got {seed}")


def check_device(device: str) -> None:
    """Refuse devices that this machine does not have, and `meta`, which computes nothing."""
    import torch

    from nextscale import system

    system.check_device(device, "--device")
    if torch.device(device).type == "meta":
        raise ValueError("cannot compute on --device meta; use cpu or cuda")


def check_images(count: int, out: Path | None = None) -> None:
    """Refuse more images than a picture holds; as single files, into the folder or array `out`, there may be more."""
    from nextscale.data.images import writes_singles

    if count > (MOST_SINGLES if out is not None and writes_singles(out) else MOST_IMAGES):
        raise ValueError(
            f"a picture holds at most {MOST_IMAGES} images, and a folder or .npz {MOST_SINGLES}, got {count}; lower --count"
        )


def check_pictures(*paths: Path, out: Path | None = None, inputs: Sequence[Path] = ()) -> None:
    """Refuse what could not be written later, before any work; leaves nothing behind. `out` may also be a folder of single
    images, or .npz; `inputs` are files that must stay."""
    from nextscale.data.images import image_format, writes_singles

    outputs = [*paths, *([] if out is None else [out])]
    places = [target_of(path) for path in outputs]
    folder = [target_of(out)] if out is not None and writes_singles(out) else []
    if len(set(places)) < len(places) or any(place.parent in folder for place in places):
        raise ValueError(f"two pictures would go to {outputs[-1]}; give them different names")
    for path, place in zip(outputs, places, strict=True):
        if place in [target_of(source) for source in inputs]:
            raise ValueError(f"{path} is read, and would be overwritten; give another --out")
        singles = path == out and writes_singles(path)
        if not singles:
            image_format(path)
        check_writable(path / "00000.png" if singles and not path.suffix else path)


def check_new_system(folder: Path) -> None:
    """Refuse a folder that no system could be written to, or that holds one."""
    check_writable(folder / "config.json")
    if (folder / "config.json").exists():
        raise ValueError(f"{folder} holds a system already; choose another folder, or delete that one first")


def check_writable(path: Path) -> None:
    """Refuse a file that could not be written later; leaves nothing behind."""
    check_name(path)
    if path.is_dir():
        raise ValueError(f"cannot write {path}: it is a folder; give a name that no folder has")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise ValueError(f"cannot write {path}: {folder} is a file, expected a folder; choose another path")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"cannot write {path}: no permission for folder {folder}; choose another")
