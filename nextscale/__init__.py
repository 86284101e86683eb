"""nextscale: next-scale visual autoregressive models. `import nextscale as ns`; torch is imported on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from nextscale.checkpoint import load as load
    from nextscale.checkpoint import save as save
    from nextscale.checkpoint import shipped as shipped
    from nextscale.data.emoji import emoji as emoji
    from nextscale.data.emoji import openmoji as openmoji
    from nextscale.data.folder import image_folder as image_folder
    from nextscale.data.hub import hub_images as hub_images
    from nextscale.data.images import image_grid as image_grid
    from nextscale.data.images import read_images as read_images
    from nextscale.data.images import save_images as save_images
    from nextscale.data.npz import npz_images as npz_images
    from nextscale.data.shards import web_shards as web_shards
    from nextscale.data.source import DataSource as DataSource
    from nextscale.data.source import open_images as open_images
    from nextscale.data.transforms import AugmentSettings as AugmentSettings
    from nextscale.evaluation.compare import compare as compare
    from nextscale.evaluation.image_sets import open_set as open_set
    from nextscale.evaluation.likelihood import evaluate_likelihood as evaluate_likelihood
    from nextscale.evaluation.reconstruction import evaluate_tokenizer as evaluate_tokenizer
    from nextscale.evaluation.report import evaluate as evaluate
    from nextscale.evaluation.sample_set import sample_set as sample_set
    from nextscale.evaluation.score import score as score
    from nextscale.evaluation.tuning import tune as tune
    from nextscale.output import psnr as psnr
    from nextscale.pipeline import Pipeline as Pipeline
    from nextscale.published.convert import load_official as load_official
    from nextscale.sampling.edit import class_edit as class_edit
    from nextscale.sampling.edit import inpaint as inpaint
    from nextscale.sampling.edit import keep_features as keep_features
    from nextscale.sampling.edit import keep_tokens as keep_tokens
    from nextscale.sampling.edit import outpaint as outpaint
    from nextscale.sampling.guidance import Guidance as Guidance
    from nextscale.sampling.guidance import apart as apart
    from nextscale.sampling.guidance import cfg as cfg
    from nextscale.sampling.guidance import cfg_ramp as cfg_ramp
    from nextscale.sampling.loop import finish as finish
    from nextscale.sampling.loop import run as run
    from nextscale.sampling.loop import sample as sample
    from nextscale.sampling.loop import sample_tokens as sample_tokens
    from nextscale.sampling.loop import start as start
    from nextscale.sampling.loop import step as step
    from nextscale.sampling.pick import greedy as greedy
    from nextscale.sampling.pick import gumbel_soft as gumbel_soft
    from nextscale.sampling.pick import multinomial as multinomial
    from nextscale.sampling.pick import tempered as tempered
    from nextscale.sampling.pick import top_k_top_p as top_k_top_p
    from nextscale.sampling.state import State as State
    from nextscale.sampling.vary import interpolate as interpolate
    from nextscale.sampling.vary import vary as vary
    from nextscale.schedule import Schedule as Schedule
    from nextscale.schedule import Span as Span
    from nextscale.sharing import push_to_hub as push_to_hub
    from nextscale.system import System as System
    from nextscale.system import decode as decode
    from nextscale.system import encode as encode
    from nextscale.system import find_recipe as find_recipe
    from nextscale.system import logits as logits
    from nextscale.tokens import Soft as Soft
    from nextscale.training.config import GeneratorLoss as GeneratorLoss
    from nextscale.training.config import TokenizerLoss as TokenizerLoss
    from nextscale.training.config import TrainConfig as TrainConfig
    from nextscale.training.verbs import train_model as train_model
    from nextscale.training.verbs import train_tokenizer as train_tokenizer

# Where each public name lives. Resolved on first use, so that importing nextscale (and `nextscale --help`) is instant.
_HOME = {
    "nextscale.checkpoint": ("load", "save", "shipped"),
    "nextscale.data.emoji": ("emoji", "openmoji"),
    "nextscale.data.folder": ("image_folder",),
    "nextscale.data.hub": ("hub_images",),
    "nextscale.data.images": ("image_grid", "read_images", "save_images"),
    "nextscale.data.npz": ("npz_images",),
    "nextscale.data.shards": ("web_shards",),
    "nextscale.data.source": ("DataSource", "open_images"),
    "nextscale.data.transforms": ("AugmentSettings",),
    "nextscale.evaluation.compare": ("compare",),
    "nextscale.evaluation.image_sets": ("open_set",),
    "nextscale.evaluation.likelihood": ("evaluate_likelihood",),
    "nextscale.evaluation.report": ("evaluate",),
    "nextscale.evaluation.reconstruction": ("evaluate_tokenizer",),
    "nextscale.evaluation.sample_set": ("sample_set",),
    "nextscale.evaluation.score": ("score",),
    "nextscale.evaluation.tuning": ("tune",),
    "nextscale.sampling.edit": ("class_edit", "inpaint", "keep_features", "keep_tokens", "outpaint"),
    "nextscale.published.convert": ("load_official",),
    "nextscale.sharing": ("push_to_hub",),
    "nextscale.output": ("psnr",),
    "nextscale.pipeline": ("Pipeline",),
    "nextscale.sampling.guidance": ("Guidance", "apart", "cfg", "cfg_ramp"),
    "nextscale.sampling.loop": ("finish", "run", "sample", "sample_tokens", "start", "step"),
    "nextscale.sampling.state": ("State",),
    "nextscale.sampling.vary": ("interpolate", "vary"),
    "nextscale.sampling.pick": ("greedy", "gumbel_soft", "multinomial", "tempered", "top_k_top_p"),
    "nextscale.schedule": ("Schedule", "Span"),
    "nextscale.system": ("System", "decode", "encode", "find_recipe", "logits"),
    "nextscale.tokens": ("Soft",),
    "nextscale.training.config": ("GeneratorLoss", "TokenizerLoss", "TrainConfig"),
    "nextscale.training.verbs": ("train_model", "train_tokenizer"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'nextscale' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
