"""Make the shipped drawings `nextscale/data/emoji_sets.*` from four packages of the npm registry.

    npm pack @iconify-json/noto@1.2.9 @iconify-json/twemoji@1.2.5
    npm pack @iconify-json/fluent-emoji-flat@1.2.6 @iconify-json/emojione@1.2.3
    python tools/make_emoji_sets.py iconify-json-*.tgz

`emoji_sets.xz` has the body of one SVG a line. `emoji_sets.tsv.gz` has a line for each of them: the set, the hexcode, the
view box, and drawings of other bases that look the same at 64 px, in any set or in OpenMoji's (`make_openmoji_table.py`
says what a base is, and what looks the same). What a drawing is called stands in OpenMoji's table, by its hexcode.

A drawing is kept if its code points, or else its name, are those of a drawing of OpenMoji; one for each of these in each set.
Licences: `nextscale/data/EMOJI_LICENSES.md`.
"""

import gzip
import json
import lzma
import re
import tarfile
import unicodedata
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import tyro
from make_openmoji_table import NEAR, SIZE
from torch import Tensor

from nextscale.data.attribution import SETS
from nextscale.data.drawings import render_all, svg_of
from nextscale.data.emoji import openmoji, table
from nextscale.files import atomic_write
from nextscale.progress import Bar

PACKAGES = {name: found.package for name, found in SETS.items() if name != "openmoji"}
FILES = ("icons.json", "chars.json", "package.json")
MOST_BYTES = 100_000_000  # of a file in a package
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")  # of the skin, as -tone1 to -tone5


def read(package: Path) -> dict[str, Any]:
    """The files of a package, by their names."""
    found = {}
    with tarfile.open(package) as archive:
        for name in FILES:
            member = archive.getmember(f"package/{name}")
            if member.size > MOST_BYTES:
                raise ValueError(f"{package}: {name} is larger than {MOST_BYTES:,} bytes")
            found[name] = json.load(archive.extractfile(member))  # type: ignore[arg-type]
    return found


def plain(hexcode: str) -> str:
    """Code points as they are compared: without the sign that asks for a coloured drawing."""
    return "-".join(part for part in hexcode.upper().split("-") if part != "FE0F")


def slug(name: str) -> str:
    """A name as it is compared: small letters, digits and hyphens; the tone of the skin in full."""
    name = (
        unicodedata.normalize("NFKD", name)
        .encode("ascii", "ignore")
        .decode()
        .lower()
        .replace("'", "")
        .replace("&", "and")
    )
    name = re.sub("[^a-z0-9]+", "-", name).strip("-")
    name = re.sub("^flag-for-(flag-)?", "flag-", name)
    if found := re.search("-tone([1-5])$", name):
        return f"{name[: found.start()]}-{TONES[int(found[1]) - 1]}-skin-tone"
    return re.sub(f"(?<!-skin)-({'|'.join(sorted(TONES, key=len, reverse=True))})$", r"-\1-skin-tone", name)


def coded(packages: dict[str, dict[str, Any]]) -> dict[str, list[tuple[str, str]]]:
    """The icons of each set as (hexcode, name), in OpenMoji's order, one for each hexcode."""
    rows = table()
    place = {plain(row.hexcode): i for i, row in enumerate(rows)}
    named = {slug(row.caption): plain(row.hexcode) for row in rows}
    for files in packages.values():
        parents = defaultdict(list)
        for alias, icon in files["icons.json"].get("aliases", {}).items():
            parents[icon["parent"]].append(alias)
        for code, name in files["chars.json"].items():
            for one in (name, *parents[name]):
                named.setdefault(slug(one), plain(code))
    found = {}
    for set_name, files in packages.items():
        codes = defaultdict(list)
        for code, name in files["chars.json"].items():
            codes[name].append(plain(code))
        chosen: dict[int, str] = {}
        by_name: dict[int, str] = {}
        for name in files["icons.json"]["icons"]:
            for code in codes[name]:
                if code in place:
                    chosen.setdefault(place[code], name)
            code = named.get(slug(name), "")
            if not codes[name] and code in place:
                by_name.setdefault(place[code], name)
        chosen = by_name | chosen
        found[set_name] = [(rows[i].hexcode, chosen[i]) for i in sorted(chosen)]
    return found


def near_drawings(images: Tensor, bases: list[str]) -> list[list[int]]:
    """For each of uint8 [N, 3, H, W]: the others, of another base, that it or its mirror image differs from by less than `NEAR`
    grey levels."""
    x = images.float()
    small = torch.nn.functional.avg_pool2d(x, 8)
    near: list[set[int]] = [set() for _ in range(len(images))]
    for mirrored in (False, True):
        other = (small.flip(3) if mirrored else small).flatten(1)
        for first in Bar(range(0, len(images), 500), desc="comparing", unit="part"):
            part = small[first : first + 500].flatten(1)
            # A mean of block means is never above the mean itself, so the small pictures lose no pair.
            rough = torch.cdist(part, other, p=1) / part.shape[1]
            for i, j in torch.nonzero(rough < NEAR + 1e-3).tolist():
                i += first
                if bases[i] == bases[j] or j in near[i]:
                    continue
                if (x[i] - (x[j].flip(2) if mirrored else x[j])).abs().mean() < NEAR:
                    near[i].add(j)
                    near[j].add(i)
    return [sorted(some) for some in near]


def main(packages: tuple[Path, ...], to: Path = Path("nextscale/data")) -> None:
    """Make the drawings; see the head of the file.

    Args:
        packages: archives of the packages
        to: folder to write to
    """
    opened: dict[str, dict[str, Any]] = {}
    for package in packages:
        files = read(package)
        about = files["package.json"]
        name = next((name for name, known in PACKAGES.items() if known == about["name"]), None)
        if name is None or (about["version"], about["license"]) != (SETS[name].version, SETS[name].licence):
            raise ValueError(f"{package}: {about['name']} {about['version']}, {about['license']} is none of {SETS}")
        opened[name] = files
    if missing := PACKAGES.keys() - opened:
        raise ValueError(f"the packages of {', '.join(sorted(missing))} are missing")
    opened = {name: opened[name] for name in PACKAGES}

    lines, bodies = [], []
    for name, drawings in coded(opened).items():
        icons = opened[name]["icons.json"]
        for hexcode, icon in drawings:
            drawn = icons["icons"][icon]
            box = [drawn.get(side, icons.get(side, usual)) for side, usual in (("width", 16), ("height", 16))]
            body = drawn["body"]
            if re.search('[\n\r\t]|<script|<image|<text|<foreignObject|href="[^#]', body):
                raise ValueError(f"{name} {icon} is more than shapes")
            lines.append([name, hexcode, "{} {}".format(*box)])
            bodies.append(body)
        print(f"{name}: {len(drawings)} of {len(icons['icons'])} drawings")

    rows = table()
    base = {row.hexcode: row.base for row in rows}
    own = openmoji(SIZE, validation=0.0).train
    svgs = [svg_of(body, box) for body, (_, _, box) in zip(bodies, lines, strict=True)]
    images = torch.cat([own.images, render_all(svgs, SIZE, "all other sets", progress=True)])
    keys = [f"openmoji/{row.hexcode}" for row in own.rows] + [f"{name}/{hexcode}" for name, hexcode, _ in lines]
    near = near_drawings(images, [base[key.partition("/")[2]] for key in keys])
    index = ["set\thexcode\tbox\tnear"]
    for line, others in zip(lines, near[len(own) :], strict=True):
        index.append("\t".join([*line, " ".join(keys[j] for j in others)]))

    # No time and no name in the archives: the same input gives the same bytes.
    packed = gzip.compress(("\n".join(index) + "\n").encode("ascii"), 9, mtime=0)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 2**26}]
    drawings_packed = lzma.compress(("\n".join(bodies) + "\n").encode("utf-8"), filters=filters)
    for name, content in (("emoji_sets.tsv.gz", packed), ("emoji_sets.xz", drawings_packed)):
        with atomic_write(to / name) as temporary:
            temporary.write_bytes(content)
        print(f"{to / name}: {len(content):,} bytes")
    pairs = sum(map(len, near)) // 2
    print(f"{len(bodies)} drawings; {pairs} pairs of different bases look the same at {SIZE} px")


if __name__ == "__main__":
    tyro.cli(main, config=(tyro.conf.PositionalRequiredArgs,))
