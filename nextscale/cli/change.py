"""`nextscale inpaint`, `outpaint` and `edit`: a part of an image anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

import nextscale as ns
from nextscale.cli.draw import LABELS, PROMPT, STYLES, Label, caption, generate, read_labels, read_styles
from nextscale.cli.options import Flat, Loading, Picking, at_least_one, check_device, check_images, check_pictures

BoxText = Annotated[str, tyro.conf.arg(metavar="Y0,X0,Y1,X1", help_behavior_hint="(this or --mask)")]


@dataclass(frozen=True, kw_only=True)
class Inpainting:
    """What the user says of a change."""

    image: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE", help_behavior_hint="")]
    """image file"""
    labels: Annotated[tuple[str, ...], LABELS, tyro.conf.arg(help_behavior_hint="(default: no class)")] = ()
    """names or numbers of classes with commas between, or none; a row of the picture for each"""
    prompt: Annotated[tuple[str, ...], PROMPT] = ()
    """descriptions in words instead of labels, for systems that read them; a row of the picture for each"""
    style: Annotated[str, STYLES] = ""
    """for systems that are told one: its name, or any; of several with commas between, each makes rows"""
    box: BoxText = ""
    """the part to generate: top, left, bottom, right as fractions of the image"""
    mask: Annotated[Path | None, tyro.conf.arg(help_behavior_hint="(this or --box)")] = None
    """image file instead of a box, white (and not transparent) where to generate; fitted as IMAGE is"""
    count: int = 4
    """results for each label"""
    out: Path = Path("inpainted.png")
    """picture to write; the extension says the format"""
    picking: Annotated[Picking, Flat] = field(default_factory=Picking)
    loading: Annotated[Loading, Flat] = field(default_factory=Loading)


@dataclass(frozen=True, kw_only=True)
class Outpainting(Inpainting):
    """A change around a part."""

    box: BoxText = ""
    """the part to keep: top, left, bottom, right as fractions of the image"""
    out: Path = Path("outpainted.png")
    """picture to write; the extension says the format"""


@dataclass(frozen=True, kw_only=True)
class Editing(Inpainting):
    """A change to given classes."""

    labels: Annotated[tuple[str, ...], LABELS, tyro.conf.arg(help_behavior_hint="(this or --prompt)")] = ()
    """names or numbers of the target classes with commas between; a row of the picture for each"""
    out: Path = Path("edited.png")
    """picture to write; the extension says the format"""


def inpaint(change: Annotated[Inpainting, Flat]) -> None:
    """Generate a part of an image anew and keep the rest.

    Try: nextscale inpaint dog.png --box 0.25,0.25,0.75,0.75 --out inpainted.png

    The picture shows the image, the part to generate (grey), what the tokens of the image give, and the results. What
    is kept looks as its tokens do. The last line is the picture's path.
    """
    print(_apply(change))


def outpaint(change: Annotated[Outpainting, Flat]) -> None:
    """Keep a part of an image and generate all around it.

    Try: nextscale outpaint dog.png --box 0.25,0.25,0.75,0.75 --out outpainted.png

    The picture is that of `nextscale inpaint`. The last line is its path.
    """
    print(_apply(change, inside=False))


def edit(change: Annotated[Editing, Flat]) -> None:
    """Put something of a given class into a part of an image.

    Try: nextscale edit dog.png --labels flags --box 0.1,0.1,0.9,0.9 --out edited.png

    The picture is that of `nextscale inpaint`. The last line is its path.
    """
    if not "".join(change.labels).strip() and not change.prompt:
        raise ValueError(
            "edit needs the target classes as --labels, or --prompt; `nextscale inpaint` fills without a class"
        )
    print(_apply(change))


def _apply(change: Inpainting, *, inside: bool = True) -> Path:
    """Write a row for each label: the image, what will be generated, the reconstruction, the results.

    `inside`: the box is the part to generate, not the part to keep. A mask is always white where to generate.
    """
    import torch

    from nextscale.data.images import check_grid, read_image_file, save_images
    from nextscale.pixels import white
    from nextscale.sampling.edit import generated_tokens, keep_masks

    count, picking = change.count, change.picking
    at_least_one(count=count)
    picking.check()
    check_pictures(change.out, inputs=[change.image, *([change.mask] if change.mask else [])])
    check_device(change.loading.device)
    where = _marked(change.box, change.mask)

    loading = change.loading.told(change.prompt)
    system = loading.load()
    system.need_model()
    told = change.prompt or "".join(change.labels).strip()
    labels: list[Label] = read_labels(system, change.labels, change.prompt, name=loading.name) if told else [None]
    wanted = [(label, style) for style in read_styles(system, change.style) for label in labels]
    options, how = picking.resolve(system)
    check_images(len(wanted) * (count + 3))
    rows, styles = zip(*[one for one in wanted for _ in range(count)], strict=True)
    check_grid(change.out, len(rows) + 3 * len(wanted), system.image_size, 3 + count)
    source = ns.read_images(change.image, system.image_size, system.tokenizer.channels)
    if isinstance(where, Path):
        pixels = read_image_file(where, system.image_size, channels=4)
        _check_shape(where, change.image)
        marked = generated_tokens(system, 1, white(pixels))
    else:
        marked = generated_tokens(system, 1, box=box_in_crop(where, change.image, system.image_size), inside=inside)
    if not marked.any():
        raise ValueError(
            f"--{'mask' if change.mask else 'box'} marks nothing to generate in the part of {change.image} that is used, which "
            "is its middle in the shape of the system's images; mark more of it"
        )
    tokens = ns.encode(system, source)
    kept = ns.keep_tokens(tokens, keep_masks(~marked, system.schedule))  # one row, for all images
    results = generate(system, rows, picking.seed, options, styles=styles, edit=kept)[-1].images

    stride: Any = system.tokenizer.stride
    grey = marked.cpu()[:, None].repeat_interleave(stride, 2).repeat_interleave(stride, 3)  # [1, 1, H, W]
    first = torch.cat([source, torch.where(grey, source * 0.2, source), ns.decode(system, tokens).cpu()])
    tiles = [tile for some in results.split(count) for tile in (first, some)]
    captions = [
        text
        for label, style in wanted
        for text in ("source", "to generate", "reconstruction", *[caption(system, label, style)] * count)
    ]
    title = f"{loading.title(system)}, {change.image.name}, seed {picking.seed}, {how}"
    return save_images(torch.cat(tiles), change.out, columns=3 + count, labels=captions, title=title)


def box_in_crop(box: Sequence[float], image: Path, size: tuple[int, int]) -> tuple[float, ...]:
    """A box in fractions of an image file, in fractions of the part of it that is used: its middle in the shape of `size`."""
    from nextscale.data.images import picture_size

    (height, width), (h, w) = picture_size(image), size
    used = min(height, width * h / w) / height, min(width, height * w / h) / width  # shares of both sides
    inner = [(edge - (1 - used[i % 2]) / 2) / used[i % 2] for i, edge in enumerate(box)]
    y0, x0, y1, x1 = (min(1.0, max(0.0, edge)) for edge in inner)
    if y0 >= y1 or x0 >= x1:
        raise ValueError(
            f"--box lies outside of the part of {image} that is used: of its {height}x{width} pixels the middle "
            f"{used[0] * height:.0f}x{used[1] * width:.0f}"
        )
    return y0, x0, y1, x1


def _check_shape(mask: Path, image: Path) -> None:
    """Refuse a mask of another shape than its image: nobody knows where in the image its marks are."""
    from nextscale.data.images import picture_size

    (h, w), (height, width) = picture_size(mask), picture_size(image)
    if abs(w * height - h * width) > max(h, w, height, width):  # but for rounded sides
        raise ValueError(
            f"--mask {mask} is of {h}x{w} pixels and {image} of {height}x{width}, two shapes; draw the mask on the image"
        )


def _marked(box: str, mask: Path | None) -> tuple[float, ...] | Path:
    """The box, or the path of the mask, that the user gave."""
    from nextscale.sampling.edit import check_box

    if bool(box) == bool(mask):
        raise ValueError(f"give either --box Y0,X0,Y1,X1 or --mask FILE, got {'both' if mask else 'neither'}")
    if mask:
        return mask
    try:
        numbers = [float(word) for word in box.split(",")]
    except ValueError:
        raise ValueError(f"--box needs four numbers with commas between, got {box!r}; try 0,0,0.5,1") from None
    return check_box(numbers)
