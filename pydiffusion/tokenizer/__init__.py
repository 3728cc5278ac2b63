"""Tokenizer from the metadata of a GGUF."""

from .bpe import TextStream, Tokenizer, TokenType

__all__ = ["TextStream", "TokenType", "Tokenizer"]
