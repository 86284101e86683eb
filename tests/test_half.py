"""Systems in half precision sample what they sample in float32, as far as rounding lets them."""

import pytest
import torch

import nextscale as ns

# What is the most that may differ, by dtype: mean KL divergence of the predictions in nats a token, share of tokens whose most
# likely choice differs, PSNR in dB of decoded images. What is measured is printed (-s).
MOST = {torch.bfloat16: (1e-3, 0.03, 50.0), torch.float16: (1e-4, 0.01, 65.0)}
LABELS = {"emoji-64": ["face-smiling", None], "emoji-64-text": ["a red apple", None]}


@pytest.mark.parametrize("dtype", MOST, ids=str)
@pytest.mark.parametrize("name", LABELS)
def test_half_precision_agrees_with_float32(name, dtype):
    full, half = ns.load(name), ns.load(name, dtype=dtype)
    labels, (divergence, other, psnr) = LABELS[name], MOST[dtype]
    tokens = ns.sample_tokens(full, labels, seed=0)
    expected, found = ns.logits(full, tokens, labels), ns.logits(half, tokens, labels)
    assert found.dtype == torch.float32  # logits are an island
    logs = expected.log_softmax(-1)
    images = ns.decode(half, tokens)
    measured = (
        float((logs.exp() * (logs - found.log_softmax(-1))).sum(-1).mean()),
        float((expected.argmax(-1) != found.argmax(-1)).float().mean()),
        float(ns.psnr(images, ns.decode(full, tokens)).min()),
    )
    print(f"{name} {dtype}: {measured[0]:.1e} nats, {measured[1]:.2%}, {measured[2]:.1f} dB")
    assert measured[0] < divergence
    assert measured[1] < other
    assert images.dtype == torch.float32 and measured[2] > psnr
    assert ns.sample(half, labels, seed=0).isfinite().all()


def test_what_stays_float32_and_what_does_not():
    system = ns.load("emoji-64", dtype=torch.bfloat16)
    types = {name: parameter.dtype for name, parameter in system.named_parameters()}
    islands = ("tokenizer.pyramid.", "model.head.")
    assert {types[name] for name in types if name.startswith(islands)} == {torch.float32}
    assert {types[name] for name in types if not name.startswith(islands)} == {torch.bfloat16}
    assert ns.encode(system, ns.sample(system, [0], seed=0))[0].dtype == torch.int64
    with pytest.raises(ValueError, match="dtype: expected"):
        ns.load("emoji-64", dtype=torch.int8)


def test_saved_in_half_precision_and_loaded_again(tmp_path):
    system = ns.load("emoji-64", dtype=torch.bfloat16)
    again = ns.load(ns.save(system, tmp_path / "half"), dtype=torch.bfloat16)
    assert torch.equal(ns.sample(again, [1], seed=2), ns.sample(system, [1], seed=2))
