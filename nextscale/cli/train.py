"""`nextscale train tokenizer` and `nextscale train generator`. Imported for that command alone, since it needs torch."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from nextscale.checkpoint import load
from nextscale.cli.options import Flat, at_least_one, check_device, check_writable
from nextscale.data.transforms import AugmentSettings
from nextscale.sampling.settings import SamplingDefaults
from nextscale.system import System, find_recipe
from nextscale.training.settings import LOSSES, GeneratorLoss, TokenizerLoss, TrainConfig
from nextscale.training.verbs import train_model, train_tokenizer

RECIPE = "var"  # unless another is named
# Required, but asked for at the door, where a mistake ends in one line.
OutFolder = Annotated[Path | None, tyro.conf.DisallowNone, tyro.conf.arg(help_behavior_hint="(required)")]
Trained = Annotated[str, tyro.conf.arg(help_behavior_hint="(required)")]


def main(arguments: Sequence[str]) -> None:
    """Run `nextscale train ...` with the words after `train`."""
    # The preset is read first: it sets the defaults that --help shows and that further options change.
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in ("--recipe", "--preset"):
        early.add_argument(option, nargs="?")  # without a name: tyro says it
    named = early.parse_known_args(arguments)[0]
    recipe = find_recipe(named.recipe or RECIPE)
    presets = getattr(recipe, "PRESETS", {})
    if not presets:
        raise ValueError(f"the recipe {named.recipe!r} has nothing to train")
    name = named.preset or next(iter(presets))
    if name not in presets:
        raise ValueError(
            f"unknown --preset {name!r} of the recipe {named.recipe or RECIPE}; there are {', '.join(presets)}"
        )
    preset: Any = presets[name]()
    app = tyro.extras.SubcommandApp()
    app.command(name="tokenizer")(tokenizer_command(recipe, name, preset))
    app.command(name="generator")(generator_command(recipe, name, preset))
    app.cli(prog="nextscale train", description="Train a tokenizer, then a generator on it.", args=list(arguments))


def tokenizer_command(module: Any, name: str, defaults: Any) -> Callable[..., None]:
    """The command `train tokenizer` with the defaults of a recipe's preset."""
    config_type = type(defaults)

    def command(
        out: OutFolder = None,
        data: str = "openmoji",
        start: str = "",
        losses: str = "",
        recipe: str = RECIPE,
        preset: str = name,
        oversample: int = 2,
        train: Annotated[TrainConfig, Flat] = TrainConfig(),
        loss: TokenizerLoss = module.TOKENIZER_LOSS,
        augmentation: AugmentSettings = AugmentSettings(),
        system: config_type = defaults,  # type: ignore[valid-type]
    ) -> None:
        """Train a multi-scale tokenizer.

        Example: nextscale train tokenizer --out runs/tokenizer --steps 3000 --loss.perceptual 0.05

        The run's folder gets metrics.jsonl, TensorBoard events, pictures and checkpoints; the same command goes on
        with a run that was stopped. The result is in OUT/system.

        Args:
            out: folder of the run
            data: openmoji; a folder of images; shards like "photos-{000..012}.tar"; a folder of Hugging Face datasets
            start: a trained tokenizer to go on from, the folder of its run or a system; its shape stays, and its codes are
                in use from the first step
            losses: those of a published trainer, which replace all of --loss but its files: vaex, llamagen or bitvae
            recipe: the method, by the name of its file in nextscale/recipes
            preset: where the system's settings start; default: the first of the recipe
            oversample: read training images this many times larger; augmentation averages them down, so edges stay crisp
            train: the run
            loss: the losses, and the measures against collapse
            augmentation: changes to training images
            system: the shape of the tokenizer, where it differs from the preset
        """
        folder = checked("tokenizer", out, train, oversample=oversample)
        if losses:
            if losses not in LOSSES:
                raise ValueError(f"unknown --losses {losses!r}; there are {', '.join(LOSSES)}")
            files = ("lpips_vgg", "lpips_linear", "dino_weights")
            loss = LOSSES[losses].model_copy(update={name: getattr(loss, name) for name in files})
        if start:
            built = trained(start, recipe)
            built.model = None
            loss = loss.model_copy(update={"quantize_start": 0.0, "init_codes": False})
        else:
            built = module.build(system, seed=train.seed, model=False)
        training, validation = load_data(data, square_side(built), oversample)
        train_tokenizer(
            built, training.train, train, out=folder, val=validation.val, loss=loss, augmentation=augmentation
        )
        print(folder / "system")

    return command


def generator_command(module: Any, name: str, defaults: Any) -> Callable[..., None]:
    """The command `train generator` with the defaults of a recipe's preset."""
    transformer_type = type(defaults.transformer)

    def command(
        out: OutFolder = None,
        tokenizer: Trained = "",
        data: str = "openmoji",
        recipe: str = RECIPE,
        preset: str = name,
        oversample: int = 2,
        views: int = 8,
        cache: Annotated[Path | None, tyro.conf.arg(help_behavior_hint="(default: OUT/encoded)")] = None,
        train: Annotated[TrainConfig, Flat] = TrainConfig(),
        loss: GeneratorLoss = GeneratorLoss(),
        augmentation: AugmentSettings = AugmentSettings(),
        transformer: transformer_type = defaults.transformer,  # type: ignore[valid-type]
        sampling: SamplingDefaults = defaults.sampling,
    ) -> None:
        """Train a generator on the tokens of a trained tokenizer.

        Example: nextscale train generator --tokenizer runs/tokenizer --out runs/generator --steps 5000 --batch-size 64

        Images are encoded once, before training. The run's folder gets metrics.jsonl, TensorBoard events, pictures and
        checkpoints; the same command goes on with a run that was stopped. The result is in OUT/system.

        Args:
            out: folder of the run
            tokenizer: the tokenizer: the folder of its run, or a system
            data: openmoji; a folder with one folder of images a class; shards like "photos-{000..012}.tar"; a folder of
                Hugging Face datasets
            recipe: the method, that of the tokenizer
            preset: where the transformer's settings start; default: the first of the recipe
            oversample: read training images this many times larger; augmentation averages them down, so edges stay crisp
            views: augmented versions of each image that are encoded
            cache: folder for what was encoded, to share between runs; one of another tokenizer or other data is refused
            train: the run
            loss: the objective
            augmentation: changes to training images
            transformer: the shape of the transformer, where it differs from the preset
            sampling: how the system samples by default
        """
        folder = checked("generator", out, train, oversample=oversample, views=views)
        if not tokenizer:
            raise ValueError("train generator needs --tokenizer: the folder of a tokenizer's run, or a system")
        base = trained(tokenizer, recipe)
        training, validation = load_data(data, square_side(base), oversample)
        changes = {"transformer": transformer, "sampling": sampling}
        if "classes" in type(base.config).model_fields:  # told by class, so the data says which there are
            changes |= {"classes": training.classes, "num_classes": len(training.classes)}
        system = module.build(base.config.model_copy(update=changes), seed=train.seed)
        system.tokenizer = base.tokenizer
        train_model(
            system,
            training.train,
            train,
            out=folder,
            val=validation.val,
            loss=loss,
            augmentation=augmentation,
            views=views,
            cache=cache,
        )
        print(folder / "system")

    return command


def trained(name: str, recipe: str) -> System:
    """The system of a run's folder, or of that name; of the given recipe."""
    run = Path(name) / "system"
    system = load(run if run.is_dir() else name)
    if system.recipe != recipe:
        raise ValueError(f"{name} is of the recipe {system.recipe!r}, got --recipe {recipe}; give the same")
    return system


def checked(kind: str, out: Path | None, train: TrainConfig, **numbers: int) -> Path:
    """The folder of the run, after the checks at the door."""
    if out is None:
        raise ValueError(f"train {kind} needs --out: the folder of the run; try `--out runs/{kind}`")
    at_least_one(**numbers)
    check_writable(out / "metrics.jsonl")
    check_device(train.device)
    return out


def load_data(data: str, size: int, oversample: int) -> tuple[Any, Any]:
    """Training images at `oversample` times the size, and validation images at the size."""
    if data == "openmoji":
        from nextscale.data.openmoji import openmoji

        return openmoji(size * oversample), openmoji(size)
    if data.endswith(".tar"):
        from nextscale.data.shards import web_shards

        return web_shards(data, size * oversample, validation=0.1), web_shards(data, size, validation=0.1)
    if (Path(data) / "dataset_info.json").is_file() or (Path(data) / "dataset_dict.json").is_file():
        from nextscale.data.hub import hub_images

        return hub_images(data, size * oversample, validation=0.1), hub_images(data, size, validation=0.1)
    from nextscale.data.folder import image_folder

    return image_folder(data, size * oversample, validation=0.1), image_folder(data, size, validation=0.1)


def square_side(system: System) -> int:
    """The side in pixels of the system's images; the command line reads square images only."""
    height, width = system.image_size
    if height != width:
        raise ValueError(
            f"the command line trains on square images, got a schedule for {height}x{width} pixels; use the Python API"
        )
    return height
