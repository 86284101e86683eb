"""How much of the speed of this machine's convolutions tokenizer training reaches. Prints one line of JSON.

python benchmarks/tokenizer.py --batch 32
"""

from __future__ import annotations

import json
import time
from typing import Literal

import torch
import tyro
from torch.nn.functional import conv2d

from nextscale.cli.bench import fastest
from nextscale.draws import BatchPart, Draws, generator_for
from nextscale.recipes.generators import var
from nextscale.training.config import TokenizerLoss, TrainConfig
from nextscale.training.memory import keep_freed_memory
from nextscale.training.tokenizer_task import TokenizerTask


def main(batch: int = 32, steps: int = 10, precision: Literal["float32", "bfloat16"] = "float32") -> None:
    """Time training steps of emoji-64's tokenizer: encoder, pyramid, decoder, losses, optimizer.

    Args:
        batch: images a step
        steps: timed, after three that are not; the fastest counts
        precision: of convolutions
    """
    keep_freed_memory()  # as `nextscale train` does
    system = var.build(var.emoji_64(), model=False)
    height, width = system.image_size
    config = TrainConfig(steps=steps + 3, batch_size=batch, precision=precision)
    loss = TokenizerLoss(quantize_start=0.0, init_codes=False)
    images = torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1
    task = TokenizerTask(system.tokenizer, system.schedule, config, loss, None, lambda: images)
    task.module.train()
    times = []
    for i in range(steps + 3):
        part = BatchPart({"image": images}, Draws(generator_for(0, i), batch, slice(0, batch)))
        begun = time.perf_counter()
        task.step([part], i)
        times.append(time.perf_counter() - begun)
    seconds = min(times[3:])
    peak, speed = convolution_peak(getattr(torch, precision)), task.flop_per_image * batch / seconds / 1e9
    report = {"batch": batch, "precision": precision, "seconds": seconds, "images_per_s": batch / seconds}
    report |= {"gflops": speed, "peak_gflops": peak, "share": speed / peak, "threads": torch.get_num_threads()}
    print(json.dumps({name: round(value, 4) if isinstance(value, float) else value for name, value in report.items()}))


@torch.no_grad()
def convolution_peak(dtype: torch.dtype) -> float:
    """Most GFLOP a second of 3x3 convolutions of several shapes."""

    def speed(channels: int, side: int) -> float:
        images, weight = (
            torch.randn(32, channels, side, side, dtype=dtype),
            torch.randn(channels, channels, 3, 3, dtype=dtype),
        )
        flop = 2 * 9 * channels**2 * side**2 * len(images)
        return fastest(lambda: conv2d(images, weight, padding=1), flop, repeats=8)

    return max(speed(channels, side) for channels, side in ((96, 16), (192, 16), (128, 32), (256, 32)))


if __name__ == "__main__":
    tyro.cli(main)
