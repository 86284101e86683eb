"""Kill training runs with SIGKILL at random moments, resume them, and compare their weights with an undisturbed run's.

    python benchmarks/kill_resume.py --kills 20

Each kill is a run of its own: of a tiny tokenizer and of a tiny generator, in one process and in two, and of a generator
whose weights lie in pieces in two processes (FSDP2), which write their checkpoints together. Exit status 0 only if every
resumed run ends in the same bits and no checkpoint was ever unreadable. Prints JSON lines.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

import nextscale as ns
from nextscale.processes import end_process
from nextscale.recipes.generators import var
from nextscale.training.checkpoints import Checkpoints
from nextscale.training.config import TokenizerLoss, TrainConfig

Kind = Literal["tokenizer", "generator"]


class Noise(Dataset[dict[str, Any]]):
    """Coloured noise at 32 px."""

    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.images = (
            torch.rand(count, 3, 4, 4, generator=generator)
            .mul(2)
            .sub(1)
            .repeat_interleave(8, 2)
            .repeat_interleave(8, 3)
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"image": self.images[i], "label": i % 5}


def train(kind: Kind, out: Path, steps: int, shard: bool) -> None:
    """What is killed: dropout, scale dropout, restarts of codes, averages and validation are all on."""
    torch.set_num_threads(1)
    often = {"log_every": 10, "validate_every": 40, "save_every": 15}
    config = TrainConfig(steps=steps, batch_size=8, warmup=5, ema=0.99, threads=1, shard=shard, **often)
    autoencoder = var.AutoencoderSettings(width=16, multipliers=(1, 1), patch=4, blocks=1, groups=8)
    transformer = var.TransformerSettings(depth=2, dim=32, num_heads=2, dropout=0.1, drop_path=0.1)
    pyramid = var.PyramidSettings(codebook_size=32, code_dim=8, standardize=True)
    settings = {"num_classes": 5, "autoencoder": autoencoder, "transformer": transformer, "pyramid": pyramid}
    system = var.build(var.tiny(**settings), seed=1)
    if kind == "tokenizer":
        loss = TokenizerLoss(quantize_start=0.1, drop_scales=0.3, restart_every=20)
        ns.train_tokenizer(system, Noise(40, 0), config, out=out, val=Noise(8, 1), loss=loss)
    else:
        ns.train_model(system, Noise(40, 0), config, out=out, val=Noise(8, 1))


def main(
    kills: int = 20,
    steps: int = 200,
    kinds: tuple[Kind, ...] = ("tokenizer", "generator"),
    processes: tuple[int, ...] = (1, 2),
    shard: tuple[bool, ...] = (False, True),
    seed: int = 0,
    worker: Path | None = None,
) -> None:
    """Kill and resume; see the head of the file.

    Args:
        kills: of each kind and number of processes
        steps: of a run
        kinds: what is trained
        processes: in how many processes
        shard: with weights whole, or in pieces (generators, several processes)
        seed: of the moments
        worker: train into this folder instead (what this program starts)
    """
    if worker is not None:
        train(kinds[0], worker, steps, shard[0])
        end_process()  # as `nextscale train` does
        return
    rng, failures = random.Random(seed), 0
    with tempfile.TemporaryDirectory() as folder:
        for kind, count, pieces in itertools.product(kinds, processes, shard):
            if pieces and (kind == "tokenizer" or count == 1):
                continue
            name = f"{kind}, {count} processes" + ", sharded" * pieces
            whole = Path(folder) / name
            begun = time.perf_counter()
            finish(start(kind, whole, steps, count, pieces))
            length = time.perf_counter() - begun
            same, moments = 0, []
            for i in tqdm(range(kills), desc=name):
                out = Path(folder) / f"{name}, {i}"
                run = start(kind, out, steps, count, pieces)
                moments.append(kill(run, rng.uniform(0.3, 0.9) * length, rng, out))
                readable(out)
                finish(start(kind, out, steps, count, pieces))
                same += equal(whole, out)
            failures += kills - same
            values = {
                "kills": kills,
                "same_bits": same,
                "killed_after_step": sorted(moments),
                "run_s": round(length, 1),
            }
            print(json.dumps({"measure": name, **values}), flush=True)
    if failures:
        sys.exit(f"{failures} runs did not end in the bits of the undisturbed one")


def start(kind: Kind, out: Path, steps: int, count: int, shard: bool) -> list[subprocess.Popen[str]]:
    """The processes of one run, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, "--worker", str(out), "--kinds", kind, "--steps", str(steps)]
    command += ["--shard", str(shard)]
    team = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} if count > 1 else {}
    return [
        subprocess.Popen(
            command,
            env=os.environ | team | {"RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]


def finish(run: list[subprocess.Popen[str]]) -> None:
    """Wait for a run that must end well."""
    outputs = [process.communicate()[0] for process in run]
    for process, output in zip(run, outputs, strict=True):
        if process.returncode:
            raise RuntimeError(f"a run failed with {process.returncode}: {output[-2000:]}")


def kill(run: list[subprocess.Popen[str]], after: float, rng: random.Random, out: Path) -> int:
    """SIGKILL for one process after so many seconds, then for the others; returns the step of the last checkpoint."""
    time.sleep(after)
    rng.shuffle(run)
    for process in run:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    return max((int(path.parent.name) for path in (out / "checkpoints").glob("0*/state.json")), default=0)


def readable(out: Path) -> None:
    """Raises if a checkpoint that counts as complete cannot be read."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Checkpoints(out / "checkpoints", keep=2).newest()


def equal(a: Path, b: Path) -> bool:
    """Whether two runs ended in the same bits, averaged weights and all that training carries."""
    states = [state(out) for out in (a, b)]
    return states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][name], states[1][name]) for name in states[0]
    )


def state(out: Path) -> dict[str, Tensor]:
    """All tensors of a run's newest checkpoint."""
    found = Checkpoints(out / "checkpoints", keep=2).newest()
    assert found is not None
    return {name: tensor for file in found.files for name, tensor in load_file(found.path / file).items()}


if __name__ == "__main__":
    tyro.cli(main)
