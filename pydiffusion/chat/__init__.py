"""Chat: templates, messages, output parser, tool calls, sanitizing."""
