"""Two processes, or two passes that share a batch, end in the weights of one process with one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from train_small import main

import nextscale as ns
from nextscale.draws import Draws
from nextscale.processes import Team

SCRIPT = str(Path(__file__).parent / "train_small.py")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def start(kind: str, out: Path, *settings: str, restarts: int = 0) -> subprocess.Popen:
    """Two processes of `train_small.py`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", str(restarts), SCRIPT, kind, str(out), *settings]
    # As docs/several-machines.md says: else processes that are started again find the addresses of dead ones.
    environment = ENVIRONMENT | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def train(kind: str, out: Path, *settings: str, processes: int = 1) -> None:
    """Train to the end; one process is this one."""
    if processes == 1:
        main(kind, str(out), *settings)
        return
    process = start(kind, out, *settings)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output


def weights(out: Path) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in ns.load(out / "system").parameters()])


def assert_same_update(out: Path, other: Path) -> None:
    """Sums in another order round otherwise. Where a gradient is nothing but rounding (biases before a norm), Adam turns it
    into steps of up to lr, here 1e-4 in all, of a few numbers (measured: 3e-6, mean 1e-9; another CPU: 1.5e-5). A wrong
    gradient would move all numbers by about that.
    """
    difference = (weights(out) - weights(other)).abs()
    assert difference.max() < 1e-4 and difference.mean() < 1e-7


KINDS = ["tokenizer", "flexvar", "adversarial", "generator"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder with a run of each kind, by two processes, which take longer to start than to train."""
    out = tmp_path_factory.mktemp("shared")
    train(",".join(KINDS), out, processes=2)
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_and_two_passes_give_the_same_update(tmp_path, shared, kind):
    one, runs = tmp_path / "one", [shared / kind]
    train(kind, one)
    if kind != "adversarial":  # whose scale and batch norm see one pass: docs/several-machines.md
        runs.append(tmp_path / "passes")
        train(kind, runs[-1], "accumulate=2")
    for run in runs:
        assert_same_update(run, one)
    losses = {}
    for run in (one, shared / kind):  # one log, of means over processes
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses[run] = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(losses[one]) == 12 and losses[shared / kind] == pytest.approx(losses[one], abs=1e-5)


def test_sharded_training_gives_the_same_update_and_keeps_changes(tmp_path):
    """Weights in pieces (FSDP2), and activations computed again."""
    sharded = tmp_path / "sharded"
    train("generator,changed", sharded, "shard=true", "recompute=true", processes=2)
    for kind in ("generator", "changed"):
        train(kind, tmp_path / kind)
        assert_same_update(sharded / kind, tmp_path / kind)
    for out in (tmp_path, sharded):
        changes = ns.load(out / "changed" / "system").changes
        assert [change.recipe for change in changes] == ["inside", "fastvar"]
    with pytest.raises(ValueError, match="tokenizers are small"):
        train("tokenizer", tmp_path / "t", "shard=true")


@pytest.mark.parametrize("first, second", [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_a_run_changes_hands_in_the_middle(tmp_path, first, second):
    out = tmp_path / "run"
    train("generator", tmp_path / "one")
    for processes in (first, second):
        steps = ("stop_after=6",) if processes == first else ()
        settings = ("shard=true",) if processes == 2 else ()
        train("generator", out, *settings, *steps, processes=processes)
        if steps:  # each process wrote its own pieces
            files = sorted(path.name[:11] for path in (out / "checkpoints" / "00000006").glob("*.safetensors"))
            assert files == ["shard-00001", "shard-00002"][:processes]
    assert_same_update(out, tmp_path / "one")


def test_recomputed_activations_give_the_same_update(tmp_path):
    train("generator", tmp_path / "one")
    train("generator", tmp_path / "again", "recompute=true")
    assert_same_update(tmp_path / "again", tmp_path / "one")


def wait_for(process: subprocess.Popen, out: Path, lines: int) -> None:
    """Until the run has logged so many lines."""
    log = out / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and len(log.read_text().splitlines()) >= lines):
        time.sleep(0.05)


LONG = "steps=60", "validate_every=30", "save_every=10"


def test_two_processes_stop_together_and_go_on(tmp_path):
    train("generator", tmp_path / "whole", *LONG, processes=2)
    process = start("generator", tmp_path / "asked", *LONG)
    wait_for(process, tmp_path / "asked", lines=8)
    process.send_signal(signal.SIGTERM)  # torchrun hands it on
    process.communicate(timeout=120)
    assert process.returncode != 0 and not (tmp_path / "asked" / "system").exists()
    assert list((tmp_path / "asked" / "checkpoints").glob("*/state.json"))
    train("generator", tmp_path / "asked", *LONG, processes=2)
    assert torch.equal(weights(tmp_path / "asked"), weights(tmp_path / "whole"))


@pytest.mark.slow
def test_two_processes_of_which_one_is_killed_go_on(tmp_path):
    """torchrun starts both again."""
    train("generator", tmp_path / "whole", *LONG, processes=2)
    process = start("generator", tmp_path / "killed", *LONG, restarts=1)
    wait_for(process, tmp_path / "killed", lines=20)
    os.kill(int((tmp_path / "killed" / "rank-1").read_text()), signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert torch.equal(weights(tmp_path / "killed"), weights(tmp_path / "whole"))


def test_a_batch_that_cannot_be_shared_is_refused_at_the_door(tmp_path):
    assert Team(1, 2).pieces(8, 2) == [slice(4, 6), slice(6, 8)]
    with pytest.raises(ValueError, match="a batch of 8 cannot be shared by 3 processes x 1 passes"):
        Team(0, 3).pieces(8, 1)
    with pytest.raises(ValueError, match="a batch of 8 cannot be shared by 1 processes x 3 passes"):
        train("generator", tmp_path / "a", "accumulate=3")
    assert not (tmp_path / "a").exists()


def test_draws_of_the_parts_are_those_of_the_whole():
    def draws(rows: slice = slice(None)) -> Draws:
        return Draws(torch.Generator().manual_seed(5), 6, rows)

    def drawn(some: Draws) -> list[torch.Tensor]:
        return [some.rand(3), some.randint(0, 9, 2), some.rand()]

    whole = drawn(draws())
    for rows in (slice(0, 2), slice(2, 6)):
        part = draws(rows)
        assert len(part) == rows.stop - rows.start
        for got, all_rows in zip(drawn(part), whole, strict=True):
            assert torch.equal(got, all_rows[rows])


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits():
    """The short form of `python benchmarks/kill_resume.py --kills 20`."""
    script = Path(__file__).parent.parent / "benchmarks" / "kill_resume.py"
    command = [sys.executable, str(script), "--kills", "1", "--steps", "60", "--processes", "1"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["same_bits"] for line in lines] == [1, 1]
