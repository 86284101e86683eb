"""How should a system sample? One setting after the other is tried, and what makes samples most like held-out images stays."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nextscale.data.dataset import data_digest
from nextscale.encoded import told_of
from nextscale.evaluation import scores
from nextscale.evaluation.image_sets import DataSet
from nextscale.evaluation.networks import FeatureNetwork, Lite0Network
from nextscale.evaluation.report import table
from nextscale.evaluation.sample_set import fingerprint_of
from nextscale.evaluation.score import SetFeatures
from nextscale.extras import need
from nextscale.files import as_path, atomic_write, read_json
from nextscale.modules import replaced, usual_defaults
from nextscale.pixels import on_white, to_uint8
from nextscale.progress import Bar
from nextscale.sampling.defaults import SamplingDefaults
from nextscale.sampling.loop import sample
from nextscale.settings import STYLE, brief, whole_number
from nextscale.system import System, check_system

BATCH = 64
MOST_SAMPLES = 100_000
TRIALS = "tune.json"  # in the folder of the result
# What is tried of each setting, in this order. Bits have two choices each, of which a filter leaves one.
RANGES: dict[str, tuple[Any, ...]] = {
    "guidance": (1.0, 1.5, 2.0, 3.0, 4.0, 6.0),
    "style_guidance": (None, 1.0, 1.5, 2.0, 3.0),
    "temperature": (0.6, 0.8, 0.9, 1.0),
    "top_p": (0.0, 0.8, 0.9, 0.96),
    "top_k": (0, 50, 200, 900),
}


@dataclass(frozen=True)
class Tuned:
    """The best settings, their score, and all trials as (settings, score), in the order in which they were made."""

    settings: SamplingDefaults
    score: float
    trials: list[tuple[SamplingDefaults, float]]


def usual_ranges(system: System) -> dict[str, tuple[Any, ...]]:
    """What is tried for a system, where nobody says it."""
    found = dict(RANGES)
    if STYLE not in system.readers:
        del found["style_guidance"]
    if system.tokenizer.pyramid.kind != "ids":
        del found["top_p"], found["top_k"]
    return found


@torch.no_grad()
@usual_defaults()
def tune(
    system: System,
    data: Any,
    out: str | os.PathLike[str],
    *,
    ranges: Mapping[str, Sequence[Any]] | None = None,
    samples: int = 512,
    passes: int = 2,
    seed: int = 0,
    network: FeatureNetwork | None = None,
    progress: bool = True,
) -> Tuned:
    """Choose how a system samples by the kernel distance of samples to held-out images; goes on where it was stopped.

    From the system's own settings on, the values of each setting are tried in turn, all else as it is best so far, until
    nothing changes or `passes` are through. Each trial draws the same images: told what is said of held-out ones, with the same
    random numbers.

    Args:
        data: `val` has the held-out images, of the system's size.
        out: folder to write `tune.json`, `tune.md` and `tune.png` to.
        ranges: values by setting, of `SamplingDefaults`; default: `usual_ranges(system)`.
        samples: images of each trial. A kernel distance of 500 images is uncertain by some 5 %.
        network: whose features are compared; default: EfficientNet-lite0.

    Raises ValueError for settings that there are not, and if `out` holds trials of something else.
    """
    check_system(system)
    need("eval", "judging images")
    whole_number("samples", samples, 2, MOST_SAMPLES)
    whole_number("passes", passes, 1, 100)
    whole_number("seed", seed, 0, 2**62)
    system.need_model()
    start: Any = system.sampling
    if not isinstance(start, SamplingDefaults):
        raise ValueError(f"this system has no settings of sampling that could be tuned, got {type(start).__name__}")
    ranges = dict(ranges or usual_ranges(system))
    for name, values in ranges.items():
        if name not in RANGES or not values:
            raise ValueError(f"ranges: expected values of {', '.join(RANGES)}, got {brief(name)}")
        for value in values:
            _changed(start, name, value)
    if not len(data.val):
        raise ValueError("data.val has no images to compare samples with; give a validation set")
    network = network or Lite0Network(str(system.device))
    out = as_path(out, "a folder to write")
    trials = _Trials(system, data, out, samples, seed, network, progress)
    best, least = start, trials.score(start)
    for _ in range(passes):
        before = best
        for name, values in ranges.items():
            for value in values:
                other = _changed(best, name, value)
                if (found := trials.score(other)) < least:
                    best, least = other, found
        if best == before:
            break
    tuned = Tuned(best, least, trials.known)
    _write(tuned, start, ranges, out, network)
    return tuned


def with_sampling(system: System, settings: SamplingDefaults) -> System:
    """The system with other defaults of sampling, which are saved with it; it shares all weights."""
    if system.changes:
        raise ValueError("settings of sampling belong to a system before methods change it; tune and save that one")
    other: System = replaced(system)
    other.sampling = settings
    other.config = type(system.config).model_validate(system.config.model_dump() | {"sampling": settings})
    return other


def _changed(settings: SamplingDefaults, name: str, value: Any) -> SamplingDefaults:
    return SamplingDefaults.model_validate(settings.model_dump() | {name: value})


class _Trials:
    """Scores of settings, each computed once and written down at once."""

    def __init__(
        self, system: System, data: Any, out: Path, samples: int, seed: int, network: FeatureNetwork, progress: bool
    ) -> None:
        self.system, self.out, self.seed, self.network, self.progress = system, out, seed, network, progress
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randint(len(data.val), (samples,), generator=generator).tolist()
        self.told, self.samples = told_of(system, data.val, rows), samples
        self.key = {
            "system": fingerprint_of(system),
            "images": f"{len(data.val)} {data_digest(data.val, system.output.field)}",
            "samples": samples,
            "seed": seed,
            "features": network.digest,
        }
        self.known = self._read()
        self.real = SetFeatures(DataSet(data.val, "held-out images"), network, progress=progress)

    def score(self, settings: SamplingDefaults) -> float:
        """The kernel distance of samples under these settings to the held-out images."""
        for known, score in self.known:
            if known == settings:
                return score
        parts = []
        starts = Bar(range(0, self.samples, BATCH), desc=settings.words(), unit="batch", silent=not self.progress)
        for i in starts:
            told = {name: values[i : i + BATCH] for name, values in self.told.items()}
            images = sample(self.system, told, seed=self.seed + i, **settings.options())
            parts.append(self.network(to_uint8(on_white(images))).pooled)
        found = float(scores.kernel_distance(np.concatenate(parts), self.real.pooled))
        self.known.append((settings, found))
        content = {"key": self.key, "trials": [{**one.model_dump(), "score": score} for one, score in self.known]}
        with atomic_write(self.out / TRIALS) as path:
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        return found

    def _read(self) -> list[tuple[SamplingDefaults, float]]:
        path = self.out / TRIALS
        if not path.is_file():
            return []
        found = read_json(path, most=10_000_000, expected="trials of settings")
        if not isinstance(found, dict) or found.get("key") != self.key:
            raise ValueError(f"{path} has trials of another system, other images or other numbers; give another folder")
        try:
            return [
                (SamplingDefaults.model_validate({k: v for k, v in one.items() if k != "score"}), float(one["score"]))
                for one in found["trials"]
            ]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} is damaged ({brief(str(error))}); remove it") from None


# ---- the result -------------------------------------------------------------------------------------------------------


def _write(
    tuned: Tuned, start: SamplingDefaults, ranges: Mapping[str, Sequence[Any]], out: Path, network: FeatureNetwork
) -> None:
    score = "kid" + network.suffix
    known = [(settings, found) for settings, found in tuned.trials]
    first = next(found for settings, found in known if settings == start)
    lines = [
        "# How to sample",
        "",
        f"{score} of samples to held-out images; lower is better. Before: {first:.3f} ({start.words()}). "
        f"Best of {len(known)} trials: {tuned.score:.3f} ({tuned.settings.words()}).",
        "",
        *table(
            ["", score],
            [[settings.words(), f"{found:.3f}"] for settings, found in sorted(known, key=lambda one: one[1])],
        ),
        "",
        "![one setting changed from the best](tune.png)",
    ]
    with atomic_write(out / "tune.md") as path:
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    _plot(tuned, ranges, out / "tune.png", score)


def _plot(tuned: Tuned, ranges: Mapping[str, Sequence[Any]], path: Path, score: str) -> None:
    """For each setting the scores of those trials that differ from the best in it alone."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * len(ranges), 3), layout="constrained")
    axes = figure.subplots(1, len(ranges), sharey=True, squeeze=False)[0]
    for axis, name in zip(axes, ranges, strict=True):
        near = {
            getattr(settings, name): found
            for settings, found in tuned.trials
            if settings.model_copy(update={name: None}) == tuned.settings.model_copy(update={name: None})
        }
        values = sorted(near, key=lambda value: -1.0 if value is None else value)
        places = range(len(values))
        axis.plot(places, [near[value] for value in values], "o-")
        axis.set_xticks(places, ["-" if value is None else f"{value:g}" for value in values])
        axis.set_title(name.replace("_", " "))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(score)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
