"""The command and the Python that make the same picture again."""

from __future__ import annotations

import csv
import io
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nextscale.checkpoint import ChangeConfig
from nextscale.settings import STYLE
from nextscale.system import find_recipe
from nextscale.web.studio import Asked, Studio

PHOTO, MASK = "photo.png", "mask.png"  # what the visitor's files are called in what is shown


@dataclass(frozen=True)
class Again:
    """How to make a picture again: a command line, and Python."""

    command: str
    python: str


@dataclass(frozen=True)
class Repeater:
    """Writes what repeats the pictures of a studio, whose system was loaded by this name and changed by these methods."""

    studio: Studio
    name: str
    changes: Sequence[ChangeConfig] = ()
    dtype: str = "float32"

    def generate(self, asked: Asked) -> Again:
        told = self._told(asked) if asked.wanted != (None,) else ["--labels", "none", *self._told(asked)]
        words = ["sample", *told, "--count", asked.count, *self._picking(asked), "--out", "images"]
        call = f"ns.sample(system, {self._rows(asked)}, {self._options(asked)})"
        return self._again(words, asked, call)

    def edit(self, asked: Asked, how: dict[str, Any]) -> Again:
        marks = ["--mask", MASK, *(part for name, value in how.items() for part in (f"--{name}", value))]
        words = ["inpaint", PHOTO, *marks, *self._told(asked), "--count", asked.count, *self._picking(asked)]
        given = ", ".join(f"{name}={value!r}" for name, value in how.items())
        images = f"[Image.open({PHOTO!r})] * {len(asked.wanted) * asked.count}"
        call = (
            f"ns.inpaint(system, {images}, Image.open({MASK!r}), {self._rows(asked)}, {given}, {self._options(asked)})"
        )
        return self._again([*words, "--out", "images"], asked, call, "from PIL import Image")

    def vary(self, asked: Asked, strength: float) -> Again:
        words = [
            "vary",
            PHOTO,
            "--strength",
            strength,
            *self._told(asked),
            "--count",
            asked.count,
            *self._picking(asked),
        ]
        photo = f"ns.read_images([{PHOTO!r}] * {asked.count}, system.image_size)"
        call = f"ns.vary(system, {photo}, {strength!r}, {self._rows(asked)}, {self._options(asked)})"
        return self._again([*words, "--out", "images"], asked, call)

    def reconstruct(self, scales: int) -> Again:
        command = self._command(["reconstruct", PHOTO, "--out", "scales.png"])
        photo = f"ns.read_images({PHOTO!r}, system.image_size)"
        lines = [*self._loading(), f"tokens = ns.encode(system, {photo})"]
        lines += [f"image = ns.decode(system, tokens[:{scales}])", 'ns.save_images(image, "image.png")']
        return Again(command, "\n".join(lines))

    def _again(self, words: Sequence[Any], asked: Asked, call: str, *imports: str) -> Again:
        lines = [*imports, *self._loading()]
        if asked.settings:
            lines.append(f"options = system.sampling.model_copy(update={asked.settings!r}).options()")
        lines += [f"images = {call}", 'ns.save_images(images, "images/")']
        return Again(self._command(words), "\n".join(lines))

    def _command(self, words: Sequence[Any]) -> str:
        verb, *rest = (f"{word:.10g}" if isinstance(word, float) else str(word) for word in words)
        dtype = [] if self.dtype == "float32" else ["--dtype", self.dtype]
        changed = [part for change in self.changes for part in _with(change)]
        return shlex.join(["nextscale", verb, *rest, "--system", self.name, *dtype, *changed])

    def _loading(self) -> list[str]:
        dtype = "" if self.dtype == "float32" else f", dtype=torch.{self.dtype}"
        lines = [
            *(["import torch"] if dtype else []),
            "import nextscale as ns",
            "",
            f"system = ns.load({self.name!r}{dtype})",
        ]
        for change in self.changes:
            given = ", ".join(f"{name}={value!r}" for name, value in _given(change).items())
            lines += [
                f"recipe = ns.find_recipe({change.recipe!r})",
                f"system = recipe.apply(system, recipe.Config({given}))",
            ]
        return lines

    def _told(self, asked: Asked) -> list[str]:
        """What the images are, as options."""
        words: list[str] = []
        if asked.prompts:
            words += ["--prompt", *asked.prompts]
        elif asked.labels:
            line = io.StringIO()
            csv.writer(line, lineterminator="").writerow(asked.labels)
            words += ["--labels", line.getvalue()]
        return words + (["--style", asked.style] if asked.style else [])

    def _rows(self, asked: Asked) -> str:
        """The same in Python, an entry an image."""
        said, styles = self.studio.said, self.studio.styles
        wanted = [self.studio.value(one) for one in asked.wanted]
        rows = (
            f"{wanted!r} * {asked.count}"
            if len(wanted) == 1
            else f"[one for one in {wanted!r} for _ in range({asked.count})]"
        )
        style = f", {STYLE!r}: [{asked.style!r}] * {len(wanted) * asked.count}" if styles else ""
        return f"{{{said!r}: {rows}{style}}}"

    def _picking(self, asked: Asked) -> list[Any]:
        words: list[Any] = ["--seed", asked.seed]
        for name, value in asked.settings.items():
            words += ["--smooth"] if name == "smooth" else [f"--{name.replace('_', '-')}", value]
        return words

    def _options(self, asked: Asked) -> str:
        return f"seed={asked.seed}" + (", **options" if asked.settings else "")


def _given(change: ChangeConfig) -> dict[str, Any]:
    """The options of a method that are not what they are anyway."""
    settings = find_recipe(change.recipe).Config
    config, usual = settings.model_validate(change.config), settings()
    names = type(config).model_fields
    return {name: getattr(config, name) for name in names if getattr(config, name) != getattr(usual, name)}


def _with(change: ChangeConfig) -> list[str]:
    words = ["--with", change.recipe]
    for name, value in _given(change).items():
        values = [str(one) for one in value] if isinstance(value, tuple | list) else [str(value)]
        words += [f"--with.{name.replace('_', '-')}", *values]
    return words
