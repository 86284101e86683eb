"""A run's folder to a system, before the run has ended or from an earlier checkpoint of it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from nextscale.checkpoint import load, save
from nextscale.modules import as_module
from nextscale.settings import brief
from nextscale.training.checkpoints import Checkpoint, Checkpoints

START = "start"  # in a run's folder: the system as it was before training, all but what the checkpoints hold


def export_run(path: str | os.PathLike[str], to: str | os.PathLike[str]) -> Path:
    """Make a system of the best checkpoint of a run (the newest, where nothing was validated), or of a given one; returns `to`.

    Args:
        path: the folder of a run, or of a checkpoint in it.
        to: the folder to write, which must not hold a system.

    The weights are the averaged ones, if the run averages them. Raises ValueError and FileNotFoundError for what is no run.
    """
    path, to = Path(path), Path(to)
    run = path.parent.parent if (path / "state.json").is_file() else path
    checkpoints = Checkpoints(run / "checkpoints", keep=1)
    complete = {found.path.resolve(): found for found in checkpoints.all()}
    if not complete:
        raise FileNotFoundError(
            f"{path} has no checkpoint that can be read; expected the folder of a run of `nextscale train`"
        )
    chosen = complete.get(path.resolve()) if run != path else max(complete.values(), key=_goodness)
    start = next((run / name for name in (START, "system") if (run / name / "config.json").is_file()), None)
    if chosen is None or start is None:
        raise FileNotFoundError(
            f"{path} is no checkpoint in the folder of a run; expected runs/NAME/checkpoints/{'0' * 8}"
        )
    if (to / "config.json").exists():
        raise ValueError(f"{to} holds a system already; choose another folder, or delete that one first")
    if not checkpoints.sound(chosen):
        raise ValueError(f"the checkpoint {chosen.path} is damaged; take another one of that run")
    system = load(start)
    shapes = chosen.shapes()
    tokenizer = any(name.startswith("module.tokenizer.") for name in shapes)
    prefixes: dict[str, object] = {"tokenizer.": system.tokenizer} if tokenizer else {"": system.model}
    if not tokenizer and any(name.startswith("module.model.") for name in shapes):  # with parts that train beside it
        prefixes = {"model.": system.model} | {f"parts.{name}.": part for name, part in system.parts.items()}
    for prefix, part in prefixes.items():
        _fill(chosen, shapes, prefix, as_module(part))
    return save(system, to)


def _goodness(found: Checkpoint) -> tuple[bool, float, int]:
    return found.score is not None, found.score or 0.0, found.step


def _fill(found: Checkpoint, shapes: dict[str, tuple[int, ...]], prefix: str, module: torch.nn.Module) -> None:
    """Read a part's weights out of a checkpoint: averaged ones where there are such."""
    state = module.state_dict()
    names = {}
    for name, tensor in state.items():
        places = [f"{kind}.{prefix}{name}" for kind in ("average", "module") if f"{kind}.{prefix}{name}" in shapes]
        if not places and prefix.startswith("parts."):  # a part that does not train
            continue
        if not places or tuple(shapes[places[0]]) != tuple(tensor.shape):
            raise ValueError(
                f"the checkpoint {found.path} does not hold {brief(name)} as the system that the run began with has it "
                "(adapters of --lora are merged when a run ends); let the run end, and use its folder"
            )
        names[name] = places[0]
    tensors = {place: torch.empty(shapes[place], dtype=state[name].dtype) for name, place in names.items()}
    found.fill(tensors)
    module.load_state_dict(state | {name: tensors[place] for name, place in names.items()}, assign=True)


def keep_start(system: torch.nn.Module, run: Path) -> None:
    """Write what `export_run` needs beside a checkpoint, once."""
    if not (run / START / "config.json").exists():
        save(system, run / START)  # type: ignore[arg-type]


def forget_start(run: Path) -> None:
    """Remove it when the run's own system is there, which serves as well."""
    shutil.rmtree(run / START, ignore_errors=True)
