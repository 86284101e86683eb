"""Sharing: a system pushed to a stand-in of the hub and loaded from there; model cards; the pipeline."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hub_server import TOKEN, running
from PIL import Image
from small import small

import nextscale as ns
from nextscale import cli
from nextscale.recipes.generators import infinity, var
from nextscale.sharing import model_card, with_library

CLASSES = ("cat", "dog", "horse")


@pytest.fixture(scope="module")
def system():
    return var.build(small(num_classes=3, classes=CLASSES), seed=1)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The stand-in, as the hub of this process."""
    import huggingface_hub.constants as constants

    with running() as (found, address):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found


# --- the hub ---


def test_what_is_pushed_is_loaded(system, hub):
    address = ns.push_to_hub(system, "me/tiny")
    assert address.endswith("/me/tiny") and not hub.private
    assert set(hub.files("me/tiny")) == {"README.md", "config.json", "model.safetensors", "tokenizer.safetensors"}
    again = ns.load("me/tiny")
    assert torch.equal(ns.sample(again, ["cat"], seed=3), ns.sample(system, ["cat"], seed=3))
    first = hub.branches["me/tiny"]["main"]

    other = var.build(small(num_classes=3, classes=CLASSES), seed=2)
    ns.push_to_hub(other, "me/tiny", revision="second", dtype=torch.float16)
    assert hub.branches["me/tiny"]["main"] == first  # the main branch stays
    second = ns.load("me/tiny", revision="second")
    assert not torch.equal(ns.sample(second, ["cat"], seed=3), ns.sample(system, ["cat"], seed=3))
    assert torch.equal(ns.sample(ns.load("me/tiny", revision=first), ["cat"]), ns.sample(system, ["cat"]))
    with pytest.raises(FileNotFoundError, match="did not give a repository of that name at 'third'"):
        ns.load("me/tiny", revision="third")


def test_weights_of_before_do_not_stay(system, hub):
    hub.repos["me/tiny"], hub.branches["me/tiny"] = {}, {}
    hub.commit("me/tiny", "main", {"extra.safetensors": b"old", "notes.txt": b"mine"})
    ns.push_to_hub(system, "me/tiny", private=True)
    assert "extra.safetensors" not in hub.files("me/tiny") and hub.files("me/tiny")["notes.txt"] == b"mine"


def test_private_repositories(system, hub):
    ns.push_to_hub(system, "me/secret", private=True)
    assert hub.private == {"me/secret"}


def test_what_the_hub_refuses_is_said(system, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(PermissionError, match=r"cannot push to me/tiny: the hub does not let you \(status 401\)"):
        ns.push_to_hub(system, "me/tiny")
    with pytest.raises(ConnectionError, match="the hub does not answer"):
        ns.push_to_hub(system, "me/tiny", endpoint="http://127.0.0.1:9")
    for name in ("tiny", "a/b/c", "me/", 5, "../x/y"):
        with pytest.raises(ValueError, match="owner/name"):
            ns.push_to_hub(system, name)
    with pytest.raises(ValueError, match="revision is of a hub repository"):
        ns.load("emoji-64", revision="main")


def test_push_from_the_command_line(system, hub, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ns.save(system, "run/system")
    (tmp_path / "run/run.json").write_text(json.dumps({"kind": "generator", "config": {"steps": 7}}))
    (tmp_path / "run/data.json").write_text(json.dumps({"data": "my-photos"}))
    (tmp_path / "report").mkdir()
    report = {"tokenizer": [{"psnr": 11.0}, {"psnr": 24.381}], "scores": {"kid_lite0": 3.5}}
    (tmp_path / "report/report.json").write_text(json.dumps(report))
    words = ["push", "run", "me/photos", "--report", "report", "--license", "cc-by-4.0"]
    assert cli.main(words) == 0, capsys.readouterr().err
    card = hub.files("me/photos")["README.md"].decode()
    for text in (
        'license: "cc-by-4.0"',
        'library_name: "nextscale"',
        "my-photos",
        '"steps": 7',
        "24.38",
        "kid_lite0 | 3.5",
    ):
        assert text in card
    assert cli.main(["sample", "--system", "me/photos", "--labels", "dog", "--count", "1", "--out", "a.png"]) == 0
    # a card of the folder goes along as it is
    (tmp_path / "run/system/README.md").write_text("# Mine\n")
    assert cli.main(["push", "run", "me/mine"]) == 0
    assert hub.files("me/mine")["README.md"].decode() == "---\nlibrary_name: nextscale\n---\n\n# Mine\n"
    assert cli.main(["push", "run", "mine"]) == 2 and "owner/name" in capsys.readouterr().err


# --- model cards ---


def test_model_cards_say_what_is_known_and_what_is_not(system):
    from huggingface_hub import ModelCard

    card = model_card(system, "me/tiny", data="photographs", command="nextscale train generator", licence="mit")
    found = ModelCard(card)
    assert found.data.library_name == "nextscale" and found.data.license == "mit" and "var" in found.data.tags
    assert 'ns.load("me/tiny")' in card and "['cat'] * 4" in card and "photographs" in card and "Not recorded." in card
    tokenizer = model_card(var.build(small(), model=False), "t")
    assert "ns.encode" in tokenizer and tokenizer.count("Not recorded.") == 4
    assert "text-to-image" in model_card(infinity.build(infinity.tiny()), "words")


def test_a_card_of_ones_own_names_the_library():
    assert with_library("---\nlicense: mit\n---\n# A\n") == "---\nlibrary_name: nextscale\nlicense: mit\n---\n# A\n"
    own = "---\nlibrary_name: nextscale\n---\n# A\n"
    assert with_library(own) == own
    shipped = (ns.shipped()["emoji-64"] / "README.md").read_text(encoding="utf-8")
    assert with_library(shipped) == shipped


# --- the pipeline ---


@pytest.fixture(scope="module")
def pipe(system, tmp_path_factory):
    return ns.Pipeline.from_pretrained(ns.save(system, tmp_path_factory.mktemp("pipeline") / "system"))


def test_a_pipeline_draws_what_sampling_does(pipe, system):
    generators = [torch.Generator().manual_seed(i) for i in range(4)]
    images = pipe(["cat", "dog"], num_images_per_prompt=2, generator=generators, guidance_scale=3.0).images
    assert len(images) == 4 and isinstance(images[0], Image.Image) and images[0].size == (32, 32)
    seeds = [int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(i))) for i in range(4)]
    guidance = system.sampling.model_copy(update={"guidance": 3.0}).options()["guidance"]
    expected = ns.sample(system, ["cat", "cat", "dog", "dog"], seed=seeds, guidance=guidance)
    found = np.stack([np.array(image) for image in images]).astype(int)
    assert (np.abs(found - ((expected + 1) * 127.5).permute(0, 2, 3, 1).round().numpy()) <= 1).all()


def test_one_generator_serves_all_and_moves_on(pipe):
    generator = torch.Generator().manual_seed(0)
    first = pipe(label="cat", num_images_per_prompt=2, generator=generator, output_type="pt").images
    second = pipe(label="cat", num_images_per_prompt=2, generator=generator, output_type="pt").images
    again = pipe(
        label="cat", num_images_per_prompt=2, generator=torch.Generator().manual_seed(0), output_type="pt"
    ).images
    assert torch.equal(first, again) and not torch.equal(first, second) and not torch.equal(first[0], first[1])
    assert first.shape == (2, 3, 32, 32) and first.min() >= 0 and first.max() <= 1
    (array,) = pipe("cat", output_type="np", return_dict=False)
    assert array.shape == (1, 32, 32, 3) and array.dtype == np.float32


def test_callbacks_see_every_scale(pipe, system):
    seen = []
    result = pipe(
        "dog", output_type="pt", callback_on_step_end=lambda p, k, n, more: seen.append((p, k, n, more["images"]))
    )
    assert [(p, k, n) for p, k, n, _ in seen] == [(pipe, k, 4) for k in range(4)]
    assert torch.equal((seen[-1][3] + 1).div(2).clamp(0, 1), result.images)


def test_a_pipeline_moves(pipe, system):
    half = ns.Pipeline(var.build(small(num_classes=3, classes=CLASSES), seed=1)).to("cpu", torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.device.type == "cpu" and half("cat").images
    assert half.to(torch.float32).dtype == torch.float32
    half.enable_model_cpu_offload("cpu")
    assert half.device.type == "cpu"
    pipe.save_pretrained  # noqa: B018 - there, as a user of diffusers expects
    with pytest.raises(ValueError, match="dtype: expected"):
        half.to(torch.int8)


def test_wrong_calls(pipe):
    for call, words in (
        ({}, "either a prompt or a label, got neither"),
        ({"prompt": "cat", "label": "dog"}, "got both"),
        ({"prompt": "cow"}, "cow"),
        ({"prompt": "cat", "output_type": "latent"}, "output_type"),
        ({"prompt": "cat", "num_images_per_prompt": 0}, "num_images_per_prompt"),
        ({"prompt": "cat", "generator": [torch.Generator()] * 2}, "generator: expected"),
        ({"prompt": "cat", "style": "noto"}, "told 'label', got 'style'"),
        ({"prompt": "cat", "guidance_scale": float("nan")}, "guidance"),
    ):
        with pytest.raises(ValueError, match=words):
            pipe(**call)
    with pytest.raises(TypeError, match="a system first"):
        ns.Pipeline(SimpleNamespace())
