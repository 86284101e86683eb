"""Objectives own their loss, heads their measures: other data, frozen networks, samples drawn inside, losses with noise."""

import copy
import json
import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from small import small
from test_training import CONFIG, DATA, VAL, weights
from torch import nn

import nextscale as ns
from nextscale.contracts import Objective
from nextscale.draws import Draws
from nextscale.model.bit_head import BitHead
from nextscale.model.head import SoftmaxHead
from nextscale.recipes.generators import flexvar, infinity, var
from nextscale.sampling.loop import sample_tokens
from nextscale.settings import Settings
from nextscale.system import Part, System, teacher_logits
from nextscale.training.checkpoints import Checkpoints
from nextscale.training.config import GeneratorLoss, TrainConfig
from nextscale.training.fit import Health
from nextscale.training.objective import NextScale, TeacherForcing, _newest, stage
from nextscale.training.resume import recorded, recorded_objective

DRAWS = Draws(torch.Generator(), 2)


def metrics_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def tiny(seed: int = 3):
    return var.build(small(num_classes=3), seed=seed)


# ---- heads ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", [SoftmaxHead(16, 32), BitHead(16, 5), BitHead(16, 5, "sum")])
def test_heads_are_not_rounded_under_autocast(head):
    h = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
    targets = torch.randint(2, (2, 3) if isinstance(head, SoftmaxHead) else (2, 3, 5))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits, loss = head(h), head.loss(h, targets, DRAWS)
        assert head.linear(h).dtype == torch.bfloat16  # what it does not do
        judged, log_prob = head.judge(h, targets, DRAWS), head.log_prob(h, targets)
    with torch.no_grad():
        assert logits.dtype == torch.float32 and torch.equal(logits, head(h))
        assert torch.equal(loss, head.loss(h, targets, DRAWS)) and torch.equal(judged["cross_entropy"], loss)
        assert torch.equal(log_prob, head.log_prob(h, targets))


def test_log_prob_of_bits_is_the_sum_whatever_the_loss():
    head = BitHead(16, 5)
    h, bits = torch.randn(2, 3, 16), torch.randint(2, (2, 3, 5))
    expected = head(h).log_softmax(-1).gather(-1, bits[..., None]).squeeze(-1).sum(-1)
    torch.testing.assert_close(head.log_prob(h, bits), expected)
    torch.testing.assert_close(head.loss(h, bits, DRAWS), -expected / 5)
    every = torch.tensor([[int(b) for b in f"{i:05b}"] for i in range(32)])
    total = torch.stack([head.log_prob(h[:1, :1], code.view(1, 1, 5)).exp() for code in every]).sum()
    assert float(total.detach()) == pytest.approx(1, abs=1e-5)


class FlowHead(SoftmaxHead):
    """A loss with noise and a measure of its own: the squared error of the code's number, told a noised one."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, 32)
        self.guess = nn.Linear(dim + 2, 1)

    def _error(self, h, targets, draws):
        noise, time = draws.rand(targets.shape[1]).to(h), draws.rand(targets.shape[1]).to(h)
        noised = torch.stack([targets / 32 * time + noise * (1 - time), time], dim=-1)
        return (self.guess(torch.cat([h, noised], dim=-1)).squeeze(-1) - targets / 32).square()

    def loss(self, h, targets, draws, label_smoothing=0.0):
        return self._error(h, targets, draws)

    def judge(self, h, targets, draws):
        return {"error": self._error(h, targets, draws)}


def test_a_head_with_noise_trains_and_is_validated(tmp_path):
    system = tiny()
    system.model.head = FlowHead(32)
    ns.train_model(system, DATA, CONFIG.model_copy(update={"steps": 12, "validate_every": 6}), out=tmp_path, val=VAL)
    judged = [line for line in metrics_of(tmp_path) if "val/error/0" in line]
    assert len(judged) == 2 and judged[1]["val/loss"] < judged[0]["val/loss"]
    assert not any("cross_entropy" in name for name in judged[0])
    tokens, labels = torch.cat(ns.encode(system, torch.stack([VAL[i]["image"] for i in range(6)])), 1), [0] * 6
    first, second = (ns.evaluate_likelihood(system, tokens, labels) for _ in range(2))
    assert first == second != ns.evaluate_likelihood(system, tokens, labels, seed=1)  # fixed numbers, of a seed


# ---- objectives -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [TeacherForcing(), flexvar.RandomSchedules(), infinity.SelfCorrection()])
def test_recipes_objectives_keep_the_contract(objective):
    assert isinstance(objective, Objective) and isinstance(objective, NextScale)
    assert (
        objective.wants in ("tokens", "features")
        and objective.score({"loss": 2.0}) == -2
        and objective.score({}) is None
    )


class Preference:
    """Pairs of images: the better one more likely than a frozen copy of the model finds it (as in CCA or DPO)."""

    wants: ClassVar = "items"

    def frozen(self, run):
        return {"reference": copy.deepcopy(run.system.model)}

    def _ratio(self, run, images, told):
        system = run.system
        tokens = ns.encode(system, images)
        both = torch.cat(tokens, dim=1)
        logs = []
        for model in (run.model, run.frozen["reference"]):
            inputs = torch.cat(system.tokenizer.encode(images, system.schedule).inputs, dim=1)
            h = model.hidden(inputs, model.prepare(system.condition(told)), system.schedule.span())
            logs.append(model.head.log_prob(h, both).sum(dim=1))
        return logs[0] - logs[1].detach()

    def loss(self, run, part, step):
        told = run.told(part)
        better, worse = (self._ratio(run, part.batch[name], told) for name in ("image", "worse"))
        loss = -F.logsigmoid(0.1 * (better - worse)).mean()
        return loss, {"loss": loss.detach()}

    def judge(self, run, data):
        images = torch.stack([item["image"] for item in data])
        return {"loss": -float(self._ratio(run, images, [item["label"] for item in data]).mean())}

    def score(self, metrics):
        return -metrics["loss"]


class Pairs(torch.utils.data.Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index] | {"worse": -self.images[index]["image"]}

    @staticmethod
    def collate(items):
        batch = {name: [item[name] for item in items] for name in ("image", "worse", "label", "labels")}
        return batch | {name: torch.stack(batch[name]) for name in ("image", "worse")}


class Rewarded:
    """No images at all: the model's own samples, the more likely the better they are judged (as in GRPO)."""

    wants: ClassVar = "nothing"

    def frozen(self, run):
        return {}

    def loss(self, run, part, step):
        system, draws = run.system, part.draws
        labels, seeds = draws.randint(0, 3).tolist(), draws.randint(0, 2**31).tolist()
        system.model.eval()
        tokens = sample_tokens(system, labels, guidance=ns.cfg(1.0), pick=ns.multinomial, seed=seeds)
        system.model.train()
        reward = torch.cat(tokens, 1).float().mean(dim=1)
        logits = teacher_logits(system, tokens, system.condition(labels), system.schedule)
        logs = -F.cross_entropy(logits.flatten(0, 1), torch.cat(tokens, 1).flatten(), reduction="none").view(
            len(reward), -1
        )
        loss = -((reward - 15.5) * logs.sum(dim=1)).mean() / 30
        return loss, {"loss": loss.detach(), "reward": reward.mean()}

    def judge(self, run, data):
        assert data is None
        tokens = sample_tokens(run.system, [0, 1, 2] * 8, guidance=ns.cfg(1.0), pick=ns.multinomial, seed=0)
        return {"reward": float(torch.cat(tokens, 1).float().mean())}

    def score(self, metrics):
        return metrics["reward"]


def run_of(out, objective, **changes):
    system = tiny()
    data, val = (Pairs(DATA), Pairs(VAL)) if objective.wants == "items" else (None, None)
    config = TrainConfig(steps=6, batch_size=4, warmup=0, lr=3e-3, log_every=1, validate_every=3, save_every=2, ema=0)
    ns.train_model(system, data, config.model_copy(update=changes), out=out, val=val, objective=objective)
    return system


@pytest.mark.parametrize("objective", [Preference(), Rewarded()])
def test_other_objectives_train_resume_and_save(tmp_path, objective, monkeypatch):
    assert isinstance(objective, Objective)
    system = run_of(tmp_path / "whole", objective)
    judged = [line for line in metrics_of(tmp_path / "whole") if any(name.startswith("val/") for name in line)]
    assert objective.score({k.removeprefix("val/"): v for k, v in judged[-1].items()}) > objective.score(
        {k.removeprefix("val/"): v for k, v in judged[0].items()}
    )
    assert ns.sample(ns.load(tmp_path / "whole" / "system"), [0], seed=1).isfinite().all()
    # stopped after three steps, of which two were saved, and gone on with: the same weights
    real, left = objective.__class__.loss, [3]

    def dying(self, run, part, step):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return real(self, run, part, step)

    with monkeypatch.context() as patch:
        patch.setattr(objective.__class__, "loss", dying)
        with pytest.raises(KeyboardInterrupt):
            run_of(tmp_path / "parts", objective)
    again = run_of(tmp_path / "parts", objective)
    assert torch.equal(weights(system), weights(again))


@dataclass(frozen=True)
class Weighed(TeacherForcing):
    beta: float = 1.0


class Plain(NextScale):
    def __init__(self, beta):
        self.beta, self.helper, self._own = beta, object(), object()

    batch = TeacherForcing.batch


class Own(Settings):
    """Settings that are an objective."""

    beta: float = 1.0
    wants: ClassVar = "tokens"
    frozen, loss, judge, score = (getattr(TeacherForcing, n) for n in ("frozen", "loss", "judge", "score"))
    batch = TeacherForcing.batch


def short(out, objective=None, steps=2, system=None):
    config = CONFIG.model_copy(update={"steps": steps, "save_every": 1, "warmup": 0})
    return ns.train_model(system or tiny(), DATA, config, out=out, objective=objective)


@pytest.mark.parametrize("first", [None, Weighed(), Plain(1.0), Own()])
@pytest.mark.parametrize("second", [Weighed(beta=-50.0), Plain(-50.0), Own(beta=-50.0), flexvar.RandomSchedules()])
def test_a_run_goes_on_with_its_own_objective_alone(tmp_path, first, second):
    whole = short(tmp_path, first)
    again = short(tmp_path, copy.deepcopy(first))
    assert torch.equal(weights(again), weights(whole))
    with pytest.raises(ValueError, match=r"other settings: objective\.(kind|settings\.beta) was .*, now "):
        short(tmp_path, second)
    written = json.loads((tmp_path / "run.json").read_text())["objective"]
    assert written == recorded_objective(first or TeacherForcing()) and set(written) == {"kind", "settings"}


def test_what_is_recorded_of_objectives_is_the_same_each_time():
    assert recorded_objective(Plain(2.0)) == recorded_objective(Plain(2.0))
    assert recorded_objective(Plain(2.0))["settings"] == {"beta": 2.0, "helper": "<object object>"}
    assert recorded_objective(Weighed())["settings"] == {"beta": 1.0}
    kind = "nextscale.training.objective.TeacherForcing"
    assert recorded_objective(TeacherForcing()) == {"kind": kind, "settings": {}}
    value = {"sizes": (1, 2), "none": None, "names": {"b", "a"}}
    assert recorded(value) == {"sizes": [1, 2], "none": None, "names": ["a", "b"]}


@pytest.mark.parametrize("objective", [None, Own(beta=2.0), Preference()])
def test_runs_that_did_not_record_their_objective_go_on(tmp_path, objective):
    """As earlier versions wrote them: the settings of a `Settings` objective alone, and no frozen networks."""
    items = isinstance(objective, Preference)
    train = (lambda out: run_of(out, objective)) if items else (lambda out: short(out, objective))
    whole = train(tmp_path)
    for path in (tmp_path / "checkpoints").glob("*/state.json"):
        state = json.loads(path.read_text())
        known = state["facts"]["settings"]
        known.pop("frozen", None)
        own = known.pop("objective")["settings"]
        if isinstance(objective, Own):
            known["objective"] = own
        path.write_text(json.dumps(state))
    assert torch.equal(weights(train(tmp_path)), weights(whole))
    if isinstance(objective, Own):
        with pytest.raises(ValueError, match=r"objective.beta was 2.0, now 3.0"):
            short(tmp_path, Own(beta=3.0))


def test_frozen_networks_are_those_of_the_weights_from_which_training_starts(tmp_path):
    objective, config = Preference(), CONFIG.model_copy(update={"steps": 3, "save_every": 1})

    def train(system, steps=3):
        settings = config.model_copy(update={"steps": steps, "ema": 0})
        return ns.train_model(system, Pairs(DATA), settings, out=tmp_path, val=Pairs(VAL), objective=objective)

    system = train(tiny())
    with pytest.raises(ValueError, match=r"began with other weights: the objective's frozen networks \(reference\)"):
        train(system)
    assert torch.equal(weights(train(tiny())), weights(system))


# ---- parts that train with the model -----------------------------------------------------------------------------------


class Toned(TeacherForcing):
    """A part of the system has a share in the loss."""

    def loss(self, run, part, step):
        loss, metrics = super().loss(run, part, step)
        tone = run.system.parts["tone"](torch.ones(1, 2)).square().mean()
        return loss + tone, metrics | {"tone": tone.detach()}


def with_parts(roles):
    plain = tiny()
    torch.manual_seed(0)
    parts = {name: Part(nn.Linear(2, 2), role) for name, role in roles.items()}
    return System(
        plain.recipe,
        plain.config,
        plain.schedule,
        plain.tokenizer,
        plain.model,
        plain.classes,
        sampling=plain.sampling,
        objective=Toned(),
        readers=plain.readers,
        parts=parts,
    )


def part_weights(system):
    return {name: module.weight.detach().clone() for name, module in system.parts.items()}


def test_trained_parts_train_with_the_model_and_go_on(tmp_path):
    roles = {"tone": "trained", "idle": "trained", "still": "frozen", "theirs": "external"}
    config = CONFIG.model_copy(update={"steps": 6, "save_every": 1, "ema": 0.5})

    def train(out, objective=None):
        return ns.train_model(with_parts(roles), DATA, config, out=out, val=VAL, objective=objective)

    whole = train(tmp_path / "whole")
    before, after = part_weights(with_parts(roles)), part_weights(whole)
    assert {name for name in roles if not torch.equal(before[name], after[name])} == {"tone"}
    tones = [line["train/tone"] for line in metrics_of(tmp_path / "whole") if "train/tone" in line]
    assert tones[-1] < tones[0]
    assert torch.equal(load_file(tmp_path / "whole" / "system" / "tone.safetensors")["weight"], after["tone"])

    class Dying(Toned):
        left = 3

        def loss(self, run, part, step):
            if not Dying.left:
                raise KeyboardInterrupt
            Dying.left -= 1
            return super().loss(run, part, step)

    Dying.__qualname__, Dying.__module__ = Toned.__qualname__, Toned.__module__
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", Dying())
    again = train(tmp_path / "parts")
    assert torch.equal(weights(again), weights(whole))


def test_parts_that_do_not_train_change_nothing(tmp_path):
    """Neither the bits nor the names in checkpoints."""
    config = CONFIG.model_copy(update={"steps": 3, "save_every": 3})
    alone = ns.train_model(tiny(), DATA, config, out=tmp_path / "alone")
    system = with_parts({"still": "frozen"})
    beside = ns.train_model(system, DATA, config, out=tmp_path / "beside", objective=TeacherForcing())
    assert torch.equal(weights(alone), torch.cat([weights(beside.tokenizer), weights(beside.model)]))
    shapes = [Checkpoints(tmp_path / n / "checkpoints", 1).newest().shapes() for n in ("alone", "beside")]
    assert shapes[0] == shapes[1]


def test_an_objective_of_items_says_what_data_lack(tmp_path):
    class Unsaid(Pairs):
        def __getitem__(self, index):
            return {name: value for name, value in super().__getitem__(index).items() if name[:5] != "label"}

        @staticmethod
        def collate(items):
            return {name: torch.stack([item[name] for item in items]) for name in ("image", "worse")}

    with pytest.raises(ValueError, match=r"the data do not say 'label'.* items have image, worse"):
        ns.train_model(tiny(), Unsaid(DATA), CONFIG, out=tmp_path, objective=Preference())


def test_an_objective_of_items_needs_data(tmp_path):
    with pytest.raises(ValueError, match="wants items, so training needs data"):
        ns.train_model(tiny(), None, CONFIG, out=tmp_path, objective=Preference())


# ---- progressive stages, health ---------------------------------------------------------------------------------------


def slow_stage(loss, config, scales, step):
    """As `stage`, walking back."""
    last = scales - 1
    if not loss.progressive:
        return last, 1.0
    newest = _newest(loss, config, last, step)
    if newest in (last, _newest(loss, config, last, 0)):
        return newest, 1.0
    begun = next(s for s in range(step, -1, -1) if _newest(loss, config, last, s) != newest)
    return newest, min(1.0, max(0.01, (step - begun) / loss.progressive_warmup))


@pytest.mark.parametrize("scales", [1, 2, 5, 10])
@pytest.mark.parametrize("warmup", [0, 7, 90])
def test_stages_are_those_of_the_walk_back(scales, warmup):
    for share in (0.0, 0.05, 0.3, 0.99):
        for first in (1, 4, 8):
            for rise in (1, 13):
                stages = {"progressive_from": first, "progressive_warmup": rise} if share else {}
                loss = GeneratorLoss(progressive=share, **stages)
                config = TrainConfig(steps=200, warmup=warmup)
                for step in range(200):
                    assert stage(loss, config, scales, step) == slow_stage(loss, config, scales, step)


def test_health_of_an_accelerator_is_asked_for_when_something_is_logged():
    from nextscale.processes import Team

    losses = [1.0, math.nan, math.nan, 2.0, math.inf, 1.0, math.nan]
    on_cpu, counted = Health(Team(), "cpu"), Health(Team(), "cpu")
    counted.waits = False  # as on an accelerator
    looks = []
    for i, loss in enumerate(losses):
        metrics = {"loss": torch.tensor(loss), "grad_norm": torch.tensor(1.0)}
        assert on_cpu.look(metrics, False, now=False)[0] == math.isfinite(loss)
        looks.append((counted.look(metrics, False, now=i % 3 == 0)[0], counted.skipped, counted.worst))
    assert [looks[i] for i in (0, 3, 6)] == [(True, 0, 0), (True, 0, 2), (False, 1, 1)]
    assert on_cpu.skipped == on_cpu.worst == 1
    assert counted.look({"loss": 1.0, "grad_norm": 1.0}, True, now=False)[1]
