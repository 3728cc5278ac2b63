"""Read ``config.json`` and ``generation_config.json`` of a checkpoint, by key and type.

A missing required key raises, and so does an unsupported value. Defaults are used only where ``transformers``
has one (:data:`DEFAULTS`), with a note in the report.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydiffusion._util.sampler_options import (
    ENTROPY_BOUND,
    ENTROPY_BOUND_DEFAULTS,
    REFERENCE_CANVAS_LENGTH,
    SamplerOption,
)
from pydiffusion.convert.checkpoint.strict_json import Fields, read_json_object
from pydiffusion.convert.checkpoint.tokenizer_files import IMAGE_TOKENS
from pydiffusion.errors import ConversionError

SLIDING, FULL = "sliding_attention", "full_attention"
# What the runtime accepts of a file: native/architectures/diffusion_gemma_file.cpp, native/model/hparams.cpp.
MAX_LAYERS = 1024
_MAX_HEADS, _MAX_HEAD_DIM, _MAX_EXPERTS = 1024, 1024, 4096
_MAX_HIDDEN, _MAX_INTERMEDIATE, _MAX_VOCAB = 1 << 17, 1 << 20, 1 << 24
_MAX_CONTEXT, _MAX_WINDOW, _MAX_CANVAS = (2**31 - 1) // 2, 1 << 24, 1 << 16
_MAX_THETA = 1e12
_MAX_JSON = 64 << 20

# Defaults of transformers' configuration classes, except for tensor sizes: a checkpoint that does not state
# these is damaged.
DEFAULTS: MappingProxyType[str, Any] = MappingProxyType(
    {
        "attention_bias": False,
        "canvas_length": REFERENCE_CANVAS_LENGTH,
        "final_logit_softcapping": 30.0,
        "global_head_dim": 512,
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "sliding_rope_theta": 10_000.0,
        "full_rope_theta": 1_000_000.0,
        "full_partial_rotary_factor": 0.25,
        "full_layer_every": 6,
        "tie_word_embeddings": True,
        "use_bidirectional_attention": None,
        "image_token_id": 258_880,
        "boi_token_id": 255_999,
        "eoi_token_id": 258_882,
    }
)
# Our options that have another name in generation_config.json.
_SAMPLER_NAMES = {"steps": "max_denoising_steps"}
# Keys of related architectures that would change the computation, and the only supported values.
_ONLY = MappingProxyType(
    {
        "attention_chunk_size": (None,),
        "attention_k_eq_v": (True,),
        "attn_logit_softcapping": (None,),
        "enable_moe_block": (True,),
        "hidden_size_per_layer_input": (0, None),
        "rope_scaling": (None,),
        "num_kv_shared_layers": (0, None),
        "use_double_wide_mlp": (False,),
    }
)
# Keys that don't affect inference.
_IRRELEVANT = frozenset(
    {
        "_name_or_path", "attention_dropout", "bos_token_id", "chunk_size_feed_forward", "dtype",
        "eos_token_id", "id2label", "initializer_range", "is_encoder_decoder", "label2id",
        "output_attentions", "output_hidden_states", "pad_token_id", "problem_type", "quantization_config",
        "return_dict", "torch_dtype", "transformers_version", "use_cache", "video_token_id", "vision_config",
        "vision_soft_tokens_per_image", "vocab_size_per_layer_input",
    }
)  # fmt: skip


@dataclass(frozen=True)
class TextConfig:
    """Hyperparameters of the text model.

    ``sliding`` and ``num_key_value_heads`` have one entry per layer; ``head_dim`` is that of the sliding
    layers. ``image_token_ids`` has those of ``IMAGE_TOKENS`` that are tokens of the vocabulary.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: tuple[int, ...]
    head_dim: int
    global_head_dim: int
    sliding: tuple[bool, ...]
    sliding_window: int
    num_experts: int
    top_k_experts: int
    moe_intermediate_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    final_logit_softcapping: float
    rope_theta_sliding: float
    rope_theta_full: float
    n_rotated_pairs: int  # of a full layer's global_head_dim / 2
    canvas_length: int
    tied: bool
    token_ids: dict[str, Any]  # bos_token_id, eos_token_id, pad_token_id where the config names them
    bidirectional_images: bool = False  # an image's soft tokens attend to each other both ways
    image_token_ids: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class SamplerConfig:
    """Sampler defaults, and the end tokens listed in ``generation_config.json`` (may be empty)."""

    steps: int
    t_min: float
    t_max: float
    entropy_bound: float
    stability_threshold: int
    confidence_threshold: float
    eos_token_ids: tuple[int, ...]


DEFAULT_SAMPLER = SamplerConfig(**ENTROPY_BOUND_DEFAULTS, eos_token_ids=())


def read_text_config(top: Fields) -> TextConfig:
    """Read and validate ``config.json``, after its ``model_type``. Raises ConversionError naming a missing or
    unsupported key.
    """
    text = top.object("text_config")
    text.one_of("model_type", ("diffusion_gemma_text",))
    text.one_of("hidden_activation", (DEFAULTS["hidden_activation"],), DEFAULTS["hidden_activation"])
    text.one_of("attention_bias", (False,), DEFAULTS["attention_bias"])
    bidirectional = text.one_of(
        "use_bidirectional_attention", (None, "vision"), DEFAULTS["use_bidirectional_attention"]
    )
    for key, accepted in _ONLY.items():
        text.accept_if_there(key, accepted)
    tied = top.boolean("tie_word_embeddings", DEFAULTS["tie_word_embeddings"])
    if text.has("tie_word_embeddings"):  # only the one at the top has an effect
        text.boolean("tie_word_embeddings")

    sliding = _read_layer_types(text)
    num_heads = text.integer("num_attention_heads", maximum=_MAX_HEADS)
    heads = _read_heads(text, sliding)
    for i_layer, num_kv in enumerate(heads.num_key_value_heads):
        if num_heads % num_kv:
            raise ConversionError(
                f"{text.where}: {num_heads} attention heads can't share the {num_kv} key-value heads "
                f"of layer {i_layer}"
            )
    rope = _read_rope(text, heads.global_head_dim)
    num_experts = text.integer("num_experts", maximum=_MAX_EXPERTS)
    vocab_size = text.integer("vocab_size", minimum=2, maximum=_MAX_VOCAB)
    config = TextConfig(
        vocab_size=vocab_size,
        hidden_size=text.integer("hidden_size", maximum=_MAX_HIDDEN),
        intermediate_size=text.integer("intermediate_size", maximum=_MAX_INTERMEDIATE),
        num_attention_heads=num_heads,
        num_key_value_heads=heads.num_key_value_heads,
        head_dim=heads.head_dim,
        global_head_dim=heads.global_head_dim,
        sliding=sliding,
        sliding_window=text.integer("sliding_window", maximum=_MAX_WINDOW),
        num_experts=num_experts,
        top_k_experts=text.integer("top_k_experts", maximum=num_experts),
        moe_intermediate_size=text.integer("moe_intermediate_size", maximum=_MAX_INTERMEDIATE),
        max_position_embeddings=text.integer("max_position_embeddings", maximum=_MAX_CONTEXT),
        rms_norm_eps=text.number("rms_norm_eps", DEFAULTS["rms_norm_eps"], minimum=1e-12, maximum=0.1),
        final_logit_softcapping=text.number(
            "final_logit_softcapping", DEFAULTS["final_logit_softcapping"], minimum=1e-3, maximum=1e6
        ),
        rope_theta_sliding=rope[0],
        rope_theta_full=rope[1],
        n_rotated_pairs=rope[2],
        canvas_length=top.integer("canvas_length", DEFAULTS["canvas_length"], maximum=_MAX_CANVAS),
        tied=tied,
        token_ids={key: text.values.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
        bidirectional_images=bidirectional == "vision",
        image_token_ids=_read_image_tokens(top, vocab_size),
    )
    if config.canvas_length > config.max_position_embeddings:
        raise top.error(
            "canvas_length", f"at most 'max_position_embeddings' = {config.max_position_embeddings}"
        )
    for fields in (top, text):
        fields.note_defaults()
        fields.note_unread(_IRRELEVANT)
    return config


def _read_image_tokens(top: Fields, vocab_size: int) -> dict[str, int]:
    """The ids of ``IMAGE_TOKENS``. Those beyond the vocabulary are left out: the reference's defaults are
    the released model's, and configs of smaller vocabularies keep them.
    """
    ids, beyond = {}, []
    for key in IMAGE_TOKENS:
        top.asked.add(key)
        if top.values.get(key, DEFAULTS[key]) is None or (
            key not in top.values and DEFAULTS[key] >= vocab_size
        ):
            continue
        ids[key] = top.integer(key, DEFAULTS[key], minimum=0)
        if ids[key] >= vocab_size:
            beyond.append(f"{key!r} = {ids.pop(key)}")
    if beyond:
        top.notes.append(
            f"{top.where}: beyond the vocabulary of {vocab_size} tokens, so not written: {', '.join(beyond)}"
        )
    return ids


def _read_layer_types(text: Fields) -> tuple[bool, ...]:
    num_layers = text.integer("num_hidden_layers", maximum=MAX_LAYERS)
    if not text.has("layer_types") or text.values["layer_types"] is None:
        every = DEFAULTS["full_layer_every"]
        text.notes.append(
            f"{text.where}: no 'layer_types'; as the reference does, every {every}th layer and the "
            "last one is full"
        )
        return tuple((i + 1) % every != 0 and i + 1 < num_layers for i in range(num_layers))
    types = text.values["layer_types"]
    if not isinstance(types, list) or len(types) != num_layers:
        raise text.error("layer_types", f"a list of {num_layers} types, one per layer")
    for i_layer, layer_type in enumerate(types):
        if layer_type not in (SLIDING, FULL):
            raise ConversionError(
                f"{text.where}: 'layer_types' has {layer_type!r:.60} for layer {i_layer}: not supported "
                f"(only {SLIDING} or {FULL})"
            )
    if types[-1] != FULL:
        raise ConversionError(
            f"{text.where}: 'layer_types' ends with {types[-1]!r:.60}; the last layer must be {FULL}"
        )
    return tuple(layer_type == SLIDING for layer_type in types)


@dataclass(frozen=True)
class _Heads:
    head_dim: int
    global_head_dim: int
    num_key_value_heads: tuple[int, ...]


def _read_heads(text: Fields, sliding: tuple[bool, ...]) -> _Heads:
    """Head sizes and KV heads from either form of the config.

    Google's has ``global_head_dim`` and ``num_global_key_value_heads``; ``save_pretrained`` folds both into
    ``per_layer_config``, an object of overrides by layer number that omits values equal to the global one.
    """
    head_dim = text.integer("head_dim", maximum=_MAX_HEAD_DIM)
    num_kv = text.integer("num_key_value_heads", maximum=_MAX_HEADS)
    google = {key: text.values.get(key) for key in ("global_head_dim", "num_global_key_value_heads")}
    text.asked.update(google)
    if text.has("per_layer_config") and text.values["per_layer_config"] is not None:
        dims, kv_heads = _read_per_layer(text, head_dim, num_kv, len(sliding))
        given = {"global_head_dim": dims, "num_global_key_value_heads": kv_heads}
        for key, value in google.items():
            if value is not None and any(
                value != given[key][i] for i, is_sliding in enumerate(sliding) if not is_sliding
            ):
                raise ConversionError(f"{text.where}: {key!r} = {value!r:.60} contradicts 'per_layer_config'")
    else:
        global_dim = text.integer("global_head_dim", DEFAULTS["global_head_dim"], maximum=_MAX_HEAD_DIM)
        # Absent or null: as many as the sliding layers have.
        global_kv = num_kv
        if google["num_global_key_value_heads"] is not None:
            global_kv = text.integer("num_global_key_value_heads", maximum=_MAX_HEADS)
        dims = [head_dim if is_sliding else global_dim for is_sliding in sliding]
        kv_heads = [num_kv if is_sliding else global_kv for is_sliding in sliding]
    for wanted, label in ((True, "sliding"), (False, "full")):
        if len({dim for dim, is_sliding in zip(dims, sliding, strict=True) if is_sliding is wanted}) > 1:
            raise ConversionError(
                f"{text.where}: 'per_layer_config' gives {label} layers different 'head_dim', which "
                "is not supported"
            )
    for dim in set(dims):
        if dim % 2:
            raise ConversionError(
                f"{text.where}: a 'head_dim' of {dim} is odd; rotary pairs need an even one"
            )
    sliding_dim = next((dim for dim, is_sliding in zip(dims, sliding, strict=True) if is_sliding), head_dim)
    return _Heads(sliding_dim, dims[-1], tuple(kv_heads))


def _read_per_layer(text: Fields, head_dim: int, num_kv: int, num_layers: int) -> tuple[list[int], list[int]]:
    dims, kv_heads = [head_dim] * num_layers, [num_kv] * num_layers
    for key, layer in text.object("per_layer_config").values.items():
        if not (key.isascii() and key.isdecimal() and len(key) <= 6 and int(key) < num_layers):
            raise ConversionError(
                f"{text.where}: per_layer_config: {key!r:.60}: not a layer number (0 to {num_layers - 1})"
            )
        where = f"{text.where}: per_layer_config: {key}"
        if not isinstance(layer, dict):
            raise ConversionError(f"{where}: should be an object, is {layer!r:.60}")
        fields = Fields(layer, where, text.notes)
        for name in layer:
            if name == "head_dim":
                dims[int(key)] = fields.integer(name, maximum=_MAX_HEAD_DIM)
            elif name == "num_key_value_heads":
                kv_heads[int(key)] = fields.integer(name, maximum=_MAX_HEADS)
            elif layer[name] != text.values.get(name, object()):
                raise ConversionError(
                    f"{where}: {name!r} = {layer[name]!r:.60} for a single layer is not supported"
                )
    return dims, kv_heads


def _read_rope(text: Fields, global_head_dim: int) -> tuple[float, float, int]:
    """(theta of sliding layers, theta of full layers, rotated pairs of full layers)."""
    # Beside the tables, it applies to those that have none of their own, the sliding layers' too.
    shared = text.values.get("partial_rotary_factor")
    text.asked.add("partial_rotary_factor")
    common = {} if shared is None else {"partial_rotary_factor": shared}
    if not text.has("rope_parameters") or text.values["rope_parameters"] is None:
        text.notes.append(f"{text.where}: no 'rope_parameters'; the reference's defaults are used")
        sliding_table = {"rope_type": "default", "rope_theta": DEFAULTS["sliding_rope_theta"]}
        full_table = {
            "rope_type": "proportional",
            "rope_theta": DEFAULTS["full_rope_theta"],
            "partial_rotary_factor": DEFAULTS["full_partial_rotary_factor"],
        }
        where = f"{text.where}: rope_parameters"
        sliding = Fields(common | sliding_table, f"{where}: {SLIDING}", text.notes)
        full = Fields(common | full_table, f"{where}: {FULL}", text.notes)
    else:
        rope = text.object("rope_parameters")
        sliding, full = rope.object(SLIDING), rope.object(FULL)
        sliding.values, full.values = common | sliding.values, common | full.values
    sliding.one_of("rope_type", ("default",))
    sliding.accept_if_there("partial_rotary_factor", (1.0, 1, None))
    full.one_of("rope_type", ("proportional",))
    full.accept_if_there("factor", (1.0, 1, None))
    factor = full.number("partial_rotary_factor", 1.0, minimum=0, maximum=1)
    thetas = [fields.number("rope_theta", minimum=1, maximum=_MAX_THETA) for fields in (sliding, full)]
    for fields in (sliding, full):
        unknown = sorted(set(fields.values) - fields.asked)
        if unknown:
            raise ConversionError(f"{fields.where}: {unknown[0]!r:.60} is not supported")
    n_rotated = int(factor * global_head_dim // 2)
    if n_rotated == 0:
        raise full.error(
            "partial_rotary_factor", f"large enough to rotate one pair of {global_head_dim // 2}"
        )
    return thetas[0], thetas[1], n_rotated


def read_sampler_config(folder: Path, config: TextConfig, notes: list[str]) -> SamplerConfig:
    """Read ``generation_config.json`` if it exists; missing or null values get the reference's default."""
    where = "generation_config.json"
    values: dict[str, Any] = {}
    if (folder / where).exists():
        values = read_json_object(folder / where, _MAX_JSON)
    fields = Fields(values, where, notes, null_is_missing=True)
    sampler = fields
    if fields.has("sampler_config"):
        sampler = fields.object("sampler_config")
        sampler.accept_if_there("_cls_name", ("EntropyBoundSamplerConfig",))
    values_by_option = {
        option.name: _read_option(sampler if option.name == "entropy_bound" else fields, option)
        for option in ENTROPY_BOUND
    }
    result = SamplerConfig(**values_by_option, eos_token_ids=_read_eos(fields, config))
    for part in (fields,) if sampler is fields else (fields, sampler):
        part.note_defaults()
    if result.t_max <= result.t_min:
        raise ConversionError(f"{where}: 't_max' = {result.t_max} should be above 't_min' = {result.t_min}")
    return result


def _read_option(fields: Fields, option: SamplerOption) -> Any:
    """The value of a sampler option within the range that a file can have; the reference allows no 0 but for
    counts and temperatures.
    """
    key = _SAMPLER_NAMES.get(option.name, option.name)
    if option.integer:
        return fields.integer(key, option.default, minimum=int(option.low), maximum=int(option.high))
    low = option.low if option.name in ("t_min", "t_max") else 1e-30
    return fields.number(key, option.default, minimum=low, maximum=option.high)


def _read_eos(fields: Fields, config: TextConfig) -> tuple[int, ...]:
    value, where = fields.values.get("eos_token_id"), fields.where
    if value is None:
        value, where = config.token_ids["eos_token_id"], "config.json: text_config"
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for token_id in ids:
        if type(token_id) is not int or not 0 <= token_id < config.vocab_size:
            raise ConversionError(
                f"{where}: 'eos_token_id' has {token_id!r:.60}, which is not a token of the vocabulary"
            )
    return tuple(dict.fromkeys(ids))
