"""The command line: `nextscale COMMAND ...`.

Torch is imported inside the commands, when they run: help comes at once. Each command checks what it was given and
where it shall write before it starts to compute.
"""

from __future__ import annotations

import difflib
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import nextscale as ns
from nextscale.cli import about, bench, change, draw, run, sets, share, tune, web
from nextscale.cli.methods import explain, take_methods
from nextscale.cli.options import SHIPPED
from nextscale.cli.parse import parse
from nextscale.settings import cut, faults

HELP = """usage: nextscale COMMAND [options]

Next-scale visual autoregressive models: images are generated coarse to fine, one token map a step. A system is a
tokenizer (images to token maps and back) and a generator. SYSTEM is a name that ships with the package ({shipped}), a
folder that a training wrote, or a repository of the Hugging Face hub (owner/name).

examples:
  nextscale demo
  nextscale sample --labels "animals-nature,food-drink" --seed 7 --out grid.png --scales scales.png
  nextscale reconstruct dog.png --out out.png
  nextscale inpaint dog.png --box 0.25,0.25,0.75,0.75 --out inpainted.png
  nextscale sample --with fastvar --with.ratios 0.4,0.5
  nextscale train tokenizer --out runs/tokenizer

commands:
{commands}

`nextscale COMMAND --help` explains one. `nextscale --version` prints the version. Mistakes end in one line and exit
status 2; with NEXTSCALE_DEBUG=1 the traceback comes too."""

# The docstrings are the help.
COMMANDS: dict[str, Callable[..., None]] = {
    "sample": draw.sample,
    "reconstruct": draw.reconstruct,
    "inpaint": change.inpaint,
    "outpaint": change.outpaint,
    "edit": change.edit,
    "vary": change.vary,
    "train": run.train,
    "scaling": run.scaling,
    "curves": run.curves,
    "check-run": run.check_run,
    "evaluate": run.evaluate,
    "sample-set": sets.sample_set,
    "score": sets.score,
    "reference": sets.reference,
    "compare": sets.compare,
    "tune": tune.tune,
    "bench": bench.bench,
    "convert": run.convert,
    "save": run.save,
    "push": share.push,
    "info": about.info,
    "list": about.list_,
    "demo": draw.demo,
    "web": web.web,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (default: that of the process); returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):  # names of files may hold what the terminal cannot show
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            with _warnings_as_lines():
                _dispatch(words)
        finally:
            sys.stdout.flush()  # so that a closed pipe shows here, and not when Python ends
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as a program that SIGPIPE ends
    except KeyboardInterrupt as stop:
        print(str(stop) or "interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if _debugs():
            traceback.print_exc()
        text, status = _sentence(error)
        print(f"error: {text}", file=sys.stderr)
        return status
    return 0


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Show what nextscale warns of: `warning: text`, each text once, from one process. What other packages warn their
    developers of stays away. NEXTSCALE_DEBUG=1 shows everything, as Python does."""
    said: set[str] = set()

    def show(message: Warning | str, category: type[Warning], filename: str, *_: Any, **__: Any) -> None:
        text = cut(" ".join(str(message).split()), MOST)
        if issubclass(category, UserWarning) and not _foreign(filename) and text not in said and _first_process():
            from nextscale.progress import say

            said.add(text)
            say(f"warning: {text}")

    with warnings.catch_warnings():
        if not _debugs():
            warnings.showwarning = show
            warnings.simplefilter("always", UserWarning)  # once is decided above
        yield


def _debugs() -> bool:
    return os.environ.get("NEXTSCALE_DEBUG", "0") not in ("", "0")


def _foreign(filename: str) -> bool:
    """Whether a file is another package's."""
    parts = Path(filename).parts
    return any(place in ("site-packages", "dist-packages") and name != "nextscale" for place, name in pairwise(parts))


def _first_process() -> bool:
    """Of several that train together, and of those that load images for it."""
    loader = sys.modules["torch"].utils.data.get_worker_info() if "torch" in sys.modules else None
    return os.environ.get("RANK", "0") == "0" and (loader is None or loader.id == 0)


def _dispatch(words: list[str]) -> None:
    name, *rest = words or ["--help"]
    if name in ("-h", "--help"):
        print(_help())
    elif name == "--version":
        print(f"nextscale {ns.__version__}")
    elif name == "train":
        run.train(*rest)
    elif name == "scaling":
        run.scaling(*rest)
    elif name == "bench":
        bench.bench(*rest)
    elif name in COMMANDS:
        rest, methods = take_methods(rest)
        if methods and {"-h", "--help"} & set(rest):
            explain(name, methods)
            return
        rest += [word for method in methods for word in ("--with", method.word())]
        parse(COMMANDS[name], rest, f"nextscale {name}")()
    else:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        meant = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(COMMANDS)};"
        raise ValueError(f"unknown command {name!r}; {meant} `nextscale --help` explains them")


def _help() -> str:
    lines = [f"  {name:<12} {(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    return HELP.format(shipped=SHIPPED, commands="\n".join(lines))


MOST = 600  # characters of a message


def _sentence(error: Exception) -> tuple[str, int]:
    """What went wrong in one line, in the words of the library, and the exit status: 2 for what the user can mend, else 1."""
    from pydantic import ValidationError

    status = 2
    if isinstance(error, ValidationError):
        text = faults(error)
    elif isinstance(error, MemoryError) or "allocate memory" in str(error) or "out of memory" in str(error).lower():
        text = f"out of memory ({str(error).strip().splitlines()[0] if str(error).strip() else 'of the machine'}); "
        text += "lower --batch-size, --count or the sizes"
    elif isinstance(error, OSError) and error.strerror:
        name = str(error.filename or "")
        text = error.strerror if name in error.strerror else f"{error.strerror}: {name}"
    elif isinstance(error, (ValueError, FloatingPointError, OSError, ImportError)):
        text = str(error) or type(error).__name__
    else:
        lines = str(error).strip().splitlines()
        where = "" if os.environ.get("NEXTSCALE_DEBUG", "0") not in ("", "0") else "; NEXTSCALE_DEBUG=1 shows where"
        text, status = f"internal error: {type(error).__name__}: {cut(lines[0] if lines else '', 300)}{where}", 1
    line = "; ".join(part for part in map(str.strip, text.splitlines()) if part).replace(":; ", ": ")
    line = cut(line, len(line) * 10)
    # What to do stands at the end of most messages, what is wrong at the beginning: the middle can be missed.
    return (line if len(line) <= MOST else f"{line[: MOST - 160]} ... {line[-150:]}"), status
