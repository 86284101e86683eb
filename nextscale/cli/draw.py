"""`nextscale sample`, `demo` and `reconstruct`: images of a system as labelled pictures."""

from __future__ import annotations

import csv
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

import nextscale as ns
from nextscale.cli.options import (
    SHIPPED,
    Flat,
    Loading,
    Picking,
    at_least_one,
    check_device,
    check_images,
    check_pictures,
)
from nextscale.settings import STYLE, brief

if TYPE_CHECKING:
    from torch import Tensor

    from nextscale.contracts import Edit
    from nextscale.system import System

BATCH = 64  # images sampled at once; an image does not depend on its batch
DEMO_COUNT, DEMO_SCALES = 4, 8
# What the emoji system draws, its best and its worst; of other systems the demo shows the first dozen classes.
DEMO_LABELS = (
    *("face-smiling", "face-affection", "cat-face", "heart", "person", "food-fruit"),
    *("time", "country-flag", "keycap", "sky-weather", "geometric", "animal-bird"),
)

# As many words as there are prompts: each is one argument.
PROMPT = tyro.conf.arg(metavar="TEXT [TEXT ...]", help_behavior_hint="(default: none)")
# Each word is a label or several with commas between; the option may be repeated.
LABELS = tyro.conf.arg(metavar="NAME,NAME")
STYLES = tyro.conf.arg(metavar="NAME,NAME", help_behavior_hint="(default: any)")
ANY = "any"  # says nothing of the style
Label = str | int | None  # the name or number of a class, or none


def sample(
    labels: Annotated[tuple[str, ...], LABELS, tyro.conf.arg(help_behavior_hint="(default: the first 8 classes)")] = (),
    prompt: Annotated[tuple[str, ...], PROMPT] = (),
    style: Annotated[str, STYLES] = "",
    count: int = 8,
    preset: Annotated[str, tyro.conf.arg(help_behavior_hint="(default: none)")] = "",
    out: Path = Path("grid.png"),
    scales: Path | None = None,
    progress: Path | None = None,
    gif: Path | None = None,
    columns: Annotated[int | None, tyro.conf.arg(help_behavior_hint="(default: --count, up to 16)")] = None,
    picking: Annotated[Picking, Flat] = Picking(),
    loading: Annotated[Loading, Flat] = Loading(),
) -> None:
    """Generate images of given labels, or of prompts, into one labelled picture.

    Try: nextscale sample --labels "animals-nature,food-drink" --seed 7 --scales scales.png
    Or: nextscale sample --prompt "a red apple" "a smiling cat" --style noto,twemoji

    The same command draws the same picture; image i draws from seed + i. The last line is the picture's path.

    Args:
        labels: names or numbers of classes with commas between (a name with a comma in quotes, or as a word of its own), or
            none; `nextscale info SYSTEM` lists them
        prompt: descriptions in words instead of labels, for systems that read them
        style: for systems that are told one: its name, or any; of several with commas between, each makes a row
        count: images for each label or prompt
        preset: sampling settings by name, which other options change; of VAR's: paper-256 and paper-512 (the published
            scores), demo, better (smooth, strong guidance), editing
        out: picture to write; the extension says the format. A name without one is a folder of single images as they are,
            and .npz an array of them, for scores
        scales: also write the same images scale by scale into this picture
        progress: also write the picture after each scale into this folder, 00.png, 01.png, ...
        gif: also write these pictures as an animation, .gif or .webp
        columns: images in a row
    """
    from nextscale.data.images import check_grid, image_format, save_animation, save_images, writes_singles

    at_least_one(count=count, columns=columns)
    picking.check()
    check_pictures(*[path for path in (scales, gif) if path], *_frames(progress, 1), out=out)
    if gif and image_format(gif) not in ("GIF", "WEBP"):
        raise ValueError(f"--gif writes .gif or .webp, got {gif}")
    check_device(loading.device)

    loading = loading.told(prompt)
    system = loading.load()
    said, styles = read_labels(system, labels, prompt, name=loading.name), read_styles(system, style)
    check_images(len(said) * count * len(styles), out)
    rows = [label for _ in styles for label in said for _ in range(count)]
    styled = [one for one in styles for _ in range(len(said) * count)]
    columns = columns or (_columns(count, len(rows)) if len(styles) == 1 else len(said) * count)
    check_grid(out, len(rows), system.image_size, columns)
    if scales:
        check_grid(scales, len(rows) * len(system.schedule), system.image_size, len(system.schedule))
    options, how = picking.resolve(system, preset)
    singles = writes_singles(out)
    every = any(path is not None for path in (scales, progress, gif))
    for path in (gif, *_frames(progress, 1)):
        if path:
            check_grid(path, len(rows), system.image_size, columns)
    frames = generate(system, rows, picking.seed, options, styles=styled, every_scale=every, as_bytes=singles)
    captions = [caption(system, label, one) for label, one in zip(rows, styled, strict=True)]
    title = f"{loading.title(system)}, seed {picking.seed}, {how}"
    if scales:
        print(_save_scales(frames, captions, scales, title))
    looks: dict[str, Any] = {"columns": columns, "labels": captions, "title": title}
    for frame, path in zip(frames, _frames(progress, len(frames)), strict=False):
        print(save_images(frame.images, path, **looks))
    if gif:
        print(save_animation([frame.images for frame in frames], gif, **looks))
    print(save_images(frames[-1].images, out, **({} if singles else looks)))


def _frames(folder: Path | None, count: int) -> list[Path]:
    """The pictures after each scale, in a folder if there is to be one."""
    return [folder / f"{k:02}.png" for k in range(count)] if folder else []


def _columns(count: int, total: int) -> int:
    """Images in a row: those of a label, or of many as even rows of about sixteen, or as many as rows in all."""
    if count == 1:
        return math.ceil(math.sqrt(total))
    most = max(16, math.isqrt(total))
    return math.ceil(count / math.ceil(count / most))


def demo(out: Path = Path("out"), loading: Annotated[Loading, Flat] = Loading()) -> None:
    """Draw emoji of a dozen kinds, a row for each style if there are some, and some of them scale by scale.

    Writes OUT/grid.png and OUT/scales.png. The last line is the path of the grid.

    Args:
        out: folder to write to
    """
    from nextscale.data.images import save_images

    grid, scales = out / "grid.png", out / "scales.png"
    check_pictures(grid, scales)
    check_device(loading.device)
    system, picking = loading.load(), Picking()
    known = set(DEMO_LABELS) <= set(system.classes)
    kinds = list(DEMO_LABELS) if known else read_labels(system, most=len(DEMO_LABELS))
    styles: list[str | None] = list(system.readers[STYLE].choices) if STYLE in system.readers else [None]  # type: ignore[arg-type]
    count = DEMO_COUNT if len(styles) == 1 else 1
    labels: list[Label] = [label for _ in styles for label in kinds for _ in range(count)]
    styled = [one for one in styles for _ in range(len(kinds) * count)]
    options, how = picking.resolve(system)
    frames = generate(system, labels, picking.seed, options, styles=styled, every_scale=True)
    captions = [caption(system, label, one) for label, one in zip(labels, styled, strict=True)]
    title = f"{loading.title(system)}, seed {picking.seed}, {how}"
    some = slice(0, count * min(DEMO_SCALES, len(kinds)), count)  # the first image of each label
    firsts = [Frame(frame.name, frame.images[some]) for frame in frames]
    print(_save_scales(firsts, captions[some], scales, title))
    print(
        save_images(
            frames[-1].images, grid, columns=2 * count if count > 1 else len(kinds), labels=captions, title=title
        )
    )


def reconstruct(
    images: Annotated[
        tuple[Path, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="IMAGE [IMAGE ...]", help_behavior_hint="(at least one)"),
    ],
    out: Path = Path("reconstruction.png"),
    loading: Annotated[Loading, Flat] = Loading(),
) -> None:
    """Encode image files to tokens and decode them again, scale by scale.

    Try: nextscale reconstruct dog.png cat.png --out out.png

    Each image makes a row: the original, then what the tokens of the first scale give, of the first two, and so on,
    with the PSNR in dB. Images are resized by the short side and centre-cropped. The last line is the picture's path.

    Args:
        images: image files
        out: picture to write; the extension says the format
    """
    import torch

    from nextscale.data.images import check_grid, save_images
    from nextscale.output import at_size

    if not images:
        raise ValueError("reconstruct needs at least one image file; try `nextscale reconstruct dog.png`")
    check_pictures(out, inputs=images)
    check_device(loading.device)
    system = loading.load()
    columns = 1 + len(system.schedule)
    check_images(len(images) * columns)
    check_grid(out, len(images) * columns, system.image_size, columns)
    originals = ns.read_images(images, system.image_size, system.tokenizer.channels)
    tokens = ns.encode(system, originals)
    steps = [at_size(ns.decode(system, tokens[: k + 1]).cpu(), system.image_size) for k in range(len(tokens))]
    scores = torch.stack([ns.psnr(step, originals) for step in steps], dim=1).tolist()  # [B, K]
    labels = []
    for path, row in zip(images, scores, strict=True):
        marks = zip(map(scale_name, system.schedule.sizes), row, strict=True)
        labels += [path.name, *(f"{name} {score:.1f} dB" for name, score in marks)]
        print(f"{path}  {row[-1]:.2f} dB")
    tiles = torch.stack([originals, *steps], dim=1).flatten(0, 1)
    print(save_images(tiles, out, columns=columns, labels=labels))


# ---- what drawing is made of -----------------------------------------------------------------------------------------


def read_labels(
    system: System, words: Sequence[str] = (), prompt: Sequence[str] = (), *, most: int = 8, name: str = ""
) -> list[Label]:
    """What the user wrote as labels or prompts that the system takes; nothing means the first `most` classes.

    A word is the name of a class, or names and numbers with commas between, those with a comma in quotes. `name`: of the
    system, for messages.
    """
    system.need_model()
    said, reader = next(iter(system.readers.items()))
    reads_texts = said in system.texts
    text = " ".join(words)
    if reads_texts != bool(prompt) or (prompt and text.strip()):
        takes, other = ("--prompt", "--labels") if reads_texts else ("--labels", "--prompt")
        raise ValueError(f"this system is told what to draw by {takes}, not by {other}; `nextscale list` names others")
    if prompt:
        if not all(one.strip() for one in prompt):
            warnings.warn("an empty prompt says nothing of the image; leave it out, or say what to draw", stacklevel=2)
        return list(prompt)
    if not text.strip():
        return list(reader.choices[:most])
    labels = [label for word in words for label in _labels(system, reader, word)]
    if not labels:
        raise ValueError(f"--labels needs names or numbers with commas between, got {brief(text)}")
    try:
        reader.check(labels)
    except ValueError as error:
        raise ValueError(str(error).replace("info SYSTEM", f"info {name or SHIPPED}")) from None
    return labels


def _labels(system: System, reader: Any, word: str) -> list[Label]:
    """The labels in a word: itself, if a class has that name with its commas, or those between its commas."""
    if "," in word:
        with suppress(ValueError):
            reader.check([word.strip()])
            return [word.strip()]
    try:
        (parts,) = csv.reader([word], skipinitialspace=True, strict=True)
    except (csv.Error, ValueError):
        raise ValueError(
            f"--labels: expected a list like 'one,\"two, with a comma\"', got {brief(word)}, whose quotes do not close"
        ) from None
    return [_label(system, part.strip()) for part in parts if part.strip()]


def _label(system: System, word: str) -> Label:
    whole = re.fullmatch(r"-?[0-9]{1,18}", word)
    if word in system.classes:  # a class may be called "7" or "none"
        if whole and system.classes.index(word) != int(word):
            place = system.classes.index(word)
            warnings.warn(f"--labels {word} is the class of that name, whose number is {place}", stacklevel=2)
        return word
    if whole and system.classes and all(name.isdecimal() for name in system.classes):
        shown = ", ".join(system.classes[:5]) + (", ..." if len(system.classes) > 5 else "")
        raise ValueError(f"no class is called {word}; these classes have numbers as names: {shown}")
    if word.lower() == "none":
        return None
    return int(word) if whole else word


def caption(system: System, label: Label, style: str | None = None) -> str:
    """What stands below an image of the label, in the style."""
    if isinstance(label, int):
        words = system.classes[label] if label < len(system.classes) else f"class {label}"
    else:
        words = "no class" if label is None else label
    return words if style is None else f"{words}, {style}"


def read_styles(system: System, text: str) -> list[str | None]:
    """The styles in a word, with commas between; `any` and nothing are none. Raises ValueError for such as the system is not
    told."""
    if not text.strip():
        return [None]
    if STYLE not in system.readers:
        raise ValueError("this system is told no style; leave out --style, or use emoji-64 or emoji-64-text")
    names = [name.strip() for name in text.split(",")]
    styles = [None if name.lower() == ANY else name for name in names]
    system.readers[STYLE].check(styles)
    return styles


@dataclass(frozen=True)
class Frame:
    """What sampling gives after a step."""

    name: str  # of the scale
    images: Tensor  # [B, 3, H, W] on the CPU


def generate(
    system: System,
    labels: Sequence[Label],
    seed: int,
    options: Mapping[str, Any],
    *,
    styles: Sequence[str | None] = (),
    edit: Edit | None = None,
    every_scale: bool = False,
    as_bytes: bool = False,
) -> list[Frame]:
    """Images of `ns.sample` after each step, or after the last one alone, which are few at a time in the making.

    `options`: guidance, pick, and perhaps a schedule. `styles`: one each, where the system is told one. `as_bytes`: uint8
    instead of floats, for very many.
    """
    import torch

    from nextscale.output import at_size
    from nextscale.pixels import to_uint8
    from nextscale.progress import Bar
    from nextscale.sampling.loop import stepper_of

    stepper, schedule = stepper_of(system), options.get("schedule") or system.schedule
    size = system.output.shape(schedule, system.tokenizer.stride)[-2:]
    starts = range(0, len(labels), BATCH)
    batches: list[list[Frame]] = []
    with Bar(total=len(schedule) * len(starts), desc="sampling", unit="scale") as bar:
        for first in starts:
            rows = slice(first, first + BATCH)
            some: Any = labels[rows]
            if STYLE in system.readers and styles:
                some = {next(iter(system.readers)): some, STYLE: styles[rows]}
            state = ns.start(system, some, edit=edit, seed=seed + first, **options)
            frames = []
            while not stepper.done(system, state):
                state = ns.step(system, state)
                if every_scale or stepper.done(system, state):
                    name = scale_name(schedule[max(state.k, 1) - 1])
                    images = at_size(ns.finish(system, state), size)
                    frames.append(Frame(name, (to_uint8(images) if as_bytes else images).cpu()))
                bar.update()
            batches.append(frames)
            bar.total = bar.n + len(schedule) * (len(starts) - len(batches))  # a loop may leave scales out
    # Where a loop needs fewer steps for some images, these stay as they are.
    steps = range(max(map(len, batches)))
    columns = [[frames[min(i, len(frames) - 1)] for frames in batches] for i in steps]
    return [Frame(frames[-1].name, torch.cat([frame.images for frame in frames])) for frames in columns]


def scale_name(size: tuple[int, int]) -> str:
    """What captions call a scale."""
    return f"{size[0]}x{size[1]}"


def _save_scales(frames: Sequence[Frame], captions: Sequence[str], path: Path, title: str) -> Path:
    """Write a row for each image, a column for each scale."""
    import torch

    from nextscale.data.images import save_images

    *names, final = [frame.name for frame in frames]
    labels = [label for text in captions for label in (*names, f"{final} {text}")]
    tiles = torch.stack([frame.images for frame in frames], dim=1).flatten(0, 1)
    return save_images(tiles, path, columns=len(frames), labels=labels, title=title)
