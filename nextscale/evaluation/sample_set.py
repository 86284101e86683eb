"""Samples by the ten thousand, for scores: whole after any interruption, the same for any number of processes and any batch.

Image i depends on the seed and on i alone. It is told the condition `i % C` of C conditions (so they are interleaved), and
draws from seed + i. What is done is kept in parts that are whole or absent; a command that was killed makes what is
missing. At the end the parts become one `.npz`, or have been single files all along.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import nextscale
from nextscale.encoded import hash_weights
from nextscale.evaluation.image_sets import note_of, write_npz
from nextscale.files import as_path, atomic_write, read_json
from nextscale.lock import alone_in
from nextscale.modules import as_module
from nextscale.pixels import on_white, to_uint8
from nextscale.processes import Team
from nextscale.progress import Bar
from nextscale.sampling.loop import sample
from nextscale.settings import brief, whole_number
from nextscale.system import System, check_system

BLOCK = 8  # images that a CPU makes together
# Between the seeds of the tries of one image. Generators on the CPU see the lowest 32 bits of a seed, in which its
# multiples stay apart by more than the images of a set (2^32 over the golden ratio).
ANOTHER_TRY = 2_654_435_761
MOST = 10_000_000  # images of a set
PARTS = ".parts"

Judge = Callable[[Tensor, Sequence[Any]], Tensor]


@dataclass(frozen=True)
class Rejection:
    """Rejection sampling, as of the paper's "-re" rows: an image whose class a classifier does not find is drawn again.

    judge: bytes [b, 3, H, W] and what they were told, to the probability of that [b]. name: of the classifier, for the
    protocol. least: probability of an image that is accepted. tries: of an image; after the last one the likeliest of them
    is taken.
    """

    judge: Judge
    name: str
    least: float = 0.5
    tries: int = 4


def fingerprint_of(system: System) -> str:
    """A hash of all weights, of the recipe, its settings, and what methods changed."""
    hashed = hashlib.blake2b(digest_size=32)
    hashed.update(system.recipe.encode() + system.config.model_dump_json().encode())
    for change in system.changes:
        hashed.update(change.recipe.encode() + change.config.model_dump_json().encode())
    for part in (system.tokenizer, system.model, *system.parts.values()):
        if part is not None:
            hash_weights(hashed, as_module(part))
    return hashed.hexdigest()


def sample_set(
    system: System,
    conditions: Sequence[Any],
    each: int,
    out: str | os.PathLike[str],
    *,
    seed: int = 0,
    batch: int = 64,
    beside: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    rejection: Rejection | None = None,
    about: Mapping[str, Any] | None = None,
    team: Team = Team(),
    progress: bool = True,
) -> Path:
    """Draw `each` images of every condition into `out`; goes on where it was stopped. Returns `out`.

    Args:
        conditions: class names or numbers, or prompts.
        out: a name that ends in .npz (`arr_0`, bytes [N, H, W, 3]), or a folder for PNG files; beside or in it a JSON file
            says how the set was made.
        beside: what all images are told beside their condition, by name: `{"style": "noto"}`.
        options: `guidance`, `pick` of `ns.sample`; default: the system's own.
        batch: images at once on a GPU; a CPU makes 8, so that its bytes do not depend on this.
        about: what that file says further.
        team: processes that share the work; each has the system.

    Raises ValueError if `out` holds, or was begun with, something else.
    """
    check_system(system)
    beside = dict(beside or {})
    system.check_told({_primary(system): list(conditions), **beside})
    whole_number("each", each, 1, MOST)
    whole_number("batch", batch, 1, 2**20)
    whole_number("seed", seed, 0, 2**62)
    count = each * len(conditions)
    whole_number("images", count, 1, MOST)
    out = as_path(out, "an .npz or a folder to write")
    task = _Task(system, list(conditions), beside, seed, dict(options or {}), rejection)
    note = _note(system, conditions, each, seed, rejection, ({"beside": beside} if beside else {}) | dict(about or {}))
    single = out.suffix.lower() != ".npz"
    folder = out if single else out.with_name(out.name + PARTS)
    if team.leads:
        _check_folder(folder, single)
    with alone_in(folder) if team.leads else nullcontext():
        missing = _agreed(lambda: _begin(out, folder, note, count, single, system.image_size), team)
        _draw(task, missing, count, batch, folder, single, team, progress)
        team.wait()
        if team.leads:
            _end(out, folder, note, count, system.image_size, single)
    team.wait()
    return out


def _agreed(begin: Callable[[], list[range]], team: Team) -> list[range]:
    """What the leader finds missing, for all; or its error."""
    missing: list[range] = []
    error: BaseException | None = None
    if team.leads:
        try:
            missing = begin()
        except (OSError, ValueError) as problem:
            error = problem
    missing, error = team.gather((missing, error))[0]
    if error is not None:
        raise error
    return missing


def _draw(
    task: _Task,
    missing: Sequence[range],
    count: int,
    batch: int,
    folder: Path,
    single: bool,
    team: Team,
    progress: bool,
) -> None:
    """Make this process's share of what is missing.

    Rounding depends on how many rows a product of matrices has, and on the threads that share it. On a CPU the images are
    therefore made in the same blocks of 8 whatever the batch and the number of processes, each on one thread, as many
    blocks at once as there are threads. Elsewhere a batch is a block.
    """
    cpu, workers = task.system.device.type == "cpu", torch.get_num_threads()
    rows = BLOCK if cpu else batch
    wanted = {number for gap in missing for number in gap}
    blocks = [range(first * rows, (first + 1) * rows) for first in sorted({number // rows for number in wanted})]
    own = blocks[team.rank :: team.size]
    total = sum(number in wanted for block in own for number in block)
    with (
        Bar(total=total, desc="sampling", unit="image", silent=not (progress and team.leads)) as bar,
        _pool(workers if cpu else 1, cpu) as pool,
    ):
        for block, images in zip(own, pool.map(task.draw, own), strict=True):
            # A part is a run without gaps, so of an array the whole block is kept.
            kept = [number for number in block if (number in wanted if single else number < count)]
            _keep(folder, kept, images[[number - block.start for number in kept]], single)
            bar.update(len(kept))


@contextmanager
def _pool(workers: int, single: bool) -> Iterator[ThreadPoolExecutor]:
    """A pool of threads, in each of which torch computes on one thread."""
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1 if single else threads,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class _Task:
    system: System
    conditions: list[Any]
    beside: dict[str, Any]
    seed: int
    options: dict[str, Any]
    rejection: Rejection | None

    def draw(self, numbers: range) -> np.ndarray[Any, Any]:
        """The images of a block, bytes [b, H, W, 3]."""
        images = self._bytes(list(numbers), 0)
        if self.rejection is None:
            return _rows(images)
        best, chances, waiting = images, torch.full((len(numbers),), -1.0), list(range(len(numbers)))
        for attempt in range(self.rejection.tries):
            if attempt:  # as many rows as before, so that each is rounded alike
                images = self._bytes([numbers[i] for i in (waiting * len(numbers))[: len(numbers)]], attempt)
            told = [self._told(numbers[i]) for i in (waiting * len(numbers))[: len(numbers)]]
            found = self.rejection.judge(images, told).cpu()
            for place, i in enumerate(waiting):
                if float(found[place]) > float(chances[i]):
                    best[i], chances[i] = images[place].clone(), found[place]
            waiting = [i for i in waiting if float(chances[i]) < self.rejection.least]
            if not waiting:
                break
        return _rows(best)

    def _told(self, number: int) -> Any:
        return self.conditions[number % len(self.conditions)]

    def _bytes(self, numbers: list[int], attempt: int) -> Tensor:
        """uint8 [b, 3, H, W] of images by their numbers, which may lie beyond the set."""
        seeds = [self.seed + number + attempt * ANOTHER_TRY for number in numbers]
        told = {_primary(self.system): [self._told(number) for number in numbers], **self.beside}
        drawn = sample(self.system, told, seed=seeds, **self.options)
        return to_uint8(on_white(drawn)).cpu()


def _primary(system: System) -> str:
    """What the conditions are told by."""
    return next(iter(system.readers), "label")


def _rows(images: Tensor) -> np.ndarray[Any, Any]:
    return images.permute(0, 2, 3, 1).contiguous().numpy()


# ---- what is on disk -----------------------------------------------------------------------------------------------------


def _note(
    system: System,
    conditions: Sequence[Any],
    each: int,
    seed: int,
    rejection: Rejection | None,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """How the set is made: nothing in it differs between two runs of one command."""
    named = [system.classes[c] if isinstance(c, int) and c < len(system.classes) else str(c) for c in conditions]
    return {
        "made_by": "nextscale sample-set",
        "nextscale": nextscale.__version__,
        "recipe": system.recipe,
        "changes": [change.recipe for change in system.changes],
        "fingerprint": fingerprint_of(system),
        "image_size": list(system.image_size),
        "dtype": str(min((p.dtype for p in system.parameters()), key=lambda t: t.itemsize)).removeprefix("torch."),
        "seed": seed,
        "each": each,
        "images": each * len(conditions),
        "conditions": named if len(named) <= 10_000 else f"{len(named):,} of them",
        "digest_of_conditions": hashlib.blake2b("\n".join(map(str, conditions)).encode(), digest_size=16).hexdigest(),
        "per_class": {"classes": len(conditions), "least": each, "most": each},
        "order": "interleaved",
        "labels": "balanced",
        "rejection": None if rejection is None else _rejection(rejection),
        **about,
    }


def _rejection(rejection: Rejection) -> dict[str, Any]:
    return {"classifier": rejection.name, "least": rejection.least, "tries": rejection.tries}


def _check_folder(folder: Path, single: bool) -> None:
    """Refuse a folder of others' files, before anything is put into it."""
    begun = not single or note_of(folder).is_file() or not folder.is_dir()
    if not begun and any(not name.startswith(".") for name in os.listdir(folder)):
        raise ValueError(f"{folder} holds other files; give a folder of its own")


def _begin(
    out: Path, folder: Path, note: Mapping[str, Any], count: int, single: bool, size: tuple[int, int]
) -> list[range]:
    """The runs of images that are missing; refuses what was begun with other settings."""
    wanted = json.loads(json.dumps(note))  # as it is read: no tuples
    if not single and out.is_file():
        if not note_of(out).is_file() or read_json(note_of(out), expected="how a set was made") != wanted:
            raise ValueError(f"{out} is there already, and was made in another way; choose another name, or delete it")
        return []
    begun = note_of(folder) if single else folder / "set.json"
    if begun.is_file():
        known = read_json(begun, expected="how a set was begun")
        if not isinstance(known, dict):
            raise ValueError(f"{begun} does not say how a set was begun; give another --out, or delete that folder")
        if wrong := sorted(name for name in {*known, *wanted} if known.get(name) != wanted.get(name)):
            raise ValueError(
                f"{folder} was begun with another {wrong[0]} ({brief(known.get(wrong[0]))} and now "
                f"{brief(note.get(wrong[0]))}); give the same command, or another --out"
            )
    else:
        folder.mkdir(parents=True, exist_ok=True)
        _write_note(begun, note)
    if single:
        # One listing: fifty thousand questions to a disk far away take minutes.
        there = {int(name[:-4]) for name in os.listdir(folder) if re.fullmatch(r"\d{8}\.png", name)}
        done = [range(i, i + 1) for i in sorted(there) if i < count and _ends_well(folder / f"{i:08}.png")]
    else:
        for span, path in _parts(folder):
            if not _holds(path, (len(span), *size, 3)):
                warnings.warn(f"{path} is damaged; its images are made again", stacklevel=2)
                path.unlink()
        done = [span for span, _ in _parts(folder) if span.start < count]
    return list(_gaps(done, count))


def _gaps(done: Sequence[range], count: int) -> Iterator[range]:
    """The runs of numbers below `count` that are in none of these sorted ranges."""
    first = 0
    for span in done:
        if span.start > first:
            yield range(first, span.start)
        first = max(first, span.stop)
    if first < count:
        yield range(first, count)


def _parts(folder: Path) -> list[tuple[range, Path]]:
    """The parts of an array that are there, in their order; temporary files of a killed process are none."""
    found = []
    for name in os.listdir(folder):
        if match := re.fullmatch(r"(\d{8})-(\d{8})\.npy", name):
            found.append((range(int(match[1]), int(match[2])), folder / name))
    return sorted(found, key=lambda part: (part[0].start, part[0].stop))


def _holds(path: Path, shape: tuple[int, ...]) -> bool:
    """Whether a part is an array of bytes of that shape, as long as it says."""
    try:
        images = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError):
        return False
    return images.shape == shape and images.dtype == np.uint8


def _ends_well(path: Path) -> bool:
    """Whether a PNG has its last chunk; else it is made again."""
    with path.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - 12))
        whole = file.read()[4:8] == b"IEND"
    if not whole:
        warnings.warn(f"{path} is damaged; it is made again", stacklevel=2)
    return whole


def _keep(folder: Path, numbers: Sequence[int], images: np.ndarray[Any, Any], single: bool) -> None:
    if not single:
        with atomic_write(folder / f"{numbers[0]:08}-{numbers[-1] + 1:08}.npy") as path:
            np.save(path, images, allow_pickle=False)
        return
    from PIL import Image

    for number, image in zip(numbers, images, strict=True):
        with atomic_write(folder / f"{number:08}.png") as path:
            Image.fromarray(image).save(path, format="png")


def _end(out: Path, folder: Path, note: Mapping[str, Any], count: int, size: tuple[int, int], single: bool) -> None:
    """Join the parts, and take away what is left of killed processes."""
    if single:
        for name in os.listdir(folder):
            if re.fullmatch(r"\.\d{8}-\w+\.png|\.lock", name):
                (folder / name).unlink(missing_ok=True)
        return
    for stray in out.parent.glob(f".{glob.escape(out.stem[:80])}-????????.npz"):
        stray.unlink(missing_ok=True)
    if not out.is_file():
        write_npz(out, _joined(folder, count), (count, *size, 3))
    _write_note(note_of(out), note)
    shutil.rmtree(folder, ignore_errors=True)


def _joined(folder: Path, count: int) -> Iterator[np.ndarray[Any, Any]]:
    first = 0
    for span, path in _parts(folder):
        images = np.load(path, mmap_mode="r", allow_pickle=False)
        if span.stop > first:  # what two commands made twice is the same twice
            yield images[first - span.start :]
            first = span.stop
    if first < count:
        raise ValueError(f"{folder} lacks image {first}; give the same command again")


def _write_note(path: Path, note: Mapping[str, Any]) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
