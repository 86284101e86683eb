"""What training tells glibc, and what it looks at before it takes memory."""

import os
import subprocess
import sys
import time
from contextlib import nullcontext

import pytest
import torch

import nextscale as ns
from nextscale.recipes.generators import var
from nextscale.training import memory
from nextscale.training.config import TokenizerLoss, TrainConfig

PROGRAM = """
import resource
import torch
from nextscale.training.memory import keep_freed_memory
keep_freed_memory()
def step():
    first = [torch.ones(6 << 20) for _ in range(8)]  # of 24 MB each
    return [x + 1 for x in first]
for _ in range(5):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(**environment: str) -> int:
    """Page faults of steps that make and drop 384 MB of tensors, after as many steps before them."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=clean | environment, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux" or "glibc" not in os.confstr("CS_GNU_LIBC_VERSION"), reason="needs glibc")
def test_freed_memory_is_kept_for_the_next_step():
    """Each page that comes back from the system is a fault: hundreds of thousands, or few."""
    assert faults(MALLOC_TRIM_THRESHOLD_="131072") > 200_000  # what the user said holds
    assert faults() < 50_000


@pytest.mark.parametrize(
    ("trained", "changes", "settings", "refused"),
    [
        ("tokenizer", {}, {}, False),
        ("model", {}, {}, False),
        ("tokenizer", {}, {"batch_size": 1_000_000}, True),
        ("model", {}, {"batch_size": 1_000_000}, True),
        ("model", {}, {"batch_size": 1_000_000, "recompute": True}, False),
        ("tokenizer", {"autoencoder": {"width": 4096, "multipliers": (64, 64)}}, {}, True),
        ("model", {"transformer": {"depth": 100, "dim": 65536}}, {}, True),
        ("tokenizer", {"autoencoder": {"multipliers": (1,) * 10}}, {"batch_size": 4}, True),  # of 8192 x 8192 pixels
    ],
)
def test_a_shape_that_cannot_fit_is_refused_before_it_is_built(trained, changes, settings, refused, monkeypatch):
    monkeypatch.setattr(memory, "machine_memory", lambda: 16e9)
    tiny = var.tiny().model_dump()
    shape = var.Config.model_validate(tiny | {name: tiny[name] | change for name, change in changes.items()})
    begun = time.process_time()
    with pytest.raises(ValueError, match="GB or more, and this machine has 16") if refused else nullcontext():
        memory.built_to_train(lambda: var.build(shape), trained, TrainConfig(**settings))
    assert time.process_time() - begun < 10


def test_a_discriminator_that_cannot_fit_is_refused_before_it_is_built(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "machine_memory", lambda: 16e9)
    loss = TokenizerLoss(adversarial=1, discriminator_width=4096)
    data = [{"image": torch.zeros(3, 64, 64)}]
    with pytest.raises(ValueError, match=r"training this discriminator takes .* GB or more, and this machine has 16"):
        ns.train_tokenizer(var.build(var.tiny()), data, TrainConfig(steps=1), out=tmp_path / "run", loss=loss)
    assert not (tmp_path / "run").exists()
