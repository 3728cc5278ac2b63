"""``adapter_config.json`` of PEFT: ranks and scales, and what can't be honoured."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydiffusion.convert.checkpoint.strict_json import Fields
from pydiffusion.errors import AdapterError

_MAX_RANK = 1 << 16
_MAX_ALPHA = 1e20
# Initializations that change the base model's weights: what is saved is relative to the changed ones.
_CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga")
_KEEPS_BASE = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
# Keys whose values must be nothing (null, false, empty), what they ask for otherwise, and what to do.
_REFUSED = {
    "use_dora": ("DoRA", "train without it"),
    "use_qalora": ("QALoRA", "train without it"),
    "use_bdlora": ("BD-LoRA", "train without it"),
    "lora_bias": ("trained biases", "train with lora_bias=False"),
    "modules_to_save": ("modules trained as a whole", "train without it"),
    "trainable_token_indices": ("trained token embeddings", "train without it"),
    "layer_replication": ("repeated layers", "train without layer_replication"),
    "alora_invocation_tokens": ("Activated LoRA, on from a token on", "train without it"),
    "fan_in_fan_out": ("weights stored transposed", "save it for transformers' own class"),
    "arrow_config": ("Arrow, which chooses among adapters", "load the adapters themselves"),
    "kasa_config": ("KaSA", "train without it"),
    "monteclora_config": ("MonteCLoRA", "train without it"),
}
# Keys that say how an adapter was trained or made, not what it computes; with those read below.
_IRRELEVANT = frozenset(
    (
        "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
        "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
        "megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
        "velora_config", "qalora_group_size", "runtime_config", "ensure_weight_tying",
        "target_modules_to_tie",
    )
)  # fmt: skip
#: Settings that people ask for, for an adapter's metadata.
SHOWN = ("r", "lora_alpha", "use_rslora", "base_model_name_or_path", "task_type", "peft_version")


@dataclass(frozen=True)
class PeftSettings:
    """Ranks and scales. file: the config's path, for messages. patterns: (regex, value) in order.
    swaps_experts: whether A has the outputs of experts, B their inputs; None if the shapes have to tell.
    """

    file: str
    r: int
    alpha: float
    is_rank_stabilized: bool
    rank_patterns: tuple[tuple[re.Pattern[str], int], ...]
    alpha_patterns: tuple[tuple[re.Pattern[str], float], ...]
    target_parameters: tuple[str, ...]
    swaps_experts: bool | None
    shown: Mapping[str, Any]

    def rank(self, module: str) -> int:
        """The rank of a module, or parameter, by its path in the model."""
        return next((rank for pattern, rank in self.rank_patterns if pattern.match(module)), self.r)

    def scale(self, module: str, notes: list[str]) -> float:
        """alpha / r, or alpha / sqrt(r). Of several alphas the first, as in PEFT; noted, since saving sorts
        them.
        """
        alphas = [alpha for pattern, alpha in self.alpha_patterns if pattern.match(module)]
        if len(set(alphas)) > 1:
            notes.append(
                f"{self.file}: several patterns of 'alpha_pattern' match {module}, with {alphas[:5]}: the "
                "first counts, as in PEFT, which sorts them when it saves"
            )
        alpha = alphas[0] if alphas else self.alpha
        rank = self.rank(module)
        return alpha / (math.sqrt(rank) if self.is_rank_stabilized else rank)

    def is_parameter(self, path: str) -> bool:
        """Whether ``target_parameters`` names a parameter, by its path in the model."""
        return any(path == name or path.endswith(f".{name}") for name in self.target_parameters)


def read_settings(fields: Fields, notes: list[str]) -> PeftSettings:
    """Read the config. Raises AdapterError or ConversionError, naming the key."""
    kind = fields.string("peft_type")
    if kind != "LORA":
        raise _error(fields, "peft_type", f"is {kind!r:.40}; of PEFT's methods only LORA is supported")
    for key, (what, advice) in _REFUSED.items():
        if fields.has(key) and fields.values[key]:
            raise _error(fields, key, f"asks for {what}, which is not supported: {advice}")
    bias = fields.string("bias", "none")
    if bias != "none":
        raise _error(fields, "bias", f"is {bias!r:.40}: trained biases are not supported: train with 'none'")
    _check_start(fields)
    rank = fields.integer("r", maximum=_MAX_RANK)
    alpha = fields.number("lora_alpha", minimum=-_MAX_ALPHA, maximum=_MAX_ALPHA)
    stabilized = fields.has("use_rslora") and fields.boolean("use_rslora")
    settings = PeftSettings(
        fields.where,
        rank,
        alpha,
        stabilized,
        _patterns(fields, "rank_pattern", _as_rank),
        _patterns(fields, "alpha_pattern", _as_alpha),
        _names(fields, "target_parameters"),
        _swaps_experts(fields.values.get("peft_version")),
        {key: fields.values[key] for key in SHOWN if key in fields.values},
    )
    _check_unknown(fields, notes)
    return settings


def _swaps_experts(version: object) -> bool | None:
    """Whether a version of PEFT takes experts' matrices as (n_in, n_out); None for an unknown one."""
    match = re.match(r"(\d{1,4})\.(\d{1,4})(?:\.(\d{1,4}))?", version) if isinstance(version, str) else None
    return None if match is None else tuple(int(part or 0) for part in match.groups()) < (0, 19, 1)


def _error(fields: Fields, key: str, what: str) -> AdapterError:
    return AdapterError(f"{fields.where}: {key!r:.80} {what}")


def _check_start(fields: Fields) -> None:
    key = "init_lora_weights"
    start = fields.values[key] if fields.has(key) else True
    if isinstance(start, str) and start.startswith(_CHANGES_BASE):
        raise _error(
            fields,
            key,
            f"is {start!r:.40}, which also changes the base model's weights: save it as a plain LoRA "
            "(save_pretrained with path_initial_model_for_weight_conversion)",
        )
    if start == "loftq":
        raise _error(fields, key, "is 'loftq', which also changes the base model's weights: train without it")
    if not any(type(start) is type(known) and start == known for known in _KEEPS_BASE):
        raise _error(fields, key, f"is {start!r:.40}, which is not known")


def _check_unknown(fields: Fields, notes: list[str]) -> None:
    """Refuse switches and settings that are not known; note other keys that were not read."""
    for key in sorted(set(fields.values) - fields.asked - _IRRELEVANT):
        value = fields.values[key]
        if value is True or (value and key.startswith("use_")) or (value and key.endswith("_config")):
            raise _error(fields, key, "is not known: it may change what the adapter computes")
        if value:
            notes.append(f"{fields.where}: {key!r:.80} was not read")


def _names(fields: Fields, key: str) -> tuple[str, ...]:
    if not fields.has(key):
        return ()
    value = fields.values[key]
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise fields.error(key, "a list of names")
    return tuple(value)


def _as_rank(value: Any) -> int | None:
    return value if type(value) is int and 0 < value <= _MAX_RANK else None


def _as_alpha(value: Any) -> float | None:
    return float(value) if type(value) in (int, float) and abs(value) <= _MAX_ALPHA else None


def _patterns(
    fields: Fields, key: str, read: Callable[[Any], Any]
) -> tuple[tuple[re.Pattern[str], Any], ...]:
    """A table of PEFT: regex of the end of a module's path -> number."""
    values = fields.values[key] if fields.has(key) else {}
    if not isinstance(values, dict):
        raise fields.error(key, "an object")
    patterns, cost = [], 0.0
    for pattern, value in values.items():
        number = read(value)
        if number is None:
            raise _error(fields, key, f"gives {pattern!r:.100} {value!r:.40}, which is no such number")
        cost += _cost(pattern)
        try:
            compiled = re.compile(rf"(.*\.)?({pattern})$")
        except (re.error, OverflowError, RecursionError) as error:
            raise _error(fields, key, f"has {pattern!r:.100}, no regular expression: {error}"[:300]) from None
        patterns.append((compiled, number))
    if cost > _MAX_COST:
        raise _error(
            fields, key, "has regular expressions that may take very long: write the modules' names instead"
        )
    return tuple(patterns)


_MAX_COST = 1e6
_QUANTIFIED_GROUP = re.compile(r"\)[*+{]")


def _cost(pattern: str) -> float:
    """About how many ways a pattern has to match a path of 60 characters, at most."""
    plain = re.sub(r"\[\^?\]?[^\]]*\]", "c", re.sub(r"\\.", "c", pattern, flags=re.DOTALL))
    if _QUANTIFIED_GROUP.search(plain) or len(plain) > 10_000:
        return math.inf
    repeats = len(re.findall(r"[*+{]", plain))
    options = len(re.findall(r"(?<![*+}(])\?", plain))
    if repeats > 10 or options > 50:
        return math.inf
    return 60.0**repeats * 2.0**options * _alternatives(plain)


def _alternatives(plain: str) -> float:
    """The alternatives of each group, multiplied."""
    ways, open_groups = 1.0, [1]
    for character in plain:
        if character == "(":
            open_groups.append(1)
        elif character == "|":
            open_groups[-1] += 1
        elif character == ")" and len(open_groups) > 1:
            ways = min(ways * open_groups.pop(), 1e12)
    for count in open_groups:
        ways = min(ways * count, 1e12)
    return ways
