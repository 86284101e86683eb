"""How far long work is: a bar where somebody looks, and a plain line now and then where a file keeps what is said."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm import tqdm


class Bar(tqdm):
    """tqdm on a terminal; without one a line every `EVERY` seconds, and nothing of work that is shorter.

    silent: say nothing. tells_end: without a terminal, say the last step in any case. `options` are tqdm's.
    """

    EVERY = 10.0  # seconds

    def __init__(
        self, iterable: Iterable[Any] | None = None, *, silent: bool = False, tells_end: bool = False, **options: Any
    ) -> None:
        on_terminal = sys.stderr.isatty()
        self.plain, self.tells_end = not silent and not on_terminal, tells_end
        super().__init__(iterable, disable=silent or not on_terminal, dynamic_ncols=True, **options)
        self.desc, self.unit = options.get("desc", ""), options.get("unit", "it")
        self.first, self.started = self.n, time.perf_counter()
        self.said, self.beside = self.started, ""

    def __iter__(self) -> Iterator[Any]:
        if not self.plain:
            yield from super().__iter__()
            return
        for item in self.iterable:
            yield item
            self.update()

    def update(self, n: float | None = 1) -> bool | None:
        """So much more is done."""
        if not self.plain:
            return super().update(n)
        self.n += n or 0
        now = time.perf_counter()
        if now - self.said >= self.EVERY or (self.tells_end and self.n == self.total):
            self.said = now
            left = (now - self.started) / max(1, self.n - self.first) * ((self.total or self.n) - self.n)
            self.line(f"{self.beside}, {span(left)} left")
        return True

    def line(self, what: str) -> None:
        """A plain line: how far it is, and `what`."""
        done = f"{self.n:,}" if self.total is None else f"{self.n:,}/{self.total:,}"
        print(f"{self.desc.removesuffix(': ')}: {self.unit} {done}{what}", file=sys.stderr, flush=True)


def span(seconds: float) -> str:
    """A time as people say it."""
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def say(text: str) -> None:
    """A line on the terminal, above a bar that is being drawn."""
    tqdm.write(text, file=sys.stderr)
