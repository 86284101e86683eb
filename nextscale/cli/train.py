"""`nextscale train tokenizer` and `nextscale train generator`. Imported for that command alone, since it needs torch."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from nextscale.checkpoint import load, recipe_of
from nextscale.cli.options import Flat, Source, at_least_one, check_device, check_seed, check_writable
from nextscale.cli.parse import check_values, parse_one_of
from nextscale.data.dataset import Relabelled, Untold, says
from nextscale.data.source import DRAWINGS, SourceImages, drawn_sets, open_images
from nextscale.data.transforms import PHOTOS, AugmentSettings
from nextscale.sampling.defaults import SamplingDefaults
from nextscale.schedule import Schedule
from nextscale.settings import STYLE
from nextscale.system import System, find_recipe
from nextscale.training.config import LOSSES, GeneratorLoss, TokenizerLoss, TrainConfig
from nextscale.training.finetune import take_autoencoder, with_classes
from nextscale.training.memory import built_to_train, keep_freed_memory
from nextscale.training.verbs import check_packages, train_model, train_tokenizer

RECIPE = "var"  # unless another is named
# Required, but asked for at the door, where a mistake ends in one line.
OutFolder = Annotated[Path | None, tyro.conf.DisallowNone, tyro.conf.arg(help_behavior_hint="(required)")]
Trained = Annotated[str, tyro.conf.arg(help_behavior_hint="(required)")]


def main(arguments: Sequence[str]) -> None:
    """Run `nextscale train ...` with the words after `train`."""
    # The preset and the data are read first: they set the defaults that --help shows and that further options change.
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in ("--recipe", "--preset", "--data", "--tokenizer", "--init-from"):
        early.add_argument(option, nargs="?")  # without a name: tyro says it
    check_values(arguments, "nextscale train")
    named = early.parse_known_args(arguments)[0]
    base = named.init_from or named.tokenizer
    if base and not named.recipe:  # a trained system says what it is
        named.recipe = recipe_of(base)
        arguments = [*arguments, "--recipe", named.recipe]
    recipe = find_recipe(named.recipe or RECIPE)
    presets = getattr(recipe, "PRESETS", {})
    if not presets:
        raise ValueError(f"the recipe {named.recipe!r} has no PRESETS, the settings to train with")
    name = named.preset or next(iter(presets))
    if name not in presets:
        raise ValueError(
            f"unknown --preset {name!r} of the recipe {named.recipe or RECIPE}; there are {', '.join(presets)}"
        )
    preset: Any = presets[name]()
    drawings = bool(drawn_sets(named.data or DRAWINGS))
    commands = {
        "tokenizer": tokenizer_command(recipe, name, preset, drawings),
        "generator": generator_command(recipe, name, preset, drawings),
        "encode": encode_command(drawings),
    }
    call = parse_one_of(commands, arguments, "nextscale train", "Train a tokenizer, then a generator on it.")
    keep_freed_memory()
    call()


def tokenizer_command(module: Any, name: str, defaults: Any, drawings: bool) -> Callable[..., None]:
    """The command `train tokenizer` with the defaults of a recipe's preset, for drawings or photographs."""
    config_type = type(defaults)

    def command(
        out: OutFolder = None,
        source: Annotated[Source, Flat] = Source(),
        init_from: str = "",
        autoencoder_from: str = "",
        losses: str = "",
        recipe: str = RECIPE,
        preset: str = name,
        oversample: int = 2 if drawings else 1,
        train: Annotated[TrainConfig, Flat] = TrainConfig(),
        loss: TokenizerLoss = getattr(module, "TOKENIZER_LOSS", TokenizerLoss()),
        augmentation: AugmentSettings = AugmentSettings() if drawings else PHOTOS,
        system: config_type = defaults,  # type: ignore[valid-type]
    ) -> None:
        """Train a multi-scale tokenizer.

        Example: nextscale train tokenizer --out runs/tokenizer --steps 3000 --loss.perceptual 0.05

        The run's folder gets metrics.jsonl, TensorBoard events, pictures and checkpoints; the same command goes on
        with a run that was stopped. The result is in OUT/system.

        Args:
            out: folder of the run
            source: the images
            init_from: a trained tokenizer to go on from, the folder of its run or a system; its shape stays, and its codes are
                in use from the first step
            autoencoder_from: a trained tokenizer of any recipe whose encoder and decoder are taken, around a quantizer that
                begins anew: for other scales or codes
            losses: those of a published trainer, which replace all of --loss but its files: vaex, llamagen or bitvae
            recipe: the method, by the name of its file in nextscale/recipes
            preset: where the system's settings start; default: the first of the recipe
            oversample: read training images this many times larger; augmentation averages them down, so edges stay crisp
            train: the run
            loss: the losses, and the measures against collapse
            augmentation: changes to training images; where --data is not openmoji the defaults are those for photographs: a
                random window
            system: the shape of the tokenizer, where it differs from the preset
        """
        folder = checked("tokenizer", out, train, oversample=oversample)
        if losses:
            if losses not in LOSSES:
                raise ValueError(f"unknown --losses {losses!r}; there are {', '.join(LOSSES)}")
            files = ("lpips_vgg", "lpips_linear", "dino_weights")
            loss = LOSSES[losses].model_copy(update={name: getattr(loss, name) for name in files})
        check_packages(train, loss)
        if init_from and autoencoder_from:
            raise ValueError("--init-from has an autoencoder of its own; leave out --autoencoder-from, or --init-from")
        if init_from:
            built = trained(init_from, recipe).base  # methods change the generator
            built.model = None
            loss = loss.model_copy(update={"quantize_start": 0.0, "init_codes": False})
        else:
            built = built_to_train(lambda: module.build(system, seed=train.seed, model=False), "tokenizer", train)
        if autoencoder_from:
            take_autoencoder(built.tokenizer, load(autoencoder_from).tokenizer, autoencoder_from)
            loss = loss.model_copy(update={"quantize_start": 0.0})
        images = load_data(source, built, oversample, augmentation)
        train_tokenizer(
            built,
            images.train,
            train,
            out=folder,
            val=images.val,
            loss=loss,
            augmentation=augmentation,
            about=about(images, built),
            source=source.named(),
        )
        print(folder / "system")

    return command


def generator_command(module: Any, name: str, defaults: Any, drawings: bool) -> Callable[..., None]:
    """The command `train generator` with the defaults of a recipe's preset, for drawings or photographs."""
    transformer_type = type(defaults.transformer)

    def command(
        out: OutFolder = None,
        tokenizer: Trained = "",
        sizes: tuple[int, ...] = (),
        init_from: str = "",
        lora: int = 0,
        source: Annotated[Source, Flat] = Source(),
        recipe: str = RECIPE,
        preset: str = name,
        oversample: int = 2 if drawings else 1,
        views: int = 8,
        cache: Annotated[Path | None, tyro.conf.arg(help_behavior_hint="(default: OUT/encoded)")] = None,
        train: Annotated[TrainConfig, Flat] = TrainConfig(),
        loss: GeneratorLoss = GeneratorLoss(),
        augmentation: AugmentSettings = AugmentSettings() if drawings else PHOTOS,
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
            sizes: sides of the scales, coarse to fine, where they are others than those that the tokenizer was trained with
            init_from: a trained system to go on from, with its tokenizer and its shape; classes of the data that it does not
                have are added to its own
            lora: train adapters of this rank instead of all weights (with --init-from; extra nextscale[lora]); 8 is a good
                start
            source: the images
            recipe: the method, that of the tokenizer
            preset: where the transformer's settings start; default: the first of the recipe
            oversample: read training images this many times larger; augmentation averages them down, so edges stay crisp
            views: augmented versions of each image that are encoded
            cache: folder for what was encoded, to share between runs; one of another tokenizer or other data is refused
            train: the run
            loss: the objective
            augmentation: changes to training images; where --data is not openmoji the defaults are those for photographs: a
                random window
            transformer: the shape of the transformer, where it differs from the preset
            sampling: how the system samples by default
        """
        folder = checked("generator", out, train, oversample=oversample, views=views)
        if init_from and (tokenizer or sizes or transformer != defaults.transformer or sampling != defaults.sampling):
            raise ValueError(
                "--init-from has its own tokenizer, scales, transformer and sampling; leave out --tokenizer, --sizes, "
                "--transformer.* and --sampling.*"
            )
        if lora < 0 or (lora and not init_from):
            raise ValueError(f"--lora needs --init-from, a trained system, and a rank of at least 1, got {lora}")
        if not init_from and not tokenizer:
            raise ValueError("train generator needs --tokenizer: the folder of a tokenizer's run, or a system")
        check_packages(train, lora=lora)
        base = trained(init_from or tokenizer, recipe)
        loss.check(len(sizes) or len(base.schedule))
        images = load_data(source, base, oversample, augmentation)
        items, held_out = images.train, images.val
        if init_from:
            system = base
            if next(iter(base.readers.values())).choices:  # told by class, so the data says which there are
                system = with_classes(base, images.classes)
                numbers = [system.classes.index(name) for name in images.classes]
                items, held_out = Relabelled(items, numbers), Relabelled(held_out, numbers)
            if STYLE in system.readers and not says(items, STYLE):
                items, held_out = Untold(items, (STYLE,)), Untold(held_out, (STYLE,))
        else:
            changes: dict[str, Any] = {"transformer": transformer, "sampling": sampling}
            changes |= {"sizes": checked_sizes(base, sizes)} if sizes else {}
            config = type(base.config).model_validate(base.config.model_dump() | changes)
            shape = config.for_classes(images.classes).for_styles(images.styles)
            system = built_to_train(lambda: module.build(shape, seed=train.seed), "model", train)
            system.tokenizer = base.tokenizer
        train_model(
            system,
            items,
            train,
            out=folder,
            val=held_out,
            loss=loss,
            augmentation=augmentation,
            views=views,
            lora=lora,
            cache=cache,
            about=about(images, system),
            source=source.named(),
        )
        print(folder / "system")

    return command


def encode_command(drawings: bool) -> Callable[..., None]:
    """The command `train encode`, for drawings or photographs."""

    def command(
        tokenizer: Trained = "",
        cache: Annotated[Path | None, tyro.conf.arg(help_behavior_hint="(required)")] = None,
        source: Annotated[Source, Flat] = Source(),
        recipe: str = RECIPE,
        oversample: int = 2 if drawings else 1,
        views: int = 8,
        seed: int = 0,
        workers: int = 0,
        device: str = "cpu",
        augmentation: AugmentSettings = AugmentSettings() if drawings else PHOTOS,
    ) -> None:
        """Encode images for generators to come, which take them with the same --cache.

        Example: torchrun --nproc-per-node 8 -m nextscale train encode --tokenizer runs/tokenizer --cache cache --views 10

        A generator does this itself before it trains; on its own it can run elsewhere, or once for several generators. What is
        there is not encoded again.

        Args:
            tokenizer: the tokenizer: the folder of its run, or a system
            cache: folder for what is encoded; one of another tokenizer or other data is refused
            source: as for train generator
            recipe: the method, that of the tokenizer
            oversample: as for train generator
            views: augmented versions of each image
            seed: of the augmentation, that of the generator's training
            workers: processes that load images; 0: the main one
            device: cpu, cuda, cuda:1
            augmentation: as for train generator
        """
        from nextscale.encoded import encode_images
        from nextscale.processes import Team

        check_numbers(oversample=oversample, views=views)
        check_seed(seed)
        if not tokenizer or cache is None:
            raise ValueError("train encode needs --tokenizer, the folder of a tokenizer's run or a system, and --cache")
        check_writable(cache / "index.json")
        check_device(device)
        team = Team.of_environment()
        system = trained(tokenizer, recipe).to(team.own_device(device))
        training = load_data(source, system, oversample, augmentation).train
        kind = system.objective.wants
        if kind not in ("tokens", "features"):
            raise ValueError(f"the objective of this system wants {kind}, so there is nothing to encode")
        encoded = encode_images(
            system,
            training,
            cache,
            kind=kind,
            views=views,
            augmentation=augmentation,
            seed=seed,
            workers=workers,
            strict=True,
            team=team,
        )
        if team.leads:
            print(f"{len(encoded)} images as {kind} in {cache}")

    return command


def checked_sizes(base: System, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Other scales than those that a tokenizer was trained with, if it can have them."""
    last = base.schedule[-1]
    if last != (sizes[-1], sizes[-1]):
        raise ValueError(f"--sizes must end with that of the feature map, {last[0]}, got {sizes[-1]}")
    try:
        base.tokenizer.pyramid.check_scales(Schedule.squares(*sizes), base.schedule)
    except ValueError as error:
        raise ValueError(f"--sizes: {error}") from error
    return sizes


def trained(name: str, recipe: str) -> System:
    """The system of that name; of the given recipe."""
    system = load(name)
    if system.recipe != recipe:
        raise ValueError(f"{name} is of the recipe {system.recipe!r}, got --recipe {recipe}; give the same")
    return system


MOST = {"oversample": 16, "views": 1000}  # times the pixels of a side; times the images to encode


def check_numbers(**numbers: int) -> None:
    """Refuse numbers below 1, and more than anybody wants."""
    at_least_one(**numbers)
    for name, most in MOST.items():
        if numbers.get(name, 1) > most:
            raise ValueError(f"--{name} must be at most {most}, got {numbers[name]}")


def checked(kind: str, out: Path | None, train: TrainConfig, **numbers: int) -> Path:
    """The folder of the run, after the checks at the door."""
    if out is None:
        raise ValueError(f"train {kind} needs --out: the folder of the run; try `--out runs/{kind}`")
    check_numbers(**numbers)
    check_writable(out / "metrics.jsonl")
    check_device(train.device)
    return out


def about(images: SourceImages, system: System) -> dict[str, Any]:
    """What the run's first line says of the images."""
    found: dict[str, Any] = {"classes": len(images.classes), "held_out": len(images.val)}
    found["size"] = "{}x{} px".format(*system.image_size)
    if system.model is not None and system.texts:
        found["captions"] = f"captions from {images.captions_from}"
    return found | {"left_out": images.left_out.summary()}


def load_data(source: Source, system: System, oversample: int, augmentation: AugmentSettings) -> SourceImages:
    """Images for a system: those for training at `oversample` times the size that augmentation wants, those held out at the
    system's."""
    height, width = augmentation.read_size(system.image_size)
    return open_images(
        source.named(),
        system.image_size,
        larger=(height * oversample, width * oversample),
        channels=system.tokenizer.channels,
        whole=augmentation.crop > 1,  # a window is cut out of all of it
    )
