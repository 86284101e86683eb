"""How long sampling takes, and how long `nextscale --help` takes. Prints JSON lines.

python benchmarks/sampling.py --system emoji-64 --batch 64 --repeats 5
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
import tyro

import nextscale as ns


def main(system: str = "emoji-64", batch: int = 64, repeats: int = 5, threads: int | None = None) -> None:
    """Time sampling with guidance, in parts, and the start of the command line.

    Args:
        system: a shipped system, a folder, or a hub name
        batch: images at once
        repeats: timed runs, after one that is not
        threads: of torch; by default its own choice
    """
    if batch < 1 or repeats < 1:
        raise ValueError(f"batch and repeats: expected at least 1, got {batch} and {repeats}")
    if threads is not None:
        torch.set_num_threads(threads)
    loaded = ns.load(system)
    report("system", **about(system, loaded))
    for name, seconds in time_sampling(loaded, batch, repeats).items():
        report(name, batch=batch, min_s=min(seconds), median_s=statistics.median(seconds), repeats=repeats)
    command = help_command()
    seconds = [time_process(command) for _ in range(5)]
    report("help", command=" ".join(command), min_s=min(seconds), median_s=statistics.median(seconds), repeats=5)


def about(name: str, system: ns.System) -> dict[str, Any]:
    """What was measured, and on what."""
    return {
        "system": name,
        "scales": str(system.schedule),
        "parameters_model": sum(p.numel() for p in system.need_model().parameters()),
        "parameters_tokenizer": sum(p.numel() for p in system.tokenizer.parameters()),
        "guidance": system.sampling.guidance,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "load": [round(x, 2) for x in os.getloadavg()],  # other work on the machine spoils the numbers
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


@torch.inference_mode()
def time_sampling(system: ns.System, batch: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of each repeat: all of it, the scale loop (transformer, pick, pyramid), the decoder."""
    labels = [i % len(system.readers["label"].choices) for i in range(batch)]
    guidance = ns.cfg_ramp(system.sampling.guidance)
    tokens, decode = [], []
    for repeat in range(repeats + 1):
        begun = time.perf_counter()
        state = ns.run(system, ns.start(system, labels, guidance=guidance, seed=repeat * batch))
        middle = time.perf_counter()
        ns.finish(system, state)
        if repeat:  # the first one warms up
            tokens.append(middle - begun)
            decode.append(time.perf_counter() - middle)
    return {"sample": [a + b for a, b in zip(tokens, decode, strict=True)], "tokens": tokens, "decode": decode}


def help_command() -> list[str]:
    """The installed command of this environment, else the module."""
    script = shutil.which("nextscale", path=os.path.dirname(sys.executable))
    return [script, "--help"] if script else [sys.executable, "-m", "nextscale", "--help"]


def time_process(command: list[str]) -> float:
    """Wall seconds of a fresh process."""
    begun = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - begun
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with {done.returncode}: {done.stderr.strip()[-500:]}")
    return seconds


def report(name: str, **values: Any) -> None:
    """One JSON line."""
    rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in values.items()}
    print(json.dumps({"measure": name, **rounded}), flush=True)


if __name__ == "__main__":
    tyro.cli(main)
