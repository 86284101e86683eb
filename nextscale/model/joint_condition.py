"""Several conditions at once: a label or a text, and a style."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from nextscale.condition import Condition
from nextscale.contracts import Conditioner
from nextscale.model.class_condition import ClassCondition
from nextscale.modules import as_module
from nextscale.readers import ClassReader
from nextscale.settings import STYLE


class JointCondition(nn.Module):
    """Conditioners side by side. The parts of each are called `name.part` by its name, so that `name` alone means them all:
    each is dropped and guided on its own, or with the others.

    `summed` makes what the transformer reads of them.
    """

    def __init__(self, conditioners: Mapping[str, Conditioner]) -> None:
        super().__init__()
        self.conditioners: Mapping[str, Any]  # known by their contract
        self.register_module(
            "conditioners", nn.ModuleDict({name: as_module(one) for name, one in conditioners.items()})
        )

    def forward(self, told: Mapping[str, Any]) -> Condition:
        """`told`: what the readers made of it, by their names."""
        return _joined({name: conditioner(told) for name, conditioner in self.conditioners.items()})

    def null(self, condition: Condition) -> Condition:
        """The condition that says nothing, with the same parts."""
        return _joined({name: one.null(condition.within(name)) for name, one in self.conditioners.items()})

    def grow(self, smaller: JointCondition) -> None:
        """Take over the weights of one whose classes are the first of these."""
        for name, conditioner in self.conditioners.items():
            conditioner.grow(smaller.conditioners[name])


def _joined(conditions: Mapping[str, Condition]) -> Condition:
    parts = {f"{name}.{part}": value for name, one in conditions.items() for part, value in one.parts().items()}
    masks = {f"{name}.{part}": mask for name, one in conditions.items() for part, mask in one.masks.items()}
    return Condition(masks, **parts)


def summed(condition: Condition) -> Condition:
    """Parts of several conditioners as the transformer reads them: vectors of the same name add up. Raises ValueError for
    sequences of which there are two."""
    parts: dict[str, torch.Tensor] = {}
    masks: dict[str, torch.Tensor] = {}
    for name, value in condition.parts().items():
        leaf = name.rpartition(".")[2]
        if leaf in parts and leaf not in ("start", "vec"):
            raise ValueError(
                f"two conditions have a part {leaf!r}, which cannot be added; give one of them another name"
            )
        parts[leaf] = parts[leaf] + value if leaf in parts else value
        if name in condition.masks:
            masks[leaf] = condition.masks[name]
    return Condition(masks, **parts)


def with_styles(name: str, conditioner: Conditioner, styles: Sequence[str], dim: int) -> dict[str, Any]:
    """The arguments `conditioner` and `compose` of a transformer that is told `name`, and a style if there are some."""
    if not styles:
        return {"conditioner": conditioner}
    style = ClassCondition(len(styles), dim, STYLE)
    return {"conditioner": JointCondition({name: conditioner, STYLE: style}), "compose": summed}


def style_readers(styles: Sequence[str]) -> dict[str, ClassReader]:
    """The reader of the style, if there are some."""
    return {STYLE: ClassReader(styles, len(styles), field=STYLE)} if styles else {}
