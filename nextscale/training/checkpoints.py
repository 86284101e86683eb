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
from typing import Annotated, Any

from pydantic import Field, ValidationError
from torch import Tensor

from nextscale.files import atomic_write, digest, disk_full, read_json, sync_folder
from nextscale.processes import Team
from nextscale.settings import Settings, faults

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
        self._known: dict[Path, Checkpoint] = {}  # those that this process wrote

    def save(self, tensors: Mapping[str, Tensor], step: int, score: float | None = None, **facts: Any) -> None:
        """Write the state after `step` steps; `score`: of its validation, higher is better; `facts`: what JSON can say.

        What fails, on a full disk for example, leaves all earlier checkpoints as they are. Raises FloatingPointError, and
        writes nothing, if a number is not finite.
        """
        refuse_not_finite(tensors, self.team, step)
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
                self._known[path] = Checkpoint(path, step, score, files, facts)
        except OSError:
            if self.team.leads:
                _remove(partial)
            raise
        if self.team.leads:
            self._prune()

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole, or None where there is none. A damaged one is left aside with a warning.

        Raises ValueError if there are some and all are damaged; OSError if one cannot be read, which is not to say that it is
        damaged: nothing is changed then.
        """
        complete = self._complete()
        for _, found in sorted(complete.items(), reverse=True):
            names = sorted(found.files)[self.team.rank :: self.team.size]
            try:
                sound = all(digest(found.path / name) == found.files[name] for name in names)
            except OSError as error:
                raise _unreadable(found.path, error) from error
            if all(self.team.gather(sound)):
                return found
            warnings.warn(f"the checkpoint {found.path} is damaged; the one before it is used", stacklevel=2)
        if there := [path.name for path in sorted(self.folder.glob(NUMBER))]:
            raise ValueError(
                f"all checkpoints in {self.folder} are damaged ({', '.join(there[-3:])}), so the run cannot go on; move its "
                "folder away to begin anew, or copy a whole one back"
            )
        return None

    def all(self) -> list[Checkpoint]:
        """All that can be read, by step; whether their tensors are whole says `sound`."""
        return [found for _, found in sorted(self._complete().items())]

    def sound(self, found: Checkpoint) -> bool:
        """Whether the tensors of a checkpoint are what was written."""
        return all(digest(found.path / name) == found.files[name] for name in found.files)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Where a full disk, or the death of a process that loads images, ends the block, say what is safe and what to do."""
        try:
            yield
        except Exception as error:
            if disk_full(error):
                said = f"no space left ({error}); {self.whole()}free some space and give the same command again"
                raise OSError(errno.ENOSPC, said) from error
            # Torch says so wherever the program is at that moment.
            if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
                said = f"a process that loads images died ({str(error).splitlines()[0]}); {self.whole()}"
                raise OSError(f"{said}give the same command again, perhaps with fewer --workers") from error
            raise

    def whole(self) -> str:
        """What is safe, to say before what to do."""
        last = max(self._complete(), default=None)
        return f"the checkpoint of step {last} in {self.folder} is whole: " if last is not None else ""

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
            if path.parent in self._known:
                found[self._known[path.parent].step] = self._known[path.parent]
                continue
            try:
                state = Facts.model_validate(read_json(path, expected="what a checkpoint holds"))
                if state.step != int(path.parent.name):
                    raise ValueError(f"{path} says step {state.step}")
            except FileNotFoundError:  # another process removes it
                continue
            except OSError as error:
                raise _unreadable(path, error) from error
            except ValueError as error:
                said = faults(error) if isinstance(error, ValidationError) else str(error)
                warnings.warn(f"{path} is damaged ({said}); its checkpoint is left aside", stacklevel=3)
                continue
            found[state.step] = Checkpoint(path.parent, state.step, state.score, state.files, state.facts)
        return found

    def _prune(self) -> None:
        complete = self._complete()
        kept = set(sorted(complete)[-self.keep :])
        scored = {step: found.score for step, found in complete.items() if found.score is not None}
        if scored:
            kept.add(max(scored, key=lambda step: (scored[step], step)))
        for step in set(complete) - kept:
            self._known.pop(complete[step].path, None)
            _remove(complete[step].path)


class Facts(Settings):
    """The content of `state.json`."""

    step: int = Field(ge=0, le=10**9)
    score: float | None
    files: dict[Annotated[str, Field(pattern=r"^[\w.-]+$")], str]
    facts: dict[str, Any]


def refuse_not_finite(tensors: Mapping[str, Tensor], team: Team, step: int) -> None:
    """Raise FloatingPointError, on all processes, if one of them holds a number that is not finite."""
    local = ((name, getattr(tensor, "_local_tensor", tensor)) for name, tensor in tensors.items())
    bad = [name for name, tensor in local if tensor.is_floating_point() and not tensor.isfinite().all()]
    if names := [name for some in team.gather(bad) for name in some]:
        raise FloatingPointError(
            f"diverged at step {step}: lower --lr, or look at the data of the last steps; {names[0]}"
            f"{' and others' if len(names) > 1 else ''} holds numbers that are not finite, so nothing was saved"
        )


def _unreadable(path: Path, error: OSError) -> OSError:
    return OSError(
        error.errno,
        f"{path} cannot be read ({error.strerror or error}); nothing was changed: make it readable and give the same command "
        "again, or give another --out",
        str(path),
    )


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
