"""What a tokenizer's trainer asks of parts: pyramids without codes, content that is no picture, parts of a batch."""

import json

import pytest
import torch
import torch.nn.functional as F
from small import AUTOENCODER, small
from test_training import CONFIG, DATA, VAL, Squares, metrics
from torch import nn

import nextscale as ns
from nextscale.contracts import Kept, Lesson, Output, TrainablePyramid, TrainableTokenizer
from nextscale.draws import BatchPart, Draws
from nextscale.evaluation.reconstruction import evaluate_tokenizer
from nextscale.output import Images
from nextscale.recipes.generators import flexvar, infinity, var
from nextscale.schedule import Schedule
from nextscale.tokenizer.maps import Step, as_map, as_rows, encoded, pooled
from nextscale.tokenizer.pyramid import PyramidSettings, ResidualPyramid
from nextscale.tokenizer.tokenizer import ImageTokenizer
from nextscale.training.config import TokenizerLoss
from nextscale.training.tokenizer_task import TokenizerTask


class Averages(nn.Module):
    """Continuous tokens: the residual of each scale, averaged over its cells, as it is."""

    kind, codes, token_type = "vectors", 0, None

    def __init__(self, code_dim):
        super().__init__()
        self.code_dim = code_dim

    def start(self, batch, schedule, device=None):
        return torch.zeros(batch, self.code_dim, *schedule[-1], device=device)

    def add(self, f_hat, tokens, k, schedule):
        return f_hat + F.interpolate(as_map(tokens, schedule[k]), size=schedule[-1])

    def next_input(self, f_hat, k, schedule):
        return as_rows(pooled(f_hat, schedule[k]))

    def walk(self, f, schedule, keep=None):
        f_hat = self.start(len(f), schedule, f.device)
        for k in range(len(schedule)):
            rows = as_rows(pooled(f - f_hat, schedule[k]))
            f_hat = self.add(f_hat, rows if keep is None else rows * keep.own[:, k, None, None], k, schedule)
            yield Step(rows, f_hat, rows)

    def encode(self, f, schedule, corrupt=None):
        return encoded(self, self.walk(f, schedule), schedule)

    def learn(self, f, schedule, keep, *, beta=0.25, entropy=0.0):
        steps = list(self.walk(f, schedule, keep))
        rows = [step.tokens for step in steps]
        return Lesson(rows, rows, steps[-1].f_hat, f.new_zeros(()))

    def choices(self, tokens):
        return None

    def limit(self, k):
        return 0

    def check_scales(self, schedule, trained):
        pass

    def upkeep(self):
        return None


def test_a_pyramid_of_vectors_trains_and_is_judged_with_the_same_verbs(tmp_path):
    system = var.build(small(num_classes=3), seed=3, model=False)
    system.tokenizer = ImageTokenizer(AUTOENCODER, Averages(8))
    assert isinstance(system.tokenizer.pyramid, TrainablePyramid) and isinstance(system.tokenizer, TrainableTokenizer)
    config = CONFIG.model_copy(update={"steps": 30, "lr": 3e-3})
    loss = TokenizerLoss(quantize_start=0.1, restart_every=5, drop_scales=0.5)
    ns.train_tokenizer(system, DATA, config, out=tmp_path, val=VAL, loss=loss)
    l2, psnr = metrics(tmp_path, "train/l2"), metrics(tmp_path, "val/psnr")
    assert l2[30] < 0.7 * l2[1] and psnr[30] > psnr[6]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert not any("perplexity" in name or "used" in name or name == "alarm" for line in lines for name in line)
    found = evaluate_tokenizer(system.tokenizer, VAL, system.schedule)
    assert found.perplexity == found.used == found.attainable == [] and len(found.psnr) == 4
    assert found.metrics()["psnr"] == found.psnr[-1]


class Signals:
    """An output that is no picture: sequences float [B, channels, n]."""

    field = "signal"

    def shape(self, schedule, stride):
        return 2, schedule[-1][1] * stride

    def fit(self, content, like):
        return content

    def finish(self, decoded):
        return decoded

    def pictures(self, content):
        return None

    def measure(self, content, reference):
        return {"closeness": -(content - reference).abs().flatten(1).mean(dim=1)}


class SignalTokenizer(nn.Module):
    """Two convolutions around VAR's pyramid, whose maps are one cell high."""

    channels, stride = 2, 4

    def __init__(self):
        super().__init__()
        self.pyramid = ResidualPyramid(PyramidSettings(codebook_size=16, code_dim=4), 3)
        self.encoder, self.decoder = nn.Conv1d(2, 4, 4, stride=4), nn.ConvTranspose1d(4, 2, 4, stride=4)

    @property
    def networks(self):
        return self.encoder, self.decoder

    @property
    def last_weight(self):
        return self.decoder.weight

    def features(self, content):
        return self.encoder(content)[:, :, None]  # [B, C, 1, n]

    def encode(self, content, schedule):
        return self.pyramid.encode(self.features(content), schedule)

    def decode(self, f_hat):
        return self.decoder(f_hat[:, :, 0])

    f_hat = ImageTokenizer.f_hat


def test_a_tokenizer_of_signals_trains_and_is_judged():
    torch.manual_seed(0)
    schedule = Schedule(((1, 1), (1, 2), (1, 4)))
    tokenizer, output = SignalTokenizer(), Signals()
    assert isinstance(tokenizer, TrainableTokenizer) and isinstance(output, Output) and isinstance(Images(), Output)
    wave = torch.linspace(0, 6, 16)
    data = [{"signal": torch.stack([(wave + i).sin(), (wave + i).cos()])} for i in range(16)]
    content = torch.stack([item["signal"] for item in data])
    config = CONFIG.model_copy(update={"steps": 60, "lr": 1e-2})
    loss = TokenizerLoss(quantize_start=0.1, restart_every=10)
    task = TokenizerTask(tokenizer, schedule, config, loss, data, lambda: content, output=output)
    for group in task.optimizers["tokenizer"].param_groups:
        group["lr"] = 1e-2
    first = task.validate(task.module)
    for step in range(60):
        task.step([BatchPart({"signal": content}, Draws(torch.Generator().manual_seed(step), 16))], step)
    last = task.validate(task.module)
    assert task.score(last) == last["closeness"] > first["closeness"] / 2  # half as far away
    assert next(iter(last)) == "closeness" and last["perplexity/2"] > 2
    assert task.pictures(task.module) == {} and task.flop_per_image > 0
    with pytest.raises(ValueError, match=r"look at pictures, and this output has none; use --loss\.perceptual 0"):
        adversarial = TokenizerLoss(adversarial=1.0)
        TokenizerTask(tokenizer, schedule, config, adversarial, data, lambda: content, output=output)


# ---- parts of a batch -------------------------------------------------------------------------------------------------

RECIPES = {"var": var, "flexvar": flexvar, "infinity": infinity}


def gradients(name: str, loss: TokenizerLoss, passes: int, step: int = 5) -> dict[str, torch.Tensor]:
    """What one step on a batch of eight leaves in the gradients of tokenizer and discriminator."""
    recipe = RECIPES[name]
    system = recipe.build(recipe.tiny(), seed=1, model=False)
    images = torch.stack([item["image"] for item in Squares(8, size=64).items])
    config = CONFIG.model_copy(update={"clip": 1e9})
    system.tokenizer.train()
    task = TokenizerTask(system.tokenizer, system.schedule, config, loss, None, lambda: images)
    size = 8 // passes
    slices = [slice(i * size, (i + 1) * size) for i in range(passes)]
    task.step(
        [BatchPart({"image": images[rows]}, Draws(torch.Generator().manual_seed(4), 8, rows)) for rows in slices], step
    )
    found = {name: p.grad.clone() for name, p in task.module.named_parameters() if p.grad is not None}
    assert any(gradient.any() for gradient in found.values())
    return found


def difference(name: str, loss: TokenizerLoss, passes: int = 2) -> float:
    """The largest difference of gradients, as a share of the largest gradient."""
    one, other = (gradients(name, loss, count) for count in (1, passes))
    assert set(one) == set(other)
    largest = max(float(gradient.abs().max()) for gradient in one.values())
    return max(float((one[key] - other[key]).abs().max()) for key in one) / largest


DROPS = TokenizerLoss(quantize_start=0.1, restart_every=0, drop_scales=1.0, drop_from=1)
GROUP = {"adversarial": 0.5, "adversarial_start": 0.1, "discriminator": "patch-group", "adaptive": "off"}


@pytest.mark.parametrize("name", list(RECIPES))
def test_parts_of_a_batch_make_the_update_of_the_whole(name):
    assert difference(name, DROPS, passes=4) < 5e-6  # rounding
    assert difference(name, DROPS.model_copy(update=GROUP | {"discriminator_width": 4}), passes=4) < 2e-5


@pytest.mark.parametrize(
    "name, drop",
    [
        ("flexvar", "prefix"),
        ("flexvar", "independent"),
        ("flexvar", "single"),
        ("var", "prefix"),
        ("infinity", "prefix"),
    ],
)
def test_images_may_lose_all_their_scales(tmp_path, name, drop):
    recipe = RECIPES[name]
    loss = DROPS.model_copy(update={"drop_from": 0, "drop": drop, "init_codes": False, "quantize_start": 0.0})
    system = recipe.build(recipe.tiny(), seed=1, model=False)
    config = CONFIG.model_copy(update={"steps": 3})
    ns.train_tokenizer(system, Squares(8, size=64), config, out=tmp_path, loss=loss)
    assert all(torch.isfinite(p).all() for p in system.parameters())
    none = Kept(torch.zeros(2, 3, dtype=torch.bool))
    f = torch.randn(2, system.tokenizer.pyramid.code_dim, 4, 4, requires_grad=True)
    assert system.tokenizer.pyramid.learn(f, Schedule.squares(1, 2, 4), none).loss.isfinite()


def test_weights_of_parts_are_shares_of_the_whole():
    whole = torch.tensor([[True, True], [True, False], [True, False], [False, False]])
    torch.testing.assert_close(Kept(whole).weights.sum(dim=0), torch.ones(2))
    halves = [Kept(whole, rows).weights for rows in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close(torch.cat(halves) / 2, Kept(whole).weights)
    assert not Kept(torch.zeros(3, 2, dtype=torch.bool)).weights.any()


def test_scales_that_a_pyramid_cannot_have():
    own, other = Schedule.squares(1, 2, 4), Schedule.squares(1, 3, 4)
    standard = ResidualPyramid(PyramidSettings(codebook_size=8, code_dim=4, standardize=True), 3)
    standard.check_scales(own, own)
    with pytest.raises(ValueError, match="standardizes the residuals of each of its own scales"):
        standard.check_scales(other, own)
    each = ResidualPyramid(PyramidSettings(codebook_size=8, code_dim=4, phi="each"), 3)
    each.check_scales(other, own)
    with pytest.raises(ValueError, match="one phi for each of 3 scales, got 4"):
        each.check_scales(Schedule.squares(1, 2, 3, 4), own)
