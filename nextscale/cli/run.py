"""`nextscale train`, `curves`, `evaluate` and `convert`: systems are made, judged and converted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

import nextscale as ns
from nextscale.cli.methods import Methods, load_changed
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
from nextscale.settings import brief

if TYPE_CHECKING:
    from nextscale.data.source import SourceImages
    from nextscale.system import System


def train(kind: str = "", /, *words: str) -> None:
    """Train a tokenizer or a generator (`nextscale train tokenizer`, `nextscale train generator`)."""
    from nextscale.cli.train import main as train_main
    from nextscale.processes import end_process

    train_main([kind, *words] if kind else ["--help"])
    end_process()


def scaling(*words: str) -> None:
    """Train generators of growing size, and fit the power laws of their losses."""
    from nextscale.cli.ladders import main as scaling_main
    from nextscale.processes import end_process

    scaling_main(words)
    end_process()


def curves(
    runs: Annotated[
        tuple[Path, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="RUN [RUN ...]", help_behavior_hint="(at least one)"),
    ],
    out: Path = Path("curves.png"),
) -> None:
    """Draw the training curves of runs into one picture.

    Try: nextscale curves runs/tokenizer runs/generator --out curves.png

    Each run makes a row. A tokenizer: losses, PSNR after each scale, perplexity of each scale. A generator: loss, loss
    of each scale, accuracy of each scale. A run that is still going shows what it has logged. The last line is the
    picture's path.

    Args:
        runs: folders of runs, or their metrics.jsonl
        out: picture to write, a .png
    """
    from nextscale.evaluation.curves import plot_run

    if not runs:
        raise ValueError("curves needs the folder of at least one run; try `nextscale curves runs/tokenizer`")
    if out.suffix.lower() != ".png":
        raise ValueError(f"cannot write {out}: curves are drawn as PNG; give a name that ends in .png")
    check_writable(out)
    print(plot_run(runs, out))


def check_run(
    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN", help_behavior_hint="(required)")] = "",
    preset: str = "emoji-64",
) -> None:
    """Say whether a run's curves are normal: compare them with those of runs that went well.

    Try: nextscale check-run runs/tokenizer

    It fits runs like those that made emoji-64: the recipe var at 64 pixels, of drawings. Other sizes, recipes or photographs
    have other curves, so a band that they leave says little.

    Exit status 1 if a curve leaves its band for more than a twentieth of the run.

    Args:
        run: folder of a run of `nextscale train`
        preset: what it trains; there are bands for emoji-64
    """
    from nextscale.evaluation.normal import check_run

    if not run:
        raise ValueError("check-run needs the folder of a run; try `nextscale check-run runs/tokenizer`")
    departures = check_run(run, preset)
    for departure in departures:
        print(departure)
    if departures:
        raise SystemExit(1)
    print(f"{run} is within the bands of {preset}")


def evaluate(
    system: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[SYSTEM]")] = SHIPPED,
    out: Path = Path("out/evaluation"),
    source: Annotated[Source, Flat] = Source(),
    samples: int = 256,
    seed: int = 0,
    features: Literal["lite0", "inception"] = "lite0",
    weights: Annotated[str, tyro.conf.arg(help_behavior_hint="(default: none)")] = "",
    fetch: bool = False,
    lpips: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE FILE", help_behavior_hint="(default: none)")] = (),
    device: str = "cpu",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    methods: Methods = (),
) -> None:
    """Judge a system on held-out images: reconstruction, likelihood, samples and how new they are.

    Try: nextscale evaluate emoji-64 --out out/evaluation

    Writes report.md, report.json and pictures into OUT; `nextscale compare` puts several side by side. Samples have the
    labels of training images, so their scores are for comparing systems on these images; a published score has its own
    protocol (`nextscale sample-set`, then `nextscale score`). The last line is the path of the report.

    Args:
        system: shipped name, folder (of a system or a training), or hub name
        out: folder to write to
        source: what the system was trained on, of which a part is held out; a training remembers it
        samples: images to generate
        seed: seed of the first image, and of the choice of labels
        features: the network that sets of images are compared by; inception: FID, Inception Score, and so on
        weights: file of Inception's weights, pt_inception-2015-12-05-6726825d.pth of pytorch-fid
        fetch: download Inception's weights (96 MB) from pytorch-fid's releases on GitHub, once
        lpips: weights of AlexNet (torchvision's) and of LPIPS 0.1 (alex.pth), for the distance of reconstructions
        device: cpu, cuda, cuda:1
        dtype: of weights and activations; what decides tokens stays float32
    """
    from nextscale.cli.sets import perceptual_distances
    from nextscale.evaluation.networks import network_of
    from nextscale.evaluation.report import evaluate
    from nextscale.extras import need

    if not 2 <= samples <= MOST_SINGLES:
        raise ValueError(
            f"--samples must be from 2, since they are compared with each other, to {MOST_SINGLES:,}, got {brief(samples)}"
        )
    check_seed(seed)
    check_writable(out / "report.json")
    need("eval", "judging images")
    check_device(device)
    network, distances = network_of(features, weights, device, fetch=fetch), perceptual_distances(lpips, device)
    loaded = load_changed(system, device, methods, dtype)
    images = images_of(system, source, loaded)
    evaluate(loaded, images, out, samples=samples, seed=seed, network=network, distances=distances)
    print(out / "report.md")


def images_of(name: str, source: Source, system: System) -> SourceImages:
    """The images that the user named, or else those that the system of that name was trained on."""
    from nextscale.checkpoint import find_folder, shipped
    from nextscale.data.source import open_images, remembered

    known = None if source.data or name in shipped() else remembered(find_folder(name))
    if known is None and not source.data and name not in shipped():
        raise ValueError(f"nothing says what {name} was trained on; give --data, the images to judge it on")
    chosen = source.named() if known is None else known
    if known is not None and source.val:
        chosen = replace(known, val=source.val)
    try:
        return open_images(chosen, system.image_size, channels=system.tokenizer.channels)
    except FileNotFoundError as error:
        hint = f"; {name} was trained on it: give --data where it is now" if known is not None else ""
        raise FileNotFoundError(f"{error}{hint}") from error


def save(
    system: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[SYSTEM]")] = SHIPPED,
    to: Annotated[Path | None, tyro.conf.arg(help_behavior_hint="(required)")] = None,
    methods: Methods = (),
) -> None:
    """Write a system into a folder: one that methods changed, or that of a training's checkpoint.

    Try: nextscale save emoji-64 --with fastvar --with.ratios 0.4,0.5 --to systems/fast

    Then: nextscale sample --system systems/fast

    Or: nextscale save runs/generator/checkpoints/00002000 --to early

    The weights are those of SYSTEM, and so is the model card, which says their licence; what was changed stands in config.json
    and at the end of the card. The last line is the folder.

    Args:
        system: shipped name, folder, or hub name; or the folder of a training that has not ended (its best checkpoint is
            taken), or of one of its checkpoints
        to: folder to write to
    """
    from nextscale.checkpoint import find_folder
    from nextscale.files import atomic_write

    if to is None:
        raise ValueError("save needs --to: the folder to write to")
    check_new_system(to)
    run = Path(system)
    if (run / "state.json").is_file() or (
        (run / "checkpoints").is_dir() and not (run / "system" / "config.json").is_file()
    ):
        from nextscale.training.export import export_run

        if methods:
            raise ValueError(
                "a checkpoint is saved as it is; change the system that comes of it: `nextscale save` again, --with ..."
            )
        print(export_run(run, to))
        return
    loaded, card = load_changed(system, "cpu", methods), find_folder(system) / "README.md"
    if card.is_file():
        with atomic_write(to / "README.md") as path:
            path.write_text(card.read_text(encoding="utf-8") + _changes_in_words(system, methods), encoding="utf-8")
    print(ns.save(loaded, to))


def _changes_in_words(system: str, methods: Sequence[str]) -> str:
    """What a model card says of methods that changed a system since."""
    from nextscale.checkpoint import ChangeConfig

    changes = [ChangeConfig.model_validate_json(word) for word in methods]
    lines = [
        f"* {change.recipe}: {', '.join(f'{name} {value}' for name, value in change.config.items())}\n"
        for change in changes
    ]
    name = Path(system).name
    return (
        f"\n## Changes\n\n{name}, with its weights, was changed by these methods:\n\n{''.join(lines)}" if lines else ""
    )


def convert(
    system: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SYSTEM")],
    source: Annotated[Path | None, tyro.conf.arg(name="from", help_behavior_hint="(default: the hub)")] = None,
    to: Path | None = None,
    to_official: Path | None = None,
    checkpoint: Path | None = None,
    own_tokenizer: bool = False,
) -> None:
    """Convert a published model into a system, or a system into the files of its method's official code.

    Try: nextscale convert var-d16 --from checkpoints --to systems/var-d16

    And back: nextscale convert systems/var-d16 --to-official checkpoints-again

    Every bit is kept, both ways. Nothing in the files is executed. The last line is the path of what was written.

    Args:
        system: with --to a published model, var-d16, flexvar-d16 or infinity-2b for example (`nextscale list` has all);
            with --to-official a shipped name, folder, or hub name
        source: folder of the published files (vae_ch160v4096z32.pth and var_d16.pth, for example)
        to: folder to write the system to
        to_official: folder to write the two official files to
        checkpoint: a training checkpoint of the official code (ar-ckpt-*.pth) instead of the generator's file
        own_tokenizer: take the tokenizer inside that checkpoint instead of the published file
    """
    if (to is None) == (to_official is None):
        raise ValueError("give either --to FOLDER (from official files) or --to-official FOLDER (back to them)")
    if to is not None:
        from nextscale.published.convert import convert_official

        check_writable(to / "config.json")
        print(convert_official(system, source, to, checkpoint=checkpoint, own_tokenizer=own_tokenizer))
    elif to_official is not None:
        from nextscale.published.convert import export_official

        if source is not None or checkpoint is not None or own_tokenizer:
            raise ValueError(
                "--from, --checkpoint and --own-tokenizer go with --to; --to-official takes a system alone"
            )
        check_writable(to_official / "file.pth")
        print("\n".join(map(str, export_official(system, to_official))))
