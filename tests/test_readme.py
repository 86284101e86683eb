"""The README is run: its Python block, and the recipe of the guide. test_documents.py parses the commands."""

import re
import types
from pathlib import Path

import pytest
import torch

import nextscale as ns

README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.S | re.M)
    return [block for name, block in found if name == language]


@pytest.mark.parametrize("block", blocks("python"))
def test_python_blocks_run(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    assert (tmp_path / "grid.png").stat().st_size > 1000
    assert names["images"].shape == (8, 3, *names["system"].image_size)
    assert names["logits"].shape[1] == names["system"].schedule.length


def test_every_file_of_the_tree_exists():
    (tree,) = blocks("")
    root = Path(__file__).parent.parent
    for line in tree.splitlines():
        folder = root / "nextscale" if line.startswith(" ") else root
        for name in [line.split()[0], *re.findall(r"\w+\.py", line)]:
            assert (folder / name).exists(), name
    folders = {path.parent.name for path in (root / "nextscale").glob("*/*") if path.parent.name != "__pycache__"}
    assert folders <= {name.strip("/ ") for name in re.findall(r"^ +\w+/", tree, flags=re.M)}


def test_shipped_systems_say_their_licence():
    for name, folder in ns.shipped().items():
        card = (folder / "README.md").read_text()
        assert "CC BY-SA 4.0" in card and "OpenMoji" in card, name


def test_the_guides_recipe_works(tmp_path):
    """The whole recipe of docs/add-a-recipe.md trains, samples, is saved and loaded, as it stands there."""
    guide = (Path(__file__).parent.parent / "docs" / "add-a-recipe.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```", guide, flags=re.S | re.M)
    recipe = types.ModuleType("method")
    exec(compile(block, "add-a-recipe.md", "exec"), vars(recipe))
    system = recipe.build(recipe.PRESETS["tiny"](), seed=1)
    items = [{"image": torch.rand(3, 64, 64) * 2 - 1, "label": i % 10} for i in range(4)]
    config = ns.TrainConfig(steps=2, batch_size=2, warmup=1)
    tokenizer = recipe.build(system.config, seed=1, model=False)
    ns.train_tokenizer(tokenizer, items, config, out=tmp_path / "tokenizer", loss=recipe.TOKENIZER_LOSS)
    ns.train_model(system, items, config, out=tmp_path / "generator", val=items)
    again = ns.load(tmp_path / "generator" / "system", recipes={"method": recipe})
    assert torch.equal(ns.sample(again, [1, None], seed=3), ns.sample(system, [1, None], seed=3))
    assert recipe.build(recipe.tiny(num_classes=0)).model is None
