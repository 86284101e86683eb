"""What a run says and leaves to look at: `metrics.jsonl`, TensorBoard, pictures, progress. The names are the same in all."""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from nextscale.data.images import save_images
from nextscale.files import atomic_write, check_readable
from nextscale.pixels import on_white, to_uint8
from nextscale.progress import Bar, say


class RunLog:
    """Writes the metrics and pictures of one run into its folder."""

    def __init__(
        self, out: Path, steps: int, description: str, first: int = 0, silent: bool = False, wandb: str = ""
    ) -> None:
        self.steps, self.first, self.description, self.silent = steps, first, description, silent
        self._sounding: set[str] = set()
        if silent:  # of several processes one writes
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and needed by training alone

        out.mkdir(parents=True, exist_ok=True)
        self.out = out
        self._path = out / "metrics.jsonl"
        if self._path.exists():  # what a stopped run logged after its last checkpoint will be logged again
            self._forget(first)
        self._lines = self._path.open("a", encoding="utf-8")
        self._wandb = _start_wandb(wandb, out, description) if wandb else None
        self._board = SummaryWriter(str(out / "tensorboard"), purge_step=first + 1)

    def _forget(self, first: int) -> None:
        """Drop the lines after a step, and those that are none; of these, but for one that a kill cut off, a copy stays."""
        check_readable(self._path, "the run's own metrics")
        content = self._path.read_bytes()
        steps = [_step_of(line) for line in content.splitlines()]
        if any(step is None for step in steps[:-1]):
            with atomic_write(copy_name(self._path)) as copy:
                copy.write_bytes(content)
            warnings.warn(
                f"{self._path} has lines that are no metrics; they are in {copy_name(self._path)}", stacklevel=4
            )
        kept = [
            line for line, step in zip(content.splitlines(), steps, strict=True) if step is not None and step <= first
        ]
        with atomic_write(self._path) as temporary:
            temporary.write_bytes(b"".join(line + b"\n" for line in kept))

    def _write(self, step: int, **values: Any) -> None:
        """A line of metrics.jsonl; a file that somebody took away is made again."""
        if not self._path.exists():
            self._lines.close()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._lines = self._path.open("a", encoding="utf-8")
        self._lines.write(json.dumps({"step": step, "time": round(time.time(), 1), **values}) + "\n")
        self._lines.flush()

    def facts(self, **facts: Any) -> None:
        """A line of what is known before the first step."""
        if not self.silent and not self.first:
            self._write(0, **facts)

    def say(self, text: str) -> None:
        """A line on the terminal."""
        if not self.silent:
            say(text)

    def progress(self) -> Progress:
        """How far the run is; it begins at the step that the run goes on with."""
        return Progress(self.steps, self.first, self.description, self.silent)

    def scalars(self, step: int, metrics: Mapping[str, Tensor | float], split: str) -> None:
        """One line of metrics.jsonl, the same values to TensorBoard; names are `split/metric`."""
        if self.silent:
            return
        values = {f"{split}/{name}": float(value) for name, value in metrics.items()}
        self._write(step, **values)
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log({"step": step, **values})

    def alarms(self, step: int, sentences: list[str]) -> None:
        """Say what has gone wrong: once on the terminal as long as it lasts, each time in metrics.jsonl (`alarm`)."""
        if self.silent:
            return
        for sentence in sentences:
            self._write(step, alarm=sentence)
            what = sentence.partition(":")[0]  # numbers change from line to line
            if what not in self._sounding:
                say(f"step {step}: {sentence}")
                self._board.add_text("alarm", sentence, step)
        self._sounding = {sentence.partition(":")[0] for sentence in sentences}

    def pictures(self, step: int, pictures: dict[str, Shown]) -> None:
        """`pictures/<name>-<step>.png`, and the same in TensorBoard."""
        if self.silent:
            return
        for name, shown in pictures.items():
            images, file = shown.images, self.out / "pictures" / f"{name}-{step:06d}.png"
            title = f"{name} after {step} of {self.steps} steps"
            path = save_images(images, file, columns=shown.columns, labels=shown.labels, title=title)
            if self._wandb is not None:
                import wandb

                self._wandb.log({"step": step, name: wandb.Image(str(path))})
            self._board.add_images(name, to_uint8(on_white(images)), step)

    def close(self) -> None:
        if self.silent:
            return
        if self._wandb is not None:
            self._wandb.finish()
        self._lines.close()
        self._board.close()


def _start_wandb(project: str, out: Path, description: str) -> Any:
    """A run of Weights & Biases, the same one again after a resume. It works offline with WANDB_MODE=offline."""
    import wandb

    name = hashlib.blake2b(str(out.resolve()).encode(), digest_size=8).hexdigest()
    run = wandb.init(project=project, name=out.name, group=description, dir=str(out), id=name, resume="allow")
    run.define_metric("*", step_metric="step")  # our own steps: a resumed run logs some again
    return run


class Shown(NamedTuple):
    """Images to look at, [N, C, H, W], so many in a row, with a text below each."""

    images: Tensor
    columns: int
    labels: list[str] | None = None


class Progress:
    """How far a run is, with its last loss, and what it does besides steps."""

    def __init__(self, steps: int, first: int, description: str, silent: bool) -> None:
        self.description = description
        self.bar = Bar(total=steps, initial=first, desc=description, unit="step", silent=silent, tells_end=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def update(self) -> None:
        """One step more."""
        self.bar.update()

    def show_loss(self, loss: float) -> None:
        """What stands beside the step from now on."""
        if self.bar.plain:
            self.bar.beside = f", loss {loss:.4f}"
        else:
            self.bar.set_postfix(loss=f"{loss:.4f}")

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Say what is done instead of a step for as long as the block lasts."""
        if self.bar.plain:
            self.bar.line(f", {what}")
            yield
            return
        self.bar.set_description(f"{self.description}: {what}")
        try:
            yield
        finally:
            self.bar.set_description(self.description)


def copy_name(path: Path) -> Path:
    """Where lines that are no metrics stay."""
    return path.with_suffix(".damaged.jsonl")


def _step_of(line: bytes) -> float | None:
    """The step of a line of metrics; None of a line that is none: one that a kill cut off, or somebody edited."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if isinstance(step, int | float) and not isinstance(step, bool) else None
