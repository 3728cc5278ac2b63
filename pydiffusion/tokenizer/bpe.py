"""BPE tokenizer with byte fallback, built from the arrays of a GGUF.

Spaces become U+2581 before encoding, which the `tokenizers` library does. Decoding is done here, since byte
tokens have to be joined across token borders and in streams.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from enum import IntEnum
from functools import cached_property
from typing import Any

from pydiffusion.chat.formats.registry import chat_format_of
from pydiffusion.errors import ModelFormatError, UnsupportedModelError

from .end_tokens import find_end_tokens
from .markers import MarkerSet

_SPACE = "\u2581"
_PREFIX = "tokenizer.ggml."
# The tokenizer.ggml.model of this architecture's files; others need other algorithms.
_SUPPORTED_KINDS = ("gemma4",)


class TokenType(IntEnum):
    """Token types with their GGUF numbers."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


_TOKEN_TYPES = frozenset(TokenType)


class Tokenizer:
    """Tokenizer of a model file; thread-safe, can be pickled.

    Attributes: ``n_vocab``; ``bos_id``, ``eos_id``, ``pad_id``, ``mask_id``, ``unknown_id`` (int or None);
    ``add_bos``, whether the file asks for a bos before a text; ``end_tokens``, the tokens that end a text,
    with the reason, and ``end_ids``, their ids; ``chat_format``, how this architecture's models mark
    reasoning and tool calls.
    """

    def __init__(self, metadata: Mapping[str, Any], n_vocab: int | None = None) -> None:
        """Build the tokenizer from a file's metadata.

        n_vocab: number of rows of the embedding, which the token list must match.
        Raises ModelFormatError for inconsistent arrays, UnsupportedModelError for another type of tokenizer.
        """
        _check_kind(metadata)
        self._tokens = _token_list(metadata, n_vocab)
        self.n_vocab = len(self._tokens)
        self._token_to_id = _index_tokens(self._tokens)
        self.bos_id = self._special_id(metadata, "bos_token_id")
        self.eos_id = self._special_id(metadata, "eos_token_id")
        self.pad_id = self._special_id(metadata, "padding_token_id")
        self.mask_id = self._special_id(metadata, "mask_token_id")
        self.unknown_id = self._special_id(metadata, "unknown_token_id")
        self.add_bos = _flag(metadata, "add_bos_token", True) and self.bos_id is not None
        self.chat_format = chat_format_of(metadata)
        self.end_tokens = find_end_tokens(metadata, self.n_vocab)
        self.end_ids = tuple(end.token_id for end in self.end_tokens)
        self._types = self._token_types(metadata)
        self._id_to_byte = self._byte_values()
        self._encoder = self._build_encoder(_merge_pairs(metadata, self._token_to_id))
        # `encode_special_tokens` is state of the encoder: hold the lock from setting it until encoding is
        # done.
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._lock = threading.Lock()

    def __copy__(self) -> Tokenizer:
        return self  # it does not change

    def __deepcopy__(self, memo: dict[int, Any]) -> Tokenizer:
        return self

    # Loading

    def _special_id(self, metadata: Mapping[str, Any], name: str) -> int | None:
        value = metadata.get(_PREFIX + name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < self.n_vocab:
            raise ModelFormatError(
                f"{_PREFIX}{name} is {value!r}; the vocabulary has the ids 0 to {self.n_vocab - 1}"
            )
        return value

    def _token_types(self, metadata: Mapping[str, Any]) -> list[int]:
        given = metadata.get(_PREFIX + "token_type")
        if given is None:
            types = [
                int(TokenType.BYTE if _byte_value(t) is not None else TokenType.NORMAL) for t in self._tokens
            ]
        else:
            if not isinstance(given, Sequence) or len(given) != self.n_vocab:
                raise ModelFormatError(
                    f"{_PREFIX}token_type must be an array of {self.n_vocab} entries, one per token;"
                    f" it is {_describe(given)}"
                )
            types = list(given)
        for token_id, token_type in enumerate(types):
            if isinstance(token_type, bool) or token_type not in _TOKEN_TYPES:
                raise ModelFormatError(f"{_PREFIX}token_type[{token_id}] is {token_type!r}; known are 1 to 6")
        # Special ids are control tokens whatever their type in the list: typed as normal, they would be
        # parsed from plain text.
        for special_id in (self.bos_id, self.eos_id, self.pad_id, self.mask_id, self.unknown_id):
            if special_id is not None and types[special_id] == TokenType.NORMAL:
                types[special_id] = int(TokenType.CONTROL)
        return types

    def _byte_values(self) -> dict[int, int]:
        id_to_byte = {}
        for token_id, token_type in enumerate(self._types):
            if token_type == TokenType.BYTE:
                value = _byte_value(self._tokens[token_id])
                if value is None:
                    raise ModelFormatError(
                        f"{_PREFIX}tokens[{token_id}] is {self._tokens[token_id]!r}, typed as a byte;"
                        " bytes are written <0x00> to <0xFF>"
                    )
                id_to_byte[token_id] = value
        if len(id_to_byte) < 256 and self.unknown_id is None:
            raise ModelFormatError(
                f"{_PREFIX}tokens has {len(id_to_byte)} of the 256 byte tokens and no unknown token:"
                " some text could not be encoded"
            )
        return id_to_byte

    def _build_encoder(self, merges: list[tuple[str, str]]) -> Any:
        from tokenizers import AddedToken, models, normalizers
        from tokenizers import Tokenizer as Encoder

        unknown = None if self.unknown_id is None else self._tokens[self.unknown_id]
        try:
            encoder = Encoder(
                models.BPE(
                    vocab=self._token_to_id,
                    merges=merges,
                    unk_token=unknown,
                    fuse_unk=True,
                    byte_fallback=True,
                )
            )
            encoder.normalizer = normalizers.Replace(" ", _SPACE)
            special = [self._tokens[i] for i in range(self.n_vocab) if self.is_control(i)]
            visible = [
                t for t, kind in zip(self._tokens, self._types, strict=True) if kind == TokenType.USER_DEFINED
            ]
            encoder.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special if t])
            encoder.add_tokens([AddedToken(t, special=False, normalized=False) for t in visible if t])
        except BaseException as error:
            raise _translated(error, "the file's tokens and merges are not a valid tokenizer") from None
        return encoder

    # Encoding and decoding

    @cached_property
    def markers(self) -> MarkerSet:
        """Control tokens and markers that must not be taken from user text."""
        control = (self._tokens[i] for i in range(self.n_vocab) if self.is_control(i))
        return MarkerSet((*control, *self.chat_format.markers))

    def is_control(self, token_id: int) -> bool:
        """Whether the token is a control token and not text: bos, turn markers, padding, unknown."""
        return self._types[token_id] in (TokenType.CONTROL, TokenType.UNKNOWN)

    def token_type(self, token_id: int) -> TokenType:
        """The token's type in the file."""
        return TokenType(self._types[token_id])

    def token_text(self, token_id: int) -> str:
        """The token as spelled in the file."""
        return self._tokens[token_id]

    def token_id(self, token: str) -> int | None:
        """The id of a token spelled as in the file, or None."""
        return self._token_to_id.get(token)

    def tokenize(self, text: str, add_bos: bool | None = None, parse_special: bool = False) -> list[int]:
        """Tokenize a text.

        add_bos: prepend the bos token; None does as the file asks, unless the text begins with it.
        parse_special: parse control tokens spelled out in the text. Without it they are plain characters;
            user-defined tokens are always parsed.
        Raises ValueError for invalid Unicode (a lone surrogate), or if add_bos is True and the file has no
        bos.
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be str, not {type(text).__name__}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text has a lone surrogate at character {error.start}: it can't be encoded"
            ) from None
        if add_bos and self.bos_id is None:
            raise ValueError("add_bos is True, but the file names no bos token")
        with_bos = self.add_bos if add_bos is None else add_bos
        try:
            with self._lock:
                self._encoder.encode_special_tokens = not parse_special
                ids = self._encoder.encode(text, add_special_tokens=False).ids
        except BaseException as error:
            raise _translated(error, "the text can't be encoded") from None
        if not with_bos or self.bos_id is None or (add_bos is None and ids[:1] == [self.bos_id]):
            return ids
        return [self.bos_id, *ids]

    def bos_flaw(self, prompt: Sequence[int]) -> str | None:
        """Describe a missing or doubled bos and what to do about it, or None: a prompt needs exactly one."""
        if self.bos_id is None or not len(prompt):
            return None
        bos = f"the bos token {self._tokens[self.bos_id]!r} ({self.bos_id})"
        if prompt[0] != self.bos_id:
            return (
                f"the prompt does not begin with {bos}, and this model answers badly then: set"
                f" {_PREFIX}add_bos_token of the file to true, or put it in front of this prompt (in Python"
                " by model.tokenize(text, add_bos=True), with generate by its text and --special)"
            )
        if prompt[1:2] == [self.bos_id]:
            return f"the prompt begins with {bos} twice, and this model answers badly then: leave one out"
        return None

    def detokenize(self, ids: Iterable[int], keep_control: bool = False) -> str:
        """Decode token ids; byte tokens that are not valid UTF-8 become one U+FFFD each.

        keep_control: include control tokens as text instead of dropping them.
        Raises ValueError for an id outside the vocabulary.
        """
        return TextStream(self, keep_control=keep_control).feed(ids, last=True)

    def piece(self, token_id: int) -> bytes | str | None:
        """Decode one token: a str, a single byte of a character, or None for a control token."""
        if not 0 <= token_id < self.n_vocab:
            raise ValueError(f"token id {token_id} is outside the vocabulary, 0 to {self.n_vocab - 1}")
        byte = self._id_to_byte.get(token_id)
        if byte is not None:
            return bytes((byte,))
        if self.is_control(token_id):
            return None
        return self._tokens[token_id].replace(_SPACE, " ")


class TextStream:
    """Incremental detokenizer; a character split between calls is held back until it is complete."""

    def __init__(self, tokenizer: Tokenizer, keep_control: bool | Collection[int] = False) -> None:
        """keep_control: include all control tokens as text, or those with these ids, instead of dropping
        them.
        """
        self._tokenizer = tokenizer
        self._keep_control = keep_control
        self._bytes = bytearray()

    def feed(self, ids: Iterable[int], last: bool = False) -> str:
        """Return the text completed by these tokens. ``last``: hold nothing back."""
        parts: list[str] = []
        for token_id in ids:
            token_id = int(token_id)
            piece = self._tokenizer.piece(token_id)
            if piece is None:
                if self._keep_control is not True and not (
                    self._keep_control and token_id in self._keep_control
                ):
                    continue
                piece = self._tokenizer.token_text(token_id)
            if isinstance(piece, bytes):
                self._bytes += piece
            else:
                parts.append(self._take_bytes())
                parts.append(piece)
        parts.append(self._take_bytes() if last else self._take_whole_characters())
        return "".join(parts)

    def _take_bytes(self) -> str:
        run, self._bytes = self._bytes, bytearray()
        try:
            return run.decode("utf-8")
        except UnicodeDecodeError:
            return "\ufffd" * len(run)

    def _take_whole_characters(self) -> str:
        try:
            self._bytes.decode("utf-8")
        except UnicodeDecodeError as error:
            if (
                error.reason == "unexpected end of data"
            ):  # the character's remaining bytes may come with the next call
                rest = self._bytes[error.start :]
                del self._bytes[error.start :]
                text = self._take_bytes()
                self._bytes = rest
                return text
        return self._take_bytes()


def _flag(metadata: Mapping[str, Any], name: str, default: bool) -> bool:
    value = metadata.get(_PREFIX + name, default)
    if not isinstance(value, int):  # some writers store a bool as an integer
        raise ModelFormatError(f"{_PREFIX}{name} is {_describe(value)}; it must be true or false")
    return bool(value)


def _check_kind(metadata: Mapping[str, Any]) -> None:
    kind = metadata.get(_PREFIX + "model")
    if kind is None:
        raise ModelFormatError(f"the file has no {_PREFIX}model, so it has no tokenizer")
    if kind not in _SUPPORTED_KINDS:
        raise UnsupportedModelError(
            f"{_PREFIX}model is {kind!r}; this version knows {', '.join(_SUPPORTED_KINDS)}"
        )
    if metadata.get(_PREFIX + "add_space_prefix", False):
        raise UnsupportedModelError(f"{_PREFIX}add_space_prefix is true; this version knows only false")


def _token_list(metadata: Mapping[str, Any], n_vocab: int | None) -> list[str]:
    tokens = metadata.get(_PREFIX + "tokens")
    if isinstance(tokens, (str, bytes)) or not isinstance(tokens, Sequence) or not tokens:
        raise ModelFormatError(f"{_PREFIX}tokens must be an array of strings; it is {_describe(tokens)}")
    if n_vocab is not None and len(tokens) != n_vocab:
        raise ModelFormatError(
            f"{_PREFIX}tokens has {len(tokens)} entries, but the model's embedding has {n_vocab} rows"
        )
    for token_id, token in enumerate(tokens):
        if not isinstance(token, str):
            raise ModelFormatError(f"{_PREFIX}tokens[{token_id}] is {_describe(token)}, not a string")
    scores = metadata.get(_PREFIX + "scores")
    if scores is not None and (not isinstance(scores, Sequence) or len(scores) != len(tokens)):
        raise ModelFormatError(f"{_PREFIX}scores must have {len(tokens)} entries; it is {_describe(scores)}")
    return list(tokens)


def _index_tokens(tokens: list[str]) -> dict[str, int]:
    token_to_id: dict[str, int] = {}
    for token_id, token in enumerate(tokens):
        first = token_to_id.setdefault(token, token_id)
        if first != token_id:
            raise ModelFormatError(f"{_PREFIX}tokens has {token!r} twice, at {first} and {token_id}")
    return token_to_id


def _merge_pairs(metadata: Mapping[str, Any], token_to_id: Mapping[str, int]) -> list[tuple[str, str]]:
    merges = metadata.get(_PREFIX + "merges")
    if isinstance(merges, (str, bytes)) or not isinstance(merges, Sequence):
        raise ModelFormatError(f"{_PREFIX}merges must be an array of strings; it is {_describe(merges)}")
    pairs = []
    for i_merge, merge in enumerate(merges):
        if not isinstance(merge, str):
            raise ModelFormatError(f"{_PREFIX}merges[{i_merge}] is {_describe(merge)}, not a string")
        # Gemma's tokens contain no plain space: the first one after the first character separates the pair.
        cut = merge.find(" ", 1)
        left, right = merge[:cut], merge[cut + 1 :]
        if cut < 0 or not right:
            raise ModelFormatError(
                f"{_PREFIX}merges[{i_merge}] is {merge!r}; it must be two tokens and a space"
            )
        for token in (left, right, left + right):
            if token not in token_to_id:
                raise ModelFormatError(
                    f"{_PREFIX}merges[{i_merge}] is {merge!r}, but {token!r} is not a token"
                )
        pairs.append((left, right))
    return pairs


def _byte_value(token: str) -> int | None:
    if len(token) != 6 or not token.startswith("<0x") or not token.endswith(">"):
        return None
    try:
        return int(token[3:5], 16)
    except ValueError:
        return None


def _describe(value: Any) -> str:
    if value is None:
        return "missing"
    if isinstance(value, (list, tuple)):
        return f"an array of {len(value)}"
    return f"{value!r}"[:80]


def _translated(error: BaseException, meaning: str) -> BaseException:
    """Translate the library's errors: its panics derive from BaseException. Ctrl-C and exits pass through."""
    if isinstance(error, Exception) or type(error).__name__ == "PanicException":
        return ModelFormatError(f"{meaning}: {error}")
    return error
