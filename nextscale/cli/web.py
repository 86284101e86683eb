"""`nextscale web`: a page in the browser."""

from __future__ import annotations

from typing import Annotated

import tyro

from nextscale.cli.options import Flat, Loading, check_device


def web(
    host: str = "127.0.0.1",
    port: Annotated[int | None, tyro.conf.arg(help_behavior_hint="(default: the first free one from 7860 on)")] = None,
    prompts: bool = False,
    loading: Annotated[Loading, Flat] = Loading(),
) -> None:
    """Serve a page that draws, edits, takes apart and varies images, scale by scale as they are made.

    Try: nextscale web
    Or: nextscale web --system runs/generator --with fastvar --port 8000

    Only this machine reaches it, unless --host says otherwise: 0.0.0.0 is all of its networks. It serves one visitor after the
    other. Nothing is fetched from elsewhere. Needs the extra nextscale[web].

    Args:
        host: address to serve at
        port: to serve at
        prompts: the shipped system that reads prompts, where no --system is named
    """
    if port is not None and not 1 <= port <= 65535:
        raise ValueError(f"--port must be from 1 to 65535, got {port}")
    check_device(loading.device)
    from nextscale.checkpoint import ChangeConfig
    from nextscale.web.page import build, launch
    from nextscale.web.repeat import Repeater
    from nextscale.web.studio import Studio

    loading = loading.told(["a prompt"] if prompts else [])
    system = loading.load()
    studio = Studio(system)
    changes = [ChangeConfig.model_validate_json(word) for word in loading.methods]
    page = build(studio, Repeater(studio, loading.name, changes, loading.dtype), loading.title(system))
    try:
        launch(page, host, port)
    except OSError as error:
        raise ValueError(
            f"cannot serve at {host}:{port or '7860 and the ports after it'} ({error}); give another --port"
        ) from None
