"""The 2015 Inception network: resize, architecture, outputs, and the file of its weights. All weights here are random."""

import hashlib
import math
import pickle
import re
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from nextscale.evaluation import inception
from nextscale.evaluation.inception import (
    FILE,
    ConvNormRelu,
    Inception2015,
    InceptionFeatures,
    load_inception,
    tf1_resize,
)


@pytest.fixture(scope="module")
def network() -> Inception2015:
    """Random weights that keep the size of the numbers, and BatchNorms that are not the identity."""
    torch.manual_seed(0)
    network = Inception2015()
    for module in network.modules():
        if isinstance(module, ConvNormRelu):
            torch.nn.init.kaiming_normal_(module.conv.weight, nonlinearity="relu")
            torch.nn.init.uniform_(module.bn.weight, 0.8, 1.2)
            torch.nn.init.normal_(module.bn.bias, std=0.1)
            torch.nn.init.normal_(module.bn.running_mean, std=0.1)
            torch.nn.init.uniform_(module.bn.running_var, 0.8, 1.2)
    return network


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def features(network: Inception2015, images: Tensor) -> InceptionFeatures:
    return network(images)


@pytest.fixture(scope="module")
def file(network: Inception2015, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(network.state_dict(), path)
    return path


# ---- the resize ----------------------------------------------------------------------------------------------------------


def resized_by_pixel(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """One channel, pixel by pixel, every step in float32."""
    one, (height, width) = np.float32, image.shape
    scales = one(height) / one(size[0]), one(width) / one(size[1])
    out = np.zeros(size, np.float32)
    for i in range(size[0]):
        y = one(i) * scales[0]
        top, bottom, down = math.floor(y), min(math.ceil(y), height - 1), y - np.floor(y)
        for j in range(size[1]):
            x = one(j) * scales[1]
            left, right, across = math.floor(x), min(math.ceil(x), width - 1), x - np.floor(x)
            upper = image[top, left] + (image[top, right] - image[top, left]) * across
            lower = image[bottom, left] + (image[bottom, right] - image[bottom, left]) * across
            out[i, j] = upper + (lower - upper) * down
    return out


def test_the_ramp_is_resized_without_half_pixel_centres():
    found = tf1_resize(torch.tensor([[[[0.0, 1.0], [2.0, 3.0]]]]), (4, 4))
    row = torch.tensor([0.0, 0.5, 1.0, 1.0])
    assert torch.equal(found[0, 0], torch.stack([row, row + 1, row + 2, row + 2]))


@pytest.mark.parametrize("size", [(29, 31), (5, 40), (7, 9), (3, 2), (1, 1)])
def test_the_resize_is_that_of_every_pixel(size):
    images = torch.rand(2, 2, 7, 9, generator=torch.Generator().manual_seed(1)) * 255
    found = tf1_resize(images, size)
    assert found.dtype == torch.float32 and found.shape == (2, 2, *size)
    for b, c in np.ndindex(2, 2):
        assert np.array_equal(found[b, c].numpy(), resized_by_pixel(images[b, c].numpy(), size))


def test_the_resize_of_other_inputs():
    images = torch.rand(1, 3, 6, 5, dtype=torch.float64)
    assert torch.equal(tf1_resize(images, (6, 5)), images.float())
    assert torch.equal(tf1_resize(torch.full((1, 3, 64, 48), 7.0), (299, 299)), torch.full((1, 3, 299, 299), 7.0))
    for wrong in (torch.zeros(3, 4, 4), torch.zeros(1, 3, 4, 4, dtype=torch.uint8), torch.zeros(1, 3, 0, 4)):
        with pytest.raises(ValueError, match=r"expected floats \[B, C, H, W\]"):
            tf1_resize(wrong, (4, 4))
    with pytest.raises(ValueError, match="expected a size"):
        tf1_resize(images, (0, 4))


# ---- the architecture ----------------------------------------------------------------------------------------------------


def test_names_and_shapes_are_those_of_the_port(network):
    state = {name: tuple(t.shape) for name, t in network.state_dict().items() if "num_batches_tracked" not in name}
    # 94 convolutions of a weight and four vectors, and the classifier.
    assert len(state) == 94 * 5 + 2
    # The published counts of Inception v3 without its classifier: 21,768,352, and Keras leaves out 17,216 scales.
    assert sum(p.numel() for p in network.parameters()) == 21_768_352 + 17_216 + 2048 * 1008 + 1008
    expected = {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
        "Conv2d_1a_3x3.bn.running_var": (32,),
        "Conv2d_2b_3x3.conv.weight": (64, 32, 3, 3),
        "Conv2d_3b_1x1.conv.weight": (80, 64, 1, 1),
        "Conv2d_4a_3x3.conv.weight": (192, 80, 3, 3),
        "Mixed_5b.branch_pool.conv.weight": (32, 192, 1, 1),
        "Mixed_5c.branch5x5_2.conv.weight": (64, 48, 5, 5),
        "Mixed_5d.branch3x3dbl_3.conv.weight": (96, 96, 3, 3),
        "Mixed_6a.branch3x3.conv.weight": (384, 288, 3, 3),
        "Mixed_6a.branch3x3dbl_3.conv.weight": (96, 96, 3, 3),
        "Mixed_6b.branch7x7_2.conv.weight": (128, 128, 1, 7),
        "Mixed_6d.branch1x1.conv.weight": (192, 768, 1, 1),
        "Mixed_6d.branch7x7dbl_2.conv.weight": (160, 160, 7, 1),
        "Mixed_6e.branch7x7dbl_5.conv.weight": (192, 192, 1, 7),
        "Mixed_7a.branch3x3_2.conv.weight": (320, 192, 3, 3),
        "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3),
        "Mixed_7b.branch3x3_2a.conv.weight": (384, 384, 1, 3),
        "Mixed_7b.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1),
        "Mixed_7c.branch3x3dbl_1.conv.weight": (448, 2048, 1, 1),
        "Mixed_7c.branch_pool.conv.weight": (192, 2048, 1, 1),
        "Mixed_7c.branch_pool.bn.weight": (192,),
        "fc.weight": (1008, 2048),
        "fc.bias": (1008,),
    }
    assert {name: state.get(name) for name in expected} == expected
    assert all(m.bn.eps == 0.001 for m in network.modules() if isinstance(m, ConvNormRelu))
    assert network.softmax_weight.shape == (2048, 1008)
    assert torch.equal(network.softmax_weight[5], network.fc.weight[:, 5])


def test_it_is_frozen_and_stays_in_eval_mode(network, features):
    assert not network.train().training and not any(module.training for module in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not features.pooled.requires_grad and network.name == "inception-2015-12-05"


def pooled_by_position(x: Tensor, *, maximum: bool) -> Tensor:
    """3x3 windows that end at the border of the map."""
    out = torch.empty_like(x)
    for i, j in np.ndindex(*x.shape[2:]):
        window = x[:, :, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2]
        out[:, :, i, j] = window.amax((2, 3)) if maximum else window.mean((2, 3))
    return out


@pytest.mark.parametrize(("name", "channels"), [("5b", 192), ("6d", 768), ("7b", 1280), ("7c", 2048)])
def test_pools_leave_out_what_lies_outside(network, name, channels):
    block = getattr(network, f"Mixed_{name}")
    x = torch.randn(
        1, channels, 5, 5, generator=torch.Generator().manual_seed(2)
    )  # a padded zero would change a maximum
    expected = block.branch_pool(pooled_by_position(x, maximum=name == "7c"))
    found = block(x)
    assert found.shape == (1, block.channels, 5, 5)
    torch.testing.assert_close(found[:, -expected.shape[1] :], expected, rtol=1e-4, atol=1e-5)


def test_a_block_by_hand(network):
    """Order of the chains, forks and BatchNorms, written out for one block."""
    block, x = network.Mixed_7b, torch.randn(1, 1280, 4, 4, generator=torch.Generator().manual_seed(3))

    def conv(name: str, x: Tensor) -> Tensor:
        part = block.get_submodule(name)
        weight, norm = part.conv.weight, part.bn
        x = F.conv2d(x, weight, padding=(weight.shape[2] // 2, weight.shape[3] // 2))
        scale, shift, mean, var = (
            t[:, None, None] for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        )
        return (((x - mean) / (var + 0.001).sqrt()) * scale + shift).clamp(min=0)

    short = conv("branch3x3_1", x)
    long = conv("branch3x3dbl_2", conv("branch3x3dbl_1", x))
    parts = [conv("branch1x1", x), conv("branch3x3_2a", short), conv("branch3x3_2b", short)]
    parts += [conv("branch3x3dbl_3a", long), conv("branch3x3dbl_3b", long)]
    parts.append(conv("branch_pool", pooled_by_position(x, maximum=False)))
    torch.testing.assert_close(block(x), torch.cat(parts, 1), rtol=1e-4, atol=1e-5)


# ---- the outputs ---------------------------------------------------------------------------------------------------------


def watched(network: Inception2015, images: Tensor) -> tuple[InceptionFeatures, dict[str, Tensor]]:
    """Its features, what the first convolution saw and what some parts returned."""
    seen: dict[str, Tensor] = {}

    def keep(name: str):
        def hook(module, inputs, output):
            seen[name], seen[f"{name} saw"] = output, inputs[0]

        return hook

    names = ("Conv2d_1a_3x3", "Conv2d_2b_3x3", "Mixed_5d", "Mixed_6d.branch1x1", "Mixed_7a", "Mixed_7c")
    hooks = [network.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        return network.features(images), seen
    finally:
        for hook in hooks:
            hook.remove()


def test_outputs_are_read_where_the_graph_reads_them(network, images, features):
    image = images[:1]
    found, seen = watched(network, image)
    sides = {"Conv2d_1a_3x3": 149, "Conv2d_2b_3x3": 147, "Mixed_5d": 35, "Mixed_6d.branch1x1": 17, "Mixed_7a": 8}
    assert {name: seen[name].shape[-1] for name in sides} == sides
    assert seen["Mixed_7c"].shape == (1, 2048, 8, 8)
    assert found.pooled.shape == (1, 2048) and found.spatial.shape == (1, 2023)
    assert found.pooled.dtype == found.spatial.dtype == torch.float32
    torch.testing.assert_close(found.pooled, F.avg_pool2d(seen["Mixed_7c"], 8)[:, :, 0, 0])
    spatial = found.spatial.reshape(1, 17, 17, 7)
    assert torch.equal(spatial, seen["Mixed_6d.branch1x1"][:, :7].permute(0, 2, 3, 1))
    assert torch.equal(found.spatial[0, 7 * (17 * 2 + 5) + 3], seen["Mixed_6d.branch1x1"][0, 3, 2, 5])
    assert found.spatial.min() == 0 and found.spatial.max() > 0  # after the ReLU
    expected = (tf1_resize(image.float(), (299, 299)) - 128) * 0.0078125
    assert torch.equal(seen["Conv2d_1a_3x3 saw"], expected)
    # The features of one image do not depend on the others.
    for one, both in zip(found, features, strict=True):
        torch.testing.assert_close(one, both[:1], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(both[0], both[1], rtol=1e-2)


def test_images_of_256_pixels_and_the_ends_of_the_range(network):
    images = torch.zeros(1, 3, 256, 256, dtype=torch.uint8)
    images[:, :, 128:] = 255
    found, seen = watched(network, images)
    saw = seen["Conv2d_1a_3x3 saw"]
    assert saw.min() == -1 and saw.max() == 127 / 128 and saw.shape == (1, 3, 299, 299)
    assert all(part.isfinite().all() for part in found)


def test_other_images_are_refused(network):
    for wrong in (torch.zeros(1, 3, 64, 64), torch.zeros(3, 64, 64, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"expected images \[B, 3, H, W\] of uint8"):
            network(wrong)
    with pytest.raises(ValueError, match=r"got torch.uint8 of shape \(1, 64, 64, 3\)"):
        network(torch.zeros(1, 64, 64, 3, dtype=torch.uint8))


# ---- the file of weights -------------------------------------------------------------------------------------------------


def same_state(first: Inception2015, second: Inception2015) -> bool:
    other = second.state_dict()
    return all(torch.equal(tensor, other[name]) for name, tensor in first.state_dict().items())


def test_weights_come_back(network, file):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_inception(file)
    assert same_state(network, loaded) and loaded.digest == hashlib.sha256(file.read_bytes()).hexdigest()
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())


def test_files_of_other_forms_come_back(network, tmp_path):
    """The older form of torch.save, safetensors; counters left out, and the second classifier there."""
    state = {name: t for name, t in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    state |= {"AuxLogits.fc.weight": torch.zeros(1008, 768), "AuxLogits.conv0.bn.num_batches_tracked": torch.tensor(3)}
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "new.safetensors")
    for name in ("old.pth", "new.safetensors"):
        assert same_state(network, load_inception(tmp_path / name))


def test_a_name_with_another_digest_gives_a_warning(file, tmp_path):
    content = file.read_bytes()
    start = hashlib.sha256(content).hexdigest()[:8]
    other = tmp_path / FILE
    other.symlink_to(file)
    with pytest.warns(UserWarning, match=f"starts with {start}, and its name says 6726825d"):
        load_inception(other)
    named = tmp_path / f"own-{start}.pth"
    named.symlink_to(file)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_inception(named)


def refused(path: Path, reason: str) -> None:
    """In one sentence that says which file is expected."""
    with pytest.raises(ValueError, match=reason) as caught:
        load_inception(path)
    message = str(caught.value)
    assert "\n" not in message and ". " not in message and len(message) < 700
    assert f"expected {FILE}" in message and "pytorch-fid" in message and path.name in message


def test_files_of_other_networks_are_refused(network, tmp_path):
    state = dict(network.state_dict())
    path = tmp_path / "weights.pth"
    # All that is wrong with a file is said at once.
    torchvision = {"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}
    without = {name: tensor for name, tensor in state.items() if not name.startswith("Mixed_7c.branch_pool")}
    torch.save(without | torchvision | {"head.weight": torch.zeros(1), 5: torch.zeros(1)}, path)
    refused(path, r"missing: Mixed_7c\.branch_pool\.conv\.weight, .* and 2 more; not expected: .?head\.weight.?, .?5")
    refused(path, r"of another shape: fc.weight \[1000, 2048\] instead of \[1008, 2048\], fc.bias")
    numbers = {
        "Conv2d_1a_3x3.bn.weight": torch.full((32,), torch.nan),
        "Conv2d_1a_3x3.bn.bias": torch.zeros(32).to_sparse(),
        "Conv2d_1a_3x3.bn.running_var": torch.zeros(32, dtype=torch.int64),
    }
    torch.save(numbers, path)
    refused(path, f"not of finite numbers: {', '.join(numbers)}\\)")
    torch.save({"a": torch.zeros(1)}, path)
    refused(path, r"missing: Conv2d_1a_3x3\.conv\.weight, .* and 469 more; not expected: .?a")


def test_damaged_files_are_refused(file, tmp_path, monkeypatch):
    path = tmp_path / "weights.pth"
    content = file.read_bytes()
    for data in (b"", b"hello", content[: len(content) // 2], pickle.dumps({"a": 1}, protocol=2)):
        path.write_bytes(data)
        refused(path, "no whole file of tensors alone")
    torch.save({"a": [1.0]}, path)
    refused(path, "no whole file of tensors alone")
    torch.save({"a": torch.zeros(100_000)}, path)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    refused(tmp_path / "packed.pth", "no whole file of tensors alone")
    monkeypatch.setattr(inception, "MAX_BYTES", 1000)
    refused(path, r"bytes, more than the 1,000 allowed")


def test_paths_without_a_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"is missing; expected {FILE}"):
        load_inception(tmp_path / "none.pth")
    with pytest.raises(IsADirectoryError, match=f"expected {FILE}"):
        load_inception(tmp_path)
    with pytest.raises(ValueError, match=re.escape("expected the path of")):
        load_inception(None)


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("form", ["zip", "plain pickle", "older", "beside the weights"])
def test_malicious_pickles_run_nothing(tmp_path, form):
    marker, path = tmp_path / "marker", tmp_path / "weights.pth"
    evil = Evil(marker)
    pickle.loads(pickle.dumps(evil))
    assert marker.exists()  # it works
    marker.unlink()
    if form == "plain pickle":
        path.write_bytes(pickle.dumps(evil, protocol=2))
    else:
        content = {"fc.bias": torch.zeros(1008), "evil": evil} if form == "beside the weights" else evil
        torch.save(content, path, _use_new_zipfile_serialization=form != "older")
    refused(path, "nothing in it was executed")
    assert not marker.exists()


def test_the_weights_are_fetched_once_and_checked(network, tmp_path, monkeypatch):
    """Only where the user asks; from a file here instead of the network."""
    import hashlib

    from nextscale.evaluation import inception

    source = tmp_path / "published.pth"
    torch.save({"a": torch.zeros(1)}, source)
    monkeypatch.setenv("NEXTSCALE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(inception, "URL", source.as_uri())
    with pytest.raises(OSError, match="could not be downloaded"):
        inception.fetch_inception()
    assert not list((tmp_path / "cache").iterdir())
    monkeypatch.setattr(inception, "FILE_HASH", hashlib.sha256(source.read_bytes()).hexdigest()[:8])
    found = inception.fetch_inception()
    assert found.read_bytes() == source.read_bytes()
    source.unlink()
    assert inception.fetch_inception() == found
