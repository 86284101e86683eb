"""Settings of the transformer."""

from typing import Any, Literal

from pydantic import Field, model_validator

from nextscale.settings import Settings


class TransformerSettings(Settings):
    """Shape and initialisation of VAR's transformer. The defaults are VAR-d16 (310 M parameters)."""

    depth: int = Field(16, ge=1, le=1024, description="number of blocks")
    dim: int = Field(1024, ge=1, le=65_536, description="D, width of the residual stream")
    num_heads: int = Field(16, ge=1, le=4096, description="N, attention heads")
    mlp_ratio: float = Field(4.0, gt=0, le=64, description="hidden width of the feed-forward / D")
    adaln: bool = Field(True, description="the condition modulates every block; off: it is the start token alone")
    shared_adaln: bool = Field(False, description="one AdaLN layer for all blocks instead of one each")
    qk_norm: bool = Field(True, description="attention on queries and keys of length one (qk-norm)")
    drop_path: float = Field(0.0, ge=0, lt=1, description="drop path of the last block; rises linearly from 0")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout at the end of each branch")
    norm: Literal["layer", "rms"] = Field("layer", description="the norms in branches and before the head")
    eps: float = Field(1e-6, gt=0, le=1, description="of the layer norms")
    init_head: float = Field(0.02, gt=0, le=1000, description="initial head weights / usual ones")
    init_adaln: float = Field(0.5, gt=0, le=1000, description="initial AdaLN scale and shift weights / usual ones")
    init_gate: float = Field(1e-5, gt=0, le=1000, description="initial AdaLN gate weights / usual ones")

    @model_validator(mode="before")
    @classmethod
    def _as_named_now(cls, values: Any) -> Any:
        """`qk_norm` was called `unit_norm` in systems that were saved before."""
        if isinstance(values, dict) and "unit_norm" in values:
            return {"qk_norm" if name == "unit_norm" else name: value for name, value in values.items()}
        return values

    @model_validator(mode="after")
    def _check(self) -> "TransformerSettings":
        if self.dim % self.num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got dim={self.dim}, num_heads={self.num_heads}")
        if self.shared_adaln and not self.adaln:
            raise ValueError("shared_adaln is a kind of AdaLN, which adaln=False turns off; leave one of them out")
        return self
