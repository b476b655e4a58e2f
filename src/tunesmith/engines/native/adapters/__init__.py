"""Weights under training and adapters in use: LoRA, DoRA, PiSSA, full fine-tuning."""
