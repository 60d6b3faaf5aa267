"""transformers: models and tokenizers, quantized loading, configurations, prompts."""
