"""Make a folder of images of a wanted count out of icon sets, to see what training needs at 100, 1,000 and 10,000 images.

    npm pack @iconify-json/twemoji @iconify-json/noto @iconify-json/fluent-emoji-flat   # CC BY 4.0, Apache 2.0, MIT
    python benchmarks/icon_images.py 1000 photos iconify-json-*.tgz

None of these drawings is among those that the shipped systems were trained on.
"""

import hashlib
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import resvg_py
import tyro

PIXELS = 96


def drawings(package: Path) -> Iterator[tuple[str, str, str]]:
    """(category, name, SVG) of each icon that has a category."""
    with tarfile.open(package) as tar:
        icons, metadata = (json.load(tar.extractfile(f"package/{name}.json")) for name in ("icons", "metadata"))
    width, height = icons.get("width", 16), icons.get("height", 16)
    for category, names in sorted(metadata["categories"].items()):
        for name in names:
            icon = icons["icons"].get(name)
            if icon is None:
                continue
            box = f"{icon.get('left', 0)} {icon.get('top', 0)} {icon.get('width', width)} {icon.get('height', height)}"
            yield (
                category,
                f"{icons['prefix']}-{name}",
                f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box}">'
                f"{icon['body']}</svg>",
            )


def order(drawing: tuple[str, str, str]) -> tuple[bool, bytes]:
    """Drawings that differ in the colour of skin alone come last; beyond that, names' hashes choose from all alike."""
    name = drawing[1]
    return bool(re.search(r"-(light|medium|dark)\b", name)), hashlib.sha256(name.encode()).digest()


def main(count: int, out: Path, packages: tuple[Path, ...]) -> None:
    """Make the folder; see the head of the file.

    Args:
        count: images
        out: the folder: one folder a category
        packages: packages of icon sets, as npm keeps them (.tgz)
    """
    found = [drawing for package in packages for drawing in drawings(package)]
    chosen = sorted(found, key=order)[:count]
    if len(chosen) < count:
        raise SystemExit(f"the packages hold {len(found)} drawings, fewer than {count}")
    for category, name, svg in chosen:
        folder = out / category.lower().replace(" & ", "-").replace(" ", "-")
        folder.mkdir(parents=True, exist_ok=True)
        png = resvg_py.svg_to_bytes(svg_string=svg, background="#ffffff", width=PIXELS, height=PIXELS)
        (folder / f"{name}.png").write_bytes(bytes(png))
    print(f"{len(chosen)} images in {out}")


if __name__ == "__main__":
    tyro.cli(main, config=(tyro.conf.PositionalRequiredArgs,))
