"""A folder of image files as a dataset: one class for each subfolder; or a folder of two such, for training and validation."""

import hashlib
import io
import os
import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nextscale.data.captions import TABLES, captions_of
from nextscale.data.check import Broken, sound
from nextscale.data.dataset import ImageDataset
from nextscale.data.emoji import split_position
from nextscale.data.images import (
    Seen,
    Size,
    check_share,
    examine_image,
    height_width,
    read_image_file,
    readable_extensions,
)
from nextscale.data.left_out import LeftOut
from nextscale.files import as_path, brief_path
from nextscale.pixels import to_float


class FolderDataset(ImageDataset):
    """Image files, decoded when asked for.

    An item is a dict: `image` float [C, H, W] in [-1, 1], `label` (class number), `labels` ((label,)), `caption`, `path`,
    `mirror_ok` True (folders of digits or letters should be trained with mirroring off). Attributes: `paths`, `numbers` (class
    numbers), `classes`, `captions` (default: the files' names), `stamps` (a hash of each file's content, which tells other
    data from the same), `size` (H, W), `channels`.
    """

    def __init__(
        self,
        paths: list[Path],
        numbers: list[int],
        classes: tuple[str, ...],
        size: Size,
        channels: int = 3,
        whole: bool = False,
        captions: list[str] | None = None,
        stamps: list[str] | None = None,
    ) -> None:
        if len(paths) != len(numbers):
            raise ValueError(f"expected one class number for each file, got {len(paths)} files, {len(numbers)} numbers")
        self.paths = paths
        self.numbers = numbers
        self.classes = classes
        self.captions = [path.stem for path in paths] if captions is None else captions
        self.stamps = stamps
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
            "caption": self.captions[index],
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
    """A folder at one size, split by file content. `classes`: the names of the subfolders, sorted; numbers as numbers.

    `left_out`: files that are not used, and why. `captions_from`: where captions are from.
    """

    train: FolderDataset
    val: FolderDataset
    classes: tuple[str, ...]
    size: Size
    left_out: LeftOut = field(default_factory=LeftOut)
    captions_from: str = ""


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

    The class of an image is the subfolder of `path` that it is in, at any depth, linked ones too; a folder of images without
    subfolders that hold some is one class with the folder's name. If all subfolders are called `train`, `val` (`valid`,
    `validation`) or `test`, each is such a folder, and they are the split. Captions: see `captions_of`. What is not used is
    counted in `left_out`, with a warning; of hidden files, and of those in `__MACOSX`, only what is called an image.
    `channels`: 3, colours on white; 1, greys on white; 4, colours and opacity. `whole`: images are not cropped, so as large as
    they must be to cover `size`. Images that are smaller are enlarged, with a warning. `broken`: "skip" leaves damaged files
    out with a warning, "refuse" raises ValueError with their names. `validation`: share held out, in [0, 1), by content, so
    that copies of a file are never on both sides.
    Raises FileNotFoundError if there is no such folder, ValueError if it has no readable image.
    """
    root = as_path(path, "a folder of images")
    height_width(size)
    check_share(validation)
    if not root.exists():
        raise FileNotFoundError(f"no such folder: {brief_path(root)} (relative paths start from {Path.cwd()})")
    if not root.is_dir():
        raise ValueError(f"expected a folder of images, got the file {root}; for single files use read_images")

    left_out = LeftOut()
    splits = _splits(root, left_out)
    found, classes = _find(splits.get("train", root), left_out)
    captions, captions_from = captions_of([file for file, _ in found], root)
    stamps: dict[Path, str] = {}

    def examine(one: tuple[Path, int]) -> Seen:
        content = one[0].read_bytes()
        stamps[one[0]] = hashlib.blake2b(content, digest_size=16).hexdigest()
        return examine_image(io.BytesIO(content), str(one[0]))

    def look(files: list[tuple[Path, int]]) -> list[tuple[Path, int]]:
        return sound(files, examine, str(root), size, broken, progress, left_out, lambda one: str(one[0]))

    caption_of = {file: caption for (file, _), caption in zip(found, captions, strict=True)}
    kept = look(found)
    empty = sorted(set(range(len(classes))) - {number for _, number in kept})
    if empty:
        names = ", ".join(classes[number] for number in empty[:10])
        warnings.warn(
            f"{len(empty)} of {len(classes)} class folders in {root} have no readable image: {names}; "
            "they stay classes, but nothing can be learned about them",
            stacklevel=2,
        )
    if "val" in splits:
        judged, known = _find(splits["val"], left_out), {name: number for number, name in enumerate(classes)}
        one_class = len(classes) == len(judged[1]) == 1 and classes[0] == splits["train"].name
        held = []
        for file, number in judged[0]:
            name = classes[0] if one_class else judged[1][number]
            if name in known:
                held.append((file, known[name]))
            else:
                left_out.add("of classes that only the validation split has", str(file))
        if not held:
            raise ValueError(f"{splits['val']} has no image of a class that {splits['train']} has; name both alike")
        texts, _ = captions_of([file for file, _ in held], root)
        caption_of |= {file: caption for (file, _), caption in zip(held, texts, strict=True)}
        parts = [kept, look(held)]
    else:
        positions = {file: split_position(stamps[file]) if validation else 1.0 for file, _ in kept}
        parts = [[one for one in kept if (positions[one[0]] < validation) == side] for side in (False, True)]
    if not parts[0]:
        raise ValueError(
            f"{root}: validation={validation} holds out all {len(kept)} images; add images or lower the share"
        )
    train, val = (
        FolderDataset(
            [file for file, _ in part],
            [number for _, number in part],
            classes,
            size,
            channels,
            whole,
            [caption_of[file] for file, _ in part],
            [stamps[file] for file, _ in part],
        )
        for part in parts
    )
    if unsaid := sum(not caption for caption in captions):
        warnings.warn(
            f"{unsaid} of {len(captions)} images in {root} have no caption; nothing is said of them", stacklevel=2
        )
    left_out.warn(str(root))
    return ImageFolder(train, val, classes, size, left_out, captions_from)


SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
IGNORED = ("__MACOSX", "Thumbs.db", "desktop.ini")  # what systems leave behind


def hidden(name: str) -> bool:
    """Whether a file is none of the user's images: hidden, or left behind by a system."""
    return name.startswith(".") or name in IGNORED


def _count_hidden(folder: Path, root: Path, endings: frozenset[str], left_out: LeftOut) -> None:
    """Count what is called an image in a folder that is not read."""
    for parent, _, leaves in os.walk(folder):
        for file in (Path(parent, leaf) for leaf in leaves):
            if file.suffix.lower() in endings:
                left_out.add_hidden(str(file.relative_to(root)))


def _folders(root: Path) -> list[Path]:
    """The subfolders that may be classes, in the order of the classes: by name, names that are all numbers by number."""
    folders = [child for child in sorted(root.iterdir()) if child.is_dir() and not hidden(child.name)]
    for folder in folders:
        check_utf8(folder)
    numbers = all(re.fullmatch(r"[0-9]{1,18}", folder.name) for folder in folders)
    return sorted(folders, key=lambda folder: (int(folder.name), folder.name)) if numbers else folders


def check_utf8(path: Path) -> None:
    """Raise ValueError for a name that no text file can hold: found now, and not when the run's files are written."""
    try:
        path.name.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"the name of {brief_path(path)} is not UTF-8; rename it") from None


def _splits(root: Path, left_out: LeftOut) -> dict[str, Path]:
    """The folders of training and validation, if all subfolders are such; else none."""
    folders = _folders(root)
    kinds = {folder: SPLITS.get(folder.name.lower()) for folder in folders}
    if not folders or None in kinds.values():
        return {}
    if "train" not in kinds.values():
        names = ", ".join(folder.name for folder in folders)
        raise ValueError(f"{root} has {names} but no folder train; add it, or name the folder of the images itself")
    if len(set(kinds.values())) < len(kinds):
        names = ", ".join(folder.name for folder in folders)
        raise ValueError(f"{root} has several folders for one split ({names}); keep one of each kind")
    splits = {str(kind): folder for folder, kind in kinds.items()}
    if "test" in splits and "val" not in splits:
        splits["val"] = splits.pop("test")
    elif "test" in splits:
        count = sum(1 for _, _, files in os.walk(splits["test"]) for name in files if not hidden(name))
        left_out.total += count
        left_out.add("in the test split", str(splits.pop("test")), count)
    return splits


def _find(root: Path, left_out: LeftOut) -> tuple[list[tuple[Path, int]], tuple[str, ...]]:
    """Image files with their class numbers, sorted by path, and the names of the classes."""
    endings = readable_extensions()

    def is_image(file: Path) -> bool:
        """Whether it is one; what is not is counted, but for what says something of images."""
        if hidden(file.name):
            if file.suffix.lower() in endings:
                left_out.add_hidden(str(file.relative_to(root)))
            return False
        if file.name in TABLES:
            return False
        if file.suffix.lower() == ".txt" and any(
            file.with_suffix(end).is_file() for end in (".png", ".jpg", ".jpeg", ".webp")
        ):
            return False
        left_out.total += 1
        if not file.is_file():
            left_out.add("that are no files, or links to nothing", str(file.relative_to(root)))
        elif file.suffix.lower() not in endings:
            left_out.add(
                f"in a format that is not read, {file.suffix.lower() or 'without an ending'}",
                str(file.relative_to(root)),
            )
        else:
            return True
        return False

    folders = _folders(root)
    for child in sorted(root.iterdir()):
        if child.is_dir() and hidden(child.name):
            _count_hidden(child, root, endings, left_out)
    direct = [child for child in sorted(root.iterdir()) if not child.is_dir() and is_image(child)]
    found = []
    for number, folder in enumerate(folders):
        files, seen = [], {os.path.realpath(root)}
        for parent, names, leaves in os.walk(folder, followlinks=True):
            place = os.path.realpath(parent)
            if place in seen:  # a link that leads back
                names[:] = []
                continue
            seen.add(place)
            for name in filter(hidden, names):
                _count_hidden(Path(parent, name), root, endings, left_out)
            names[:] = sorted(name for name in names if not hidden(name))
            files += [file for leaf in leaves if is_image(file := Path(parent, leaf))]
        found += [(file, number) for file in sorted(files)]
    if found:
        for file in direct:
            left_out.add("beside the folders of the classes", file.name)
        return found, tuple(folder.name for folder in folders)
    if direct:
        return [(file, 0) for file in direct], (root.resolve().name,)
    said = f" ({left_out.summary()})" if left_out else ""
    raise ValueError(
        f"{root}: expected images (.png, .jpg, .webp, ...) in subfolders, one for each class, or directly in it; got "
        f"{sum(1 for _ in root.iterdir())} entries and no image{said}; check the path"
    )
