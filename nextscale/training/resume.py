"""What a training carries from step to step, as a checkpoint holds it, and how a run goes on from one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from nextscale.checkpoint import explain_mismatch
from nextscale.processes import Team
from nextscale.training.average import Average
from nextscale.training.checkpoints import Checkpoints

if TYPE_CHECKING:
    from nextscale.training.fit import Task

# What may change between two starts of a run: how it runs and reports, not what it computes.
FREE = (
    "accumulate",
    "compile",
    "device",
    "keep",
    "log_every",
    "loss.alarm",
    "loss.dino_weights",
    "loss.lpips_linear",
    "loss.lpips_vgg",
    "most_skipped",
    "peak_tflops",
    "recompute",
    "save_every",
    "shard",
    "system.sampling",
    "threads",
    "validate_every",
    "wandb",
    "workers",
)


def save_state(
    checkpoints: Checkpoints,
    task: Task,
    average: Average | None,
    settings: Mapping[str, Any],
    step: int,
    score: float | None,
) -> None:
    """Write a checkpoint of the state after `step` steps; `settings`: of the run, by name; `score`: of its validation."""
    checkpoints.save(
        _tensors(task, average),
        step,
        score,
        settings=dict(settings),
        averaged=average.count if average else 0,
        scalers={name: scaler.state_dict() for name, scaler in task.scalers.items()},
    )


def resume(
    checkpoints: Checkpoints, task: Task, average: Average | None, settings: Mapping[str, Any], team: Team
) -> int:
    """Load the newest whole checkpoint, if there is one; returns the step to go on with.

    Raises ValueError, and changes nothing, if the run was begun with settings that compute something else, or with another
    model.
    """
    found = checkpoints.newest()
    team.wait()  # all have looked
    if team.leads:
        checkpoints.clear(after=found.step if found else 0)
    if found is None:
        return 0
    _refuse_others(found.facts["settings"], settings, checkpoints.folder.parent)
    shapes = found.shapes()
    try:
        explain_mismatch(
            _part(shapes, "module."), {name: tuple(t.shape) for name, t in task.module.state_dict().items()}, found.path
        )
    except ValueError as error:
        raise ValueError(
            f"{error}\nThis run was begun with another model or by other code: go on with the settings and the version that "
            "began it (both are in run.json), or give another --out"
        ) from None
    for kind, optimizer in task.optimizers.items():
        _prepare(optimizer, dict(task.module.named_parameters()), _part(shapes, f"optimizers.{kind}."))
    found.fill(_tensors(task, average), checkpoints.team)
    if average:
        average.count = found.facts["averaged"]
    for name, scaler in task.scalers.items():
        scaler.load_state_dict(found.facts["scalers"][name])
    return found.step


def _tensors(task: Task, average: Average | None) -> dict[str, Tensor]:
    """All that training carries from step to step, by name: the tensors themselves, so that a checkpoint can fill them."""
    tensors = {f"module.{name}": tensor for name, tensor in task.module.state_dict().items()}
    if average:
        tensors |= {f"average.{name}": value for name, value in average.values.items()}
    names: dict[Tensor, str] = {parameter: name for name, parameter in task.module.named_parameters()}
    for kind, optimizer in task.optimizers.items():
        for parameter, values in optimizer.state.items():
            tensors |= {f"optimizers.{kind}.{names[parameter]}.{key}": value for key, value in values.items()}
    return tensors


def _part(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> dict[str, tuple[int, ...]]:
    """What begins with the prefix, without it."""
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


def _prepare(optimizer: Optimizer, parameters: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Give an optimizer the tensors that a checkpoint holds for it, to be filled; before its first step it has none."""
    for name, shape in shapes.items():
        owner, _, key = name.rpartition(".")
        parameter = parameters[owner]
        # Adam has two tensors like the parameter (and sharded alike), and the number of its steps.
        like = torch.zeros_like(parameter) if shape == parameter.shape else torch.zeros(shape, device=parameter.device)
        optimizer.state[parameter][key] = like


def _refuse_others(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """Raise ValueError if settings that change what is computed are others than those that the run began with."""
    before, now = _flat(before), _flat(now)
    names = [name for name in {**before, **now} if before.get(name) != now.get(name) and not name.startswith(FREE)]
    if names:
        raise ValueError(
            f"{folder} holds a run with other settings: "
            + ", ".join(f"{name} was {before.get(name)}, now {now.get(name)}" for name in names)
            + "; use the same settings to go on with it, or another --out"
        )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by names like `loss.l1`."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
