"""Tokenizer training: the losses around the pyramid, the discriminator, and the calls that keep codes in use.

Several passes (`accumulate`) and several processes make the update of one pass, but for what looks at more than one image at a
time or draws from torch's own generator: docs/several-machines.md names all of it, with sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode

from nextscale.contracts import Kept, Lesson, Output, TrainableTokenizer, Upkeep
from nextscale.data.dataset import one_size
from nextscale.draws import BatchPart, Draws, generator_for
from nextscale.evaluation.reconstruction import code_counts, evaluate_tokenizer
from nextscale.output import Images
from nextscale.pixels import on_white
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
from nextscale.tokens import Tokens, joined_rows
from nextscale.training.average import Average
from nextscale.training.config import TokenizerLoss, TrainConfig
from nextscale.training.fit import adamw, autocast, descend, scaler
from nextscale.training.log import Shown
from nextscale.training.memory import check_memory

Metrics = dict[str, Tensor | float]


class TokenizerTask:
    """One tokenizer, one discriminator if asked for, their optimizers and their losses (`Task` of the loop).

    first_content: returns what sets the first codes, many more items than a batch. output: what the content is; images by
    default.
    """

    def __init__(
        self,
        tokenizer: TrainableTokenizer,
        schedule: Schedule,
        config: TrainConfig,
        loss: TokenizerLoss,
        val: Dataset | None,
        first_content: Callable[[], Tensor],
        team: Team = Team(),
        output: Output | None = None,
    ) -> None:
        self.schedule, self.config, self.loss, self.val = schedule, config, loss, val
        self.first_content, self.team = first_content, team
        self.tokenizer, self.output = tokenizer, output or Images(tokenizer.channels)
        network = cast(nn.Module, tokenizer).to(config.device)
        shown = self.output.pictures(torch.zeros(1, *self.output.shape(schedule, tokenizer.stride)))
        if shown is None and (loss.perceptual or loss.adversarial):
            raise ValueError(
                "the perceptual distance and the discriminator look at pictures, and this output has none; use "
                "--loss.perceptual 0 --loss.adversarial 0"
            )
        channels = 3 if shown is None else shown.shape[1]
        if loss.discriminator != "dino":
            with torch.device("meta"):
                check_memory(build_discriminator(loss, channels), "discriminator", config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.discriminator = build_discriminator(loss, channels, team).to(config.device)
        self.perceptual = build_perceptual(loss)
        if self.perceptual is not None:
            self.perceptual.to(config.device)
        self.module = nn.ModuleDict({"tokenizer": network, "discriminator": self.discriminator})
        # Share of tokens that each code holds at each scale (of bits: each value of each bit), averaged over recent steps;
        # saved with the run. Of tokens without choices it has no columns.
        nothing = torch.zeros(1, tokenizer.pyramid.code_dim, *schedule[-1], device=config.device)
        choices = self.choices(tokenizer.pyramid.encode(nothing, schedule).tokens)
        columns = code_counts(choices[:1], tokenizer.pyramid.codes)[0].numel() if choices else 0
        self.module.register_buffer("usage", torch.zeros(len(schedule), columns, device=config.device))
        # Running means: logits of real and of made images, and the scale of the adversarial term.
        self.module.register_buffer("logit_means", torch.zeros(2, device=config.device))
        self.module.register_buffer("scale_mean", torch.zeros((), device=config.device))
        self.remembered = 0  # steps whose codes `usage` knows of, some fifty at most
        self.restarted: Tensor | None = None  # codes that moved in this step
        upkeep = self.upkeep
        tables = [name for name, p in network.named_parameters() if upkeep is not None and p is upkeep.codes]
        self.optimizers = {
            "tokenizer": adamw(network, config, keep=tuple(tables)),
            "discriminator": adamw(self.discriminator, config),
        }
        self.scalers = {name: scaler(config) for name in self.optimizers}
        if config.compile:
            for part in tokenizer.networks:
                part.compile()
        self.tokens_per_image = schedule.length
        self.flop_per_image = flop_per_image(tokenizer, self.output.shape(schedule, tokenizer.stride), config.device)
        self.forward = team.wrap(network, self.losses, unused=True)
        self.judge = team.wrap(self.discriminator, self.verdict)

    @property
    def upkeep(self) -> Upkeep | None:
        """What keeps the codes in use, if anything needs it."""
        return self.tokenizer.pyramid.upkeep()

    @property
    def usage(self) -> Tensor:
        """Share of tokens that each code holds at each scale, [K, V]."""
        return self.module.get_buffer("usage")

    # ---- one step -------------------------------------------------------------------------------------------------

    def step(self, parts: Sequence[BatchPart], step: int) -> Metrics:
        begun = step / self.config.steps
        quantize = begun >= self.loss.quantize_start
        if quantize and self.upkeep is not None and self.loss.init_codes and not self.usage.any():
            self.first_codes(self.first_content(), generator_for(self.config.seed, step))
        self.lessons: list[Lesson] = []
        self.pairs: list[tuple[Tensor, Tensor, Draws]] = []  # pictures of the content, and of what became of it
        network, clip = self.module["tokenizer"], self.config.clip
        optimizer, scaler = self.optimizers["tokenizer"], self.scalers["tokenizer"]
        metrics = descend(network, optimizer, scaler, self.forward, parts, step, clip, self.team)
        if not metrics["grad_norm"].isfinite():  # type: ignore[union-attr]  # the step changes nothing
            return metrics
        if quantize:  # after backward, which still needs the old codes
            self.remembered = min(50, step + 1 - math.ceil(self.loss.quantize_start * self.config.steps))
            tokens = [joined_rows(of_scale) for of_scale in zip(*(x.tokens for x in self.lessons), strict=True)]
            residuals = [torch.cat(of_scale) for of_scale in zip(*(x.residuals for x in self.lessons), strict=True)]
            metrics |= self.count(tokens)
            if self.upkeep is not None:
                self.upkeep.follow(residuals, self.team.average)
        if self.adversarial_weight(begun) > 0:
            optimizer, scaler = self.optimizers["discriminator"], self.scalers["discriminator"]
            found = descend(self.discriminator, optimizer, scaler, self.judge, self.pairs, step, clip, self.team)
            metrics |= {f"discriminator/{name}": value for name, value in found.items()}
        if quantize and self.due_restart(step):
            metrics["restarted"] = self.restart(residuals, generator_for(self.config.seed, step, "restart"))
        return metrics

    def losses(self, part: BatchPart, step: int) -> tuple[Tensor, Metrics]:
        """The loss of a part of a batch (the terms of Eq. 5 of VAR), and what to log; remembers what the step needs later."""
        field = self.output.field
        content = one_size(part.batch[field], field).to(self.config.device)
        begun = step / self.config.steps
        with autocast(self.config):
            f = self.tokenizer.features(content)
        if begun >= self.loss.quantize_start:
            keep = self.kept_scales(part.draws).to(f.device)
            terms = {"beta": self.loss.beta, "entropy": self.loss.entropy}
            lesson = self.tokenizer.pyramid.learn(f, self.schedule, keep, **terms)
            self.lessons.append(lesson)
            f_hat, codebook_loss = lesson.f_hat, lesson.loss
        else:
            f_hat, codebook_loss = f, f.new_zeros(())
        with autocast(self.config):
            recon = self.tokenizer.decode(f_hat).float()
        content = self.output.fit(content, recon)

        l1, l2 = F.l1_loss(recon, content), F.mse_loss(recon, content)
        total = self.loss.l1 * l1 + self.loss.l2 * l2
        metrics: Metrics = {"l1": l1.detach(), "l2": l2.detach(), "codebook": codebook_loss.detach()}
        made, real = self.output.pictures(recon), self.output.pictures(content)
        if made is not None and real is not None:
            total = self.with_pictures(made, real, total, part.draws, begun, metrics)
        total = total + self.loss.codebook * codebook_loss
        return total, metrics | {"loss": total.detach()}

    def with_pictures(
        self, made: Tensor, real: Tensor, total: Tensor, draws: Draws, begun: float, metrics: Metrics
    ) -> Tensor:
        """The `total` so far plus perceptual distance and discriminator's term, which are put in `metrics` too."""
        if self.perceptual is not None and begun >= self.loss.perceptual_start:
            perceptual = self.perceptual(on_white(made), on_white(real)).mean()
            metrics[self.perceptual.name] = perceptual.detach()
            total = total + self.loss.perceptual * perceptual
        adversarial = self.adversarial_weight(begun)
        if adversarial > 0:
            total = total + adversarial * self.fool(made, total, draws, metrics)
            self.pairs.append((real, made.detach(), draws))
        return total

    def kept_scales(self, draws: Draws) -> Kept:
        """Which scales each image keeps while training. A share of the images drops some: with `prefix` all after the first n,
        n uniform; with `independent` each but the last at even odds; with `single` one of them."""
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
        return Kept(~(lost & dropped & chosen), draws.rows)

    # ---- the discriminator ----------------------------------------------------------------------------------------

    def adversarial_weight(self, begun: float) -> float:
        if not self.loss.adversarial or begun < self.loss.adversarial_start:
            return 0.0
        risen = (begun - self.loss.adversarial_start) / max(self.loss.adversarial_warmup, 1e-9)
        return self.loss.adversarial * min(1.0, max(risen, 1e-3))

    def fool(self, recon: Tensor, reconstruction: Tensor, draws: Draws, metrics: Metrics) -> Tensor:
        """The adversarial term, scaled to the reconstruction's gradient at the decoder's last layer."""
        self.discriminator.requires_grad_(False)
        seen = differentiable_augmentation(recon, draws.rand(7)) if self.loss.augment_pairs else recon
        term = generator_adversarial_loss(self.discriminator(seen))
        self.discriminator.requires_grad_(True)
        metrics["adversarial"] = term.detach()
        if self.loss.adaptive == "off":
            return term
        low, high = self.loss.adaptive_range
        last, root = self.tokenizer.last_weight, self.loss.adaptive == "root"
        scale = adaptive_weight(reconstruction, term, last, low, high, root=root, average=self.team.average)
        if self.loss.adaptive_ema:
            mean = self.module.get_buffer("scale_mean")
            mean.copy_(scale if mean == 0 else mean.lerp(scale, 1 - self.loss.adaptive_ema))
            scale = mean.clone()
        metrics["adaptive_weight"] = scale
        return scale * term

    def verdict(self, pair: tuple[Tensor, Tensor, Draws], step: int) -> tuple[Tensor, Metrics]:
        """The discriminator's loss on images and what became of them."""
        real, fake, draws = pair
        images = torch.cat([real, fake])
        numbers = torch.cat([draws.rand(7), draws.rand(7)])
        seen = differentiable_augmentation(images, numbers) if self.loss.augment_pairs else images
        logits = self.discriminator(seen)
        of_real, of_fake = logits.chunk(2)
        loss = hinge_discriminator_loss(of_real, of_fake, summed=self.loss.hinge_sum)
        metrics: Metrics = {"hinge": loss.detach()}
        if self.loss.lecam:
            term = lecam(of_real, of_fake, self.module.get_buffer("logit_means"), average=self.team.average)
            loss, metrics["lecam"] = loss + self.loss.lecam * term, term.detach()
        if self.loss.consistency:
            other = torch.cat([draws.rand(7), draws.rand(7)])
            again = self.discriminator(differentiable_augmentation(images, other))
            term = F.mse_loss(again, logits)
            loss, metrics["consistency"] = loss + self.loss.consistency * term, term.detach()
        return loss, {"loss": loss.detach(), **metrics}

    # ---- codes: start, count, restart -----------------------------------------------------------------------------

    @torch.no_grad()
    def first_codes(self, content: Tensor, generator: torch.Generator) -> None:
        """Set the codes from the features of real content; all processes take the leader's."""
        upkeep = self.upkeep
        assert upkeep is not None
        f = torch.cat([self.tokenizer.features(part) for part in content.to(self.config.device).split(64)])
        upkeep.first_codes(f, self.schedule, generator)
        for tensor in self.module["tokenizer"].get_submodule("pyramid").state_dict().values():
            self.team.share_(tensor)  # with dropout each process has features of its own

    def choices(self, tokens: Sequence[Tokens]) -> list[Tensor]:
        """The ids or bits in the token maps of each scale; none where there are none."""
        found = [self.tokenizer.pyramid.choices(token_map) for token_map in tokens]
        return [choice for choice in found if choice is not None]

    @torch.no_grad()
    def count(self, tokens: Sequence[Tokens]) -> dict[str, float]:
        """Update the usage statistics; returns usage and perplexity of every scale (of bits: the mean over them)."""
        usage, codes, metrics = self.usage, self.tokenizer.pyramid.codes, {}
        for k, counts in enumerate(code_counts(self.choices(tokens), codes)):
            counts = self.team.sum_(counts.to(usage))
            share = (counts / counts.sum(dim=1, keepdim=True)).flatten()
            usage[k].lerp_(share, 0.02) if usage[k].any() else usage[k].copy_(share)
            recent = usage[k].view(-1, codes)
            metrics[f"perplexity/{k}"] = math.exp(float(torch.special.entr(recent).sum(dim=1).mean()))
            # In use: at least a tenth of an even share.
            metrics[f"usage/{k}"] = float((recent > 0.1 / codes).float().mean())
        return metrics

    def alarms(self, metrics: Mapping[str, Tensor | float]) -> list[str]:
        """One sentence for each scale whose codes have collapsed to a few; only where there is something to keep up."""
        found = []
        for k, (h, w) in enumerate(self.schedule.sizes):
            if self.upkeep is None or f"perplexity/{k}" not in metrics:
                continue
            attainable = min(self.tokenizer.pyramid.limit(k), self.remembered * self.config.batch_size * h * w)
            perplexity = float(metrics[f"perplexity/{k}"])
            if perplexity < self.loss.alarm * attainable:
                found.append(
                    f"scale {k} ({h}x{w}) has collapsed: it uses {perplexity:.1f} of {attainable} codes (perplexity); "
                    "scale dropout, restarts, standardized residuals or fewer codes for it (pyramid.limits) help"
                )
        return found

    def due_restart(self, step: int) -> bool:
        """Whether codes that are not in use move after this step."""
        every, begun = self.loss.restart_every, step / self.config.steps
        return bool(self.upkeep is not None and every and (step + 1) % every == 0 and begun < self.loss.restart_until)

    @torch.no_grad()
    def restart(self, residuals: Sequence[Tensor], generator: torch.Generator) -> float:
        """Move dead codes onto residuals [B, l_k, C]; returns how many. Their optimizer state starts anew."""
        upkeep = self.upkeep
        assert upkeep is not None
        moved = upkeep.restart(self.usage, residuals, self.schedule, generator, self.team.all_rows)
        if len(moved):
            for moment in self.optimizers["tokenizer"].state[upkeep.codes].values():
                if moment.shape == upkeep.codes.shape:
                    moment[moved] = 0
            self.restarted = moved
        return float(len(moved))

    def together(self, function: Callable[..., Any]) -> Any:
        """A tokenizer is never sharded."""
        return function()

    def averaged(self, average: Average | None, step: int) -> None:
        """Restarted codes jump; their averages jump with them."""
        if average is not None and self.restarted is not None and self.upkeep is not None:
            codes = self.upkeep.codes
            name = next(name for name, parameter in self.module.named_parameters() if parameter is codes)
            average.values[name][self.restarted] = codes.detach()[self.restarted]
        self.restarted = None

    # ---- what the loop shows --------------------------------------------------------------------------------------

    def validate(self, module: Any) -> dict[str, float]:
        if self.val is None:
            return {}
        return evaluate_tokenizer(
            module["tokenizer"], self.val, self.schedule, self.config.device, output=self.output
        ).metrics()

    @staticmethod
    def score(metrics: Mapping[str, float]) -> float:
        """The output's first measure of whole reconstructions, PSNR of images."""
        return next(iter(metrics.values()))

    def pictures(self, module: Any) -> dict[str, Shown]:
        """A row for each of some held-out images: itself, and its reconstruction after each scale."""
        if self.val is None:
            return {}
        count = min(16, len(self.val))  # type: ignore[arg-type]
        items = [self.val[i * len(self.val) // count] for i in range(count)]  # type: ignore[arg-type]
        content = torch.stack([item[self.output.field] for item in items]).to(self.config.device)
        tokenizer: TrainableTokenizer = module["tokenizer"]
        f_hats = tokenizer.encode(content, self.schedule).f_hats
        decoded = [self.output.finish(self.output.fit(tokenizer.decode(f_hat), content)) for f_hat in f_hats]
        shown = self.output.pictures(torch.stack([content, *decoded], dim=1).flatten(0, 1))
        labels = ["original", *(f"{h}x{w}" for h, w in self.schedule.sizes)]
        return {} if shown is None else {"reconstruction": Shown(shown, len(labels), labels * count)}


@torch.no_grad()
def flop_per_image(tokenizer: TrainableTokenizer, shape: Sequence[int], device: str) -> float:
    """Floating-point operations of a training step for each image, estimated: three times those of encoder and decoder.
    `shape`: of one image."""
    with FlopCounterMode(display=False) as counter:
        tokenizer.decode(tokenizer.features(torch.zeros(1, *shape, device=device)))
    return 3.0 * counter.get_total_flops()


def build_discriminator(loss: TokenizerLoss, image_channels: int, team: Team = Team()) -> nn.Module:
    """The discriminator of the settings; a small patch discriminator that is never used where there is none."""
    if not loss.adversarial or loss.discriminator != "dino":
        norm: Literal["batch", "group"] = "group" if loss.discriminator == "patch-group" else "batch"
        average = team.average_with_gradient if team.size > 1 else None
        return PatchDiscriminator(image_channels, loss.discriminator_width, norm=norm, average=average)
    if not loss.dino_weights:
        raise ValueError(
            "the DINO discriminator needs --loss.dino-weights: the file dino_deitsmall16_pretrain.pth, which is not "
            "downloaded; or use --loss.discriminator patch"
        )
    if image_channels != 3:
        raise ValueError(f"the DINO discriminator looks at colour images, got {image_channels} channels; use patch")
    return DinoDiscriminator(loss.dino_weights)


def build_perceptual(loss: TokenizerLoss) -> Lpips | Perceptual | None:
    """The perceptual distance of the settings: LPIPS where its weights are given, else that on Lite0; None without one."""
    if bool(loss.lpips_vgg) != bool(loss.lpips_linear):
        raise ValueError("LPIPS needs both files, --loss.lpips-vgg and --loss.lpips-linear, got one")
    if not loss.perceptual:
        return None
    return Lpips(loss.lpips_vgg, loss.lpips_linear) if loss.lpips_vgg else Perceptual()
