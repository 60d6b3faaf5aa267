"""Work with adapters on a model: attach, select, save, load, merge, quantize."""
