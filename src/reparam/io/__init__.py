"""Files: atomic writes, reparam's adapter format, PEFT's adapter format, and bitsandbytes' NF4 layout."""
