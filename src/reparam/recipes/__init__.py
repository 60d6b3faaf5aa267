"""Things made of several parts: the demonstration, and merging from folder to folder."""
