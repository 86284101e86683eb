"""What a data set does not use of what it was given: counted, with the reason and some names."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Mapping

NAMED = 3  # examples of each reason
REASONS = 5  # that are named


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

    def add_hidden(self, name: str) -> None:
        """One more that is called an image, and is none of the user's."""
        self.total += 1
        self.add("hidden, or left behind by a system", name)

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
        many = len(self.counts) > 2
        most = sorted(self.counts, key=lambda reason: -self.counts[reason])[:REASONS]
        named = []
        for reason in [reason for reason in self.counts if reason in most]:
            names = self._names[reason][: 1 if many else NAMED]
            more = ", ..." if self.counts[reason] > len(names) else ""
            named.append(f"{self.counts[reason]} {reason} ({', '.join(names)}{more})")
        if others := sum(count for reason, count in self.counts.items() if reason not in most):
            named.append(f"{others} for {len(self.counts) - len(most)} other reasons")
        return f"left out {sum(self.counts.values())} of {self.total}: {', '.join(named)}"

    def warn(self, where: str) -> None:
        """Say it once, if there is something to say."""
        if self:
            warnings.warn(f"{where}: {self.summary()}", stacklevel=4)
