"""What a data set does not use of what it was given: counted, with the reason and some names."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Mapping

NAMED = 3  # examples of each reason


class LeftOut:
    """Files or rows that are not used, by reason; `total`: how many there were, used ones among them.

    `add(reason, name)` while a data set is read; then `counts`, by reason, and `summary()`, one sentence or nothing.
    """

    def __init__(self) -> None:
        self.total = 0
        self._names: dict[str, list[str]] = defaultdict(list)
        self.counts: dict[str, int] = {}

    def add(self, reason: str, name: str, count: int = 1) -> None:
        """One more (or `count`) for a reason; `name` says which."""
        self.counts[reason] = self.counts.get(reason, 0) + count
        if len(self._names[reason]) < NAMED:
            self._names[reason].append(name[-80:])

    @property
    def names(self) -> Mapping[str, list[str]]:
        """Some names by reason."""
        return self._names

    def __bool__(self) -> bool:
        return bool(self.counts)

    def summary(self) -> str:
        """`left out 3 of 120: 2 without a label (a, b), 1 in a format that is not read (c.heic)`."""
        if not self:
            return ""
        reasons = ", ".join(
            f"{count} {reason} ({', '.join(self._names[reason])}{', ...' if count > len(self._names[reason]) else ''})"
            for reason, count in self.counts.items()
        )
        return f"left out {sum(self.counts.values())} of {self.total}: {reasons}"

    def warn(self, where: str) -> None:
        """Say it once, if there is something to say."""
        if self:
            warnings.warn(f"{where}: {self.summary()}", stacklevel=4)
