"""A folder of image files as a dataset: one class for each subfolder."""

import hashlib
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nextscale.data.check import Broken, sound
from nextscale.data.dataset import ImageDataset
from nextscale.data.images import Size, examine_image, height_width, read_image_file, readable_extensions, to_float
from nextscale.data.openmoji import split_position


class FolderDataset(ImageDataset):
    """Image files, decoded when asked for.

    An item is a dict: `image` float [C, H, W] in [-1, 1], `label` (class number), `labels` ((label,)), `caption` (the
    file's name without its ending), `path`, `mirror_ok` True (folders of digits or letters should be trained with
    mirroring off). Attributes: `paths`, `numbers` (class numbers), `classes`, `size` (H, W), `channels`.
    """

    def __init__(
        self,
        paths: list[Path],
        numbers: list[int],
        classes: tuple[str, ...],
        size: Size,
        channels: int = 3,
        whole: bool = False,
    ) -> None:
        if len(paths) != len(numbers):
            raise ValueError(f"expected one class number for each file, got {len(paths)} files, {len(numbers)} numbers")
        self.paths = paths
        self.numbers = numbers
        self.classes = classes
        super().__init__(size, channels, whole)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} images")
        image = to_float(read_image_file(self.paths[index], self.size, self.channels, whole=self.whole))
        return {"image": image, **self.said(index)}

    def said(self, index: int) -> dict[str, Any]:
        path, label = self.paths[index], self.numbers[index]
        return {
            "label": label,
            "labels": (label,),
            "caption": path.stem,
            "path": str(path),
            "mirror_ok": True,
        }

    @cached_property
    def images(self) -> Tensor:
        """All images as uint8 [N, C, H, W], read on first use and kept: 12 kB for each colour image of 64 x 64; cropped."""
        images = torch.empty(len(self), self.channels, *self.size, dtype=torch.uint8)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            reading = pool.map(lambda path: read_image_file(path, self.size, self.channels), self.paths)
            for i, image in enumerate(reading):
                images[i] = image
        return images


@dataclass(frozen=True, eq=False)
class ImageFolder:
    """A folder at one size, split by file content. `classes`: the names of the subfolders, sorted."""

    train: FolderDataset
    val: FolderDataset
    classes: tuple[str, ...]
    size: Size


def image_folder(
    path: str | os.PathLike[str],
    size: Size = 64,
    *,
    channels: int = 3,
    whole: bool = False,
    broken: Broken = "skip",
    validation: float = 0.0,
    progress: bool = True,
) -> ImageFolder:
    """Find the images below `path`, decode each once to see that it is whole, and split them.

    The class of an image is the subfolder of `path` that it is in, at any depth; a folder that holds images and no
    subfolders with images is one class with the folder's name. Hidden files are left out.
    `channels`: 3, colours on white; 1, greys on white; 4, colours and opacity. `whole`: images are not cropped, so as large as
    they must be to cover `size`. Images that are smaller are enlarged, with a warning. `broken`: "skip" leaves damaged files
    out with a warning, "refuse" raises ValueError with their names. `validation`: share held out, in [0, 1), by content, so
    that copies of a file are never on both sides.
    Raises FileNotFoundError if there is no such folder, ValueError if it has no readable image.
    """
    root = Path(path)
    height_width(size)
    if not 0 <= validation < 1:
        raise ValueError(f"validation: expected a share in [0, 1), got {validation!r}; 0.1 holds out a tenth")
    if not root.exists():
        raise FileNotFoundError(f"no such folder: {root} (relative paths start from {Path.cwd()})")
    if not root.is_dir():
        raise ValueError(f"expected a folder of images, got the file {root}; for single files use read_images")

    found, classes = _find(root)
    kept = sound(found, lambda one: examine_image(one[0], str(one[0])), str(root), size, broken, progress)
    empty = sorted(set(range(len(classes))) - {number for _, number in kept})
    if empty:
        names = ", ".join(classes[number] for number in empty[:10])
        warnings.warn(
            f"{len(empty)} of {len(classes)} class folders in {root} have no readable image: {names}; "
            "they stay classes, but nothing can be learned about them",
            stacklevel=2,
        )
    held_out = [validation > 0 and _position(file) < validation for file, _ in kept]
    train, val = (
        FolderDataset(
            [file for (file, _), held in zip(kept, held_out, strict=True) if held == side],
            [number for (_, number), held in zip(kept, held_out, strict=True) if held == side],
            classes,
            size,
            channels,
            whole,
        )
        for side in (False, True)
    )
    if not len(train):
        raise ValueError(
            f"{root}: validation={validation} holds out all {len(kept)} images; add images or lower the share"
        )
    return ImageFolder(train, val, classes, size)


def _find(root: Path) -> tuple[list[tuple[Path, int]], tuple[str, ...]]:
    """Image files with their class numbers, sorted by path, and the names of the classes."""
    endings = readable_extensions()

    def is_image(file: Path) -> bool:
        return file.suffix.lower() in endings and not file.name.startswith(".") and file.is_file()

    children = sorted(root.iterdir())
    folders = [child for child in children if child.is_dir() and not child.name.startswith(".")]
    direct = [child for child in children if is_image(child)]
    found = []
    for number, folder in enumerate(folders):
        files = []
        for parent, names, leaves in os.walk(folder):
            names[:] = [name for name in names if not name.startswith(".")]
            files += [file for leaf in leaves if is_image(file := Path(parent, leaf))]
        found += [(file, number) for file in sorted(files)]
    if found:
        if direct:
            warnings.warn(
                f"{len(direct)} images directly in {root} are left out, for its subfolders are the classes; "
                "move them into one to use them",
                stacklevel=3,
            )
        return found, tuple(folder.name for folder in folders)
    if direct:
        return [(file, 0) for file in direct], (root.resolve().name,)
    raise ValueError(
        f"{root}: expected images (.png, .jpg, .webp, ...) in subfolders, one for each class, or directly in it; got "
        f"{len(children)} entries and no image; check the path"
    )


def _position(file: Path) -> float:
    return split_position(hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest())
