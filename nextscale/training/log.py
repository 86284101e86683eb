"""What a run leaves to look at: `metrics.jsonl`, TensorBoard, pictures, a progress bar. The names are the same in all."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from nextscale.data.images import save_images
from nextscale.files import atomic_write
from nextscale.pixels import on_white, to_uint8


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
        path = out / "metrics.jsonl"
        if path.exists():  # what a stopped run logged after its last checkpoint will be logged again
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= first]
            with atomic_write(path) as temporary:
                temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        self._lines = path.open("a", encoding="utf-8")
        self._wandb = _start_wandb(wandb, out, description) if wandb else None
        self._board = SummaryWriter(str(out / "tensorboard"), purge_step=first + 1)

    def progress(self) -> Any:
        """The bar; it begins at the step that the run goes on with."""
        return tqdm(
            total=self.steps,
            initial=self.first,
            desc=self.description,
            unit="step",
            dynamic_ncols=True,
            disable=self.silent,
        )

    def scalars(self, step: int, metrics: Mapping[str, Tensor | float], split: str) -> None:
        """One line of metrics.jsonl, the same values to TensorBoard; names are `split/metric`."""
        if self.silent:
            return
        values = {f"{split}/{name}": float(value) for name, value in metrics.items()}
        self._lines.write(json.dumps({"step": step, "time": round(time.time(), 1), **values}) + "\n")
        self._lines.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log({"step": step, **values})

    def alarms(self, step: int, sentences: list[str]) -> None:
        """Say what has gone wrong: once on the terminal as long as it lasts, each time in metrics.jsonl (`alarm`)."""
        if self.silent:
            return
        for sentence in sentences:
            self._lines.write(json.dumps({"step": step, "time": round(time.time(), 1), "alarm": sentence}) + "\n")
            what = sentence.partition(":")[0]  # numbers change from line to line
            if what not in self._sounding:
                tqdm.write(f"step {step}: {sentence}", file=sys.stderr)
                self._board.add_text("alarm", sentence, step)
        self._lines.flush()
        self._sounding = {sentence.partition(":")[0] for sentence in sentences}

    def pictures(self, step: int, pictures: dict[str, Tensor]) -> None:
        """`pictures/<name>-<step>.png`, and the same in TensorBoard."""
        if self.silent:
            return
        for name, images in pictures.items():
            path = save_images(images, self.out / "pictures" / f"{name}-{step:06d}.png", columns=16)
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
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("logging to W&B needs the package wandb: pip install 'nextscale[wandb]'") from error
    name = hashlib.blake2b(str(out.resolve()).encode(), digest_size=8).hexdigest()
    run = wandb.init(project=project, name=out.name, group=description, dir=str(out), id=name, resume="allow")
    run.define_metric("*", step_metric="step")  # our own steps: a resumed run logs some again
    return run


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):  # the line that a kill cut off
        return float("inf")
