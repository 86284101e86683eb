"""The tokenizer's parts against definitions written out by hand."""

import pytest
import torch
import torch.nn.functional as F

from nextscale.contracts import Kept, TrainablePyramid
from nextscale.schedule import Schedule
from nextscale.tokenizer.autoencoder import AutoencoderSettings, Decoder, Encoder
from nextscale.tokenizer.bits import BitPyramid
from nextscale.tokenizer.codebook import Codebook
from nextscale.tokenizer.plain import PlainPyramid, PlainSettings
from nextscale.tokenizer.pyramid import PyramidSettings, ResidualPyramid
from nextscale.tokenizer.tokenizer import ImageTokenizer
from nextscale.tokens import Soft


@pytest.mark.parametrize("cosine", [False, True])
def test_nearest_is_the_brute_force_answer(cosine):
    torch.manual_seed(0)
    book = Codebook(17, 5, cosine)
    with torch.no_grad():
        book.weight.normal_()
    x = torch.randn(2, 7, 5)
    if cosine:
        expected = F.cosine_similarity(x.unsqueeze(2), book.weight.view(1, 1, 17, 5), dim=-1).argmax(-1)
    else:
        expected = (x.unsqueeze(2) - book.weight).square().sum(-1).argmin(-1)
    assert torch.equal(book.nearest(x), expected)
    assert torch.equal(book.embed(expected), book.weight[expected])
    one_hot = F.one_hot(expected, 17).float()
    torch.testing.assert_close(book.embed(Soft(one_hot)), book.embed(expected))


@pytest.mark.parametrize(
    "pyramid, tokens",
    [
        (ResidualPyramid(PyramidSettings(codebook_size=4, code_dim=2), 1), torch.zeros(1, 4, 4)),
        (PlainPyramid(PlainSettings(codebook_size=4, code_dim=2)), torch.zeros(1, 4, 4)),
        (BitPyramid(2), torch.zeros(1, 4, 2, 2)),
    ],
)
def test_floats_are_soft_weights_only_if_they_say_so(pyramid, tokens):
    schedule = Schedule.squares(2)
    assert isinstance(pyramid, TrainablePyramid)
    f_hat = pyramid.start(1, schedule, "cpu")
    assert pyramid.add(f_hat, Soft(tokens), 0, schedule).shape == f_hat.shape
    for use in (lambda: pyramid.add(f_hat, tokens, 0, schedule), lambda: pyramid.choices(tokens)):
        with pytest.raises(ValueError, match=r"of an integer dtype, got torch.float32; .* ns.Soft"):
            use()


def test_phi_choice_of_the_published_schedule():
    """VAR's ten scales, four convolutions; scales 2 and 7 lie half-way between two ticks, and rounding decides."""
    pyramid = ResidualPyramid(PyramidSettings(codebook_size=4, code_dim=2), 10)
    schedule = Schedule.squares(1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    assert [pyramid.phi_index(k, schedule) for k in range(10)] == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]


def test_sum_of_contributions_and_residual():
    torch.manual_seed(0)
    schedule = Schedule(((1, 1), (2, 3), (4, 6)))
    pyramid = ResidualPyramid(PyramidSettings(codebook_size=16, code_dim=4, phi=2), 3)
    with torch.no_grad():
        pyramid.codebook.weight.normal_()
    f = torch.randn(2, 4, 4, 6)
    encoded = pyramid.encode(f, schedule)
    residual, f_hat = f, torch.zeros_like(f)
    for k, (h, w) in enumerate(schedule.sizes):
        small = F.adaptive_avg_pool2d(residual, (h, w)).flatten(2).mT
        ids = (small.unsqueeze(2) - pyramid.codebook.weight).square().sum(-1).argmin(-1)
        assert torch.equal(ids, encoded.tokens[k])
        h_map = pyramid.codebook.weight[ids].mT.reshape(2, 4, h, w)
        if k < 2:
            h_map = F.interpolate(h_map, size=(4, 6), mode="bicubic", align_corners=False)
        conv = pyramid.phi[pyramid.phi_index(k, schedule)]
        h_map = 0.5 * h_map + 0.5 * F.conv2d(h_map, conv.weight, conv.bias, padding=1)
        f_hat, residual = f_hat + h_map, residual - h_map
        torch.testing.assert_close(encoded.f_hats[k], f_hat)


def test_corrupt_changes_the_sum_but_not_the_tokens_of_its_own_scale():
    torch.manual_seed(0)
    schedule = Schedule.squares(1, 2, 4)
    pyramid = ResidualPyramid(PyramidSettings(codebook_size=16, code_dim=4), 3)
    with torch.no_grad():
        pyramid.codebook.weight.normal_()
    f = torch.randn(2, 4, 4, 4)
    clean = pyramid.encode(f, schedule)
    dirty = pyramid.encode(f, schedule, corrupt=lambda tokens, k: (tokens + 1) % 16 if k == 0 else tokens)
    assert torch.equal(clean.tokens[0], dirty.tokens[0])
    assert not torch.equal(clean.inputs[0], dirty.inputs[0])
    assert not torch.equal(clean.tokens[2], dirty.tokens[2])  # later scales correct what went wrong


def test_entropy_term_makes_codes_alike_in_use():
    """Two codes, one far away: the term pulls the unused one in and features apart."""
    torch.manual_seed(0)
    pyramid = ResidualPyramid(PyramidSettings(codebook_size=2, code_dim=2, phi_ratio=0), 1)
    with torch.no_grad():
        pyramid.codebook.weight.copy_(torch.tensor([[0.0, 0.0], [0.3, 0.0]]))
    f = (0.05 * torch.randn(4, 2, 2, 2)).requires_grad_()
    schedule, keep = Schedule.squares(2), Kept(torch.ones(4, 1, dtype=torch.bool))
    plain, sure = (pyramid.learn(f, schedule, keep, entropy=e) for e in (0.0, 1.0))
    assert torch.equal(plain.f_hat, sure.f_hat)
    gradient, codes = torch.autograd.grad(sure.loss - plain.loss, (f, pyramid.codebook.weight))
    assert codes[1, 0] > 0  # a step down the gradient brings the unused code nearer
    assert gradient.isfinite().all() and gradient.any()


def test_gradients_reach_codes_phi_and_encoder():
    torch.manual_seed(0)
    tokenizer = ImageTokenizer(
        AutoencoderSettings(width=8, multipliers=(1, 1), groups=4, blocks=1),
        ResidualPyramid(PyramidSettings(codebook_size=8, code_dim=4), 2),
    )
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    f = tokenizer.features(images)
    *_, (_, f_hat, _) = tokenizer.pyramid.walk(f, Schedule.squares(1, 4))
    (f_hat - f.detach()).square().mean().backward()
    assert tokenizer.pyramid.codebook.weight.grad.abs().sum() > 0
    assert tokenizer.pyramid.phi[0].weight.grad.abs().sum() > 0
    assert tokenizer.encoder.conv_in.weight.grad is None  # the residual is detached


def test_published_tokenizer_has_the_published_size():
    """108,948,355 parameters in VAR's `vae_ch160v4096z32`."""
    with torch.device("meta"):
        tokenizer = ImageTokenizer(AutoencoderSettings(), ResidualPyramid(PyramidSettings(), 10))
    assert sum(p.numel() for p in tokenizer.parameters()) == 108_948_355


@pytest.mark.parametrize("patch, multipliers, stride", [(1, (1, 1), 2), (4, (1,), 4), (2, (1, 2, 2), 8)])
def test_stride(patch, multipliers, stride):
    settings = AutoencoderSettings(width=8, groups=4, patch=patch, multipliers=multipliers, blocks=1)
    images = torch.rand(1, 3, 16, 32)
    f = Encoder(settings, 4)(images)
    assert settings.stride == stride and f.shape == (1, 4, 16 // stride, 32 // stride)
    assert Decoder(settings, 4)(f).shape == images.shape


def test_latent_and_around():
    settings = AutoencoderSettings(width=8, multipliers=(1, 1), groups=4, blocks=1, latent=6, around=1)
    pyramid = ResidualPyramid(PyramidSettings(code_dim=4), 2)
    tokenizer = ImageTokenizer(settings, pyramid)
    assert tokenizer.quant_conv.weight.shape == (4, 6, 1, 1)
    images = torch.rand(1, 3, 16, 16)
    assert tokenizer.decode(tokenizer.features(images)).shape == images.shape
    bare = ImageTokenizer(settings.model_copy(update={"latent": None, "around": 0}), pyramid)
    assert torch.equal(bare.features(images), bare.encoder(images))
    with pytest.raises(ValueError, match="around=0 leaves no convolution between 6 latent channels and codes of 4"):
        ImageTokenizer(settings.model_copy(update={"around": 0}), pyramid)


def test_wrong_sizes_say_what_to_do():
    tokenizer = ImageTokenizer(
        AutoencoderSettings(width=8, multipliers=(1, 1), groups=4, blocks=1),
        ResidualPyramid(PyramidSettings(code_dim=4), 2),
    )
    with pytest.raises(ValueError, match="multiples of 2 pixels, got 7x8"):
        tokenizer.features(torch.zeros(1, 3, 7, 8))
    with pytest.raises(ValueError, match="last scale"):
        tokenizer.encode(torch.zeros(1, 3, 16, 16), Schedule.squares(1, 4))
