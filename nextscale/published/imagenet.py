"""ImageNet's classes, by the numbers that published models know them by."""

from functools import cache
from importlib import resources


@cache
def imagenet_classes() -> tuple[str, ...]:
    """Names of the 1000 classes of ILSVRC-2012, sorted by their WordNet ids: "tench, Tinca tinca" is the first.

    They are WordNet's words for each class, but for the two cranes, which WordNet calls alike.
    """
    text = resources.files("nextscale.published").joinpath("imagenet.txt").read_text(encoding="utf-8")
    return tuple(text.splitlines())
