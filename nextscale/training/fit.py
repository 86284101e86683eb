"""The loop that every training shares: order of data, learning rate, averaging, log, pictures, checkpoints, resume.

Nothing random is carried from step to step: what step s draws follows from the seed and s alone. A run that was
killed therefore goes on as if nothing had happened, from weights, optimizer state and the step number.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from nextscale import __version__
from nextscale.data.dataset import collate, data_digest
from nextscale.draws import BatchPart, Draws, generator_for, rows_of
from nextscale.files import atomic_write
from nextscale.processes import Team
from nextscale.settings import cut
from nextscale.training.average import Average
from nextscale.training.checkpoints import Checkpoints
from nextscale.training.config import TrainConfig
from nextscale.training.log import RunLog, Shown
from nextscale.training.memory import peak_memory
from nextscale.training.rates import learning_rate, weight_decay
from nextscale.training.resume import recorded, resume, save_state


class Task(Protocol):
    """What is trained: the modules, their optimizers, one step, and how to judge and show the result."""

    @property
    def module(self) -> nn.Module: ...

    @property
    def optimizers(self) -> Mapping[str, Optimizer]: ...

    @property
    def scalers(self) -> Mapping[str, torch.amp.GradScaler]:
        """Of the optimizers' losses, by the same names."""

    @property
    def tokens_per_image(self) -> int: ...

    @property
    def flop_per_image(self) -> float: ...

    def step(self, parts: Sequence[BatchPart], step: int) -> dict[str, Tensor | float]:
        """One optimizer step on this process's parts of a batch; returns metrics, `loss` and `grad_norm` among them."""

    def validate(self, module: nn.Module) -> dict[str, float]:
        """Metrics of `module` (the averaged weights) on the validation split."""

    def pictures(self, module: nn.Module) -> dict[str, Shown]:
        """Images to look at, with what they are."""

    def alarms(self, metrics: Mapping[str, Tensor | float]) -> list[str]:
        """What in these training metrics a person should know of now, in sentences."""

    def score(self, metrics: Mapping[str, float]) -> float | None:
        """How good these validation metrics are; higher is better. The best checkpoint is kept."""

    def averaged(self, average: Average | None, step: int) -> None:
        """Called after the average was updated, for state that must be copied, not averaged."""

    def together(self, function: Callable[..., Any]) -> Any:
        """Call `function` where the module's weights are whole; with sharded ones, on all processes."""


class Order:
    """Batches of indices: a new permutation each epoch, from the seed and the epoch; starts at any step. Of each batch
    it yields the places `rows`."""

    def __init__(
        self, length: int, batch_size: int, seed: int, first_step: int, steps: int, rows: slice = slice(None)
    ) -> None:
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.first_step, self.steps, self.rows = first_step, steps, rows

    def __len__(self) -> int:
        return self.steps - self.first_step

    def __iter__(self) -> Iterator[list[int]]:
        epoch, permutation = -1, torch.empty(0)
        for step in range(self.first_step, self.steps):
            batch = []
            for position in range(step * self.batch_size, (step + 1) * self.batch_size)[self.rows]:
                if position // self.length != epoch:
                    epoch = position // self.length
                    permutation = torch.randperm(self.length, generator=generator_for(self.seed, epoch, "order"))
                batch.append(int(permutation[position % self.length]))
            yield batch


def decay_groups(module: nn.Module, rate: float, keep: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Two parameter groups: biases, norms, embeddings and tables without weight decay, all other tensors with it.

    `keep` names (parts of) parameters that must not decay although they are matrices.
    """
    decay: list[Tensor] = []
    plain: list[Tensor] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            no_decay = parameter.ndim < 2 or name.endswith("bias") or any(part in name for part in keep)
            (plain if no_decay else decay).append(parameter)
    return [
        {"params": plain, "weight_decay": 0.0, "decays": False},
        {"params": decay, "weight_decay": rate, "decays": True},
    ]


def adamw(module: nn.Module, config: TrainConfig, keep: tuple[str, ...] = ()) -> torch.optim.AdamW:
    """AdamW over `decay_groups`."""
    groups = decay_groups(module, config.weight_decay, keep)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def scaler(config: TrainConfig) -> torch.amp.GradScaler:
    """What keeps gradients of float16 from vanishing; in other precisions it does nothing."""
    return torch.amp.GradScaler(torch.device(config.device).type, enabled=config.precision == "float16")


def set_rates(optimizers: Mapping[str, Optimizer], config: TrainConfig, step: int) -> float:
    """Give the optimizers the learning rate and the weight decay of a step; returns the learning rate."""
    lr, decay = learning_rate(config, step), weight_decay(config, step)
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = lr
            if group["decays"]:
                group["weight_decay"] = decay
    return lr


def autocast(config: TrainConfig) -> torch.autocast:
    """The context in which a model runs forward: matrix products and convolutions in the precision of the run."""
    dtype = getattr(torch, config.precision)
    return torch.autocast(torch.device(config.device).type, dtype=dtype, enabled=dtype != torch.float32)


def descend(
    module: nn.Module,
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler,
    forward: nn.Module,
    parts: Sequence[Any],
    step: int,
    clip: float,
    team: Team,
) -> dict[str, Tensor | float]:
    """One optimizer step on the mean loss of all parts of a batch, this process's and the others'.

    `forward(part, step)`, made by `team.wrap`, returns a loss and metrics. Returns the mean metrics of this process's
    parts and `grad_norm`, the norm before clipping. If that is not finite, nothing changes.
    """
    optimizer.zero_grad(set_to_none=True)
    found = []
    for i, part in enumerate(parts):
        with team.averaging(forward, now=i + 1 == len(parts)):
            loss, metrics = forward(part, step)
            scaler.scale(loss / len(parts) if len(parts) > 1 else loss).backward()
        found.append(metrics)
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(module.parameters(), clip)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of sharded gradients
    _step(optimizer, scaler, norm)
    scaler.update()
    means = {name: sum(metrics[name] for metrics in found) / len(found) for name in found[0]} if found[1:] else found[0]
    return {**means, "grad_norm": norm}


def _step(optimizer: Optimizer, scaler: torch.amp.GradScaler, norm: Tensor) -> None:
    """A step of the optimizer unless the gradient's norm is not finite. On a GPU the fused optimizer itself leaves it out, as
    it does for a `GradScaler`, so that nobody waits for the norm."""
    if scaler.is_enabled() and norm.is_cuda:
        scaler.step(optimizer)
    elif norm.is_cuda and not sharded(optimizer):
        optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.found_inf  # type: ignore[attr-defined]
    elif norm.isfinite():
        scaler.step(optimizer)


def sharded(optimizer: Optimizer) -> bool:
    """Whether an optimizer's parameters are in pieces, one a process."""
    return any(hasattr(p, "full_tensor") for group in optimizer.param_groups for p in group["params"])


def first_bad_module(module: nn.Module, run: Callable[[], object]) -> str:
    """Name of the first module, in the order of computing, whose output is not finite while `run` uses it."""
    found: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: object, output: object) -> None:
            if not found and isinstance(output, Tensor) and not output.isfinite().all():
                found.append(name)

        return hook

    parts = [(name, part) for name, part in module.named_modules() if not list(part.children())]
    hooks = [part.register_forward_hook(look(f"{name} ({type(part).__name__})")) for name, part in parts]
    try:
        run()
    finally:
        for handle in hooks:
            handle.remove()
    return found[0] if found else "none: all outputs are finite, so it is the loss or its gradient"


def fit(
    task: Task,
    data: Dataset,
    config: TrainConfig,
    out: Path,
    description: str,
    others: Mapping[str, Any],
    transform: Callable[[dict[str, Any], Draws], dict[str, Any]] | None = None,
    team: Team = Team(),
    about: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Run (or go on with) a training in the folder `out`; returns the averaged module.

    `about`: what the run's first line says beside images, parameters and steps, and metrics.jsonl and run.json keep.

    `others`: what beside `config` changes what is computed (settings, or other values by name); a run goes on with the same
    ones alone.
    `transform(batch, draws)` augments a part of a batch. Writes `metrics.jsonl`, TensorBoard events, `pictures/` and
    `checkpoints/`. A finished run returns at once. SIGTERM and SIGINT (Ctrl-C) save after the step at hand; the first ends the
    process, the second raises KeyboardInterrupt. Raises FloatingPointError if the run diverges.
    """
    pieces = team.pieces(config.batch_size, config.accumulate)
    average = Average(task.module, config.ema) if config.ema else None
    sharded = config.shard and team.size > 1
    checkpoints = Checkpoints(out / "checkpoints", config.keep, team if sharded else Team())
    own_settings = config.model_dump(mode="json")
    other_settings = {name: recorded(part) for name, part in others.items() if part is not None}
    known = getattr(data, "digest", "") or data_digest(data)
    settings = own_settings | other_settings | {"images": len(data), "data": known}  # type: ignore[arg-type]
    first = resume(checkpoints, task, average, settings, team)
    log = RunLog(out, config.steps, description, first, silent=not team.leads, wandb=config.wandb)
    about = {"images": len(data), **(about or {})}  # type: ignore[arg-type]
    if team.leads:
        _describe(out, {"kind": description, "config": own_settings, **other_settings, "data": about}, team)
    log.facts(data=about)
    log.say(_first_line(description, task, config, first, about))
    own = slice(pieces[0].start, pieces[-1].stop)
    order = Order(len(data), config.batch_size, config.seed, first, config.steps, own)  # type: ignore[arg-type]
    loader = DataLoader(
        data,
        batch_sampler=order,
        num_workers=config.workers,
        collate_fn=getattr(data, "collate", collate),
        worker_init_fn=_deaf,
    )

    def parts_of(batch: dict[str, Any], step: int) -> list[BatchPart]:
        """The pieces of this process's share, augmented, with the random numbers of their images."""
        parts = []
        for piece in pieces:
            rows = slice(piece.start - own.start, piece.stop - own.start)
            some = rows_of(batch, rows)
            if transform is not None:
                augmenting = generator_for(config.seed, step, "augment")
                some = transform(some, Draws(augmenting, config.batch_size, piece))
            parts.append(BatchPart(some, Draws(generator_for(config.seed, step), config.batch_size, piece)))
        return parts

    task.module.train()  # a system comes in eval mode
    best, health = checkpoints.best_score(), Health(team, config.device)
    own_numbers = torch.random.fork_rng(devices=_own_gpu(config.device))
    with checkpoints.explained(), own_numbers, log.progress() as bar, _signals() as asked_to_stop:
        started = time.perf_counter()
        for step, batch in enumerate(_batches(loader, checkpoints), start=first):
            # dropout draws from torch's own generator
            torch.manual_seed(config.seed * 1_000_003 + step + team.rank * 1_000_000_007)
            lr = set_rates(task.optimizers, config, step)
            metrics = task.step(parts_of(batch, step), step)
            done = step + 1
            logs = done % config.log_every == 0 or done == config.steps
            finite, stop = health.look(metrics, bool(asked_to_stop), now=logs)
            if health.worst > config.most_skipped:
                name = first_bad_module(task.module, partial(task.step, parts_of(batch, step), step))
                whole = checkpoints.whole()
                raise FloatingPointError(
                    f"diverged at step {step}: lower --lr (it was {config.lr:g}) or --clip, or look at the data of that step; "
                    f"loss or gradient was not finite in {health.worst} steps in a row, first in the output of {name}; "
                    + (
                        f"{whole}another run can begin from it: --init-from"
                        if whole
                        else "no checkpoint was written yet"
                    )
                )
            if average and finite:
                average.update()
                task.averaged(average, step)
            bar.update()
            if logs or not finite:
                speed = (done - first) * config.batch_size / (time.perf_counter() - started)
                means = team.mean(metrics)
                running = {"lr": lr, "images_per_s": speed, "tokens_per_s": speed * task.tokens_per_image}
                running |= {"memory_gb": peak_memory(config.device), "skipped": health.skipped}
                running["tflops"] = speed * task.flop_per_image / 1e12
                if config.peak_tflops:
                    running["mfu"] = running["tflops"] / config.peak_tflops
                log.scalars(done, {**means, **running}, "train")
                log.alarms(done, task.alarms(means))
                bar.show_loss(means["loss"])
            score, better = None, False
            if (team.leads or sharded) and (done % config.validate_every == 0 or done == config.steps):
                showing = average.shown() if average else nullcontext(task.module)
                with bar.doing("validating"), showing as shown, torch.no_grad():
                    shown.eval()
                    judged, pictures = task.together(lambda shown=shown: (task.validate(shown), task.pictures(shown)))
                log.scalars(done, judged, "val")
                log.pictures(done, pictures)
                task.module.train()
                score = task.score(judged) if judged else None
                better = score is not None and (best is None or score > best)
                best = score if better else best
            if (team.leads or sharded) and (done % config.save_every == 0 or done == config.steps or better or stop):
                save_state(checkpoints, task, average, settings, done, score)
            if stop and done < config.steps:
                team.wait()  # for the leader, who saves
                log.close()
                by = "Ctrl-C" if signal.SIGINT in asked_to_stop else "SIGTERM"
                said = f"stopped by {by} after step {done}, which is saved in {checkpoints.folder}; "
                said += "give the same command again to go on"
                raise KeyboardInterrupt(said) if by == "Ctrl-C" else SystemExit(said)
    log.close()
    if average:
        average.swap()
    return task.module.eval()


class Health:
    """Whether loss and gradient are finite, on all processes, and whether any was asked to stop: all act alike.

    On a CPU every step is looked at. An accelerator would have to be waited for, so it counts by itself, and is asked when
    there is something to log anyway; until then steps pass for finite (`descend` changed no weights where they were not).
    """

    def __init__(self, team: Team, device: str) -> None:
        self.team, self.waits = team, torch.device(device).type == "cpu"
        self.skipped = 0  # steps in a row, up to the last one
        self.worst = 0  # most steps in a row since the last look
        self._counts: Tensor | None = None  # the same two on the accelerator

    def look(self, metrics: Mapping[str, Tensor | float], stop: bool, now: bool) -> tuple[bool, bool]:
        """Whether the step was finite, as far as is known, and whether to stop; `now`: find out in any case."""
        if self.waits:
            finite = all(math.isfinite(float(metrics[name])) for name in ("loss", "grad_norm"))
            bad, asked = self._summed(not finite, stop)
            self.skipped = self.worst = self.skipped + 1 if bad else 0
            return not bad, bool(asked)
        self._count(metrics)
        if now:
            assert self._counts is not None
            self.skipped, self.worst = (int(n) for n in self._counts.tolist())
            self._counts[1] = self._counts[0]
        bad, asked = self._summed(now and self.skipped > 0, stop)
        return not bad, bool(asked)

    def _count(self, metrics: Mapping[str, Tensor | float]) -> None:
        values = [torch.as_tensor(metrics[name]).detach() for name in ("loss", "grad_norm")]
        bad = ~torch.stack([value.isfinite() for value in values]).all()
        if self._counts is None:
            self._counts = torch.zeros(2, dtype=torch.int64, device=bad.device)
        self._counts[0] = (self._counts[0] + 1) * bad
        self._counts[1] = self._counts.max()

    def _summed(self, bad: bool, stop: bool) -> tuple[float, float]:
        if self.team.size == 1:
            return float(bad), float(stop)
        first, second = self.team.sum_(torch.tensor([float(bad), float(stop)])).tolist()
        return first, second


def _own_gpu(device: str) -> list[torch.device]:
    """The GPU whose random numbers a training draws; none on other devices."""
    own = torch.device(device)
    return (
        [torch.device("cuda", torch.cuda.current_device() if own.index is None else own.index)]
        if own.type == "cuda"
        else []
    )


@contextmanager
def _signals() -> Iterator[list[int]]:
    """A list that is empty until SIGTERM or SIGINT comes; a second SIGINT interrupts at once. Signals reach the main thread
    alone; elsewhere nothing is caught."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def receive(number: int, _: object) -> None:
        if number == signal.SIGINT and number in received:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _deaf(worker: int) -> None:
    """Ctrl-C reaches all processes of a terminal, but a process that loads images must live until the step is saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _batches(loader: Any, checkpoints: Checkpoints) -> Iterator[Any]:
    """The batches of a loader; what fails while images are read is said in one sentence, with what is safe."""
    batches = iter(loader)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (OSError, ValueError, EOFError) as error:
            died = isinstance(error, ConnectionError | EOFError)  # a process that loads images, while it sent one
            if died:
                time.sleep(1)  # torch says it, too, as soon as the system does; wherever the program is then
            what = "a process that loads images died" if died else "reading images failed"
            last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            raise OSError(
                f"{what} ({cut(last, 300)}); {checkpoints.whole()}mend it and give the same command again"
            ) from error
        yield batch


def _first_line(description: str, task: Task, config: TrainConfig, first: int, about: Mapping[str, Any]) -> str:
    """What a run is, before it begins."""
    trained = next(iter(task.optimizers.values()))  # further ones are of helpers, such as a discriminator
    count = sum(parameter.numel() for group in trained.param_groups for parameter in group["params"])
    size = f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count / 1e3:.0f} k"
    views = about.get("views", 1)
    parts = [f"{about['images']:,} images" + (f" in {views} views" if views > 1 else "")]
    parts += [f"{about[name]:,} {name.replace('_', ' ')}" for name in ("classes", "held_out") if name in about]
    parts += [str(about[name]) for name in ("size", "captions") if about.get(name)]
    goes_on = f", from step {first}" if first else ""
    steps = f"{config.steps} steps of {config.batch_size}{goes_on}"
    said = f"{description}: {', '.join(parts)}; {size} parameters; {steps}"
    return said + (f"\n{about['left_out']}" if about.get("left_out") else "")


def _describe(out: Path, facts: dict[str, Any], team: Team) -> None:
    """`run.json`: what this run is and how it was last started."""
    facts = {**facts, "processes": team.size, "nextscale": __version__, "torch": torch.__version__}
    with atomic_write(out / "run.json") as path:
        path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
