"""Train causal language models: the configuration, the run with transformers' Trainer, and checkpoints."""
