"""`nextscale inpaint`, `outpaint`, `edit` and `vary`: a part of an image anew, or its finer scales."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

import nextscale as ns
from nextscale.cli.draw import LABELS, PROMPT, STYLES, Label, caption, generate, read_labels, read_styles
from nextscale.cli.options import Flat, Loading, Picking, at_least_one, check_device, check_images, check_pictures

if TYPE_CHECKING:
    from torch import Tensor

    from nextscale.sampling.edit import Plan
    from nextscale.system import System

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
    """image file instead of a box, of IMAGE's shape: white (and not transparent) where to generate, or strokes on nothing"""
    fit: Literal["crop", "pad", "stretch"] = "crop"
    """how an image of another shape is seen: its middle, all of it with its edges drawn out, or all of it in another shape"""
    blend: int = 4
    """pixels over which what is generated fades in from its border; 0: a hard one"""
    kept: Literal["tokens", "features"] = "tokens"
    """what is forced where nothing is generated: tokens, as VAR does, or features, as CoDe does"""
    count: int = 1
    """results for each label"""
    out: Path = Path("inpainted.png")
    """file to write; the extension says the format. One result is written as it is, in IMAGE's size; several make a picture,
    or, in a folder (a name without extension), single images"""
    overview: Path | None = None
    """also write a picture of what the system sees: the image, the part to generate, what tokens give, the results"""
    picking: Annotated[Picking, Flat] = field(default_factory=Picking)
    loading: Annotated[Loading, Flat] = field(default_factory=Loading)


@dataclass(frozen=True, kw_only=True)
class Outpainting(Inpainting):
    """A change around a part."""

    box: BoxText = ""
    """the part to keep: top, left, bottom, right as fractions of the image"""
    out: Path = Path("outpainted.png")
    """file to write, as `nextscale inpaint` does"""


@dataclass(frozen=True, kw_only=True)
class Editing(Inpainting):
    """A change to given classes."""

    labels: Annotated[tuple[str, ...], LABELS, tyro.conf.arg(help_behavior_hint="(this or --prompt)")] = ()
    """names or numbers of the target classes with commas between; a row of the picture for each"""
    out: Path = Path("edited.png")
    """file to write, as `nextscale inpaint` does"""


def inpaint(change: Annotated[Inpainting, Flat]) -> None:
    """Generate a part of an image anew and keep the rest.

    Try: nextscale inpaint dog.jpg --box 0.25,0.25,0.75,0.75 --out inpainted.jpg

    The image may have any size, and comes back in it: outside of the box or mask it stays as it is. The last line is the
    path of what was written.
    """
    print(_apply(change))


def outpaint(change: Annotated[Outpainting, Flat]) -> None:
    """Keep a part of an image and generate all around it.

    Try: nextscale outpaint dog.jpg --box 0.25,0.25,0.75,0.75 --fit pad --out outpainted.jpg

    What is written is as of `nextscale inpaint`. The last line is its path.
    """
    print(_apply(change, inside=False))


def edit(change: Annotated[Editing, Flat]) -> None:
    """Put something of a given class into a part of an image.

    Try: nextscale edit dog.jpg --labels flags --box 0.1,0.1,0.9,0.9 --out edited.jpg

    What is written is as of `nextscale inpaint`. The last line is its path.
    """
    if not "".join(change.labels).strip() and not change.prompt:
        raise ValueError(
            "edit needs the target classes as --labels, or --prompt; `nextscale inpaint` fills without a class"
        )
    print(_apply(change))


def vary(
    image: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE", help_behavior_hint="")],
    strength: tuple[float, ...] = (0.5,),
    keep: Annotated[tuple[int, ...], tyro.conf.arg(help_behavior_hint="(default: as --strength says)")] = (),
    labels: Annotated[tuple[str, ...], LABELS, tyro.conf.arg(help_behavior_hint="(default: no class)")] = (),
    prompt: Annotated[tuple[str, ...], PROMPT] = (),
    style: Annotated[str, STYLES] = "",
    count: int = 8,
    out: Path = Path("varied.png"),
    picking: Annotated[Picking, Flat] = Picking(),
    loading: Annotated[Loading, Flat] = Loading(),
) -> None:
    """Draw images like a given one: its coarse scales stay, the finer ones are drawn anew.

    Try: nextscale vary dog.jpg --strength 0.3 0.6 --count 6 --out varied.png

    The picture shows the image as the system sees it, its middle, and the results. The last line is the picture's path.

    Args:
        image: image file
        strength: how much changes, from 0 (what the tokens of the image give) to 1 (plain sampling); each makes a row
        keep: instead, how many scales stay; each makes a row
        labels: name or number of a class
        prompt: description in words instead of a label, for systems that read them
        style: for systems that are told one: its name, or any
        count: results for each strength
        out: picture to write; the extension says the format. A name without one is a folder of the results as they are, and
            .npz an array of them
    """
    import torch

    from nextscale.data.images import check_grid, save_images, writes_singles
    from nextscale.sampling.edit import keep_tokens
    from nextscale.sampling.vary import first_scales, kept_scales

    at_least_one(count=count)
    picking.check()
    check_pictures(out=out, inputs=[image])
    check_device(loading.device)
    loading = loading.told(prompt)
    system = loading.load()
    said = read_labels(system, labels, prompt, name=loading.name) if prompt or "".join(labels).strip() else [None]
    styles = read_styles(system, style)
    if len(said) > 1 or len(styles) > 1:
        raise ValueError("vary takes one label or prompt, and one style")
    ways = [kept_scales(system.schedule, keep=n) for n in keep] or [kept_scales(system.schedule, s) for s in strength]
    check_images(len(ways) * (count + 1), out)
    check_grid(out, len(ways) * (count + 1), system.image_size, count + 1)
    source = ns.read_images(image, system.image_size, system.tokenizer.channels)
    tokens, (options, how) = ns.encode(system, source), picking.resolve(system)
    tiles = []
    for kept in ways:
        edit = keep_tokens(tokens, [mask.to(system.device) for mask in first_scales(system.schedule, kept)])
        drawn = generate(system, said * count, picking.seed, options, styles=styles * count, edit=edit)[-1].images
        tiles += [drawn] if writes_singles(out) else [source, drawn]
    names = [f"keep {n}" for n in keep] or [f"strength {s:g}" for s in strength]
    texts = [text for name in names for text in (image.name, *[name] * count)]
    title = f"{loading.title(system)}, {image.name}, seed {picking.seed}, {how}"
    looks: dict[str, Any] = {} if writes_singles(out) else {"columns": count + 1, "labels": texts, "title": title}
    print(save_images(torch.cat(tiles), out, **looks))


def _apply(change: Inpainting, *, inside: bool = True) -> Path:
    """Write the results, and the overview if there is to be one.

    `inside`: the box is the part to generate, not the part to keep. A mask is always white where to generate.
    """
    from nextscale.data.images import read_image_file
    from nextscale.pixels import to_float
    from nextscale.sampling.edit import EditRequest

    count, picking = change.count, change.picking
    at_least_one(count=count)
    picking.check()
    overview = [change.overview] if change.overview else []
    check_pictures(*overview, out=change.out, inputs=[change.image, *([change.mask] if change.mask else [])])
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
    source = to_float(read_image_file(change.image, None, system.tokenizer.channels))[None]
    results = _Results(system, change, wanted, source, f"seed {picking.seed}, {how}")
    marks = {"box": where} if isinstance(where, tuple) else {"mask": _read_mask(where, change.image, source)}
    asked = EditRequest(**marks, inside=inside, fit=change.fit, blend=change.blend, kept=change.kept)
    plan = asked.plan(system, source)
    if not plan.generate.any():
        raise ValueError(f"--mask marks nothing to generate in {change.image}; it is white where to generate")
    drawn = generate(system, results.rows, picking.seed, options, styles=results.styles, edit=plan.edit)[-1].images
    if change.overview:
        print(results.save_overview(plan, drawn, change.overview))
    return results.save(plan.whole(drawn.to(system.device)).cpu())


class _Results:
    """What is written of a change, `count` images for each of the labels and styles that are wanted."""

    def __init__(
        self,
        system: System,
        change: Inpainting,
        wanted: Sequence[tuple[Label, str | None]],
        source: Tensor,
        how: str,
    ) -> None:
        from nextscale.data.images import check_grid

        self.system, self.change, self.wanted = system, change, wanted
        self.rows, self.styles = zip(*[one for one in wanted for _ in range(change.count)], strict=True)
        self.title = f"{change.loading.told(change.prompt).title(system)}, {change.image.name}, {how}"
        if len(self.rows) > 1:
            check_grid(change.out, len(self.rows), (source.shape[2], source.shape[3]), change.count)
        if change.overview:
            columns = 3 + change.count
            check_grid(change.overview, columns * len(wanted), system.image_size, columns)

    def save(self, images: Tensor) -> Path:
        """One image as it is, several as a picture or, in a folder, as they are."""
        from nextscale.data.images import save_images, writes_singles

        out = self.change.out
        if len(images) == 1 or writes_singles(out):
            return save_images(images, out)
        labels = [caption(self.system, label, style) for label, style in zip(self.rows, self.styles, strict=True)]
        return save_images(images, out, columns=self.change.count, labels=labels, title=self.title)

    def save_overview(self, plan: Plan, drawn: Tensor, path: Path) -> Path:
        """A row for each label: what the system sees, what is generated (grey), what the tokens give, and the results."""
        import torch

        from nextscale.data.images import save_images

        count, stride, source = self.change.count, self.system.tokenizer.stride, plan.seen.cpu()
        grey = plan.generate.cpu()[:, None].repeat_interleave(stride, 2).repeat_interleave(stride, 3)  # [1, 1, H, W]
        tokens = ns.decode(self.system, ns.encode(self.system, plan.seen)).cpu()
        first = torch.cat([source, torch.where(grey, source * 0.2, source), tokens])
        tiles = [tile for some in drawn.split(count) for tile in (first, some)]
        labels = [
            text
            for label, style in self.wanted
            for text in ("source", "to generate", "reconstruction", *[caption(self.system, label, style)] * count)
        ]
        return save_images(torch.cat(tiles), path, columns=3 + count, labels=labels, title=self.title)


def _read_mask(path: Path, image: Path, source: Tensor) -> Tensor:
    """Where a file is white and not transparent, bool [H, W] in the pixels of its image. Refuses one of another shape: nobody
    knows where in the image its marks are."""
    import torch.nn.functional as F

    from nextscale.data.images import read_image_file
    from nextscale.pixels import white

    mask = white(read_image_file(path, None, channels=4))
    (h, w), (height, width) = mask.shape, source.shape[-2:]
    if abs(w * height - h * width) > max(h, w, height, width):  # but for rounded sides
        raise ValueError(
            f"--mask {path} is of {h}x{w} pixels and {image} of {height}x{width}, two shapes; draw the mask on the image"
        )
    return F.interpolate(mask[None, None].float(), size=(height, width))[0, 0] > 0.5


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
