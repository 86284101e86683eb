"""Many visitors at the page at once, and what its memory does over many requests. Prints JSON lines.

    python benchmarks/web_load.py --system emoji-64

Visitors ask through the page's own interface (gradio_client), which waits in the same queue as a browser does.
"""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tyro

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from browser import serving
from gradio_client import Client


def main(system: str = "emoji-64", visitors: int = 10, requests: int = 300, early: int = 30) -> None:
    """Ask the page for images.

    Args:
        system: what the page serves
        visitors: that ask at the same time
        requests: after which the memory is read again
        early: requests after which it is read first
    """
    with serving("--system", system) as (address, process):
        clients = [Client(address, verbose=False) for _ in range(visitors)]
        fields = parameters(clients[0])
        with ThreadPoolExecutor(visitors) as pool:
            began = time.monotonic()
            found = list(pool.map(lambda i: ask(clients[i], fields, 8, i, began), range(visitors)))
        errors = [one["error"] for one in found if one["error"]]
        report("parallel", visitors=visitors, errors=errors, waited_s=[one["seconds"] for one in found])
        asked, memory = visitors, {}
        while asked < requests:
            error = ask(clients[asked % visitors], fields, 2, asked, time.monotonic())["error"]
            errors += [error] if error else []
            asked += 1
            if asked in (early, requests):
                memory[asked] = resident(process.pid)
        growth = memory[requests] / memory[early] - 1
        report(
            "memory", requests=asked, errors=errors, mb={n: round(b / 1e6) for n, b in memory.items()}, growth=growth
        )


def ask(client: Any, fields: list[dict[str, Any]], count: int, seed: int, began: float) -> dict[str, Any]:
    """Ask for images of the label that the page begins with, and tell how long it took."""
    label = next(one for one in fields if one["label"] == "Labels")["parameter_default"][0]
    style, apart = (["any"], [None]) if any(one["label"] == "Style" for one in fields) else ([], [])
    try:
        pictures, _ = client.predict(
            [label], *style, count, seed, 2.5, 1.0, 50, 0.85, False, *apart, api_name="/generate"
        )
        error = "" if pictures.count("data:image/png") == 2 * count else "images are missing"
    except Exception as problem:  # whatever a visitor would see
        error = f"{type(problem).__name__}: {problem}"
    return {"seconds": round(time.monotonic() - began, 2), "error": error}


def parameters(client: Any) -> list[dict[str, Any]]:
    """The fields of what draws images."""
    return list(client.view_api(return_format="dict", print_info=False)["named_endpoints"]["/generate"]["parameters"])


def resident(pid: int) -> int:
    """Bytes of a process that lie in memory."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) * 1024


def report(what: str, **found: Any) -> None:
    print(json.dumps({"what": what, **found}), flush=True)


if __name__ == "__main__":
    tyro.cli(main)
