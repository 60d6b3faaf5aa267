"""What a training run will hold in memory at its peak, before it runs: from a step on tensors without values."""
