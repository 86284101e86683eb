"""What the settings of systems share: the sizes of the scales, and the classes of systems that are told classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, field_validator

from nextscale.schedule import Schedule
from nextscale.settings import Settings, brief

if TYPE_CHECKING:
    from typing_extensions import Self

MOST_CLASSES = 1_000_000
MOST_TOKENS = 2**20
Side = Annotated[int, Field(ge=1, le=4096)]
Sides = Annotated[
    tuple[Side | tuple[Side, Side], ...],
    Field(min_length=1, max_length=1024, description="sizes of the scales: a side, or height and width"),
]


class SystemSettings(Settings):
    """The settings of any system. A recipe's `Config` says of which kind the others are, and what is the default.

    sizes: of the scales. transformer: the model's shape. sampling: how it samples by default.
    """

    sizes: Sides
    transformer: Settings
    sampling: Settings
    styles: tuple[Annotated[str, Field(min_length=1, max_length=1000)], ...] = Field(
        (), max_length=10_000, description="names of the styles that it is told, beside all else; default: none"
    )

    @field_validator("sizes")
    @classmethod
    def _check_sizes(cls, sizes: tuple[Any, ...]) -> tuple[Any, ...]:
        lengths = [size * size if isinstance(size, int) else size[0] * size[1] for size in sizes]
        if sum(lengths) > MOST_TOKENS:
            raise ValueError(f"the scales have {sum(lengths):,} tokens together, expected at most {MOST_TOKENS:,}")
        if lengths != sorted(lengths):
            raise ValueError(f"the scales must go from coarse to fine, got {brief(list(sizes))}")
        return sizes

    @field_validator("styles")
    @classmethod
    def _different(cls, styles: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(styles)) != len(styles):
            raise ValueError("the names of styles must differ from each other")
        return styles

    def for_classes(self, classes: Sequence[str]) -> Self:
        """The settings of a system for data with these classes; one that is told no classes stays as it is."""
        return self

    def for_styles(self, styles: Sequence[str]) -> Self:
        """The settings of a system for data in these styles."""
        return type(self).model_validate(self.model_dump() | {"styles": tuple(styles)})

    @property
    def schedule(self) -> Schedule:
        """The sizes as a `Schedule`."""
        return Schedule(tuple((size, size) if isinstance(size, int) else size for size in self.sizes))


class ClassSystemSettings(SystemSettings):
    """The settings of a system that is told classes. The default is ImageNet's number of them."""

    classes: tuple[Annotated[str, Field(max_length=1000)], ...] = Field(
        (), max_length=MOST_CLASSES, description="names of the classes"
    )
    num_classes: int = Field(
        1000, ge=0, le=MOST_CLASSES, description="number of classes; 0: a tokenizer without a generator"
    )

    @field_validator("classes")
    @classmethod
    def _unique(cls, classes: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(classes)) != len(classes):
            raise ValueError("class names must differ from each other")
        return classes

    def for_classes(self, classes: Sequence[str]) -> Self:
        """The settings of a system that is told these classes."""
        return type(self).model_validate(self.model_dump() | {"classes": tuple(classes), "num_classes": len(classes)})

    def check_classes(self) -> None:
        """Raise ValueError unless there are as many class names as classes, or none."""
        if self.classes and self.num_classes != len(self.classes):
            raise ValueError(
                f"num_classes is {self.num_classes}, but there are {len(self.classes)} class names; give one number"
            )
