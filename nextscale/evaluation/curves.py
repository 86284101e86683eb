"""Training curves: the `metrics.jsonl` of runs as one picture."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from nextscale.extras import need
from nextscale.files import atomic_write, check_readable

Curves = dict[str, dict[int, float]]  # name -> step -> value
PathLike = str | os.PathLike[str]


def read_metrics(path: PathLike) -> Curves:
    """Values by name and step of a `metrics.jsonl`, or of the one in a run's folder.

    A run that was resumed repeats some steps; the last value of each step counts. A line that a kill cut short is left
    out, with a warning unless it is the last. Raises FileNotFoundError, and ValueError for a file without metrics.
    """
    path = Path(path)
    path = path / "metrics.jsonl" if path.is_dir() else path
    check_readable(path, "the metrics.jsonl of a training run, or its folder")
    curves: Curves = {}
    bad: list[int] = []
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            values = json.loads(line)
            step = int(values["step"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            if number < len(lines):
                bad.append(number)
            continue
        for name, value in values.items():
            if name not in ("step", "time") and isinstance(value, int | float):  # alarms are sentences
                curves.setdefault(name, {})[step] = float(value)
    if not curves:
        raise ValueError(f"{path} holds no metrics; expected JSON lines with `step` and `train/...` or `val/...`")
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        warnings.warn(f"{path}, line {bad[0]}{more}, is not a line of metrics and is left out", stacklevel=2)
    # Lines of a resumed run come in the order of writing.
    return {name: dict(sorted(points.items())) for name, points in curves.items()}


def plot_run(metrics: PathLike | Iterable[PathLike], out: PathLike) -> Path:
    """Draw the curves of one run, or of several below each other, into the PNG `out`; returns its path.

    Tokenizer runs: losses, validation PSNR after each scale, perplexity of each scale. Generator runs: loss, loss of
    each scale, accuracy of each scale. `metrics`: `metrics.jsonl` files, or folders of runs. Errors as in
    `read_metrics`; ModuleNotFoundError without matplotlib.
    """
    need("eval", "drawing curves")
    from matplotlib.figure import Figure

    paths = [Path(p) for p in ([metrics] if isinstance(metrics, (str, os.PathLike)) else metrics)]
    runs = [read_metrics(path) for path in paths]
    if not runs:
        raise ValueError("plot_run: expected at least one metrics.jsonl, got none")
    figure = Figure(figsize=(16, 4.5 * len(runs)), layout="constrained")  # no pyplot: nothing global, no window
    rows = figure.subplots(len(runs), 3, squeeze=False)
    for path, curves, axes in zip(paths, runs, rows, strict=True):
        kind = "generator" if "train/loss/0" in curves or "val/cross_entropy/0" in curves else "tokenizer"
        (_draw_generator if kind == "generator" else _draw_tokenizer)(axes, curves)
        folder = path if path.is_dir() else path.resolve().parent
        axes[0].set_title(f"{folder.name} ({kind})", loc="left", fontweight="bold")
    with atomic_write(out) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    return Path(out)


def _draw_tokenizer(axes: Sequence[Any], curves: Curves) -> None:
    loss, quality, perplexity = axes
    for i, name in enumerate(
        ("loss", "l1", "l2", "codebook", "perceptual_lite0", "lpips", "adversarial", "discriminator/loss")
    ):
        points = curves.get(f"train/{name}", {})
        # A term that is not switched on yet is logged as 0, which has no logarithm.
        _line(loss, {step: value for step, value in points.items() if value > 0}, name, f"C{i}")
    for k, name, colour in _scales(curves, "val/psnr/"):
        _line(quality, curves[name], f"scale {k}", colour, marker="o")
    for k, name, colour in _scales(curves, "train/perplexity/"):
        _line(perplexity, curves[name], None, colour, linewidth=0.8, alpha=0.5)
        _line(perplexity, curves.get(f"val/perplexity/{k}"), f"scale {k}", colour, marker="o")
    _finish(loss, "training loss", log=True)
    _finish(quality, "validation PSNR, dB")
    _finish(perplexity, "perplexity (thin: training)", log=True)


def _draw_generator(axes: Sequence[Any], curves: Curves) -> None:
    loss, scales, accuracy = axes
    _line(loss, curves.get("train/loss"), "training", "C0", linewidth=1.0)
    _line(loss, curves.get("val/loss"), "validation", "C1", marker="o")
    for k, name, colour in _scales(curves, "train/loss/"):
        _line(scales, curves[name], None, colour, linewidth=0.8, alpha=0.5)
        _line(scales, curves.get(f"val/cross_entropy/{k}"), f"scale {k}", colour, marker="o")
    for k, name, colour in _scales(curves, "val/accuracy/"):
        _line(accuracy, curves[name], f"scale {k}", colour, marker="o")
    _finish(loss, "nats a token, all scales")
    _finish(scales, "nats a token (thin: training)")
    _finish(accuracy, "validation accuracy (top 1)")


def _scales(curves: Curves, prefix: str) -> list[tuple[int, str, Any]]:
    """Scale, name and colour (dark to light, coarse to fine) of all curves `prefix` + number."""
    from matplotlib import colormaps

    numbers = sorted(int(name.removeprefix(prefix)) for name in curves if name.removeprefix(prefix).isdecimal())
    shades = [0.9 * i / max(1, len(numbers) - 1) for i in range(len(numbers))]  # the lightest yellow is hard to see
    return [(k, f"{prefix}{k}", colormaps["viridis"](shade)) for k, shade in zip(numbers, shades, strict=True)]


def _line(axis: Any, points: dict[int, float] | None, label: str | None, colour: Any, **style: Any) -> None:
    if points:
        # A point alone draws no line; markers would clutter a long curve.
        style = {"marker": "." if len(points) < 3 else None, "markersize": 3.5, "linewidth": 1.3} | style
        axis.plot(list(points), list(points.values()), label=label, color=colour, **style)


def _finish(axis: Any, title: str, log: bool = False) -> None:
    axis.set_xlabel("step")
    axis.set_ylabel(title)
    axis.grid(True, alpha=0.3)
    if not axis.lines:
        axis.text(0.5, 0.5, "nothing logged yet", ha="center", va="center", transform=axis.transAxes, color="gray")
        return
    if log:
        axis.set_yscale("log")
    if any(not line.get_label().startswith("_") for line in axis.lines):
        axis.legend(fontsize=8, ncols=2)
