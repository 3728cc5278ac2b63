"""A prompt with a picture, as the demo's text model reads it."""

from __future__ import annotations

import torch
from torch import nn

from .vision import CLASSES, N_CHARACTERS, N_FILLERS, character_embeddings, character_ids

TEXT_HEAD = "<bos><|turn>user\nsudoku\n"
N_HEAD = 6
"""Its tokens: a text prompt's characters come after them."""
TEXT_TAIL = "<turn|>\n<|turn>model\n"
HEAD = TEXT_HEAD + "<|image>"
TAIL = "<image|>\n<|turn>model\n"
"""The end of the image takes the place of the end of the turn, so that the canvas is as far from every cell
as in a text prompt: the text model finds its givens by that distance alone."""


class Prompts:
    """Embeddings of text prompts and of prompts with soft tokens, and the frozen encoder's cache of them."""

    def __init__(self, model: nn.Module, tokenizer) -> None:
        self.model = model
        self.encoder = model.model.encoder.language_model
        self.tokenizer = tokenizer
        self.parts = {text: self.embed(text) for text in (TEXT_HEAD, TEXT_TAIL, HEAD, TAIL)}

    def embed(self, text: str) -> torch.Tensor:
        """(n, d): what the encoder reads for the tokens of a text."""
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        with torch.no_grad():
            return self.encoder.embed_tokens(torch.tensor(ids)).clone()

    def text(self, characters: torch.Tensor) -> torch.Tensor:
        """(n, 52, d) from the embeddings (n, 41, d) of the rows' characters."""
        return self._joined(TEXT_HEAD, characters, TEXT_TAIL)

    def picture(self, fillers: torch.Tensor, characters: torch.Tensor) -> torch.Tensor:
        """(n, 75, d) from fillers (23, d) and characters (n, 41, d)."""
        fillers = fillers.expand(len(characters), -1, -1)
        return self._joined(HEAD, torch.cat([fillers, characters], dim=1), TAIL)

    def _joined(self, head: str, middle: torch.Tensor, tail: str) -> torch.Tensor:
        n = len(middle)
        return torch.cat(
            [self.parts[head].expand(n, -1, -1), middle, self.parts[tail].expand(n, -1, -1)], dim=1
        )

    def cache(self, embeddings: torch.Tensor, first: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values (n, heads, length, head size) of every layer, with positions from `first` on."""
        positions = torch.arange(first, first + embeddings.shape[1])[None]
        layers = self.encoder(inputs_embeds=embeddings, position_ids=positions).past_key_values.layers
        return [(layer.keys, layer.values) for layer in layers]

    def difference(self, fillers: torch.Tensor, characters: torch.Tensor) -> torch.Tensor:
        """How far the cache behind a picture is from that behind the text, at the characters and after them.

        Mean over layers, keys and values, of squared distances in shares of the text's squares. The end of
        the image, which no filler can change in the first layer, counts little.
        """
        n_after = N_CHARACTERS + self.parts[TAIL].shape[0]
        with torch.no_grad():
            texts = self.cache(self.text(characters), first=N_FILLERS + 1)
        total, n = torch.zeros(()), 0
        weight = torch.ones(n_after)
        weight[N_CHARACTERS] = 0.05
        for text, picture in zip(texts, self.cache(self.picture(fillers, characters)), strict=True):
            for wanted, found in zip(text, picture, strict=True):
                wanted, found = wanted[:, :, -n_after:], found[:, :, -n_after:]
                off = ((wanted - found).square().sum(-1) * weight).mean()
                total, n = total + off / wanted.square().sum(-1).mean(), n + 1
        return total / n


def first_fillers(prompts: Prompts) -> torch.Tensor:
    """(23, d) to begin with: begin tokens, then a text prompt's head, which the characters are used to."""
    head = prompts.parts[TEXT_HEAD]
    begin = prompts.embed("<bos>").expand(N_FILLERS - len(head), -1)
    return torch.cat([begin, head])


class SoftPrompt(nn.Module):
    """Trainable features of the 23 fillers and of each kind of character, and a bias of each place."""

    def __init__(self, prompts: Prompts) -> None:
        super().__init__()
        self.register_buffer("head", prompts.parts[HEAD])
        self.register_buffer("tail", prompts.parts[TAIL])
        self.fillers = nn.Parameter(first_fillers(prompts))
        self.kinds = nn.Parameter(character_embeddings(prompts.model, prompts.tokenizer))
        self.places = nn.Parameter(torch.zeros(N_CHARACTERS, self.fillers.shape[1]))
        lookup = torch.zeros(prompts.tokenizer.get_vocab_size(), dtype=torch.int64)
        lookup[character_ids(prompts.tokenizer)] = torch.arange(len(CLASSES))
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
        return self.lookup[prefix[:, N_HEAD : N_HEAD + N_CHARACTERS]]
