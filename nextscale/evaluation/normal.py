"""Is my run normal? Its curves against those of runs that went well, as bands over the images seen."""

from __future__ import annotations

import json
import os
from bisect import bisect_left
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from nextscale.evaluation.curves import read_metrics
from nextscale.files import read_json
from nextscale.settings import brief, cut

Kind = Literal["tokenizer", "generator"]
# What is compared: few, and the same names in all runs of a kind.
WATCHED: dict[str, tuple[str, ...]] = {
    "tokenizer": ("val/psnr", "train/l2", "train/grad_norm"),
    "generator": ("val/loss", "train/loss", "train/grad_norm"),
}
# Half the width of a band made of one run, as a share of the value: about what another seed or batch size moves.
WIDTH = {"val/psnr": 0.06, "train/l2": 0.4, "val/loss": 0.06, "train/loss": 0.08, "train/grad_norm": 0.7}
POINTS = 24


@dataclass(frozen=True)
class Departure:
    """Where a curve left its band, and for how much of the run so far."""

    metric: str
    images: int
    value: float
    low: float
    high: float
    share: float

    def __str__(self) -> str:
        where = "above" if self.value > self.high else "below"
        return (
            f"{self.metric} is {where} its band for {self.share:.0%} of the run, first at {self.images:,} images: "
            f"{self.value:.4g}, expected {self.low:.4g} to {self.high:.4g}"
        )


def presets() -> dict[str, Any]:
    """The shipped bands: by preset and kind, for each metric lists of images, low and high."""
    text = resources.files("nextscale.evaluation").joinpath("bands.json").read_text(encoding="utf-8")
    return json.loads(text)


def bands_of(out: str | os.PathLike[str], kind: Kind, batch_size: int) -> dict[str, dict[str, list[float]]]:
    """Bands around the curves of one run: the median of its neighbourhood, at `POINTS` places, wide by `WIDTH`."""
    found = {}
    for metric in WATCHED[kind]:
        curve = _curve(out, metric, batch_size)
        if not curve:
            raise ValueError(f"{out} has no {metric}; it is no run of a {kind}")
        places = (
            curve
            if len(curve) <= POINTS
            else [curve[round(i * (len(curve) - 1) / (POINTS - 1))] for i in range(POINTS)]
        )
        half = len(curve) // POINTS // 2
        rows: dict[str, list[float]] = {"images": [], "low": [], "high": []}
        for images, _ in places:
            at = bisect_left(curve, (images, float("-inf")))
            near = sorted(value for _, value in curve[max(0, at - half) : at + half + 1])
            centre, width = near[len(near) // 2], WIDTH[metric]
            spread = near if len(near) > 4 else [centre]
            rows["images"].append(images)
            rows["low"].append(float(f"{min(spread[0], centre * (1 - width)):.5g}"))
            rows["high"].append(float(f"{max(spread[-1], centre * (1 + width)):.5g}"))
        found[metric] = rows
    return found


def check_run(out: str | os.PathLike[str], preset: str = "emoji-64") -> list[Departure]:
    """Where the curves of a run leave the bands of a preset; empty if they do not, beyond single outliers (a twentieth).

    The run's folder says what it trains and with which batch size (`run.json`). Raises ValueError for an unknown preset or
    a folder that is no run.
    """
    out = Path(out)
    known = presets()
    if preset not in known:
        raise ValueError(f"no bands for the preset {preset!r}; there are {', '.join(known)}")
    path = out / "run.json"
    if not path.exists():
        raise FileNotFoundError(f"{out} has no run.json; expected the folder of a run of `nextscale train`")
    facts = read_json(path, expected="the record of a run")
    try:
        kind, batch_size = facts["kind"], int(facts["config"]["batch_size"])
        if kind not in known[preset]:
            raise ValueError(f"kind {brief(kind)}")
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        said = f"{path} is not the record of a run, of a tokenizer or a generator: {cut(str(error), 100)}"
        raise ValueError(f"{said}; expected the folder of a run of `nextscale train`") from error
    departures = []
    for metric, band in known[preset][kind].items():
        curve = [(images, value) for images, value in _curve(out, metric, batch_size) if images <= band["images"][-1]]
        outside = [(images, value) for images, value in curve if not _inside(band, images, value)]
        if len(outside) > len(curve) / 20:
            longest = max(_runs(curve, outside), key=len)  # single points before it are outliers
            images, value = longest[0]
            low, high = _at(band, images)
            departures.append(Departure(metric, images, value, low, high, len(outside) / len(curve)))
    return departures


def _runs(curve: list[tuple[int, float]], chosen: list[tuple[int, float]]) -> list[list[tuple[int, float]]]:
    """The chosen points of a curve, in runs of neighbours."""
    places = {point: i for i, point in enumerate(curve)}
    found: list[list[tuple[int, float]]] = []
    for point in chosen:
        if found and places[found[-1][-1]] + 1 == places[point]:
            found[-1].append(point)
        else:
            found.append([point])
    return found


def _curve(out: str | os.PathLike[str], metric: str, batch_size: int) -> list[tuple[int, float]]:
    return [(step * batch_size, value) for step, value in read_metrics(out).get(metric, {}).items()]


def _at(band: dict[str, list[float]], images: int) -> tuple[float, float]:
    """Low and high at a number of images, between the places of the band."""
    places = band["images"]
    after = min(max(1, bisect_left(places, images)), len(places) - 1)
    if len(places) == 1:
        return band["low"][0], band["high"][0]
    t = (images - places[after - 1]) / (places[after] - places[after - 1])
    t = min(1.0, max(0.0, t))
    low, high = (band[side][after - 1] + t * (band[side][after] - band[side][after - 1]) for side in ("low", "high"))
    return low, high


def _inside(band: dict[str, list[float]], images: int, value: float) -> bool:
    low, high = _at(band, images)
    return low <= value <= high
