"""Training causal language models: data, the run on an existing trainer, checkpoints."""
