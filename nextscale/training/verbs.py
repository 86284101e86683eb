"""Train a tokenizer, train a generator: the two verbs that users call."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from nextscale.checkpoint import save
from nextscale.contracts import Objective, TrainableTokenizer
from nextscale.data.dataset import collate, first_item, one_size
from nextscale.data.source import DataSource, remember
from nextscale.data.transforms import AugmentSettings, augment
from nextscale.draws import Draws, generator_for
from nextscale.encoded import encode_images
from nextscale.extras import need
from nextscale.files import as_path
from nextscale.lock import alone_in
from nextscale.modules import as_module, usual_defaults
from nextscale.output import Images
from nextscale.processes import Team, check_workers
from nextscale.settings import brief, whole_number
from nextscale.system import System, check_device
from nextscale.training.config import GeneratorLoss, TokenizerLoss, TrainConfig
from nextscale.training.export import forget_start, keep_start
from nextscale.training.finetune import add_lora, merge_lora
from nextscale.training.fit import fit
from nextscale.training.generator_task import GeneratorTask, trained_parts
from nextscale.training.resume import recorded_objective, recorded_weights
from nextscale.training.tokenizer_task import TokenizerTask


@usual_defaults()
def train_tokenizer(
    system: System,
    data: Dataset,
    config: TrainConfig = TrainConfig(),
    *,
    out: str | os.PathLike[str],
    val: Dataset | None = None,
    loss: TokenizerLoss = TokenizerLoss(),
    augmentation: AugmentSettings | None = None,
    about: Mapping[str, Any] | None = None,
    source: DataSource | None = None,
) -> System:
    """Train the tokenizer of a system on images, or on what else its output is; goes on where a run in `out` stopped.

    Args:
        data: items are dicts with `image` [3, H, W] in [-1, 1] of the system's size, or of a whole multiple of it with
            `augmentation` (and `augmentation.crop` times larger). Of other outputs: with their `field`.
        val: items with `image` of the system's size, which are judged every `validate_every` steps; None or empty: none.
        out: folder of the run; `out/system` holds the result, which `ns.load` reads.
        about: what the run's first line says of the data, and run.json keeps; default: their number.
        source: what the data are read from, which the system remembers for `nextscale evaluate`.

    Returns the system, with the averaged weights.
    """
    _check_kinds(config=(config, TrainConfig), loss=(loss, TokenizerLoss))
    check_packages(config, loss)
    if config.shard or config.recompute:
        raise ValueError("shard and recompute are for generators; tokenizers are small, so leave them off")
    team, config = _join(config)
    out = as_path(out, "the folder of the run")
    _refuse_half(system.tokenizer)
    _check_size(system, data, augmentation)
    transform = _transform(system, augmentation)

    def first_content(count: int = 512) -> Tensor:
        chosen = torch.linspace(0, len(data) - 1, min(count, len(data))).long().tolist()  # type: ignore[arg-type]
        batch = collate([data[i] for i in chosen])
        if bad := [i for i, one in zip(chosen, batch[system.output.field], strict=True) if not one.isfinite().all()]:
            raise ValueError(
                f"the {system.output.field} of item {bad[0]} holds numbers that are not finite; take it out, or mend it"
            )
        draws = Draws(generator_for(config.seed, 0, "init"), len(chosen))
        return one_size((transform(batch, draws) if transform else batch)[system.output.field], system.output.field)

    tokenizer = system.tokenizer
    if not isinstance(tokenizer, TrainableTokenizer):
        raise ValueError("this system's tokenizer does not train: its pyramid or its networks lack what training needs")
    task = TokenizerTask(
        tokenizer, system.schedule, config, loss, _some(val), first_content, team, output=system.output
    )
    settings = {"loss": loss, "augmentation": augmentation, "system": system.config}
    with _alone_in(out, team):
        _keep_start(system, out, team, source)
        fit(task, data, config, out, "tokenizer", settings, transform, team, about or _about(system, val))
        if team.leads:
            save(system, out / "system")
            forget_start(out)
    team.wait()  # all return when the files are there
    return system.eval()


@usual_defaults()
def train_model(
    system: System,
    data: Dataset | None,
    config: TrainConfig = TrainConfig(),
    *,
    out: str | os.PathLike[str],
    val: Dataset | None = None,
    loss: GeneratorLoss = GeneratorLoss(),
    augmentation: AugmentSettings | None = None,
    views: int = 1,
    lora: int = 0,
    cache: str | os.PathLike[str] | None = None,
    objective: Objective | None = None,
    about: Mapping[str, Any] | None = None,
    source: DataSource | None = None,
) -> System:
    """Train the generator of a system, whose tokenizer stays as it is; goes on where a run in `out` stopped.

    Args:
        data, val, out, augmentation, about, source: as for `train_tokenizer`; items also have what the system's readers want:
            `label`, a class number, or `caption`, or a tensor; or `labels` or `captions`, several that fit the image, of which
            training picks one at random. None for an objective that wants nothing.
        views: augmented versions of each image that are encoded, once, before training.
        lora: rank of adapters (LoRA), which are trained instead of the weights, together with what the model is told; they are
            merged into the weights of the result. 0: all weights are trained. Needs the extra nextscale[lora].
        cache: folder for what was encoded, to share between runs; one of another tokenizer, data or settings is refused.
            Default: a folder of the run.
        objective: what to train for, where it is another one than the system's own: it says what data it wants. Where that
            is items, they come as they are, without augmentation.

    Returns the system, with the averaged weights.
    """
    _check_kinds(config=(config, TrainConfig), loss=(loss, GeneratorLoss))
    views, lora = whole_number("views", views, 1, 1000), whole_number("lora", lora, 0, 4096)
    check_packages(config, lora=lora)
    if config.shard and lora:
        raise ValueError("adapters are small, so they are not sharded; leave --shard or --lora off")
    if config.shard and (parts := trained_parts(system)):
        raise ValueError(
            f"sharded training has the model alone, but {', '.join(parts)} train with it; leave --shard off"
        )
    loss.check(len(system.schedule))
    told = system.condition(None) if loss.drop_parts else None
    if told and (unknown := [name for name in loss.drop_parts if name not in told]):
        names = dict.fromkeys(name.partition(".")[0] for name in told.parts())
        raise ValueError(
            f"loss.drop_parts names {brief(min(unknown))}; the parts of this condition are {', '.join(names)}"
        )
    _refuse_half(system.tokenizer, system.need_model(), *trained_parts(system).values())
    team, config = _join(config)
    out = as_path(out, "the folder of the run")
    system.to(config.device)
    objective = objective or system.objective
    val, kind = _some(val), objective.wants
    if data is None and kind != "nothing":
        raise ValueError(f"this objective wants {kind}, so training needs data, got none")
    items: Any = NoItems(config.batch_size) if kind == "nothing" else data
    held_out: Any = val
    seen = dict(about or _about(system, val))
    encoded = kind if kind == "tokens" or kind == "features" else None
    if encoded:
        _check_size(system, items, augmentation)
        seen |= {"images": len(items), "views": views}
    with _alone_in(out, team):  # what is encoded lies there too
        if encoded:
            place = out / "encoded" if cache is None else Path(cache)
            how: dict[str, Any] = {"workers": config.workers, "team": team}
            items = encode_images(
                system,
                items,
                place,
                kind=encoded,
                views=views,
                augmentation=augmentation,
                seed=config.seed,
                strict=cache is not None,
                **how,
            )
            items.check(system)
            if val is not None:
                held_out = encode_images(system, val, out / "encoded-val", **how)
        _keep_start(system, out, team, source)
        _train_model(system, items, held_out, config, out, loss, augmentation, lora, objective, team, seen)
    team.wait()  # all return when the files are there
    return system.eval()


def _train_model(
    system: System,
    items: Any,
    held_out: Any,
    config: TrainConfig,
    out: Path,
    loss: GeneratorLoss,
    augmentation: AugmentSettings | None,
    lora: int,
    objective: Objective,
    team: Team,
    about: Mapping[str, Any],
) -> None:
    """Train on what was encoded, and write the result."""
    kind = objective.wants
    if lora:
        add_lora(as_module(system.need_model()), lora)
    sharded = config.shard and team.size > 1
    systems = [system, *(change.before for change in system.changes)]
    plain = _without_weights([as_module(each.need_model()) for each in systems]) if sharded else []
    shown = None if kind == "nothing" else items
    task = GeneratorTask(system, config, loss, shown, held_out, team=team, objective=objective)
    settings = {"loss": loss, "augmentation": augmentation, "system": system.config}
    settings |= {"objective": recorded_objective(objective), "frozen": recorded_weights(task.run.frozen)}
    fit(task, items, config, out, "generator", settings, team=team, about=about)
    if sharded:
        from nextscale.sharded import whole

        plain[0].load_state_dict(whole(as_module(system.model)), assign=True)
        for each, model in zip(systems, plain, strict=True):
            each.register_module("model", model)
    if lora:
        merge_lora(as_module(system.need_model()))
    if team.leads:
        save(system, out / "system")
        forget_start(out)


def _check_kinds(**given: tuple[Any, type]) -> None:
    for name, (value, kind) in given.items():
        if not isinstance(value, kind):
            raise TypeError(f"{name}: expected ns.{kind.__name__}(...), got {brief(value)}")


def check_packages(config: TrainConfig, loss: TokenizerLoss | None = None, lora: int = 0) -> None:
    """Refuse a training that lacks a package, before it costs anything."""
    need("train", "what a training leaves to look at")
    if config.wandb:
        need("wandb", "logging to Weights & Biases")
    if lora:
        need("lora", "training adapters (LoRA)")
    if loss is not None and loss.perceptual and not loss.lpips_vgg:
        need("eval", "the perceptual loss")


def _alone_in(out: Path, team: Team) -> AbstractContextManager[None]:
    """The folder of a run, for this training alone."""
    return alone_in(out) if team.leads else nullcontext()


def _keep_start(system: System, out: Path, team: Team, source: DataSource | None) -> None:
    """What a system needs beside a checkpoint, and where the data are."""
    if team.leads and not (out / "system" / "config.json").exists():
        keep_start(system, out)
    if team.leads and source is not None:
        remember(source, out)


def _about(system: System, val: Dataset | None) -> dict[str, Any]:
    """What a run's first line says of its data."""
    found: dict[str, Any] = {"classes": len(system.classes)} if system.classes else {}
    found |= {"held_out": len(val)} if val is not None else {}  # type: ignore[arg-type]
    if isinstance(system.output, Images):
        found["size"] = "{}x{} px".format(*system.image_size)
    return found


def _without_weights(models: list[nn.Module]) -> list[nn.Module]:
    """Copies of models, which share what these share, with parameters that are still to be filled."""
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)
        for model in models
        for parameter in model.parameters()
    }
    return copy.deepcopy(models, memo)


class NoItems(Dataset[dict[str, Any]]):
    """What an objective that wants nothing is given: batches without content."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {}

    @staticmethod
    def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {}


def _join(config: TrainConfig) -> tuple[Team, TrainConfig]:
    """The processes that train together, and the settings with this one's own device. Raises ValueError, before any work, for
    a batch that they cannot share."""
    check_device(config.device)
    check_workers(config.workers)
    check_workers(config.threads or 1, "threads")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if config.shard and config.precision == "float16":
        raise ValueError("sharded training scales no losses, which float16 needs; use --precision bfloat16")
    if (
        config.compile
        and torch.device(config.device).type == "cpu"
        and not any(map(shutil.which, ("g++", "clang++", "cl")))
    ):
        raise ValueError(
            "--compile needs a C++ compiler on the CPU (g++ or clang++), and finds none; install one or leave it off"
        )
    team = Team.of_environment()
    team.pieces(config.batch_size, config.accumulate)
    return team, config.model_copy(update={"device": team.own_device(config.device)})


def _refuse_half(*parts: object) -> None:
    """Raise ValueError for weights of less than 32 bits: steps of training are smaller than their rounding."""
    for part in parts:
        for parameter in as_module(part).parameters():
            if parameter.requires_grad and parameter.dtype.itemsize < 4:
                raise ValueError(
                    f"training needs weights in float32, got {str(parameter.dtype).removeprefix('torch.')}; load the system "
                    "without `dtype`, and train with `precision` bfloat16 to compute in it"
                )


def _some(val: Dataset | None) -> Dataset | None:
    """None for a data set without images: of a few, none may be held out."""
    return val if val is not None and len(val) else None  # type: ignore[arg-type]


def _check_size(system: System, data: Dataset, augmentation: AugmentSettings | None) -> None:
    """Without augmentation, which checks and reduces what it gets, content must have the system's size."""
    field = system.output.field
    item = first_item(data, field)
    size, got = system.output.shape(system.schedule, system.tokenizer.stride), tuple(item[field].shape)
    if augmentation is None and got != size:
        if field == "image" and got[:1] == size[:1]:
            size, got = size[1:], got[1:]
        raise ValueError(
            f"this system makes {field}s of {size}, got training {field}s of {got}; read them at that size"
        )
    if augmentation is not None and field != "image":
        raise ValueError(f"augmentation changes images, but this system makes {field}s; leave it out")


def _transform(system: System, augmentation: AugmentSettings | None) -> Any:
    """The batch transform, if there is one."""
    if augmentation is None:
        return None

    def transform(batch: dict[str, Any], draws: Draws) -> dict[str, Any]:
        numbers = draws.rand(augmentation.numbers)
        images = augment(batch["image"], system.image_size, batch["mirror_ok"], numbers, augmentation)
        return batch | {"image": images}

    return transform
