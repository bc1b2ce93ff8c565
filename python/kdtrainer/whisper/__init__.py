"""Distillation of Whisper tiny.en: a timed step of its shape, and the trained model into its own first layers."""
