"""Training on a handful of images: it learns, it resumes to the bit, it keeps codes alive, it refuses what cannot work."""

import json
import os
import signal

import pytest
import torch
from small import small
from torch.utils.data import Dataset

import nextscale as ns
from nextscale import encoded
from nextscale.checkpoint import save_weights
from nextscale.contracts import Kept
from nextscale.data.transforms import AugmentSettings
from nextscale.draws import Draws, generator_for
from nextscale.encoded import encode_images
from nextscale.model.transformer_settings import TransformerSettings
from nextscale.processes import Team
from nextscale.recipes.generators import var
from nextscale.training import checkpoints
from nextscale.training import fit as loop
from nextscale.training.average import Average
from nextscale.training.checkpoints import Checkpoints
from nextscale.training.config import GeneratorLoss, TokenizerLoss, TrainConfig
from nextscale.training.fit import Order, decay_groups
from nextscale.training.generator_task import GeneratorTask
from nextscale.training.rates import learning_rate
from nextscale.training.resume import refuse_others
from nextscale.training.tokenizer_task import TokenizerTask


class Squares(Dataset):
    """Coloured squares on white, 32x32; the class is the colour."""

    def __init__(self, count: int = 24, size: int = 32, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.items = []
        for i in range(count):
            image = torch.ones(3, size, size)
            y, x = torch.randint(0, size // 2, (2,), generator=generator).tolist()
            colour = torch.tensor([[1.0, -1, -1], [-1, 1, -1], [-1, -1, 1]])[i % 3]
            image[:, y : y + size // 2, x : x + size // 2] = colour[:, None, None]
            self.items.append({"image": image, "label": i % 3, "labels": (i % 3,)})

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> dict:
        return self.items[i]


DATA, VAL = Squares(), Squares(8, seed=1)
CONFIG = TrainConfig(steps=12, batch_size=4, warmup=2, log_every=1, validate_every=6, save_every=5, ema=0.9)
LOSS = TokenizerLoss(
    adversarial=0.1, adversarial_start=0.5, discriminator_width=4, quantize_start=0.25, restart_every=3, restart_until=1
)


def first_images():
    return torch.stack([item["image"] for item in DATA.items])


def tiny(**changes):
    return var.build(small(num_classes=3, **changes), seed=3)


def metrics(out, name):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def weights(system):
    return torch.cat([p.flatten() for p in system.parameters()])


def test_tokenizer_learns_and_leaves_everything_to_look_at(tmp_path):
    config = CONFIG.model_copy(update={"steps": 40, "lr": 3e-3})
    system = ns.train_tokenizer(tiny(), DATA, config, out=tmp_path, val=VAL, loss=LOSS)
    l2 = metrics(tmp_path, "train/l2")
    assert l2[40] < 0.6 * l2[1]
    psnr = metrics(tmp_path, "val/psnr")
    assert psnr[40] > psnr[6] + 2  # dB
    for k in range(4):
        assert 1 <= metrics(tmp_path, f"train/perplexity/{k}")[40] <= 32
    assert sorted(p.name for p in (tmp_path / "pictures").iterdir())[-1] == "reconstruction-000040.png"
    assert list((tmp_path / "tensorboard").iterdir())
    again = ns.load(tmp_path / "system")
    x = torch.stack([VAL[i]["image"] for i in range(4)])
    assert torch.equal(ns.decode(again, ns.encode(again, x)), ns.decode(system, ns.encode(system, x)))


@pytest.mark.parametrize("name", ["flexvar", "infinity"])
def test_tokenizers_of_other_pyramids_learn_with_the_same_verb(tmp_path, name):
    recipe = ns.find_recipe(name)
    system = recipe.build(recipe.tiny(), seed=1, model=False)
    data = Squares(24, size=64)
    loss = recipe.TOKENIZER_LOSS.model_copy(update={"quantize_start": 0.1, "perceptual": 0.0, "adversarial": 0.0})
    config = CONFIG.model_copy(update={"steps": 40, "lr": 3e-3, "validate_every": 20})
    trained = ns.train_tokenizer(system, data, config, out=tmp_path, val=data, loss=loss)
    l2, psnr = metrics(tmp_path, "train/l2"), metrics(tmp_path, "val/psnr")
    assert min(l2[step] for step in range(36, 41)) < 0.6 * l2[1]
    assert psnr[40] > psnr[20]
    x = torch.stack([data[i]["image"] for i in range(4)])
    again = ns.load(tmp_path / "system")
    assert torch.equal(ns.decode(again, ns.encode(again, x)), ns.decode(trained, ns.encode(trained, x)))


def test_limited_scales_use_their_first_codes_and_start_with_all_of_them():
    limits = (2, 8, 32, 32)
    system = tiny(pyramid=var.PyramidSettings(codebook_size=32, code_dim=8, limits=limits, standardize=True))
    task = TokenizerTask(system.tokenizer, system.schedule, CONFIG, TokenizerLoss(), None, first_images)
    shares = task.upkeep.shares(system.schedule)
    assert sum(shares) == 32 and shares[:2] == [2, 6]
    task.first_codes(first_images(), generator_for(0, 0))
    assert (system.tokenizer.pyramid.codebook.weight.abs().sum(dim=1) > 1e-2).all()
    tokens = ns.encode(system, first_images())
    for token_map, limit in zip(tokens, limits, strict=True):
        assert token_map.max() < limit
    assert tokens[1].max() > 2  # the second scale uses more than the first one may
    # A dead code goes to a scale that may use it.
    task.module.get_buffer("usage")[:, :-1] = 1 / 31
    lesson = system.tokenizer.pyramid.learn(
        system.tokenizer.features(first_images()), system.schedule, Kept(torch.ones(24, 4, dtype=torch.bool))
    )
    with torch.no_grad():
        system.tokenizer.pyramid.codebook.weight[-1] = 99.0
    assert task.restart(lesson.residuals, generator_for(0, 0)) == 1
    moved = system.tokenizer.pyramid.codebook.weight[-1]
    rows = [system.tokenizer.pyramid.standardized(rest, k).flatten(0, 1) for k, rest in enumerate(lesson.residuals)]
    assert (torch.cat(rows[2:]) == moved).all(dim=1).any()


def test_scale_dropout_by_prefix_and_one_by_one():
    system = tiny()
    for drop in ("prefix", "independent", "single"):
        loss = TokenizerLoss(drop=drop, drop_scales=0.5, drop_from=2)
        task = TokenizerTask(system.tokenizer, system.schedule, CONFIG, loss, None, first_images)
        keep = task.kept_scales(Draws(generator_for(0, 0), 4000)).whole
        assert keep[:, :2].all()
        share = keep.float().mean(dim=0).tolist()
        # prefix: n is 2, 3 or 4 alike; independent: even odds, and the last stays; single: one of the last two
        wanted = {"prefix": [1 - 0.5 / 3, 1 - 1 / 3], "independent": [0.75, 1], "single": [0.75, 0.75]}[drop]
        assert share[2:] == pytest.approx(wanted, abs=0.03)
        assert drop != "single" or keep.sum(dim=1).min() == 3
        assert drop != "prefix" or (keep.int().diff(dim=1) <= 0).all()


def test_half_precisions_are_close_to_float32_and_leave_weights_in_float32(tmp_path):
    losses = {}
    for precision in ("float32", "bfloat16", "float16"):
        config = CONFIG.model_copy(update={"precision": precision})
        system = ns.train_tokenizer(tiny(), DATA, config, out=tmp_path / f"a-{precision}", loss=LOSS)
        system = ns.train_model(system, DATA, config, out=tmp_path / f"b-{precision}")
        assert {p.dtype for p in system.parameters()} == {torch.float32}
        losses[precision] = (
            metrics(tmp_path / f"a-{precision}", "train/l2")[1],
            metrics(tmp_path / f"b-{precision}", "train/loss")[1],
        )
    # 8 bits of mantissa: the first losses agree to a percent, but not to the bit
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=1e-2)
    assert losses["bfloat16"] != losses["float32"]
    # 11 bits: a thousandth where sums are float32, a hundredth on CPUs that add up in float16 (AVX512-FP16)
    assert losses["float16"] == pytest.approx(losses["float32"], rel=2e-2)
    assert losses["float16"] != losses["float32"]


def test_gradients_of_float16_are_scaled_and_a_step_that_overflows_is_skipped():
    config = CONFIG.model_copy(update={"precision": "float16", "clip": 1e9})
    linear = torch.nn.Linear(1, 1, bias=False)
    optimizer, scaler = loop.adamw(linear, config), loop.scaler(config)

    def step(factor):
        def forward(part, step):
            loss = linear.weight.sum() * factor
            return loss, {"loss": loss.detach()}

        before = linear.weight.detach().clone()
        found = loop.descend(linear, optimizer, scaler, forward, [None], 0, config.clip, Team())
        return float(found["grad_norm"]), not torch.equal(linear.weight, before)

    norm, moved = step(3.0)
    assert norm == 3.0 and moved  # unscaled before it is looked at
    scale = scaler.get_scale()
    assert scale > 1
    norm, moved = step(1e35)  # times the scale it is more than a float can hold
    assert norm == float("inf") and not moved
    assert scaler.get_scale() == scale / 2


@pytest.mark.slow
def test_compiled_training_is_close_to_the_plain_one(tmp_path):
    found = {}
    for compiled in (False, True):
        config = CONFIG.model_copy(update={"compile": compiled, "steps": 4})
        system = ns.train_tokenizer(tiny(), DATA, config, out=tmp_path / f"a-{compiled}", loss=LOSS)
        system = ns.train_model(system, DATA, config, out=tmp_path / f"b-{compiled}")
        found[compiled] = weights(system)
        ns.load(tmp_path / f"b-{compiled}" / "system")
    # other kernels round otherwise; Adam turns a rounding error of a tiny gradient into a part of a step of lr
    torch.testing.assert_close(found[True], found[False], atol=1e-3, rtol=0)
    assert (found[True] - found[False]).abs().mean() < 1e-5


def test_standardized_residuals_follow_the_data():
    system = tiny(pyramid=var.PyramidSettings(codebook_size=32, code_dim=8, standardize=True))
    task = TokenizerTask(system.tokenizer, system.schedule, CONFIG, TokenizerLoss(), None, first_images)
    task.first_codes(first_images(), generator_for(0, 0))
    pyramid = system.tokenizer.pyramid
    with torch.no_grad():
        f = system.tokenizer.features(first_images())
        residuals = [residual for _, _, residual in pyramid.walk(f, system.schedule)]
        first = pyramid.standardized(residuals[0], 0).flatten(0, 1)  # set from these very images
        torch.testing.assert_close(first.mean(0), torch.zeros(8), atol=1e-4, rtol=0)
        torch.testing.assert_close(first.std(0), torch.ones(8), atol=1e-4, rtol=0)
        moved = [2 * residual + 3 for residual in residuals]
        for _ in range(1500):
            task.upkeep.follow(moved, task.team.average)
        for k, residual in enumerate(moved):
            rows = pyramid.standardized(residual, k).flatten(0, 1)
            torch.testing.assert_close(rows.mean(0), torch.zeros(8), atol=1e-2, rtol=0)
            torch.testing.assert_close(rows.std(0, correction=0), torch.ones(8), atol=1e-2, rtol=0)


# Step 5 is before the first validation and step 10 after it: validating must not change how training goes on.
@pytest.mark.parametrize("stop", [5, 10])
@pytest.mark.parametrize("kind", ["tokenizer", "generator", "generator in float16"])
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path, kind, stop, monkeypatch):
    def train(out, system):
        if kind == "tokenizer":
            return ns.train_tokenizer(system, DATA, CONFIG, out=out, val=VAL, loss=LOSS)
        transformer = var.TransformerSettings(depth=2, dim=32, num_heads=2, dropout=0.1, drop_path=0.1)
        system = tiny(transformer=transformer)
        config = CONFIG.model_copy(update={"precision": "float16" if "float16" in kind else "float32"})
        return ns.train_model(system, DATA, config, out=out, val=VAL)

    whole = train(tmp_path / "whole", tiny())

    def die(config, step):
        if step == stop:
            raise KeyboardInterrupt
        return learning_rate(config, step)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "learning_rate", die)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "stopped", tiny())
    assert not (tmp_path / "stopped" / "system").exists()
    resumed = train(tmp_path / "stopped", tiny())
    assert torch.equal(weights(resumed), weights(whole))
    loss = f"train/{'l2' if kind == 'tokenizer' else 'loss'}"
    assert metrics(tmp_path / "stopped", loss) == metrics(tmp_path / "whole", loss)
    steps = [json.loads(line)["step"] for line in (tmp_path / "stopped" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)  # nothing is logged twice


def test_generator_learns_its_tokens(tmp_path):
    config = CONFIG.model_copy(update={"steps": 60, "batch_size": 8, "lr": 3e-3})
    system = tiny(transformer=var.TransformerSettings(depth=2, dim=32, num_heads=2, init_gate=1.0))
    ns.train_model(system, DATA, config, out=tmp_path, val=VAL, loss=GeneratorLoss(drop_condition=0.2))
    loss = metrics(tmp_path, "train/loss")
    assert abs(loss[1] - torch.tensor(32.0).log().item()) < 0.1  # near ln V: the head starts small
    assert loss[60] < 0.6 * loss[1]
    for k in range(4):
        assert 0 <= metrics(tmp_path, f"val/accuracy/{k}")[60] <= 1
    assert ns.load(tmp_path / "system").model is not None


def test_a_setting_that_had_another_name_is_the_same_setting(tmp_path):
    settings = TransformerSettings(depth=1, dim=8, num_heads=1, qk_norm=False)
    old = {name.replace("qk_norm", "unit_norm"): value for name, value in settings.model_dump().items()}
    assert "unit_norm" in old and TransformerSettings.model_validate(old) == settings
    before, now = ({"system": {"transformer": part}} for part in (old, settings.model_dump()))
    refuse_others(before, now, tmp_path)
    other = settings.model_copy(update={"qk_norm": True}).model_dump()
    with pytest.raises(ValueError, match=r"system\.transformer\.qk_norm was False, now True"):
        refuse_others(before, {"system": {"transformer": other}}, tmp_path)


def test_other_settings_in_the_same_folder_are_refused(tmp_path):
    ns.train_tokenizer(tiny(), DATA, CONFIG, out=tmp_path)
    with pytest.raises(ValueError, match=r"lr was 0\.001, now 0\.1"):
        ns.train_tokenizer(tiny(), DATA, CONFIG.model_copy(update={"lr": 0.1}), out=tmp_path)
    with pytest.raises(ValueError, match=r"loss\.l1 was 0\.2, now 1\.0; use the same"):
        ns.train_tokenizer(tiny(), DATA, CONFIG, out=tmp_path, loss=TokenizerLoss(l1=1))
    with pytest.raises(ValueError, match=r"augmentation\.mirror was None, now "):
        ns.train_tokenizer(tiny(), DATA, CONFIG, out=tmp_path, augmentation=AugmentSettings())
    with pytest.raises(ValueError, match="images was 24, now 8"):
        ns.train_tokenizer(tiny(), Squares(8), CONFIG, out=tmp_path)
    with pytest.raises(ValueError, match=r"system\.pyramid\.cosine was False, now True"):
        cosine = var.PyramidSettings(codebook_size=32, code_dim=8, cosine=True)
        ns.train_tokenizer(tiny(pyramid=cosine), DATA, CONFIG, out=tmp_path)
    later = CONFIG.model_copy(update={"log_every": 7, "keep": 5})  # what may change
    ns.train_tokenizer(tiny(), DATA, later, out=tmp_path, loss=TokenizerLoss(alarm=0))


def test_checkpoints_of_other_code_are_refused_by_name(tmp_path):
    ns.train_tokenizer(tiny(), DATA, CONFIG, out=tmp_path)
    other = tiny()
    other.tokenizer.encoder.extra = torch.nn.Linear(2, 3)
    with pytest.raises(
        ValueError, match=r"(?s)missing +tokenizer.encoder.extra.weight \(3, 2\).*by other code.*another --out"
    ):
        ns.train_tokenizer(other, DATA, CONFIG, out=tmp_path)


def test_a_diverging_run_stops_with_advice(tmp_path):
    data = Squares(4)
    data.items[0]["image"][0, 0, 0] = float("nan")
    config = CONFIG.model_copy(update={"most_skipped": 2})
    loss = TokenizerLoss(init_codes=False)  # which would look at the images first
    with pytest.raises(FloatingPointError, match=r"at step 2.*3 steps in a row.*encoder\.conv_in \(Conv2d\)"):
        ns.train_tokenizer(tiny(), data, config, out=tmp_path, loss=loss)
    assert metrics(tmp_path, "train/skipped") == {1: 1, 2: 2}


def test_a_collapsed_scale_is_named_once_on_the_terminal(tmp_path, capsys):
    """All images alike: no scale can use more than a code a place."""
    data = Squares(8)
    for item in data.items:
        item["image"] = torch.zeros(3, 32, 32)
    config = CONFIG.model_copy(update={"batch_size": 8})
    loss = TokenizerLoss(quantize_start=0, restart_every=0, alarm=0.2, init_codes=False)
    ns.train_tokenizer(tiny(), data, config, out=tmp_path, loss=loss)
    said = [
        line for line in capsys.readouterr().err.splitlines() if "scale 0 (1x1) has collapsed: it uses 1.0 of 8" in line
    ]
    assert len(said) == 1
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert sum("alarm" in line and "scale 0" in line["alarm"] for line in lines) == 12
    assert metrics(tmp_path, "train/tokens_per_s")[12] > 0 and metrics(tmp_path, "train/memory_gb")[12] > 0.01


def test_a_young_average_raises_no_alarm(tmp_path):
    """In the first steps few codes can have been seen at all."""
    loss = TokenizerLoss(quantize_start=0, restart_every=0, alarm=0.3)
    config = CONFIG.model_copy(update={"batch_size": 1, "steps": 2, "warmup": 0})
    system = tiny(pyramid=var.PyramidSettings(codebook_size=512, code_dim=8))
    ns.train_tokenizer(system, DATA, config, out=tmp_path, loss=loss)
    assert "alarm" not in (tmp_path / "metrics.jsonl").read_text()
    assert metrics(tmp_path, "train/perplexity/0")[1] == 1  # of 512, but one image has one


def test_flop_count_is_that_of_the_matrix_products():
    from torch.utils.flop_counter import FlopCounterMode

    system = tiny()
    model, span = system.model, system.schedule.span()
    tokens = torch.randint(32, (1, 30))
    inputs = torch.randn(1, 29, 8)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        prepared = model.prepare(system.condition([0]))
        before = counter.get_total_flops()
        model.head.loss(model.hidden(inputs, prepared, span), tokens, Draws(torch.Generator(), 1))
    # The counter does not know the fused attention of a CPU: 2 products of each query with the keys that it sees.
    pairs = 1 * 1 + 4 * 5 + 9 * 14 + 16 * 30
    expected = 3 * (counter.get_total_flops() - before + 2 * 2 * pairs * 32 * 2)
    found = GeneratorTask(system, CONFIG, GeneratorLoss(), None, None).flop_per_image
    assert found == pytest.approx(expected, rel=0.01)


def test_weights_and_biases_gets_the_same_names(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = CONFIG.model_copy(update={"wandb": "tests", "peak_tflops": 1.0})
    ns.train_model(tiny(), DATA, config, out=tmp_path, val=VAL)
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert 0 < metrics(tmp_path, "train/mfu")[12] == metrics(tmp_path, "train/tflops")[12]


def test_scale_weights_and_a_tokenizer_to_go_on_from(tmp_path):
    weighted = GeneratorLoss(scale_weights=(0.0, 0.0, 0.0, 2.0), drop_condition=0)
    ns.train_model(tiny(), DATA, CONFIG, out=tmp_path / "a", loss=weighted)
    first = {k: metrics(tmp_path / "a", f"train/loss/{k}")[1] for k in range(4)}
    assert metrics(tmp_path / "a", "train/loss")[1] == pytest.approx(2 * first[3] * 16 / 30, rel=1e-4)
    with pytest.raises(ValueError, match="one factor for each of 4 scales"):
        ns.train_model(tiny(), DATA, CONFIG, out=tmp_path / "b", loss=GeneratorLoss(scale_weights=(1.0,)))
    trained = ns.train_tokenizer(tiny(), DATA, CONFIG, out=tmp_path / "c", loss=LOSS)
    codes = trained.tokenizer.pyramid.codebook.weight.detach().clone()
    again = LOSS.model_copy(update={"quantize_start": 0.0, "init_codes": False, "restart_every": 0})
    slow = CONFIG.model_copy(update={"steps": 2, "lr": 1e-6})
    moved = ns.train_tokenizer(ns.load(tmp_path / "c" / "system"), DATA, slow, out=tmp_path / "d", loss=again)
    torch.testing.assert_close(moved.tokenizer.pyramid.codebook.weight, codes, atol=1e-5, rtol=0)


def test_checkpoints_are_verified_and_the_best_stays(tmp_path):
    kept = Checkpoints(tmp_path / "c", keep=2)
    assert kept.newest() is None and kept.best_score() is None
    for step, score in ((5, 1.0), (10, 3.0), (15, 2.0), (20, None), (25, 2.5)):
        kept.save({"x": torch.full((1000,), float(step)), "n": torch.tensor(step)}, step, score, about=[step])
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["00000010", "00000020", "00000025"]
    assert kept.best_score() == 3.0 and kept.newest().step == 25
    (file,) = (tmp_path / "c" / "00000025").glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    (tmp_path / "c" / ".00000030").mkdir()  # what a killed process leaves
    (tmp_path / "c" / ".00000030" / file.name).write_bytes(b"half")
    (tmp_path / "c" / "notes.txt").write_text("a user's")
    with pytest.warns(UserWarning, match=r"00000025 is damaged; the one before"):
        found = kept.newest()
    assert found.step == 20 and found.facts == {"about": [20]} and found.shapes() == {"x": (1000,), "n": ()}
    tensors = {"x": torch.zeros(1000), "n": torch.tensor(0)}
    found.fill(tensors)
    assert torch.equal(tensors["x"], torch.full((1000,), 20.0)) and tensors["n"] == 20
    kept.clear(after=20)
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["00000010", "00000020", "notes.txt"]
    (tmp_path / "c" / "00000020" / "state.json").write_text("{")
    with pytest.warns(UserWarning, match=r"state.json is damaged .* its checkpoint is left aside"):
        assert Checkpoints(tmp_path / "c", keep=2).newest().step == 10


def test_large_checkpoints_are_several_files(tmp_path, monkeypatch):
    """A file is written from memory as a whole, so it must not hold everything."""
    monkeypatch.setattr(checkpoints, "FILE_BYTES", 10_000)
    tensors = {f"x{i}": torch.full((1000,), float(i)) for i in range(10)}
    kept = Checkpoints(tmp_path, keep=1)
    kept.save(tensors, 1)
    files = sorted((tmp_path / "00000001").glob("*.safetensors"))
    assert len(files) == 4 and max(file.stat().st_size for file in files) < 15_000
    again = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    kept.newest().fill(again)
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)
    files[2].unlink()
    with (
        pytest.warns(UserWarning, match="is damaged"),
        pytest.raises(ValueError, match=r"all checkpoints in .* are dam"),
    ):
        kept.newest()


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path):
    """A limit on the size of files stands in for a full disk: both end a write in the middle."""
    resource = pytest.importorskip("resource")
    kept = Checkpoints(tmp_path, keep=2)
    kept.save({"x": torch.zeros(10)}, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        said = r"no space left .* the checkpoint of step 1 in .* is whole: free some space"
        with pytest.raises(OSError, match=said), kept.explained():
            kept.save({"x": torch.zeros(1_000_000)}, 2)
        with pytest.raises(OSError, match=r"no space left to write .*x\.safetensors; free some space"):
            save_weights(torch.nn.Linear(1000, 1000), tmp_path.parent / "x.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert kept.newest().step == 1
    assert [path.name for path in tmp_path.iterdir()] == ["00000001"]


def test_sigterm_saves_and_the_run_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    whole = ns.train_model(tiny(), DATA, CONFIG, out=tmp_path / "whole", val=VAL)
    real = loop.set_rates

    def ask(optimizers, config, step):
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(optimizers, config, step)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "set_rates", ask)
        with pytest.raises(SystemExit, match="SIGTERM after step 7, which is saved"):
            ns.train_model(tiny(), DATA, CONFIG, out=tmp_path / "asked", val=VAL)
    assert Checkpoints(tmp_path / "asked" / "checkpoints", 2).newest().step == 7
    resumed = ns.train_model(tiny(), DATA, CONFIG, out=tmp_path / "asked", val=VAL)
    assert torch.equal(weights(resumed), weights(whole))


def test_a_step_that_is_not_finite_changes_nothing(tmp_path, monkeypatch):
    """One bad step of twelve: it is counted and skipped, and the rest of the run is as good as ever."""
    real = GeneratorTask.step

    def step(task, parts, number):
        if number != 5:
            return real(task, parts, number)
        before = weights(task.module)
        loss_of = task.module.head.loss
        with monkeypatch.context() as patch:
            patch.setattr(task.module.head, "loss", lambda *a, **k: loss_of(*a, **k) * float("inf"))
            found = real(task, parts, number)
        assert torch.equal(weights(task.module), before)
        return found

    monkeypatch.setattr(GeneratorTask, "step", step)
    trained = ns.train_model(tiny(), DATA, CONFIG, out=tmp_path)
    assert weights(trained).isfinite().all()
    skipped = metrics(tmp_path, "train/skipped")
    assert skipped[6] == 1 and sum(skipped.values()) == 1


def test_without_held_out_images_nothing_is_judged(tmp_path):
    for train in (ns.train_tokenizer, ns.train_model):
        out = tmp_path / train.__name__
        train(tiny(), DATA, CONFIG, out=out, val=Squares(0))
        assert "val/" not in (out / "metrics.jsonl").read_text() and (out / "system" / "config.json").is_file()


def test_images_of_another_size_are_refused_at_the_door(tmp_path):
    with pytest.raises(ValueError, match=r"\(32, 32\), got training images of \(16, 16\)"):
        ns.train_tokenizer(tiny(), Squares(4, size=16), CONFIG, out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_order_covers_each_epoch_and_starts_anywhere():
    whole = list(Order(10, 4, seed=1, first_step=0, steps=10))
    flat = [i for batch in whole for i in batch]
    assert sorted(flat[:10]) == sorted(flat[10:20]) == list(range(10)) and flat[:10] != flat[10:20]
    assert list(Order(10, 4, seed=1, first_step=7, steps=10)) == whole[7:]


def test_learning_rate_curve():
    config = TrainConfig(steps=101, warmup=10, lr=1.0, final_lr=0.1)
    assert learning_rate(config, 0) == pytest.approx(1 / 11)
    assert learning_rate(config, 10) == 1.0
    assert learning_rate(config, 100) == pytest.approx(0.1)
    linear = config.model_copy(update={"decay": "linear"})
    assert learning_rate(linear, 55) == pytest.approx(0.55)


def test_decay_groups_leave_tables_alone():
    model = tiny().model
    plain, decay = decay_groups(model, 0.05, ("positions", "offset", "log_scale"))
    assert plain["weight_decay"] == 0 and decay["weight_decay"] == 0.05
    ids = {id(p) for p in decay["params"]}
    assert id(model.embed_input.weight) in ids and id(model.conditioner.embedding.weight) in ids
    assert id(model.positions.table) not in ids and id(model.head.linear.bias) not in ids
    assert len(plain["params"]) + len(decay["params"]) == len(list(model.parameters()))


def test_average_is_the_recurrence():
    module = torch.nn.Linear(1, 1, bias=False)
    average = Average(module, 0.5)
    values, expected = [1.0, 3.0, -2.0], None
    for n, value in enumerate(values):
        module.weight.data.fill_(value)
        average.update()
        rate = min(0.5, (1 + n) / (10 + n))
        expected = value if expected is None else rate * expected + (1 - rate) * value
    assert average.values["weight"].item() == pytest.approx(expected)
    with average.shown() as shown:
        assert shown.weight.item() == pytest.approx(expected)
    assert module.weight.item() == values[-1]


def test_scale_dropout_keeps_prefixes():
    loss = TokenizerLoss(drop_scales=1.0, drop_from=2)
    system = tiny()
    task = TokenizerTask(system.tokenizer, system.schedule, CONFIG, loss, None, first_images)
    keep = task.kept_scales(Draws(generator_for(0, 0), 500)).whole
    counts = keep.sum(dim=1)
    assert set(counts.tolist()) == {2, 3, 4}
    assert torch.equal(keep, torch.arange(4) < counts[:, None])
    none = TokenizerTask(system.tokenizer, system.schedule, CONFIG, TokenizerLoss(drop_scales=0.0), None, first_images)
    assert none.kept_scales(Draws(generator_for(0, 0), 50)).whole.all()


def test_codes_start_from_data_and_dead_ones_come_back():
    system = tiny()
    task = TokenizerTask(system.tokenizer, system.schedule, CONFIG, TokenizerLoss(), None, first_images)
    images = first_images()
    codes = system.tokenizer.pyramid.codebook.weight
    task.first_codes(images, generator_for(0, 0))
    with torch.no_grad():
        tokens = system.tokenizer.encode(images, system.schedule).tokens
        task.count(tokens)
        codes[:16] = 1e3  # far from everything: dead
        task.module.get_buffer("usage")[:, :16] = 0
        walk = system.tokenizer.pyramid.walk(system.tokenizer.features(images), system.schedule)
        assert task.restart([residual for _, _, residual in walk], generator_for(0, 1)) >= 16
        assert codes.abs().max() < 1e3


def test_token_cache_is_reused_only_for_the_same_tokenizer_and_data(tmp_path, monkeypatch):
    monkeypatch.setattr(encoded, "SHARD", 10)
    system, options = tiny(), {"views": 2, "augmentation": AugmentSettings(hue=0)}
    first = encode_images(system, DATA, tmp_path, **options)
    assert first.content.shape == (48, 30) and first.told["label"].numbers.shape == (48, 1)
    plain = encode_images(system, DATA)
    expected = torch.cat(ns.encode(system, torch.stack([item["image"] for item in DATA.items])), dim=1)
    assert torch.equal(plain.content.long(), expected) and torch.equal(
        plain.told["label"].numbers, first.told["label"].numbers[:24]
    )
    shards = sorted(tmp_path.glob("shard-*.safetensors"))
    assert len(shards) == 6  # three of each view
    stamps = [path.stat().st_mtime_ns for path in shards]
    shards[1].unlink()
    shards[2].write_bytes(b"damaged")
    assert torch.equal(encode_images(system, DATA, tmp_path, **options).content, first.content)
    same = [path.stat().st_mtime_ns == stamp for path, stamp in zip(shards, stamps, strict=True)]
    assert same == [True, False, False, True, True, True]  # only what was missing
    # in memory, with shards of another size, and read row by row: the same
    monkeypatch.setattr(encoded, "IN_MEMORY", 0)
    lazy = encode_images(system, DATA, tmp_path, **options)
    assert torch.equal(torch.stack([lazy[i]["content"] for i in range(48)]), first.content.long())
    monkeypatch.setattr(encoded, "SHARD", 4096)
    assert torch.equal(encode_images(system, DATA, **options).content, first.content)
    monkeypatch.setattr(encoded, "SHARD", 10)
    with pytest.raises(ValueError, match="another images; give the one"):
        encode_images(system, Squares(seed=5), tmp_path, strict=True, **options)
    with pytest.raises(ValueError, match="another views"):
        encode_images(system, DATA, tmp_path, strict=True, **(options | {"views": 3}))
    config = CONFIG.model_copy(update={"steps": 1})
    other = var.build(small(num_classes=3), seed=4)
    with pytest.raises(ValueError, match="another tokenizer"):
        ns.train_model(other, DATA, config, out=tmp_path / "run", cache=tmp_path, **options)
    monkeypatch.undo()
    path = tmp_path / "own"
    first = encode_images(system, DATA, path)
    with torch.no_grad():
        system.tokenizer.pyramid.codebook.weight.mul_(3)
    assert not torch.equal(encode_images(system, DATA, path).content, first.content)
    (path / "index.json").write_text("damaged")
    assert encode_images(system, DATA, path).content.shape == (24, 30)


def test_texts_of_several_shards_become_one_list(monkeypatch):
    recipe = ns.find_recipe("infinity")
    system = recipe.build(recipe.tiny(), seed=1)
    words = ["b", "a", "c", "a", "d", "b"]
    items = [{"image": torch.zeros(3, 64, 64), "caption": w, "captions": (w, f"{w} again")} for w in words]
    data = Squares(1)
    data.items = items
    whole = encode_images(system, data)
    monkeypatch.setattr(encoded, "SHARD", 2)
    parts = encode_images(system, data)
    found, expected = parts.told["caption"], whole.told["caption"]
    assert found.texts == expected.texts == sorted({text for item in items for text in item["captions"]})
    assert list(parts.said()["caption"]) == words and torch.equal(found.numbers, expected.numbers)
