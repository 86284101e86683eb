"""The paper's pictures of `emoji-64`: token maps by scale, and zero-shot editing.

python benchmarks/paper_pictures.py --out docs/paper

Token maps: a code's colour is its place along the first three principal axes of all codes that the drawings use, so that
like codes have like colours. Editing: the region in the frame is drawn anew, the rest is forced token by token (Sec. 5.3 of
VAR).
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

import nextscale as ns

SHOWN = 5  # drawings


def code_colours(system: ns.System, tokens: list[Tensor]) -> Tensor:
    """A colour in [-1, 1] for each code [V, 3]: principal axes of the codes in use."""
    codes = system.tokenizer.pyramid.codebook.weight.detach()
    used = codes[torch.cat([t.flatten() for t in tokens]).unique()]
    _, _, axes = torch.linalg.svd(used - used.mean(dim=0), full_matrices=False)
    places = (codes - used.mean(dim=0)) @ axes[:3].T
    return (places / places.std(dim=0) / 2.5).clamp(-1, 1)


def token_maps(system: ns.System, out: Path) -> Path:
    """Two rows for each held-out drawing: itself, then each scale's token map; below it what the scales up to there decode
    to."""
    held_out = ns.openmoji(system.image_size[0]).val
    items = [held_out[i * len(held_out) // SHOWN] for i in range(SHOWN)]
    images = torch.stack([item["image"] for item in items])
    tokens = ns.encode(system, images)
    colours, size = code_colours(system, tokens), system.image_size
    tiles, names = [], []
    for i, item in enumerate(items):
        maps = []
        for token_map, (h, w) in zip(tokens, system.schedule.sizes, strict=True):
            small = colours[token_map[i]].T.unflatten(1, (h, w))[None]
            maps.append(F.interpolate(small, size=size, mode="nearest")[0])
        decoded = [ns.decode(system, [t[i : i + 1] for t in tokens[: k + 1]])[0] for k in range(len(tokens))]
        tiles += [images[i], *maps, images[i], *decoded]
        sizes = [f"{h}x{w}" for h, w in system.schedule.sizes]
        names += [item["caption"], *(f"tokens {name}" for name in sizes), "", *(f"up to {name}" for name in sizes)]
    title = "Token maps by scale, and what they add up to"
    return ns.save_images(
        torch.stack(tiles), out / "token-maps.png", columns=1 + len(tokens), labels=names, title=title
    )


def editing(system: ns.System, out: Path) -> Path:
    """Inpainting, outpainting and class-conditional editing of drawings that training never saw."""
    held_out = ns.openmoji(system.image_size[0]).val
    chosen = [i * len(held_out) // 4 for i in range(4)]
    images = torch.stack([held_out[i]["image"] for i in chosen])
    labels = [held_out[i]["label"] for i in chosen]
    box = (0.25, 0.25, 0.75, 0.75)
    edited = {
        "inpainted": ns.inpaint(system, images, labels=labels, box=box, seed=1),
        "outpainted": ns.outpaint(system, images, labels=labels, box=box, seed=1),
        "middle as a heart": ns.class_edit(system, images, labels=["heart"] * 4, box=box, seed=1),
        "middle as a face": ns.class_edit(system, images, labels=["face-smiling"] * 4, box=box, seed=1),
    }
    tiles = torch.stack([images, *edited.values()], dim=1).flatten(0, 1)
    names = ["original", *edited] * len(images)
    title = "Zero-shot editing of held-out drawings: the middle half, or all around it"
    return ns.save_images(tiles, out / "editing.png", columns=1 + len(edited), labels=names, title=title)


def main(out: Path = Path("docs/paper"), name: str = "emoji-64") -> None:
    """Draw both pictures.

    Args:
        out: folder to write
        name: of the system
    """
    system = ns.load(name)
    print(token_maps(system, out))
    print(editing(system, out))


if __name__ == "__main__":
    tyro.cli(main)
