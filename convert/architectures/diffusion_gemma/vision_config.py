"""Read ``vision_config`` of a checkpoint's ``config.json``: the vision tower, Gemma 4's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydiffusion.convert.checkpoint.strict_json import Fields, read_json_object
from pydiffusion.errors import ConversionError

# What the runtime accepts of a file: native/vision/vision_hparams.cpp.
_MAX_LAYERS, _MAX_HEADS, _MAX_HEAD_DIM = 1024, 4096, 1024
_MAX_SIZE, _MAX_PATCH, _MAX_POOLING, _MAX_POSITIONS = 1 << 20, 256, 64, 1 << 24
_MAX_JSON = 64 << 20
# Defaults of transformers' configuration class that decide whether a config without them is supported.
_HEAD_DIM, _NUM_KV_HEADS = 64, 12
# Keys that don't affect inference; the class does not read the last two, which Google's file has.
_IRRELEVANT = frozenset(
    {
        "_name_or_path", "architectures", "attention_dropout", "bos_token_id", "chunk_size_feed_forward",
        "dtype", "eos_token_id", "id2label", "initializer_range", "is_encoder_decoder", "label2id",
        "max_position_embeddings", "output_attentions", "output_hidden_states", "pad_token_id",
        "problem_type", "return_dict", "tie_word_embeddings", "torch_dtype", "transformers_version",
        "use_cache", "default_output_length", "global_head_dim",
    }
)  # fmt: skip


@dataclass(frozen=True)
class VisionConfig:
    """Hyperparameters of the vision tower, and the text model's hidden size."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    head_dim: int
    patch_size: int
    pooling: int
    positions: int
    rms_norm_eps: float
    standardize: bool
    clipped: bool
    text_size: int


def read_vision_config(folder: Path, text_size: int, notes: list[str]) -> VisionConfig:
    """Read and validate ``vision_config``; keys that were not read are noted.

    Raises ConversionError if there is none, and naming a missing or unsupported key.
    """
    values = read_json_object(folder / "config.json", _MAX_JSON)
    if not isinstance(values.get("vision_config"), dict):
        raise ConversionError(f"{folder / 'config.json'}: has no 'vision_config', so no vision part")
    vision = Fields(values["vision_config"], "config.json: vision_config", notes, null_is_missing=True)
    vision.one_of("model_type", ("gemma4_vision",))
    vision.one_of("hidden_activation", ("gelu_pytorch_tanh",), "gelu_pytorch_tanh")
    vision.one_of("attention_bias", (False,), False)
    _check_rope(vision)
    hidden = vision.integer("hidden_size", maximum=_MAX_SIZE)
    heads, head_dim = _read_heads(vision, hidden)
    config = VisionConfig(
        hidden_size=hidden,
        intermediate_size=vision.integer("intermediate_size", maximum=_MAX_SIZE),
        num_layers=vision.integer("num_hidden_layers", maximum=_MAX_LAYERS),
        num_heads=heads,
        head_dim=head_dim,
        patch_size=vision.integer("patch_size", maximum=_MAX_PATCH),
        pooling=vision.integer("pooling_kernel_size", 3, maximum=_MAX_POOLING),
        positions=vision.integer("position_embedding_size", maximum=_MAX_POSITIONS),
        rms_norm_eps=vision.number("rms_norm_eps", 1e-6, minimum=1e-12, maximum=1),
        standardize=vision.boolean("standardize", False),
        clipped=vision.boolean("use_clipped_linears", False),
        text_size=text_size,
    )
    vision.note_defaults()
    vision.note_unread(_IRRELEVANT)
    return config


def _read_heads(vision: Fields, hidden: int) -> tuple[int, int]:
    """(heads, size of a head). Of key-value heads there have to be as many: files have no key for them."""
    heads = vision.integer("num_attention_heads", maximum=_MAX_HEADS)
    num_kv = vision.integer("num_key_value_heads", _NUM_KV_HEADS)
    if num_kv != heads:
        absent = "" if vision.has("num_key_value_heads") else ", the reference's default,"
        raise ConversionError(
            f"{vision.where}: 'num_key_value_heads' = {num_kv}{absent} is not supported (only {heads}, the "
            "number of attention heads)"
        )
    head_dim = vision.integer("head_dim", _HEAD_DIM, maximum=_MAX_HEAD_DIM)
    if head_dim % 4:
        raise ConversionError(
            f"{vision.where}: a 'head_dim' of {head_dim} is no multiple of 4: rotary pairs of two axes "
            "need one"
        )
    if head_dim * heads != hidden:
        vision.notes.append(
            f"{vision.where}: {heads} heads of {head_dim} elements are not the hidden size of {hidden}: "
            "programs that compute a head's size from it, such as llama.cpp, can't read the file"
        )
    return heads, head_dim


def _check_rope(vision: Fields) -> None:
    """Refuse all but what the tower computes: a theta of 100 over the two halves of a head."""
    vision.accept_if_there("rope_scaling", (None,))
    vision.accept_if_there("partial_rotary_factor", (1, 1.0))
    vision.accept_if_there("rope_theta", (100, 100.0))
    if not vision.has("rope_parameters"):
        return
    rope = vision.object("rope_parameters")
    rope.accept_if_there("rope_theta", (100, 100.0))
    for key in ("rope_type", "type"):  # the reference takes "default" of older files for "axial"
        rope.accept_if_there(key, ("axial", "default"))
    unknown = sorted(set(rope.values) - rope.asked)
    if unknown:
        raise ConversionError(f"{rope.where}: {unknown[0]!r:.60} is not supported")
