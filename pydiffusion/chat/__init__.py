"""Chat: templates, messages, and what a model answers."""
