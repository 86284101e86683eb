"""What tokens see: attention by slices equals attention with the span's dense mask, with and without a cache."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from nextscale.condition import Condition
from nextscale.model.attention import KVCache, attend
from nextscale.recipes.generators import infinity, var
from nextscale.schedule import Schedule, Sight, Span

SCHEDULE = Schedule(((1, 1), (2, 2), (2, 3), (4, 4)))
SIGHTS = [Sight(), Sight(coarser=0), Sight(coarser=1), Sight(coarser=0, prefix=False), Sight(coarser=2, prefix=False)]
REAL = torch.tensor([[True] * 5, [True, True, False, False, False]])
EXACT = {"atol": 1e-5, "rtol": 0}  # other kernels sum in another order


def qkv(length: int) -> torch.Tensor:
    return torch.randn(3, 2, 4, length, 8, generator=torch.Generator().manual_seed(0))


def dense(q, k, v, mask):
    mask = mask if mask.ndim == 2 else mask[:, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.5)


@pytest.mark.parametrize("sight", SIGHTS, ids=str)
@pytest.mark.parametrize("prefix, real", [(0, None), (5, None), (5, REAL)])
def test_slices_equal_the_dense_mask_and_the_cache(sight, prefix, real):
    whole = dataclasses.replace(SCHEDULE.span(sight=sight), prefix=prefix, real=real)
    q, k, v = qkv(prefix + whole.end)
    expected = dense(q, k, v, whole.mask())
    torch.testing.assert_close(attend(q, k, v, whole, 0.5), expected, **EXACT)

    cache, found = KVCache(2, 4, prefix + whole.end, 8, q), []
    for step in (
        SCHEDULE.span(0, 2, sight),
        *(SCHEDULE.span(i, i + 1, sight) for i in (2, 3)),
    ):  # two scales at once, too
        span = dataclasses.replace(step, prefix=prefix, real=real)
        own = slice(prefix + span.begin - span.leading, prefix + span.end)
        found.append(attend(*(x[:, :, own] for x in (q, k, v)), span, 0.5, cache))
    torch.testing.assert_close(torch.cat(found, dim=2), expected, **EXACT)


def test_masks_by_hand():
    schedule = Schedule(((1, 1), (1, 2)))
    span = dataclasses.replace(schedule.span(sight=Sight(coarser=0)), prefix=1)
    own = [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [1, 0, 1, 1],
        [1, 0, 1, 1],
    ]  # the prefix, then the scales: nobody sees what is later
    assert span.mask().int().tolist() == own
    blind = dataclasses.replace(span, sight=Sight(coarser=0, prefix=False))
    assert blind.mask().int().tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    padded = dataclasses.replace(span, real=torch.tensor([[False]]))
    assert not padded.mask()[0, :, 0].any()
    kept = schedule.span(1, 2).keeping(torch.tensor([[1]]))
    assert kept.lengths == (1,) and kept.mask().int().tolist() == [[[1, 1]]]


def test_kept_tokens_attend_to_what_is_there():
    span = SCHEDULE.span(3, 4).keeping(torch.tensor([[0, 5, 7], [15, 2, 1]]))
    q, k, v = qkv(SCHEDULE.length)
    cache = KVCache(2, 4, SCHEDULE.length, 8, q)
    attend(*(x[:, :, :11] for x in (q, k, v)), SCHEDULE.span(0, 3), 0.5, cache)
    chosen = [x[:, :, 11:].gather(2, span.index[:, None, :, None].expand(-1, 4, -1, 8)) for x in (q, k, v)]
    found = attend(*chosen, span, 0.5, cache)
    keys, values = (torch.cat([x[:, :, :11], own], dim=2) for x, own in zip((k, v), chosen[1:], strict=True))
    torch.testing.assert_close(found, dense(chosen[0], keys, values, span.mask()), **EXACT)
    assert cache.length == 11 + 3


def test_bad_sights_and_spans():
    with pytest.raises(ValueError, match="coarser"):
        Sight(coarser=-1)
    with pytest.raises(ValueError, match="one scale at a time"):
        Span(SCHEDULE, 0, 2, index=torch.zeros(1, 1, dtype=torch.long))


def test_a_cache_is_a_value():
    """Forks share memory until two of them go on from the same place; what is not committed leaves no trace."""
    q, k, v = qkv(SCHEDULE.length)
    first, last = SCHEDULE.span(0, 1), SCHEDULE.span(1, 2)
    parent = KVCache(2, 4, 13, 8, q)
    attend(*(x[:, :, :1] for x in (q, k, v)), first, 0.5, parent)

    def go_on(cache, place):
        return attend(*(x[:, :, place : place + 4] for x in (q, k, v)), last, 0.5, cache)

    expected = [go_on(KVCacheCopy(parent), place) for place in (1, 5)]
    trial = parent.fork(commit=False)
    assert torch.equal(go_on(trial, 5), expected[1]) and parent.length == 1
    ahead, other = parent.fork(commit=False), parent.fork(commit=False)
    go_on(ahead, 1)
    go_on(other, 5)
    with pytest.raises(RuntimeError, match="looked ahead"):  # rather than wrong keys
        go_on(ahead, 1)
    one = parent.fork()
    assert torch.equal(go_on(one, 1), expected[0])
    assert one.memory is parent.memory  # after a trial, nothing needs a copy
    two = parent.fork()
    assert torch.equal(go_on(two, 5), expected[1])
    assert two.memory is not parent.memory and torch.equal(one.memory.room[0, :, :, :5], k[:, :, :5])
    turned = one.select(torch.tensor([1, 1]))
    assert torch.equal(turned.memory.room[1, :, :, :5], v[[1, 1], :, :5]) and one.length == turned.length


def KVCacheCopy(cache: KVCache) -> KVCache:  # noqa: N802
    """One that shares nothing."""
    return cache.select(torch.arange(cache.memory.room.shape[1]))


class Prefixed(torch.nn.Module):
    """A class condition with tokens before the image, of which the second row has fewer."""

    def __init__(self, inner, length, dim):
        super().__init__()
        self.inner = inner
        self.tokens = torch.nn.Parameter(torch.randn(length, dim, generator=torch.Generator().manual_seed(3)))

    def forward(self, labels) -> Condition:
        condition = self.inner(labels)
        prefix = self.tokens.expand(len(condition), -1, -1)
        mask = torch.arange(len(self.tokens)) < torch.tensor([[3], [2], [1]])[: len(condition)]
        return condition.replace({"prefix": mask}, prefix=prefix)


@pytest.mark.parametrize("recipe", [var, infinity], ids=["learned positions", "rotary"])
@pytest.mark.parametrize("sight", [Sight(), Sight(coarser=1)], ids=str)
def test_hidden_states_with_a_prefix(recipe, sight):
    """Training (one masked pass) and sampling (cached) agree, and padding changes nothing."""
    system = recipe.build(recipe.tiny(), seed=1)
    model, schedule = system.model, system.schedule
    labels = [0, 1, None] if recipe is var else ["a cat", "a dog", None]
    condition = system.condition(labels)
    prefixed = Prefixed(lambda _: condition, 3, model.settings.dim)(None)
    inputs = torch.randn(3, schedule.length - 1, system.tokenizer.pyramid.code_dim)
    with torch.no_grad():
        prepared = model.prepare(prefixed)
        whole = model.hidden(inputs, prepared, schedule.span(sight=sight))
        cache, steps = model.new_cache(prepared, schedule), []
        for k in range(len(schedule)):
            span = schedule.span(k, k + 1, sight)
            own = None if k == 0 else inputs[:, span.begin - 1 : span.end - 1]
            looked = model.hidden(own, prepared, span, cache, commit=False)  # a pass that is thrown away
            steps.append(model.hidden(own, prepared, span, cache))
            assert torch.equal(looked, steps[-1])
        torch.testing.assert_close(torch.cat(steps, dim=1), whole, atol=1e-4, rtol=0)
        shorter = prefixed.replace({"prefix": prefixed.masks["prefix"][:, :1]}, prefix=prefixed["prefix"][:, :1])
        last = model.hidden(inputs, model.prepare(shorter), schedule.span(sight=sight))[2]
        torch.testing.assert_close(last, whole[2], atol=1e-4, rtol=0)  # its other two tokens were padding
        assert (
            whole[0] - model.hidden(inputs, model.prepare(condition), schedule.span(sight=sight))[0]
        ).abs().max() > 1e-3
