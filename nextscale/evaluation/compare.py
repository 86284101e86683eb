"""Reports side by side: one table, one plot."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nextscale.evaluation.score import read_score
from nextscale.extras import need
from nextscale.files import as_path, atomic_write

HIGHER = (
    "psnr",
    "ssim",
    "precision",
    "recall",
    "inception_score",
    "accuracy",
    "diversity",
    "used",
    "perplexity",
    "nearest",
)


def flat_scores(report: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a report that two systems can be compared by, by name."""
    values = {**report.get("scores", {})}
    if "tokenizer" in report:  # of `evaluate`
        last = report["tokenizer"][-1]
        values |= {name: last[name] for name in ("psnr", "used", "perplexity") if name in last}
        for condition, found in _table(report, "likelihood", "model").items():
            for measure in ("cross_entropy", "accuracy"):
                values[f"{measure}, {condition}"] = _table({"found": found}, "found", measure).get("mean")
    return {
        name: float(value) for name, value in values.items() if isinstance(value, int | float) and math.isfinite(value)
    }


def _table(report: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    """What stands in a report under these names, if it is a table; else an empty one."""
    found: Any = report
    for name in names:
        found = found.get(name) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}


def compare(reports: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str], names: Sequence[str] = ()) -> Path:
    """Write `compare.md` and `compare.png` of reports of `score` or `evaluate` into the folder `out`; returns the first.

    names: of the columns; default: the folders'. Scores whose references or networks differ are marked: they are no comparison.
    """
    need("eval", "a plot of reports")
    out = as_path(out, "a folder to write")
    if len(reports) < 2:
        raise ValueError(f"compare needs two reports or more, got {len(reports)}; give their folders")
    if names and len(names) != len(reports):
        raise ValueError(f"expected a name for each of {len(reports)} reports, got {len(names)}")
    found = [read_score(path) for path in reports]
    titles = list(names) or _titles([Path(path) for path in reports])
    values = [flat_scores(report) for report in found]
    rows = list(dict.fromkeys(name for one in values for name in one))
    if not rows:
        raise ValueError("these reports have no numbers in common to compare")
    differences = _differences(found, titles)
    lines = ["# Comparison", "", f"| score | {' | '.join(titles)} |", "| --- " * (len(titles) + 1) + "|"]
    for name in rows:
        best = _best(name, [one.get(name) for one in values])
        cells = [
            "" if name not in one else f"**{one[name]:.4g}**" if i in best else f"{one[name]:.4g}"
            for i, one in enumerate(values)
        ]
        lines.append(f"| {name} ({'higher' if _higher(name) else 'lower'} is better) | {' | '.join(cells)} |")
    lines += ["", "Bold: the best of a row.", "", "![comparison](compare.png)", ""]
    if differences:
        lines += ["Not the same protocol, so read across with care:", "", *(f"* {text}" for text in differences), ""]
    _draw(rows, values, titles, out / "compare.png")
    with atomic_write(out / "compare.md") as path:
        path.write_text("\n".join(lines), encoding="utf-8")
    return out / "compare.md"


def _titles(paths: Sequence[Path]) -> list[str]:
    """The names of folders, as far as they tell them apart."""
    folders = [path if path.is_dir() else path.absolute().parent for path in paths]
    short = [folder.name for folder in folders]
    return short if len(set(short)) == len(short) else [str(folder) for folder in folders]


def _higher(name: str) -> bool:
    return any(word in name for word in HIGHER)


def _best(name: str, values: Sequence[float | None]) -> list[int]:
    there = [value for value in values if value is not None]
    if len(there) < 2:
        return []
    best = max(there) if _higher(name) else min(there)
    return [i for i, value in enumerate(values) if value == best]


def _differences(reports: Sequence[Mapping[str, Any]], titles: Sequence[str]) -> list[str]:
    """Where protocols differ so that numbers cannot be compared."""
    found = []
    asked = {
        "reference": ("reference", "digest"),
        "features": ("network", "digest"),
        "number of samples": ("samples", "count"),
        "size of images": ("samples", "size"),
    }
    for what, (part, key) in asked.items():
        said = [_table(report, "protocol", part).get(key) for report in reports]
        kinds: dict[str, list[str]] = {}
        for title, value in zip(titles, said, strict=True):
            if value is not None:
                kinds.setdefault(str(value)[:16], []).append(title)
        if len(kinds) > 1:
            found.append(f"{what}: " + "; ".join(f"{' and '.join(names)}: {value}" for value, names in kinds.items()))
    for report, title in zip(reports, titles, strict=True):
        warnings = _table(report, "protocol").get("warnings", [])
        listed = warnings if isinstance(warnings, list) else []
        found += [f"{title}: {one['what']}" for one in listed if isinstance(one, dict) and "what" in one]
    return found


def _draw(rows: Sequence[str], values: Sequence[Mapping[str, float]], titles: Sequence[str], path: Path) -> None:
    from matplotlib.figure import Figure

    columns = min(4, len(rows))
    lines = math.ceil(len(rows) / columns)
    figure = Figure(figsize=(3.6 * columns, 0.9 + lines * (1.1 + 0.34 * len(titles))), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis, name in zip(axes, rows, strict=False):
        numbers = [one.get(name, math.nan) for one in values]
        axis.barh(
            range(len(titles)),
            [0 if math.isnan(x) else x for x in numbers],
            color=[f"C{i}" for i in range(len(titles))],
        )
        axis.set_yticks(range(len(titles)), titles, fontsize=8)
        axis.invert_yaxis()
        axis.set_title(f"{name} ({'higher' if _higher(name) else 'lower'} is better)", fontsize=9)
        for i, value in enumerate(numbers):
            axis.annotate(
                " -" if math.isnan(value) else f" {value:.4g}",
                (0 if math.isnan(value) else value, i),
                va="center",
                fontsize=7,
            )
        axis.margins(x=0.25)
    for axis in axes[len(rows) :]:
        axis.axis("off")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
