"""A system with the manners of a diffusers pipeline, for those who come from there: docs/coming-from-diffusers.md."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from nextscale.checkpoint import load, save
from nextscale.modules import as_module
from nextscale.pixels import on_white, to_uint8
from nextscale.sampling.defaults import SamplingDefaults
from nextscale.sampling.loop import sample
from nextscale.settings import STYLE, brief, whole_number
from nextscale.sharing import push_to_hub
from nextscale.system import System, check_system

MOST_IMAGES = 100_000
OUTPUTS = ("pil", "pt", "np")


@dataclass(frozen=True)
class PipelineOutput:
    """images: a list of Pillow images, a tensor [B, 3, H, W] or an array [B, H, W, 3], the two of floats in [0, 1]."""

    images: Any


class Pipeline:
    """`pipe = ns.Pipeline.from_pretrained("emoji-64")`, then `pipe("cat-face").images[0]`.

    A thin cover of `ns.sample`; `pipe.system` is the system, for everything else.
    """

    def __init__(self, system: System) -> None:
        check_system(system)
        system.need_model()
        self.system = system
        self._computes_on: torch.device | None = None

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        revision: str | None = None,
    ) -> Pipeline:
        """A pipeline around `ns.load(name)`; `torch_dtype` is an older name of `dtype`."""
        return cls(load(name, device=device, dtype=dtype or torch_dtype, revision=revision))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """`ns.save` of the system."""
        return save(self.system, folder)

    def push_to_hub(self, repo: str, **options: Any) -> str:
        """`ns.push_to_hub` of the system."""
        return push_to_hub(self.system, repo, **options)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._computes_on or self.system.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the transformer's weights."""
        return next(as_module(self.system.need_model()).parameters()).dtype

    def to(self, *places: Any, device: Any = None, dtype: torch.dtype | None = None) -> Pipeline:
        """Move to a device, or to a floating type for sampling, or both; returns itself."""
        for place in places:
            if isinstance(place, torch.dtype):
                dtype = place
            else:
                device = place
        if dtype not in (None, torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"dtype: expected torch.float32, float16 or bfloat16, got {dtype}")
        if device is not None:
            self.system.to(device)
            self._computes_on = None
        if dtype == torch.float32:
            self.system.float()
        elif dtype is not None:
            self.system.half_(dtype)
        return self

    def enable_model_cpu_offload(self, device: str | torch.device = "cuda") -> None:
        """Keep the system on the CPU between calls: each moves it to `device` and back. On the CPU there is nothing to do."""
        device = torch.device(device)
        self.system.to("cpu")
        self._computes_on = None if device.type == "cpu" else device

    def __call__(
        self,
        prompt: Any = None,
        *,
        label: Any = None,
        style: Any = None,
        num_images_per_prompt: int = 1,
        guidance_scale: float | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: Literal["pil", "pt", "np"] = "pil",
        callback_on_step_end: Callable[[Pipeline, int, int, dict[str, Any]], Any] | None = None,
        return_dict: bool = True,
        **options: Any,
    ) -> Any:
        """Draw images.

        Args:
            prompt: what a system is told first: prompts, or of a system of classes names and numbers; one, or a list.
            label: the same, for systems of classes. style: of systems that are told one; one, or a list.
            num_images_per_prompt: images for each.
            guidance_scale: guidance weight; 1 is off. Default: the system's own.
            generator: from which each image gets its seed, or one an image; default: torch's own.
            output_type: "pil", "pt" (floats [B, 3, H, W] in [0, 1]) or "np" (floats [B, H, W, 3]).
            callback_on_step_end: called as (pipeline, k, scales, {"images": [B, 3, H, W] in [-1, 1]}) after each scale.
            return_dict: False: a tuple of the images alone.
            options: what else `ns.sample` takes, such as `pick`.

        Raises ValueError for what the system cannot be told.
        """
        if (prompt is None) == (label is None):
            raise ValueError(f"give either a prompt or a label, got {'neither' if prompt is None else 'both'}")
        if output_type not in OUTPUTS:
            raise ValueError(f"output_type: expected {', '.join(OUTPUTS)}, got {brief(output_type)}")
        count = whole_number("num_images_per_prompt", num_images_per_prompt, 1, MOST_IMAGES)
        told = self._told(prompt if label is None else label, style, count)
        if guidance_scale is not None:
            options["guidance"] = self._guidance(guidance_scale)
        scales = len(self.system.schedule)
        if callback_on_step_end is not None:
            options["on_scale"] = lambda k, images: callback_on_step_end(self, k, scales, {"images": images})
        seeds = _seeds(generator, len(next(iter(told.values()))))
        if self._computes_on is not None:
            self.system.to(self._computes_on)
        try:
            images = sample(self.system, told, seed=seeds, **options).cpu()
        finally:
            if self._computes_on is not None:
                self.system.to("cpu")
        found = _as(images, output_type)
        return PipelineOutput(found) if return_dict else (found,)

    def _told(self, first: Any, style: Any, count: int) -> Mapping[str, list[Any]]:
        """What is said of each image."""
        labels = {next(iter(self.system.readers)): first}
        if style is not None:
            labels[STYLE] = style
        return {
            name: [one for one in values for _ in range(count)] for name, values in self.system.told(labels).items()
        }

    def _guidance(self, weight: float) -> Any:
        own: Any = self.system.sampling
        settings = own if isinstance(own, SamplingDefaults) else SamplingDefaults()
        return type(settings).model_validate(settings.model_dump() | {"guidance": weight}).options()["guidance"]


def _seeds(generator: Any, count: int) -> list[int]:
    """A seed for each image."""
    several = list(generator) if isinstance(generator, Sequence) else [generator] * count
    if len(several) != count or not all(one is None or isinstance(one, torch.Generator) for one in several):
        raise ValueError(
            f"generator: expected a torch.Generator, or one for each of {count} images, got {brief(generator)}"
        )
    device = [one.device if one is not None else "cpu" for one in several]
    return [int(torch.randint(2**62, (), generator=one, device=at)) for one, at in zip(several, device, strict=True)]


def _as(images: Tensor, kind: str) -> Any:
    from PIL import Image

    if kind == "pil":
        return [Image.fromarray(pixels) for pixels in to_uint8(on_white(images)).permute(0, 2, 3, 1).numpy()]
    unit = ((images + 1) / 2).clamp(0, 1)
    return unit if kind == "pt" else unit.permute(0, 2, 3, 1).numpy()
