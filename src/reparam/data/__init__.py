"""Rows of text or chats on their way to batches: read, rendered, masked, encoded, collated, shown."""
