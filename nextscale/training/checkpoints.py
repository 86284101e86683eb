"""Checkpoints of a run: numbered, whole or absent, verified when read; the newest ones and the best are kept."""

from __future__ import annotations

import errno
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from nextscale.files import atomic_write, digest, disk_full, sync_folder
from nextscale.processes import Team

FACTS = "state.json"
NUMBER = "[0-9]" * 8  # of a step, as a pattern of names
FILE_BYTES = 2**30  # of tensors in a file at most (a tensor is never cut): a file passes through memory as a whole


@dataclass(frozen=True)
class Checkpoint:
    """One that is whole: what was saved beside the tensors, and how to read these."""

    path: Path
    step: int
    score: float | None
    files: dict[str, str]  # names and digests
    facts: dict[str, Any]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors by name; of sharded ones, as a whole."""
        found = _reader(self.path).read_metadata().state_dict_metadata
        return {name: tuple(about.size) for name, about in found.items()}

    def fill(self, tensors: dict[str, Tensor], team: Team = Team()) -> None:
        """Read tensors into those given, which may be sharded over `team` in another way than when they were saved."""
        from torch.distributed.checkpoint.state_dict_loader import load

        with _plain_errors(team):
            load(tensors, storage_reader=_reader(self.path), no_dist=team.size == 1)


class Checkpoints:
    """The folder `checkpoints` of a run.

    `00000500/` is the state after 500 steps: tensors in safetensors files, which `torch.distributed.checkpoint` writes, and
    `state.json` with everything else and the digests of these files. It has another name until all of that is there, so
    a process may die at any moment: what it was writing is cleared away by the next one.

    Args:
        folder: made when the first checkpoint is written.
        keep: newest checkpoints that stay; the one with the best score stays too.
        team: the processes that hold the tensors in pieces and write together; alone, one writes (and any may read).
    """

    def __init__(self, folder: Path, keep: int, team: Team = Team()) -> None:
        self.folder, self.keep, self.team = folder, keep, team

    def save(self, tensors: Mapping[str, Tensor], step: int, score: float | None = None, **facts: Any) -> None:
        """Write the state after `step` steps; `score`: of its validation, higher is better; `facts`: what JSON can say.

        What fails, on a full disk for example, leaves all earlier checkpoints as they are.
        """
        path, partial = self.folder / f"{step:08}", self.folder / f".{step:08}"
        try:
            self._write(tensors, partial)
            own = partial.glob(f"shard-{self.team.rank + 1:05}-*")
            digests = self.team.gather({file.name: digest(file) for file in own})
            if self.team.leads:
                files = {name: digest for some in digests for name, digest in some.items()}
                state = {"step": step, "score": score, "files": files, "facts": facts}
                with atomic_write(partial / FACTS) as temporary:
                    temporary.write_text(json.dumps(state) + "\n", encoding="utf-8")
                _remove(path)
                os.replace(partial, path)
                sync_folder(self.folder)
        except OSError:
            if self.team.leads:
                _remove(partial)
            raise
        if self.team.leads:
            self._prune()

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole, or None. A damaged one is left aside with a warning."""
        for _, found in sorted(self._complete().items(), reverse=True):
            names = sorted(found.files)[self.team.rank :: self.team.size]
            sound = all(digest(found.path / name) == found.files[name] for name in names)
            if all(self.team.gather(sound)):
                return found
            warnings.warn(f"the checkpoint {found.path} is damaged; the one before it is used", stacklevel=2)
        return None

    @contextmanager
    def disk_full_explained(self) -> Iterator[None]:
        """Where a full disk ends the block, say what is safe and what to do."""
        try:
            yield
        except Exception as error:
            if not disk_full(error):
                raise
            last = max(self._complete(), default=None)
            raise OSError(
                errno.ENOSPC,
                f"no space left ({error}); "
                + (f"the checkpoint of step {last} in {self.folder} is whole: " if last is not None else "")
                + "free some space and give the same command again",
            ) from error

    def best_score(self) -> float | None:
        """The highest score of a checkpoint so far."""
        return max((found.score for found in self._complete().values() if found.score is not None), default=None)

    def clear(self, after: int) -> None:
        """Remove what a process that died left half-written, and checkpoints of steps after `after`."""
        complete = self._complete()
        for path in (*self.folder.glob(f".{NUMBER}"), *self.folder.glob(NUMBER)):
            step = int(path.name) if path.name.isdecimal() else None
            if step not in complete or step > after:
                _remove(path)

    def _write(self, tensors: Mapping[str, Tensor], folder: Path) -> None:
        """The tensors, each process its own pieces."""
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
        from torch.distributed.checkpoint.state_dict_saver import save

        if self.team.leads:
            folder.mkdir(parents=True, exist_ok=True)
        places, taken = {}, 0
        for name, tensor in tensors.items():
            places[name] = 1 + taken // FILE_BYTES
            taken += tensor.nbytes // self.team.size
        # Safetensors, and no metadata beside them: DCP's own is a pickle.
        writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=places, save_distributed=True)
        with _plain_errors(self.team):
            save(dict(tensors), storage_writer=writer, no_dist=self.team.size == 1)

    def _complete(self) -> dict[int, Checkpoint]:
        """Each complete checkpoint, by step."""
        found = {}
        for path in self.folder.glob(f"{NUMBER}/{FACTS}"):
            try:
                state = json.loads(path.read_text(encoding="utf-8"))
                step = int(state["step"])
                files = {str(name): str(digest) for name, digest in state["files"].items()}
                found[step] = Checkpoint(path.parent, step, state["score"], files, dict(state["facts"]))
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                warnings.warn(f"{path} cannot be read; its checkpoint is left aside", stacklevel=3)
        return found

    def _prune(self) -> None:
        complete = self._complete()
        kept = set(sorted(complete)[-self.keep :])
        scored = {step: found.score for step, found in complete.items() if found.score is not None}
        if scored:
            kept.add(max(scored, key=lambda step: (scored[step], step)))
        for step in set(complete) - kept:
            _remove(complete[step].path)


def _remove(path: Path) -> None:
    """Remove a checkpoint, what makes it count first."""
    (path / FACTS).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def _reader(path: Path) -> Any:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    return HuggingFaceStorageReader(str(path))


@contextmanager
def _plain_errors(team: Team) -> Iterator[None]:
    """Raise what the first process that failed raised; without torch's warning that one process alone saves or loads."""
    from torch.distributed.checkpoint.api import CheckpointException

    with warnings.catch_warnings():
        if team.size == 1:
            warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        try:
            yield
        except CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from error
