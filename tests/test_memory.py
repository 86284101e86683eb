"""What training tells glibc, and when it does not."""

import os
import subprocess
import sys

import pytest

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
