"""Editing images without training: some tokens are forced to those of a source image, the others are generated.

The transformer knows nothing of it: it reads the sum of both. This is the zero-shot editing of VAR (section 5.3, and
`demo_zero_shot_edit.ipynb` of its code). Kept regions come back as the tokenizer renders them, and the border of the mask
is soft, since upsampling and phi reach across it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nextscale.contracts import Edit, Pick
from nextscale.modules import usual_defaults
from nextscale.pixels import as_images, as_mask
from nextscale.sampling.canvas import FITS, Canvas, feathered
from nextscale.sampling.guidance import Guidance
from nextscale.sampling.loop import OnScale, sample
from nextscale.sampling.pick import ScalePick
from nextscale.schedule import Schedule
from nextscale.settings import brief, finite_number, whole_number
from nextscale.system import Labels, System, check_system, encode
from nextscale.tokens import Soft, Tokens, each, first_tensor

Box = Sequence[float] | Tensor

KEPT = ("tokens", "features")
MOST_BLEND = 1024
MOST_WHOLE = 3  # a scale of at most so many tokens is kept whole


def inpaint(
    system: System,
    x: Any,
    mask: Any = None,
    labels: Labels = None,
    *,
    box: Box | None = None,
    fit: str | None = None,
    blend: int | None = None,
    kept: str = "tokens",
    keep_coarsest: bool = True,
    guidance: Guidance | None = None,
    pick: Pick | ScalePick | None = None,
    seed: int | Sequence[int] = 0,
    generator: torch.Generator | None = None,
    on_scale: OnScale | None = None,
) -> Tensor:
    """Generate what a mask marks, or the inside of a box, and keep the rest of the images: [B, 3, H, W] in [-1, 1].

    As it is, this is the reference's editing: images have the system's size, and what is kept looks as its tokens do. With
    `fit` or `blend` images have any size, come back in it, and are to the bit what they were where nothing is marked.

    Args:
        x: images [B, 3, H, W] in [-1, 1]; also bytes, arrays and Pillow images (`as_images`).
        mask: True = generate; [H, W] for all images or [B, 1, H, W], in pixels or in tokens of the last scale; also arrays,
            bytes of 0 and 255, and Pillow images, white (and not transparent) where to generate. Of pixels, a token is kept if
            more than half of its own are; with `fit`, if all are.
        labels: one for all images, or one an image; None (the default) is the null class.
        box: instead of a mask, (y0, x0, y1, x1) as fractions of the image, rounded to tokens of the last scale (with `fit`, to
            pixels).
        fit: how an image of another size lies on the system's canvas: "crop", its middle; "pad", all of it, with its edges
            drawn out; "stretch", all of it in another shape. The result undoes it.
        blend: pixels over which what is generated fades in, from the border of the mask inwards; 0: a hard border. Without
            `fit` it means "crop".
        kept: what is forced where nothing is generated: the "tokens" of the image, as VAR does; or the "features" after each
            scale, as CoDe does, which leak less across the border.
        keep_coarsest: as in the reference, keep the tokens of scales of at most three whole, so that the source sets the tone.
        guidance, pick, seed, generator, on_scale: as in `sample`.

    Raises ValueError for shapes, numbers of rows and boxes that do not fit; warns of masks that mark nothing.
    """
    change = EditRequest(mask, box, True, fit, blend, kept, keep_coarsest)
    return _edited(system, x, labels, change, on_scale, guidance=guidance, pick=pick, seed=seed, generator=generator)


def outpaint(
    system: System,
    x: Any,
    box: Box | None = None,
    labels: Labels = None,
    *,
    mask: Any = None,
    fit: str | None = None,
    blend: int | None = None,
    kept: str = "tokens",
    keep_coarsest: bool = True,
    guidance: Guidance | None = None,
    pick: Pick | ScalePick | None = None,
    seed: int | Sequence[int] = 0,
    generator: torch.Generator | None = None,
    on_scale: OnScale | None = None,
) -> Tensor:
    """Keep the inside of a box and generate all around it; a mask means the same as for `inpaint`, True = generate.

    Arguments, result and errors are those of `inpaint`.
    """
    change = EditRequest(mask, box, False, fit, blend, kept, keep_coarsest)
    return _edited(system, x, labels, change, on_scale, guidance=guidance, pick=pick, seed=seed, generator=generator)


def class_edit(
    system: System,
    x: Any,
    mask: Any = None,
    labels: Labels = None,
    *,
    box: Box | None = None,
    fit: str | None = None,
    blend: int | None = None,
    kept: str = "tokens",
    keep_coarsest: bool = True,
    guidance: Guidance | None = None,
    pick: Pick | ScalePick | None = None,
    seed: int | Sequence[int] = 0,
    generator: torch.Generator | None = None,
    on_scale: OnScale | None = None,
) -> Tensor:
    """Put a target class where a mask or a box marks: `inpaint` with labels that must be given."""
    if labels is None:
        raise ValueError("class_edit needs the target class as label, got None; `inpaint` fills without a class")
    change = EditRequest(mask, box, True, fit, blend, kept, keep_coarsest)
    return _edited(system, x, labels, change, on_scale, guidance=guidance, pick=pick, seed=seed, generator=generator)


# ---- the pieces: an edit, what it keeps, and from where ---------------------------------------------------------------


@dataclass(frozen=True)
class keep_tokens:  # noqa: N801 - reads as the function that it is to its users
    """An `edit(tokens, k)` for the scale loop that puts the tokens of a source where the masks are True.

    All tokens are drawn as ever and some then overwritten, so the stream of random numbers is that of plain sampling.

    Args:
        source: token maps of K scales, int64 [B, l_k] (of bits [B, l_k, d]); one row serves any number of images.
        keep: True = the source's token, bool [B, l_k] or [1, l_k] a scale (see `keep_masks`).
    """

    source: Sequence[Tokens]
    keep: Sequence[Tensor]

    def __post_init__(self) -> None:
        wanted = "keep_tokens needs a token map [B, l_k] and a bool mask [B, l_k] or [1, l_k] for each scale, got "
        hint = "; make them with `ns.encode` and `nextscale.sampling.edit.keep_masks`"
        for given in (self.source, self.keep):
            if not isinstance(given, list | tuple) or not all(isinstance(each, Tensor | tuple) for each in given):
                raise ValueError(f"{wanted}{brief(given)}{hint}")
        got = [(list(t.shape), list(m.shape)) for t, m in zip(map(first_tensor, self.source), self.keep, strict=False)]
        fits = all(t[1:2] == m[1:] and len({t[0], m[0]} - {1}) <= 1 for t, m in got)
        if len(self.source) != len(self.keep) or not fits or any(m.dtype != torch.bool for m in self.keep):
            raise ValueError(
                f"{wanted}{len(self.source)} maps, {len(self.keep)} masks {[str(m.dtype) for m in self.keep[:1]]} of shapes "
                f"{brief(got, 200)}{hint}"
            )

    def __call__(self, tokens: Tokens, k: int) -> Tokens:
        source, keep = self.source[k], self.keep[k]
        if isinstance(tokens, Soft):  # all the weight on the source's choice
            weights = tokens.weights  # [B, l_k, V], of bits [B, l_k, d, 2]
            one_hot = F.one_hot(first_tensor(source).long(), weights.shape[-1]).to(weights.dtype)
            return Soft(_where(keep, one_hot, weights))
        return each(lambda kept, drawn: _where(keep, kept, drawn), source, tokens)

    def select(self, rows: Tensor) -> keep_tokens:
        """The edit of chosen images, for `State.select`; a single row goes on to serve all."""

        def chosen(tensor: Tensor) -> Tensor:
            return tensor if len(tensor) == 1 else tensor[rows]

        return keep_tokens([each(chosen, tokens) for tokens in self.source], [chosen(mask) for mask in self.keep])


@dataclass(frozen=True)
class keep_features:  # noqa: N801 - reads as the function that it is to its users
    """An edit for the scale loop that puts the feature maps of a source where a mask is True, after each scale: CoDe's way.

    Tokens are drawn and added as ever, so the stream of random numbers is that of plain sampling.

    Args:
        source: feature maps of K scales, [B, C, h, w] (`Encoded.f_hats`); one row serves any number of images.
        keep: True = the source's features, bool [B, h', w'] or [1, h', w'], resized to the map by the nearest.
    """

    source: Sequence[Tensor]
    keep: Tensor

    def __call__(self, tokens: Tokens, k: int) -> Tokens:
        return tokens

    def features(self, f_hat: Tensor, k: int) -> Tensor:
        """The feature map after scale k with the source's where it is kept."""
        keep = F.interpolate(self.keep[:, None].float(), size=f_hat.shape[-2:]) > 0.5
        return torch.where(keep, self.source[k], f_hat)

    def select(self, rows: Tensor) -> keep_features:
        """The edit of chosen images, for `State.select`; a single row goes on to serve all."""
        source = [f if len(f) == 1 else f[rows] for f in self.source]
        return keep_features(source, self.keep if len(self.keep) == 1 else self.keep[rows])


def _where(keep: Tensor, kept: Tensor, drawn: Tensor) -> Tensor:
    """One or the other for each token, whatever a token is; keep [B, l], the others [B, l, ...]."""
    return torch.where(keep.view(*keep.shape, *[1] * (drawn.ndim - keep.ndim)), kept, drawn)


def keep_masks(keep: Tensor, schedule: Schedule, *, keep_coarsest: bool = True) -> list[Tensor]:
    """What is kept at each scale, bool [B, l_k], of what is kept at the last one, bool [B, h, w] (True = keep).

    The reference's rule: resize bilinearly to the scale, keep where the result is above one half; and keep scales of at most
    three tokens whole, unless `keep_coarsest` is False. What is thin at the last scale may vanish at coarse ones.
    """
    masks = []
    for size, length in zip(schedule.sizes, schedule.lengths, strict=True):
        share = F.interpolate(keep[:, None].float(), size=size, mode="bilinear")  # half-pixel centres, no antialias
        kept = share.flatten(1) > 0.5  # [B, l_k]
        masks.append(torch.ones_like(kept) if keep_coarsest and length <= MOST_WHOLE else kept)
    return masks


def generated_tokens(
    system: System, batch: int, mask: Any = None, box: Box | None = None, *, inside: bool = True
) -> Tensor:
    """Which tokens of the last scale a mask or a box marks, bool [B, h, w] or [1, h, w], True = generate.

    `inside`: a box is what is generated; else what is kept. Raises ValueError as `inpaint` does.
    """
    _check_one(mask, box)
    if box is not None:
        marked = _box_tokens(box, system.schedule[-1], "token of the last scale")
        return (marked if inside else ~marked).to(system.device)
    return _mask_tokens(system, batch, as_mask(mask)).to(system.device)


def _check_one(mask: Any, box: Box | None) -> None:
    if (mask is None) == (box is None):
        raise ValueError(f"give either a mask or a box, got {'neither' if mask is None else 'both'}")


def check_box(box: Box) -> tuple[float, float, float, float]:
    """The box as four floats; raises ValueError unless 0 <= y0 < y1 <= 1 and 0 <= x0 < x1 <= 1."""
    if isinstance(box, Tensor) and (box.ndim != 1 or box.is_meta):
        raise ValueError(f"a box is (y0, x0, y1, x1), got a tensor {list(box.shape)}; a mask goes to mask=")
    try:
        y0, x0, y1, x1 = (finite_number("box", edge, 0, 1) for edge in box)
        if y0 < y1 and x0 < x1:
            return y0, x0, y1, x1
    except (TypeError, ValueError):
        pass
    numbers: Any = box.tolist() if hasattr(box, "tolist") else box
    if isinstance(numbers, list | tuple) and all(isinstance(edge, float | int) for edge in numbers[:9]):
        numbers = tuple(int(edge) if edge == edge // 1 else edge for edge in numbers[:9])
    raise ValueError(
        "a box is (y0, x0, y1, x1) in fractions of the image with 0 <= y0 < y1 <= 1 and 0 <= x0 < x1 <= 1, got "
        f"{brief(numbers)}; (0, 0, 0.5, 1) is the upper half"
    )


def _box_tokens(box: Box, size: tuple[int, int], cell: str) -> Tensor:
    """The tokens (or pixels) in a box, bool [1, h, w]; rounded as the reference does, halves to even."""
    y0, x0, y1, x1 = check_box(box)
    height, width = size
    marked = torch.zeros(1, height, width, dtype=torch.bool)
    marked[:, round(y0 * height) : round(y1 * height), round(x0 * width) : round(x1 * width)] = True
    if not marked.any():
        raise ValueError(
            f"the box ({y0:g}, {x0:g}, {y1:g}, {x1:g}) holds no {cell}, {height}x{width} of them, to which its corners are "
            "rounded; make it larger"
        )
    return marked


def _mask_tokens(system: System, batch: int, mask: Tensor) -> Tensor:
    """The tokens that a mask marks, bool [B, h, w] or [1, h, w]."""
    grid, pixels = system.schedule[-1], system.image_size
    mask = mask[0] if mask.ndim == 3 and len(mask) == 1 else mask
    shaped = mask.ndim == 2 or (mask.ndim == 4 and mask.shape[1] == 1 and mask.shape[0] in (1, batch))
    if not shaped or tuple(mask.shape[-2:]) not in (grid, pixels):
        (height, width), (h, w) = pixels, grid
        raise ValueError(
            f"a mask for {batch} images has shape [{height}, {width}] or [{batch}, 1, {height}, {width}] in pixels, or "
            f"[{h}, {w}] or [{batch}, 1, {h}, {w}] in tokens, got {list(mask.shape)}; resize it, or give box="
        )
    kept = ~mask.view(-1, 1, *mask.shape[-2:])
    marked = F.interpolate(kept.float(), size=grid, mode="area")[:, 0] <= 0.5
    lost = ~kept.flatten(1).all(1) & ~marked.flatten(1).any(1)
    if lost.any():  # else the images would come back unedited without a word
        stride = system.tokenizer.stride
        raise ValueError(
            f"mask {int(lost.int().argmax())} marks pixels but not half of any token ({stride}x{stride} pixels), so "
            "nothing would be generated; draw it wider"
        )
    return marked


@dataclass(frozen=True)
class Plan:
    """An edit that is ready for the scale loop.

    edit: what `sample` takes. generate: tokens that are generated, bool [B, h, w]. seen: what the system sees of the images.
    whole: puts what the loop gives into the images.
    """

    edit: Edit
    generate: Tensor
    seen: Tensor
    whole: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class EditRequest:
    """What is asked of an edit, see `inpaint`. inside: a box is what is generated, else what is kept."""

    mask: Any = None
    box: Box | None = None
    inside: bool = True
    fit: str | None = None
    blend: int | None = None
    kept: str = "tokens"
    keep_coarsest: bool = True

    def __post_init__(self) -> None:
        if self.kept not in KEPT:
            raise ValueError(f"kept: expected {' or '.join(KEPT)}, got {brief(self.kept)}")
        if self.blend is not None:
            whole_number("blend", self.blend, 0, MOST_BLEND, " pixels")

    @torch.no_grad()
    @usual_defaults()
    def plan(self, system: System, x: Tensor) -> Plan:
        """How images [B, C, H, W] in [-1, 1] are edited. Raises ValueError for sizes, masks and boxes that do not fit."""
        if self.fit is None and self.blend is None:
            if tuple(x.shape[2:]) != system.image_size:
                height, width = system.image_size
                raise ValueError(
                    f'expected images [B, {x.shape[1]}, {height}, {width}], got {list(x.shape)}; give fit="crop" for images of '
                    f"any size, or read them with `ns.read_images(paths, size=({height}, {width}))`"
                )
            generate = generated_tokens(system, len(x), self.mask, self.box, inside=self.inside)
            return Plan(self._keeping(system, x, generate), generate, x, lambda images: images)
        canvas = Canvas.of((x.shape[2], x.shape[3]), system.image_size, self.fit or FITS[0])
        mask = _pixels(self, len(x), canvas.image)
        generate = _touched(mask, canvas, system)
        opacity, x, seen = feathered(mask, self.blend or 0).to(system.device), x.to(system.device), canvas.fit(x)
        return Plan(
            self._keeping(system, seen, generate), generate, seen, lambda images: canvas.put_back(images, x, opacity)
        )

    def _keeping(self, system: System, x: Tensor, generate: Tensor) -> Edit:
        """The edit that keeps what tokens of images do not generate."""
        if self.kept == "features":
            return keep_features(system.tokenizer.encode(x.to(system.device), system.schedule).f_hats, ~generate)
        return keep_tokens(encode(system, x), keep_masks(~generate, system.schedule, keep_coarsest=self.keep_coarsest))


def _edited(
    system: System, x: Any, labels: Labels, change: EditRequest, on_scale: OnScale | None, **options: Any
) -> Tensor:
    """Images after a change; all that can be wrong is found before anything is computed."""
    check_system(system)
    system.need_model()
    x = as_images(x, system.tokenizer.channels)
    rows = system.told(labels, len(x))
    system.check_told(rows)
    plan = change.plan(system, x)
    _warn_of_nothing(plan.generate)
    seen = None if on_scale is None else lambda k, images: on_scale(k, plan.whole(images))
    return plan.whole(sample(system, rows, edit=plan.edit, on_scale=seen, **options))


def _pixels(change: EditRequest, batch: int, size: tuple[int, int]) -> Tensor:
    """The pixels of images that a change marks, bool [B, 1, H, W] or [1, 1, H, W]."""
    _check_one(change.mask, change.box)
    if change.box is not None:
        marked = _box_tokens(change.box, size, "pixel of the image")[None]
        return marked if change.inside else ~marked
    mask = as_mask(change.mask)
    mask = mask[0] if mask.ndim == 3 and len(mask) == 1 else mask
    shaped = mask.ndim == 2 or (mask.ndim == 4 and mask.shape[1] == 1 and mask.shape[0] in (1, batch))
    if not shaped or tuple(mask.shape[-2:]) != size:
        raise ValueError(
            f"a mask for {batch} images of {size[0]}x{size[1]} pixels has shape {list(size)} or {[batch, 1, *size]}, got "
            f"{list(mask.shape)}; draw it on the image, or give box="
        )
    return mask.view(-1, 1, *size)


def _touched(mask: Tensor, canvas: Canvas, system: System) -> Tensor:
    """The tokens that pixels of images touch, bool [B, h, w]; warns where some of them are not seen."""
    stride: Any = system.tokenizer.stride
    rows, columns = canvas.seen
    total, seen = int(mask.sum()), int(mask[..., rows, columns].sum())
    if total and seen < total:
        middle = f"the middle {rows.stop - rows.start}x{columns.stop - columns.start} pixels that the system sees"
        said = f"of what is marked {100 * (1 - seen / total):.0f} % lies outside of {middle}"
        if not seen:
            raise ValueError(f'{said}; give fit="pad" or "stretch"')
        warnings.warn(f'{said}, and stays as it is; fit="pad" or fit="stretch" show it all', stacklevel=6)
    return canvas.marked(mask.to(system.device), stride)


def _warn_of_nothing(generate: Tensor) -> None:
    changed = generate.flatten(1).any(dim=1)
    if not changed.any():
        warnings.warn(
            "the mask marks nothing, so nothing is generated; mark what to generate with True (1)",
            stacklevel=4,
        )
    elif not changed.all():
        first = int((~changed).int().argmax())
        warnings.warn(f"mask {first} marks nothing, so nothing of its image is generated", stacklevel=4)
