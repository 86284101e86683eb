"""The small-scale checks of recipes on trained systems: what each method claims, on OpenMoji at 64 px. Prints JSON lines.

python benchmarks/small_scale.py train-infinity runs/bits --out runs/with --strength 0.3
python benchmarks/small_scale.py train-infinity runs/bits --out runs/without --strength 0
python benchmarks/small_scale.py infinity runs/with/system --without runs/without/system
python benchmarks/small_scale.py flexvar runs/flexvar/system --out out/flexvar
python benchmarks/small_scale.py residual runs/collapse-off
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

import nextscale as ns
from nextscale.data.images import to_float
from nextscale.data.transforms import AugmentSettings
from nextscale.draws import Draws
from nextscale.encoded import encode_images
from nextscale.evaluation.likelihood import (
    condition_gain,
    evaluate_likelihood,
    frequency_accuracy,
    frequency_cross_entropy,
    scale_counts,
)
from nextscale.evaluation.neighbours import base_groups
from nextscale.evaluation.networks import lite0_features
from nextscale.evaluation.reconstruction import code_counts, evaluate_tokenizer
from nextscale.evaluation.scores import FeatureMoments, frechet_distance, kernel_distance
from nextscale.recipes.generators import flexvar as flexvar_recipe
from nextscale.recipes.generators import infinity as infinity_recipe
from nextscale.schedule import Schedule

LISTS = {
    "6 steps, its own": Schedule.squares(1, 2, 3, 4, 6, 8),
    "4 steps": Schedule.squares(1, 3, 5, 8),
    "5 steps": Schedule.squares(1, 2, 4, 6, 8),
    "8 steps": Schedule.squares(1, 2, 3, 4, 5, 6, 7, 8),
}
SHOWN = ("face-smiling", "person", "family", "country-flag", "heart", "cat-face", "time", "clothing")  # finer labels
Folder = Annotated[str, tyro.conf.Positional]


def train_infinity(tokenizer: Folder, out: Path = Path("runs/with"), strength: float = 0.3, steps: int = 1500) -> None:
    """A small generator (6 blocks, 192 wide), the same but for self-correction.

    Args:
        tokenizer: the folder of its run
        out: folder of the run
        strength: largest share of bits that are flipped
        steps: of 16 images
    """
    base = ns.load(f"{tokenizer}/system")
    transformer = base.config.transformer.model_copy(update={"depth": 6, "dim": 192, "num_heads": 6})
    objective = base.config.objective.model_copy(update={"strength": strength})
    system = infinity_recipe.build(base.config.model_copy(update={"transformer": transformer, "objective": objective}))
    system.tokenizer = base.tokenizer
    train(system, out, steps, lr=1e-3, views=4, cache=f"{tokenizer}/encoded-4")


@torch.no_grad()
def infinity(system: Folder = "emoji-64-text", without: str = "", flips: float = 0.2, scale: int = 2) -> None:
    """Bits, likelihood, captions, and what self-correction is worth.

    Args:
        system: trained with self-correction
        without: the same tokenizer and training, strength 0: what self-correction is compared with
        flips: share of bits flipped
        scale: where they are flipped
    """
    loaded = ns.load(system)
    data = ns.openmoji(loaded.image_size[0])
    schedule, pyramid = loaded.schedule, loaded.tokenizer.pyramid
    held_out, known = encode_images(loaded, data.val), encode_images(loaded, data.train)
    features = encode_images(loaded, data.val, kind="features").content

    encoded = pyramid.encode(features, schedule)
    again = loaded.tokenizer.f_hat(encoded.tokens, schedule)
    counts = torch.cat(code_counts(schedule.split(held_out.content), 2))  # [K * d, 2]
    share = counts[:, 1] / counts.sum(dim=1)
    report(
        "infinity, bits",
        psnr=evaluate_tokenizer(loaded.tokenizer, data.val, schedule).psnr,
        round_trip=float((again - encoded.f_hats[-1]).abs().max()),
        share_of_bits_between_0_2_and_0_8=float(((share > 0.2) & (share < 0.8)).float().mean()),
    )

    captions = list(held_out.said()["caption"])
    found = evaluate_likelihood(loaded, held_out.content, captions)
    lengths = torch.tensor(schedule.lengths, dtype=torch.double)
    weights = lengths / lengths.sum()
    learned, judged = (scale_counts(loaded, images.content) for images in (known, held_out))
    table = frequency_cross_entropy(learned, judged)
    frequent = frequency_accuracy(learned, judged)
    report(
        "infinity, likelihood a bit",
        cross_entropy=found["cross_entropy"],
        marginal=table,
        below_marginal=1 - found.mean / float(torch.tensor(table, dtype=torch.double) @ weights),
        accuracy=found["accuracy"],
        marginal_accuracy=frequent,
    )
    gain = condition_gain(loaded, held_out.content, captions, base_groups(data.val)[0])
    report(
        "infinity, caption against another's",
        gain=gain.mean,
        standard_error=gain.standard_error,
        standard_errors=gain.mean / gain.standard_error,
        bases=gain.groups,
        scales=gain.scales,
    )
    if without:
        losses = {
            name: corrected(ns.load(folder), features, captions, flips, scale)
            for name, folder in (("with", system), ("without", without))
        }
        report("infinity, self-correction", flips=flips, scale=scale, **losses)


def corrected(system: ns.System, features: Tensor, captions: Any, flips: float, scale: int) -> dict[str, Any]:
    """Loss a bit at the scales after `scale`, where a share of bits was flipped and targets are what is left to do; and
    without any flips."""
    schedule, pyramid, model = system.schedule, system.tokenizer.pyramid, system.need_model()
    losses = {}
    for name, share in (("clean", 0.0), ("flipped", flips)):
        generator, sums = torch.Generator().manual_seed(0), []
        for first in range(0, len(features), 64):
            rows = slice(first, first + 64)
            content = features[rows]

            def corrupt(tokens: Tensor, k: int, share: float = share, generator: Any = generator) -> Tensor:
                return tokens ^ (torch.rand(tokens.shape, generator=generator) < share) if k == scale else tokens

            encoded = pyramid.encode(content, schedule, corrupt)
            inputs, targets = torch.cat(encoded.inputs, dim=1), torch.cat(encoded.tokens, dim=1)
            h = model.hidden(inputs, model.prepare(system.condition(captions[rows])), schedule.span())
            sums.append(model.head.loss(h, targets, Draws(generator, len(h)))[:, schedule.ends[scale] :].mean(dim=1))
        losses[name] = float(torch.cat(sums).mean())
    return losses


@torch.no_grad()
def flexvar(system: Folder = "runs/flexvar/system", out: Path = Path("out/flexvar"), images: int = 256) -> None:
    """Maps of every size, numbers of steps, other sizes.

    Args:
        system: a trained FlexVAR system
        out: folder for pictures
        images: samples for each list of sizes
    """
    loaded = ns.load(system)
    size = loaded.image_size[0]
    data = ns.openmoji(size)
    found = evaluate_tokenizer(loaded.tokenizer, data.val, loaded.schedule)
    val = to_float(data.val.images)
    report(
        "flexvar, maps",
        sizes=str(loaded.schedule),
        psnr=found.psnr,
        box=[float(ns.psnr(boxed(val, side), val).mean()) for side in loaded.schedule.sizes],
    )
    labels, known = step_counts("flexvar", loaded, data, images)
    rng = random.Random(0)
    drawn = [loaded.config.schedules.draw(rng) for _ in range(10)]
    pictures = [ns.sample(loaded, labels[:2], seed=0, schedule=Schedule.squares(*sides)) for sides in drawn]
    report(
        "flexvar, 10 random lists",
        valid=sum(bool(picture.isfinite().all() and picture.std() > 0.05) for picture in pictures),
        lists=[str(Schedule.squares(*sides)) for sides in drawn],
    )
    groups = torch.tensor([label for label, *_ in data.train.labels])
    held_out = [label for label, *_ in data.val.labels]
    accuracy = group_classifier(known, groups)
    refined = [refine(loaded, val[i : i + 64], held_out[i : i + 64], seed=i) for i in range(0, len(val), 64)]
    own, again = (accuracy(lite0_features(images), held_out) for images in (data.val.images, torch.cat(refined)))
    report("flexvar, refined from 4x4", accuracy=again, accuracy_of_drawings=own, share=again / own)
    shown = [name for name in SHOWN for _ in range(2)]
    wider = {
        "96": Schedule.squares(1, 2, 3, 4, 6, 8, 12),
        "64x96": Schedule(((1, 1), (2, 3), (3, 4), (4, 6), (6, 9), (8, 12))),
    }
    for name, schedule in (*LISTS.items(), *wider.items()):
        pictures = ns.sample(loaded, shown, seed=0, schedule=schedule)
        title = f"FlexVAR, sizes {schedule}"
        ns.save_images(pictures, out / f"{name.split(',')[0].replace(' ', '-')}.png", columns=16, title=title)


@torch.no_grad()
def step_counts(title: str, system: ns.System, data: Any, images: int) -> tuple[list[int], Tensor]:
    """Report how far samples of each list of sizes are from the training images; their labels, and those images' features."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([label for label, *_ in data.train.labels])
    drawn = labels[torch.randint(len(labels), (images,), generator=generator)].tolist()
    known = lite0_features(data.train.images)
    for name, schedule in LISTS.items():
        parts = [ns.sample(system, drawn[i : i + 64], seed=i, schedule=schedule) for i in range(0, images, 64)]
        features = lite0_features(torch.cat(parts))
        distances = {
            "kid_lite0": kernel_distance(features, known),
            "fd_lite0": frechet_distance(*map(FeatureMoments.of, (features, known))),
        }
        report(f"{title}, {name}", sizes=str(schedule), **distances)
    return drawn, known


def residual(tokenizer: Folder, out: Path = Path("runs/residual"), steps: int = 1800, images: int = 256) -> None:
    """What random lists of sizes do to residuals: VAR's pyramid under FlexVAR's transformer and objective.

    Args:
        tokenizer: the folder of the run of a VAR tokenizer that does not standardize residuals
        out: folder of the run
        steps: of 16 images
        images: samples for each list of sizes
    """
    base = ns.load(f"{tokenizer}/system")
    data = ns.openmoji(base.image_size[0])
    config = flexvar_recipe.emoji_64(num_classes=len(data.classes), classes=data.classes)
    pyramid = config.pyramid.model_copy(update={"code_dim": base.config.pyramid.code_dim})
    system = flexvar_recipe.build(config.model_copy(update={"pyramid": pyramid}))
    system.tokenizer = base.tokenizer
    train(system, out, steps, lr=8e-4, views=2)
    step_counts("residuals", system, data, images)


def train(system: ns.System, out: Path, steps: int, lr: float, views: int, cache: str | None = None) -> None:
    """A short training on OpenMoji, 16 images a step."""
    config = ns.TrainConfig(
        steps=steps, batch_size=16, lr=lr, warmup=100, precision="bfloat16", validate_every=steps, save_every=500
    )
    augmentation = AugmentSettings(hue=0, scale=0.08, shift=0.04)
    images = ns.openmoji(2 * system.image_size[0]).train
    ns.train_model(system, images, config, out=out, augmentation=augmentation, views=views, cache=cache)


def refine(system: ns.System, images: Tensor, labels: list[int], seed: int) -> Tensor:
    """Images drawn again from their maps of up to 4x4."""
    known = ns.encode(system, images)
    given = [k for k, size in enumerate(system.schedule.sizes) if size <= (4, 4)]
    return ns.sample(system, labels, seed=seed, edit=lambda tokens, k: known[k] if k in given else tokens)


def group_classifier(features: Tensor, labels: Tensor, penalty: float = 1e3) -> Callable[[Tensor, list[int]], float]:
    """Ridge regression from features [N, D] to classes; what it returns is the accuracy on others."""
    mean, targets = features.mean(dim=0), F.one_hot(labels).double()
    x = (features - mean).double()
    gram = x.T @ x + penalty * torch.eye(x.shape[1], dtype=torch.double)
    weights = torch.linalg.solve(gram, x.T @ (targets - targets.mean(dim=0)))

    def accuracy(features: Tensor, labels: list[int]) -> float:
        scores = (features - mean).double() @ weights + targets.mean(dim=0)
        return float((scores.argmax(dim=1) == torch.tensor(labels)).double().mean())

    return accuracy


def boxed(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images averaged down to a size and enlarged again."""
    small = F.interpolate(images, size=size, mode="area")
    return F.interpolate(small, size=images.shape[-2:], mode="bicubic").clamp(-1, 1)


def report(name: str, **values: Any) -> None:
    """One JSON line."""
    print(json.dumps({"measure": name, **rounded(values)}), flush=True)


def rounded(value: Any) -> Any:
    """Numbers to four digits, in lists and dicts too."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict(
        {"train-infinity": train_infinity, "infinity": infinity, "flexvar": flexvar, "residual": residual}
    )
