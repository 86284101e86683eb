"""What a training carries from step to step, as a checkpoint holds it, and how a run goes on from one."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field, ValidationError
from torch import Tensor, nn
from torch.optim import Optimizer

from nextscale.checkpoint import explain_mismatch
from nextscale.contracts import Objective
from nextscale.encoded import hash_weights
from nextscale.processes import Team
from nextscale.settings import Settings, brief, faults
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

# Settings that had another name when a run may have begun.
RENAMED = {"system.transformer.unit_norm": "system.transformer.qk_norm"}


def recorded(value: Any) -> Any:
    """A setting as a run's files hold it, the same each time that a program starts."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Settings):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {str(name): recorded(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [recorded(part) for part in value]
    if isinstance(value, set | frozenset):
        return sorted((recorded(part) for part in value), key=repr)
    if is_dataclass(value):
        return {each.name: recorded(getattr(value, each.name)) for each in fields(value)}
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))  # an address is another one each time


def recorded_objective(objective: Objective) -> dict[str, Any]:
    """Which objective it is, and its settings: of a plain object its public attributes."""
    kind = type(objective)
    plain = kind.__repr__ is object.__repr__ and not is_dataclass(objective)
    public = {name: value for name, value in getattr(objective, "__dict__", {}).items() if name[0] != "_"}
    return {"kind": f"{kind.__module__}.{kind.__qualname__}", "settings": recorded(public if plain else objective)}


def recorded_weights(networks: Mapping[str, nn.Module]) -> dict[str, str]:
    """A hash of the weights of each network, by its name."""

    def digest(network: nn.Module) -> str:
        found = hashlib.blake2b(digest_size=16)
        hash_weights(found, network)
        return found.hexdigest()

    return {name: digest(network) for name, network in networks.items()}


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


class RunFacts(Settings):
    """What a checkpoint says beside its tensors."""

    settings: dict[str, Any]
    averaged: int = Field(0, ge=0)
    scalers: dict[str, dict[str, Any]] = Field({})


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
    try:
        facts = RunFacts.model_validate(found.facts)
    except ValidationError as error:
        raise ValueError(
            f"{found.path} is not the checkpoint of a training: {faults(error)}; give another --out, or move it away"
        ) from error
    refuse_others(facts.settings, settings, checkpoints.folder.parent)
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
        average.count = facts.averaged
    for name, scaler in task.scalers.items():
        scaler.load_state_dict(facts.scalers[name])
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


def refuse_others(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """Raise ValueError if settings that change what is computed are others than those that the run began with."""
    before, now = _flat(before), _flat(_as_known(now, before))
    names = [name for name in {**before, **now} if before.get(name) != now.get(name) and not name.startswith(FREE)]
    if names and all(name.startswith("frozen.") for name in names):
        raise ValueError(
            f"{folder} holds a run that began with other weights: the objective's frozen networks "
            f"({', '.join(name.removeprefix('frozen.') for name in names)}) are made of those from which training starts; go "
            "on with a system of the same weights (load it again: training changed this one), or give another --out"
        )
    if names == ["data"] or set(names) == {"data", "images"}:
        counts = before.get("images"), now.get("images")
        others = f"images was {counts[0]}, now {counts[1]}"
        same = "as many images, but their content, labels or captions differ"
        raise ValueError(
            f"{folder} holds a run that began with other data: {same if counts[0] == counts[1] else others}; go on "
            "with the same data, or give another --out"
        )
    if names:
        longer = f"; to train longer: --init-from {folder} and another --out" if "steps" in names else ""
        raise ValueError(
            f"{folder} holds a run with other settings: "
            + ", ".join(f"{name} was {brief(before.get(name))}, now {brief(now.get(name))}" for name in names)
            + f"{longer}; use the same settings to go on with it, or another --out"
        )


def _as_known(now: Mapping[str, Any], before: Mapping[str, Any]) -> Mapping[str, Any]:
    """Settings as the version that began the run recorded them. Earlier ones knew the settings of some objectives alone, and
    nothing of frozen networks: what they did not record passes for the same."""
    if "data" not in before:
        now = {name: value for name, value in now.items() if name != "data"}
    objective = before.get("objective")
    if "objective" not in now or (objective is not None and set(objective) == {"kind", "settings"}):
        return now
    known = {name: value for name, value in now.items() if name not in ("objective", "frozen")}
    return known if objective is None else {**known, "objective": now["objective"]["settings"]}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by names like `loss.l1`, those of today."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        path = RENAMED.get(prefix + name, prefix + name)
        flat |= _flat(value, f"{path}.") if isinstance(value, dict) else {path: value}
    return flat
