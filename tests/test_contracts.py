"""Contracts: the parts of every recipe keep them, and miniatures of other methods stand on them without a change in the core.

Each probe is a miniature of some published methods: it trains a few steps, samples, decodes, is validated, saved and loaded
through the ordinary verbs (`through_all_verbs`). What a probe shows stands in its first line.
"""

import copy
import json
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nextscale as ns
from nextscale import contracts
from nextscale.condition import Condition
from nextscale.contracts import Encoded
from nextscale.draws import normal
from nextscale.model.attention import KVCache
from nextscale.model.block import AdaLNBlock, BlockWrapper
from nextscale.model.class_condition import ClassCondition
from nextscale.model.head import SoftmaxHead
from nextscale.model.positions import LearnedPositions
from nextscale.model.text_encoders import HashWords
from nextscale.model.transformer import Transformer
from nextscale.model.transformer_settings import TransformerSettings
from nextscale.readers import ClassReader, TensorReader
from nextscale.sampling.defaults import SamplingDefaults
from nextscale.sampling.loop import ScaleByScale, drop_branches, predicted
from nextscale.sampling.pick import pick_at
from nextscale.sampling.state import State
from nextscale.schedule import Schedule, Sight
from nextscale.settings import Settings
from nextscale.system import Part, System, recipe_names
from nextscale.tokenizer.autoencoder import AutoencoderSettings
from nextscale.tokenizer.pyramid import PyramidSettings, ResidualPyramid
from nextscale.tokenizer.tokenizer import ImageTokenizer
from nextscale.tokens import each, first_tensor
from nextscale.training.objective import TeacherForcing

# ---- the parts of every recipe -----------------------------------------------------------------------------------------


def every_system() -> list:
    found = []
    for name in sorted(recipe_names()):
        recipe = ns.find_recipe(name)
        if hasattr(recipe, "build"):
            found.append(pytest.param(recipe.build(recipe.tiny()), id=name))
        else:
            base = ns.find_recipe(getattr(recipe, "EXAMPLE", "var"))
            found.append(pytest.param(recipe.apply(base.build(base.tiny()), recipe.tiny()), id=name))
    return found


def broken_contracts(system) -> list[str]:
    """What parts of a system lack, in words."""
    model, told = system.model, {name: [None] for name in system.readers}
    prepared = model.prepare(system.condition(told))
    cache = model.new_cache(prepared, system.schedule)
    parts = [
        (contracts.Prepared, prepared),
        (contracts.Cache, cache),
        (contracts.Pyramid, system.tokenizer.pyramid),
        (contracts.Tokenizer, system.tokenizer),
        (contracts.Conditioner, model.conditioner),
        (contracts.Positions, model.positions),
        (contracts.Model, model),
        (contracts.Head, model.head),
        (contracts.Objective, system.objective),
        (contracts.Output, system.output),
        (contracts.Sampling, system.sampling),
        (contracts.Stepper, system.stepper or ScaleByScale()),
        *((contracts.Reader, reader) for reader in system.readers.values()),
        *((contracts.Block, block) for block in model.blocks),
        *((contracts.Branch, branch) for block in model.blocks for branch in block.branches),
        *((contracts.LayerCache, layer) for layer in cache.layers),
    ]
    return [
        f"{type(part).__name__} is no {contract.__name__}: it lacks {lacking}"
        for contract, part in parts
        if not isinstance(part, contract)
        for lacking in [[name for name in dir(contract) if not name.startswith("_") and not hasattr(part, name)]]
    ]


@pytest.mark.parametrize("system", every_system())
def test_parts_keep_their_contracts(system):
    assert broken_contracts(system) == []
    tokenizer, model = system.tokenizer, system.model
    assert isinstance(tokenizer, contracts.TrainableTokenizer) and isinstance(
        tokenizer.pyramid, contracts.TrainablePyramid
    )
    upkeep = tokenizer.pyramid.upkeep()
    assert upkeep is None or isinstance(upkeep, contracts.Upkeep)
    base = system.base.model
    layers = [branch.layer for block in base.blocks for branch in block.branches if hasattr(branch.layer, "project")]
    assert layers and all(isinstance(layer, contracts.Layer) for layer in layers)
    caches = [block.new_cache(1, 4, base.embed_input.weight) for block in model.blocks]
    assert all(isinstance(cache, contracts.KeyCache) for cache in caches)


@pytest.mark.parametrize("system", every_system())
def test_heads_under_autocast_give_float32(system):
    """Rounded logits are other tokens: a head computes in float32 whatever its caller's autocast."""
    h = torch.randn(2, 3, system.model.settings.dim, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = system.model.head(h.bfloat16())
    assert logits.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(logits, system.model.head(h.bfloat16().float()), atol=0, rtol=0)


# ---- what probes are made of -------------------------------------------------------------------------------------------

SHAPE = TransformerSettings(depth=2, dim=16, num_heads=2, init_head=1.0, init_gate=1.0)
SCHEDULE = Schedule.squares(1, 2, 4)
CODES = PyramidSettings(codebook_size=16, code_dim=4)


class NoSettings(Settings):
    """Probes have none."""


def probe_tokenizer(pyramid=None) -> ImageTokenizer:
    """16x16 pixels to 4x4 vectors of 4 channels."""
    pyramid = pyramid or ResidualPyramid(CODES, len(SCHEDULE))
    shape = AutoencoderSettings(width=8, multipliers=(1,), patch=4, blocks=1, groups=4, attention=False)
    return ImageTokenizer(shape, pyramid)


def probe_model(schedule=SCHEDULE, **parts) -> Transformer:
    usual = {
        "conditioner": ClassCondition(3, SHAPE.dim),
        "positions": LearnedPositions(schedule, SHAPE.dim),
        "head": SoftmaxHead(SHAPE.dim, CODES.codebook_size),
    }
    return Transformer(SHAPE, CODES.code_dim, **(usual | parts))


def probe_system(tokenizer=None, model=None, schedule=SCHEDULE, **others) -> System:
    usual = {"sampling": SamplingDefaults(guidance=2.0, top_k=0, top_p=0.0), "objective": TeacherForcing()}
    usual |= {"readers": {"label": ClassReader((), 3)}}
    system = System(
        "probe", NoSettings(), schedule, tokenizer or probe_tokenizer(), model or probe_model(), **(usual | others)
    )
    return system


def items(count: int = 8, **more) -> list[dict]:
    """Images of blocks, with labels; `more`: other entries, made of an image's number."""
    generator = torch.Generator().manual_seed(0)
    small = torch.rand(count, 3, 4, 4, generator=generator) * 2 - 1
    pictures = F.interpolate(small, size=(16, 16))
    return [
        {"image": pictures[i], "label": i % 3, "mirror_ok": True} | {name: make(i) for name, make in more.items()}
        for i in range(count)
    ]


def built(make) -> System:
    torch.manual_seed(0)
    return make()


def recipe_of(make) -> dict:
    """What `ns.load` needs of recipes that do not come with nextscale."""
    recipe = SimpleNamespace(Config=NoSettings, build=lambda config, seed=0, *, model=True: built(make))
    return {"probe": recipe, "few-keys": SimpleNamespace(Config=NoSettings, apply=with_few_keys)}


def through_all_verbs(make, folder, told, data=None, *, half=True, **options) -> System:
    """Train, validate, sample, decode, save, load, and the laws that all systems keep; returns the system."""
    system = built(make)
    assert broken_contracts(system) == []
    data = items() if data is None else data
    config = ns.TrainConfig(steps=4, batch_size=4, warmup=1, validate_every=2, log_every=1, save_every=4)
    ns.train_model(system, data, config, out=folder / "run", val=data, **options)
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum("val/loss" in line for line in lines) == 2
    assert all(abs(line["train/loss"]) < 1e4 for line in lines if "train/loss" in line)
    rows = len(next(iter(told.values())))
    images = ns.sample(system, told, seed=5)
    tokens = ns.sample_tokens(system, told, seed=5)
    assert images.isfinite().all() and images.shape == (
        rows,
        *system.output.shape(system.schedule, system.tokenizer.stride),
    )
    assert [first_tensor(t).shape[:2] for t in tokens] == [(rows, n) for n in system.schedule.lengths]
    alone = {name: values[1:2] for name, values in told.items()}
    torch.testing.assert_close(ns.sample(system, alone, seed=6), images[1:2], atol=1e-4, rtol=0)  # law 5
    state = ns.step(system, ns.start(system, told, seed=5))  # law 8
    children = [ns.finish(system, ns.run(system, child)) for child in (state, state.select(torch.arange(rows).flip(0)))]
    torch.testing.assert_close(children[0], images, atol=1e-5, rtol=0)
    torch.testing.assert_close(children[1].flip(0), images, atol=1e-4, rtol=0)
    again = ns.load(ns.save(system, folder / "saved"), recipes=recipe_of(make))  # law 7
    assert torch.equal(ns.sample(again, told, seed=5), images)
    if half:  # all networks are the core's, or cast as the contracts say
        assert ns.sample(again.half_(torch.bfloat16), told, seed=5).isfinite().all()
    return system


def cached_equals_masked(system, told) -> None:
    """Law 1, for heads with logits."""
    seen = []

    def record(logits, generators):
        seen.append(logits)
        return ns.multinomial(logits, generators)

    tokens = ns.sample_tokens(system, told, pick=record, guidance=ns.cfg(1.0), seed=1)
    torch.testing.assert_close(torch.cat(seen, dim=1), ns.logits(system, tokens, told), atol=1e-4, rtol=0)


TOLD = {"label": [0, 2, None]}

# ---- tokens ------------------------------------------------------------------------------------------------------------


class VectorPyramid(nn.Module):
    """Pooled residuals as they are."""

    kind, code_dim, codes, token_type = "vectors", 4, 0, None

    def start(self, batch, schedule, device=None):
        return torch.zeros(batch, self.code_dim, *schedule[-1], device=device)

    def add(self, f_hat, tokens, k, schedule):
        small = tokens.mT.unflatten(-1, schedule[k])
        return f_hat + F.interpolate(small, size=schedule[-1], mode="nearest")

    def next_input(self, f_hat, k, schedule):
        return F.adaptive_avg_pool2d(f_hat, schedule[k]).flatten(2).mT

    def take(self, residual, k, schedule):
        return self.next_input(residual, k, schedule)

    def encode(self, f, schedule, corrupt=None):
        f_hat, encoded = self.start(len(f), schedule, f.device), Encoded([], [], [])
        for k in range(len(schedule)):
            if k:
                encoded.inputs.append(self.next_input(f_hat, k, schedule))
            encoded.tokens.append(self.take(f - f_hat, k, schedule))
            f_hat = self.add(f_hat, encoded.tokens[-1], k, schedule)
            encoded.f_hats.append(f_hat)
        return encoded

    def choices(self, tokens):
        return None

    def limit(self, k):
        return 0

    def check_scales(self, schedule, trained):
        pass


class FlowHead(nn.Module):
    """Flow matching on each token's vector."""

    def reset_parameters(self, settings, generator):
        pass

    def forward(self, h):
        raise ValueError("a flow has no logits")

    def __init__(self, dim, channels):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(dim + channels + 1, 32), nn.SiLU(), nn.Linear(32, channels))
        self.channels = channels

    def velocity(self, h, x, t):
        return self.net(torch.cat([h, x, t.expand(*h.shape[:-1], 1)], dim=-1))

    def loss(self, h, targets, draws, label_smoothing=0.0):
        t, noise = draws.rand(h.shape[1], 1), draws.randn(*targets.shape[1:])
        return (self.velocity(h, (1 - t) * noise + t * targets, t) - (targets - noise)).square().mean(dim=-1)

    def judge(self, h, targets, draws):
        return {"flow": self.loss(h, targets, draws)}

    def log_prob(self, h, tokens):
        raise ValueError("a flow has no likelihood in closed form")

    def sample(self, h, combine, pick, generators):
        images = len(combine(h))
        x = normal((images, h.shape[1], self.channels), generators)
        for i in range(4):
            x = x + combine(self.velocity(h, x.repeat(len(h) // images, 1, 1), torch.full((1,), i / 4))) / 4
        return x


def test_continuous_tokens_with_a_flow_head(tmp_path):
    """FlowAR, xAR: tokens are vectors, the loss draws, validation is not cross-entropy."""

    def make():
        return probe_system(probe_tokenizer(VectorPyramid()), probe_model(head=FlowHead(SHAPE.dim, 4)))

    system = through_all_verbs(make, tmp_path, TOLD)
    assert system.tokenizer.pyramid.kind == "vectors"
    with pytest.raises(ValueError, match="no likelihood"):
        system.model.head.log_prob(torch.zeros(1, 1, 16), torch.zeros(1, 1, 4))


class Mixed(NamedTuple):
    ids: torch.Tensor
    vectors: torch.Tensor


class MixedPyramid(VectorPyramid):
    """The nearest of 16 fixed codes, and what it leaves."""

    kind, codes, token_type = "mixed", 16, Mixed

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(16, 4) / 4)

    def take(self, residual, k, schedule):
        rows = super().take(residual, k, schedule)
        ids = torch.cdist(rows, self.table.expand(len(rows), -1, -1)).argmin(dim=-1)
        return Mixed(ids, rows - self.table[ids])

    def add(self, f_hat, tokens, k, schedule):
        return super().add(f_hat, self.table[tokens.ids] + tokens.vectors, k, schedule)

    def choices(self, tokens):
        return tokens.ids


class MixedHead(SoftmaxHead):
    """Logits of the id, and a guess of the vector."""

    def __init__(self, dim):
        super().__init__(dim, 16)
        self.guess = nn.Linear(dim, 4)

    def loss(self, h, targets, draws, label_smoothing=0.0):
        ids = super().loss(h, targets.ids, draws, label_smoothing)
        return ids + (self.guess(h) - targets.vectors).square().mean(dim=-1)

    def judge(self, h, targets, draws):
        return {"both": self.loss(h, targets, draws)} | super().judge(h, targets.ids, draws)

    def sample(self, h, combine, pick, generators):
        return Mixed(super().sample(h, combine, pick, generators), combine(self.guess(h)))


def test_tokens_of_an_id_and_a_vector(tmp_path):
    """HART: a token of two parts goes through pyramid, cache, targets, loss, edit and decode."""

    def make():
        return probe_system(probe_tokenizer(MixedPyramid()), probe_model(head=MixedHead(SHAPE.dim)))

    system = through_all_verbs(make, tmp_path, TOLD)
    images = torch.stack([item["image"] for item in items(3)])
    tokens = ns.encode(system, images)
    forced = ns.sample(system, TOLD, edit=lambda drawn, k: tokens[k])
    torch.testing.assert_close(forced, ns.decode(system, tokens), atol=1e-5, rtol=0)
    assert each(lambda t: t[:1], tokens[2]).ids.shape == (1, 16)


# ---- the loop ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TwoPasses(ScaleByScale):
    """A draft of each scale, then another pass that has seen it; the draft's pass leaves no trace."""

    def draw(self, system, state, cache, generators):
        pyramid, k, schedule = system.tokenizer.pyramid, state.k, state.schedule
        inputs = pyramid.next_input(state.f_hat, k, schedule) if k else None
        draft = predicted(system, state, inputs, cache, generators, commit=False)
        seen = pyramid.add(state.f_hat, draft, k, schedule)
        return predicted(system, state, pyramid.next_input(seen, k, schedule) if k else None, cache, generators)


def test_several_passes_a_scale(tmp_path):
    """HMAR, STAR, masked and speculative steps: what is not committed leaves no trace in the cache."""
    system = through_all_verbs(lambda: probe_system(stepper=TwoPasses()), tmp_path, TOLD)
    state = ns.run(system, ns.start(system, TOLD))
    assert [layer.length for layer in state.cache.layers] == [SCHEDULE.length] * SHAPE.depth


def beam(system, told, width: int) -> tuple[list, torch.Tensor]:
    """The best of `width` children of each state, scale by scale, by the model's own likelihood."""
    state = ns.start(system, told, guidance=ns.cfg(1.0), seed=0)
    total = 0.0
    while state.k < len(state.schedule):
        seeded = [replace(state, noise=state.noise.of(seed, None, 1, system.device)) for seed in range(width)]
        children = [ns.step(system, child) for child in seeded]
        scores = [score(system, told, child.tokens) for child in children]
        best = max(range(width), key=lambda i: scores[i])
        state, total = children[best], scores[best]
    return state.tokens, total


def score(system, told, tokens) -> float:
    """Log-likelihood of the scales so far."""
    with torch.no_grad():
        span, prepared = system.schedule.span(0, len(tokens)), system.model.prepare(system.condition(told))
        f_hat, inputs, pyramid = system.tokenizer.pyramid.start(1, system.schedule), [], system.tokenizer.pyramid
        for k, token_map in enumerate(tokens[:-1]):
            f_hat = pyramid.add(f_hat, token_map, k, system.schedule)
            inputs.append(pyramid.next_input(f_hat, k + 1, system.schedule))
        h = system.model.hidden(torch.cat(inputs, 1) if inputs else None, prepared, span)
        return float(system.model.head.log_prob(h, torch.cat(tokens, dim=1)).sum())


def test_a_tree_of_states(tmp_path):
    """Beam search, TTS-VAR: children of one state, of which the best goes on."""
    system = through_all_verbs(probe_system, tmp_path, TOLD)
    told = {"label": [1]}
    tokens, total = beam(system, told, 4)
    alone = ns.sample_tokens(system, told, guidance=ns.cfg(1.0), seed=0)
    assert total >= score(system, told, alone) and total == beam(system, told, 4)[1]
    assert torch.equal(tokens[0], beam(system, told, 4)[0][0])


@dataclass(frozen=True)
class AllTheRestAtOnce(ScaleByScale):
    """The first scale, then all others in one step."""

    def step(self, system, state):
        if state.k == 0:
            return super().step(system, state)
        state = drop_branches(state)
        model, pyramid, schedule = system.model, system.tokenizer.pyramid, state.schedule
        cache, generators, span = state.cache.fork(), state.noise.generators(), schedule.span(state.k)
        inputs = torch.cat([pyramid.next_input(state.f_hat, k, schedule) for k in range(state.k, len(schedule))], dim=1)
        h = model.hidden(inputs.repeat(len(state.branches), 1, 1), state.prepared, span, cache)
        combine = lambda logits: state.guidance.combine(logits, state.branches, schedule, state.k)  # noqa: E731
        drawn = model.head.sample(h, combine, pick_at(state.pick, schedule, state.k), generators)
        f_hat, maps = state.f_hat, list(drawn.split(span.lengths, dim=1))
        for i, k in enumerate(range(state.k, len(schedule))):
            maps[i] = state.edit(maps[i], k) if state.edit else maps[i]
            f_hat = pyramid.add(f_hat, maps[i], k, schedule)
        noise = state.noise.after(generators)
        return replace(state, k=len(schedule), f_hat=f_hat, cache=cache, tokens=[*state.tokens, *maps], noise=noise)


def test_another_loop(tmp_path):
    """Distilled Decoding's jumps, Hi-MAR's phases: a recipe brings its steps; callbacks, seeds and state go on working."""
    system = through_all_verbs(lambda: probe_system(stepper=AllTheRestAtOnce()), tmp_path, TOLD)
    seen = []
    ns.sample(system, TOLD, on_scale=lambda k, images: seen.append((k, len(images))))
    assert seen == [(0, 3), (2, 3)]


@dataclass(frozen=True)
class Refined(ScaleByScale):
    """A network of its own goes over the finished image."""

    def finish(self, system, state):
        image = super().finish(system, state)
        return system.output.finish(image + system.parts["refiner"](image)) if self.done(system, state) else image


def test_a_hook_after_the_last_scale(tmp_path):
    """VARSR's refiner, colour transfer: the last step's image is finished by a part that is saved with the system."""

    def make():
        return probe_system(stepper=Refined(), parts={"refiner": Part(nn.Conv2d(3, 3, 3, padding=1), "trained")})

    system = through_all_verbs(make, tmp_path, TOLD, half=False)
    assert (tmp_path / "saved" / "refiner.safetensors").exists()
    plain = ns.decode(system, ns.sample_tokens(system, TOLD, seed=5))
    assert (ns.sample(system, TOLD, seed=5) - plain).abs().max() > 1e-3


# ---- model and cache ---------------------------------------------------------------------------------------------------


class ScanCache(KVCache):
    """Keys and values, and the sum of what the scales so far had to say."""

    total: torch.Tensor | float = 0.0

    def select(self, rows):
        other = super().select(rows)
        other.total = self.total[rows] if isinstance(self.total, torch.Tensor) else self.total
        return other


class ScanBlock(AdaLNBlock):
    """Attention inside a scale; a running sum carries what coarser scales say."""

    def __init__(self, settings, drop_path=0.0):
        super().__init__(settings, drop_path)
        self.scan = nn.Linear(settings.dim, settings.dim)

    def new_cache(self, rows, length, like):
        return ScanCache(rows, self.num_heads, length, self.head_dim, like)

    def forward(self, h, prepared, span, cache=None):
        h = super().forward(h, prepared, replace(span, sight=Sight(coarser=0)), cache)
        total, scales = (0.0 if cache is None else cache.total), []
        for scale in h.split(span.lengths, dim=1):
            scales.append(scale + total)
            total = total + self.scan(scale.mean(dim=1, keepdim=True)).tanh()
        if cache is not None:
            cache.total = total
        return torch.cat(scales, dim=1)


def test_a_block_with_a_state_of_its_own(tmp_path):
    """M-VAR: a scan across scales, attention that sees its own scale alone."""
    system = through_all_verbs(lambda: probe_system(model=probe_model(block=ScanBlock)), tmp_path, TOLD)
    cached_equals_masked(system, TOLD)
    assert isinstance(ns.start(system, TOLD).cache[0], ScanCache)


class FewKeys(KVCache):
    """Each head keeps the `most` longest of the keys of coarser scales."""

    most = 3

    def attend(self, q, k, v, span, scale):
        keys, values = self.append(k, v, span)
        own = k.shape[2]
        best = (
            keys[:, :, :-own].norm(dim=-1).topk(min(self.most, keys.shape[2] - own), dim=-1).indices
        )  # [rows, N, kept]
        rows = best.unsqueeze(-1).expand(-1, -1, -1, k.shape[-1])
        kept = [torch.cat([x[:, :, :-own].gather(2, rows), x[:, :, -own:]], dim=2) for x in (keys, values)]
        return F.scaled_dot_product_attention(q, *kept, scale=scale)


class FewKeysBlock(BlockWrapper):
    def new_cache(self, rows, length, like):
        return FewKeys(rows, self.block.num_heads, length, self.block.head_dim, like)


def with_few_keys(system, config=NoSettings()):
    blocks = [FewKeysBlock(block) for block in system.model.blocks]
    return system.changed("few-keys", config, model=system.model.with_blocks(blocks))


def last_logits(system) -> torch.Tensor:
    seen = []
    ns.sample_tokens(
        system, TOLD, seed=3, pick=lambda logits, generators: seen.append(logits) or ns.greedy(logits, generators)
    )
    return seen[-1]


def test_keys_are_dropped_head_by_head(tmp_path):
    """ScaleKV, HACK: attention goes through the cache object; a trained system gets another one from outside."""
    system = through_all_verbs(probe_system, tmp_path / "trained", TOLD)
    pruned = with_few_keys(system)
    again = ns.load(ns.save(pruned, tmp_path), recipes=recipe_of(probe_system))
    assert torch.equal(ns.sample(again, TOLD, seed=3), ns.sample(pruned, TOLD, seed=3))
    dense = ns.sample_tokens(system, TOLD, seed=3)
    assert (last_logits(pruned) - last_logits(system)).abs().max() > 1e-4
    FewKeys.most = SCHEDULE.length
    try:
        assert all(torch.equal(a, b) for a, b in zip(ns.sample_tokens(pruned, TOLD, seed=3), dense, strict=True))
    finally:
        FewKeys.most = 3


def test_tokens_are_left_out_with_learned_positions():
    """SparseVAR kinds: per-token tables go by index everywhere, the model's own positions included."""
    system = built(probe_system)
    model, span, prepared = system.model, SCHEDULE.span(2, 3), system.model.prepare(system.condition([0, 1]))
    inputs = torch.randn(2, 16, 4)
    index = torch.stack([torch.randperm(16)[:5], torch.randperm(16)[:5]])
    with torch.no_grad():
        begun = model.new_cache(prepared, SCHEDULE)
        model.hidden(torch.randn(2, 4, 4), prepared, SCHEDULE.span(0, 2), begun)
        whole = span.keeping(torch.arange(16).expand(2, -1))
        expected = model.hidden(inputs, prepared, span, begun.fork())
        assert torch.equal(model.hidden(inputs, prepared, whole, begun.fork()), expected)
        some = inputs.gather(1, index.unsqueeze(-1).expand(-1, -1, 4))
        assert model.hidden(some, prepared, span.keeping(index), begun.fork()).shape == (2, 5, SHAPE.dim)


# ---- what the model is told --------------------------------------------------------------------------------------------


class PrefixCondition(nn.Module):
    """A text's words stand before the image."""

    def __init__(self, channels, dim):
        super().__init__()
        self.words, self.vec = nn.Linear(channels, dim), nn.Parameter(torch.randn(dim))
        self.silence = nn.Parameter(torch.randn(dim))

    def forward(self, told):
        text = told["caption"]
        words = torch.where(text.null.view(-1, 1, 1), self.silence, self.words(text.features.to(self.vec)))
        return self._condition(words, text.mask)

    def null(self, condition):
        prefix = condition["prefix"]
        return self._condition(self.silence.expand_as(prefix), condition.masks["prefix"])

    def _condition(self, words, mask):
        vec = self.vec.expand(len(words), -1)
        return Condition(start=vec.unsqueeze(1), vec=vec, prefix=words, masks={"prefix": mask})


def test_a_prefix_before_the_image(tmp_path):
    """HART, VARSR, Hi-MAR, VARGPT: tokens before the image in sequence, cache, positions and mask."""
    words = ("a", "red apple", "the flag of Chad")

    def make():
        readers = {"caption": HashWords(8, 6)}
        return probe_system(model=probe_model(conditioner=PrefixCondition(8, SHAPE.dim)), readers=readers)

    told = {"caption": ["red apple", "a", None]}
    system = through_all_verbs(make, tmp_path, told, items(caption=lambda i: words[i % 3]))
    cached_equals_masked(system, told)


class MapCondition(nn.Module):
    """A label and a map, each a part with a null of its own."""

    def __init__(self, dim):
        super().__init__()
        self.label, self.patch = nn.Embedding(4, dim), nn.Linear(4, dim)
        self.unmapped = nn.Parameter(torch.randn(dim))

    def forward(self, told):
        rows = F.pixel_unshuffle(told["depth"].values.to(self.unmapped), 2).flatten(2).mT  # [B, 4, 4]
        depth = torch.where(told["depth"].null.view(-1, 1, 1), self.unmapped, self.patch(rows))
        return Condition(label=self.label(told["label"]), depth=depth)

    def null(self, condition):
        nothing = self.label.weight[3].expand_as(condition["label"])
        return Condition(label=nothing, depth=self.unmapped.expand_as(condition["depth"]))


def composed(condition: Condition) -> Condition:
    """The label opens and modulates; the map stands before the image and modulates, too."""
    vec = condition["label"] + condition["depth"].mean(dim=1)
    return Condition(start=condition["label"].unsqueeze(1), vec=vec, prefix=condition["depth"])


def test_several_things_are_told(tmp_path):
    """CAR, ControlVAR, VARSR, CARP: named tensors from the data to the model; each dropped alone; three branches."""

    def make():
        readers = {"label": ClassReader((), 3), "depth": TensorReader("depth", (1, 4, 4))}
        model = probe_model(conditioner=MapCondition(SHAPE.dim), compose=composed)
        return probe_system(model=model, readers=readers)

    maps = torch.rand(8, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    told = {"label": [0, None, 2], "depth": [maps[0], maps[1], None]}
    loss = ns.GeneratorLoss(drop_condition=0.2, drop_parts={"depth": 0.5})
    system = through_all_verbs(make, tmp_path, told, items(depth=lambda i: maps[i]), loss=loss)
    cached_equals_masked(system, told)
    three = ns.Guidance(lambda schedule, k: (3.0, -0.5, -1.5), drops=((), ("depth",), ("label", "depth")))
    state = ns.start(system, told, guidance=three)
    assert state.branches == (0, 1, 2) and len(state.prepared) == 9
    assert ns.sample(system, told, guidance=three).isfinite().all()
    without = ns.sample(system, told | {"depth": [None] * 3}, seed=2)
    assert not torch.equal(ns.sample(system, told, seed=2), without)


# ---- several networks --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair(State):
    """The state of both models."""

    other: State | None = None

    def select(self, rows):
        return replace(super().select(rows), other=self.other.select(rows))


@dataclass(frozen=True)
class Handover(ScaleByScale):
    """The model draws the first two scales, another one the last."""

    def start(self, system, told, options):
        begun = super().start(system, told, options)
        other = super().start(system.with_model(system.parts["refiner"]), told, options)
        return Pair(**vars(begun), other=other)

    def step(self, system, state):
        other = system.with_model(system.parts["refiner"])
        if state.k == 2:
            last = super().step(other, state.other)
            return replace(state, k=last.k, f_hat=last.f_hat, tokens=last.tokens, other=last)
        own = super().step(system, state)
        follows = replace(state.other, edit=lambda tokens, k: own.tokens[k])
        return replace(own, other=replace(super().step(other, follows), edit=None))


def test_two_models_in_one_decoding(tmp_path):
    """CoDe, teachers, LLMs, DINO: a system has named parts; trained and frozen ones are saved, external ones are not."""

    def make():
        parts = {"refiner": Part(probe_model(), "frozen"), "encoder": Part(nn.Linear(2, 2), "external")}
        return probe_system(stepper=Handover(), parts=parts)

    system = through_all_verbs(make, tmp_path, TOLD, half=False)
    assert sorted(p.name for p in (tmp_path / "saved").glob("*.safetensors")) == [
        "model.safetensors",
        "refiner.safetensors",
        "tokenizer.safetensors",
    ]
    again = ns.load(tmp_path / "saved", recipes=recipe_of(make))
    assert not any(parameter.requires_grad for parameter in again.parts.parameters())
    assert again.parts["encoder"].weight.device.type == "cpu" and again.model.embed_input.weight.requires_grad
    again.half_(torch.bfloat16)
    assert again.parts["encoder"].weight.dtype == torch.bfloat16
    first = ns.sample_tokens(system, TOLD, seed=1)
    assert torch.equal(first[1], ns.sample_tokens(replace_stepper(system), TOLD, seed=1)[1])


def replace_stepper(system):
    return system.changed("plain", NoSettings(), stepper=ScaleByScale())


class Sines(LearnedPositions):
    """Positions with a table that follows from the settings and is not saved."""

    def __init__(self, schedule, dim):
        super().__init__(schedule, dim)
        self.register_buffer("sines", torch.arange(schedule.length * dim).view(-1, dim).sin(), persistent=False)

    def forward(self, span):
        return super().forward(span) + span.gather(self.sines[span.tokens])


def test_buffers_that_are_not_saved(tmp_path):
    """Tables in buffers, as many codes have them, survive saving and loading."""
    make = lambda: probe_system(model=probe_model(positions=Sines(SCHEDULE, SHAPE.dim)))  # noqa: E731
    through_all_verbs(make, tmp_path, TOLD)
    again = ns.load(tmp_path / "saved", recipes=recipe_of(make))
    assert torch.equal(again.model.positions.sines, built(make).model.positions.sines)


# ---- objectives --------------------------------------------------------------------------------------------------------


class Own:
    """What the objectives below share."""

    wants = "tokens"

    def frozen(self, run):
        return {}

    def judge(self, run, data):
        return {"loss": 0.5}

    def score(self, metrics):
        return -metrics["loss"]

    def log_prob(self, run, model, tokens, told):
        """Log-likelihood of each image's tokens [B, L] under a model."""
        system = run.system
        inputs = []
        f_hat = system.tokenizer.pyramid.start(len(tokens), SCHEDULE)
        for k, token_map in enumerate(SCHEDULE.split(tokens)[:-1]):
            f_hat = system.tokenizer.pyramid.add(f_hat, token_map, k, SCHEDULE)
            inputs.append(system.tokenizer.pyramid.next_input(f_hat, k + 1, SCHEDULE))
        prepared = model.prepare(model.conditioner({"label": system.readers["label"](told["label"])}))
        return model.head.log_prob(model.hidden(torch.cat(inputs, dim=1), prepared, SCHEDULE.span()), tokens).sum(dim=1)


class Contrast(Own):
    """Right labels against those of others, relative to a frozen copy (CCA, DDO)."""

    def frozen(self, run):
        return {"reference": copy.deepcopy(run.system.model)}

    def loss(self, run, part, step):
        tokens, told = part.batch["content"], run.told(part)
        wrong = {"label": [*told["label"][1:], told["label"][0]]}
        ratios = []
        for labels in (told, wrong):
            with torch.no_grad():
                before = self.log_prob(run, run.frozen["reference"], tokens, labels)
            ratios.append(self.log_prob(run, run.model, tokens, labels) - before)
        loss = -(F.logsigmoid(ratios[0]) + F.logsigmoid(-ratios[1])).mean()
        return loss, {"loss": loss.detach(), "margin": (ratios[0] - ratios[1]).mean().detach()}


class Pairs(Own):
    """Of two images the first is wanted, the second is not; encoded inside (GFT, SAR, DPO kinds)."""

    wants = "items"

    def loss(self, run, part, step):
        told, values = run.told(part), []
        for name in ("image", "other"):
            tokens = torch.cat(ns.encode(run.system, part.batch[name]), dim=1)
            values.append(self.log_prob(run, run.model, tokens, told))
        loss = -F.logsigmoid(values[0] - values[1]).mean()
        return loss, {"loss": loss.detach()}


class Reward(Own):
    """Bright images, from samples of its own (GRPO): no data at all."""

    wants = "nothing"

    def loss(self, run, part, step):
        told = {"label": [i % 3 for i in range(len(part.draws))]}
        seeds = part.draws.randint(0, 2**31, 1).squeeze(1).tolist()
        tokens = ns.sample_tokens(run.system, told, guidance=ns.cfg(1.0), seed=seeds)
        reward = ns.decode(run.system, tokens).mean(dim=(1, 2, 3))
        likely = self.log_prob(run, run.model, torch.cat(tokens, dim=1), told)
        loss = -((reward - reward.mean()) * likely).mean()
        return loss, {"loss": loss.detach(), "reward": reward.mean()}


@pytest.mark.parametrize("objective", [Contrast(), Pairs(), Reward()], ids=lambda o: type(o).__name__)
def test_objectives_that_own_their_loss(objective, tmp_path):
    """CCA, DDO, GFT, SAR, GRPO, Distilled Decoding: a frozen copy, pairs, samples drawn inside, no images; exact resume."""
    assert isinstance(objective, contracts.Objective)
    data = items(other=lambda i: torch.full((3, 16, 16), (-1.0) ** i)) if objective.wants != "nothing" else None
    config = ns.TrainConfig(steps=4, batch_size=4, warmup=1, validate_every=2, log_every=1, save_every=2)

    def run(out, objective):
        system = built(probe_system)
        ns.train_model(system, data, config, out=out, val=data, objective=objective)
        return system

    whole = run(tmp_path / "whole", objective)
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert sum("val/loss" in line for line in lines) == 2
    before = built(probe_system)
    assert not torch.equal(whole.model.embed_input.weight, before.model.embed_input.weight)
    assert all(
        torch.equal(a, b) for a, b in zip(whole.tokenizer.parameters(), before.tokenizer.parameters(), strict=True)
    )
    again = ns.load(ns.save(whole, tmp_path / "saved"), recipes=recipe_of(probe_system))
    assert torch.equal(ns.sample(again, TOLD), ns.sample(whole, TOLD))

    loss = type(objective).loss

    class Stopped(type(objective)):
        """Dies in the last step but one."""

        def loss(self, run, part, step):
            if step == 3:
                raise KeyboardInterrupt
            return loss(self, run, part, step)

    Stopped.__name__, Stopped.__qualname__ = type(objective).__name__, type(objective).__qualname__
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", Stopped())
    resumed = run(tmp_path / "cut", objective)
    for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)


# ---- other content than pictures ---------------------------------------------------------------------------------------


class SequenceTokenizer(nn.Module):
    """Sequences [B, 2, n] and maps [B, C, 1, n]."""

    encode, f_hat = ImageTokenizer.encode, ImageTokenizer.f_hat
    stride, channels = 1, 2

    def __init__(self, schedule):
        super().__init__()
        self.pyramid = ResidualPyramid(CODES, len(schedule))
        self.encoder, self.decoder = nn.Conv1d(2, 4, 3, padding=1), nn.Conv1d(4, 2, 3, padding=1)

    def features(self, content):
        return self.encoder(content).unsqueeze(2)

    def decode(self, f_hat):
        return self.decoder(f_hat.squeeze(2))


@dataclass(frozen=True)
class Sequences:
    """Numbers without bounds."""

    field: str = "sequence"

    def shape(self, schedule, stride):
        return 2, schedule[-1][1]

    def fit(self, content, like):
        return content

    def finish(self, decoded):
        return decoded

    def pictures(self, content):
        return None

    def measure(self, content, reference):
        return {"accuracy": -(content - reference).square().mean(dim=(1, 2))}


def test_sequences_are_no_pictures(tmp_path):
    """CARP's actions: 1-D scales, neither clamped nor drawn."""
    schedule = Schedule(((1, 1), (1, 2), (1, 6)))

    def make():
        return probe_system(SequenceTokenizer(schedule), probe_model(schedule), schedule, output=Sequences())

    waves = torch.randn(8, 2, 6, generator=torch.Generator().manual_seed(0)) * 3
    data = [{"sequence": waves[i], "label": i % 3} for i in range(8)]
    system = through_all_verbs(make, tmp_path, TOLD, data, half=False)
    f_hat = system.tokenizer.encode(waves, schedule).f_hats[-1]
    torch.testing.assert_close(ns.decode(system, ns.encode(system, waves)), system.tokenizer.decode(f_hat))
    with pytest.raises(ValueError, match="sequences"):
        ns.encode(system, waves[:, :, :3])


class PlaneTokenizer(nn.Module):
    """Three planes [B, 3, 2, n, n] and maps [B, C, 3 n, n]."""

    encode, f_hat = ImageTokenizer.encode, ImageTokenizer.f_hat
    stride, channels = 1, 2

    def __init__(self, schedule):
        super().__init__()
        self.pyramid = ResidualPyramid(CODES, len(schedule))
        self.encoder, self.decoder = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 2, 1)

    def features(self, content):
        return self.encoder(content.transpose(1, 2).flatten(2, 3))

    def decode(self, f_hat):
        return self.decoder(f_hat).unflatten(2, (3, -1)).transpose(1, 2)


@dataclass(frozen=True)
class Planes(Sequences):
    field: str = "planes"

    def shape(self, schedule, stride):
        return 3, 2, schedule[-1][1], schedule[-1][1]

    def measure(self, content, reference):
        return {"accuracy": -(content - reference).square().mean(dim=(1, 2, 3, 4))}


def test_three_planes_of_tokens(tmp_path):
    """SAR3D's triplanes: a scale has 3 n^2 tokens."""
    schedule = Schedule(((3, 1), (6, 2), (12, 4)))
    assert schedule.lengths == (3, 12, 48)

    def make():
        return probe_system(PlaneTokenizer(schedule), probe_model(schedule), schedule, output=Planes())

    planes = torch.randn(8, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    data = [{"planes": planes[i], "label": i % 3} for i in range(8)]
    through_all_verbs(make, tmp_path, TOLD, data, half=False)
