"""Integration with transformers: load and save models, quantize while loading, prefix and prompt tuning."""
