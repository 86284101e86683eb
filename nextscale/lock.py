"""One training in a folder at a time."""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FILE = ".lock"


@contextmanager
def alone_in(run: Path) -> Iterator[None]:
    """Hold the folder of a run for as long as the block lasts. The system lets go of it when the process ends, however it does.

    Raises BlockingIOError, which names the other process, if one holds it. Where files cannot be locked (some network disks),
    there is a warning.
    """
    try:
        import fcntl
    except ImportError:  # no such system
        yield
        return
    run.mkdir(parents=True, exist_ok=True)
    with (run / FILE).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            other = file.read(200).strip() or "another process"
            raise BlockingIOError(
                f"{run} is in use by another training ({other}); wait until it ends, or give another --out"
            ) from None
        except OSError as error:
            warnings.warn(
                f"{run} cannot be locked ({error.strerror}); take care that one training alone uses it", stacklevel=3
            )
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
