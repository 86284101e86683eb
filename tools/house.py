"""The house, drawn from the code's own imports: rooms from the ground up, and who imports whom.

python tools/house.py --out docs/images/house.png
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import tyro

PACKAGE = Path(__file__).parents[1] / "nextscale"

# From the ground up. A room may import rooms of lower floors only; a room is a folder or a single file.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("settings",),
    ("files", "modules", "pixels", "progress", "extras", "lock"),
    ("tokens", "condition"),
    ("schedule", "draws"),
    ("system_settings", "aspect"),
    ("contracts",),
    ("features", "output", "readers", "sharded"),
    ("processes",),
    ("data", "tokenizer", "model"),
    ("system",),
    ("checkpoint", "sampling"),
    ("sharing",),
    ("pipeline",),
    ("encoded",),
    ("evaluation",),
    ("training",),
    ("published",),
    ("recipes",),
    ("web",),
    ("cli",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def room_of(module: str) -> str:
    """`nextscale.model.block` is in the room `model`."""
    return module.split(".")[1]


def imports(path: Path) -> Iterator[str]:
    """Modules of nextscale that a file imports, those inside functions included; what only type checkers read is left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    hidden = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("nextscale"):
            if node.module == "nextscale" or (PACKAGE / node.module.split(".", 1)[1].replace(".", "/")).is_dir():
                yield from (f"{node.module}.{alias.name}" for alias in node.names if not alias.name.startswith("_"))
            else:
                yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("nextscale."))


def arrows() -> dict[tuple[str, str], set[str]]:
    """Which room imports which other one, and the files that do."""
    found: dict[tuple[str, str], set[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        place = path.relative_to(PACKAGE)
        room = place.parts[0].removesuffix(".py")
        if room.startswith("__"):  # the public names, which live everywhere
            continue
        for module in imports(path):
            if (other := room_of(module)) != room:
                found.setdefault((room, other), set()).add(str(place))
    return found


def faults() -> list[str]:
    """Arrows that do not lead down, and rooms without a floor, in sentences."""
    sentences = []
    for (room, other), files in arrows().items():
        missing = [name for name in (room, other) if name not in FLOOR]
        if missing:
            sentences.append(f"{' and '.join(missing)}: no floor of tools/house.py has this room")
        elif FLOOR[other] >= FLOOR[room]:
            sentences.append(f"{', '.join(sorted(files))}: {room} imports {other}, which does not lie below it")
    return sentences


def needed() -> set[tuple[str, str]]:
    """The arrows that do not follow from others: those to rooms that no other imported room leads to."""
    direct = set(arrows())
    below: dict[str, set[str]] = {}
    for room in sorted(FLOOR, key=lambda name: FLOOR[name]):
        own = {other for first, other in direct if first == room}
        below[room] = own.union(*(below[other] for other in own))
    return {
        (room, other)
        for room, other in direct
        if not any(other in below[third] for first, third in direct if first == room)
    }


def draw(out: Path) -> None:
    """The picture: a box for each room, an arrow for each import that does not follow from other arrows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 11))
    places = {}
    for number, rooms in enumerate(FLOORS):
        for i, room in enumerate(rooms):
            places[room] = ((i + 1) / (len(rooms) + 1) * 10, float(number))
    for room, other in needed():
        straight = FLOOR[room] - FLOOR[other] == 1 or places[room][0] != places[other][0]
        style = {"arrowstyle": "-|>", "color": "#3465a4", "lw": 1.2, "shrinkA": 18, "shrinkB": 18}
        style |= {"connectionstyle": f"arc3,rad={0 if straight else 0.3}"}
        axes.annotate("", xy=places[other], xytext=places[room], arrowprops=style)
    for room, (x, y) in places.items():
        files = (
            [PACKAGE / f"{room}.py"] if (PACKAGE / f"{room}.py").exists() else sorted((PACKAGE / room).rglob("*.py"))
        )
        lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files)
        name = f"{room}.py" if len(files) == 1 else f"{room}/"
        box = {"boxstyle": "round,pad=0.4", "fc": "#fdf6e3", "ec": "#555753"}
        axes.text(x, y, f"{name}\n{lines} lines", ha="center", va="center", fontsize=9, bbox=box)
    axes.set(xlim=(0, 10), ylim=(-0.6, len(FLOORS) - 0.4))
    axes.axis("off")
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110, metadata={"Software": None})


def listed() -> list[str]:
    """The arrows in words, from the roof down."""
    return [f"{room} -> {other}" for room, other in sorted(arrows(), key=lambda pair: (-FLOOR[pair[0]], pair))]


def main(out: Path = Path("docs/images/house.png")) -> None:
    """Draw the house; if an arrow leads up, say so and draw nothing.

    Args:
        out: picture to write; the arrows in words go beside it
    """
    if wrong := faults():
        raise SystemExit("\n".join(wrong))
    draw(out)
    out.with_suffix(".txt").write_text("\n".join(listed()) + "\n", encoding="utf-8")
    print(out)


if __name__ == "__main__":
    tyro.cli(main)
