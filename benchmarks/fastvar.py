"""What FastVAR saves and what it costs. Prints JSON lines.

python benchmarks/fastvar.py speed      # the transformer of VAR-d16 at 512 px, random weights
python benchmarks/fastvar.py quality    # a trained system: PSNR to its dense samples of the same seeds
"""

from __future__ import annotations

import json
import os
import statistics
import time
from typing import Any

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

import nextscale as ns
from nextscale.recipes.decoding import fastvar
from nextscale.recipes.generators import var
from nextscale.sampling.loop import stepper_of


def speed(
    depth: int = 16,
    sizes: tuple[int, ...] = var.SIZES_512,
    settings: str = "hart",
    batch: int = 1,
    repeats: int = 3,
    threads: int | None = None,
) -> None:
    """Time the transformer scale by scale with guidance, dense and pruned in turns; random weights.

    Args:
        depth: of VAR's transformer, 64 channels a block
        sizes: sides of the scales
        settings: published settings: hart or infinity-2b
        batch: images; guidance doubles the rows
        repeats: timed runs of each, after one that is not
        threads: of torch; by default its own choice
    """
    if threads is not None:
        torch.set_num_threads(threads)
    preset = var.PRESETS["d16"](sizes=sizes)
    shape = preset.transformer.model_copy(update={"depth": depth, "dim": 64 * depth, "num_heads": depth})
    system = var.build(preset.model_copy(update={"transformer": shape}))
    config = fastvar.PUBLISHED[settings]
    if config.dense_first + config.dense_last >= depth:
        raise ValueError(f"{settings} leaves none of {depth} blocks to prune; give a deeper model")
    systems = {"dense": system, "pruned": fastvar.apply(system, config)}
    times: dict[str, list[list[float]]] = {name: [] for name in systems}
    for repeat in tqdm(range(repeats + 1), desc="timing"):
        for name, one in systems.items():
            found = time_transformer(one, batch)
            if repeat:  # the first one warms up
                times[name].append(found)
    totals = {name: statistics.median(sum(run) for run in runs) for name, runs in times.items()}
    for name, runs in times.items():
        scales = [round(statistics.median(column), 4) for column in zip(*runs, strict=True)]
        report(f"speed, {name}", seconds=totals[name], scales=scales, fastest=min(sum(run) for run in runs))
    report(
        "speed",
        ratio=totals["dense"] / totals["pruned"],
        depth=depth,
        sizes=str(system.schedule),
        ratios=config.ratios,
        batch=batch,
        repeats=repeats,
        threads=torch.get_num_threads(),
        load=[round(x, 2) for x in os.getloadavg()],
    )


@torch.inference_mode()
def time_transformer(system: ns.System, batch: int) -> list[float]:
    """Seconds that the transformer takes at each scale, for both branches of guidance; inputs are noise."""
    model, schedule = system.need_model(), system.schedule
    rows = 2 * batch
    prepared = model.prepare(system.condition(list(range(rows))))
    cache = model.new_cache(prepared, schedule)
    generator = torch.Generator().manual_seed(0)
    code_dim = system.tokenizer.pyramid.code_dim
    seconds = []
    scales = len(schedule) - stepper_of(system).skipped
    for k, span in enumerate(list(schedule.steps())[:scales]):
        inputs = torch.randn(rows, schedule.lengths[k], code_dim, generator=generator) if k else None
        begun = time.perf_counter()
        model.hidden(inputs, prepared, span, cache)
        seconds.append(time.perf_counter() - begun)
    return seconds


def quality(
    system: str = "emoji-64", ratios: tuple[float, ...] = (0.4, 0.5), images: int = 64, dense_first: int = 0
) -> None:
    """PSNR of pruned samples to dense ones of the same labels and seeds: FastVAR, random tokens, zeros for the others.

    Args:
        system: a shipped system, a folder, or a hub name
        ratios: shares of tokens left out at the last scales
        images: compared
        dense_first: first blocks that are not pruned
    """
    loaded = ns.load(system)
    known = len(loaded.readers["label"].choices)
    labels = [i % known for i in range(images)]
    variants: dict[str, dict[str, Any]] = {
        "pivotal, cache": {},
        "random, cache": {"select": "random"},
        "pivotal, zeros": {"fill": "zeros"},
        "random, zeros": {"select": "random", "fill": "zeros"},
        "last scales left out": {"ratios": (1.0,) * len(ratios)},
    }
    dense = ns.sample(loaded, labels, seed=0)
    tokens = ns.sample_tokens(loaded, labels, seed=0)
    for name, changes in variants.items():
        config = fastvar.Config.model_validate({"ratios": ratios, "dense_first": dense_first} | changes)
        pruned = fastvar.apply(loaded, config)
        psnr = ns.psnr(ns.sample(pruned, labels, seed=0), dense)
        report(
            f"quality, {name}",
            psnr=float(psnr.mean()),
            standard_error=float(psnr.std() / len(psnr) ** 0.5),
            cross_entropy=first_step_loss(loaded, pruned, tokens, labels) if 1 not in config.ratios else None,
            images=images,
            ratios=config.ratios,
            system=system,
        )


@torch.inference_mode()
def first_step_loss(dense: ns.System, pruned: ns.System, tokens: list[Tensor], labels: list[int]) -> float:
    """Cross-entropy of dense sampling's tokens at the pruned scales, as the pruned model sees them, minus the dense model's;
    nats a token, without guidance: what pruning alone costs, before differences add up."""
    losses = []
    for system in (dense, pruned):
        model, schedule = system.need_model(), system.schedule
        prepared = model.prepare(system.condition(labels))
        cache = model.new_cache(prepared, schedule)
        pyramid = system.tokenizer.pyramid
        f_hat, loss = pyramid.start(len(labels), schedule, system.device), []
        for k, span in enumerate(schedule.steps()):
            inputs = pyramid.next_input(f_hat, k, schedule) if k else None
            loss.append(-model.head.log_prob(model.hidden(inputs, prepared, span, cache), tokens[k]))
            f_hat = pyramid.add(f_hat, tokens[k], k, schedule)
        losses.append(torch.cat(loss[-2:], dim=1).mean())
    return float(losses[1] - losses[0])


def report(name: str, **values: Any) -> None:
    """One JSON line."""
    rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in values.items()}
    print(json.dumps({"measure": name, **rounded}), flush=True)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"speed": speed, "quality": quality})
