"""A look at every image before training: which cannot be read, which are too small."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, TypeVar

from nextscale.data.images import MOST_ASPECT, Seen, Size, height_width
from nextscale.data.left_out import LeftOut
from nextscale.progress import Bar
from nextscale.settings import cut

SHOWN = 2  # reasons why files cannot be read

T = TypeVar("T")
Broken = Literal["skip", "refuse"]


def sound(
    items: Sequence[T],
    examine: Callable[[T], Seen],
    where: str,
    size: Size,
    broken: Broken,
    progress: bool,
    left_out: LeftOut,
    name: Callable[[T], str] = str,
) -> list[T]:
    """The items that can be read; `examine(item)` returns what an image is, or raises. Others are counted.

    `where` the items are, and the `name` of each, for what is said. Damaged ones: "skip" leaves them out with a warning,
    "refuse" raises ValueError with their names. Also warns of images that are smaller than `size`, and of those that are not
    used whole. Raises ValueError if none can be read.
    """
    if broken not in ("skip", "refuse"):
        raise ValueError(f'broken: expected "skip" or "refuse", got {broken!r}')

    def answer(item: T) -> str | Seen:
        try:
            return examine(item)
        except (ValueError, OSError) as error:
            return str(error)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        bar = Bar(total=len(items), desc="checking images", unit="image", delay=2, silent=not progress)
        answers = []
        with bar:
            for found in pool.map(answer, items):
                answers.append(found)
                bar.update()
    if bad := [found for found in answers if isinstance(found, str)]:
        shown = "".join(f"\n  {cut(reason, 160)}" for reason in bad[:SHOWN])
        names = [reason.partition(" cannot be read")[0].rpartition("/")[2] for reason in bad]
        more = f"\n  and {len(bad) - SHOWN} more: {cut(', '.join(names[SHOWN:]), 160)}" if len(bad) > SHOWN else ""
        text = f"{len(bad)} of {len(items)} image files in {where} cannot be read"
        if broken == "refuse":
            raise ValueError(
                f'{text}:{shown}{more}\nreplace or remove them, or pass broken="skip" to go on without them'
            )
        for reason in bad:
            left_out.add("that cannot be read", reason.partition(" cannot be read")[0])
        if not any(isinstance(found, Seen) for found in answers):
            raise ValueError(
                f"{where}: expected images, but none of its {len(items)} image files can be read:{shown}{more}"
            )
        warnings.warn(f"{text}, and are skipped:{shown}{more}", stacklevel=3)
    kept = [item for item, found in zip(items, answers, strict=True) if not isinstance(found, str)]
    if not kept:
        raise ValueError(
            f"{where}: expected images, but none of its {len(items)} image files can be read; replace them"
        )
    least = max(height_width(size))
    seen = [(name(item), found) for item, found in zip(items, answers, strict=True) if isinstance(found, Seen)]
    partly = {
        f"more than {MOST_ASPECT} times as long as wide, and only their middle is used": [
            n for n, s in seen if s.narrow
        ],
        "of several frames, and only the first is used": [n for n, s in seen if s.frames],
    }
    for what, names in partly.items():
        if names:
            shown = cut(", ".join(names[:3]), 200)
            warnings.warn(f"{len(names)} of {len(kept)} images in {where} are {what}: {shown}", stacklevel=3)
    if small := [found.short for _, found in seen if found.short < least]:
        warnings.warn(
            f"{len(small)} of {len(kept)} images in {where} are smaller than {least} pixels (down to {min(small)}) and are "
            "enlarged, so they are blurred; take larger ones, or train at a smaller size",
            stacklevel=3,
        )
    return kept
