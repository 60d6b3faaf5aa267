"""Images in rows: where they come from, their limits, their places in texts, and the processors of models that see."""
