"""Small random language models, their batches, and the distillation loss as one would write it on logits."""

import torch
import torch.nn.functional as F
import transformers

V = 61
STACK = dict(num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=V)
STACK |= dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, attn_implementation="eager")
LLAMA = STACK | dict(num_key_value_heads=2, max_position_embeddings=32)
SPEECH = dict(encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48)
SPEECH |= dict(encoder_layers=2, decoder_layers=2, num_mel_bins=8, max_source_positions=12, max_target_positions=32)
SPEECH |= dict(dropout=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, vocab_size=V)
BERT = STACK | dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=32)
GEMMA = LLAMA | dict(head_dim=8, final_logit_softcapping=1.5, query_pre_attn_scalar=8)
MODELS = {
    "LlamaForCausalLM": LLAMA,
    "WhisperForConditionalGeneration": SPEECH,
    "BertForMaskedLM": BERT,
    "Gemma2ForCausalLM": GEMMA,
    "CohereForCausalLM": LLAMA | dict(logit_scale=0.25),
    "GraniteForCausalLM": LLAMA | dict(logits_scaling=4.0),
    "MiniCPM3ForCausalLM": LLAMA  # whose logits_scaling is of the states, before the head
    | dict(dim_model_base=16, num_key_value_heads=4, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)
    | dict(kv_lora_rank=8, q_lora_rank=8),
    "BartForConditionalGeneration": SPEECH | dict(max_position_embeddings=32, forced_eos_token_id=2),
}
LLAMA, WHISPER, BERT, GEMMA, *_ = MODELS


def build(name, width=32, seed=0, **options):
    """A model whose logits are far from equal, with biases that are not 0."""
    torch.manual_seed(seed)
    kind = getattr(transformers, name)
    key = "d_model" if name in (WHISPER, "BartForConditionalGeneration") else "hidden_size"
    model = kind(kind.config_class(**MODELS[name] | {key: width} | options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_()
    return model


def batch(name, rows=4, tokens=9, seed=0, lengths=None, vocabulary=V):
    """Inputs of rows of unequal length, padded."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocabulary, (rows, tokens), generator=generator)
    lengths = torch.tensor(lengths or [tokens - 2 * (k % 4) for k in range(rows)])
    there = torch.arange(tokens) < lengths[:, None]
    labels = ids.masked_fill(~there, -100)
    if name == WHISPER:
        return {"input_features": torch.randn(rows, 8, 24, generator=generator), "labels": labels}
    if name == "BartForConditionalGeneration":
        source = torch.randint(3, V, (rows, 7), generator=generator)
        mask = torch.arange(7) < torch.tensor([7, 5, 3, 6])[:rows, None]
        return {"input_ids": source, "attention_mask": mask.long(), "labels": labels}
    if name == BERT:
        labels = labels.masked_fill(torch.rand(rows, tokens, generator=generator) > 0.5, -100)
    return {"input_ids": ids.masked_fill(~there, 0), "attention_mask": there.long(), "labels": labels}


def logits_of(model, inputs):
    return model(**inputs).logits.float()


def plain_loss(student, teachers, inputs, shift, *, T=1.0, alpha=1.0, weights=None, common=None):
    """Forward KL to an arithmetic mixture over the first `common` tokens, and cross-entropy, from logits."""
    labels, y = inputs["labels"], logits_of(student, inputs)
    with torch.no_grad():
        targets = [logits_of(teacher.eval(), inputs) for teacher in teachers]
    if shift:
        y, targets, labels = y[:, :-1], [t[:, :-1] for t in targets], labels[:, 1:]
    counts = labels != -100
    y, labels = y[counts], labels[counts]
    shares = weights or [1 / len(targets)] * len(targets)
    p = sum(share * (t[counts][:, :common] / T).softmax(-1) for share, t in zip(shares, targets, strict=True))
    soft = F.kl_div((y[:, :common] / T).log_softmax(-1), p, reduction="none").sum(-1).mean() * T**2
    return alpha * soft + (1 - alpha) * F.cross_entropy(y, labels)
