"""The scale loop: one `step` a scale, and the verbs around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from nextscale.condition import Condition
from nextscale.model.attention import Cache
from nextscale.model.transformer import Prepared
from nextscale.sampling.guidance import Guidance
from nextscale.sampling.pick import Generators, Pick, ScalePick, pick_at
from nextscale.schedule import Schedule
from nextscale.system import Labels, System
from nextscale.tokens import Tokens, each

Edit = Callable[[Tokens, int], Tokens]
OnScale = Callable[[int, Tensor], None]


@dataclass(frozen=True)
class State:
    """All that a sampling carries from scale to scale. Nothing lives on a module, so samplings cannot disturb each other.

    Rows of `prepared` and `cache` are images x branches, branch by branch; all other rows are images.
    """

    schedule: Schedule
    guidance: Guidance
    pick: Pick | ScalePick
    f_hat: Tensor  # [B, C, H, W]
    prepared: Prepared
    cache: Cache
    branches: tuple[int, ...]  # those of the guidance that run
    generators: Generators
    edit: Edit | None = None
    k: int = 0  # the next scale
    tokens: list[Tokens] = field(default_factory=list)  # of the scales so far, [B, l_k, ...] each

    def select(self, rows: Tensor) -> State:
        """Keep, re-order or copy images (int64 [rows']); a copied image continues with a copy of its generator."""
        count = len(self.f_hat)
        generators = self.generators
        if not isinstance(generators, torch.Generator):
            generators = [_copy(generators[i]) for i in rows.tolist()]
        stacked = torch.cat([rows + b * count for b in range(len(self.branches))])
        self.cache.select(stacked)
        edit = self.edit
        if edit is not None and hasattr(edit, "select"):  # one that knows images by their rows
            edit = edit.select(rows)
        return replace(
            self,
            f_hat=self.f_hat[rows],
            prepared=self.prepared.select(stacked),
            generators=generators,
            edit=edit,
            tokens=[each(lambda part: part[rows], tokens) for tokens in self.tokens],
        )


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
    """The state before the first scale; the arguments are those of `sample_tokens`."""
    model = system.need_model()
    schedule = schedule or system.schedule
    defaults = system.sampling.options()
    guidance, pick = guidance or defaults["guidance"], pick or defaults["pick"]
    condition = system.condition(labels)
    batch = len(condition)
    null = model.conditioner.null(condition)
    branches = guidance.alive(schedule, 0)
    rows = Condition.cat([_dropped(condition, null, guidance.drops[b]) for b in branches])
    return State(
        schedule=schedule,
        guidance=guidance,
        pick=pick,
        f_hat=system.tokenizer.pyramid.start(batch, schedule, system.device),
        prepared=model.prepare(rows),
        cache=model.new_cache(len(rows), schedule.length),
        branches=branches,
        generators=generator or _generators(seed, batch, system.device),
        edit=edit,
    )


def step(system: System, state: State) -> State:
    """Predict, pick, edit and add the tokens of the next scale."""
    k, schedule, pyramid = state.k, state.schedule, system.tokenizer.pyramid
    state = _drop_branches(state)
    inputs = None
    if k:  # every branch sees the same image so far
        inputs = pyramid.next_input(state.f_hat, k, schedule).repeat(len(state.branches), 1, 1)
    h = system.need_model().hidden(inputs, state.prepared, schedule.span(k, k + 1), state.cache)

    def combine(predictions: Tensor) -> Tensor:
        return state.guidance.combine(predictions, state.branches, schedule, k)

    tokens = system.need_model().head.sample(h, combine, pick_at(state.pick, schedule, k), state.generators)
    if state.edit is not None:
        tokens = state.edit(tokens, k)
    f_hat = pyramid.add(state.f_hat, tokens, k, schedule)
    return replace(state, k=k + 1, f_hat=f_hat, tokens=[*state.tokens, tokens])


def run(system: System, state: State, on_scale: OnScale | None = None) -> State:
    """All remaining scales but those that the system leaves out.

    `on_scale(k, images)` gets the image decoded after each scale, [B, 3, H, W] in [-1, 1].
    """
    with torch.inference_mode():
        while state.k < len(state.schedule) - system.skipped:
            state = step(system, state)
            if on_scale is not None:
                on_scale(state.k - 1, system.tokenizer.decode(state.f_hat).clamp(-1, 1))
    return state


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
    """Generate token maps: a list of K tensors [B, l_k] (from `gumbel_soft`: `Soft` weights [B, l_k, V]).

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
    with torch.inference_mode():
        state = run(system, start(system, labels, seed=seed, **options), on_scale)  # type: ignore[arg-type]
    return [each(torch.clone, tokens) for tokens in state.tokens]  # out of inference mode: ordinary tensors


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
    with torch.inference_mode():
        state = run(system, start(system, labels, seed=seed, **options), on_scale)  # type: ignore[arg-type]
        images = system.tokenizer.decode(state.f_hat).clamp(-1, 1)
    return images.clone()


def _generators(seed: int | Sequence[int], batch: int, device: torch.device) -> list[torch.Generator]:
    seeds = [seed + i for i in range(batch)] if isinstance(seed, int) else list(seed)
    if len(seeds) != batch:
        raise ValueError(f"seed needs one number, or one for each of {batch} images, got {len(seeds)}")
    return [torch.Generator(device).manual_seed(s) for s in seeds]


def _dropped(condition: Condition, null: Condition, drop: tuple[str, ...]) -> Condition:
    names = condition.parts() if drop == ("all",) else drop
    everywhere = torch.ones(len(condition), dtype=torch.bool, device=condition.vec.device)
    return condition.mix(null, dict.fromkeys(names, everywhere))


def _drop_branches(state: State) -> State:
    """Leave branches behind that no remaining scale needs."""
    alive = state.guidance.alive(state.schedule, state.k)
    if alive == state.branches:
        return state
    count = len(state.f_hat)
    rows = torch.cat([torch.arange(count) + state.branches.index(b) * count for b in alive]).to(state.f_hat.device)
    state.cache.select(rows)
    return replace(state, prepared=state.prepared.select(rows), branches=alive)


def _copy(generator: torch.Generator) -> torch.Generator:
    copy = torch.Generator(generator.device)
    copy.set_state(generator.get_state())
    return copy
