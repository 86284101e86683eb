"""Scaling laws: the power laws that losses of growing models follow, their figures, and what they foretell (Sec. 4.2 of
VAR)."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from nextscale.data.dataset import pictures
from nextscale.data.images import save_images
from nextscale.encoded import encode_images
from nextscale.evaluation.curves import read_metrics
from nextscale.evaluation.likelihood import scale_counts, unigram_entropy
from nextscale.evaluation.networks import lite0_features
from nextscale.evaluation.report import draw_as_often, table
from nextscale.evaluation.scores import kernel_distance
from nextscale.extras import need
from nextscale.features import Lite0
from nextscale.files import as_path, atomic_write
from nextscale.schedule import Schedule
from nextscale.training.ladder import Rung, loaded

if TYPE_CHECKING:
    from nextscale.data.source import SourceImages

# What is fitted, in the paper's order, and its published exponents: against parameters, and against the least compute.
MEASURES = {
    "loss_last": ("loss, last scale", -0.23, -0.13),
    "loss_all": ("loss, all scales", -0.20, -0.16),
    "error_last": ("token error, last scale", -0.016, -0.0067),
    "error_all": ("token error, all scales", -0.010, -0.011),
}
SHOWN = 8  # pictures that each size draws
PETA = 1e15


class Interval(NamedTuple):
    """95 % confidence."""

    low: float
    high: float


@dataclass(frozen=True)
class PowerLaw:
    """`y = factor * x ** exponent`, the least squares of `log y` over `log x`; r: Pearson's correlation of the two."""

    exponent: float
    factor: float
    r: float
    exponent_interval: Interval
    r_interval: Interval
    points: int

    def __call__(self, x: float) -> float:
        return self.factor * x**self.exponent

    @property
    def scale(self) -> float:
        """The paper's beta: the same law is `(beta x) ** exponent`."""
        try:
            return self.factor ** (1 / self.exponent)
        except (OverflowError, ZeroDivisionError):  # of hardly any slope
            return math.inf

    def words(self, letter: str = "N") -> str:
        """The law as the paper writes it."""
        return f"({self.scale:.2g} {letter})^{self.exponent:.3g}"


def fit_power(x: Sequence[float], y: Sequence[float]) -> PowerLaw:
    """The power law of positive numbers `y` at positive `x`; at least three different ones. Raises ValueError for others."""
    if len(x) != len(y) or len(set(x)) < 3 or min(*x, *y) <= 0 or not all(map(math.isfinite, [*x, *y])):
        raise ValueError(
            f"a power law needs positive numbers at three different places or more, got {len(y)} at {len(set(x))}; train more "
            "sizes"
        )
    from scipy import stats

    logs = [math.log(value) for value in x], [math.log(value) for value in y]
    line = stats.linregress(*logs)
    half = float(stats.t.ppf(0.975, len(x) - 2) * line.stderr)
    r = stats.pearsonr(*logs)
    # Fisher's interval needs four points.
    around = r.confidence_interval(0.95) if len(x) > 3 else (-1.0, 1.0)
    slope = float(line.slope)
    return PowerLaw(
        exponent=slope,
        factor=math.exp(float(line.intercept)),
        r=float(r.statistic),
        exponent_interval=Interval(slope - half, slope + half),
        r_interval=Interval(*map(float, around)),
        points=len(x),
    )


@dataclass(frozen=True)
class Training:
    """What one training of a ladder left: curves of held-out measures by step."""

    depth: int
    width: int
    seed: int
    parameters: int  # N, without embeddings and head
    flop_per_step: float
    curves: dict[str, dict[int, float]]  # measure -> step -> value

    def final(self, measure: str) -> float:
        """At the last step."""
        return next(reversed(self.curves[measure].values()))

    def compute(self, step: int) -> float:
        """Operations until a step, in PFLOP."""
        return step * self.flop_per_step / PETA


def measured(rung: Rung, parameters: int, flop_per_step: float, schedule: Schedule) -> Training:
    """What the log of a rung's training says of held-out images, without label smoothing: cross-entropy in nats, and the
    share of tokens whose most likely code is wrong."""
    logged, last, lengths = read_metrics(rung.folder), len(schedule) - 1, schedule.lengths
    losses = [logged.get(f"val/cross_entropy/{k}", {}) for k in range(len(schedule))]
    accuracies = [logged.get(f"val/accuracy/{k}", {}) for k in range(len(schedule))]
    if not losses[last]:
        raise ValueError(f"{rung.folder} logged no validation; train the ladder again in another --out")

    def mean(values: Sequence[Mapping[int, float]], step: int) -> float:
        return sum(of_scale[step] * n for of_scale, n in zip(values, lengths, strict=True)) / schedule.length

    steps = sorted(losses[last])
    curves = {
        "loss_last": {step: losses[last][step] for step in steps},
        "loss_all": {step: mean(losses, step) for step in steps},
        "error_last": {step: 1 - accuracies[last][step] for step in steps},
        "error_all": {step: 1 - mean(accuracies, step) for step in steps},
    }
    return Training(rung.depth, rung.width * rung.depth, rung.seed, parameters, flop_per_step, curves)


def frontier(trainings: Sequence[Training], measure: str) -> list[tuple[float, float]]:
    """(C_min in PFLOP, value): the least compute at which any model comes down to a value, of all points that were measured."""
    points = sorted((t.compute(step), value) for t in trainings for step, value in t.curves[measure].items())
    best: list[tuple[float, float]] = []
    for compute, value in points:
        if compute > 0 and value > 0 and (not best or value < best[-1][1]):
            best.append((compute, value))
    return best


def laws(trainings: Sequence[Training]) -> dict[str, Any]:
    """The fits of all measures against parameters (in billions, as the paper counts) and the least compute (PFLOP), and
    what the smaller sizes say of the largest."""
    largest = max(t.parameters for t in trainings)
    smaller = [t for t in trainings if t.parameters < largest]
    result: dict[str, Any] = {}
    for measure in MEASURES:
        billions = [t.parameters / 1e9 for t in trainings]
        entry: dict[str, Any] = {"parameters": fit_power(billions, [t.final(measure) for t in trainings])}
        best = frontier(trainings, measure)
        entry["compute"] = fit_power(*zip(*best, strict=True)) if len(best) > 2 else None
        if len({t.parameters for t in smaller}) > 2:
            law = fit_power([t.parameters / 1e9 for t in smaller], [t.final(measure) for t in smaller])
            found = [t.final(measure) for t in trainings if t.parameters == largest]
            value = sum(found) / len(found)
            entry["largest"] = {
                "foretold": law(largest / 1e9),
                "measured": value,
                "off": law(largest / 1e9) / value - 1,
            }
        result[measure] = entry
    return result


def scaling_report(
    trainings: Sequence[Training],
    ladder: Sequence[Rung],
    images: SourceImages,
    out: str | os.PathLike[str],
    *,
    samples: int = 0,
    device: str = "cpu",
) -> Path:
    """Write `scaling.md`, `scaling.json` and `scaling.png` into the folder `out`; returns the first.

    Args:
        samples: images that each size of the first seed draws for `kid_lite0`, and of which `samples.png` shows some.
    """
    need("eval", "the report of a ladder")
    out = as_path(out, "a folder to write")
    system = loaded(ladder[0])
    held_out = encode_images(system, images.val)
    entropy = unigram_entropy(scale_counts(system, held_out.content))
    lengths = system.schedule.lengths
    baseline = {
        "loss_last": entropy[-1],
        "loss_all": sum(value * n for value, n in zip(entropy, lengths, strict=True)) / sum(lengths),
    }
    found = laws(trainings)
    quality = _quality(ladder, images, samples, out, device) if samples else {}
    report = {
        "trainings": [
            {**asdict(t), "curves": {name: list(curve.items()) for name, curve in t.curves.items()}} for t in trainings
        ],
        "unigram_entropy": baseline,
        "laws": {
            name: {key: asdict(value) if isinstance(value, PowerLaw) else value for key, value in entry.items()}
            for name, entry in found.items()
        },
        "kid_lite0": quality,
    }
    with atomic_write(out / "scaling.json") as path:
        path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    _draw(trainings, found, baseline, quality, out / "scaling.png")
    with atomic_write(out / "scaling.md") as path:
        path.write_text(_markdown(trainings, found, baseline, quality, samples), encoding="utf-8")
    return out / "scaling.md"


@torch.no_grad()
def _quality(
    ladder: Sequence[Rung], images: SourceImages, count: int, out: Path, device: str
) -> dict[int, dict[str, float]]:
    """kid_lite0 to held-out and to training images of what each depth draws, the first seed's model, under the same labels and
    seeds; and a picture with a row for each."""
    network = Lite0()
    references = {
        "held-out": lite0_features(pictures(images.val), network),
        "training": lite0_features(pictures(images.train), network),
    }
    seed, rows, names, found = ladder[0].seed, [], [], {}
    for rung in (rung for rung in ladder if rung.seed == seed):
        system = loaded(rung).to(device)
        drawn, said, _ = draw_as_often(system, encode_images(system, images.val), images.classes, count, seed=0)
        features = lite0_features(drawn, network)
        found[rung.depth] = {name: kernel_distance(features, known) for name, known in references.items()}
        firsts = [said.index(name) for name in dict.fromkeys(said)]  # of different labels, as far as there are
        shown = sorted([*firsts, *(i for i in range(count) if i not in firsts)][:SHOWN])
        rows.append(drawn[shown])
        names += [f"d{rung.depth} {said[i]}" for i in shown]
    title = "A row for each size; the same labels and seeds"
    save_images(torch.cat(rows), out / "samples.png", columns=SHOWN, labels=names, title=title)
    return found


def _draw(
    trainings: Sequence[Training],
    found: Mapping[str, Any],
    baseline: Mapping[str, float],
    quality: Mapping[int, Mapping[str, float]],
    path: Path,
) -> None:
    """The paper's figures: each measure against parameters (above) and against compute (below), with its law."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    columns = len(MEASURES) + bool(quality)
    figure = Figure(figsize=(4.6 * columns, 8.4), layout="constrained")
    above, below = figure.subplots(2, columns, squeeze=False)
    depths = sorted({t.depth for t in trainings})
    shades = {depth: colormaps["viridis"](0.9 * i / max(1, len(depths) - 1)) for i, depth in enumerate(depths)}
    for axis, lower, (measure, (name, _, _)) in zip(above, below, MEASURES.items(), strict=False):
        law: PowerLaw = found[measure]["parameters"]
        for t in trainings:
            axis.plot(t.parameters / 1e6, t.final(measure), "o", color=shades[t.depth])
            points = {t.compute(step): value for step, value in t.curves[measure].items() if step}
            lower.plot(list(points), list(points.values()), color=shades[t.depth], linewidth=1.0, alpha=0.7)
        sizes = sorted({t.parameters for t in trainings})
        axis.plot(
            [n / 1e6 for n in sizes], [law(n / 1e9) for n in sizes], "k--", label=f"{law.words()}, r = {law.r:.4f}"
        )
        if measure in baseline:
            axis.axhline(baseline[measure], color="gray", linewidth=0.8, linestyle=":", label="unigram entropy")
        axis.set_xlabel("parameters without embeddings, millions")
        best = frontier(trainings, measure)
        if (law_of_compute := found[measure]["compute"]) is not None:
            at = [compute for compute, _ in best]
            label = f"{law_of_compute.words('C')}, r = {law_of_compute.r:.4f}"
            lower.plot(at, [law_of_compute(c) for c in at], "k--", label=label)
        lower.set_xlabel("training compute, PFLOP")
        for one in (axis, lower):
            _finish(one, name)
    if quality:
        size = {t.depth: t.parameters / 1e6 for t in trainings}
        for reference in next(iter(quality.values())):
            points = {size[depth]: max(values[reference], 1e-6) for depth, values in quality.items()}
            above[-1].plot(list(points), list(points.values()), "o-", label=f"to {reference} images")
        above[-1].set_xlabel("parameters without embeddings, millions")
        _finish(above[-1], "kid_lite0 of samples")
        below[-1].axis("off")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def _finish(axis: Any, name: str) -> None:
    axis.set_xscale("log")
    axis.set_yscale("log")
    for ticks in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        ticks("{x:.3g}")
    axis.set_ylabel(name)
    axis.grid(True, which="both", alpha=0.3)
    axis.legend(fontsize=8)


def _markdown(
    trainings: Sequence[Training],
    found: Mapping[str, Any],
    baseline: Mapping[str, float],
    quality: Mapping[int, Mapping[str, float]],
    samples: int,
) -> str:
    span = max(t.parameters for t in trainings) / min(t.parameters for t in trainings)
    steps = max(trainings[0].curves["loss_all"])
    rows = [
        [
            t.depth,
            t.width,
            t.seed,
            f"{t.parameters:,}",
            f"{t.compute(steps):.3g}",
            *(f"{t.final(measure):.4f}" for measure in MEASURES),
        ]
        for t in trainings
    ]
    fits = []
    for measure, (name, published, of_compute) in MEASURES.items():
        entry = found[measure]
        for against, theirs in (("parameters", published), ("compute", of_compute)):
            if (law := entry[against]) is not None:
                low, high = law.exponent_interval
                fits.append(
                    [
                        f"{name} against {against}",
                        f"{law.exponent:.4f} ({low:.4f} to {high:.4f})",
                        f"{law.r:.4f} ({law.r_interval.low:.4f} to {law.r_interval.high:.4f})",
                        law.points,
                        theirs,
                    ]
                )
    lines = [
        "# Scaling laws",
        "",
        f"{len(trainings)} trainings of {steps:,} steps, {span:.0f}x in parameters. Held-out images; cross-entropy "
        f"in nats a token, token",
        "error the share of tokens whose most likely code is wrong. Parameters: of the blocks, without embeddings and head.",
        "",
        *table(
            ["depth", "width", "seed", "parameters", "PFLOP", *(name for name, _, _ in MEASURES.values())],
            rows,
        ),
        "",
        f"The best table of frequencies at each scale has {baseline['loss_last']:.4f} (last scale) and "
        f"{baseline['loss_all']:.4f} (all).",
        "",
        "## Laws",
        "",
        "Least squares in logarithms, 95 % intervals in brackets; the exponents of the paper are for ImageNet, 18 M "
        "to 2 B parameters.",
        "Compute: the least at which any model comes down to a value.",
        "",
        *table(["law", "exponent", "Pearson r", "points", "paper's exponent"], fits),
        "",
    ]
    if foretold := {MEASURES[m][0]: entry["largest"] for m, entry in found.items() if "largest" in entry}:
        lines += [
            "The largest size, foretold from all others:",
            "",
            *table(
                ["measure", "foretold", "measured", "off by"],
                [
                    [name, f"{e['foretold']:.4f}", f"{e['measured']:.4f}", f"{e['off']:+.2%}"]
                    for name, e in foretold.items()
                ],
            ),
            "",
        ]
    lines += ["![scaling](scaling.png)", ""]
    if quality:
        references = list(next(iter(quality.values())))
        lines += [
            f"## Samples\n\n`kid_lite0` of {samples} samples of each size's first seed (0: alike).",
            "",
            *table(
                ["depth", *(f"to {name} images" for name in references)],
                [[depth, *(f"{values[name]:.4f}" for name in references)] for depth, values in quality.items()],
            ),
            "",
            "![samples](samples.png)",
            "",
        ]
    return "\n".join(lines)
