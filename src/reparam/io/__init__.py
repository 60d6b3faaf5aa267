"""Files: staged writes, the native adapter format, the PEFT format, the bitsandbytes format."""
