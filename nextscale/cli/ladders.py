"""`nextscale scaling`: a ladder of generators, and the laws that they follow. Imported for that command alone: it needs
torch."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from nextscale.checkpoint import recipe_of
from nextscale.cli.options import SHIPPED, Flat, Source, check_device, check_seed, check_writable
from nextscale.cli.parse import check_values, parse
from nextscale.cli.train import RECIPE, OutFolder, about, check_numbers, load_data, trained
from nextscale.data.source import DRAWINGS, drawn_sets
from nextscale.data.transforms import PHOTOS, AugmentSettings
from nextscale.extras import need
from nextscale.processes import Team
from nextscale.system import find_recipe
from nextscale.training.config import GeneratorLoss, TrainConfig
from nextscale.training.ladder import flop_per_image, loaded, parameters, rungs, train_ladder
from nextscale.training.memory import keep_freed_memory
from nextscale.training.verbs import check_packages

DEPTHS, SEEDS = (2, 3, 4, 6, 8), (0, 1)


def main(arguments: Sequence[str]) -> None:
    """Run `nextscale scaling ...` with the words after `scaling`."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in ("--data", "--tokenizer"):  # they set the defaults that --help shows
        early.add_argument(option, nargs="?")
    check_values(arguments, "nextscale scaling")
    named = early.parse_known_args(arguments)[0]
    recipe = find_recipe(recipe_of(named.tokenizer) if named.tokenizer else RECIPE)
    presets = getattr(recipe, "PRESETS", {})
    defaults = next(iter(presets.values()))() if presets else recipe.Config()
    parse(command(defaults, bool(drawn_sets(named.data or DRAWINGS))), arguments, "nextscale scaling")()


def command(defaults: Any, drawings: bool) -> Callable[..., None]:
    """The command with the defaults of a recipe's first preset, for drawings or photographs."""
    transformer_type = type(defaults.transformer)
    usual = defaults.transformer.model_copy(update={"dropout": 0.0, "shared_adaln": False})

    def scaling(
        out: OutFolder = None,
        tokenizer: str = SHIPPED,
        depths: tuple[int, ...] = DEPTHS,
        width: int = 32,
        seeds: tuple[int, ...] = SEEDS,
        samples: int = 0,
        source: Annotated[Source, Flat] = Source(),
        oversample: int = 2 if drawings else 1,
        views: int = 8,
        cache: Annotated[Path | None, tyro.conf.arg(help_behavior_hint="(default: OUT/encoded)")] = None,
        train: Annotated[TrainConfig, Flat] = TrainConfig(ema=0.0),
        loss: GeneratorLoss = GeneratorLoss(),
        augmentation: AugmentSettings = AugmentSettings() if drawings else PHOTOS,
        transformer: transformer_type = usual,  # type: ignore[valid-type]
    ) -> None:
        """Train generators of growing size, and fit the power laws that their losses follow (Sec. 4.2 of VAR).

        Try: nextscale scaling --out runs/scaling --steps 1000 --batch-size 32 --samples 256

        A model of depth d has d heads and a width of d x --width, so its blocks have 18 d (d x width)^2 parameters. All are
        trained on the same tokens for the same steps. Loss and token error on held-out images, of the last scale and of
        all, are fitted against parameters and against the least compute; the largest model is predicted from the others.
        OUT gets scaling.md, scaling.json, scaling.png, and a folder for each training; the same command goes on with what
        was stopped. Several processes may train a ladder together, each some of its --seeds or --depths in the same OUT;
        the command with all of them then writes the report. The last line is its path.

        Args:
            out: folder of the ladder
            tokenizer: shipped name, folder of a tokenizer's run, or a system
            depths: of the models; at least three for a fit
            width: of a model / its depth
            seeds: of each size
            samples: images that each model of the first seed draws, for kid_lite0 against size; 0: none
            source: the images
            oversample, views, cache, augmentation: as for `nextscale train generator`
            train: each training; its seed is one of --seeds
            loss: the objective
            transformer: settings that all share; depth, width, heads and drop path follow from the depth
        """
        from nextscale.training.scaling import measured, scaling_report

        if out is None:
            raise ValueError("scaling needs --out: the folder of the ladder; try `--out runs/scaling`")
        check_numbers(oversample=oversample, views=views)
        for seed in seeds:
            check_seed(seed)
        ladder = rungs(out, depths, width, seeds)
        if samples < 0 or samples == 1:
            raise ValueError(f"--samples are compared with each other, so expected 0 or at least 2, got {samples}")
        check_writable(out / "scaling.json")
        check_device(train.device)
        check_packages(train)
        need("eval", "drawing the laws")
        keep_freed_memory()
        base = trained(tokenizer, recipe_of(tokenizer)).base
        images = load_data(source, base, oversample, augmentation)
        train_ladder(
            base,
            transformer,
            ladder,
            images.train,
            train,
            classes=images.classes,
            val=images.val,
            loss=loss,
            augmentation=augmentation,
            views=views,
            cache=cache or out / "encoded",
            about=about(images, base),
            source=source.named(),
        )
        if not Team.of_environment().leads:
            return
        found = []
        for rung in ladder:
            system = loaded(rung)
            found.append(measured(rung, parameters(system), flop_per_image(system) * train.batch_size, system.schedule))
        print(scaling_report(found, ladder, images, out, samples=samples, device=train.device))

    return scaling
