"""Table 3 of VAR in small, and the raster baseline beside VAR: each row is a config, all on the same drawings and the same
budget.

python benchmarks/ablation.py --out runs/ablation --ladder runs/scaling

From next-token prediction in raster order to VAR, AdaLN, top-k, guidance, attention on unit-norm queries and keys, and
size. Rows that are trained are folders in OUT, and go on where they were stopped; rows that differ in sampling alone share
their training. `--ladder`: a ladder of `nextscale scaling` whose trainings serve as rows of the same settings. Writes
ablation.json, ablation.md, samples.png.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro

import nextscale as ns
from nextscale.data.dataset import pictures
from nextscale.data.images import save_images
from nextscale.data.source import DataSource, open_images
from nextscale.data.transforms import AugmentSettings
from nextscale.encoded import encode_images
from nextscale.evaluation.image_sets import ArraySet
from nextscale.evaluation.likelihood import evaluate_likelihood, residual_bits
from nextscale.evaluation.networks import Lite0Network
from nextscale.evaluation.report import draw_as_often, reconstructions, table
from nextscale.evaluation.score import SetFeatures, set_scores
from nextscale.files import atomic_write
from nextscale.sampling.defaults import SamplingDefaults
from nextscale.training.config import TokenizerLoss, TrainConfig
from nextscale.training.ladder import Rung, build, parameters
from nextscale.training.verbs import train_model, train_tokenizer

AUGMENT = AugmentSettings(hue=0.0, scale=0.08, shift=0.04)
PLAIN = SamplingDefaults(guidance=1.0, top_k=0, top_p=0.0)
TOP_K = PLAIN.model_copy(update={"top_k": 75})  # 600 of 4096 codes are 75 of 512
GUIDED = TOP_K.model_copy(update={"guidance": 3.0})  # cfg = 2.0 of the paper
WIDTH = 24


@dataclass(frozen=True)
class Row:
    """A config: what is trained, and how it samples. published: FID and cost of the paper's row."""

    name: str
    recipe: str = "var"
    depth: int = 6
    changes: dict[str, Any] = field(default_factory=dict)  # of the transformer
    sampling: SamplingDefaults = GUIDED
    published: tuple[float | None, float | None] = (None, None)

    @property
    def training(self) -> str:
        """The name of its training, which rows may share."""
        off = "".join(f"-no-{name.replace('_', '')}" for name, on in sorted(self.changes.items()) if not on)
        return f"{self.recipe}-d{self.depth}{off}"


BARE = {"adaln": False, "qk_norm": False}
ADALN = {"qk_norm": False}
ROWS = (
    Row("AR", "raster_ar", changes=BARE, sampling=PLAIN, published=(18.65, 1.0)),
    Row("AR to VAR", changes=BARE, sampling=PLAIN, published=(5.22, 0.013)),
    Row("+ AdaLN", changes=ADALN, sampling=PLAIN, published=(4.95, 0.016)),
    Row("+ top-k", changes=ADALN, sampling=TOP_K, published=(4.64, 0.016)),
    Row("+ guidance", changes=ADALN, published=(3.60, 0.022)),
    Row("+ unit-norm attention", published=(3.30, 0.022)),
    Row("+ size", depth=8, published=(1.73, 0.052)),
    Row("AR, the same transformer as VAR", "raster_ar"),
)


def single_scale(base: ns.System, images: Any, config: TrainConfig, out: Path) -> ns.System:
    """The tokenizer of `base` with one scale: its networks and codes, trained further."""
    recipe = ns.find_recipe("raster_ar")
    shape = recipe.emoji_64()
    settings = shape.model_copy(
        update={"autoencoder": base.config.autoencoder, "sizes": (base.config.sizes[-1],), "num_classes": 0}
    )
    system = recipe.build(settings, seed=config.seed)
    known = base.tokenizer.state_dict()
    for name in ("mean", "std"):
        known[f"pyramid.{name}"] = known[f"pyramid.{name}"][:1]
    system.tokenizer.load_state_dict({n: t for n, t in known.items() if n in system.tokenizer.state_dict()})
    loss = TokenizerLoss(codebook=0.5, quantize_start=0.0, drop_scales=0.0)
    return train_tokenizer(system, images.train, config, out=out, val=images.val, loss=loss, augmentation=AUGMENT)


def trained(row: Row, base: ns.System, images: Any, config: TrainConfig, out: Path, ladder: Path | None) -> ns.System:
    """The system of a row, trained or found."""
    rung = Rung(row.depth, WIDTH, config.seed, Path(ladder or out) / f"d{row.depth}-s{config.seed}")
    if ladder and not row.changes and row.recipe == "var":
        return ns.load(rung.folder / "system")
    folder = out / row.training
    settings = base.config.transformer.model_copy(update={"dropout": 0.0, "shared_adaln": False, **row.changes})
    system = build(base, settings, rung, images.classes)
    return train_model(
        system,
        images.train,
        config,
        out=folder,
        val=images.val,
        augmentation=AUGMENT,
        views=8,
        cache=out / f"encoded-{row.recipe}",
    )


@torch.no_grad()
def seconds_an_image(system: ns.System, batch: int, repeats: int = 5) -> float:
    """Median of several calls of `ns.sample`."""
    labels = [i % len(system.classes) for i in range(batch)]
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        ns.sample(system, labels, seed=0)
        times.append((time.perf_counter() - start) / batch)
    return statistics.median(times)


def main(
    out: Path = Path("runs/ablation"),
    tokenizer: str = "emoji-64",
    ladder: Path | None = None,
    steps: int = 1000,
    tokenizer_steps: int = 3000,
    samples: int = 1024,
    seed: int = 0,
    only_train: bool = False,
) -> None:
    """Train what is missing, then measure all rows.

    Args:
        out: folder to write
        tokenizer: VAR's; the raster rows have its single-scale variant
        ladder: folder of a ladder of `nextscale scaling` of the same steps, batch and width
        steps: of each generator, of 32 images
        tokenizer_steps: of the single-scale tokenizer, of 12 images, from the weights of the other
        samples: of each row
        seed: of the trainings
        only_train: measure later
    """
    base = ns.load(tokenizer).base
    images = open_images(DataSource(), base.image_size, larger=tuple(2 * side for side in base.image_size))
    shared: dict[str, Any] = {"threads": torch.get_num_threads(), "precision": "bfloat16", "seed": seed}
    config = TrainConfig(steps=steps, batch_size=32, lr=1.5e-3, ema=0.0, validate_every=250, **shared)
    first = TrainConfig(steps=tokenizer_steps, batch_size=12, lr=1e-3, validate_every=1000, **shared)
    bases = {"var": base, "raster_ar": single_scale(base, images, first, out / "tokenizer")}
    systems = {}
    for row in ROWS:
        if row.training not in systems:
            systems[row.training] = trained(row, bases[row.recipe], images, config, out, ladder)
    if only_train:
        return
    network = Lite0Network()
    small = open_images(DataSource(), base.image_size)
    known = {
        name: SetFeatures(ArraySet(pictures(data)), network)
        for name, data in (("training", small.train), ("held-out", small.val))
    }
    found, shown, captions = [], [], []
    for row in ROWS:
        system = systems[row.training].changed("ablation", row.sampling, sampling=row.sampling)
        tokens = encode_images(system, small.val)
        likelihood = evaluate_likelihood(system, tokens.content, tokens.said())
        drawn, said, _ = draw_as_often(system, tokens, small.classes, samples, seed=0)
        features = SetFeatures(ArraySet(drawn), network)
        scores = set_scores(features, known["training"], network)
        numbers = 3 * base.image_size[0] * base.image_size[1]
        bits = likelihood.mean * system.schedule.length / 0.6931471805599453 / numbers
        rest = residual_bits(ArraySet(reconstructions(system, small.val)), ArraySet(pictures(small.val)))
        found.append(
            {
                "row": row.name,
                "training": row.training,
                "sampling": row.sampling.words(),
                "parameters": parameters(system),
                "steps": len(system.schedule),
                "tokens": system.schedule.length,
                "nats_a_token": likelihood.mean,
                "bits_per_dimension": bits,
                "pixel_bits": bits + rest,
                "kid_lite0": scores["kid_lite0"],
                "kid_lite0_held_out": set_scores(features, known["held-out"], network)["kid_lite0"],
                "precision_lite0": scores["precision_lite0"],
                "recall_lite0": scores["recall_lite0"],
                "seconds_batch_1": seconds_an_image(system, 1),
                "seconds_batch_16": seconds_an_image(system, 16),
                "published_fid": row.published[0],
                "published_cost": row.published[1],
            }
        )
        print(json.dumps(found[-1]), flush=True)
        shown.append(drawn[:12])
        captions += [f"{row.name}: {name}" for name in said[:12]]
    with atomic_write(out / "ablation.json") as path:
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    with atomic_write(out / "ablation.md") as path:
        path.write_text("\n".join(markdown(found)) + "\n", encoding="utf-8")
    save_images(
        torch.cat(shown),
        out / "samples.png",
        columns=12,
        labels=captions,
        title="The rows of the ablation, same labels and seeds",
    )
    print(out / "ablation.md")


def markdown(found: list[dict[str, Any]]) -> list[str]:
    """The table."""
    header = [
        "row",
        "parameters",
        "steps",
        "nats a token",
        "pixel bits",
        "kid_lite0",
        "to held-out",
        "precision",
        "recall",
    ]
    header += ["s/image, batch 1", "batch 16", "cost", "paper: FID", "cost"]
    first = found[0]["seconds_batch_16"]
    rows = [
        [
            r["row"],
            f"{r['parameters']:,}",
            r["steps"],
            f"{r['nats_a_token']:.3f}",
            f"{r['pixel_bits']:.3f}",
            f"{r['kid_lite0']:.3f}",
            f"{r['kid_lite0_held_out']:.3f}",
            f"{r['precision_lite0']:.3f}",
            f"{r['recall_lite0']:.3f}",
            f"{r['seconds_batch_1']:.4f}",
            f"{r['seconds_batch_16']:.4f}",
            f"{r['seconds_batch_16'] / first:.3f}",
            r["published_fid"] or "",
            r["published_cost"] or "",
        ]
        for r in found
    ]
    return table(header, rows)


if __name__ == "__main__":
    tyro.cli(main)
