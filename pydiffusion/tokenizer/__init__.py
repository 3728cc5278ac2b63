"""Text to token ids and back, from the metadata of a GGUF."""

from .bpe import TextStream, Tokenizer, TokenType

__all__ = ["TextStream", "TokenType", "Tokenizer"]
