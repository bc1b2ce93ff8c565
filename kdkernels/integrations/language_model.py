"""A model of transformers as hidden states and a head: it runs as ever, but its logits are not made."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdkernels.contract import show
from kdkernels.nn import head_of
from kdkernels.ops.linear_distillation import Head

DROPPED = ("labels", "logits_to_keep", "num_items_in_batch", "return_dict")
REACH = 100.0  # of the logits on which a model's scale and softcap are tried: beyond any softcap's linear part


class Pass(NamedTuple):
    """What one run of a model gave."""

    states: Tensor  # (batch, tokens, d), which the head was given
    head: Head
    outputs: Any  # the model's, whose logits have no points


class LanguageModel:
    """A causal, seq2seq or masked language model, or a PeftModel of one.

    Args:
        name: of the argument that it is, for errors.
        model: a transformers model with output embeddings.

    Raises:
        TypeError, ValueError: the model has no head, or one that `head_of` does not read.
    """

    def __init__(self, name: str, model: nn.Module) -> None:
        self.name, self.model = name, model
        wrapper: Any = model
        self.base: Any = wrapper.get_base_model() if hasattr(model, "get_base_model") else model
        self.config: Any = getattr(self.base, "config", None)
        if not hasattr(self.base, "get_output_embeddings") or self.config is None:
            raise TypeError(f"{name} is {type(self.base).__name__}, but must be a model of transformers with a head")
        self.encoder_decoder = bool(getattr(self.config, "is_encoder_decoder", False))
        self._accepts_cache = "use_cache" in inspect.signature(self.base.forward).parameters
        self._finish: tuple[float, float | None] | None = None  # scale and softcap, once they are known
        self.head()

    def head(self) -> Head:
        """The head as it is now, without scale and softcap before the model has run once."""
        module = self._module()
        try:
            head = head_of(module)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{self.name} has a head that cannot be fused: {error}") from error
        extra = self._extra_bias()
        if extra is not None:
            head = head._replace(bias=extra if head.bias is None else head.bias + extra)
        scale, softcap = self._finish or (1.0, None)
        return head._replace(scale=scale, softcap=softcap)

    def width(self, states: str) -> int:
        """Of the hidden states of its `"decoder"` or `"encoder"`; a model of one stack has one width."""
        config = self.config
        if hasattr(config, "get_text_config"):
            config = config.get_text_config(**({states: True} if self.encoder_decoder else {}))
        width = getattr(config, "hidden_size", None)
        if not isinstance(width, int):
            raise ValueError(f"{self.name} has a config without hidden_size, which layer pairs need")
        return width

    def run(self, inputs: Mapping[str, Any], *, hidden_states: bool = False, wrapped: nn.Module | None = None) -> Pass:
        """The model's pass over `inputs`, in the mode and under the autocast that it is in.

        Args:
            inputs: of its forward; labels only make the decoder's input ids, where those are missing.
            hidden_states: the outputs have those of all layers.
            wrapped: what to call in the model's place, such as its DistributedDataParallel.

        Raises:
            ValueError: the head is not called exactly once, or the model does to its logits what a `Head` cannot say.
        """
        kwargs = {name: value for name, value in inputs.items() if name not in DROPPED}
        kwargs = self.decoded(inputs, kwargs)
        if hidden_states:
            kwargs["output_hidden_states"] = True
        if self._accepts_cache:
            kwargs["use_cache"] = False
        head = self.head()  # before anything is changed
        probing = self._finish is None
        with _headless(self._module(), probing) as calls:
            outputs = (self.model if wrapped is None else wrapped)(**kwargs, return_dict=True)
        if len(calls) != 1:
            raise ValueError(f"{self.name} calls its head {len(calls)} times in a forward, but must call it once")
        states, raw = calls[0]
        if probing:
            self._finish = self._found_finish(raw, outputs)
            head = self.head()
        return Pass(states, head, outputs)

    def decoded(self, inputs: Mapping[str, Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        """`kwargs` with the decoder's input ids where a seq2seq model would make them of the labels of `inputs`."""
        given = any(kwargs.get(name) is not None for name in ("decoder_input_ids", "decoder_inputs_embeds"))
        if not self.encoder_decoder or given or inputs.get("labels") is None:
            return kwargs
        return kwargs | {"decoder_input_ids": self._shifted(inputs["labels"])}

    def _module(self) -> nn.Module:
        try:
            module = self.base.get_output_embeddings()
        except (AttributeError, NotImplementedError):
            module = None
        if not isinstance(module, nn.Module):
            raise ValueError(
                f"{self.name}, a {type(self.base).__name__}, has no output embeddings, but must have a head"
            )
        return module

    def _extra_bias(self) -> Tensor | None:
        """(V,), which BART, Marian and Pegasus add to the logits."""
        extra = getattr(self.base, "final_logits_bias", None)
        return extra.reshape(-1) if isinstance(extra, Tensor) else None

    def _found_finish(self, raw: Tensor, outputs: Any) -> tuple[float, float | None]:
        """Scale and softcap, of which the config may speak, such that they make the model's own logits of `raw`."""
        logits, extra = getattr(outputs, "logits", None), self._extra_bias()
        if isinstance(logits, Tensor) and logits.shape == raw.shape:
            raw = raw.float() if extra is None else raw.float() + extra
            room = 0.02 if logits.dtype in (torch.bfloat16, torch.float16) else 1e-4
            for scale, softcap in self._candidates():
                expected = scale * raw
                expected = softcap * torch.tanh(expected / softcap) if softcap else expected
                if torch.allclose(logits.float(), expected, rtol=room, atol=room, equal_nan=True):
                    return scale, softcap
        raise ValueError(
            f"{self.name}, a {type(self.base).__name__}, does something to its logits after the head that is neither "
            "its config's logit_scale, logits_scaling, lm_head_multiplier nor final_logit_softcapping"
        )

    def _candidates(self) -> list[tuple[float, float | None]]:
        config = self.config.get_text_config() if hasattr(self.config, "get_text_config") else self.config
        found = {
            name: value
            for name in ("logit_scale", "logits_scaling", "lm_head_multiplier", "final_logit_softcapping")
            if isinstance(value := getattr(config, name, None), (int, float)) and value > 0
        }
        softcap = found.pop("final_logit_softcapping", None)
        scale = 1.0
        for name, value in found.items():
            scale *= 1 / value if name == "logits_scaling" else value
        return [(scale, softcap), (1.0, softcap), (1.0, None)]  # some config's scale is that of the states

    def _shifted(self, labels: Tensor) -> Tensor:
        """(batch, tokens): labels after the start token, as the model itself makes them of its labels."""
        if hasattr(self.base, "prepare_decoder_input_ids_from_labels"):
            return self.base.prepare_decoder_input_ids_from_labels(labels=labels)
        start, pad = self.config.decoder_start_token_id, self.config.pad_token_id
        if start is None or pad is None:
            missing = "decoder_start_token_id" if start is None else "pad_token_id"
            raise ValueError(f"{self.name} has a config without {missing}: give decoder_input_ids beside labels")
        shifted = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], dim=1)
        return shifted.masked_fill(shifted == -100, pad)


@contextmanager
def _headless(module: nn.Module, probing: bool) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Let `module` keep what it is called with, and compute no logits. Yields (input, output) of each call.

    The output still has the width and the graph of logits, but no points: what a model does to it costs nothing, and
    DistributedDataParallel sees that the head is used. While probing it has one point in each row, of logits that
    reach far.
    """
    calls: list[tuple[Tensor, Tensor]] = []
    compute = type(module).forward

    def stand_in(x: Tensor) -> Tensor:
        logits = compute(module, x[..., : int(probing), :])
        if probing:
            reach = torch.linspace(-REACH, REACH, logits.shape[-1], device=logits.device)
            logits = (logits + reach).to(logits.dtype)
        calls.append((x, logits))
        return logits

    module.forward = stand_in
    try:
        yield calls
    finally:
        del module.forward


def counted(inputs: Mapping[str, Any], *, encoder_decoder: bool, shift: bool) -> tuple[Tensor | None, Tensor]:
    """(batch, tokens) labels of the states, if there are any, and which states count, boolean.

    A state counts where neither the label is −100 nor the attention mask is 0. `shift` is for causal models: the label
    of a state is the next token's, and the last state has none.

    Raises:
        ValueError: there is nothing that says how many tokens there are, or a mask is not (batch, tokens).
    """
    names = ("decoder_attention_mask", "decoder_input_ids", "decoder_inputs_embeds")
    if not encoder_decoder:
        names = ("attention_mask", "input_ids", "inputs_embeds")
    labels, mask, ids, embedded = (inputs.get(name) for name in ("labels", *names))
    like = next((x for x in (labels, ids, embedded, mask) if x is not None), None)
    if like is None:
        raise ValueError(f"inputs has none of labels, {', '.join(names)}, but must say which tokens there are")
    counts = torch.ones(like.shape[:2], dtype=torch.bool, device=like.device)
    if mask is not None:
        if mask.shape != counts.shape:
            raise ValueError(f"{names[0]} has shape {show(mask.shape)}, but must be {show(counts.shape)}")
        counts = mask != 0
    if shift:
        # all states stay, so that no copy is made of them, and the last one of each row does not count
        counts = nn.functional.pad(counts[:, 1:] & counts[:, :-1], (0, 1))
        labels = None if labels is None else nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    return labels, counts if labels is None else counts & (labels != -100)
