"""End-of-generation tokens, from a file's metadata."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydiffusion.chat.formats.registry import chat_format_of
from pydiffusion.errors import ModelFormatError

_PREFIX = "tokenizer.ggml."
_LIST_KEY = _PREFIX + "eos_token_ids"
_KEYS = tuple(f"{_PREFIX}{name}_token_id" for name in ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep"))
_CONTROL, _USER_DEFINED = 3, 4
# Texts by which llama.cpp recognises end tokens. Its files have no list of them: they name one by key and
# leave the others, such as the end of a turn, to these texts.
_TEXTS = frozenset(
    (
        "<eos>", "<turn|>", "<|tool_response>", "<end_of_turn>", "</s>", "<|im_end|>", "<|end|>",
        "<|eot_id|>", "<|eom_id|>", "<|endoftext|>", "<|end_of_text|>", "<end_of_utterance>",
        "<｜end▁of▁sentence｜>",
        "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "[e~[", "<|return|>", "<|call|>", "<|calls|>", "<|flush|>",
        "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]",
        "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>",
    )
)  # fmt: skip
# Texts that are not end tokens if all of one of these sets are: in Gemma's vocabulary `</s>` is HTML; where
# calls and answers have their own end tokens, `<|end|>` only closes a message.
_TEXT_TO_EXCLUDING = {
    "</s>": ({"<|tool_response>"},),
    "<|end|>": tuple(
        {end, call} for end in ("<|return|>", "<|flush|>") for call in ("<|call|>", "<|calls|>")
    ),
}


@dataclass(frozen=True)
class EndToken:
    """A token that ends a text.

    text: as in the file, None if the file has no token list.  reasons: the list or key that
    names it, or its text.
    """

    token_id: int
    text: str | None
    reasons: tuple[str, ...]


def find_end_tokens(metadata: Mapping[str, Any], n_vocab: int) -> tuple[EndToken, ...]:
    """Find the tokens that end a text: those of the file's list and keys, then control tokens known by text.

    The result is their union. A list or a key says which tokens end a text, never which don't: the lists of
    fine-tuned checkpoints often name only `<eos>`, and without the end of a turn every answer would fill the
    context. Raises ModelFormatError for an id outside the vocabulary.
    """
    id_to_reasons: dict[int, list[str]] = {}
    for key in (_LIST_KEY, *_KEYS):
        kind = "list" if key == _LIST_KEY else "key"
        for token_id in _named_ids(metadata, key, n_vocab):
            id_to_reasons.setdefault(token_id, []).append(f"{kind} {key}")
    tokens = metadata.get(_PREFIX + "tokens")
    tokens = tokens if isinstance(tokens, list) else []
    visible = chat_format_of(metadata).visible_ends
    for token_id in _ids_by_text(tokens, metadata.get(_PREFIX + "token_type"), visible):
        id_to_reasons.setdefault(token_id, []).append("text")
    return tuple(
        EndToken(token_id, tokens[token_id] if token_id < len(tokens) else None, tuple(reasons))
        for token_id, reasons in id_to_reasons.items()
    )


def _named_ids(metadata: Mapping[str, Any], key: str, n_vocab: int) -> list[int]:
    value = metadata.get(key)
    if value is None:
        return []
    ids = value if isinstance(value, list) else [value]
    for token_id in ids:
        if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < n_vocab:
            raise ModelFormatError(
                f"{key} holds {token_id!r:.60}; the vocabulary has the ids 0 to {n_vocab - 1}"
            )
    return ids


def _ids_by_text(tokens: Sequence[str], types: Any, visible: Collection[str]) -> list[int]:
    """visible: texts that end an answer even if their tokens are user-defined."""
    if not isinstance(types, list) or not tokens or not isinstance(tokens[0], str):
        return []  # control tokens can't be told from text
    text_to_id: dict[str, int] = {}
    for text in _TEXTS.union(visible).intersection(tokens):
        token_id = tokens.index(text)
        token_type = types[token_id] if token_id < len(types) else None
        if token_type == _CONTROL or (token_type == _USER_DEFINED and text in visible):
            text_to_id[text] = token_id
    for text, excluding in _TEXT_TO_EXCLUDING.items():
        if any(others <= text_to_id.keys() for others in excluding):
            text_to_id.pop(text, None)
    return sorted(text_to_id.values())
