"""Images as HTML: the pixels are in the page itself, so nothing is stored, and each can be downloaded from where it stands."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

SEEN = 512  # pixels a side of an image on its way

CSS = """
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(9rem, 44%), 1fr)); gap: .75rem; margin: 0; }
.pictures.large { grid-template-columns: repeat(auto-fit, minmax(min(18rem, 100%), 1fr)); }
.pictures figure { margin: 0; }
.pictures img { width: 100%; height: auto; display: block; background: #fff; border: 1px solid #8888; border-radius: .25rem; }
.pictures figcaption { font-size: .875rem; overflow-wrap: anywhere; }
.pictures a { text-decoration: underline; color: inherit; }
.status { font-size: .875rem; margin: 0 0 .5rem; min-height: 1.5em; }
.again pre { white-space: pre-wrap; overflow-wrap: anywhere; }
"""


def gallery(
    images: Sequence[Tensor],
    texts: Sequence[str],
    status: str,
    *,
    finished: bool = True,
    large: bool = False,
    name: str = "image",
) -> str:
    """Images uint8 [3, H, W] with what they are. Finished ones are exact (PNG) and have a link to download them; those on
    their way are small and coarse (JPEG)."""
    figures = []
    for i, (image, text) in enumerate(zip(images, texts, strict=True)):
        address = data_uri(image, exact=finished)
        link = f' <a download="{escape(name)}-{i}.png" href="{address}">download</a>' if finished else ""
        figures.append(
            f'<figure><img alt="{escape(text)}" src="{address}"><figcaption>{escape(text)}{link}</figcaption></figure>'
        )
    kind = "pictures large" if large else "pictures"
    return f'<p class="status" role="status">{escape(status)}</p><div class="{kind}">{"".join(figures)}</div>'


def data_uri(image: Tensor, *, exact: bool) -> str:
    """The address of an image, uint8 [3, H, W], that holds it: PNG as it is, or JPEG of at most 512 pixels a side."""
    if not exact and max(image.shape[1:]) > SEEN:
        factor = SEEN / max(image.shape[1:])
        size = [max(1, round(side * factor)) for side in image.shape[1:]]
        image = F.interpolate(image[None].float(), size=size, mode="bilinear", antialias=True)[0].round().byte()
    buffer = io.BytesIO()
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    if exact:
        picture.save(buffer, "PNG")
    else:
        picture.save(buffer, "JPEG", quality=85)
    return f"data:image/{'png' if exact else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
