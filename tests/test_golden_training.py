"""Exact compatibility of training: losses, gradients, optimizer steps, curves and initial weights of the reference."""

import pytest
import torch
import torch.nn.functional as F
from small import parts
from test_golden import by_scale, numbers, part, quantizer, system, tensors

from nextscale.draws import Draws
from nextscale.encoded import Choices, EncodedImages
from nextscale.published.keys import model_key, tokenizer_key
from nextscale.recipes.generators import var
from nextscale.training.config import GeneratorLoss, TrainConfig
from nextscale.training.fit import decay_groups, set_rates
from nextscale.training.generator_task import NO_DECAY, GeneratorTask
from nextscale.training.objective import stage
from nextscale.training.rates import learning_rate, weight_decay

# Gradient norms: the same sums in another order; the reference's own recomputation agreed to 2e-6 relative.
NORMS = {"rtol": 1e-4, "atol": 1e-7}
LOSS = {"rtol": 1e-5, "atol": 0}
DECAY = {
    "lin0": {"decay": "linear", "hold": 0.05},
    "lin": {"decay": "linear", "hold": 0.15},
    "lin00": {"decay": "linear"},
    "cos": {"decay": "cosine"},
    "exp": {"decay": "exponential", "hold": 0.15},
}


def config_of(settings: dict, **more) -> TrainConfig:
    kind = settings.get("schedule") or settings["type"]
    shape = DECAY.get(kind) or {"decay": "linear", "knee": float(kind.removeprefix("lin"))}
    return TrainConfig(
        steps=settings["max_it"],
        lr=settings["peak_lr"],
        warmup=round(settings["warmup_it"]),
        first_lr=settings["wp0"],
        final_lr=settings["wpe"],
        weight_decay=settings["wd"],
        final_weight_decay=settings["wd_end"],
        ema=0,
        **shape,
        **more,
    )


def task_of(which: str, **loss) -> tuple[GeneratorTask, dict]:
    system.cache_clear()  # the steps change the weights
    settings = numbers("train_step")["step_settings"]
    objective = GeneratorLoss(drop_condition=0, **loss)
    labels = torch.tensor(settings["labels"][which]).view(-1, 1)
    tokens = torch.cat(by_scale("tiny_var_io", "idx"), 1)
    task = GeneratorTask(
        system(which), config_of(settings), objective, EncodedImages(tokens, {"label": Choices(labels)}), None
    )
    task.module.train()
    return task, {"content": tokens, "told": {"label": labels}}


def official_norms(module, values) -> dict[str, float]:
    return {
        model_key(name): float(value.norm()) for (name, _), value in zip(module.named_parameters(), values, strict=True)
    }


@pytest.mark.parametrize("which, smooth", [("A", 0), ("B", 0), ("C", 0), ("A", 0.1)])
def test_three_optimizer_steps(which, smooth):
    golden = numbers("train_step")["A_label_smooth_0.1" if smooth else which]
    task, batch = task_of(which, label_smoothing=smooth)
    for step, expected in enumerate(golden["steps"]):
        lr = set_rates(task.optimizers, task.config, step)
        assert lr == pytest.approx(expected["lr"], rel=1e-9)
        gradients = {}
        clip = torch.nn.utils.clip_grad_norm_

        def record(parameters, limit, gradients=gradients, task=task, clip=clip):
            gradients.update({n: p.grad.clone() for n, p in task.module.named_parameters()})
            return clip(parameters, limit)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.utils, "clip_grad_norm_", record)
            metrics = task.step(parts(batch), step)
        torch.testing.assert_close(float(metrics["loss"]), expected["loss"], **LOSS)
        torch.testing.assert_close(float(metrics["grad_norm"]), expected["total_grad_norm_before_clip"], **NORMS)
        got = official_norms(task.module, gradients.values())
        torch.testing.assert_close(got, {k: expected["grad_norms"][k] for k in got}, **NORMS)
        after = official_norms(task.module, [p.detach() for p in task.module.parameters()])
        torch.testing.assert_close(after, {k: expected["param_norms_after"][k] for k in after}, **NORMS)
        if step == 0 and not smooth:
            for key, value in part("train_step", f"{which}.grad.").items():
                mine = next(g for n, g in gradients.items() if model_key(n) == key)
                torch.testing.assert_close(mine, value.view_as(mine), rtol=1e-4, atol=1e-6)
    for key, value in part("train_step", f"{which}.param_after_3.").items():
        if not smooth:
            mine = next(p for n, p in task.module.named_parameters() if model_key(n) == key)
            torch.testing.assert_close(mine.detach(), value.view_as(mine), rtol=1e-4, atol=1e-6)


def test_loss_of_each_token_and_of_each_scale():
    task, batch = task_of("A")
    with torch.no_grad():
        logits = task.module.head(
            task.module.hidden(
                tensors("tiny_var_io")["var_input"],
                task.module.prepare(task.module.conditioner({"label": batch["told"]["label"][:, 0]})),
                task.system.schedule.span(),
            )
        )
        losses = task.module.head.loss_of(logits, batch["content"])
    torch.testing.assert_close(losses, tensors("train_step")["A.per_token_loss"], rtol=1e-5, atol=1e-5)
    logged = numbers("train_step")["A"]["steps"][0]
    per_scale = [float(part.mean()) for part in losses.split(task.system.schedule.lengths, 1)]
    expected = [logged["per_scale"][f"L_{16 * side}"] for side in (1, 2, 3, 4)]
    torch.testing.assert_close(per_scale, expected, rtol=1e-5, atol=1e-5)


def test_accumulated_micro_batches_equal_the_batch():
    """Two micro-batches with halved losses: the gradient of the reference's accumulation is that of our whole batch."""
    golden = numbers("train_step")["A_accumulate_2"]["steps"][0]
    task, batch = task_of("A")
    set_rates(task.optimizers, task.config, 0)
    metrics = task.step(parts(batch), 0)
    torch.testing.assert_close(float(metrics["grad_norm"]), golden["total_grad_norm_before_clip"], **NORMS)
    assert sum(golden["loss"]) / 2 == pytest.approx(float(metrics["loss"]), rel=1e-5)


def test_progressive_stages():
    golden = numbers("train_step")["progressive"]
    stages = [3 if s < 0 else s for s in golden["prog_si_sequence"]]
    task, batch = task_of("A")
    losses = []
    for step, newest in enumerate(stages):
        first_of_stage = stages.index(newest)
        ordinary = newest in (3, stages[0])
        weight = 1.0 if ordinary else min(1.0, (step - first_of_stage + 1) / golden["prog_wp_it"])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("nextscale.training.objective.stage", lambda *_, s=newest, w=weight: (s, w))
            patch.setattr(task.optimizers["model"], "step", lambda: None)
            losses.append(float(task.step(parts(batch), step)["loss"]))
    torch.testing.assert_close(losses, golden["losses"], rtol=1e-5, atol=1e-5)


def test_stage_function():
    """The reference with pg 0.8, pg0 4, 1000 iterations, 20 of warm-up and ten scales changes at these iterations."""
    config = TrainConfig(steps=1000, warmup=20)
    loss = GeneratorLoss(progressive=0.8, progressive_from=4, progressive_warmup=4)
    newest = [stage(loss, config, 10, step)[0] for step in range(1000)]
    changes = [step for step in range(1, 1000) if newest[step] != newest[step - 1]]
    assert newest[0] == 4 and changes == [99, 254, 411, 566, 723]
    assert [stage(loss, config, 10, s)[1] for s in (98, 99, 100, 101, 102, 103, 723)] == [1, 0.25, 0.5, 0.75, 1, 1, 1]
    assert stage(GeneratorLoss(), config, 10, 5) == (9, 1.0)


@pytest.mark.parametrize("settings", numbers("train_step")["schedules"], ids=lambda s: f"{s['type']}-{s['max_it']}")
def test_learning_rate_and_weight_decay(settings):
    config = config_of(settings)
    for step, lr, _, decay, _ in settings["rows"]:
        assert learning_rate(config, step) == pytest.approx(lr, rel=1e-9), step
        if decay is not None and settings["wd_end"] > 0:
            assert weight_decay(config, step) == pytest.approx(decay, rel=1e-9), step


@pytest.mark.parametrize("which", "ABC")
def test_decay_groups(which):
    module = system(which).model
    names = {id(p): model_key(n) for n, p in module.named_parameters()}
    groups = [{names[id(p)] for p in group["params"]} for group in decay_groups(module, 0.05, NO_DECAY)]
    expected = {group["wd_sc"]: set(group["names"]) for group in numbers("train_step")[which]["groups"]}
    assert groups == [expected[0.0], expected[1.0]]


@pytest.mark.parametrize("kind", ["per_block", "shared_aln"])
def test_initial_weights(kind):
    observed = numbers("train_step")["init_std_observed"]
    c = observed["config"]
    config = var.official_config(
        {"v_patch_nums": c["patch_nums"], "z_channels": 8, "ch": 32, "vocab_size": 64},
        {
            "num_classes": c["num_classes"],
            "depth": c["depth"],
            "embed_dim": c["embed_dim"],
            "num_heads": c["num_heads"],
            "patch_nums": c["patch_nums"],
            "shared_aln": kind == "shared_aln",
            "attn_l2_norm": True,
        },
    )
    parameters = {model_key(n): p.detach() for n, p in var.build(config, seed=0).model.named_parameters()}
    for name, expected in observed["values"][kind].items():
        key, rows = (name.split("[")[0], name.split("[")[1]) if "[" in name else (name, "")
        value = parameters[key]
        if rows:  # gates come first: 2 of 6 rows
            value = value[: len(value) // 3] if rows in ("gamma1,gamma2]", ":2C]") else value[len(value) // 3 :]
        if isinstance(expected, str):
            constant = float(expected.removeprefix("const "))
            torch.testing.assert_close(value, torch.full_like(value, constant), rtol=1e-4, atol=0)
        else:
            # A standard deviation of n draws scatters by 1 / sqrt(2 n); five of those on both sides.
            slack = 5 / (2 * value.numel()) ** 0.5 * 2
            assert float(value.std()) == pytest.approx(expected, rel=max(slack, 0.02)), name


@pytest.mark.parametrize("case", sorted(numbers("tiny_var")["quantizers"]))
def test_quantizer_loss_and_gradients(case):
    q, io = numbers("tiny_var")["quantizers"][case], part("tiny_quant", f"io.{case}.")
    pyramid, schedule, names = quantizer(case)
    f = io["f"].requires_grad_(True)
    terms = []
    for _, f_hat, _ in pyramid.walk(f, schedule):
        terms.append(q["beta"] * F.mse_loss(f_hat.detach(), f) + F.mse_loss(f_hat, f.detach()))
    loss = torch.stack(terms).mean()
    loss.backward()
    torch.testing.assert_close(loss.detach(), io["vq.vq_loss"].squeeze(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(f.grad, io["vq.grad_f"], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(pyramid.codebook.weight.grad, io["vq.grad.embedding.weight"], rtol=1e-4, atol=1e-6)
    for i, name in enumerate(names):
        for leaf in ("weight", "bias"):
            gradient = getattr(pyramid.phi[i], leaf).grad
            torch.testing.assert_close(gradient, io[f"vq.grad.{name}.{leaf}"], rtol=1e-4, atol=1e-6)
    f.grad = None


def test_tokenizer_loss_and_gradient_norms():
    """mse + vq loss of the whole tokenizer, straight-through."""
    from nextscale.training.config import TokenizerLoss
    from nextscale.training.tokenizer_task import TokenizerTask

    system.cache_clear()
    io, s = tensors("tiny_var_io"), system("A")
    loss = TokenizerLoss(l1=0, drop_scales=0, quantize_start=0, init_codes=False, restart_every=0)
    task = TokenizerTask(s.tokenizer, s.schedule, TrainConfig(), loss, None, lambda: io["image"])
    f = s.tokenizer.features(io["image"])
    keep = task.kept_scales(Draws(torch.Generator(), len(f)))
    assert keep.whole.all()
    _, _, f_hat, vq = s.tokenizer.pyramid.learn(f, s.schedule, keep)
    torch.testing.assert_close(vq.detach(), io["vae_train.vq_loss"].squeeze(), rtol=1e-5, atol=0)
    recon = s.tokenizer.decode(f_hat)
    torch.testing.assert_close(recon.detach(), io["vae_train.recon_unclamped"], atol=5e-5, rtol=0)
    total = F.mse_loss(recon, io["image"]) + vq
    torch.testing.assert_close(total.detach(), io["vae_train.total_loss"].squeeze(), rtol=1e-5, atol=0)
    total.backward()
    rename = tokenizer_key(s.tokenizer, s.config.pyramid.phi)
    got = {rename(n): float(p.grad.norm()) for n, p in s.tokenizer.named_parameters()}
    expected = numbers("tiny_var")["vae_grad_norms_of_mse_plus_vq"]
    torch.testing.assert_close(got, {k: expected[k] for k in got}, rtol=1e-4, atol=1e-6)
