"""Names, shapes and order of the entries of official state dicts, there and back.

The forks of the reference VAR code keep its names, so layouts share these maps.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from nextscale.checkpoint import explain_mismatch
from nextscale.contracts import Tokenizer
from nextscale.modules import as_module
from nextscale.tokenizer.autoencoder import SpatialAttention

# The order of the entries in official files: that of the words between their dots.
ORDER = (
    "encoder decoder quantize quant_conv post_quant_conv conv_in down mid up norm_out conv_out ema_vocab_hit_SV quant_resi "
    "qresi qresi_ls embedding pos_start pos_1LC lvl_1L attn_bias_for_masking word_embed class_emb lvl_embed shared_ada_lin "
    "blocks ada_gss block block_1 attn attn_1 block_2 downsample upsample ffn ada_lin head_nm head scale_mul_1H11 q_bias "
    "v_bias zero_k_bias mat_qkv norm1 conv1 norm2 conv2 nin_shortcut norm qkv proj proj_out fc1 fc2 conv weight bias"
)
PLACE = {word: place for place, word in enumerate(ORDER.split())}


# Our key name to the official one, or to those of several entries that follow each other in our tensor's first dimension.
Rename = Callable[[str], str | tuple[str, ...]]


def fill(
    module: nn.Module,
    state: Mapping[str, Tensor],
    layout: Mapping[str, Tensor],
    official: Rename,
    source: str,
    complete: bool,
    unread: Mapping[str, int],
) -> None:
    """Fill a module from official entries, which must have the names, shapes and derived values of `layout`.

    Of entries in `unread`, so many first dimensions may have any size, and the values may be any. `complete`: entries that
    follow from the settings may not be left out.
    """
    ours = module.state_dict()
    parts = {key: _names(official, key) for key in ours}
    names = {name for several in parts.values() for name in several}
    got = {name: tuple(tensor.shape) for name, tensor in state.items()}
    expected = {name: tuple(t.shape) for name, t in layout.items() if complete or name in names or name in state}
    for name, free in unread.items():
        if name in got and name in layout and got[name][free:] == tuple(layout[name].shape[free:]):
            expected[name] = got[name]
    explain_mismatch(got, expected, source, most=None)
    for name, tensor in state.items():
        if name in names:
            if not tensor.is_floating_point():
                raise ValueError(f"{name} in {source} must hold floating-point numbers, got {tensor.dtype}")
        elif name not in unread and not tensor.is_meta and not torch.equal(tensor.to(layout[name]), layout[name]):
            raise ValueError(
                f"{name} in {source} does not hold what follows from the model's settings; the file is damaged or comes "
                "from changed code, so its weights would compute something else here"
            )
    loaded = {}
    for key, several in parts.items():
        tensors = [state[name].detach().float() for name in several]
        whole = torch.cat(tensors) if len(tensors) > 1 else tensors[0]  # one alone may stay mapped to its file
        loaded[key] = whole.reshape(ours[key].shape).contiguous()
    module.load_state_dict(loaded, assign=True)
    module.requires_grad_(True)


def renamed(module: nn.Module, official: Rename) -> dict[str, Tensor]:
    """A module's entries under official names and in official shapes, which have more dimensions of size 1."""
    state: dict[str, Tensor] = {}
    for key, tensor in module.state_dict().items():
        names = _names(official, key)
        state |= zip(names, tensor.detach().chunk(len(names)), strict=True)
    for name, tensor in state.items():
        leaf = name.rsplit(".", 1)[-1]
        if leaf in ("pos_start", "pos_1LC"):
            state[name] = tensor.unsqueeze(0)  # [1, l, D]
        elif leaf == "mat_q":
            state[name] = tensor.unsqueeze(0)  # [1, N, head_dim]
        elif leaf == "scale_mul_1H11":
            state[name] = tensor.view(1, -1, 1, 1)
        elif leaf == "ada_gss":
            state[name] = tensor.view(1, 1, *tensor.shape[::2])  # [1, 1, 6, D]
    return state


def _names(official: Rename, key: str) -> tuple[str, ...]:
    found = official(key)
    return (found,) if isinstance(found, str) else found


def ordered(state: dict[str, Tensor]) -> dict[str, Tensor]:
    def place(name: str) -> list[int]:
        return [int(word) if word.isdecimal() else PLACE[word] for word in name.split(".")]

    return {name: state[name] for name in sorted(state, key=place)}


def rewrite(key: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


# What every descendant of VAR calls the same.
ADALN_KEYS = (
    (r"^positions\.scale", "lvl_embed"),
    (r"^embed_input", "word_embed"),
    (r"^shared_modulation\.linear", "shared_ada_lin.1"),
    (r"^head_modulation\.linear", "head_nm.ada_lin.1"),
    (r"^head\.linear", "head"),
    (r"modulation\.linear", "ada_lin.1"),
    (r"modulation\.offset", "ada_gss"),
)

MODEL_KEYS = (
    (r"^conditioner\.embedding", "class_emb"),
    (r"^positions\.start$", "pos_start"),
    (r"^positions\.table$", "pos_1LC"),
    *ADALN_KEYS,
    (r"branches\.0\.layer\.qkv", "attn.mat_qkv"),
    (r"branches\.0\.layer\.log_scale", "attn.scale_mul_1H11"),
    (r"branches\.0\.layer", "attn"),
    (r"branches\.1\.layer", "ffn"),
)


def model_key(key: str) -> str:
    """Our transformer's key names to the reference's."""
    return rewrite(key, MODEL_KEYS)


def tokenizer_key(tokenizer: Tokenizer, phi: int | str) -> Callable[[str], str]:
    """Our tokenizer's key names to the reference's; `phi` as in `PyramidSettings`."""
    phi_names: dict[int | str, str] = {"each": r"quantize.quant_resi.\1", 1: "quantize.quant_resi.qresi"}
    phi_name = phi_names.get(phi, r"quantize.quant_resi.qresi_ls.\1")
    rules = (
        (r"^pyramid\.codebook\.", "quantize.embedding."),
        (r"^pyramid\.phi\.(\d+)", phi_name),
        (r"\.middle\.0\.", ".mid.block_1."),
        (r"\.middle\.1\.", ".mid.attn_1."),
        (r"\.middle\.2\.", ".mid.block_2."),
        (r"\.shortcut\.", ".nin_shortcut."),
        (r"(attn[_.]\d\.)proj\.", r"\1proj_out."),
    )
    levels = down_up_levels(tokenizer)
    return lambda key: rewrite(levels(key), rules)


def down_up_levels(tokenizer: Tokenizer) -> Callable[[str], str]:
    """`rename_levels` for the names that go back to latent diffusion: `down`, and `up` counted from its end."""
    last = len(list(as_module(tokenizer).get_submodule("encoder.levels").children())) - 1
    return rename_levels(
        tokenizer, lambda side, i: f"encoder.down.{i}" if side == "encoder" else f"decoder.up.{last - i}", "block"
    )


def rename_levels(tokenizer: Tokenizer, level: Callable[[str, int], str], block: str) -> Callable[[str], str]:
    """Our names of the layers of levels to those of code that keeps a level's residual blocks and attentions in two lists.

    `level(side, i)`: its name of the i-th level of the encoder or decoder, in the order of processing; `block`: of the list
    of residual blocks.
    """
    places = {}
    for side in ("encoder", "decoder"):
        for i, layers in enumerate(as_module(tokenizer).get_submodule(f"{side}.levels").children()):
            blocks = attentions = 0
            for j, layer in enumerate(layers.children()):
                if isinstance(layer, SpatialAttention):
                    place, attentions = f"attn.{attentions}", attentions + 1
                elif hasattr(layer, "conv1"):
                    place, blocks = f"{block}.{blocks}", blocks + 1
                else:
                    place = "downsample" if side == "encoder" else "upsample"
                places[f"{side}.levels.{i}.{j}."] = f"{level(side, i)}.{place}."

    def rename(key: str) -> str:
        if found := re.match(r"(en|de)coder\.levels\.\d+\.\d+\.", key):
            key = places[found.group()] + key[found.end() :]
        return key

    return rename
