"""`nextscale bench train`: a training step of ours against the reference's way of writing it, side by side."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

import nextscale as ns
from nextscale.cli.options import at_least_one
from nextscale.cli.parse import parse_one_of

Shape = Literal["d16", "emoji-64", "tiny"]
REFERENCE = Path(ns.__file__).parent.parent / "benchmarks" / "reference.py"


def bench(*arguments: str) -> None:
    """Measure speed and memory of training.

    Try: nextscale bench train --shape emoji-64 --batch 32
    """
    parse_one_of({"train": train}, arguments, "nextscale bench", bench.__doc__ or "")()


def train(
    shape: Shape = "emoji-64",
    batch: int = 32,
    steps: int = 5,
    rounds: int = 2,
    threads: int | None = None,
    json_out: Annotated[str, tyro.conf.arg(name="json", metavar="FILE")] = "",
) -> None:
    """Time forward and backward, teacher-forced in float32, of our transformer and of the reference's.

    Both run in turns in processes of their own; the fastest step counts. `ratio`: time of the reference / ours.
    `memory_ratio`: ours / the reference's, of what training adds to a process that has loaded torch, in further processes
    whose allocator gives freed memory back at once: what is alive counts, not the holes between it. `gemm_share`: matrix
    products a second / the most that torch's reached in large ones; `machine_share`: / the most by products or convolutions,
    which on some processors are faster.

    Args:
        shape: of the transformer
        batch: images a step
        steps: timed in each process, after one that is not
        rounds: processes of each
        threads: of torch; by default its own choice
        json_out: write one line of JSON here; - is standard output
    """
    at_least_one(batch=batch, steps=steps, rounds=rounds, threads=threads)
    if not REFERENCE.is_file():
        raise FileNotFoundError(
            f"{REFERENCE} is missing: the reference is no part of the installed package; run this in a checkout"
        )
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "reference": []}
    for _ in range(rounds):
        for who, results in found.items():
            results.append(in_process(who, shape, batch, steps, threads))
    best = {who: min(results, key=lambda result: result["seconds"]) for who, results in found.items()}
    for who, result in best.items():
        result["memory_gb"] = in_process(who, shape, batch, 1, threads, {"MALLOC_MMAP_THRESHOLD_": "65536"})[
            "memory_gb"
        ]
    ours, reference = best["ours"], best["reference"]
    peak = max(result["peak_gflops"] for results in found.values() for result in results)
    most = max(peak, *(result["convolution_gflops"] for results in found.values() for result in results))
    report = {
        "shape": shape,
        "batch": batch,
        "ratio": reference["seconds"] / ours["seconds"],
        "memory_ratio": ours["memory_gb"] / reference["memory_gb"],
        "gemm_share": ours["gflop"] / ours["seconds"] / peak,
        "reference_gemm_share": ours["gflop"] / reference["seconds"] / peak,
        "seconds": ours["seconds"],
        "reference_seconds": reference["seconds"],
        "tokens_per_s": ours["tokens"] / ours["seconds"],
        "memory_gb": ours["memory_gb"],
        "reference_memory_gb": reference["memory_gb"],
        "peak_gflops": peak,
        "machine_share": ours["gflop"] / ours["seconds"] / most,
        "machine_gflops": most,
        "threads": ours["threads"],
    }
    report = {name: round(value, 4) if isinstance(value, float) else value for name, value in report.items()}
    if json_out == "-":
        print(json.dumps(report))
        return
    if json_out:
        from nextscale.files import atomic_write

        with atomic_write(json_out) as path:
            path.write_text(json.dumps(report) + "\n", encoding="utf-8")
    for name, value in report.items():
        print(f"{name:<22}{value}")


def in_process(
    who: str, shape: str, batch: int, steps: int, threads: int | None, environment: dict[str, str] | None = None
) -> dict[str, Any]:
    """What `measure` finds in a process of its own."""
    words = [sys.executable, "-m", "nextscale.cli.bench", who, shape, str(batch), str(steps), str(threads or 0)]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | (environment or {}))
    if done.returncode:
        raise RuntimeError(f"measuring {who} failed: {done.stderr.strip()[-1000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(who: str, shape: str, batch: int, steps: int, threads: int) -> dict[str, Any]:
    """Seconds of the fastest step, memory, and what matrix products could do here; in a process of its own."""
    import importlib.util
    import time

    import torch
    import torch.nn.functional as F

    var = ns.find_recipe("var")
    from nextscale.draws import Draws
    from nextscale.training.memory import peak_memory

    if threads:
        torch.set_num_threads(threads)
    config = var.PRESETS[shape](**({"num_classes": 124} if shape == "emoji-64" else {}))
    changes = {"dropout": 0.0, "drop_path": 0.0, "shared_adaln": False}
    config = config.model_copy(update={"transformer": config.transformer.model_copy(update=changes)})
    schedule, codes = config.schedule, config.pyramid.codebook_size
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(config.num_classes, (batch,), generator=generator)
    inputs = torch.randn(batch, schedule.length - schedule.lengths[0], config.pyramid.code_dim, generator=generator)
    targets = torch.randint(codes, (batch, schedule.length), generator=generator)
    before = peak_memory("cpu")
    draws = Draws(generator, batch)
    model: Any
    if who == "ours":
        model = var.build_model(config).train()
        span = schedule.span()

        def loss() -> torch.Tensor:
            h = model.hidden(inputs, model.prepare(model.conditioner({"label": labels})), span)
            return model.head.loss(h, targets, draws).mean()
    else:
        spec = importlib.util.spec_from_file_location("reference", REFERENCE)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        model = module.ReferenceVAR(config).train()

        def loss() -> torch.Tensor:
            return F.cross_entropy(model(labels, inputs).flatten(0, 1), targets.flatten())

    times = []
    for step in range(steps + 1):
        begun = time.perf_counter()
        model.zero_grad(set_to_none=True)
        loss().backward()
        if step:  # the first one warms up
            times.append(time.perf_counter() - begun)
    memory = peak_memory("cpu") - before
    with torch.device("meta"):  # both compute the same; ours can be counted
        counted = var.build_model(config)
    return {
        "seconds": min(times),
        "memory_gb": max(memory, 1e-3),
        "gflop": batch * 3 * counted.flop(schedule) / 1e9,
        "tokens": batch * schedule.length,
        "peak_gflops": matrix_peak(),
        "convolution_gflops": convolution_peak(),
        "threads": torch.get_num_threads(),
    }


def matrix_peak(size: int = 2048) -> float:
    """Most GFLOP a second of a large matrix product in float32."""
    import torch

    a, b = torch.randn(size, size), torch.randn(size, size)
    return fastest(lambda: a @ b, 2 * size**3)


def convolution_peak(rows: int = 4096, channels: int = 2048) -> float:
    """Most GFLOP a second of a large 1x1 convolution in float32, channels last."""
    import torch
    import torch.nn.functional as F

    x, weight = torch.randn(1, rows, 1, channels).permute(0, 3, 1, 2), torch.randn(channels, channels, 1, 1)
    return fastest(lambda: F.conv2d(x, weight), 2 * rows * channels**2)


def fastest(compute: Callable[[], object], flop: int, repeats: int = 6) -> float:
    """GFLOP a second of the fastest of some calls."""
    import time

    best = float("inf")
    for _ in range(repeats):
        begun = time.perf_counter()
        compute()
        best = min(best, time.perf_counter() - begun)
    return flop / best / 1e9


def main(arguments: Sequence[str]) -> None:
    """What `train` runs in each process."""
    who, shape, batch, steps, threads = arguments
    print(json.dumps(measure(who, shape, int(batch), int(steps), int(threads))))


if __name__ == "__main__":
    main(sys.argv[1:])
