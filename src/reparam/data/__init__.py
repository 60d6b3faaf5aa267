"""Training data: read rows, render chats, tokenize, mask the loss, collate batches, and print a preview."""
