"""Make the bands of `nextscale check-run` from runs that went well.

    python tools/make_bands.py PRESET TOKENIZER_RUN BATCH_SIZE GENERATOR_RUN BATCH_SIZE

Writes nextscale/evaluation/bands.json; other presets in it stay.
"""

import json
import sys
from pathlib import Path

from nextscale.evaluation.normal import bands_of

FILE = Path(__file__).parent.parent / "nextscale" / "evaluation" / "bands.json"


def main(preset: str, tokenizer: str, tokenizer_batch: str, generator: str, generator_batch: str) -> None:
    known = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    known[preset] = {
        "tokenizer": bands_of(tokenizer, "tokenizer", int(tokenizer_batch)),
        "generator": bands_of(generator, "generator", int(generator_batch)),
    }
    FILE.write_text(json.dumps(known) + "\n", encoding="utf-8")
    print(FILE)


if __name__ == "__main__":
    if len(sys.argv) != 6:
        sys.exit(__doc__)
    main(*sys.argv[1:])
