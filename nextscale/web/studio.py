"""What the page does, without the page: a system, what is asked of it, and pictures as they come, scale by scale."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from nextscale.contracts import Edit
from nextscale.output import at_size, psnr
from nextscale.pixels import to_float, to_uint8
from nextscale.sampling.edit import EditRequest, keep_tokens
from nextscale.sampling.loop import finish, start, step, stepper_of
from nextscale.sampling.vary import first_scales, kept_scales
from nextscale.settings import STYLE, whole_number
from nextscale.system import System, check_system, decode, encode

MOST_IMAGES = 16  # at once
MOST_SECONDS = 120.0  # of one request
MOST_SEED = 2**53  # what a browser can count to
MOST_PROMPT = 1000  # characters


@dataclass(frozen=True)
class Asked:
    """What a visitor asks for.

    labels: names or numbers of classes; prompts: descriptions in words. count: images of each. settings: those of
    `system.sampling` that differ from the system's own.
    """

    labels: tuple[Any, ...] = ()
    prompts: tuple[str, ...] = ()
    style: str | None = None
    count: int = 1
    seed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        whole_number("seed", self.seed, 0, MOST_SEED)
        whole_number("images of each", self.count, 1, MOST_IMAGES)
        if len(self.wanted) * self.count > MOST_IMAGES:
            raise ValueError(
                f"{len(self.wanted)} times {self.count} images are more than the {MOST_IMAGES} that are drawn at once; "
                "ask for fewer of each"
            )
        for prompt in self.prompts:
            if len(prompt) > MOST_PROMPT:
                raise ValueError(f"a prompt of {len(prompt)} characters is longer than {MOST_PROMPT}; say it shorter")

    @property
    def wanted(self) -> tuple[Any, ...]:
        """A label or prompt for each row of images; None: nothing is said."""
        return self.prompts or self.labels or (None,)


@dataclass(frozen=True)
class Drawn:
    """Images after a scale.

    images: uint8 [B, 3, H, W]. texts: what each is. done: scales that are made, of `scales`. seconds: since the start.
    """

    images: Tensor
    texts: tuple[str, ...]
    done: int
    scales: int
    size: tuple[int, int]
    seconds: float

    @property
    def last(self) -> bool:
        """Whether these are the finished images."""
        return self.done >= self.scales


@dataclass(frozen=True)
class Studio:
    """A system with what the page asks of it. Methods raise ValueError, in words for the visitor."""

    system: System
    seconds: float = MOST_SECONDS

    def __post_init__(self) -> None:
        check_system(self.system)
        told = set(self.system.readers) - {STYLE}
        if self.draws and len(told) > 1:
            raise ValueError(f"this system is told {', '.join(sorted(told))}; the page can say one thing and a style")

    @property
    def draws(self) -> bool:
        """Whether there is a generator; a tokenizer alone can only reconstruct."""
        return self.system.model is not None

    @property
    def said(self) -> str:
        """The name of what the system is told: label, caption."""
        return next(name for name in self.system.readers if name != STYLE)

    @property
    def reads_texts(self) -> bool:
        """Whether it is told prompts, and no labels."""
        return self.draws and self.said in self.system.texts

    @property
    def choices(self) -> list[str]:
        """The labels that there are, as words."""
        return list(self._values)

    @cached_property
    def styles(self) -> list[str]:
        """The styles that there are."""
        return [str(one) for one in self.system.readers[STYLE].choices] if STYLE in self.system.readers else []

    def value(self, word: Any) -> Any:
        """What the system takes for a word of the page: a class may have a number for a name."""
        return self._values.get(word, word)

    @cached_property
    def _values(self) -> dict[str, Any]:
        """What the system takes, by the words for it."""
        if self.reads_texts or not self.draws:
            return {}
        return {str(one): one for one in self.system.readers[self.said].choices}

    def settings(self, **given: Any) -> dict[str, Any]:
        """Sampling settings that differ from the system's own, of those that the page gives (None: the system's)."""
        sampling: Any = self.system.sampling
        own = sampling.model_dump()
        return {name: value for name, value in given.items() if value is not None and value != own.get(name)}

    def options(self, asked: Asked) -> dict[str, Any]:
        """Arguments `guidance` and `pick` of `ns.sample`."""
        own: Any = self.system.sampling
        return type(own).model_validate(own.model_dump() | asked.settings).options()

    def rows(self, asked: Asked) -> tuple[dict[str, list[Any]], tuple[str, ...]]:
        """What the system is told, an entry an image, and the same in words."""
        said = [one for one in asked.wanted for _ in range(asked.count)]
        told: dict[str, list[Any]] = {self.said: [self.value(one) for one in said]}
        if self.styles:
            told[STYLE] = [asked.style] * len(said)
        elif asked.style is not None:
            raise ValueError("this system is told no style")
        self.system.check_told(told)
        words = ["nothing said" if one is None else str(one) for one in said]
        return told, tuple(f"{one}, {asked.style}" if asked.style else one for one in words)

    def generate(self, asked: Asked) -> Iterator[Drawn]:
        """Images of labels or prompts."""
        yield from self._drawn(asked)

    def vary(self, image: Tensor, strength: float, asked: Asked) -> Iterator[Drawn]:
        """Images like one, uint8 [C, H, W]: its middle, in the system's size."""
        kept = kept_scales(self.system.schedule, strength)
        masks = [mask.to(self.system.device) for mask in first_scales(self.system.schedule, kept)]
        yield from self._drawn(asked, keep_tokens(encode(self.system, to_float(image)[None]), masks))

    def edit(self, image: Tensor, mask: Tensor, asked: Asked, **how: Any) -> Iterator[Drawn]:
        """An image uint8 [C, H, W] of any size with what a mask bool [H, W] marks drawn anew. how: fit, blend, kept of
        `ns.inpaint`."""
        if not mask.any():
            raise ValueError("nothing is marked; draw over what shall change")
        plan = EditRequest(mask=mask, **how).plan(self.system, to_float(image)[None])
        if not plan.generate.any():
            raise ValueError("what is marked is too small, or lies outside of what the system sees; mark more")
        yield from self._drawn(asked, plan.edit, plan.whole)

    def reconstruct(self, image: Tensor) -> list[tuple[Tensor, float]]:
        """What the tokens of an image, uint8 [C, H, W] in the system's size, give after each scale: uint8 [3, H, W], and
        the PSNR in dB."""
        original = to_float(image)[None]
        tokens = encode(self.system, original)
        found = []
        for k in range(len(tokens)):
            seen = at_size(decode(self.system, tokens[: k + 1]).cpu(), self.system.image_size)
            found.append((to_uint8(seen)[0], float(psnr(seen, original)[0])))
        return found

    def _drawn(
        self, asked: Asked, edit: Edit | None = None, whole: Callable[[Tensor], Tensor] | None = None
    ) -> Iterator[Drawn]:
        """Steps of the loop until it is done, or the time is up. whole: what becomes of the images."""
        began = time.monotonic()
        system, stepper = self.system, stepper_of(self.system)
        told, texts = self.rows(asked)
        scales = len(system.schedule)
        size = system.output.shape(system.schedule, system.tokenizer.stride)[-2:]
        state = start(system, told, edit=edit, seed=asked.seed, **self.options(asked))
        while True:
            state = step(system, state)
            over, spent = stepper.done(system, state), time.monotonic() - began
            images = at_size(finish(system, state), size)
            pixels = to_uint8(images if whole is None else whole(images)).cpu()
            done = scales if over else state.k
            yield Drawn(pixels, texts, done, scales, system.schedule[max(state.k, 1) - 1], spent)
            if over:
                return
            if spent > self.seconds:
                raise ValueError(f"this took longer than {self.seconds:g} s and was stopped; ask for fewer images")


def marked(layers: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """What strokes on transparent layers, uint8 [4, H, W] each, mark: bool [H, W] of that size."""
    mask = torch.zeros(size, dtype=torch.bool)
    for layer in layers:
        mask |= torch.nn.functional.interpolate(layer[3:][None].float(), size=size)[0, 0] > 127
    return mask
