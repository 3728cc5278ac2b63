"""Facts about images in a GGUF, for ``inspect``: a vision file's sizes, or a model's tokens for images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydiffusion.convert.gguf.reader import Parts

_VISION = "clip.vision."
_PROJECTOR = "gemma4v"
# Ours by the keys of a vision file; the last may be absent.
_SIZES = {
    "n_layers": "block_count",
    "n_embd": "embedding_length",
    "n_heads": "attention.head_count",
    "projection_dim": "projection_dim",
    "patch_size": "patch_size",
    "pooling": "projector.scale_factor",
    "max_soft_tokens": "max_soft_tokens",
}
_IDS = ("image_token_id", "image_begin_token_id", "image_end_token_id")


def image_facts(gguf: Parts) -> dict[str, Any]:
    """Facts by name; empty for a file that says nothing about images. Values may be of any type, or None."""
    from pydiffusion.convert.checkpoint.image_processor import MAX_SOFT_TOKENS

    keys = gguf.metadata
    if gguf.is_mmproj:
        absent = {"max_soft_tokens": MAX_SOFT_TOKENS}
        projector = keys.get(f"{_VISION}projector_type", keys.get("clip.projector_type"))
        sizes = {name: keys.get(_VISION + key, absent.get(name)) for name, key in _SIZES.items()}
        return {"projector": projector, "is_supported": projector == _PROJECTOR} | sizes
    return _token_facts(gguf)


def _token_facts(gguf: Parts) -> dict[str, Any]:
    """The tokens that stand for an image, as the runtime finds them, and their attention."""
    from pydiffusion.convert.architectures.registry import ARCHITECTURES
    from pydiffusion.convert.checkpoint.tokenizer_files import TOKENS_KEY

    keys = gguf.metadata
    name = keys.get("general.architecture")
    architecture = next((known for known in ARCHITECTURES if known.name == name), None)
    if architecture is None or not isinstance(keys.get(TOKENS_KEY, []), list):
        return {}
    whole = {**architecture.implied(keys), **keys}
    ids = {key: whole[f"{name}.{key}"] for key in _IDS if f"{name}.{key}" in whole}
    if not ids:
        return {}
    return ids | {"bidirectional": whole.get(f"{name}.attention.bidirectional") == "vision"}


def image_lines(gguf: Parts) -> list[str]:
    """:func:`image_facts` to read."""
    from pydiffusion.convert.checkpoint.tokenizer_files import TOKENS_KEY

    facts = image_facts(gguf)
    if "projector" in facts:
        if not facts["is_supported"]:
            return [
                f"a vision tower with projector {facts['projector']!r:.40}; only {_PROJECTOR!r} is supported"
            ]
        shown = {name: "?" if value is None else f"{value!s:.40}" for name, value in facts.items()}
        patch, pooling = shown["patch_size"], shown["pooling"]
        return [
            f"a vision tower of {shown['n_layers']} layers ({_PROJECTOR}) for models with an embedding "
            f"length of {shown['projection_dim']}",
            f"patches of {patch} x {patch} pixels, {pooling} x {pooling} of them a soft token, at most "
            f"{shown['max_soft_tokens']} soft tokens per image",
        ]
    tokens = gguf.metadata.get(TOKENS_KEY, [])
    lines = []
    for key in _IDS:
        if key in facts:
            token_id = facts[key]
            known = type(token_id) is int and 0 <= token_id < len(tokens)
            name = repr(tokens[token_id]) if known else "beyond the vocabulary"
            lines.append(f"{key} {token_id!s:.40}: {name}")
    if lines:
        ways = "to each other both ways" if facts["bidirectional"] else "to earlier ones only"
        lines.append(f"the tokens of an image attend {ways}")
    return lines
