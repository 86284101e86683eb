"""The layout of the official Infinity code's state dicts, and its constructors' arguments.

Facts of github.com/FoundationVision/Infinity (MIT). Methods that build on that code keep its names, so recipes share this map.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from nextscale.published.keys import down_up_levels, rewrite
from nextscale.tokenizer.tokenizer import Tokenizer

# Arguments of the official tokenizer (`vae_model`; the last two are set inside it) and of its class Infinity, with their
# defaults.
VAE_ARGS: dict[str, Any] = {
    "codebook_dim": 32,
    "codebook_size": None,  # 2 ** codebook_dim
    "patch_size": 16,
    "encoder_ch_mult": (1, 2, 4, 4, 4),
    "decoder_ch_mult": (1, 2, 4, 4, 4),
    "base_ch": 128,
    "num_res_blocks": 2,
}
MODEL_ARGS: dict[str, Any] = {
    "text_channels": 0,
    "text_maxlen": 0,
    "embed_dim": 1024,
    "depth": 16,
    "num_heads": 16,
    "mlp_ratio": 4.0,
    "drop_rate": 0.0,
    "drop_path_rate": 0.0,
    "norm_eps": 1e-6,
    "rms_norm": False,
    "shared_aln": False,
    "head_aln": True,
    "cross_attn_layer_scale": -1.0,
    "nm0": False,
    "cos_attn": True,
    "swiglu": False,
    "head_depth": 1,
    "block_chunks": 1,
    "add_lvl_embeding_only_first_block": 1,
    "use_bit_label": 1,
    "rope2d_each_sa_layer": 0,
    "rope2d_normalized_by_hw": 0,
    "pn": None,
    "apply_spatial_patchify": 0,
}
# More arguments, which do not change the numbers that a model computes.
IGNORED = {
    *("vqgan_ckpt", "schedule_mode", "test_mode", "vae_local", "selecting_idx", "cond_drop_rate", "rand_uncond", "tau"),
    *("raw_scale_schedule", "top_p", "top_k", "customized_flash_attn", "fused_mlp", "fused_norm", "checkpointing"),
    *("pad_to_multiplier", "use_flex_attn", "batch_size", "train_h_div_w_list", "video_frames"),
    *("always_training_scales", "inference_mode"),
}
# What every published model and its scripts set.
PUBLISHED_ARGS: dict[str, Any] = {
    "text_channels": 2048,
    "text_maxlen": 512,
    "shared_aln": True,
    "drop_path_rate": 0.1,
    "rope2d_each_sa_layer": 1,
    "rope2d_normalized_by_hw": 2,
}
# What no published model changes, and ours cannot be: the only values.
FIXED: dict[str, Any] = {
    "head_aln": True,
    "nm0": False,
    "cos_attn": True,
    "swiglu": False,
    "head_depth": 1,
    "use_bit_label": 1,
    "rope2d_each_sa_layer": 1,
}

KEYS = (
    (r"^conditioner\.null_text$", "cfg_uncond"),
    (r"^conditioner\.norm", "text_norm"),
    (r"^conditioner\.pool\.query$", "text_proj_for_sos.ca.mat_q"),
    (r"^conditioner\.pool\.kv", "text_proj_for_sos.ca.mat_kv"),
    (r"^conditioner\.pool", "text_proj_for_sos.ca"),
    (r"^conditioner\.project", "text_proj_for_ca"),
    (r"^positions\.start$", "pos_start"),
    (r"^positions\.scale", "lvl_embed"),
    (r"^embed_input", "word_embed"),
    (r"^shared_modulation\.linear", "shared_ada_lin.1"),
    (r"^head_modulation\.linear", "head_nm.ada_lin.1"),
    (r"^head\.linear", "head"),
    (r"modulation\.linear", "ada_lin.1"),
    (r"modulation\.offset", "ada_gss"),
    (r"branches\.0\.layer\.qkv", "sa.mat_qkv"),
    (r"branches\.0\.layer\.log_scale", "sa.scale_mul_1H11"),
    (r"branches\.0\.layer", "sa"),
    (r"branches\.1\.layer\.(q|kv)\.", r"ca.mat_\1."),
    (r"branches\.1\.layer", "ca"),
    (r"branches\.1\.norm", "ca_norm"),
    (r"branches\.1\.scale", "ca_gamma"),
    (r"branches\.2\.layer", "ffn"),
)
TOKENIZER_KEYS = (
    (r"\.middle\.0\.", ".mid.block_1."),
    (r"\.middle\.1\.", ".mid.block_2."),
    (r"\.shortcut\.", ".nin_shortcut."),
    (r"(conv\w*|nin_shortcut)\.(weight|bias)$", r"\1.conv.\2"),
    (r"(norm\w*)\.(weight|bias)$", r"\1.norm.\2"),
)


def model_key(depth: int, chunks: int) -> Callable[[str], str]:
    """Our transformer's key names to the official ones: block i is number i % n of chunk i // n, if there are several."""
    size = depth // chunks

    def place(found: re.Match[str]) -> str:
        i = int(found.group(1))
        return found.group() if chunks == 1 else f"block_chunks.{i // size}.module.{i % size}."

    return lambda key: re.sub(r"^blocks\.(\d+)\.", place, rewrite(key, KEYS))


def tokenizer_key(tokenizer: Tokenizer) -> Callable[[str], str]:
    """Our tokenizer's key names to the official ones."""
    levels = down_up_levels(tokenizer)
    return lambda key: rewrite(levels(key), TOKENIZER_KEYS)
