"""Checkpoints of a run: numbered, whole or absent, verified when read; the newest ones and the best are kept."""

from __future__ import annotations

import errno
import hashlib
import json
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from nextscale.files import atomic_write


class Checkpoints:
    """The folder `checkpoints` of a run.

    `00000500.pt` is the state after 500 steps; `00000500.json`, written after it, has its digest and score and says that
    it is complete. A process may die at any moment: what it was writing is cleared away by the next one.

    Args:
        folder: made when the first checkpoint is written.
        keep: newest checkpoints that stay; the one with the best score stays too.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def save(self, state: dict[str, Any], step: int, score: float | None = None) -> None:
        """Write the state after `step` steps; `score`: of its validation, higher is better.

        A full disk raises OSError and leaves all earlier checkpoints as they are.
        """
        path = self.folder / f"{step:08}.pt"
        try:
            with atomic_write(path) as temporary:
                torch.save(state, temporary)
                digest = _digest(temporary)
            with atomic_write(path.with_suffix(".json")) as temporary:
                facts = {"step": step, "score": score, "blake2b": digest}
                temporary.write_text(json.dumps(facts) + "\n", encoding="utf-8")
        except (OSError, RuntimeError) as error:  # torch's writer knows only RuntimeError
            if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            last = max(self._complete(), default=None)
            raise OSError(
                errno.ENOSPC,
                f"no space left for the checkpoint of step {step} in {self.folder}; "
                + (f"that of step {last} is whole: " if last is not None else "")
                + "free some space and give the same command again",
            ) from error
        self._prune()

    def newest(self) -> dict[str, Any] | None:
        """The newest state that is whole, on the CPU, or None. A damaged one is left aside with a warning."""
        for step, facts in sorted(self._complete().items(), reverse=True):
            path = self.folder / f"{step:08}.pt"
            if path.is_file() and _digest(path) == facts["blake2b"]:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            warnings.warn(f"the checkpoint {path} is damaged; the one before it is used", stacklevel=2)
        return None

    def best_score(self) -> float | None:
        """The highest score of a checkpoint so far."""
        return max((s for facts in self._complete().values() if (s := facts["score"]) is not None), default=None)

    def clear(self, after: int) -> None:
        """Remove what a process that died left half-written, and checkpoints of steps after `after`."""
        complete = self._complete()
        for path in self.folder.glob("*") if self.folder.is_dir() else ():
            step = int(path.stem) if path.stem.isdecimal() else None
            if step is None or step not in complete or step > after:
                with suppress(OSError):
                    path.unlink()

    def _complete(self) -> dict[int, dict[str, Any]]:
        """What is known of each complete checkpoint, by step."""
        found = {}
        for path in self.folder.glob("*.json"):
            try:
                facts = json.loads(path.read_text(encoding="utf-8"))
                found[int(facts["step"])] = {"score": facts["score"], "blake2b": facts["blake2b"]}
            except (ValueError, KeyError, TypeError):
                warnings.warn(f"{path} cannot be read; its checkpoint is left aside", stacklevel=3)
        return found

    def _prune(self) -> None:
        complete = self._complete()
        kept = set(sorted(complete)[-self.keep :])
        scored = {step: facts["score"] for step, facts in complete.items() if facts["score"] is not None}
        if scored:
            kept.add(max(scored, key=lambda step: (scored[step], step)))
        for step in set(complete) - kept:
            for suffix in (".json", ".pt"):  # the mark first: a half-removed one must not count
                with suppress(OSError):
                    (self.folder / f"{step:08}{suffix}").unlink()


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=32)
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()
