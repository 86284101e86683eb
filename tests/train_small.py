"""Trains a tiny system on coloured squares into a folder: what several processes run, started by torchrun.

python tests/train_small.py tokenizer|adversarial|flexvar|generator|changed OUT [name=value of TrainConfig ...]

Several kinds with commas between train one after the other, each in the folder of OUT that has its name.
"""

import os
import signal
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from small import small
from test_training import Squares

import nextscale as ns
from nextscale.data.transforms import AugmentSettings
from nextscale.processes import end_process
from nextscale.recipes.decoding import fastvar
from nextscale.recipes.generators import flexvar, var
from nextscale.recipes.guidance import inside
from nextscale.training import fit as loop
from nextscale.training.config import TokenizerLoss, TrainConfig

# No dropout: its draws belong to processes.
LOSS = TokenizerLoss(quantize_start=0.2, drop_scales=0.5, restart_every=4)
LOSSES = {
    "tokenizer": LOSS,
    "adversarial": LOSS.model_copy(
        update={
            "adversarial": 0.5,
            "adversarial_start": 0.3,
            "discriminator_width": 8,
            "lecam": 0.1,
            "consistency": 1.0,
            "augment_pairs": True,
            "adaptive_ema": 0.9,
        }
    ),
    "flexvar": LOSS.model_copy(update={"drop_from": 0}),
}


def main(kind: str, out: str, *settings: str) -> None:
    changes = dict(setting.split("=") for setting in settings)
    stop_after, real = int(changes.pop("stop_after", 0)), loop.set_rates

    def set_rates(optimizers, config, step):
        if step + 1 == stop_after:  # end after so many steps, as if SIGTERM came
            os.kill(os.getpid(), signal.SIGTERM)
        return real(optimizers, config, step)

    often = {"log_every": 1, "validate_every": 6, "save_every": 5}
    config = TrainConfig.model_validate(
        {"steps": 12, "batch_size": 8, "lr": 1e-4, "warmup": 2, "ema": 0.9} | often | changes
    )
    if kind == "flexvar":
        system, data, val = flexvar.build(flexvar.tiny(), seed=3, model=False), Squares(size=128), Squares(8, size=64)
    else:
        pyramid = var.PyramidSettings(codebook_size=32, code_dim=8, standardize=True)
        system = var.build(small(num_classes=3, pyramid=pyramid), seed=3)
        data, val = Squares(size=64), Squares(8, seed=1)
        if kind == "changed":  # by two methods, of which one wraps blocks and the other their branches
            system = fastvar.apply(inside.apply(system, inside.Config(block=0)), fastvar.Config(ratios=(0.5,)))
    augmentation = AugmentSettings(hue=0)
    loop.set_rates = set_rates
    try:
        if kind in LOSSES:
            ns.train_tokenizer(system, data, config, out=out, val=val, loss=LOSSES[kind], augmentation=augmentation)
        else:
            ns.train_model(system, data, config, out=out, val=val, augmentation=augmentation, views=2)
    except SystemExit as end:
        assert stop_after and "which is saved" in str(end)
    finally:
        loop.set_rates = real


if __name__ == "__main__":
    Path(sys.argv[2]).mkdir(parents=True, exist_ok=True)
    (Path(sys.argv[2]) / f"rank-{os.environ['RANK']}").write_text(str(os.getpid()))  # for those who want to kill it
    torch.set_num_threads(1)
    kinds, out, *settings = sys.argv[1:]
    for kind in kinds.split(","):
        main(kind, out if kind == kinds else f"{out}/{kind}", *settings)
    end_process()  # as `nextscale train` does
