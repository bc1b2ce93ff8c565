"""kdkernels inside other libraries, which are optional: `import kdkernels` imports none of them.

- `kdkernels.integrations.peft`: PEFT's LoRA layers, computed by `kdkernels.lora_linear`.
- `kdkernels.integrations.transformers`: a Trainer that distils teachers into a student, without logits.
"""
