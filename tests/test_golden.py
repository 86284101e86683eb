"""Exact compatibility: numbers that the reference VAR code produced (`tests/data/golden`), through `from_official`."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import nextscale as ns
from nextscale.recipes.generators import var
from nextscale.sampling.pick import filter_logits
from nextscale.schedule import Schedule
from nextscale.tokenizer.pyramid import PyramidSettings, ResidualPyramid, teacher_inputs

GOLDEN = Path(__file__).parent / "data" / "golden"

# The reference itself moves by 6e-6 in reconstructions and 3e-6 in images with the convolution backend.
FEATURES = {"atol": 2e-5, "rtol": 0}
LOGITS = {"atol": 1e-4, "rtol": 0}
IMAGES = {"atol": 5e-5, "rtol": 0}


@cache
def numbers(name: str) -> dict:
    return json.loads((GOLDEN / f"{name}.json").read_text())


@cache
def tensors(name: str) -> dict[str, torch.Tensor]:
    state = load_file(GOLDEN / f"{name}.safetensors")
    return {k: t.float() if t.is_floating_point() and t.dtype != torch.float64 else t for k, t in state.items()}


def part(name: str, prefix: str) -> dict[str, torch.Tensor]:
    return {k.removeprefix(prefix): t for k, t in tensors(name).items() if k.startswith(prefix)}


def by_scale(name: str, key: str) -> list[torch.Tensor]:
    found = part(name, key + ".")
    return [found[str(i)] for i in range(len([k for k in found if k.isdigit()]))]


@cache
def system(which: str):
    weights, prefix = ("tiny_var", "var.") if which == "A" else ("tiny_var_saln", f"{which}.")
    config = numbers("tiny_var")
    return var.from_official(part("tiny_var", "vae."), part(weights, prefix), config["vae"], config[f"var_{which}"])


def io_file(which: str) -> str:
    return "tiny_var_io" if which == "A" else "tiny_var_saln_io"


def test_encoder_tokens_sums_and_reconstructions():
    io, s = tensors("tiny_var_io"), system("A")
    with torch.no_grad():
        torch.testing.assert_close(s.tokenizer.encoder(io["image"]), io["encoder_out"], **FEATURES)
        torch.testing.assert_close(s.tokenizer.features(io["image"]), io["quant_conv_out"], **FEATURES)
        encoded = s.tokenizer.encode(io["image"], s.schedule)
        for k in range(4):
            assert torch.equal(encoded.tokens[k], io[f"idx.{k}"])
            torch.testing.assert_close(encoded.f_hats[k], io[f"f_hat.{k}"], **FEATURES)
            image = ns.decode(s, encoded.tokens[: k + 1])
            torch.testing.assert_close(image, io[f"recon.{k}"], **IMAGES)
        torch.testing.assert_close(torch.cat(encoded.inputs, 1), io["var_input"], **FEATURES)
        torch.testing.assert_close(
            teacher_inputs(s.tokenizer.pyramid, encoded.tokens, s.schedule), io["var_input"], **FEATURES
        )
        torch.testing.assert_close(s.tokenizer.decode(encoded.f_hats[-1]), io["decoder_raw_last"], **IMAGES)


def test_rectangular_schedule():
    io, s = tensors("tiny_var_io"), system("A")
    schedule = Schedule(numbers("tiny_var")["rect_schedule"])
    encoded = s.tokenizer.pyramid.encode(io["rect.f"], schedule)
    for k in range(len(schedule)):
        assert torch.equal(encoded.tokens[k], io[f"rect.idx.{k}"])
        torch.testing.assert_close(encoded.f_hats[k], io[f"rect.f_hat.{k}"], **FEATURES)


def quantizer(case: str) -> tuple[ResidualPyramid, Schedule, list[str]]:
    """The pyramid of a quantizer-only case, its schedule, and the reference's names of its convolutions."""
    q, weights = numbers("tiny_var")["quantizers"][case], part("tiny_quant", f"weights.{case}.")
    schedule = Schedule.squares(*q["v_patch_nums"])
    settings = PyramidSettings(
        codebook_size=q["vocab_size"],
        code_dim=q["Cvae"],
        cosine=q["using_znorm"],
        phi=q["share_quant_resi"] or "each",
        phi_ratio=q["quant_resi"],
    )
    pyramid = ResidualPyramid(settings, len(schedule))
    names = sorted({key.rsplit(".", 1)[0] for key in weights if key.startswith("quant_resi")})
    state = {"codebook.weight": weights["embedding.weight"]}
    for i, name in enumerate(names):
        state |= {f"phi.{i}.{leaf}": weights[f"{name}.{leaf}"] for leaf in ("weight", "bias")}
    pyramid.load_state_dict(state)
    return pyramid, schedule, names


@pytest.mark.parametrize("case", sorted(numbers("tiny_var")["quantizers"]))
def test_quantizer_variants(case):
    q, io = numbers("tiny_var")["quantizers"][case], part("tiny_quant", f"io.{case}.")
    pyramid, schedule, _ = quantizer(case)
    if pyramid.phi:
        assert [pyramid.phi_index(k, schedule) for k in range(len(schedule))] == q["phi_index_per_scale"]
    encoded = pyramid.encode(io["f"], schedule)
    for k in range(len(schedule)):
        assert torch.equal(encoded.tokens[k], io[f"idx.{k}"])
        if f"f_hat.{k}" in io:
            torch.testing.assert_close(encoded.f_hats[k], io[f"f_hat.{k}"], **FEATURES)
    torch.testing.assert_close(torch.cat(encoded.inputs, 1), io["var_input"], **FEATURES)


def test_phi_table():
    table = numbers("phi_index")
    for count, entry in table["partially_shared"].items():
        pyramid = ResidualPyramid(PyramidSettings(codebook_size=4, code_dim=2, phi=int(count)), 1)
        for scales, expected in entry["by_num_scales"].items():
            schedule = Schedule.squares(*range(1, int(scales) + 1))
            assert [pyramid.phi_index(k, schedule) for k in range(len(schedule))] == expected, (count, scales)


@pytest.mark.parametrize("which", "ABC")
def test_teacher_forced_logits(which):
    io, s = part(io_file(which), f"{which}."), system(which)
    tokens = by_scale("tiny_var_io", "idx")
    torch.testing.assert_close(ns.logits(s, tokens, io["labels"]), io["tf_logits"], **LOGITS)
    torch.testing.assert_close(ns.logits(s, tokens, [None, None]), io["tf_logits_null"], **LOGITS)


@pytest.mark.parametrize("which, cfg", [("A", 0), ("A", 1.5), ("A", 4), ("B", 1.5), ("B", 4), ("C", 3)])
def test_guided_greedy_decoding(which, cfg):
    name = f"{which}.greedy_cfg{cfg}"
    io, s = part(io_file(which), f"{name}."), system(which)
    labels, seen = tensors(io_file(which))[f"{which}.labels"], []

    def pick(logits, generators):
        seen.append(logits)
        return ns.greedy(logits, generators)

    tokens = ns.sample_tokens(s, labels, guidance=ns.cfg_ramp(1 + cfg), pick=pick)
    for k in range(4):
        assert torch.equal(tokens[k], io[f"idx.{k}"])
        torch.testing.assert_close(seen[k], io[f"logits_cfg.{k}"], **LOGITS)
    image = ns.sample(s, labels, guidance=ns.cfg_ramp(1 + cfg), pick=ns.greedy)
    torch.testing.assert_close((image + 1) / 2, io["image"], **IMAGES)


@pytest.mark.parametrize("seed, k, p, cfg", [(0, 5, 0.9, 1.5), (1, 0, 0.8, 4), (2, 0, 0, 1.5)])
def test_seeded_draws_of_one_generator(seed, k, p, cfg):
    io, s = part("tiny_var_io", f"A.sample_seed{seed}."), system("A")
    labels = tensors("tiny_var_io")["A.labels"]
    generator = torch.Generator().manual_seed(seed)
    options = {"guidance": ns.cfg_ramp(1 + cfg), "pick": ns.top_k_top_p(k, p)}
    tokens = ns.sample_tokens(s, labels, generator=generator, **options)
    for scale in range(4):
        assert torch.equal(tokens[scale], io[f"idx.{scale}"])
    image = ns.sample(s, labels, generator=torch.Generator().manual_seed(seed), **options)
    torch.testing.assert_close((image + 1) / 2, io["image"], **IMAGES)


def test_gumbel_smoothing():
    io, s = part("tiny_var_io", "A.smooth."), system("A")
    labels = tensors("tiny_var_io")["A.labels"]
    generator = torch.Generator().manual_seed(11)
    options = {"guidance": ns.cfg_ramp(2.5), "pick": ns.gumbel_soft(20, 0.9)}
    tokens = ns.sample_tokens(s, labels, generator=generator, **options)
    for k in range(4):
        torch.testing.assert_close(tokens[k].weights, io[f"soft_probs.{k}"].view_as(tokens[k].weights), **LOGITS)
    image = ns.sample(s, labels, generator=torch.Generator().manual_seed(11), **options)
    torch.testing.assert_close((image + 1) / 2, io["image"], **IMAGES)


def test_filters():
    io = tensors("sampling")
    for key, expected in io.items():
        if not key.endswith(".filtered"):
            continue
        name, setting = key.removesuffix(".filtered").split(".", 1)
        k, p = setting.removeprefix("k").split("_p")
        got = filter_logits(io[f"{name}.logits"], int(k), float(p))
        torch.testing.assert_close(got, expected, atol=0, rtol=0, msg=key)


def test_foreign_states_are_explained():
    config = numbers("tiny_var")
    vae, state = part("tiny_var", "vae."), part("tiny_var", "var.")
    broken = {k: v for k, v in state.items() if k != "head.bias"} | {"extra": torch.zeros(2)}
    broken["word_embed.weight"] = torch.zeros(64, 9)
    with pytest.raises(ValueError) as error:
        var.from_official(vae, broken, config["vae"], config["var_A"])
    for words in ("missing     head.bias", "unexpected  extra", "wrong shape word_embed.weight"):
        assert words in str(error.value)
    with pytest.raises(ValueError, match=r"unknown arguments.*depht"):
        var.from_official(vae, state, config["vae"], config["var_A"] | {"depht": 3})


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_first_scales_alone(stage):
    """Progressive stages: only the first scales are given and predicted."""
    tokens = by_scale("tiny_var_io", "idx")[: stage + 1]
    logits = ns.logits(system("A"), tokens, tensors("tiny_var_io")["A.labels"])
    torch.testing.assert_close(logits, tensors("tiny_var_io")[f"A.prog{stage}.logits"], **LOGITS)


def test_null_label():
    """The reference's label -1 is our None."""
    tokens = ns.sample_tokens(system("A"), [None, None], guidance=ns.cfg_ramp(2.5), pick=ns.greedy)
    for got, expected in zip(tokens, by_scale("tiny_var_io", "A.label_minus1.idx"), strict=True):
        assert torch.equal(got, expected)


def test_labels_drawn_by_the_caller():
    """Without labels the reference draws them first, from the same generator; here the caller does."""
    generator = torch.Generator().manual_seed(5)
    labels = torch.multinomial(torch.full((10,), 0.1), 4, replacement=True, generator=generator)
    assert torch.equal(labels, tensors("tiny_var_io")["A.label_none_seed5.labels"])
    options = {"guidance": ns.cfg_ramp(2.5), "pick": ns.top_k_top_p(1), "generator": generator}
    tokens = ns.sample_tokens(system("A"), labels, **options)
    for got, expected in zip(tokens, by_scale("tiny_var_io", "A.label_none_seed5.idx"), strict=True):
        assert torch.equal(got, expected)


def test_hidden_states_after_each_block():
    s, io = system("A"), tensors("tiny_var_io")
    outputs = []
    handles = [block.register_forward_hook(lambda *args: outputs.append(args[2])) for block in s.model.blocks]
    ns.logits(s, by_scale("tiny_var_io", "idx"), io["A.labels"])
    for handle in handles:
        handle.remove()
    for i, output in enumerate(outputs):
        torch.testing.assert_close(output, io[f"A.block_out.{i}"], **LOGITS)
