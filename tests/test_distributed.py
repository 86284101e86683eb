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


def test_sharded_and_recomputed_training_gives_the_same_update_and_changes_hands(tmp_path):
    """FSDP2 on two processes, and activations computed again; a run goes from one to the other in the middle."""
    variants = {"one": ((), 1), "again": (("recompute=true",), 1), "sharded": (("shard=true", "recompute=true"), 2)}
    for name, (settings, processes) in variants.items():
        train("generator", tmp_path / name, *settings, processes=processes)
    for name in ("again", "sharded"):
        assert_same_update(tmp_path / name, tmp_path / "one")
    for name, (first, second) in {"to one": (2, 1), "to two": (1, 2)}.items():
        out = tmp_path / name
        for processes in (first, second):
            steps = ("stop_after=6",) if processes == first else ()
            settings = ("shard=true",) if processes == 2 else ()
            train("generator", out, *settings, *steps, processes=processes)
            if steps:  # each process wrote its own pieces
                files = sorted(path.name[:11] for path in (out / "checkpoints" / "00000006").glob("*.safetensors"))
                assert files == ["shard-00001", "shard-00002"][:processes]
        assert_same_update(out, tmp_path / "one")
    with pytest.raises(ValueError, match="tokenizers are small"):
        train("tokenizer", tmp_path / "t", "shard=true")


def test_sharded_training_of_a_changed_system_keeps_the_changes(tmp_path):
    train("changed", tmp_path / "one")
    train("changed", tmp_path / "two", "shard=true", processes=2)
    assert_same_update(tmp_path / "two", tmp_path / "one")
    changes = [[change.recipe for change in ns.load(tmp_path / name / "system").changes] for name in ("one", "two")]
    assert changes == [["inside", "fastvar"]] * 2


def test_recomputed_activations_give_the_same_update(tmp_path):
    train("generator", tmp_path / "one")
    train("generator", tmp_path / "again", "recompute=true")
    assert_same_update(tmp_path / "again", tmp_path / "one")


def wait_for(process: subprocess.Popen, out: Path, lines: int) -> None:
    """Until the run has logged so many lines."""
    log = out / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and len(log.read_text().splitlines()) >= lines):
        time.sleep(0.05)


def test_two_processes_stop_together_and_go_on(tmp_path):
    settings = "steps=60", "validate_every=30", "save_every=10"
    train("generator", tmp_path / "whole", *settings, processes=2)
    process = start("generator", tmp_path / "asked", *settings)
    wait_for(process, tmp_path / "asked", lines=8)
    process.send_signal(signal.SIGTERM)  # torchrun hands it on
    process.communicate(timeout=120)
    assert process.returncode != 0 and not (tmp_path / "asked" / "system").exists()
    assert list((tmp_path / "asked" / "checkpoints").glob("*/state.json"))
    train("generator", tmp_path / "asked", *settings, processes=2)
    assert torch.equal(weights(tmp_path / "asked"), weights(tmp_path / "whole"))
    # One of two is killed, torchrun starts both again, and they go on.
    process = start("generator", tmp_path / "killed", *settings, restarts=1)
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
