"""Computing again and summing gradients in one place change no value and no gradient, and keep less."""

import pytest
import torch
import torch.nn.functional as F

from nextscale.model import lean
from nextscale.model.attention import attend
from nextscale.model.lean import Prefixes, QKNorm, checkpointed
from nextscale.recipes.generators import infinity, var
from nextscale.schedule import Schedule


@pytest.mark.parametrize("biased", [True, False])
def test_a_linear_layer_as_a_convolution_is_a_linear_layer(monkeypatch, biased):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 16, generator=generator, requires_grad=True)
    bias = torch.randn(24, generator=generator, requires_grad=True) if biased else None
    whole = torch.randn(2, 150, 32, generator=generator, requires_grad=True)
    wanted_by = [weight, whole, *([bias] if biased else [])]
    push = torch.randn(2, 150, 24, generator=generator)
    found = {}
    for way in (True, False):
        monkeypatch.setattr(lean, "convolutions_are_faster", lambda way=way: way)
        with torch.profiler.profile() as profile:
            out = lean.linear(whole[..., ::2], weight, bias)  # not contiguous
        convolutions = [event for event in profile.events() if "convolution" in event.name]
        assert bool(convolutions) == way
        gradients = torch.autograd.grad((out * push).sum(), wanted_by)
        assert all(gradient.is_contiguous() for gradient in gradients)
        found[way] = [out, *gradients]
    for ours, plain in zip(found[True], found[False], strict=True):
        # sums of 16 to 300 products in another order
        torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-5)


def test_sampling_and_other_precisions_use_the_plain_layer(monkeypatch):
    """Only training in float32 takes the other way, so what a trained system draws does not depend on the processor's name."""
    monkeypatch.setattr(lean, "convolutions_are_faster", lambda: pytest.fail("asked"))
    layer = lean.Linear(8, 8)
    with torch.inference_mode():
        layer(torch.randn(300, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(torch.randn(300, 8))
    layer.double()(torch.randn(300, 8, dtype=torch.double))
    lean.Linear(8, 8)(torch.randn(lean.FEW - 1, 8))


@pytest.mark.parametrize("shape", [None, (3, 1, 1), ()])
def test_unit_vectors_have_the_gradients_of_finite_differences(shape):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 5, dtype=torch.double, generator=generator, requires_grad=True)
    factor = None if shape is None else torch.rand(shape, dtype=torch.double, generator=generator).requires_grad_()
    torch.testing.assert_close(QKNorm.apply(x, factor), F.normalize(x, dim=-1) * (1 if factor is None else factor))
    assert torch.autograd.gradcheck(QKNorm.apply, (x, factor))


def test_unit_of_nothing_is_nothing():
    x = torch.zeros(1, 2, 3, 4, requires_grad=True)
    QKNorm.apply(x, None).sum().backward()
    assert x.grad.isfinite().all()


def test_prefixes_have_the_gradients_of_slices():
    x = torch.randn(2, 3, 7, 4, dtype=torch.double, requires_grad=True)
    ends = [1, 3, 7]
    for prefix, end in zip(Prefixes.apply(x, ends), ends, strict=True):
        assert torch.equal(prefix, x[:, :, :end])
    assert torch.autograd.gradcheck(lambda x: Prefixes.apply(x, ends), (x,))


def test_attention_of_each_scale_equals_a_dense_mask_with_its_gradients():
    span = Schedule.squares(1, 2, 3).span()
    q, k, v = torch.randn(3, 2, 2, span.end, 8, dtype=torch.double, requires_grad=True).unbind(0)
    dense = F.scaled_dot_product_attention(q, k, v, attn_mask=span.mask(), scale=0.3)
    ours = attend(q, k, v, span, 0.3)
    torch.testing.assert_close(ours, dense)
    weights = torch.randn_like(ours)
    wanted = torch.autograd.grad((dense * weights).sum(), (q, k, v))
    torch.testing.assert_close(torch.autograd.grad((ours * weights).sum(), (q, k, v)), wanted)


def test_again_keeps_the_inputs_alone_and_does_not_repeat_the_last_product():
    linear = torch.nn.Linear(8, 4)
    x = torch.randn(16, 8, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        plain = linear(F.gelu(x)).sum()
    (wanted,) = torch.autograd.grad(plain, x)
    products = []
    linear.register_forward_hook(lambda *_: products.append("done"))  # only after the product
    lean = checkpointed(lambda x: linear(F.gelu(x)), x).sum()
    (found,) = torch.autograd.grad(lean, x)
    assert products == ["done"]
    assert kept.count((16, 8)) >= 2  # the plain way keeps x and its GELU
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("recipe", [var, infinity])
def test_a_training_step_keeps_no_activation_twice(recipe):
    """Of each block's wide hidden layer only what enters the GELU is kept, not what leaves it too."""
    config = recipe.tiny()
    system = recipe.build(config)
    model = system.model.train()
    hidden = model.blocks[0].branches[-1].layer.fc1.out_features
    span = system.schedule.span()
    inputs = torch.randn(2, span.end - 1, system.tokenizer.pyramid.code_dim)
    condition = system.condition(["cat", "dog"] if "caption" in system.readers else [0, 1])
    kept = []

    def keep(tensor):
        if tensor.shape[-1:] == (hidden,) and tensor.ndim == 3:
            kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        h = model.hidden(inputs, model.prepare(condition), span)
    h.sum().backward()
    assert model.blocks[0].branches[-1].layer.fc1.weight.grad.abs().sum() > 0
    assert len(set(kept)) <= len(model.blocks)
