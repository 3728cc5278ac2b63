"""Names that 0.1.0 documented here; they are in ``pydiffusion.events`` now."""

from .events import Content, Reasoning, ToolCall

__all__ = ["Content", "Reasoning", "ToolCall"]
