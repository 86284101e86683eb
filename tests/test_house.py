"""The house: rooms import downwards only, and the picture in the documents is that of the code."""

import ast
import importlib.util
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("house", ROOT / "tools" / "house.py")
house = importlib.util.module_from_spec(spec)
spec.loader.exec_module(house)


def test_no_arrow_leads_up_or_in_a_circle():
    assert house.faults() == []


def test_every_room_has_a_floor_and_a_line_in_architecture_md():
    rooms = {
        path.stem for path in (ROOT / "nextscale").iterdir() if not path.name.startswith("_") and path.name != "weights"
    }
    assert rooms == set(house.FLOOR)
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = text[text.index("| room, from") : text.index("## Contracts")]
    names = {f"`{room}.py`" if (ROOT / "nextscale" / f"{room}.py").exists() else f"`{room}/`" for room in rooms}
    assert {name for name in names if name not in table} == set()


def test_the_core_imports_no_recipe():
    assert [room for room, other in house.arrows() if other == "recipes" and room != "cli"] == []


def test_no_two_files_have_one_name():
    names = [path.name for path in (ROOT / "nextscale").rglob("*.py") if not path.name.startswith("__")]
    assert sorted(names) == sorted(set(names))


def test_no_two_classes_have_one_name():
    """But a recipe's settings, which are always its `Config`."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "nextscale").rglob("*.py")]
    names = [node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    assert [name for name, times in Counter(names).items() if times > 1] == ["Config"]


def test_architecture_md_lists_every_promise():
    """Each member of each contract stands in the list of docs/architecture.md."""
    from nextscale import contracts

    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    listed = text[text.index("## Contracts") : text.index("## Laws")]
    kinds = [kind for kind in vars(contracts).values() if getattr(kind, "_is_protocol", False)]
    assert len(kinds) > 20
    members = {name for kind in kinds for name in dir(kind) if not name.startswith("_")}
    members |= {name for kind in kinds for name in getattr(kind, "__annotations__", {})}
    assert sorted(name for name in members if name not in listed) == []


def test_the_picture_of_the_house_is_drawn_from_this_code(tmp_path):
    """Rooms and arrows, not pixels: fonts differ from machine to machine."""
    drawn = (ROOT / "docs" / "images" / "house.txt").read_text(encoding="utf-8").splitlines()
    assert drawn == house.listed()
