"""Systems on the Hugging Face hub: pushed with a model card, which says what a system is and how it came to be."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from nextscale.checkpoint import HUB_NAME, save
from nextscale.files import as_path, read_json
from nextscale.modules import as_module
from nextscale.settings import brief
from nextscale.system import System, check_system, find_recipe

UNKNOWN = "Not recorded."


def push_to_hub(
    system: System,
    repo: str,
    *,
    card: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    message: str = "Push a nextscale system",
    dtype: torch.dtype | None = None,
    token: str | None = None,
    endpoint: str | None = None,
) -> str:
    """Push a system to the Hugging Face hub: `config.json`, safetensors and a model card, in one commit. Returns the address.

    Args:
        repo: owner/name; made if it is not there.
        card: content of README.md; default: `model_card(system, repo)`.
        private: of a repository that is made.
        revision: branch to push to; default: the main one.
        dtype: stores floating weights in this type, as `ns.save` does.
        token: of the hub; default: that of `hf auth login` or HF_TOKEN. endpoint: address of another hub.

    Raises ValueError for names that there cannot be, PermissionError where the hub does not let you, ConnectionError where it
    does not answer.
    """
    from huggingface_hub import HfApi

    check_system(system)
    if not isinstance(repo, str) or not re.fullmatch(HUB_NAME, repo):
        raise ValueError(f"expected the name of a hub repository, owner/name, got {brief(repo)}")
    text = model_card(system, repo) if card is None else with_library(card)
    api = HfApi(endpoint=endpoint, token=token, library_name="nextscale")
    with tempfile.TemporaryDirectory() as place, answered(repo):
        folder = save(system, Path(place) / "system", dtype=dtype)
        (folder / "README.md").write_text(text, encoding="utf-8")
        api.create_repo(repo, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        # weights of parts that it has no more would be refused on loading
        api.upload_folder(
            repo_id=repo, folder_path=folder, revision=revision, commit_message=message, delete_patterns="*.safetensors"
        )
    return f"{api.endpoint}/{repo}" + (f"/tree/{revision}" if revision else "")


@contextmanager
def answered(repo: str) -> Iterator[None]:
    """What a hub does not let one do, in a sentence."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    try:
        yield
    except LocalTokenNotFoundError:
        raise PermissionError(f"cannot push to {repo}: no token of the hub; `hf auth login` keeps one") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status in (401, 403):
            raise PermissionError(
                f"cannot push to {repo}: the hub does not let you (status {status}); `hf auth login` with a token that may "
                "write, and check the owner's name"
            ) from error
        raise ConnectionError(
            f"cannot push to {repo}: the hub answered with status {status}; try again later"
        ) from error
    except Exception as error:
        # The hub's client has changed its HTTP library more than once.
        if not re.match("http|requests|urllib3", type(error).__module__):
            raise
        raise ConnectionError(f"cannot push to {repo}: the hub does not answer ({type(error).__name__})") from error


# ---- the model card ---------------------------------------------------------------------------------------------------


def model_card(
    system: System,
    name: str,
    *,
    data: str = "",
    command: str = "",
    report: Mapping[str, Any] | None = None,
    licence: str = "",
) -> str:
    """A model card: what the system is, how it is used, its data, command, metrics and licence.

    Args:
        name: what `ns.load` calls it.
        data, command: what it was trained on, and by which commands.
        report: what `ns.evaluate` returns, or `report.json` holds.
        licence: of the weights, as the hub names it ("cc-by-sa-4.0").
    """
    check_system(system)
    about = (find_recipe(system.recipe).__doc__ or "").strip().splitlines()[0]
    head = {
        "library_name": "nextscale",
        **({"license": licence} if licence else {}),
        "pipeline_tag": "text-to-image" if system.texts else "unconditional-image-generation",
        "tags": ["next-scale-prediction", "autoregressive", "image-generation", system.recipe],
    }
    height, width = system.image_size
    parts = {"tokenizer": system.tokenizer, "model": system.model}
    counts = {
        part: sum(p.numel() for p in as_module(module).parameters())
        for part, module in parts.items()
        if module is not None
    }
    sizes = ", ".join(f"{part} of {count:,} parameters" for part, count in counts.items())
    changed = "".join(f" Changed by {change.recipe}." for change in system.changes)
    return f"""---
{front_matter(head)}---

# {name.split("/")[-1]}

{about}

Images of {height}x{width} pixels; scales {system.schedule}, {system.schedule.length} tokens; {sizes}.{changed}

```python
import nextscale as ns

system = ns.load("{name}")
{_example(system)}
```

## Data

{data or UNKNOWN}

## Training

{f"```sh{chr(10)}{command.strip()}{chr(10)}```" if command else UNKNOWN}

## Metrics

{_metrics(report) if report else UNKNOWN}

## Licence

{licence or UNKNOWN}
"""


def front_matter(head: Mapping[str, Any]) -> str:
    """Metadata as YAML, of which JSON is a part."""
    return "".join(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in head.items())


def with_library(card: str) -> str:
    """A card whose metadata name nextscale as the library."""
    match = re.match(r"---\n(.*?)^---\n", card, flags=re.DOTALL | re.MULTILINE)
    if match is None:
        return f"---\nlibrary_name: nextscale\n---\n\n{card}"
    if re.search(r"^library_name:", match[1], flags=re.MULTILINE):
        return card
    return f"---\nlibrary_name: nextscale\n{match[1]}---\n{card[match.end() :]}"


def _example(system: System) -> str:
    if system.model is None:
        return 'tokens = ns.encode(system, ns.read_images("image.png", system.image_size))'
    said = next(iter(system.readers), "label")
    told = '"a red apple"' if said in system.texts else repr(next(iter(system.classes), 0))
    return f'ns.save_images(ns.sample(system, [{told}] * 4, seed=0), "grid.png")'


def _metrics(report: Mapping[str, Any]) -> str:
    """The scores of a report as a table."""
    rows: dict[str, float] = {}
    if scales := report.get("tokenizer"):
        rows["PSNR of reconstructions, dB"] = scales[-1]["psnr"]
    rows |= {name: value for name, value in report.get("scores", {}).items() if isinstance(value, float | int)}
    for between, scores in report.get("samples", {}).get("compared", {}).items():
        rows |= {f"{name} ({between})": value for name, value in scores.items() if isinstance(value, float | int)}
    lines = ["| measure | value |", "| --- | --- |", *(f"| {name} | {value:.4g} |" for name, value in rows.items())]
    return "\n".join(lines) if rows else UNKNOWN


def card_of_folder(
    system: System, folder: str | os.PathLike[str], name: str, *, report: Path | None = None, licence: str = ""
) -> str:
    """The model card in a system's folder, or one made of what a training and a report left there."""
    folder = as_path(folder, "the folder of a system")
    card = folder / "README.md"
    if card.is_file() and not report and not licence:
        return with_library(card.read_text(encoding="utf-8"))
    found = read_json(report / "report.json", most=50_000_000, expected="a report") if report else None
    data, command = "", ""
    run = folder.parent
    if folder.name == "system" and (run / "run.json").is_file():
        known = read_json(run / "run.json", most=10_000_000, expected="the settings of a run")
        if (run / "data.json").is_file():
            data = str(read_json(run / "data.json", most=10_000_000, expected="the data of a run").get("data", ""))
        settings = {key: known[key] for key in ("kind", "config", "loss", "augmentation") if key in known}
        command = f"# settings of the run\n{json.dumps(settings, indent=1)}"
    return model_card(system, name, data=data, command=command, report=found, licence=licence)
