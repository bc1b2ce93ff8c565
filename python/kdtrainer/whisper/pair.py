"""A teacher of Whisper's shape, of random weights or given, and a student of its first layers with LoRA."""

import warnings
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import WhisperConfig, WhisperForConditionalGeneration

from kdkernels.nn import ProjectionAlignment

TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


@dataclass(frozen=True)
class Shape:
    """Of the teacher; the student has its first `student_layers` of encoder and decoder."""

    name: str
    width: int
    layers: int
    student_layers: int
    heads: int
    ffn: int
    vocabulary: int
    mels: int
    points: int  # frames that the encoder gives for a clip; its input has twice as many
    tokens: int  # of each clip's text
    rank: int
    dropout: float  # of the adapters' inputs; the models themselves have none


TINY_EN = Shape("Whisper tiny.en", 384, 4, 2, 6, 1536, 51864, 80, 1500, 64, 16, 0.1)


class Batch(NamedTuple):
    features: Tensor  # (batch, mels, 2 * points)
    tokens: Tensor  # (batch, tokens)


class States(NamedTuple):
    """The last ones."""

    encoder: Tensor  # (batch, points, width)
    decoder: Tensor  # (batch, tokens, width), what the head makes logits of


@dataclass
class Pair:
    """What a distillation step needs."""

    teacher: WhisperForConditionalGeneration  # frozen
    student: PeftModel
    aligner: ProjectionAlignment  # of the last encoder states

    def trained(self) -> dict[str, nn.Parameter]:
        """The adapters and the projections, by name."""
        both = nn.ModuleDict({"student": self.student, "aligner": self.aligner})
        return {name: p for name, p in both.named_parameters() if p.requires_grad}

    def adapted(self) -> WhisperForConditionalGeneration:
        """The student without PEFT around it; the adapters are in its layers."""
        return cast(WhisperForConditionalGeneration, self.student.get_base_model())

    def set_dropout(self, p: float) -> None:
        """Of every adapter's input."""
        for name, module in self.student.named_modules():
            if isinstance(module, nn.Dropout) and ".lora_dropout." in name:
                module.p = p


def config(shape: Shape, layers: int) -> WhisperConfig:
    last = shape.vocabulary - 1
    return WhisperConfig(
        vocab_size=shape.vocabulary,
        d_model=shape.width,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=shape.heads,
        decoder_attention_heads=shape.heads,
        encoder_ffn_dim=shape.ffn,
        decoder_ffn_dim=shape.ffn,
        num_mel_bins=shape.mels,
        max_source_positions=shape.points,
        use_cache=False,
        pad_token_id=last,
        bos_token_id=last,
        eos_token_id=last,
        decoder_start_token_id=last,
    )


def build(shape: Shape, dimension: int, seed: int, trained: WhisperForConditionalGeneration | None = None) -> Pair:
    """The pair, with projections into `dimension` and on plain PyTorch and PEFT.

    Without a trained teacher it is random, and adapters do not start at 0: in a first step that would hide what they
    compute.
    """
    torch.manual_seed(seed)
    teacher = trained or WhisperForConditionalGeneration(config(shape, shape.layers)).eval().requires_grad_(False)
    base = WhisperForConditionalGeneration(config(shape, shape.student_layers))
    known = base.state_dict().keys()
    base.load_state_dict({name: value for name, value in teacher.state_dict().items() if name in known})
    lora = LoraConfig(
        r=shape.rank,
        lora_alpha=shape.rank,
        lora_dropout=shape.dropout,
        target_modules=list(TARGETS),
        init_lora_weights=trained is not None,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, about itself
        student = get_peft_model(base, lora).train()
    aligner = ProjectionAlignment(((0, 0),), shape.width, shape.width, dimension, backend="reference")
    return Pair(teacher, student, aligner)


def states(model: WhisperForConditionalGeneration, batch: Batch) -> States:
    """Without the logits that the whole model would make."""
    found = model.model(input_features=batch.features, decoder_input_ids=batch.tokens)
    return States(found.encoder_last_hidden_state, found.last_hidden_state)


def head(model: WhisperForConditionalGeneration) -> Tensor:
    """(vocabulary, width), the embedding of tokens at once; it has no bias and no adapter."""
    return model.proj_out.weight


def batch(shape: Shape, size: int, seed: int) -> Batch:
    """Noise in the shape of log-mel features, and tokens."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(size, shape.mels, 2 * shape.points, generator=generator)
    return Batch(features, torch.randint(shape.vocabulary, (size, shape.tokens), generator=generator))
