"""Send the page 200 files that are no good, or that few programs expect; each has to end in an image or a sentence.

    python benchmarks/web_hostile.py

Truncated, huge, animated, CMYK, 16-bit, empty, SVG, text, turned by EXIF, bombs, and images with bytes changed. Prints a line
for each fault and the counts; exit status 0 only without faults.
"""

from __future__ import annotations

import io
import json
import random
import struct
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from browser import serving
from gradio_client import Client, handle_file

LONGEST = 700  # characters of a sentence
SLOWEST = 30.0  # seconds of one upload


def main(system: str = "emoji-64", count: int = 200) -> None:
    """Upload the files, by turns to be taken apart, varied and edited.

    Args:
        system: what the page serves
        count: files
    """
    outcomes: Counter[str] = Counter()
    faults = []
    with serving("--system", system) as (address, process), tempfile.TemporaryDirectory() as folder:
        client = Client(address, verbose=False, download_files=folder)
        styled = "'Style'" in str(client.view_api(return_format="dict", print_info=False))
        how = [None, *(["any"] if styled else []), 1, 0, 2.5, 1.0, 50, 0.85, False, *([None] if styled else [])]
        for i, (name, content) in zip(range(count), hostile_files(), strict=False):
            path = Path(folder) / f"{i}-{name}"
            path.write_bytes(content)
            file, began = handle_file(str(path)), time.monotonic()
            try:
                if i % 3 == 0:
                    found = client.predict(file, 3, api_name="/reconstruct")
                elif i % 3 == 1:
                    found = client.predict(file, 0.5, *how, api_name="/vary")
                else:
                    drawn = {"background": file, "layers": [file], "composite": None, "id": None}
                    found = client.predict(
                        drawn, "all of it, with its edges drawn out", 4, "tokens", *how, api_name="/edit"
                    )
                said = "image" if "data:image/png" in found[0] else "nothing"
            except Exception as problem:  # what a visitor would see
                said = str(problem)
            seconds = time.monotonic() - began
            fault = problem_with(said, seconds)
            outcomes["fault" if fault else "image" if said == "image" else "sentence"] += 1
            if fault:
                faults.append(f"{path.name}: {fault}: {said[:300]}")
            path.unlink()
            if process.poll() is not None:
                faults.append(f"{path.name}: the server died")
                break
    print("\n".join(faults))
    print(json.dumps({"files": count, **outcomes}))
    sys.exit(bool(faults))


def problem_with(said: str, seconds: float) -> str:
    """What is wrong with an outcome, or nothing."""
    if seconds > SLOWEST:
        return f"took {seconds:.0f} s"
    if said == "nothing" or not said:
        return "neither an image nor a sentence"
    if "Traceback" in said or "went wrong inside" in said or "show_error" in said:
        return "no sentence for a visitor"
    return "too long" if len(said) > LONGEST else ""


def hostile_files() -> Iterator[tuple[str, bytes]]:
    """Names and contents: one of each kind, then good ones with bytes changed or missing."""
    good = {kind: picture(kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")}
    yield "empty.png", b""
    yield "text.png", b"hello"
    yield "page.html", b"<html><script>alert(1)</script></html>"
    yield (
        "drawing.svg",
        b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9" height="9"/></svg>',
    )
    yield "entities.svg", b'<!DOCTYPE a [<!ENTITY b "bbbb"><!ENTITY c "&b;&b;">]><svg>&c;</svg>'
    yield "movie.mp4", b"\0\0\0\x18ftypmp42" + bytes(100)
    yield "archive.zip", b"PK\3\4" + bytes(40)
    yield "pickle.png", b"cos\nsystem\n(S'true'\ntR."
    yield "cmyk.jpg", saved(Image.new("CMYK", (64, 48), (10, 200, 30, 0)), "JPEG")
    yield "grey16.png", saved(Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64) * 16), "PNG")
    yield "float.tiff", saved(Image.fromarray(np.random.default_rng(0).random((32, 32), np.float32)), "TIFF")
    yield "one-bit.png", saved(Image.new("1", (40, 40), 1), "PNG")
    yield "palette.gif", saved(Image.new("P", (40, 40), 3), "GIF")
    yield "lab.tiff", saved(Image.new("LAB", (20, 20)), "TIFF")
    frames = [Image.new("RGB", (30, 30), colour) for colour in ("red", "green", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        content = io.BytesIO()
        frames[0].save(content, kind, save_all=True, append_images=frames[1:])
        yield f"animated.{kind.lower()}", content.getvalue()
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        yield f"turned-{turn}.jpg", saved(Image.new("RGB", (60, 30), "red"), "JPEG", exif=exif)
    yield "exif-broken.jpg", good["JPEG"][:2] + b"\xff\xe1\0\x10Exif\0\0II*\0\xff\xff\xff\xff" + good["JPEG"][2:]
    for width, height in ((1, 1), (1, 3000), (3000, 1), (2, 60000), (6000, 4000)):
        yield f"{width}x{height}.png", saved(Image.new("RGB", (width, height), "green"), "PNG")
    for width, height in ((10_000, 10_000), (60_000, 60_000), (2**31 - 1, 2**31 - 1), (0, 0)):
        yield f"bomb-{width}.png", png_of_zeros(width, height)
    yield "bomb.gif", b"GIF89a" + struct.pack("<HH", 65535, 65535) + good["GIF"][10:]
    yield "big-text.png", text_chunk(good["PNG"])
    draws = random.Random(0)
    while True:
        kind = draws.choice(list(good))
        content = bytearray(good[kind])
        if draws.random() < 0.5:
            name, content = "cut", content[: draws.randrange(1, len(content))]
        else:
            name = "changed"
            for _ in range(draws.randrange(1, 30)):
                content[draws.randrange(len(content))] = draws.randrange(256)
        yield f"{name}.{kind.lower()}", bytes(content)


def picture(kind: str) -> bytes:
    """A whole image in a format."""
    pixels = np.random.default_rng(1).integers(0, 256, (12, 16, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    return saved(Image.fromarray(pixels), kind)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def png_of_zeros(width: int, height: int) -> bytes:
    """A small PNG that says it has so many pixels, and holds about 10 MB of zeros."""
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(bytes(10_000_000), 9)), (b"IEND", b""))
    chunks = (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def text_chunk(png: bytes) -> bytes:
    """The PNG with a compressed text of 100 MB in it."""
    body = b"Comment\0\0" + zlib.compress(bytes(100_000_000), 9)
    chunk = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    return png[:33] + chunk + png[33:]


if __name__ == "__main__":
    tyro.cli(main)
