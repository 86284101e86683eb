"""Make the bands of `nextscale check-run` from runs that went well.

    python tools/make_bands.py emoji-64 runs/tokenizer 12 runs/generator 16

Writes nextscale/evaluation/bands.json; other presets in it stay.
"""

import json
from pathlib import Path

import tyro

from nextscale.evaluation.normal import bands_of

FILE = Path(__file__).parent.parent / "nextscale" / "evaluation" / "bands.json"


def main(preset: str, tokenizer: Path, tokenizer_batch: int, generator: Path, generator_batch: int) -> None:
    """Write the bands of a preset; see the head of the file.

    Args:
        preset: what the runs trained
        tokenizer: folder of a tokenizer's run
        tokenizer_batch: its batch size
        generator: folder of a generator's run
        generator_batch: its batch size
    """
    known = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    known[preset] = {
        "tokenizer": bands_of(tokenizer, "tokenizer", tokenizer_batch),
        "generator": bands_of(generator, "generator", generator_batch),
    }
    FILE.write_text(json.dumps(known) + "\n", encoding="utf-8")
    print(FILE)


if __name__ == "__main__":
    tyro.cli(main, config=(tyro.conf.PositionalRequiredArgs,))
