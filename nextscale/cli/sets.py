"""`nextscale sample-set`, `score`, `reference` and `compare`: sets of images are made, scored, and put beside each other."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from nextscale.cli.draw import read_labels, read_styles
from nextscale.cli.options import (
    MOST_SINGLES,
    Flat,
    Loading,
    Picking,
    Source,
    at_least_one,
    check_device,
    check_writable,
)
from nextscale.settings import STYLE, brief

if TYPE_CHECKING:
    from nextscale.evaluation.sample_set import Rejection
    from nextscale.system import System

LABELS = tyro.conf.arg(metavar="NAME,NAME", help_behavior_hint="(default: all classes)")
MOST_PROMPTS = 50_000_000  # bytes of a file of them


def sample_set(
    out: Annotated[Path | None, tyro.conf.arg(help_behavior_hint="(required)")] = None,
    each: int = 50,
    labels: Annotated[tuple[str, ...], LABELS] = (),
    prompts: Annotated[Path | None, tyro.conf.arg(help_behavior_hint="(default: none)")] = None,
    style: Annotated[str, tyro.conf.arg(help_behavior_hint="(default: any)")] = "",
    batch_size: int = 64,
    preset: Annotated[str, tyro.conf.arg(help_behavior_hint="(default: none)")] = "",
    reject: Literal["none", "probe", "imagenet"] = "none",
    reject_below: float = 0.5,
    tries: int = 4,
    source: Annotated[Source, Flat] = Source(),
    picking: Annotated[Picking, Flat] = Picking(),
    loading: Annotated[Loading, Flat] = Loading(),
) -> None:
    """Draw a set of samples for scores: so many of each class, into an .npz or a folder of PNG files.

    Try: nextscale sample-set --out samples.npz --each 8

    On several GPUs: torchrun --nproc-per-node 8 -m nextscale sample-set --system var-d16 --preset paper-256 --out samples.npz

    Classes are interleaved, as the Inception Score needs it: image i shows class i mod C and draws from seed + i. The same
    command goes on where it was stopped, and ends in the same bytes for any batch size and any number of processes. Beside
    the .npz, or in the folder as set.json, stands how the set was made, which `nextscale score` reads. The last line is the
    path of the set.

    Args:
        out: a name that ends in .npz (arr_0, bytes [N, H, W, 3]), or a folder for PNG files
        each: images of each class or prompt; published FID has 50 of 1000 classes
        labels: names or numbers of classes with commas between
        prompts: file with a prompt in each line, for systems that read them
        style: of all images, for systems that are told one
        batch_size: images at once on a GPU; a CPU makes 8, so that its bytes do not depend on this
        preset: sampling settings by name, which other options change; of VAR's: paper-256 and paper-512 (the published scores)
        reject: draw an image again that a classifier does not take for its class: probe, fitted to the images of --data; or
            imagenet, for systems whose class numbers are ImageNet's
        reject_below: probability of its class that an image must have
        tries: of an image; then the likeliest is taken
        source: for --reject probe; a training remembers its images
    """
    from nextscale.evaluation.sample_set import sample_set as draw
    from nextscale.processes import Team, end_process

    if out is None:
        raise ValueError("sample-set needs --out: an .npz or a folder to write; try `--out samples.npz`")
    at_least_one(each=each, batch_size=batch_size, tries=tries)
    if not 0 < reject_below <= 1:
        raise ValueError(f"--reject-below must be a probability above 0, got {reject_below}")
    picking.check()
    if out.suffix and out.suffix.lower() != ".npz":
        raise ValueError(f"--out must end in .npz, or be a folder, which has no ending, got {out}")
    check_writable(out if out.suffix else out / "00000000.png")
    check_device(loading.device)
    said = read_prompts(prompts) if prompts else []
    team = Team.of_environment()
    loading = loading.told(said)
    loading = Loading(loading.system, team.own_device(loading.device), loading.dtype, loading.methods)
    system = loading.load()
    try:
        conditions: list[Any] = read_labels(system, labels, said, name=loading.name, most=MOST_SINGLES)
    except ValueError as error:
        raise ValueError(str(error).replace("--prompt", "--prompts FILE")) from None
    styles = read_styles(system, style)
    if len(styles) > 1:
        raise ValueError(f"--style: a set is of one style, got {len(styles)}; draw a set of each")
    options, words = picking.resolve(system, preset)
    own: Any = system.sampling if not preset else None
    from nextscale.cli.options import own_settings, preset_of

    settings = own_settings(own or preset_of(system, preset), picking.given())
    draw(
        system,
        conditions,
        each,
        out,
        beside={STYLE: styles[0]} if styles[0] else None,
        seed=picking.seed,
        batch=batch_size,
        options=options,
        rejection=rejection_of(reject, reject_below, tries, loading.name, source, system),
        about={
            "system": Path(loading.name).name,
            "sampling": settings.model_dump() | {"greedy": picking.greedy, "smooth": picking.smooth or settings.smooth},
            "sampling_words": words,
        },
        team=team,
    )
    if team.leads:
        print(out)
    end_process()


def rejection_of(kind: str, least: float, tries: int, name: str, source: Source, system: System) -> Rejection | None:
    """The classifier that a user named."""
    if kind == "none":
        return None
    from nextscale.evaluation.classifier import ImageNetClassifier, fit_probe
    from nextscale.evaluation.sample_set import Rejection
    from nextscale.extras import need

    need("eval", "rejecting samples by a classifier")
    if "label" not in system.readers:
        raise ValueError("--reject judges classes, and this system is told prompts; leave it out")
    if kind == "imagenet":
        if len(system.readers["label"].choices) != 1000:
            raise ValueError(
                f"--reject imagenet knows ImageNet's 1000 classes, and this system has {len(system.readers['label'].choices)}; "
                "take --reject probe"
            )
        return Rejection(ImageNetClassifier(), ImageNetClassifier.name, least, tries)
    from nextscale.cli.run import images_of

    images = images_of(name, source, system)
    if tuple(images.classes) != system.classes:
        raise ValueError(
            f"the images have other classes than the system; give the --data that it was trained on, got {len(images.classes)}"
        )
    probe = fit_probe(images.train, system.classes)
    return Rejection(probe, probe.name, least, tries)


def read_prompts(path: Path) -> list[str]:
    """The lines of a file that are not empty."""
    from nextscale.files import brief_path, check_readable

    check_readable(path, "a file with a prompt in each line")
    if path.stat().st_size > MOST_PROMPTS:
        raise ValueError(
            f"{brief_path(path)} has {path.stat().st_size:,} bytes, expected at most {MOST_PROMPTS:,} of prompts"
        )
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{brief_path(path)} is not UTF-8 (at byte {error.start}); save it so") from None
    if not any(lines):
        raise ValueError(f"{brief_path(path)} has no prompt; write one in each line")
    return [line for line in lines if line]


def score(
    samples: Annotated[
        str, tyro.conf.Positional, tyro.conf.arg(metavar="SAMPLES", help_behavior_hint="(required)")
    ] = "",
    reference: Annotated[str, tyro.conf.arg(help_behavior_hint="(required)")] = "",
    out: Path = Path("out/score"),
    features: Literal["lite0", "inception"] = "lite0",
    weights: Annotated[str, tyro.conf.arg(help_behavior_hint="(default: none)")] = "",
    fetch: bool = False,
    protocol: Annotated[str, tyro.conf.arg(help_behavior_hint="(default: none)")] = "",
    paired: bool = False,
    size: Annotated[int | None, tyro.conf.arg(help_behavior_hint="(default: as they are)")] = None,
    labels: Literal["balanced", "training", "validation", "unknown"] = "unknown",
    reference_is: Literal["training", "validation", "unknown"] = "unknown",
    allow: Annotated[
        tuple[str, ...], tyro.conf.arg(metavar="KEY [KEY ...]", help_behavior_hint="(default: none)")
    ] = (),
    lpips: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE FILE", help_behavior_hint="(default: none)")] = (),
    batch_size: int = 64,
    device: str = "cpu",
) -> None:
    """Score a set of images against another one, with the protocol of the score beside it.

    Try: nextscale score samples.npz --reference my-images --size 64

    As the paper: nextscale score samples.npz --reference VIRTUAL_imagenet256_labeled.npz --features inception
    --weights pt_inception-2015-12-05-6726825d.pth --protocol var-d16-256

    A set is an .npz (arr_0, bytes [N, H, W, 3]; of a reference also mu, sigma, mu_s, sigma_s) or a folder of images.
    Features of Inception give FID, sFID, Inception Score, KID, precision and recall, exactly as the reference evaluator of
    the papers; those of EfficientNet-lite0, which need no download, give fd_lite0, kid_lite0, precision_lite0 and
    recall_lite0, which must not be compared with published numbers. Known mistakes are refused, with what they cost. Writes
    score.json and score.md into OUT. The last line is the path of the second.

    Args:
        samples: the set to score
        reference: the set to compare with
        out: folder to write to
        features: the network that looks at images
        weights: file of Inception's weights, pt_inception-2015-12-05-6726825d.pth of pytorch-fid
        fetch: download Inception's weights (96 MB) from pytorch-fid's releases on GitHub, once
        protocol: a published row to be reproduced: var-d16-256, var-d20-256, var-d24-256, var-d30-256, var-d30-re-256,
            var-d16-paper-256, var-d36-512, var-tokenizer-256
        paired: the samples are reconstructions of the reference's images, in the same order: rFID, PSNR, SSIM, LPIPS
        size: side in pixels to which folders of images are cropped (short side, then the centre)
        labels: what classes the samples follow, where no set.json says it
        reference_is: of what images the reference is
        allow: mistakes to score all the same
        lpips: with --paired: weights of AlexNet (torchvision's alexnet-owt-7be5be79.pth) and of LPIPS 0.1 (alex.pth)
        batch_size: images that the network sees at once
        device: cpu, cuda, cuda:1
    """
    from nextscale.evaluation.image_sets import open_set
    from nextscale.evaluation.networks import network_of
    from nextscale.evaluation.protocol import KEYS, find_preset
    from nextscale.evaluation.score import score as scored
    from nextscale.extras import need

    if not samples or not reference:
        raise ValueError("score needs two sets: `nextscale score samples.npz --reference REFERENCE`")
    at_least_one(size=size, batch_size=batch_size)
    if unknown := sorted(set(allow) - KEYS):
        raise ValueError(f"--allow knows no {brief(unknown[0])}; there are {', '.join(sorted(KEYS))}")
    if lpips and not paired:
        raise ValueError("--lpips compares pairs of images; give --paired too, or leave it out")
    preset = find_preset(protocol) if protocol else None
    check_writable(out / "score.json")
    check_device(device)
    need("eval", "scoring images")
    sets = [open_set(place, size) for place in (samples, reference)]
    network = network_of(features, weights, device, fetch=fetch)
    distances = perceptual_distances(lpips, device) if paired else []
    report = scored(
        sets[0],
        sets[1],
        network,
        out=out,
        paired=paired,
        labels=labels,
        split=reference_is,
        preset=preset,
        allow=allow,
        distances=distances,
        batch=batch_size,
        device=device,
        progress=True,
    )
    for warning in report["protocol"]["warnings"]:
        warnings.warn(f"{warning['what']} ({warning['cost']})", stacklevel=1)
    for name, value in report["scores"].items():
        print(f"{name} {value:.5g}")
    print(out / "score.md")


def perceptual_distances(lpips: Sequence[str], device: str) -> list[Any]:
    """Those of pairs: what needs no download, and LPIPS where there are weights."""
    from nextscale.tokenizer.lpips import Lpips
    from nextscale.tokenizer.perceptual import Perceptual

    if lpips and len(lpips) != 2:
        raise ValueError(f"--lpips takes two files, AlexNet's weights and LPIPS's own, got {len(lpips)}")
    distances: list[Any] = [Perceptual().to(device)]
    if lpips:
        distances.append(Lpips(lpips[0], lpips[1], backbone="alex").to(device))
    return distances


def reference(
    images: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES", help_behavior_hint="(required)")] = "",
    out: Path = Path("reference.npz"),
    features: Literal["lite0", "inception"] = "lite0",
    weights: Annotated[str, tyro.conf.arg(help_behavior_hint="(default: none)")] = "",
    fetch: bool = False,
    size: Annotated[int | None, tyro.conf.arg(help_behavior_hint="(default: as they are)")] = None,
    images_kept: int = 10_000,
    batch_size: int = 64,
    device: str = "cpu",
) -> None:
    """Make a reference file of a folder of images: moments of all, and some images for precision and recall.

    Try: nextscale reference my-images --size 64 --out reference.npz

    The container is that of the papers' reference files: mu and sigma (and mu_s, sigma_s) of all images, and arr_0, of which
    precision and recall are computed. The last line is the path of the file.

    Args:
        images: a folder of images, or an .npz
        out: file to write, an .npz
        features: the network that looks at images; a reference belongs to one
        weights: file of Inception's weights, pt_inception-2015-12-05-6726825d.pth of pytorch-fid
        fetch: download Inception's weights (96 MB) from pytorch-fid's releases on GitHub, once
        size: side in pixels to which the images of a folder are cropped
        images_kept: images in the file, evenly spaced
        batch_size: images that the network sees at once
        device: cpu, cuda, cuda:1
    """
    import numpy as np

    from nextscale.evaluation.image_sets import open_set, write_npz
    from nextscale.evaluation.networks import network_of
    from nextscale.evaluation.score import moments_of
    from nextscale.extras import need

    if not images:
        raise ValueError("reference needs a folder of images, or an .npz")
    at_least_one(size=size, images_kept=images_kept, batch_size=batch_size)
    if out.suffix.lower() != ".npz":
        raise ValueError(f"--out must end in .npz, got {out}")
    check_writable(out)
    check_device(device)
    need("eval", "features of images")
    found = open_set(images, size)
    moments = moments_of(found, network_of(features, weights, device, fetch=fetch), batch=batch_size, progress=True)
    kept = min(images_kept, len(found))
    chosen = set(np.linspace(0, len(found) - 1, kept).round().astype(int).tolist())

    def blocks() -> Any:
        first = 0
        for rows in found.batches(batch_size):
            wanted = [i - first for i in range(first, first + len(rows)) if i in chosen]
            if wanted:
                yield rows[wanted]
            first += len(rows)

    print(write_npz(out, blocks(), (len(chosen), *found.size, 3), moments))


def compare(
    reports: Annotated[
        tuple[Path, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="REPORT REPORT [REPORT ...]", help_behavior_hint="(at least two)"),
    ],
    out: Path = Path("out/comparison"),
    names: Annotated[
        tuple[str, ...], tyro.conf.arg(metavar="NAME [NAME ...]", help_behavior_hint="(default: the folders')")
    ] = (),
) -> None:
    """Put reports side by side: one table, one plot.

    Try: nextscale compare out/evaluation out/other --out out/comparison

    Reports are those of `nextscale evaluate` and `nextscale score`, folders or JSON files. Where two were not measured
    alike, the table says so. Writes compare.md and compare.png into OUT. The last line is the path of the first.

    Args:
        reports: folders of reports, or their JSON files
        out: folder to write to
        names: what the columns are called
    """
    from nextscale.evaluation.compare import compare as put

    if len(reports) < 2:
        raise ValueError(f"compare needs two reports or more, got {len(reports)}")
    check_writable(out / "compare.md")
    print(put(reports, out, names))
