"""The loop: `start`, `step`, `run`, and the verbs around it. VAR's steps are `ScaleByScale`; a recipe may bring others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nextscale.condition import Condition
from nextscale.contracts import Cache, Edit, Generators, Pick, Stepper
from nextscale.sampling.guidance import Guidance
from nextscale.sampling.pick import ScalePick, check_pick, pick_at
from nextscale.sampling.state import Noise, State, plain_tensors
from nextscale.schedule import Schedule
from nextscale.settings import brief
from nextscale.system import Labels, System, check_system
from nextscale.tokens import Tokens

OnScale = Callable[[int, Tensor], None]


@dataclass(frozen=True)
class Options:
    """What a caller asks of a sampling, see `sample_tokens`; None: the system's own."""

    guidance: Guidance | None = None
    pick: Pick | ScalePick | None = None
    edit: Edit | None = None
    seed: int | Sequence[int] = 0
    generator: torch.Generator | None = None
    schedule: Schedule | None = None

    def __post_init__(self) -> None:
        kinds: dict[str, tuple[type, str]] = {
            "guidance": (Guidance, "ns.cfg_ramp(2.5) or ns.cfg(2.5)"),
            "generator": (torch.Generator, "a torch.Generator"),
            "schedule": (Schedule, "ns.Schedule.squares(1, 2, 4)"),
        }
        for name, (kind, example) in kinds.items():
            given = getattr(self, name)
            if given is not None and not isinstance(given, kind):
                raise ValueError(f"{name}: expected {example}, or None for the usual, got {brief(given)}")
        if self.pick is not None:
            check_pick(self.pick)
        if self.edit is not None and not callable(self.edit):
            raise ValueError(
                f"edit: expected a function of (tokens, k) such as ns.keep_tokens(...), got {brief(self.edit)}"
            )


@dataclass(frozen=True)
class ScaleByScale:
    """One step a scale: predict, pick, edit and add its tokens (`contracts.Stepper`).

    skipped: last scales that are left out.
    """

    skipped: int = 0

    def start(self, system: System, told: Labels, options: Options) -> State:
        model, schedule = system.need_model(), options.schedule or system.schedule
        defaults = system.sampling.options()
        guidance = options.guidance or defaults["guidance"]
        condition = system.condition(told)
        batch = len(condition)
        null = model.conditioner.null(condition)
        branches = guidance.alive(schedule, 0)
        rows = Condition.cat([_dropped(condition, null, guidance.drops[b]) for b in branches])
        prepared = model.prepare(rows)
        return State(
            schedule=schedule,
            guidance=guidance,
            pick=options.pick or defaults["pick"],
            f_hat=system.tokenizer.pyramid.start(batch, schedule, system.device),
            prepared=prepared,
            cache=model.new_cache(prepared, schedule),
            branches=branches,
            noise=Noise.of(options.seed, options.generator, batch, system.device),
            edit=options.edit,
        )

    def step(self, system: System, state: State) -> State:
        state = drop_branches(state)
        cache, generators = state.cache.fork(), state.noise.generators()
        tokens = self.draw(system, state, cache, generators)
        edit = state.edit
        tokens = tokens if edit is None else edit(tokens, state.k)
        f_hat = system.tokenizer.pyramid.add(state.f_hat, tokens, state.k, state.schedule)
        if edit is not None and hasattr(edit, "features"):  # one that changes those as well
            f_hat = edit.features(f_hat, state.k)
        return replace(
            state,
            k=state.k + 1,
            f_hat=f_hat,
            cache=cache,
            tokens=[*state.tokens, tokens],
            noise=state.noise.after(generators),
        )

    def draw(self, system: System, state: State, cache: Cache, generators: Generators) -> Tokens:
        """Tokens of the next scale, whose keys and values go into the cache. Methods that draw in another way replace this."""
        inputs = None
        if state.k:
            inputs = system.tokenizer.pyramid.next_input(state.f_hat, state.k, state.schedule)
        return predicted(system, state, inputs, cache, generators)

    def done(self, system: System, state: State) -> bool:
        return state.k >= len(state.schedule) - self.skipped

    def skipping(self, scales: int) -> ScaleByScale:
        return replace(self, skipped=max(self.skipped, scales))

    def finish(self, system: System, state: State) -> Tensor:
        return system.output.finish(system.tokenizer.decode(state.f_hat))


def predicted(
    system: System,
    state: State,
    inputs: Tensor | None,
    cache: Cache,
    generators: Generators,
    *,
    commit: bool = True,
) -> Tokens:
    """One pass over the next scale, guided and picked: inputs [B, l_k, C] of images (None at the first scale) to tokens."""
    model, k, schedule = system.need_model(), state.k, state.schedule
    if inputs is not None:  # every branch sees the same image so far
        inputs = inputs.repeat(len(state.branches), 1, 1)
    h = model.hidden(inputs, state.prepared, schedule.span(k, k + 1), cache, commit=commit)

    def combine(predictions: Tensor) -> Tensor:
        return state.guidance.combine(predictions, state.branches, schedule, k)

    return model.head.sample(h, combine, pick_at(state.pick, schedule, k), generators)


@dataclass(frozen=True)
class StepperWrapper:
    """A stepper around another one: what it does not change is the inner one's."""

    inner: Stepper

    def start(self, system: System, told: Labels, options: Options) -> State:
        return self.inner.start(system, told, options)

    def step(self, system: System, state: State) -> State:
        return self.inner.step(system, state)

    def done(self, system: System, state: State) -> bool:
        return self.inner.done(system, state)

    def finish(self, system: System, state: State) -> Tensor:
        return self.inner.finish(system, state)

    def skipping(self, scales: int) -> Stepper:
        return replace(self, inner=self.inner.skipping(scales))


def stepper_of(system: System) -> Stepper:
    """The system's own steps, or VAR's."""
    check_system(system)
    return system.stepper or ScaleByScale()


def start(
    system: System,
    labels: Labels,
    *,
    guidance: Guidance | None = None,
    pick: Pick | ScalePick | None = None,
    edit: Edit | None = None,
    seed: int | Sequence[int] = 0,
    generator: torch.Generator | None = None,
    schedule: Schedule | None = None,
) -> State:
    """The state before the first step; the arguments are those of `sample_tokens`."""
    with plain_tensors():
        return stepper_of(system).start(system, labels, Options(guidance, pick, edit, seed, generator, schedule))


def step(system: System, state: State) -> State:
    """The state after one more step (scale); the given one stays as it is and can be stepped again."""
    stepper = stepper_of(system)
    _check_state(state)
    if stepper.done(system, state):
        raise ValueError("this state has taken all of its steps; `ns.finish(system, state)` makes the images")
    with plain_tensors():
        return stepper.step(system, state)


def run(system: System, state: State, on_scale: OnScale | None = None) -> State:
    """All remaining steps.

    `on_scale(k, images)` gets what the system would give after each scale, [B, 3, H, W] in [-1, 1].
    """
    if on_scale is not None and not callable(on_scale):
        raise ValueError(f"on_scale: expected a function of (k, images), got {brief(on_scale)}")
    stepper = stepper_of(system)
    _check_state(state)
    while not stepper.done(system, state):
        state = step(system, state)
        if on_scale is not None:
            on_scale(state.k - 1, finish(system, state))
    return state


def finish(system: System, state: State) -> Tensor:
    """What the system gives of a state, images [B, 3, H, W] in [-1, 1]: after the last step, or earlier as a preview."""
    stepper = stepper_of(system)
    _check_state(state)
    with plain_tensors():
        return stepper.finish(system, state)


def _check_state(state: object) -> None:
    if not isinstance(state, State):
        raise TypeError(f"expected a state, got {brief(state)}; ns.start(system, labels) gives the first")


def sample_tokens(
    system: System,
    labels: Labels,
    *,
    guidance: Guidance | None = None,
    pick: Pick | ScalePick | None = None,
    edit: Edit | None = None,
    seed: int | Sequence[int] = 0,
    generator: torch.Generator | None = None,
    schedule: Schedule | None = None,
    on_scale: OnScale | None = None,
) -> list[Tokens]:
    """Generate token maps: a list of K tensors [B, l_k] (`ns.Soft` weights [B, l_k, V] from `gumbel_soft`).

    Args:
        labels: one entry an image: class names, class numbers, or None for the null class.
        guidance: `cfg_ramp(w)` or `cfg(w)`; default: the system's own ramp.
        pick: `greedy`, `multinomial`, `top_k_top_p(k, p)`, `gumbel_soft(k, p)`; default: the system's own filter.
        edit: `(tokens, k) -> tokens`, called after each pick; forces or replaces tokens.
        seed: image i draws from seed + i whatever the batch, or from `seed[i]` of a sequence.
        generator: one generator for the whole batch in the reference's order, instead of seeds.
        schedule: sizes of the scales; default: the system's own.
        on_scale: called with (k, images) after each scale.
    """
    options = {"guidance": guidance, "pick": pick, "edit": edit, "generator": generator, "schedule": schedule}
    return run(system, start(system, labels, seed=seed, **options), on_scale).tokens  # type: ignore[arg-type]


def sample(
    system: System,
    labels: Labels,
    *,
    guidance: Guidance | None = None,
    pick: Pick | ScalePick | None = None,
    edit: Edit | None = None,
    seed: int | Sequence[int] = 0,
    generator: torch.Generator | None = None,
    schedule: Schedule | None = None,
    on_scale: OnScale | None = None,
) -> Tensor:
    """Generate images, float [B, 3, H, W] in [-1, 1]; the arguments are those of `sample_tokens`."""
    options = {"guidance": guidance, "pick": pick, "edit": edit, "generator": generator, "schedule": schedule}
    state = run(system, start(system, labels, seed=seed, **options), on_scale)  # type: ignore[arg-type]
    return finish(system, state)


def drop_branches(state: State) -> State:
    """Leave branches behind that no remaining scale needs."""
    alive = state.guidance.alive(state.schedule, state.k)
    if alive == state.branches:
        return state
    count = len(state)
    rows = torch.cat([torch.arange(count) + state.branches.index(b) * count for b in alive]).to(state.f_hat.device)
    return replace(state, prepared=state.prepared.select(rows), cache=state.cache.select(rows), branches=alive)


def _dropped(condition: Condition, null: Condition, drop: tuple[str, ...]) -> Condition:
    names = condition.parts() if drop == ("all",) else drop
    everywhere = torch.ones(len(condition), dtype=torch.bool, device=condition.device)
    return condition.mix(null, dict.fromkeys(names, everywhere))
