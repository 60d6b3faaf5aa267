"""Complete tasks behind the commands: chat, compose, compress, demo, intrinsic dimension, LoraHub, merge, quantize."""
