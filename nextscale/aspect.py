"""Schedules for images of any shape: 13 scales for each of 15 ratios of height to width, as Infinity published them."""

from __future__ import annotations

from nextscale.schedule import Schedule

Sizes = tuple[tuple[int, int], ...]

SQUARE: Sizes = tuple((side, side) for side in (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64))
TALL: dict[float, str] = {
    1.25: "1x1 2x2 3x3 5x4 10x8 15x12 20x16 25x20 30x24 35x28 45x36 55x44 70x56",
    1.333: "1x1 2x2 4x3 8x6 12x9 16x12 20x15 24x18 28x21 36x27 48x36 60x45 72x54",
    1.5: "1x1 2x2 3x2 6x4 9x6 15x10 21x14 27x18 33x22 39x26 48x32 63x42 78x52",
    1.75: "1x1 2x2 3x3 7x4 11x6 14x8 21x12 28x16 35x20 42x24 56x32 70x40 84x48",
    2.0: "1x1 2x2 4x2 6x3 10x5 16x8 22x11 30x15 38x19 46x23 60x30 74x37 90x45",
    2.5: "1x1 2x2 5x2 10x4 15x6 20x8 25x10 30x12 40x16 50x20 65x26 80x32 100x40",
    3.0: "1x1 2x2 6x2 9x3 15x5 21x7 27x9 36x12 45x15 54x18 72x24 90x30 111x37",
}


def _published_sizes() -> dict[float, Sizes]:
    found: dict[float, Sizes] = {1.0: SQUARE}
    for ratio, text in TALL.items():
        pairs = (size.split("x") for size in text.split())
        found[ratio] = tuple((int(h), int(w)) for h, w in pairs)
        found[int(1000 / ratio) / 1000] = tuple((w, h) for h, w in found[ratio])
    return found


# The published scales of each shape, by height / width; the wide ones are the tall ones turned, with their ratios cut off
# after three digits.
SIZES = _published_sizes()
# How many scales make an image of so many pixels.
BUDGETS: dict[str, int] = {"0.06M": 7, "0.25M": 10, "0.60M": 12, "1M": 13}


def schedule_for(height: int, width: int, budget: str = "1M") -> Schedule:
    """The published schedule whose shape is nearest to that of an image; `budget` says how many pixels it will have:
    0.06M, 0.25M, 0.60M or 1M (256, 512, 768 and 1024 px, if square)."""
    if height < 1 or width < 1 or budget not in BUDGETS:
        raise ValueError(
            f"expected a height, a width and a budget of {', '.join(BUDGETS)}, got {height}, {width} and {budget!r}"
        )
    nearest = min(SIZES, key=lambda ratio: abs(height / width - ratio))
    return Schedule(SIZES[nearest][: BUDGETS[budget]])
