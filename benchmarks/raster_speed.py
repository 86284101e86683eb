"""Seconds an image of VAR and of next-token prediction in raster order, with one transformer and one autoencoder: speed
alone, so the weights are random.

python benchmarks/raster_speed.py --shape emoji-64
python benchmarks/raster_speed.py --shape d16 --batches 1 --repeats 1
python benchmarks/raster_speed.py --depth 2 --sizes 1 2 3 4 5 6 8 10 13 16
python benchmarks/raster_speed.py --sizes 1 2 3 4 6 9 13 18 24 32 --batches 1 --repeats 3

Both sides sample with guidance at every step, keys and values cached; they alternate, and the medians are compared.
"""

from __future__ import annotations

import json
import statistics
import time
from typing import Any, Literal

import torch
import tyro

import nextscale as ns
from nextscale.recipes.generators import raster_ar, var


def built(shape: str, depth: int | None, sizes: tuple[int, ...]) -> dict[str, ns.System]:
    """The two systems, with 1,000 classes."""
    changes: dict[str, Any] = {"sizes": sizes} if sizes else {}
    known = var.PRESETS[shape](num_classes=1000, classes=(), **changes)
    if depth:
        smaller = known.transformer.model_copy(update={"depth": depth, "num_heads": depth, "dim": 24 * depth})
        known = known.model_copy(update={"transformer": smaller})
    if sizes:  # random weights know no scales of their training
        known = known.model_copy(update={"pyramid": known.pyramid.model_copy(update={"limits": None})})
    size = known.sizes[-1]
    pyramid = known.pyramid.model_copy(update={"phi_ratio": 0.0, "limits": None})
    shared = {"autoencoder": known.autoencoder, "transformer": known.transformer, "num_classes": 1000}
    return {
        "raster": raster_ar.build(raster_ar.Config(sizes=(size,), pyramid=pyramid, **shared)),
        "var": var.build(known),
    }


def seconds(system: ns.System, batch: int) -> tuple[float, float]:
    """An image, and the share of that time that decoding takes."""
    start = time.perf_counter()
    state = ns.run(system, ns.start(system, list(range(batch)), guidance=ns.cfg(3.0), pick=ns.top_k_top_p(75, 0.0)))
    drawn = time.perf_counter()
    ns.finish(system, state)
    whole = time.perf_counter() - start
    return whole / batch, (whole - (drawn - start)) / whole


@torch.no_grad()
def main(
    shape: Literal["emoji-64", "d16"] = "emoji-64",
    batches: tuple[int, ...] = (1, 16),
    repeats: int = 5,
    depth: int | None = None,
    sizes: tuple[int, ...] = (),
) -> None:
    """Print a line for each batch size.

    Args:
        shape: of the preset whose autoencoder and transformer both have
        batches: sizes of them
        repeats: of each side
        depth: of a transformer with the ladder's proportions, 24 wide for each block, instead of the preset's
        sizes: of VAR's scales, instead of the preset's; the raster goes through the last one
    """
    systems = built(shape, depth, sizes)
    for batch in batches:
        found: dict[str, list[Any]] = {name: [] for name in systems}
        for system in systems.values():
            if repeats > 1:
                seconds(system, batch)  # warm
        for _ in range(repeats):
            for name, system in systems.items():
                found[name].append(seconds(system, batch))
        medians = {name: statistics.median(one for one, _ in values) for name, values in found.items()}
        line: dict[str, Any] = {
            "shape": shape,
            "depth": depth,
            "batch": batch,
            "ratio": round(medians["raster"] / medians["var"], 2),
        }
        for name, system in systems.items():
            share = statistics.median(part for _, part in found[name])
            line |= {f"{name}_seconds": round(medians[name], 4), f"{name}_steps": len(system.schedule)}
            line |= {f"{name}_tokens": system.schedule.length, f"{name}_decoding": round(share, 3)}
        print(json.dumps(line | {"threads": torch.get_num_threads()}), flush=True)


if __name__ == "__main__":
    tyro.cli(main)
