"""Make the shipped table `nextscale/data/openmoji.tsv.gz` from OpenMoji's own `openmoji.csv` (CC BY-SA 4.0).

    python tools/make_openmoji_table.py openmoji.csv nextscale/data/openmoji.tsv.gz

Besides names and classes the table says which drawings belong together: all with the same `base` stay on one side of
every split. Drawings are joined when
1. their code points differ in skin tone, hair, gender, age, direction, colour square, or order in a pair or family, or
2. their renders at 64 px, or one and the mirror image of the other, differ by less than 2 grey levels (of 255, mean
   over all pixels and channels). That holds all pixel-identical ones, and families such as clock faces, plain
   yellow faces, flags of the same stripes, or left and right hands.
`base` is the hexcode of the first drawing of its set. The renders need `pip install nextscale[data]`.
"""

import csv
import gzip
import re
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor

from nextscale.data.drawings import openmoji_svgs, render_all
from nextscale.data.emoji import EmojiRow
from nextscale.files import atomic_write

SIZE = 64
NEAR = 2.0  # grey levels
COLUMNS = ("hexcode", "caption", "group", "subgroup", "tags", "skintone", "base")

SKIN_TONES = {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"}
HAIR = {"1F9B0", "1F9B1", "1F9B2", "1F9B3"}
COLOURS = {
    "1F7E5",
    "1F7E6",
    "1F7E7",
    "1F7E8",
    "1F7E9",
    "1F7EA",
    "1F7EB",
    "2B1B",
    "2B1C",
}  # squares that recolour a drawing
JOINERS = {"200D", "FE0F"}
SIGNS = {"2640", "2642", "27A1"}  # female, male, facing right
MODIFIERS = SKIN_TONES | HAIR | COLOURS | JOINERS | SIGNS
NEUTRAL = {
    **dict.fromkeys(["1F468", "1F469"], "1F9D1"),  # man, woman: person
    **dict.fromkeys(["1F466", "1F467"], "1F9D2"),  # boy, girl: child
    **dict.fromkeys(["1F474", "1F475"], "1F9D3"),  # old man, old woman: older person
}
# Sets of persons that also have a code point of their own.
SAME = {
    "1F9D1-2764-1F9D1": "1F491",  # couple with heart
    "1F9D1-2764-1F48B-1F9D1": "1F48F",  # kiss
    **dict.fromkeys(["1F9D1-1F91D-1F9D1", "1F46C", "1F46D"], "1F46B"),  # holding hands
    "1F9D1-1F430-1F9D1": "1F46F",  # bunny ears
    "1F9D1-1FAEF-1F9D1": "1F93C",  # wrestling
    "1FAF1-1FAF2": "1F91D",  # handshake
    **dict.fromkeys(["1F9D1-1F384", "1F936"], "1F385"),  # Claus
}
FAMILY = re.compile("1F9D1(-1F9D1)?(-1F9D2){1,2}")


def base_name(hexcode: str) -> str:
    """The code points of an emoji without its variations; a key, not always a drawing."""
    first, *rest = hexcode.split("-")  # the first one stays: a lone skin tone is a drawing, too
    base = "-".join(NEUTRAL.get(code, code) for code in [first, *(code for code in rest if code not in MODIFIERS)])
    return "1F46A" if FAMILY.fullmatch(base) else SAME.get(base, base)


class Sets:
    """Union-find over 0 .. n-1; the smallest member stands for its set."""

    def __init__(self, n: int):
        self.parent = list(range(n))

    def find(self, i: int) -> int:
        while self.parent[i] != i:
            self.parent[i] = self.parent[self.parent[i]]
            i = self.parent[i]
        return i

    def join(self, i: int, j: int) -> None:
        i, j = sorted((self.find(i), self.find(j)))
        self.parent[j] = i


def near_pairs(images: Tensor, others: Tensor, limit: float) -> list[tuple[int, int]]:
    """Pairs i < j with mean |images[i] - others[j]| < limit; both float [N, 3, H, W], H and W divisible by 8."""
    # A mean of block means is never above the mean itself, so the small pictures lose no pair.
    small = [torch.nn.functional.avg_pool2d(x, 8).flatten(1) for x in (images, others)]
    rough = torch.cdist(small[0], small[1], p=1) / small[0].shape[1]
    pairs = torch.nonzero((rough < limit + 1e-3).triu(1))
    near = []
    for part in pairs.split(1000):
        distance = (images[part[:, 0]] - others[part[:, 1]]).abs().mean((1, 2, 3))
        near += [(int(i), int(j)) for i, j in part[distance < limit]]
    return near


def base_sets(hexcodes: list[str], images: Tensor) -> list[str]:
    """The base of each drawing: the hexcode of the first one of its set."""
    sets = Sets(len(hexcodes))
    first: dict[str, int] = {}
    for i, code in enumerate(hexcodes):
        sets.join(i, first.setdefault(base_name(code), i))
    x = images.float()
    for others in (x, x.flip(3)):
        for i, j in near_pairs(x, others, NEAR):
            sets.join(i, j)
    return [hexcodes[sets.find(i)] for i in range(len(hexcodes))]


def main(source: Path, out: Path) -> None:
    """Make the table; see the head of the file.

    Args:
        source: OpenMoji's own table
        out: file to write
    """
    with open(source, encoding="utf-8", newline="") as file:
        records = list(csv.DictReader(file))
    rows = []
    for record in records:
        tags = [tag.strip() for tag in f"{record['tags']},{record['openmoji_tags']}".split(",")]
        rows.append(
            EmojiRow(
                hexcode=record["hexcode"],
                caption=record["annotation"].strip(),
                group=record["group"],
                subgroup=record["subgroups"],
                tags=", ".join(tag for tag in dict.fromkeys(tags) if tag),
                skintone=record["skintone"],
                base="",
            )
        )
    images = render_all(openmoji_svgs([row.hexcode for row in rows]), SIZE, "OpenMoji", progress=True)
    bases = base_sets([row.hexcode for row in rows], images)
    lines = ["# From OpenMoji 17.0.0 (https://openmoji.org), CC BY-SA 4.0; made by tools/make_openmoji_table.py"]
    lines.append("\t".join(COLUMNS))
    for row, base in zip(rows, bases, strict=True):
        fields = [getattr(row, name) for name in COLUMNS[:-1]] + [base]
        if any(character in field for field in fields for character in "\t\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"):
            raise ValueError(f"{row.hexcode}: a field holds a tab or a line break, which the table cannot")
        lines.append("\t".join(fields))
    # No time and no name in the header of the archive: the same input gives the same bytes.
    packed = gzip.compress(("\n".join(lines) + "\n").encode("utf-8"), 9, mtime=0)
    with atomic_write(out) as temporary:
        temporary.write_bytes(packed)
    distinct = len(np.unique(images.flatten(1).numpy(), axis=0))
    print(f"{len(rows)} drawings, {distinct} distinct at {SIZE} px, {len(set(bases))} bases, {len(packed)} bytes")


if __name__ == "__main__":
    tyro.cli(main, config=(tyro.conf.PositionalRequiredArgs,))
