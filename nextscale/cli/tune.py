"""`nextscale tune`: how a system should sample."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import tyro

import nextscale as ns
from nextscale.cli.methods import load_changed
from nextscale.cli.options import (
    MOST_SINGLES,
    SHIPPED,
    Flat,
    Source,
    check_device,
    check_new_system,
    check_seed,
    check_writable,
)
from nextscale.cli.run import images_of
from nextscale.settings import brief

Tried = tyro.conf.arg(metavar="VALUE [VALUE ...]", help_behavior_hint="(default: a range)")


def tune(
    system: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[SYSTEM]")] = SHIPPED,
    out: Path = Path("out/tune"),
    to: Annotated[Path | None, tyro.conf.arg(help_behavior_hint="(default: nowhere)")] = None,
    source: Annotated[Source, Flat] = Source(),
    guidance: Annotated[tuple[float, ...], Tried] = (),
    style_guidance: Annotated[tuple[float, ...], Tried] = (),
    temperature: Annotated[tuple[float, ...], Tried] = (),
    top_p: Annotated[tuple[float, ...], Tried] = (),
    top_k: Annotated[tuple[int, ...], Tried] = (),
    samples: int = 512,
    passes: int = 2,
    seed: int = 0,
    device: str = "cpu",
) -> None:
    """Choose guidance, filter and temperature by how much samples are like held-out images.

    Try: nextscale tune emoji-64 --guidance 1 2 4 --temperature 0.8 1

    Each setting is tried in turn from the system's own on, all else as it is best so far, and scored by kid_lite0: samples are
    told what is said of held-out images. Writes tune.json, tune.md and tune.png into OUT; the same command goes on where it was
    stopped. The last line is the best settings as options of `nextscale sample`.

    Args:
        system: shipped name, folder (of a system or a training), or hub name
        out: folder to write to
        to: folder to write the system to, with these settings as its own
        source: what the system was trained on, of which a part is held out; a training remembers it
        guidance: values to try; 1: off. If values of any setting are given, the others stay
        style_guidance: values to try, for systems that are told a style
        temperature: values to try
        top_p: values to try; 0: all
        top_k: values to try; 0: all
        samples: images of each trial
        passes: rounds over all settings, at most
        seed: seed of the first image, and of the choice of what is told
        device: cpu, cuda, cuda:1
    """
    from nextscale.evaluation.tuning import with_sampling
    from nextscale.extras import need

    if not 2 <= samples <= MOST_SINGLES:
        raise ValueError(f"--samples must be from 2 to {MOST_SINGLES:,}, got {brief(samples)}")
    check_seed(seed)
    need("eval", "judging images")
    check_writable(out / "tune.json")
    if to is not None:
        check_new_system(to)
    check_device(device)
    loaded = load_changed(system, device, ())
    ranges: dict[str, tuple[Any, ...]] = {
        "guidance": guidance,
        "style_guidance": style_guidance,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
    }
    chosen = {name: values for name, values in ranges.items() if values}
    images = images_of(system, source, loaded)
    best = ns.tune(loaded, images, out, ranges=chosen or None, samples=samples, passes=passes, seed=seed).settings
    print(out / "tune.md")
    if to is not None:
        print(ns.save(with_sampling(loaded, best), to))
    words = {name: getattr(best, name) for name in ranges if getattr(best, name) is not None}
    print(" ".join(f"--{name.replace('_', '-')} {value:g}" for name, value in words.items()))
