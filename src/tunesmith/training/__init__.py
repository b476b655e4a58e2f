"""The SFT engine: batches, LoRA, loss, loop, checkpoints."""
