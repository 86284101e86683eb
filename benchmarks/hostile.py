"""Feed nextscale what users mistake and strangers make: some 700 inputs, each in a process and a folder of its own.

    python benchmarks/hostile.py
    python benchmarks/hostile.py --only "config|shards" --verbose

The cases are in hostile_cases.py. A case that must be refused has to end in one sentence (exit status 2, or an exception of our
own in Python); one that must work has to leave whole files. No case may end in a traceback, take more than 60 s of CPU or 4 GB,
execute what a file holds, change its inputs, leave something half-written, or pass in silence where something was dropped.
Prints a line for each fault and a table; exit status 0 only without faults.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}

import numpy as np
import torch
import tyro
from hostile_cases import Case, cases, make_parts
from PIL import Image
from safetensors import safe_open

from nextscale import cli

CPU_SECONDS, WALL_SECONDS, MOST_BYTES = 60, 120, 4 * 10**9
LONGEST = 700  # characters of a message
EXPECTED = (ValueError, TypeError, OSError, ImportError, FloatingPointError)
PACKAGE = str(Path(cli.__file__).parents[1])


@dataclass
class Outcome:
    """What became of a case."""

    faults: list[str]
    last_line: str
    cpu: float = 0.0
    bytes: int = 0
    lines: list[str] = field(default_factory=list)


def main(only: str = "", jobs: int = 1, verbose: bool = False, json_out: Path | None = None) -> None:
    """Run the cases and print what is wrong.

    Args:
        only: regular expression; cases whose `kind: name` it finds are run
        jobs: cases at a time
        verbose: print the last line of every case
        json_out: write the outcome of every case here
    """
    chosen = [case for case in cases() if re.search(only, f"{case.kind}: {case.name}")]
    found: dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory(prefix="hostile-") as folder:
        parts = make_parts(Path(folder) / "parts")
        for case, outcome in run_all(chosen, parts, Path(folder), jobs):
            found[f"{case.kind}: {case.name}"] = outcome
            if outcome.faults or verbose:
                said = "; ".join(outcome.faults) or "as wanted"
                print(f"{case.kind}: {case.name}: {said}\n    {outcome.last_line[:300]}", flush=True)
    print(table(chosen, found))
    if json_out is not None:
        json_out.write_text(json.dumps({name: vars(outcome) for name, outcome in found.items()}, indent=1) + "\n")
    sys.exit(any(outcome.faults for outcome in found.values()))


def table(chosen: list[Case], found: dict[str, Outcome]) -> str:
    """Cases and faults of each kind."""
    total = Counter(case.kind for case in chosen)
    bad = Counter(name.partition(": ")[0] for name, outcome in found.items() if outcome.faults)
    rows = [f"{kind:<12}{total[kind]:>6} cases{bad[kind]:>5} faults" for kind in total]
    cpu, most = (max((getattr(o, name) for o in found.values()), default=0) for name in ("cpu", "bytes"))
    rows.append(f"{'all':<12}{sum(total.values()):>6} cases{sum(bad.values()):>5} faults")
    return "\n".join([*rows, f"most of one case: {cpu:.1f} s of CPU, {most / 1e9:.2f} GB"])


def run_all(chosen: list[Case], parts: Path, folder: Path, jobs: int) -> Any:
    """Run cases, some at a time; yields each with its outcome."""
    torch.set_num_threads(1)
    running: dict[int, tuple[Case, Trial]] = {}
    waiting = list(enumerate(chosen))
    while waiting or running:
        while waiting and len(running) < jobs:
            number, case = waiting.pop(0)
            trial = Trial(case, folder / f"case-{number}", parts)
            running[trial.pid] = case, trial
        for pid, (case, trial) in list(running.items()):
            if (outcome := trial.poll()) is not None:
                del running[pid]
                yield case, outcome
        time.sleep(0.005)


def run_one(case: Case, parts: Path, folder: Path) -> Outcome:
    """Run one case."""
    return next(iter(run_all([case], parts, folder, 1)))[1]


class Trial:
    """A case that is running, in a child that was forked: torch is loaded once."""

    def __init__(self, case: Case, folder: Path, parts: Path) -> None:
        self.case, self.folder, self.begun = case, folder, time.monotonic()
        self.home = folder / "home"  # where the case runs
        self.home.mkdir(parents=True)
        self.canary = folder / "canary"
        # The case's files are made in the child too, so that none of their memory stays here.
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._child(parts)

    def _child(self, parts: Path) -> None:
        os.setsid()  # so that what it starts ends with it
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with open(self.folder / "out", "wb") as out, open(self.folder / "err", "wb") as err:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            sys.stdout = open(1, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
            sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
            os.chdir(self.home)
            os.environ["HOSTILE_CANARY"] = str(self.canary)
            status = 70
            try:
                self.case.build(parts, self.home)
                (self.folder / "before").write_text(json.dumps(snapshot(self.home)))
                status = self._run()
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)

    def _run(self) -> int:
        if self.case.call is None:
            try:
                return cli.main(list(self.case.words))
            except SystemExit as end:  # after --help
                return int(end.code or 0)
        try:
            self.case.call(self.home)
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            ours = [frame for frame in frames if frame.filename.startswith(PACKAGE)]
            if ours and frames[-1] is ours[-1] and isinstance(error, EXPECTED):
                print("error:", " ".join(str(error).split()), file=sys.stderr)
                return 2
            traceback.print_exc()
            return 1
        return 0

    def poll(self) -> Outcome | None:
        """The outcome, once there is one."""
        pid, status, usage = os.wait4(self.pid, os.WNOHANG)
        late = time.monotonic() - self.begun > WALL_SECONDS
        if pid == 0 and not late:
            return None
        if pid == 0:
            os.killpg(self.pid, signal.SIGKILL)
            _, status, usage = os.wait4(self.pid, 0)
        outcome = self._judge(status, usage, late)
        shutil.rmtree(self.folder, ignore_errors=True)
        return outcome

    def _judge(self, status: int, usage: Any, late: bool) -> Outcome:
        text = (self.folder / "err").read_text(encoding="utf-8", errors="replace")
        lines = [line for line in text.replace("\r", "\n").splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error: ")]
        warned = any(line.startswith("warning: ") or "Warning: " in line for line in lines)
        code = os.waitstatus_to_exitcode(status)
        cpu, memory = usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024
        after, path = snapshot(self.home), self.folder / "before"
        before = json.loads(path.read_text()) if path.exists() else {}
        new = sorted(set(after) - set(before))
        faults = []
        if code < 0 or late:
            faults.append("hangs" if late else f"ended by signal {-code}")
        elif code == 70 and not errors:
            faults.append("the case itself is broken")
        if "Traceback" in text or any("internal error" in line for line in errors):
            faults.append("traceback")
        if cpu > CPU_SECONDS or memory > MOST_BYTES:
            faults.append(f"takes {cpu:.0f} s, {memory / 1e9:.1f} GB")
        if self.canary.exists():
            faults.append("EXECUTED what a file held")
        kept = [name for name in before if not name.startswith(self.case.outputs)]
        if changed := [name for name in kept if after.get(name) != before[name]]:
            faults.append(f"changed {changed[0]}")
        judged = self.case.words[:1] == ("check-run",) and code == 1  # a curve that leaves its band
        if code not in (0, 70) and not judged and not faults:
            if code != 2 or len(errors) != 1:
                faults.append(f"status {code} with {len(errors)} lines of error")
            if len(lines[-1:]) and len(lines[-1]) > LONGEST:
                faults.append(f"a message of {len(lines[-1])} characters")
        if self.case.wanted == "refuse" and code == 0:
            faults.append("silent" if not warned else "only warned")
        if self.case.wanted == "warn" and code == 0 and not warned:
            faults.append("silent")
        if self.case.wanted in ("work", "warn") and code not in (0, -1):
            faults.append("refused what is right")
        if self.case.wanted == "refuse" and code == 2 and (left := [name for name in new if not _may_stay(name)]):
            faults.append(f"left {left[0]}")
        if half := [name for name in new if not whole(self.home / name)]:
            faults.append(f"half-written {half[0]}")
        if self.case.says and not re.search(self.case.says, text):
            faults.append(f"does not say {self.case.says!r}")
        return Outcome(faults, lines[-1] if lines else "", cpu, memory, lines if faults else [])


def _may_stay(name: str) -> bool:
    """What a training that was refused may leave: what it was asked, and nothing that looks like a result."""
    return name.endswith(("data.json", ".lock", "run.json", "metrics.jsonl"))


def snapshot(folder: Path) -> dict[str, str]:
    """Every file below a folder with a digest of its content."""
    found = {}
    for place, _, names in os.walk(os.fsencode(folder)):
        for name in names:
            path = os.path.join(place, name)
            if os.path.isfile(path) and not os.path.islink(path):
                key = os.fsdecode(os.path.relpath(path, os.fsencode(folder))).encode(errors="backslashreplace").decode()
                found[key] = hashlib.blake2b(Path(os.fsdecode(path)).read_bytes(), digest_size=16).hexdigest()
    return found


def whole(path: Path) -> bool:
    """Whether a file that was written can be read to its end."""
    readers: dict[str, Callable[[], Any]] = {
        ".png": lambda: Image.open(path).load(),
        ".jpg": lambda: Image.open(path).load(),
        ".npz": lambda: [np.load(path)[name] for name in np.load(path)],
        ".json": lambda: json.loads(path.read_text()),
        ".safetensors": lambda: safe_open(str(path), "pt").keys(),
    }
    if path.name.startswith(".") and path.name != ".lock":  # as writes that are not done yet are called
        return False
    try:
        readers.get(path.suffix, lambda: None)()
    except Exception:
        return False
    return True


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
