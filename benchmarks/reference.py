"""VAR's teacher-forced forward pass as the reference writes it: what `nextscale bench train` compares with.

Written anew from the published description: a dense additive mask in every attention, the sequence put together by
concatenation, AdaLN computed inside each block, torch's default layouts. Same shapes, same arithmetic, same loss as
`nextscale.recipes.generators.var`; a test compares loss and gradients with the same weights.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ReferenceBlock(nn.Module):
    """Self-attention and feed-forward, modulated by six vectors of the condition."""

    def __init__(self, dim: int, num_heads: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.register_buffer("zero_k_bias", torch.zeros(dim))
        self.log_scale = nn.Parameter(torch.full((1, num_heads, 1, 1), math.log(4)))
        self.proj = nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.norm = nn.LayerNorm(dim, eps=eps, elementwise_affine=False)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def attention(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, length, dim = x.shape
        bias: Any = torch.cat((self.q_bias, self.zero_k_bias, self.v_bias))  # type: ignore[arg-type]
        qkv = F.linear(x, self.qkv.weight, bias).view(batch, length, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        sharpness = self.log_scale.clamp_max(math.log(100)).exp()
        q, k = F.normalize(q, dim=-1).mul(sharpness), F.normalize(k, dim=-1)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
        return self.proj(h.transpose(1, 2).reshape(batch, length, dim))

    def forward(self, x: Tensor, vec: Tensor, mask: Tensor) -> Tensor:
        six = self.modulation(vec).view(-1, 1, 6, x.shape[-1]).unbind(2)
        gate_1, gate_2, scale_1, scale_2, shift_1, shift_2 = six
        x = x + self.attention(self.norm(x).mul(scale_1.add(1)).add_(shift_1), mask).mul_(gate_1)
        h = self.norm(x).mul(scale_2.add(1)).add_(shift_2)
        return x + self.fc2(F.gelu(self.fc1(h), approximate="tanh")).mul(gate_2)


class ReferenceVAR(nn.Module):
    """The transformer of a `var.Config` with per-block AdaLN, or a shared one."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        t, schedule = config.transformer, config.schedule
        dim, self.first = t.dim, schedule.lengths[0]
        self.embedding = nn.Embedding(config.num_classes + 1, dim)
        self.word = nn.Linear(config.pyramid.code_dim, dim)
        self.start = nn.Parameter(torch.zeros(1, self.first, dim))
        self.positions = nn.Parameter(torch.zeros(1, schedule.length, dim))
        self.scales = nn.Embedding(len(schedule), dim)
        span = schedule.span()
        self.register_buffer("scale_index", span.scale_index()[None])
        self.register_buffer("mask", torch.zeros(span.end, span.end).masked_fill_(~span.mask(), -torch.inf)[None, None])
        hidden = round(dim * t.mlp_ratio)
        self.blocks: Any = nn.ModuleList(ReferenceBlock(dim, t.num_heads, hidden, t.eps) for _ in range(t.depth))
        self.norm = nn.LayerNorm(dim, eps=t.eps, elementwise_affine=False)
        self.head_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))
        self.head = nn.Linear(dim, config.pyramid.codebook_size)

    def forward(self, labels: Tensor, inputs: Tensor) -> Tensor:
        """Logits [B, L, V] of labels [B] and inputs [B, L - l_0, C]."""
        vec = self.embedding(labels)
        start = vec.unsqueeze(1).expand(-1, self.first, -1) + self.start.expand(len(vec), -1, -1)
        x = torch.cat((start, self.word(inputs.float())), dim=1)
        x = x + self.scales(self.scale_index.expand(len(vec), -1)) + self.positions
        for block in self.blocks:
            x = block(x, vec, self.mask)
        scale, shift = self.head_modulation(vec).view(-1, 1, 2, x.shape[-1]).unbind(2)
        return self.head(self.norm(x.float()).mul(scale.add(1)).add_(shift).float()).float()

    @torch.no_grad()
    def copy_from(self, model: Any) -> ReferenceVAR:
        """Take the weights of our transformer (per-block AdaLN)."""
        self.embedding.weight.copy_(model.conditioner.embedding.weight)
        self.word.load_state_dict(model.embed_input.state_dict())
        self.start[0].copy_(model.positions.start)
        self.positions[0].copy_(model.positions.table)
        self.scales.weight.copy_(model.positions.scale.weight)
        for mine, theirs in zip(self.blocks, model.blocks, strict=True):
            attention, feed_forward = (branch.layer for branch in theirs.branches)
            mine.qkv.load_state_dict(attention.qkv.state_dict())
            mine.proj.load_state_dict(attention.proj.state_dict())
            mine.q_bias.copy_(attention.q_bias)
            mine.v_bias.copy_(attention.v_bias)
            mine.log_scale.copy_(attention.log_scale.view(1, -1, 1, 1))
            mine.fc1.load_state_dict(feed_forward.fc1.state_dict())
            mine.fc2.load_state_dict(feed_forward.fc2.state_dict())
            mine.modulation[1].load_state_dict(theirs.modulation.linear.state_dict())
        self.head_modulation[1].load_state_dict(model.head_modulation.linear.state_dict())
        self.head.load_state_dict(model.head.linear.state_dict())
        return self
