"""Adapters in the forms that other programs serve: vLLM, llama.cpp (GGUF) and mlx-lm, one file each."""
