"""Using adapters: chatting with one."""
