"""The page, of Gradio's parts. What they show is made in `studio.py`; here is what a visitor sees and touches."""

from __future__ import annotations

import os
import random
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from html import escape
from typing import Any

from torch import Tensor

from nextscale.extras import need
from nextscale.settings import faults
from nextscale.web.pictures import CSS, data_uri, gallery
from nextscale.web.repeat import Again, Repeater
from nextscale.web.studio import MOST_IMAGES, MOST_SEED, Asked, Drawn, Studio, marked
from nextscale.web.uploads import MOST_BYTES, MOST_SIDE, read_upload

need("web", "the page in the browser")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # nothing is told to anybody
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import gradio as gr  # noqa: E402 - it reads the environment as it is imported
from pydantic import ValidationError  # noqa: E402

MOST_WAITING = 64  # visitors in the queue
MOST_EDITED = 4  # images of one edit
FORGOTTEN = (600, 3600)  # look every 10 minutes for files of an hour ago
FITS = {"all of it, with its edges drawn out": "pad", "its middle": "crop", "all of it, in another shape": "stretch"}


def _uploaded(payload: Any) -> str | None:
    """The path of an image that a visitor sent; Gradio would open it."""
    return None if payload is None else payload.path


def _uploaded_drawing(editor: gr.ImageEditor) -> Callable[[Any], dict[str, Any] | None]:
    """The image and the strokes over it, as bytes or paths; Gradio would open them."""

    def read(payload: Any) -> dict[str, Any] | None:
        if payload is not None and payload.id is not None:
            payload = editor.blob_storage.pop(payload.id, None)
        if payload is None or payload.background is None:
            return None
        return {"image": _content(payload.background), "layers": [_content(one) for one in payload.layers or () if one]}

    return read


def _content(sent: Any) -> Any:
    return bytes(sent) if isinstance(sent, bytes | bytearray) else sent.path


def build(studio: Studio, repeater: Repeater, title: str) -> gr.Blocks:
    """The page of a system; `launch` serves it."""
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=FORGOTTEN) as page:
        gr.Markdown(f"# {title}\n{_summary(studio)}")
        if studio.draws:
            with gr.Tab("Generate"):
                _generate_tab(studio, repeater)
            with gr.Tab("Edit"):
                _edit_tab(studio, repeater)
        with gr.Tab("Reconstruct"):
            _reconstruct_tab(studio, repeater)
        if studio.draws:
            with gr.Tab("Variations"):
                _vary_tab(studio, repeater)
    return page.queue(max_size=MOST_WAITING, default_concurrency_limit=1)


def launch(page: gr.Blocks, host: str, port: int | None) -> None:
    """Serve the page until Ctrl-C, and print its address. Nothing is fetched from elsewhere."""
    theme = gr.themes.Default(
        primary_hue="blue", font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")
    )
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        max_file_size=MOST_BYTES,
        footer_links=["api"],
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        theme=theme.set(block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300"),
        css=CSS,
    )
    print(f"{address} - Ctrl-C ends it", flush=True)
    page.block_thread()


# ---- the tabs --------------------------------------------------------------------------------------------------------


def _generate_tab(studio: Studio, repeater: Repeater) -> None:
    told = _Told(studio, several=True)
    picking = _Picking(studio, count=8)
    draw, stop = _buttons("Draw")
    pictures, again = _shown()

    def generate(*values: Any) -> Iterator[tuple[str, str]]:
        asked = _asked(studio, told, picking, values)
        if studio.reads_texts and not asked.prompts:
            raise ValueError("say in words what to draw")
        yield from _pictures(studio.generate(asked), repeater.generate(asked), "nextscale")

    _runs(draw, stop, generate, [*told.parts, *picking.parts], [pictures, again], "generate", picking)


def _edit_tab(studio: Studio, repeater: Repeater) -> None:
    gr.Markdown("Upload an image, draw over what shall change, and say what to put there, or nothing.")
    drawing = gr.ImageEditor(
        label="Image",
        sources=("upload", "clipboard"),
        brush=gr.Brush(colors=["#ff0000"], default_size=60, color_mode="fixed"),
        transforms=(),
        layers=False,
        image_mode="RGBA",
        format="png",
        buttons=[],
    )
    drawing.preprocess = _uploaded_drawing(drawing)  # type: ignore[method-assign, assignment]
    told = _Told(studio)
    with gr.Accordion("How the image is seen", open=False):
        fit = gr.Radio(list(FITS), value=next(iter(FITS)), label="The system sees")
        blend = gr.Slider(0, 64, value=4, step=1, label="Pixels over which the change fades in")
        kept = gr.Radio(["tokens", "features"], value="tokens", label="Kept elsewhere")
    picking = _Picking(studio, count=2, most=MOST_EDITED)
    draw, stop = _buttons("Edit")
    pictures, again = _shown()

    def edit(sent: Any, fit: str, blend: int, kept: str, *values: Any) -> Iterator[tuple[str, str]]:
        asked = _asked(studio, told, picking, values)
        image, mask = _drawn(studio, sent)
        how = {"fit": _choice(FITS, fit), "blend": int(blend), "kept": kept}
        steps = studio.edit(image, mask, asked, **how)
        for images, words in _pictures(steps, repeater.edit(asked, how), "edited", large=True):
            yield images, words and words + _mask_link(mask)

    inputs = [drawing, fit, blend, kept, *told.parts, *picking.parts]
    _runs(draw, stop, edit, inputs, [pictures, again], "edit", picking)


def _reconstruct_tab(studio: Studio, repeater: Repeater) -> None:
    gr.Markdown("Upload an image, and see what its tokens say of it, scale by scale.")
    upload = _upload()
    sizes = [f"{height}x{width}" for height, width in studio.system.schedule.sizes]
    scales = gr.Slider(1, len(sizes), value=len(sizes), step=1, label="Scales")
    pictures, again = _shown()

    def reconstruct(path: Any, scales: int) -> Iterator[tuple[str, str]]:
        if path is None:  # taken away again
            yield "", ""
            return
        image = read_upload(path, studio.system.tokenizer.channels, studio.system.image_size)
        found = studio.reconstruct(image)
        scales = min(max(1, int(scales)), len(found))
        texts = [f"{size}, {score:.1f} dB" for size, (_, score) in zip(sizes, found, strict=True)]
        seen, score = found[scales - 1]
        status = f"Left the image, right what {scales} of {len(found)} scales give: {score:.2f} dB. Below, each."
        both = gallery([image, seen], ["the image", texts[scales - 1]], status, large=True, name="reconstruction")
        every = gallery([one for one, _ in found], texts, "", name="scale")
        yield both + every, _again(repeater.reconstruct(scales))

    does: dict[str, Any] = {
        "fn": _in_words(reconstruct),
        "inputs": [upload, scales],
        "outputs": [pictures, again],
        "concurrency_id": "system",
        "show_progress": "hidden",
    }
    upload.change(**does, api_name="reconstruct")
    scales.change(**does, trigger_mode="always_last", api_visibility="private")


def _vary_tab(studio: Studio, repeater: Repeater) -> None:
    gr.Markdown("Upload an image, and draw others like it: coarse scales stay, finer ones are drawn anew.")
    upload = _upload()
    strength = gr.Slider(0, 1, value=0.5, step=0.05, label="How much changes")
    told = _Told(studio)
    picking = _Picking(studio, count=8)
    draw, stop = _buttons("Vary")
    pictures, again = _shown()

    def vary(path: Any, strength: float, *values: Any) -> Iterator[tuple[str, str]]:
        asked = _asked(studio, told, picking, values)
        if path is None:
            raise ValueError("upload an image first")
        image = read_upload(path, studio.system.tokenizer.channels, studio.system.image_size)
        strength = float(strength)
        yield from _pictures(studio.vary(image, strength, asked), repeater.vary(asked, strength), "varied")

    inputs = [upload, strength, *told.parts, *picking.parts]
    _runs(draw, stop, vary, inputs, [pictures, again], "vary", picking)


# ---- what tabs are made of -------------------------------------------------------------------------------------------


class _Told:
    """The fields that say what to draw: labels, or a prompt; and a style, if the system is told one."""

    def __init__(self, studio: Studio, *, several: bool = False) -> None:
        self.studio = studio
        self.parts: list[Any] = []
        if studio.reads_texts:
            lines = "what to draw, in words" + ("; each line is a prompt of its own" if several else "")
            self.parts.append(gr.Textbox(label="Prompt", info=lines, lines=2 if several else 1, max_length=4000))
        else:
            self.parts.append(
                gr.Dropdown(
                    studio.choices,
                    label="Labels" if several else "Label",
                    info="type to search; none: nothing is said of the image",
                    value=studio.choices[:1] if several else None,
                    multiselect=several,
                    max_choices=MOST_IMAGES if several else None,
                )
            )
        if studio.styles:
            self.parts.append(gr.Dropdown(["any", *studio.styles], label="Style", value=studio.styles[0]))

    def read(self, values: Sequence[Any]) -> dict[str, Any]:
        """Fields of `Asked`."""
        said = values[0] or ()
        style = values[1] if self.studio.styles and values[1] != "any" else None
        if not self.studio.reads_texts:
            return {"labels": (said,) if isinstance(said, str) else tuple(said), "style": style}
        lines = tuple(line.strip() for line in str(said or "").splitlines() if line.strip())
        return {"prompts": lines, "style": style}


class _Picking:
    """The fields that say how to draw it."""

    def __init__(self, studio: Studio, count: int, most: int = MOST_IMAGES) -> None:
        own: Any = studio.system.sampling
        with gr.Row():
            self.count = gr.Slider(1, most, value=count, step=1, label="Images of each", min_width=140)
            self.seed = gr.Number(value=0, precision=0, minimum=0, maximum=MOST_SEED, label="Seed", min_width=140)
        self.fresh = gr.Checkbox(value=False, label="Another seed each time")
        with gr.Accordion("How tokens are drawn", open=False):
            most_guidance = max(20, 2 * own.guidance)
            self.named: dict[str, Any] = {
                "guidance": gr.Slider(0, most_guidance, own.guidance, step=0.1, label="Guidance", info="1: off"),
                "temperature": gr.Slider(0.05, 2, own.temperature, step=0.05, label="Temperature"),
                "top_k": gr.Number(own.top_k, precision=0, minimum=0, label="Top-k", info="0: all"),
                "top_p": gr.Slider(0, 1, own.top_p, step=0.01, label="Top-p", info="0: all"),
                "smooth": gr.Checkbox(own.smooth, label="Smooth", info="mix tokens softly instead of drawing one"),
            }
            if studio.styles:
                same = "empty: the same as for all"
                self.named["style_guidance"] = gr.Number(own.style_guidance, label="Guidance of the style", info=same)
        self.parts = [self.count, self.seed, *self.named.values()]

    def read(self, studio: Studio, values: Sequence[Any]) -> dict[str, Any]:
        """Fields of `Asked`."""
        count, seed, *settings = values
        given = dict(zip(self.named, settings, strict=True))
        if given["top_k"] is not None:
            given["top_k"] = int(given["top_k"])
        return {"count": int(count), "seed": int(seed or 0), "settings": studio.settings(**given)}


def _asked(studio: Studio, told: _Told, picking: _Picking, values: Sequence[Any]) -> Asked:
    """What the fields say."""
    middle = len(told.parts)
    return Asked(**told.read(values[:middle]), **picking.read(studio, values[middle:]))


def _buttons(name: str) -> tuple[gr.Button, gr.Button]:
    with gr.Row():
        return gr.Button(name, variant="primary"), gr.Button("Stop")


def _upload() -> gr.Image:
    upload = gr.Image(label="Image", sources=["upload", "clipboard"], type="filepath", buttons=[], height=280)
    upload.preprocess = _uploaded  # type: ignore[method-assign]
    return upload


def _shown() -> tuple[gr.HTML, gr.HTML]:
    """Where pictures and what repeats them are shown."""
    return gr.HTML(), gr.HTML()


def _runs(
    button: gr.Button,
    stop: gr.Button,
    function: Callable[..., Any],
    inputs: list[Any],
    outputs: list[Any],
    name: str,
    picking: _Picking,
) -> None:
    """Press a button, and the function draws; another stops it."""

    def fresh(wanted: bool, seed: Any) -> Any:
        return random.randrange(2**31) if wanted else seed

    chosen = button.click(
        fresh,
        [picking.fresh, picking.seed],
        picking.seed,
        queue=False,
        show_progress="hidden",
        api_visibility="private",
    )
    running = chosen.then(
        _in_words(function),
        inputs,
        outputs,
        api_name=name,
        concurrency_id="system",
        show_progress="minimal",
    )
    stop.click(None, cancels=[running], api_visibility="private")


def _pictures(steps: Iterator[Drawn], again: Again, name: str, *, large: bool = False) -> Iterator[tuple[str, str]]:
    """HTML of images as they come, and at last what repeats them."""
    for step in steps:
        height, width = step.size
        scale = f"scale {step.done} of {step.scales}, {height}x{width} tokens"
        status = f"Done in {step.seconds:.1f} s." if step.last else f"{scale}, {step.seconds:.1f} s"
        html = gallery(tuple(step.images), step.texts, status, finished=step.last, large=large, name=name)
        yield html, _again(again) if step.last else ""


def _again(again: Again) -> str:
    parts = [
        f"<details open><summary>{kind}</summary><pre>{escape(text)}</pre></details>"
        for kind, text in (("The command", again.command), ("The same in Python", again.python))
    ]
    return f'<div class="again">{"".join(parts)}</div>'


def _mask_link(mask: Tensor) -> str:
    address = data_uri((mask.byte() * 255)[None].expand(3, -1, -1), exact=True)
    return f'<p><a download="mask.png" href="{address}">download mask.png</a></p>'


def _drawn(studio: Studio, sent: Any) -> tuple[Tensor, Tensor]:
    """The image and the mask of what a visitor drew."""
    if sent is None:
        raise ValueError("upload an image first, then draw over what shall change")
    image = read_upload(sent["image"], studio.system.tokenizer.channels)
    layers = [read_upload(layer, 4) for layer in sent["layers"]]
    return image, marked(layers, (image.shape[1], image.shape[2]))


def _choice(choices: dict[str, str], word: str) -> str:
    if word not in choices:
        raise ValueError(f"expected one of {', '.join(choices)}, got {word!r}")
    return choices[word]


def _summary(studio: Studio) -> str:
    height, width = studio.system.image_size
    parts = studio.system.schedule
    kind = "A tokenizer" if not studio.draws else f"Told {'prompts' if studio.reads_texts else 'labels'}"
    style = " and a style" if studio.styles else ""
    return (
        f"{kind}{style}; images of {height}x{width} pixels in {len(parts)} scales, coarse to fine. "
        f"Larger uploads are worked on at up to {MOST_SIDE} pixels a side."
    )


# ---- errors in words -------------------------------------------------------------------------------------------------


def _in_words(function: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """The function, which gives one picture after another, with errors that are sentences for the visitor."""

    @wraps(function)
    def wrapped(*values: Any) -> Iterator[Any]:
        try:
            yield from function(*values)
        except Exception as error:
            raise _sentence(error) from None

    return wrapped


def _sentence(error: Exception) -> gr.Error:
    if isinstance(error, ValidationError):
        text = faults(error)
    elif isinstance(error, ValueError | OSError):
        text = str(error)
    else:  # a fault of ours: the visitor is told, and whoever runs the page sees where
        traceback.print_exception(error, file=sys.stderr)
        text = f"this went wrong inside ({type(error).__name__}); whoever runs the page can see where"
    return gr.Error(escape(text), print_exception=False, title="That cannot be done")
