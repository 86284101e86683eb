"""Negative prompts: guidance leads away from another text instead of from no text. Guided samplers usually have it, and so does
Infinity's code (arXiv 2412.04431).

Changes by room. model: the null of the text condition is another text's condition. Weights stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from nextscale.model.text_condition import NegativeText
from nextscale.modules import replaced
from nextscale.settings import Settings
from nextscale.system import System

APPLIES_TO = "systems that are told texts"
EXAMPLE = "infinity"


class Config(Settings):
    """What the images should not show."""

    prompts: tuple[Annotated[str, Field(max_length=100_000)], ...] = Field(
        ("",),
        min_length=1,
        max_length=4096,
        description="one text for all images, or one for each; an empty one is no text",
    )


def tiny() -> Config:
    """One word."""
    return Config(prompts=("blurred",))


def apply(system: System, config: Config = Config()) -> System:
    """A system whose guidance leads away from the prompts; it shares all weights with `system`, which stays as it is.

    Of several texts that it is told, the first is meant. Raises ValueError for a system that is told no texts.
    """
    model = system.need_model()
    if not system.texts:
        raise ValueError("this system is told classes, not texts, so it has no use for a negative prompt")
    told = {name: system.readers[name](said) for name, said in system.told({system.texts[0]: config.prompts}).items()}
    before = model.conditioner
    if isinstance(before, NegativeText):  # the last prompts count
        before = before.conditioner
    return system.changed("negative", config, model=replaced(model, conditioner=NegativeText(before, told)))


def with_negative(system: System, prompts: str | Sequence[str]) -> System:
    """The same in one call: `with_negative(system, "blurred")`."""
    return apply(system, Config(prompts=(prompts,) if isinstance(prompts, str) else tuple(prompts)))
