"""Tokenizer training: the losses around the pyramid, and the measures that keep its codes in use."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode

from nextscale.data.images import on_white
from nextscale.draws import Draws, Part, generator_for
from nextscale.evaluation.reconstruction import at_size, code_counts, evaluate_tokenizer
from nextscale.processes import Team
from nextscale.schedule import Schedule
from nextscale.tokenizer.dino import DinoDiscriminator
from nextscale.tokenizer.discriminator import (
    PatchDiscriminator,
    adaptive_weight,
    differentiable_augmentation,
    generator_adversarial_loss,
    hinge_discriminator_loss,
    lecam,
)
from nextscale.tokenizer.lpips import Lpips
from nextscale.tokenizer.perceptual import Perceptual
from nextscale.tokenizer.pyramid import Lesson
from nextscale.tokenizer.tokenizer import Tokenizer
from nextscale.training.average import Average
from nextscale.training.config import TokenizerLoss, TrainConfig
from nextscale.training.fit import adamw, autocast, descend, scaler

MIN_STD = 1e-3  # of residuals that the pyramid standardizes: a channel that is always the same must not divide by zero


class TokenizerTask:
    """One tokenizer, one discriminator if asked for, their optimizers and their losses (`Task` of the loop)."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        schedule: Schedule,
        config: TrainConfig,
        loss: TokenizerLoss,
        val: Dataset | None,
        first_images: Callable[[], Tensor],
        team: Team = Team(),
    ) -> None:
        self.schedule, self.config, self.loss, self.val = schedule, config, loss, val
        self.first_images = first_images  # many more than a batch: they set the first codes
        image_channels = tokenizer.encoder.image_channels
        self.tokenizer = tokenizer.to(config.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.discriminator = build_discriminator(loss, image_channels).to(config.device)
        self.perceptual = build_perceptual(loss)
        if self.perceptual is not None:
            self.perceptual.to(config.device)
        self.module = nn.ModuleDict({"tokenizer": self.tokenizer, "discriminator": self.discriminator})
        # Share of tokens that each code holds at each scale (of bits: each value of each bit), averaged over recent steps;
        # saved with the run.
        pyramid = tokenizer.pyramid
        columns = 1 if pyramid.codebook is not None else pyramid.code_dim
        usage = torch.zeros(len(schedule), columns * pyramid.codes, device=config.device)
        self.module.register_buffer("usage", usage)
        # Running means: logits of real and of made images, and the scale of the adversarial term.
        self.module.register_buffer("logit_means", torch.zeros(2, device=config.device))
        self.module.register_buffer("scale_mean", torch.zeros((), device=config.device))
        self.remembered = 0  # steps whose codes `usage` knows of, some fifty at most
        self.restarted: Tensor | None = None  # codes that moved in this step
        self.optimizers = {
            "tokenizer": adamw(self.tokenizer, config, keep=("codebook",)),
            "discriminator": adamw(self.discriminator, config),
        }
        self.scalers = {name: scaler(config) for name in self.optimizers}
        if config.compile:
            self.tokenizer.encoder.compile()
            self.tokenizer.decoder.compile()
        self.team = team
        self.tokens_per_image = schedule.length
        self.flop_per_image = flop_per_image(self.tokenizer, schedule, config.device)
        self.forward = team.wrap(self.tokenizer, self.losses, unused=True)
        self.judge = team.wrap(self.discriminator, self.verdict)

    # ---- one step -------------------------------------------------------------------------------------------------

    def step(self, parts: Sequence[Part], step: int) -> dict[str, Tensor | float]:
        begun, pyramid = step / self.config.steps, self.tokenizer.pyramid
        quantize = begun >= self.loss.quantize_start
        if quantize and pyramid.codebook is not None and self.loss.init_codes and not self.usage.any():
            self.init_codes(self.first_images().to(self.config.device), generator_for(self.config.seed, step))
        self.lessons: list[Lesson] = []
        self.pairs: list[tuple[Tensor, Tensor, Draws]] = []  # images and what became of them
        optimizer, scaler, clip = self.optimizers["tokenizer"], self.scalers["tokenizer"], self.config.clip
        metrics = descend(self.tokenizer, optimizer, scaler, self.forward, parts, step, clip, self.team)
        if not metrics["grad_norm"].isfinite():  # type: ignore[union-attr]  # the step changes nothing
            return metrics
        if quantize:  # after backward, which still needs the old ones
            self.remembered = min(50, step + 1 - math.ceil(self.loss.quantize_start * self.config.steps))
            residuals = [
                torch.cat(of_scale) for of_scale in zip(*(lesson.residuals for lesson in self.lessons), strict=True)
            ]
            tokens = [torch.cat(of_scale) for of_scale in zip(*(lesson.tokens for lesson in self.lessons), strict=True)]
            metrics |= self.count(tokens)
            self.follow(residuals)
        if self.adversarial_weight(begun) > 0:
            optimizer, scaler = self.optimizers["discriminator"], self.scalers["discriminator"]
            found = descend(self.discriminator, optimizer, scaler, self.judge, self.pairs, step, clip, self.team)
            metrics |= {f"discriminator/{name}": value for name, value in found.items()}
        if pyramid.codebook is not None and self.due_restart(step, begun, quantize):
            metrics["restarted"] = self.restart(residuals, generator_for(self.config.seed, step, "restart"))
        return metrics

    def losses(self, part: Part, step: int) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The loss of a part of a batch, and what to log; remembers what the rest of the step needs."""
        images = part.batch["image"].to(self.config.device)
        begun = step / self.config.steps
        with autocast(self.config):
            f = self.tokenizer.features(images)
        metrics: dict[str, Tensor | float] = {}
        if begun >= self.loss.quantize_start:
            keep, counts = (x.to(f.device) for x in self.kept_scales(part.draws))
            terms = {"beta": self.loss.beta, "entropy": self.loss.entropy}
            lesson = self.tokenizer.pyramid.learn(f, self.schedule, keep, counts=counts, **terms)
            self.lessons.append(lesson)
            f_hat, codebook_loss = lesson.f_hat, lesson.loss
        else:
            f_hat, codebook_loss = f, f.new_zeros(())
        with autocast(self.config):
            recon = self.tokenizer.decode(f_hat).float()
        if recon.shape != images.shape:  # a pyramid whose scales are images of their own sizes
            images = F.interpolate(images, size=recon.shape[-2:], mode="area")

        l1, l2 = F.l1_loss(recon, images), F.mse_loss(recon, images)
        total = self.loss.l1 * l1 + self.loss.l2 * l2
        metrics |= {"l1": l1.detach(), "l2": l2.detach(), "codebook": codebook_loss.detach()}
        if self.perceptual and begun >= self.loss.perceptual_start:
            perceptual = self.perceptual(on_white(recon), on_white(images)).mean()
            total = total + self.loss.perceptual * perceptual
            metrics[self.perceptual.name] = perceptual.detach()
        adversarial = self.adversarial_weight(begun)
        if adversarial > 0:
            total = total + adversarial * self.fool(recon, total, part.draws, metrics)
            self.pairs.append((images, recon.detach(), part.draws))
        total = total + self.loss.codebook * codebook_loss
        return total, metrics | {"loss": total.detach()}

    def kept_scales(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """Which scales each image keeps while training, bool [B, K], and how many of the whole batch keep each, times the
        part's share [K]. A share of the images drops some: with `prefix` all after the first n, n uniform; with
        `independent` each but the last at even odds; with `single` one of them."""
        count, whole = len(self.schedule), Draws(draws.generator, draws.total)
        dropped = torch.arange(count) >= min(self.loss.drop_from, count)
        if self.loss.drop == "prefix":
            lost = torch.arange(count) >= whole.randint(min(self.loss.drop_from, count), count + 1, 1)
        elif self.loss.drop == "independent":
            lost = whole.rand(count) < 0.5
            lost[:, -1] = False
        else:
            lost = torch.arange(count) == whole.randint(min(self.loss.drop_from, count - 1), count, 1)
        chosen = whole.rand(1) < self.loss.drop_scales
        keep = ~(lost & dropped & chosen)
        return keep[draws.rows], keep.sum(dim=0) * (len(draws) / draws.total)

    @property
    def usage(self) -> Tensor:
        """Share of tokens that each code holds at each scale, [K, V]."""
        return self.module.get_buffer("usage")

    # ---- the discriminator ----------------------------------------------------------------------------------------

    def adversarial_weight(self, begun: float) -> float:
        if not self.loss.adversarial or begun < self.loss.adversarial_start:
            return 0.0
        risen = (begun - self.loss.adversarial_start) / max(self.loss.adversarial_warmup, 1e-9)
        return self.loss.adversarial * min(1.0, max(risen, 1e-3))

    def fool(self, recon: Tensor, reconstruction: Tensor, draws: Draws, metrics: dict[str, Tensor | float]) -> Tensor:
        """The adversarial term, scaled to the reconstruction's gradient at the decoder's last layer."""
        self.discriminator.requires_grad_(False)
        seen = differentiable_augmentation(recon, draws.rand(7)) if self.loss.augment_pairs else recon
        term = generator_adversarial_loss(self.discriminator(seen))
        self.discriminator.requires_grad_(True)
        metrics["adversarial"] = term.detach()
        if self.loss.adaptive == "off":
            return term
        low, high = self.loss.adaptive_range
        last, root = self.tokenizer.decoder.conv_out.weight, self.loss.adaptive == "root"
        scale = adaptive_weight(reconstruction, term, last, low, high, root=root)
        if self.loss.adaptive_ema:
            mean = self.module.get_buffer("scale_mean")
            mean.copy_(scale if mean == 0 else mean.lerp(scale, 1 - self.loss.adaptive_ema))
            scale = mean.clone()
        metrics["adaptive_weight"] = scale
        return scale * term

    def verdict(self, pair: tuple[Tensor, Tensor, Draws], step: int) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The discriminator's loss on images and what became of them."""
        real, fake, draws = pair
        images = torch.cat([real, fake])
        numbers = torch.cat([draws.rand(7), draws.rand(7)])
        seen = differentiable_augmentation(images, numbers) if self.loss.augment_pairs else images
        logits = self.discriminator(seen)
        of_real, of_fake = logits.chunk(2)
        loss = hinge_discriminator_loss(of_real, of_fake, summed=self.loss.hinge_sum)
        metrics: dict[str, Tensor | float] = {"hinge": loss.detach()}
        if self.loss.lecam:
            term = lecam(of_real, of_fake, self.module.get_buffer("logit_means"))
            loss, metrics["lecam"] = loss + self.loss.lecam * term, term.detach()
        if self.loss.consistency:
            other = torch.cat([draws.rand(7), draws.rand(7)])
            again = self.discriminator(differentiable_augmentation(images, other))
            term = F.mse_loss(again, logits)
            loss, metrics["consistency"] = loss + self.loss.consistency * term, term.detach()
        return loss, {"loss": loss.detach(), **metrics}

    # ---- codes: start, count, restart -----------------------------------------------------------------------------

    @torch.no_grad()
    def init_codes(self, images: Tensor, generator: torch.Generator) -> None:
        """Set the codes from residuals of real images: each scale gets a share of the codebook that grows with
        log(l_k + 1), filled with residual vectors of that scale, then moved by a few k-means rounds."""
        pyramid = self.tokenizer.pyramid
        codes = pyramid.codebook.weight
        f = torch.cat([self.tokenizer.features(part) for part in images.split(64)])
        f_hat, filled = pyramid.start(len(f), self.schedule), 0
        for k, count in enumerate(self.new_codes()):
            rows = pyramid.residual(f, f_hat, k, self.schedule).flatten(0, 1)
            if getattr(pyramid, "std", None) is not None:
                pyramid.mean[k], pyramid.std[k] = rows.mean(dim=0), rows.std(dim=0).clamp(min=MIN_STD)
            rows = pyramid.standardized(rows, k)
            codes[filled : filled + count] = _kmeans(rows, count, generator)
            # Quantize with the codes of this scale alone, the others are not set yet; where it is limited, with all so far.
            first = 0 if pyramid.limit(k) < len(codes) else filled
            ids = torch.cdist(rows, codes[first : filled + count]).argmin(dim=1).view(len(f), -1) + first
            f_hat = pyramid.add(f_hat, ids, k, self.schedule)
            filled += count

    def new_codes(self) -> list[int]:
        """How many codes each scale sets: up to its limit, or a share of the rest that grows with log(l_k + 1)."""
        total = self.tokenizer.pyramid.codes
        limits = [self.tokenizer.pyramid.limit(k) for k in range(len(self.schedule))]
        filled = max([0, *(limit for limit in limits if limit < total)])
        free = torch.tensor([limit == total for limit in limits])
        shares = torch.tensor(self.schedule.lengths).log1p() * free
        counts = (shares / shares.sum().clamp(min=1) * (total - filled)).floor().long()
        if free.any():
            counts[free.nonzero().max()] += total - filled - counts.sum()  # what rounding left
        filled = 0
        for k, limit in enumerate(limits):
            if limit < total:
                counts[k] = max(0, limit - filled)
                filled = max(filled, limit)
        return counts.tolist()

    @torch.no_grad()
    def follow(self, residuals: list[Tensor]) -> None:
        """Move the pyramid's means and standard deviations towards those of a batch's residuals."""
        pyramid = self.tokenizer.pyramid
        if getattr(pyramid, "std", None) is None:
            return
        for mean, std, small in zip(pyramid.mean, pyramid.std, residuals, strict=True):
            rows = small.flatten(0, 1)  # [B * l_k, C]
            mean.lerp_(self.team.sum_(rows.mean(dim=0)) / self.team.size, 0.01)
            spread = self.team.sum_((rows - mean).square().mean(dim=0)) / self.team.size
            std.lerp_(spread.sqrt(), 0.01).clamp_(min=MIN_STD)

    @torch.no_grad()
    def count(self, tokens: list[Tensor]) -> dict[str, float]:
        """Update the usage statistics; returns usage and perplexity of every scale (of bits: the mean over them)."""
        usage = self.usage
        codes, metrics = self.tokenizer.pyramid.codes, {}
        for k, counts in enumerate(code_counts(tokens, codes)):
            counts = self.team.sum_(counts.to(usage))
            share = (counts / counts.sum(dim=1, keepdim=True)).flatten()
            usage[k].lerp_(share, 0.02) if usage[k].any() else usage[k].copy_(share)
            recent = usage[k].view(-1, codes)
            metrics[f"perplexity/{k}"] = math.exp(float(torch.special.entr(recent).sum(dim=1).mean()))
            # In use: at least a tenth of an even share.
            metrics[f"usage/{k}"] = float((recent > 0.1 / codes).float().mean())
        return metrics

    def alarms(self, metrics: Mapping[str, Tensor | float]) -> list[str]:
        """One sentence for each scale whose codes have collapsed to a few; only where there is a codebook."""
        pyramid, found = self.tokenizer.pyramid, []
        for k, (h, w) in enumerate(self.schedule.sizes):
            if pyramid.codebook is None or f"perplexity/{k}" not in metrics:
                continue
            attainable = min(pyramid.limit(k), self.remembered * self.config.batch_size * h * w)
            perplexity = float(metrics[f"perplexity/{k}"])
            if perplexity < self.loss.alarm * attainable:
                found.append(
                    f"scale {k} ({h}x{w}) has collapsed: it uses {perplexity:.1f} of {attainable} codes (perplexity); "
                    "scale dropout, restarts, standardized residuals or fewer codes for it (pyramid.limits) help"
                )
        return found

    def due_restart(self, step: int, begun: float, quantize: bool) -> bool:
        every = self.loss.restart_every
        return bool(quantize and every and (step + 1) % every == 0 and begun < self.loss.restart_until)

    @torch.no_grad()
    def restart(self, residuals: list[Tensor], generator: torch.Generator) -> float:
        """Move dead codes onto residuals of the scale that uses its codes least; returns how many.

        `residuals`: [B, l_k, C] of each scale.
        """
        usage = self.usage
        codes = self.tokenizer.pyramid.codebook.weight
        weights = torch.tensor(self.schedule.lengths, device=usage.device, dtype=usage.dtype)
        overall = (usage * weights[:, None]).sum(0) / weights.sum()
        dead = (overall < 0.03 / len(codes)).nonzero().squeeze(1)
        if len(dead) == 0:
            return 0.0
        entropy = torch.special.entr(usage).sum(1)
        attainable = torch.log(torch.clamp(weights * len(residuals[0]), max=len(codes)))
        # Not the first scale, whose few tokens cannot use many codes, and none that may not use all of them.
        allowed = [k for k in range(1, len(self.schedule)) if self.tokenizer.pyramid.limit(k) == len(codes)]
        k = min(allowed or [len(self.schedule) - 1], key=lambda k: float(entropy[k] / attainable[k]))
        rows = self.tokenizer.pyramid.standardized(residuals[k], k).flatten(0, 1)
        dead = dead[torch.randperm(len(dead), generator=generator)[: len(rows)]]
        codes[dead] = rows[torch.randperm(len(rows), generator=generator)[: len(dead)]]
        for moment in self.optimizers["tokenizer"].state[codes].values():
            if moment.shape == codes.shape:
                moment[dead] = 0
        usage[:, dead] = 0
        usage[k, dead] = 1 / len(codes)  # a grace period before they can count as dead again
        self.team.share_(codes.data)  # each process has other residuals; the leader's count
        self.restarted = dead
        return float(len(dead))

    def together(self, function: Callable[..., Any]) -> Any:
        """A tokenizer is never sharded."""
        return function()

    def averaged(self, average: Average | None, step: int) -> None:
        """Restarted codes jump; their averages jump with them."""
        if average is not None and self.restarted is not None:
            target = average.values["tokenizer.pyramid.codebook.weight"]
            target[self.restarted] = self.tokenizer.pyramid.codebook.weight.detach()[self.restarted]
        self.restarted = None

    # ---- what the loop shows --------------------------------------------------------------------------------------

    def validate(self, module: Any) -> dict[str, float]:
        if self.val is None:
            return {}
        return evaluate_tokenizer(module["tokenizer"], self.val, self.schedule, self.config.device).metrics()

    @staticmethod
    def score(metrics: Mapping[str, float]) -> float:
        """PSNR of whole reconstructions."""
        return metrics["psnr"]

    def pictures(self, module: Any) -> dict[str, Tensor]:
        if self.val is None:
            return {}
        count = min(16, len(self.val))  # type: ignore[arg-type]
        images = torch.stack([self.val[i * len(self.val) // count]["image"] for i in range(count)])  # type: ignore
        tokenizer = module["tokenizer"]
        images = images.to(self.config.device)
        encoded = tokenizer.encode(images, self.schedule)
        rows = [images] + [at_size(tokenizer.decode(f_hat), images.shape[-2:]).clamp(-1, 1) for f_hat in encoded.f_hats]
        return {"reconstruction": torch.cat(rows)}


@torch.no_grad()
def flop_per_image(tokenizer: Tokenizer, schedule: Schedule, device: str) -> float:
    """Floating-point operations of a training step for each image, estimated: three times those of encoder and decoder."""
    h, w = schedule[-1]
    image = torch.zeros(1, tokenizer.encoder.image_channels, h * tokenizer.stride, w * tokenizer.stride, device=device)
    with FlopCounterMode(display=False) as counter:
        tokenizer.decode(tokenizer.features(image))
    return 3.0 * counter.get_total_flops()


def build_discriminator(loss: TokenizerLoss, image_channels: int) -> nn.Module:
    """The discriminator of the settings; a small patch discriminator that is never used where there is none."""
    if not loss.adversarial or loss.discriminator == "patch":
        return PatchDiscriminator(image_channels, loss.discriminator_width)
    if not loss.dino_weights:
        raise ValueError(
            "the DINO discriminator needs --loss.dino-weights: the file dino_deitsmall16_pretrain.pth, which is not "
            "downloaded; or use --loss.discriminator patch"
        )
    if image_channels != 3:
        raise ValueError(f"the DINO discriminator looks at colour images, got {image_channels} channels; use patch")
    return DinoDiscriminator(loss.dino_weights)


def build_perceptual(loss: TokenizerLoss) -> Any:
    """The perceptual distance of the settings: LPIPS where its weights are given, else that on Lite0; None without one."""
    if bool(loss.lpips_vgg) != bool(loss.lpips_linear):
        raise ValueError("LPIPS needs both files, --loss.lpips-vgg and --loss.lpips-linear, got one")
    if not loss.perceptual:
        return None
    return Lpips(loss.lpips_vgg, loss.lpips_linear) if loss.lpips_vgg else Perceptual()


def _kmeans(rows: Tensor, count: int, generator: torch.Generator, rounds: int = 5) -> Tensor:
    """`count` centres of `rows` [N, C]; drawn with a little noise when there are fewer rows than centres."""
    order = torch.randperm(len(rows), generator=generator).to(rows.device)
    centres = rows[order.repeat(-(-count // len(rows)))[:count]]
    if count >= len(rows):
        return centres + 0.05 * rows.std() * torch.randn(centres.shape, generator=generator).to(rows)
    for _ in range(rounds):
        nearest = torch.cdist(rows, centres).argmin(dim=1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, rows)
        sizes = torch.bincount(nearest, minlength=count).unsqueeze(1)
        centres = torch.where(sizes > 0, sums / sizes.clamp(min=1), centres)
    return centres
