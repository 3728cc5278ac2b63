"""Soft tokens that the frozen text model solves sudokus from: the aims of the vision tower."""

from __future__ import annotations

import torch
from torch import nn

from .vision import CLASSES, N_CHARACTERS, N_FILLERS, character_embeddings

HEAD = "<bos><|turn>user\nsudoku\n<|image>"
TAIL = "<image|>\n<|turn>model\n"
"""The end of the image takes the place of the end of the turn, so that the canvas is as far from every cell as
in a text prompt: the text model finds its givens by that distance alone."""


class SoftPrompt(nn.Module):
    """Trainable features of the 23 fillers, of each kind of character, and a bias of each character's place."""

    def __init__(self, model: nn.Module, tokenizer) -> None:
        super().__init__()
        embed = model.model.encoder.language_model.embed_tokens

        def rows(text: str) -> torch.Tensor:
            with torch.no_grad():
                return embed(torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids)).clone()

        self.register_buffer("head", rows(HEAD))
        self.register_buffer("tail", rows(TAIL))
        begin = rows("<bos>" * (N_FILLERS - 6) + "<bos><|turn>user\nsudoku\n")
        self.fillers = nn.Parameter(begin)
        self.kinds = nn.Parameter(character_embeddings(model, tokenizer))
        self.places = nn.Parameter(torch.zeros(N_CHARACTERS, begin.shape[1]))
        ids = [
            tokenizer.token_to_id(character) or tokenizer.encode(character).ids[0] for character in CLASSES
        ]
        lookup = torch.zeros(tokenizer.get_vocab_size(), dtype=torch.int64)
        lookup[torch.tensor(ids)] = torch.arange(len(CLASSES))
        self.register_buffer("lookup", lookup)

    def aims(self, labels: torch.Tensor) -> torch.Tensor:
        """(n, 64, d) features for the classes (n, 41) of the characters."""
        characters = self.kinds[labels] + self.places
        return torch.cat([self.fillers.expand(len(labels), -1, -1), characters], dim=1)

    def prefix(self, features: torch.Tensor) -> torch.Tensor:
        """(n, length, d): what the encoder reads of a prompt with a picture's features (n, 64, d)."""
        n = len(features)
        return torch.cat([self.head.expand(n, -1, -1), features, self.tail.expand(n, -1, -1)], dim=1)

    def labels(self, prefix: torch.Tensor) -> torch.Tensor:
        """Classes (n, 41) of the characters of text prompts' ids (n, 52)."""
        return self.lookup[prefix[:, 6 : 6 + N_CHARACTERS]]
