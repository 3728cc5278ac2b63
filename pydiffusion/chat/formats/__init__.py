"""Chat formats: how the models of an architecture mark reasoning, tool calls and turns."""
