"""Convert the tokenizer of a checkpoint folder to GGUF metadata.

Only one kind of tokenizer is supported: BPE with byte fallback over text whose spaces became U+2581. Any
other ``tokenizer.json`` is rejected rather than approximated.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeGuard

from pydiffusion.chat.template_source import TEMPLATE_KEY
from pydiffusion.convert.checkpoint.chat_templates import LEGACY, TEMPLATE, read_chat_template
from pydiffusion.convert.checkpoint.chat_templates import TOKENIZER_CONFIG as CONFIG
from pydiffusion.convert.checkpoint.strict_json import Fields, read_json_object
from pydiffusion.convert.gguf.header import Value
from pydiffusion.errors import ConversionError

TOKENIZER, SPECIALS = "tokenizer.json", "special_tokens_map.json"
FILES = (TOKENIZER, CONFIG, SPECIALS, TEMPLATE, LEGACY)
TOKENS_KEY = "tokenizer.ggml.tokens"
#: ``config.json``'s names of the tokens that stand for an image: its soft tokens, before it, after it.
IMAGE_TOKENS = ("image_token_id", "boi_token_id", "eoi_token_id")
SPACE = "\u2581"
_SCORE = -1000.0  # BPE has no scores; existing files have this value
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
# Tokenizer classes of transformers that add a bos by default.
_BOS_BY_DEFAULT = ("GemmaTokenizer", "GemmaTokenizerFast")


class TokenType(IntEnum):
    """Token types by their GGUF numbers."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class _AddedToken:
    token_id: int
    content: str
    special: bool


def read_tokenizer(
    folder: Path,
    notes: list[str],
    *,
    vocab_size: int,
    token_ids: Mapping[str, Any] = MappingProxyType({}),
    token_ids_from: str = "config.json",
    eos_token_ids: tuple[int, ...] = (),
    visible: frozenset[str] = frozenset(),
) -> dict[str, Value]:
    """Read all ``tokenizer.*`` keys.

    Args:
        vocab_size: number of tokens of the model, at least the tokenizer's.
        token_ids: ``bos_token_id``, ``eos_token_id`` and ``pad_token_id`` of the model's config, for roles
            that the tokenizer's files don't name.
        token_ids_from: where they are from, for messages.
        eos_token_ids: all end tokens; without any, the tokenizer's eos.
        visible: tokens to be decoded as text, though the tokenizer marks them special.

    Raises ConversionError for a missing file or unsupported tokenizer.
    """
    _require_tokenizer(folder)
    source = read_json_object(folder / TOKENIZER)
    settings = _read_optional(folder / CONFIG)
    specials = _read_optional(folder / SPECIALS)
    vocab, merges = _read_model(source, notes)
    added = _read_added(source, notes)
    tokens, types = _list_tokens(vocab, added, vocab_size, source["model"].get("unk_token"), visible, notes)
    token_to_id = {token: token_id for token_id, token in enumerate(tokens)}
    if len(token_to_id) != len(tokens):
        twice = next(token for token_id, token in enumerate(tokens) if token_to_id[token] != token_id)
        raise ConversionError(f"{TOKENIZER}: token {twice!r} occurs twice")
    special_ids = _special_ids(settings, specials, token_to_id)
    _add_from_config(special_ids, token_ids, token_ids_from, len(tokens), notes)
    for role, text in (("unk", source["model"].get("unk_token")), ("mask", "<mask>")):
        if role not in special_ids and isinstance(text, str) and text in token_to_id:
            special_ids[role] = token_to_id[text]
    if "eos" not in special_ids and eos_token_ids:
        special_ids["eos"] = eos_token_ids[0]
    if not eos_token_ids and "eos" in special_ids:
        eos_token_ids = (special_ids["eos"],)

    prefix = "tokenizer.ggml."
    keys = {
        prefix + "model": Value("str", "gemma4"),
        TOKENS_KEY: Value("array[str]", tokens),
        prefix + "scores": Value("array[f32]", [_SCORE] * len(tokens)),
        prefix + "token_type": Value("array[i32]", types),
        prefix + "merges": Value("array[str]", merges),
    }
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "mask": "mask"}
    for role, name in names.items():
        if role in special_ids:
            keys[f"{prefix}{name}_token_id"] = Value("u32", special_ids[role])
    if eos_token_ids:
        keys[prefix + "eos_token_ids"] = Value("array[i32]", list(eos_token_ids))
    else:
        notes.append("no end token is defined: generation will fill its last canvas")
    for role, first in (("bos", True), ("sep", None), ("eos", False)):
        flag = False if first is None else _adds_token(source, settings, role, special_ids, tokens, first)
        keys[f"{prefix}add_{role}_token"] = Value("bool", flag)
    template = read_chat_template(folder, notes)
    if template is not None:
        keys[TEMPLATE_KEY] = Value("str", template)
    keys[prefix + "add_space_prefix"] = Value("bool", False)
    return keys


def read_image_tokens(
    folder: Path, tokens: list[str], token_ids: Mapping[str, int], notes: list[str]
) -> dict[str, int]:
    """The tokens that stand for an image: those that ``tokenizer_config.json`` names, else ``token_ids``.

    The reference puts the former into its prompts. ``tokens``: the vocabulary by id; ``token_ids``: by the
    keys :data:`IMAGE_TOKENS`, as is the result.
    """
    settings = _read_optional(folder / CONFIG)
    named_tokens: dict[str, Any] = {}
    for group in ("model_specific_special_tokens", "extra_special_tokens"):
        named_tokens |= settings[group] if isinstance(settings.get(group), dict) else {}
    named_tokens |= settings
    result = {}
    for key in IMAGE_TOKENS:
        role = key.removesuffix("_id")
        value = named_tokens.get(role)
        text = value.get("content") if isinstance(value, dict) else value
        named = tokens.index(text) if isinstance(text, str) and text in tokens else None
        token_id = token_ids.get(key) if named is None else named
        if text is not None and named is None:
            notes.append(f"{CONFIG}: {role!r} is {text!r:.60}, which is not a token of {TOKENIZER}")
        if named is not None and token_ids.get(key, named) != named:
            notes.append(
                f"{CONFIG} and config.json disagree on {role!r}: {named} ({text!r:.60}) and "
                f"{token_ids[key]}; the former is used"
            )
        if token_id is not None:
            result[key] = token_id
    return result


def _require_tokenizer(folder: Path) -> None:
    if (folder / TOKENIZER).exists():
        return
    if (folder / "tokenizer.model").exists():
        raise ConversionError(
            f"{folder / TOKENIZER}: is missing, and tokenizer.model can't take its place: download it, or "
            "let transformers make it (AutoTokenizer.from_pretrained, then save_pretrained)"
        )
    raise ConversionError(f"{folder / TOKENIZER}: is missing: download it too")


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.exists() else {}


def _read_model(source: dict[str, Any], notes: list[str]) -> tuple[dict[str, int], list[str]]:
    """Vocabulary and merges (as ``left right`` strings), after validation."""
    model = Fields(source, TOKENIZER, notes).object("model")
    model.one_of("type", ("BPE",))
    model.one_of("byte_fallback", (True,))
    for key, accepted in (
        ("dropout", (None, 0, 0.0)),
        ("continuing_subword_prefix", (None, "")),
        ("end_of_word_suffix", (None, "")),
        ("ignore_merges", (False,)),
    ):
        model.accept_if_there(key, accepted)
    _check_normalizer(source.get("normalizer"))
    _check_pre_tokenizer(source.get("pre_tokenizer"))
    vocab = model.object("vocab").values
    for token, token_id in vocab.items():
        if type(token_id) is not int or token_id < 0:
            raise ConversionError(f"{TOKENIZER}: the token {token!r} has {token_id!r:.60} for an id")
        _check_text(token)
    merges = model.values.get("merges")
    if not isinstance(merges, list):
        raise model.error("merges", "a list")
    return vocab, [_read_merge(merge, vocab) for merge in merges]


def _read_merge(merge: object, vocab: dict[str, int]) -> str:
    pair = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
        raise ConversionError(f"{TOKENIZER}: the merge {merge!r:.80} is not a pair of tokens")
    left, right = pair
    if " " in left or " " in right:
        raise ConversionError(
            f"{TOKENIZER}: the merge {merge!r:.80} contains a space, which a GGUF can't express"
        )
    for token in (left, right, left + right):
        if token not in vocab:
            raise ConversionError(
                f"{TOKENIZER}: the merge {merge!r:.80} needs {token!r:.60}, which is not a token"
            )
    return f"{left} {right}"


def _check_text(token: str) -> None:
    try:
        token.encode("utf-8")
    except UnicodeEncodeError:
        raise ConversionError(f"{TOKENIZER}: the token {token!r} is not valid Unicode") from None


def _check_normalizer(normalizer: object) -> None:
    steps = normalizer.get("normalizers") if _has_type(normalizer, "Sequence") else [normalizer]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if steps != [replace]:
        raise ConversionError(
            f"{TOKENIZER}: 'normalizer' is {normalizer!r:.120}, which is not supported "
            f"(only the replacement of spaces by U+2581)"
        )


def _check_pre_tokenizer(pre_tokenizer: object) -> None:
    """Accept None, or a split at spaces, which has no effect after the normalizer."""
    at_spaces = _has_type(pre_tokenizer, "Split") and pre_tokenizer.get("pattern") == {"String": " "}
    if pre_tokenizer is not None and not at_spaces:
        raise ConversionError(
            f"{TOKENIZER}: 'pre_tokenizer' is {pre_tokenizer!r:.120}, which is not supported"
        )


def _has_type(value: object, name: str) -> TypeGuard[dict[str, Any]]:
    return isinstance(value, dict) and value.get("type") == name


def _read_added(source: dict[str, Any], notes: list[str]) -> list[_AddedToken]:
    entries = source.get("added_tokens", [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ConversionError(f"{TOKENIZER}: 'added_tokens' should be a list of objects")
    added, stripping = [], []
    for entry in entries:
        fields = Fields(entry, f"{TOKENIZER}: added_tokens", notes)
        token = _AddedToken(
            fields.integer("id", minimum=0), fields.string("content"), fields.boolean("special")
        )
        _check_text(token.content)
        if not token.content:
            raise fields.error("content", "a text of at least one character")
        if any(entry.get(flag) for flag in ("lstrip", "rstrip", "single_word")):
            stripping.append(token.content)
        added.append(token)
    if stripping:
        notes.append(
            f"{TOKENIZER}: a GGUF can't store lstrip, rstrip, single_word of: "
            f"{', '.join(map(repr, stripping))}"
        )
    return added


def _list_tokens(
    vocab: dict[str, int],
    added: list[_AddedToken],
    size: int,
    unknown: object,
    visible: frozenset[str],
    notes: list[str],
) -> tuple[list[str], list[int]]:
    """Tokens and types by id; ids without a token get an unused one."""
    texts: dict[int, str] = {}
    types: dict[int, TokenType] = {}
    for token, token_id in vocab.items():
        if texts.setdefault(token_id, token) != token:
            raise ConversionError(
                f"{TOKENIZER}: {texts[token_id]!r} and {token!r} have the same id {token_id}"
            )
        types[token_id] = TokenType.BYTE if _BYTE.fullmatch(token) else TokenType.NORMAL
        if token == unknown:
            types[token_id] = TokenType.UNKNOWN
    for entry in added:
        if texts.setdefault(entry.token_id, entry.content) != entry.content:
            raise ConversionError(
                f"{TOKENIZER}: {texts[entry.token_id]!r} and {entry.content!r} have the same id "
                f"{entry.token_id}"
            )
        is_text = not entry.special or entry.content in visible
        types[entry.token_id] = TokenType.USER_DEFINED if is_text else TokenType.CONTROL
    if texts and max(texts) >= size:
        raise ConversionError(
            f"{TOKENIZER}: the id {max(texts)} of {texts[max(texts)]!r} is beyond 'vocab_size' = "
            f"{size} of config.json"
        )
    n_unused = size - len(texts)
    if n_unused:
        notes.append(f"{TOKENIZER}: {n_unused} ids of the model have no token; they are called [PADn]")
    tokens = [texts.get(token_id, f"[PAD{token_id}]") for token_id in range(size)]
    return tokens, [int(types.get(token_id, TokenType.UNUSED)) for token_id in range(size)]


def _special_ids(
    settings: dict[str, Any], specials: dict[str, Any], token_to_id: dict[str, int]
) -> dict[str, int]:
    """Special token ids by role, from the tokenizer's files."""
    ids: dict[str, int] = {}
    for role in ("bos", "eos", "unk", "pad", "mask"):
        for file, values in ((CONFIG, settings), (SPECIALS, specials)):
            value = values.get(f"{role}_token")
            text = value.get("content") if isinstance(value, dict) else value
            if text is None:
                continue
            if not isinstance(text, str) or text not in token_to_id:
                raise ConversionError(
                    f"{file}: '{role}_token' is {value!r:.80}, which is not a token of {TOKENIZER}"
                )
            ids.setdefault(role, token_to_id[text])
    return ids


def _add_from_config(
    ids: dict[str, int], token_ids: Mapping[str, Any], where: str, n_tokens: int, notes: list[str]
) -> None:
    """Add to ``ids`` the roles that only the model's config names."""
    for role in ("bos", "eos", "pad"):
        value = token_ids.get(f"{role}_token_id")
        first = value[0] if isinstance(value, list) and value else value
        if type(first) is not int:
            continue
        if not 0 <= first < n_tokens:
            raise ConversionError(f"{where}: '{role}_token_id' is {first}, which is not a token")
        if ids.setdefault(role, first) != first and role != "eos":
            notes.append(
                f"{CONFIG} and config.json disagree on the {role} token: {ids[role]} and {first}; the "
                "former is used"
            )


def _adds_token(
    source: dict[str, Any],
    settings: dict[str, Any],
    role: str,
    special_ids: dict[str, int],
    tokens: list[str],
    first: bool,
) -> bool:
    """Whether encoding adds the bos or eos, by the config or by the post-processor."""
    flag = settings.get(f"add_{role}_token")
    if flag is not None:
        if type(flag) is not bool:
            raise ConversionError(f"{CONFIG}: 'add_{role}_token' should be true or false, is {flag!r:.60}")
        return flag and role in special_ids
    processor = source.get("post_processor")
    steps = processor.get("processors") if _has_type(processor, "Sequence") else [processor]
    for step in steps if isinstance(steps, list) else []:
        single = step.get("single") if _has_type(step, "TemplateProcessing") else None
        if isinstance(single, list) and single and role in special_ids:
            piece = single[0 if first else -1]
            special = piece.get("SpecialToken") if isinstance(piece, dict) else None
            if isinstance(special, dict) and special.get("id") == tokens[special_ids[role]]:
                return True
    return role == "bos" and role in special_ids and settings.get("tokenizer_class") in _BOS_BY_DEFAULT
