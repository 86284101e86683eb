"""FlexVAR: numbers that the official code produced (`tests/data/flexvar`), and what the recipe promises beyond them."""

import json
import random
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from small import parts

import nextscale as ns
from nextscale.contracts import Kept
from nextscale.draws import Draws
from nextscale.encoded import Choices, EncodedImages
from nextscale.model.positions import ResizedPositions
from nextscale.published.flexvar_layout import FLEXVAR, MASK, USAGE, VQMODEL
from nextscale.published.keys import model_key
from nextscale.recipes.generators import flexvar
from nextscale.sampling import pick as picking
from nextscale.sampling.guidance import Guidance
from nextscale.schedule import Schedule
from nextscale.training.config import GeneratorLoss, TrainConfig
from nextscale.training.generator_task import GeneratorTask

GOLDEN = Path(__file__).parent / "data" / "flexvar"

# The reference itself moves by 1.7e-5 in features and 2e-5 in images with the convolution backend and thread count.
FEATURES = {"atol": 5e-5, "rtol": 0}
LOGITS = {"atol": 1e-4, "rtol": 0}
GUIDED = {"atol": 2e-4, "rtol": 0}
IMAGES = {"atol": 5e-4, "rtol": 0}
LOSS = {"atol": 1e-5, "rtol": 0}
NORMS = {"atol": 1e-7, "rtol": 1e-4}
EXACT = {"atol": 1e-6, "rtol": 0}

CASES = [
    (which, case)
    for which, model in json.loads((GOLDEN / "flexvar.json").read_text())["models"].items()
    for case in model["gen"]
]


@cache
def numbers(name: str = "flexvar") -> dict:
    return json.loads((GOLDEN / f"{name}.json").read_text())


@cache
def tensors(name: str) -> dict[str, torch.Tensor]:
    state = load_file(GOLDEN / f"flexvar_{name}.safetensors")
    return {key: t.float() if t.is_floating_point() else t for key, t in state.items()}


def part(name: str, prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): t for key, t in tensors(name).items() if key.startswith(prefix)}


def by_scale(io: dict[str, torch.Tensor], key: str) -> list[torch.Tensor]:
    return [io[f"{key}.{k}"] for k in range(sum(name.startswith(key + ".") for name in io))]


def arguments(which: str) -> tuple[dict, dict]:
    t, m = numbers()["tokenizer"], numbers()["models"][which]
    vae = {"codebook_size": t["V"], "codebook_embed_dim": 32, "z_channels": t["z"], "ch": t["ch"]}
    var = {"depth": m["depth"], "embed_dim": m["C"], "num_heads": m["heads"], "num_classes": m["classes"]}
    var |= {"patch_nums": m["patch_nums"], "attn_l2_norm": True}
    var |= {key: m[key] for key in ("shared_aln", "attn_l2_norm", "mlp_ratio") if key in m}
    return vae | {"encoder_ch_mult": t["mult"], "decoder_ch_mult": t["mult"]}, var


@cache
def system(which: str):
    return flexvar.from_official(part("weights", "vae."), part("weights", f"{which}."), *arguments(which))


@cache
def features() -> torch.Tensor:
    """Of the two images; what the official encoder makes of them is checked below."""
    with torch.no_grad():
        return system("A").tokenizer.features(images())


def images() -> torch.Tensor:
    return tensors("io")["image_u8"] / 127.5 - 1


def check_image(got: torch.Tensor, io: dict[str, torch.Tensor], name: str) -> None:
    """Large images are kept as every n-th pixel and a patch."""
    kept = {"": got, "_every4": got[..., ::4, ::4], "_every8": got[..., ::8, ::8], "_patch": got[..., 40:64, 24:48]}
    found = [ending for ending in kept if name + ending in io]
    assert found
    for ending in found:
        torch.testing.assert_close(kept[ending], io[name + ending], **IMAGES)


# ---- tokenizer --------------------------------------------------------------------------------------------------------


def test_features():
    io, tokenizer = tensors("io"), system("A").tokenizer
    with torch.no_grad():
        torch.testing.assert_close(tokenizer.encoder(images()), io["encoder_out"], **FEATURES)
    torch.testing.assert_close(features(), io["quant_conv_out"], **FEATURES)


@pytest.mark.parametrize("side", numbers()["tokenizer_sizes"])
def test_token_maps_and_what_they_decode_to(side):
    """11 is larger than the feature map: cells are repeated."""
    io, tokenizer, schedule = tensors("io"), system("A").tokenizer, Schedule.squares(side)
    encoded = tokenizer.pyramid.encode(features(), schedule)
    assert torch.equal(encoded.tokens[0], io[f"ids.{side}"])
    if f"quant.{side}" in io:
        torch.testing.assert_close(encoded.f_hats[0], io[f"quant.{side}"], **EXACT)
    if side != 11:
        with torch.no_grad():
            check_image(tokenizer.decode(tokenizer.f_hat(encoded.tokens, schedule)), io, f"recon.{side}")


def test_every_scale_of_an_image_at_one_size():
    """The official `img_to_reconstructed_multi_scale_img`."""
    io, tokenizer = tensors("io"), system("A").tokenizer
    encoded = tokenizer.pyramid.encode(features()[:1], Schedule.squares(2, 4))
    for k, f_hat in enumerate(encoded.f_hats):
        with torch.no_grad():
            image = F.interpolate(tokenizer.decode(f_hat), size=(64, 64), mode="bicubic")
        torch.testing.assert_close(image[..., ::4, ::4], io[f"multi_scale_img.{k}"], **IMAGES)


def test_loss_of_the_codebook():
    io, expected, pyramid = part("io", "vqloss."), numbers()["vqloss"], system("A").tokenizer.pyramid
    f = io["f"].clone().requires_grad_(True)
    size, keep = Schedule((tuple(f.shape[2:]),)), Kept(torch.ones(len(f), 1, dtype=torch.bool))
    alone, both = pyramid.learn(f, size, keep, beta=0), pyramid.learn(f, size, keep)
    sure = pyramid.learn(f, size, keep, entropy=0.1)
    terms = [alone.loss, both.loss - alone.loss, sure.loss - both.loss]
    names = ("vq_loss", "commit_loss", "entropy_loss_at_ratio_0.1")
    torch.testing.assert_close([term.item() for term in terms], [expected[name] for name in names], **LOSS)
    assert expected["entropy_loss"] == 0
    grad_f, grad_codes = torch.autograd.grad(both.loss, (f, pyramid.codebook.weight))
    torch.testing.assert_close(grad_f, io["grad_f"], atol=1e-7, rtol=1e-4)
    torch.testing.assert_close(grad_codes, io["grad_embedding"], atol=1e-7, rtol=1e-4)
    seen = set(both.tokens[0].flatten().tolist()) | {0}  # the official buffer begins as zeros, which count
    assert len(seen) / pyramid.codes == expected["codebook_usage"]


def test_learning_is_encoding_and_passes_gradients_straight():
    pyramid = system("A").tokenizer.pyramid
    f = features().clone().requires_grad_(True)
    keep = Kept(torch.ones(len(f), 1, dtype=torch.bool))
    lesson, encoded = pyramid.learn(f, Schedule.squares(8), keep), pyramid.encode(f, Schedule.squares(8))
    assert torch.equal(lesson.tokens[0], encoded.tokens[0])
    torch.testing.assert_close(lesson.f_hat, encoded.f_hats[0], **EXACT)
    (gradient,) = torch.autograd.grad((lesson.f_hat * encoded.f_hats[0]).sum(), f)
    (expected,) = torch.autograd.grad((F.normalize(f, dim=1) * encoded.f_hats[0]).sum(), f)
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=0)


def test_codes_without_unit_length_and_weights_over_codes():
    torch.manual_seed(0)
    pyramid = flexvar.PlainPyramid(flexvar.PlainSettings(codebook_size=9, code_dim=4, unit=False))
    f, schedule = torch.randn(2, 4, 3, 3), Schedule.squares(3)
    tokens = pyramid.encode(f, schedule).tokens[0]
    rows = f.flatten(2).mT
    assert torch.equal(tokens, torch.cdist(rows, pyramid.codebook.weight.expand(2, -1, -1)).argmin(-1))
    for unit in (False, True):
        pyramid = flexvar.PlainPyramid(flexvar.PlainSettings(codebook_size=9, code_dim=4, unit=unit))
        f_hat = pyramid.start(2, schedule)
        hard = pyramid.add(f_hat, tokens, 0, schedule)
        torch.testing.assert_close(pyramid.add(f_hat, ns.Soft(F.one_hot(tokens, 9).float()), 0, schedule), hard)


def test_corrupt_changes_the_next_input_alone():
    pyramid, schedule = system("A").tokenizer.pyramid, Schedule.squares(1, 2, 4)
    clean = pyramid.encode(features(), schedule)
    dirty = pyramid.encode(features(), schedule, corrupt=lambda tokens, k: (tokens + 1) % 64 if k == 0 else tokens)
    for k in range(3):
        assert torch.equal(clean.tokens[k], dirty.tokens[k])
    assert not torch.equal(clean.inputs[0], dirty.inputs[0])
    assert torch.equal(clean.inputs[1], dirty.inputs[1])


# ---- random schedules -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 1234])
def test_random_schedules(seed):
    rng, sampler = random.Random(seed), flexvar.RandomSchedules()
    assert [sampler.draw(rng) for _ in range(40)] == numbers()["random_schedules"][str(seed)]


def test_statistics_of_random_schedules():
    expected, sampler = numbers()["random_schedules"]["statistics"], flexvar.RandomSchedules()
    rng = random.Random(expected["seed"])
    drawn = [sampler.draw(rng) for _ in range(expected["draws"])]
    count = len(drawn)
    tokens = [sum(side**2 for side in sides) for sides in drawn]
    assert sum(tuple(sides) == sampler.whole for sides in drawn) / count == expected["fixed_schedule"]
    assert {str(n): c for n, c in Counter(map(len, drawn)).items()} == expected["count_by_length"]
    assert {str(n): c for n, c in Counter(sides[-1] for sides in drawn).items()} == expected["count_by_last_size"]
    share = {str(n): sum(n in sides for sides in drawn) / count for n in range(1, 17)}
    assert share == expected["share_containing_size"]
    assert (sum(tokens) / count, max(tokens), min(tokens)) == tuple(
        expected[f"{n}_tokens"] for n in ("mean", "max", "min")
    )
    assert sum(map(sum, drawn)) == expected["sum_of_all_entries"]


def test_small_random_schedules():
    sampler, rng = flexvar.emoji_64().schedules, random.Random(0)
    drawn = [sampler.draw(rng) for _ in range(300)]
    for sides in drawn:
        assert sides == sorted(set(sides)) and sides[:2] == [1, 2] and sides[-1] == 8
    assert {len(sides) for sides in drawn} == {4, 5, 6} and {side for sides in drawn for side in sides} == set(
        range(1, 9)
    )
    tight = flexvar.RandomSchedules(whole=(1, 2), whole_share=0, first=(1,), ranges=((2, 3, 2),), last=4, most_tokens=1)
    assert tight.draw(rng) == [1]


@pytest.mark.parametrize(
    "wrong", [{"ranges": ((3, 4, 3),)}, {"ranges": ((4, 3, 1),)}, {"first": (4,), "most_tokens": 15}]
)
def test_random_schedules_that_cannot_be(wrong):
    with pytest.raises(ValueError, match=r"cannot draw|no room"):
        flexvar.RandomSchedules(**wrong)


def test_objective_draws_from_the_generator_that_it_is_given():
    pyramid, sampler = system("A").tokenizer.pyramid, flexvar.RandomSchedules()

    def batch(seed: int):
        return sampler.batch(pyramid, features(), Schedule.squares(1), Draws(torch.Generator().manual_seed(seed), 2))

    assert len({batch(seed).schedule for seed in range(5)}) == 5
    one, again = batch(7), batch(7)
    assert one.schedule == again.schedule and torch.equal(one.targets, again.targets)
    encoded = pyramid.encode(features(), one.schedule)
    assert torch.equal(one.targets, torch.cat(encoded.tokens, 1)) and one.weights is None
    assert one.inputs is not None and torch.equal(one.inputs, torch.cat(encoded.inputs, 1))
    single = flexvar.RandomSchedules(whole=(3,), whole_share=1)
    assert single.batch(pyramid, features(), Schedule.squares(1), Draws(torch.Generator(), 2)).inputs is None


# ---- positions --------------------------------------------------------------------------------------------------------


def test_positions():
    io = part("io", "pos.")
    positions = ResizedPositions(12, 32)
    torch.testing.assert_close(positions.table[None], io["init_d12"], **EXACT)
    positions = ResizedPositions(6, 32)
    positions.load_state_dict({"start": torch.zeros(1, 6), "table": io["table"][0]})
    sides = sorted(int(name.removeprefix("resized.")) for name in io if name.startswith("resized."))
    assert max(sides) == 40  # larger than the table
    whole = Schedule.squares(*sides)
    for k, side in enumerate(sides):
        torch.testing.assert_close(positions(whole.span(k, k + 1))[None], io[f"resized.{side}"], **EXACT)
    assert torch.equal(positions(whole.span()), torch.cat([positions(span) for span in whole.steps()]))


# ---- the official models ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", flexvar.OFFICIAL)
def test_layout_of_the_published_models(name):
    published, models = flexvar.OFFICIAL[name], numbers("schema")["models"]
    tokenizer, generator = models["vq16_v8912"], models[name.replace("-", "_")]
    vae, var = published.constructor
    full = VQMODEL.defaults | vae
    assert {key: list(v) if isinstance(v, tuple) else v for key, v in full.items() if key != "ch"} == tokenizer[
        "constructor"
    ]
    assert full["ch"] == tokenizer["base_width"]
    assert (var["depth"], var["embed_dim"], var["num_heads"]) == tuple(
        generator[n] for n in ("depth", "width", "heads")
    )
    with torch.device("meta"):
        system = flexvar.build(published.config())
    states = flexvar.to_official(system)
    for module, state, expected in zip((system.tokenizer, system.model), states, (tokenizer, generator), strict=True):
        layout = {key: [list(t.shape), str(t.dtype).removeprefix("torch.")] for key, t in state.items()}
        assert layout == expected["state_dict"]
        assert sum(p.numel() for p in module.parameters()) == expected["n_params"]
        assert set(expected["buffers"]) == {k for k in layout if k in (USAGE, MASK) or "zero_k" in k}
    assert list(states[1]) == list(generator["state_dict"])
    assert system.model.blocks[-1].branches[0].drop_path.rate == pytest.approx(generator["drop_path_max"])
    assert FLEXVAR.defaults["cond_drop_rate"] == generator["cond_drop_rate"]
    assert FLEXVAR.defaults["token_dropout_p"] == generator["token_dropout_p_created_but_not_applied"]
    assert system.config.transformer.eps == generator["norm_eps"]
    assert system.schedule.length == generator["sequence_length_default"]
    as_meta = [{key: torch.empty(t.shape, device="meta") for key, t in state.items()} for state in states]
    again = flexvar.from_official(*as_meta, vae, var)
    assert again.config.autoencoder == system.config.autoencoder and again.config.pyramid == system.config.pyramid


def test_defaults_are_the_published_model():
    assert flexvar.OFFICIAL["flexvar-d16"].config() == flexvar.Config()
    assert flexvar.OFFICIAL["flexvar-d24"].files == ("FlexVAE.pth", "FlexVARd24-epo349.pth")


@pytest.mark.parametrize("which", "AB")
def test_there_and_back(which):
    states = flexvar.to_official(system(which))
    for state, prefix in zip(states, ("vae.", f"{which}."), strict=True):
        given = part("weights", prefix)
        assert set(state) - set(given) <= {USAGE, MASK}
        assert all(torch.equal(state[key], given[key]) for key in given)
    assert sum(p.numel() for p in system(which).model.parameters()) == numbers()["settings"][which]["n_params"]
    mask = states[1][MASK][0, 0]
    assert mask[0].isinf().sum() == len(mask) - 1 and not mask[-1].any()


def test_foreign_states_are_explained():
    vae, var, args = part("weights", "vae."), part("weights", "A."), arguments("A")
    del vae["encoder.mid.1.q.weight"]
    with pytest.raises(ValueError, match=r"missing     encoder.mid.1.q.weight \(64, 64, 1, 1\)"):
        flexvar.from_official(vae, var, *args)
    var |= {"extra": torch.zeros(2), "pos_1LC": torch.zeros(1, 64, 16, 16), MASK: torch.zeros(1)}
    with pytest.raises(ValueError) as error:
        flexvar.from_official(part("weights", "vae."), var, *args)
    for words in ("unexpected  extra (2,)", "wrong shape pos_1LC: expected (1, 64, 32, 32), got (1, 64, 16, 16)"):
        assert words in str(error.value)
    assert MASK not in str(error.value)
    with pytest.raises(ValueError, match=r"unknown arguments of the official VQModel: \['V'\]"):
        flexvar.from_official({}, {}, {"V": 64})
    with pytest.raises(ValueError, match="encoder_ch_mult and decoder_ch_mult must be the same"):
        flexvar.official_config({"decoder_ch_mult": (1, 2)}, {})
    with pytest.raises(ValueError, match="attn_drop_rate"):
        flexvar.official_config({}, {"attn_drop_rate": 0.1})
    with pytest.raises(ValueError, match=r"cannot express autoencoder.patch=4, .*position_side=8"):
        flexvar.to_official(flexvar.build(flexvar.tiny()))


def test_weights_are_copies():
    vae = part("weights", "vae.")
    loaded = flexvar.from_official(vae, part("weights", "A."), *arguments("A"))
    before = vae["quant_conv.bias"].clone()
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.add_(1)
    assert torch.equal(vae["quant_conv.bias"], before)


def test_initial_weights():
    observed = numbers("schema")["init_std_observed_width256_depth4"]
    vae, _ = flexvar.OFFICIAL["flexvar-d16"].constructor
    config = flexvar.official_config(vae, {"embed_dim": 256, "depth": 4, "num_heads": 4, "attn_l2_norm": True})
    parameters = {model_key(n): p.detach() for n, p in flexvar.build(config, seed=0).model.named_parameters()}
    for name, expected in observed.items():
        key, _, rows = name.partition("[")
        value = parameters[key]
        if rows:  # gates come first: 2 of 6 rows
            value = value[: len(value) // 3] if rows == ":2C]" else value[len(value) // 3 :]
        if key == "pos_1LC":  # no random numbers
            assert float(value.std()) == pytest.approx(expected, rel=1e-5)
        else:
            # A standard deviation of n draws scatters by 1 / sqrt(2 n); five of those on both sides.
            slack = 5 / (2 * value.numel()) ** 0.5 * 2
            assert float(value.std()) == pytest.approx(expected, rel=max(slack, 0.02)), name
    assert numbers("schema")["init_pos_table_untouched_by_init_weights"]
    assert torch.equal(parameters["pos_1LC"], ResizedPositions(256, 32).table)


# ---- the transformer --------------------------------------------------------------------------------------------------


def drawn(which: str) -> Schedule:
    return Schedule.squares(*numbers()["settings"][which]["teacher_forced_schedule"])


@pytest.mark.parametrize("which", "AB")
def test_teacher_forcing(which):
    io, s, schedule, outputs = part("io", f"{which}."), system(which), drawn(which), []
    assert list(schedule.sizes) == [(n, n) for n in numbers()["models"][which]["drawn"]]
    encoded = s.tokenizer.pyramid.encode(features(), schedule)
    assert torch.equal(torch.cat(encoded.tokens, 1), io["tf_targets"])
    torch.testing.assert_close(torch.cat(encoded.inputs, 1), io["tf_input"], **EXACT)
    handles = [block.register_forward_hook(lambda *args: outputs.append(args[2])) for block in s.model.blocks]
    logits = ns.logits(s, encoded.tokens, io["labels"], schedule=schedule)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(logits, io["tf_logits"], **LOGITS)
    for got, expected in zip(outputs, by_scale(io, "block_out"), strict=True):
        torch.testing.assert_close(got, expected, **LOGITS)
    null = ns.logits(s, encoded.tokens, [None, None], schedule=schedule)
    torch.testing.assert_close(null, io["tf_logits_null"], **LOGITS)


def test_a_long_schedule_of_the_official_sampler():
    io, s = part("io", "A.long."), system("A")
    sides = numbers()["settings"]["A"]["long_schedule"]
    assert sides == numbers()["models"]["A"]["drawn_long"]
    schedule = Schedule.squares(*sides)
    encoded = s.tokenizer.pyramid.encode(features()[:1], schedule)
    assert torch.equal(torch.cat(encoded.tokens, 1), io["tf_targets"])
    torch.testing.assert_close(torch.cat(encoded.inputs, 1)[:, :64], io["tf_input"], **EXACT)
    logits = ns.logits(s, encoded.tokens, tensors("io")["A.labels"][:1], schedule=schedule)
    torch.testing.assert_close(logits, io["tf_logits"], **LOGITS)


@pytest.mark.parametrize("which", "AB")
@pytest.mark.parametrize("smoothing", [0, 0.1])
def test_training_step(which, smoothing, monkeypatch):
    """One step of our training with the official list of sizes in place of a drawn one."""
    expected, io = numbers()["settings"][which], part("io", f"{which}.")
    s = system.__wrapped__(which)  # the step changes the weights
    labels = torch.tensor(numbers()["models"][which]["labels"])
    assert torch.equal(labels, io["labels"])
    sides = expected["teacher_forced_schedule"]
    monkeypatch.setattr(flexvar.RandomSchedules, "draw", lambda self, rng: sides)
    gradients = {}

    def record(parameters, limit):
        gradients.update({model_key(n): p.grad.clone() for n, p in s.model.named_parameters()})

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args, **_: record(*args) or torch.tensor(0.0))
    data = EncodedImages(features(), {"label": Choices(labels.view(-1, 1))})
    loss = GeneratorLoss(drop_condition=0, label_smoothing=smoothing)
    task = GeneratorTask(s, TrainConfig(ema=0), loss, data, None)
    task.module.train()
    metrics = task.step(parts(data.collate([data[0], data[1]])), 0)
    if smoothing:
        torch.testing.assert_close(float(metrics["loss"]), expected["train"]["loss_label_smooth_0.1"], **LOSS)
        return
    torch.testing.assert_close(float(metrics["loss"]), expected["train"]["loss"], **LOSS)
    norms = {name: float(gradient.norm()) for name, gradient in gradients.items()}
    torch.testing.assert_close(norms, expected["train"]["grad_norms"], **NORMS)
    for name, value in part("train", f"{which}.grad.").items():
        gradient = gradients["pos_1LC"][:8] if name == "pos_1LC_first8" else gradients[name]
        torch.testing.assert_close(gradient, value.view_as(gradient), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("which", "AB")
def test_logged_metrics(which):
    """The official log's tail is as long as the last scale of the *constructor's* sizes."""
    io, s, expected = part("io", f"{which}."), system(which), numbers()["settings"][which]["train"]["metrics"]
    targets = drawn(which).split(io["tf_targets"])
    logits = ns.logits(s, targets, io["labels"], schedule=drawn(which))
    losses = s.model.head.loss_of(logits, io["tf_targets"])
    right = (logits.argmax(-1) == io["tf_targets"]).float() * 100
    tail = s.schedule.lengths[-1]
    got = [losses.mean(), losses[:, -tail:].mean(), right.mean(), right[:, -tail:].mean()]
    torch.testing.assert_close([float(n) for n in got], [expected[n] for n in ("Lm", "Lt", "Accm", "Acct")], **LOSS)


# ---- generation -------------------------------------------------------------------------------------------------------


class Recorded(Guidance):
    """A guidance that keeps what it combines."""

    def __init__(self, guidance) -> None:
        super().__init__(guidance.weights, guidance.drops)
        object.__setattr__(self, "seen", [])  # it is frozen

    def combine(self, predictions, *args):
        self.seen.append(predictions.clone())
        return super().combine(predictions, *args)


@pytest.mark.parametrize("which, case", CASES)
def test_generation(which, case, monkeypatch):
    s, settings, io = system(which), numbers()["models"][which]["gen"][case], part("io", f"{which}.{case}.")
    schedule, max_side = Schedule.squares(*settings["sched"]), settings.get("max_pn", 16)
    generator = torch.Generator().manual_seed(settings.get("seed", 0))
    labels = tensors("io")[f"{which}.labels"]
    if settings.get("label") == "none":  # the official code draws them first; here the caller does
        classes = numbers()["models"][which]["classes"]
        labels = torch.multinomial(torch.full((1, classes), 1 / classes), 2, replacement=True, generator=generator)[0]
    llamagen = settings.get("llamagen")
    guidance = ns.cfg(settings["cfg"]) if llamagen else flexvar.official_ramp(1 + settings["cfg"], max_side)
    pick = flexvar.official_pick(
        settings.get("top_k", 1), settings.get("top_p", 0), max_side, tuple(settings.get("invalid", ()))
    )
    guided, filtered, top_k = [], [], []
    real = picking.filter_logits

    def filter_logits(logits, k, p):
        guided.append(logits)
        top_k.append(k)
        filtered.append(real(logits, k, p))
        return filtered[-1]

    monkeypatch.setattr(picking, "filter_logits", filter_logits)
    recorded = Recorded(guidance)
    with torch.inference_mode():
        state = ns.start(s, labels, guidance=recorded, pick=pick, generator=generator, schedule=schedule)
        while state.k < len(schedule):
            if state.k and f"next_input.{state.k - 1}" in io:
                inputs = s.tokenizer.pyramid.next_input(state.f_hat, state.k, schedule)
                torch.testing.assert_close(inputs, io[f"next_input.{state.k - 1}"], **EXACT)
            state = ns.step(s, state)
        image = s.tokenizer.decode(state.f_hat)
    for got, expected in zip(state.tokens, by_scale(io, "idx"), strict=True):
        assert torch.equal(got, expected)
    assert top_k == settings["effective_top_k"]
    check_image(image, io, "image")
    checked = {"logits_cfg": guided, "logits_filtered": filtered, "logits_raw2B": recorded.seen}
    checked["logits_cfg_max"] = [logits.amax(-1) for logits in guided]
    found = [name for name in checked if f"{name}.0" in io]
    assert found and ("logits_raw2B" in found) == settings.get("raw", False)
    for name in found:
        tolerance = LOGITS if name == "logits_raw2B" else GUIDED
        for got, expected in zip(checked[name], by_scale(io, name), strict=True):
            torch.testing.assert_close(got, expected, **tolerance)


def test_official_ramp():
    def weights(guidance, *sides):
        schedule = Schedule.squares(*sides)
        return [guidance.weights(schedule, k)[0] for k in range(len(schedule))]

    ten = Schedule.squares(*flexvar.SIZES[10])
    ours = [ns.cfg_ramp(3.5).weights(ten, k)[0] for k in range(10)]
    assert weights(flexvar.official_ramp(3.5), *flexvar.SIZES[10]) == pytest.approx(ours)
    assert weights(flexvar.official_ramp(3.5), *range(1, 13))[-3:] == pytest.approx(
        [3.5, 1 + 2.5 * 10 / 9, 1 + 2.5 * 11 / 9]
    )
    assert weights(flexvar.official_ramp(4.0), *flexvar.SIZES_512)[-2:] == [4.0, 4.0]
    assert weights(flexvar.official_ramp(3.5), 16) == [3.5]  # where the official code divides by zero


def test_official_pick_is_greedy_at_sizes_that_it_does_not_list():
    schedule = Schedule.squares(*range(1, 17))
    logits, pick = torch.randn(1, 500, 8, generator=torch.Generator().manual_seed(0)), flexvar.official_pick()
    greedy = []
    for k in range(16):
        ids = pick.at(schedule, k)(logits, torch.Generator().manual_seed(1))
        greedy.append(torch.equal(ids, logits.argmax(-1)))
    assert [k + 1 for k in range(16) if greedy[k]] == [7, 9, 11, 12, 14, 15]


# ---- what follows from the idea ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes", [((4, 4),), ((1, 1), (2, 3), (3, 5)), ((2, 2), (1, 1), (1, 1), (5, 4)), tuple((n, n) for n in range(1, 9))]
)
def test_any_schedule(sizes):
    """Of one step, of rectangles, of repeated and shrinking sizes, of more steps than at training."""
    s, schedule = flexvar.build(flexvar.tiny(), seed=1), Schedule(sizes)
    with torch.no_grad():
        s.tokenizer.pyramid.codebook.weight.normal_(generator=torch.Generator().manual_seed(2))
    seen = []
    image = ns.sample(s, [3, None], schedule=schedule, guidance=ns.cfg(2.0), on_scale=lambda k, x: seen.append(x))
    assert [x.shape for x in seen] == [(2, 3, 16 * h, 16 * w) for h, w in sizes]
    assert torch.equal(seen[-1], image) and image.isfinite().all()
    record = Recorded(ns.cfg(1.0))
    tokens = ns.sample_tokens(s, [3, None], schedule=schedule, guidance=record)
    torch.testing.assert_close(torch.cat(record.seen, 1), ns.logits(s, tokens, [3, None], schedule=schedule), **LOGITS)


def test_refinement():
    """Steps go on from an image's own coarse maps, and only the last of these matters to what they see."""
    s, schedule = system("A"), Schedule.squares(1, 2, 4, 8)
    encoded = s.tokenizer.pyramid.encode(features(), schedule)

    def edit(tokens, k):
        return encoded.tokens[k] if k <= 2 else tokens

    with torch.inference_mode():
        state = ns.start(s, [3, 7], schedule=schedule, edit=edit, pick=ns.greedy)
        while state.k < 3:
            state = ns.step(s, state)
        assert torch.equal(s.tokenizer.pyramid.next_input(state.f_hat, 3, schedule), encoded.inputs[2])
    refined = ns.sample_tokens(s, [3, 7], schedule=schedule, edit=edit, pick=ns.greedy)
    assert all(torch.equal(got, kept) for got, kept in zip(refined[:3], encoded.tokens[:3], strict=True))
    assert ns.decode(s, refined, schedule=schedule).shape == (2, 3, 128, 128)


def test_dropped_scales_teach_the_decoder_smaller_images():
    pyramid, schedule = system("A").tokenizer.pyramid, Schedule.squares(2, 4, 8)
    f = features().clone().requires_grad_(True)
    for last, side in enumerate((2, 4, 8)):
        keep = Kept(torch.arange(3) <= torch.full((len(f), 1), last))
        lesson, encoded = pyramid.learn(f, schedule, keep), pyramid.encode(f, schedule)
        assert lesson.f_hat.shape[2:] == (side, side)
        assert all(torch.equal(a, b) for a, b in zip(lesson.tokens, encoded.tokens, strict=True))
        torch.testing.assert_close(lesson.f_hat, encoded.f_hats[last], **EXACT)
        assert torch.autograd.grad(lesson.loss, f)[0].any()
