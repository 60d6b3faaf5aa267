"""Training causal language models: configuration, the run on an existing trainer, checkpoints."""
