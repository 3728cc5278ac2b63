"""Quantization recipes as data: which kinds of tensors, in which layers, get which type.

The mixes are those of existing files, so that a name means the same everywhere; where those depend on the
model, they are what the released model (128 experts, two query heads per KV head) gets.
:mod:`pydiffusion.convert.quantization.type_plan` applies them.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Layers = Literal[
    "all",
    "more bits",
    "first sixteenth",
    "first eighth",
    "first two",
    "first four",
    "inner eighths",
]


def has_more_bits(index: int, count: int) -> bool:
    """True for the first eighth, the last eighth and every third one in between."""
    first = count // 8
    return index < first or index >= 7 * count // 8 or (index - first) % 3 == 2


LAYERS: MappingProxyType[Layers, Callable[[int, int], bool]] = MappingProxyType(
    {
        "all": lambda index, count: True,
        "more bits": has_more_bits,
        "first sixteenth": lambda index, count: index < count // 16,
        "first eighth": lambda index, count: index < count // 8,
        "first two": lambda index, count: index < 2,
        "first four": lambda index, count: index < 4,
        "inner eighths": lambda index, count: count // 8 <= index < 7 * count // 8,
    }
)


@dataclass(frozen=True)
class Rule:
    """These kinds of tensors, in these layers, get this type; the first matching rule counts.

    ``imatrix``: only with an imatrix (True), only without one (False), or both (None).
    """

    kinds: tuple[str, ...]
    type: str
    layers: Layers = "all"
    imatrix: bool | None = None


@dataclass(frozen=True)
class Recipe:
    """A recipe: ``head`` for embedding and output head, ``rules`` in order, ``default`` for the rest.

    ``file_type``: value of ``general.file_type``; ``note``: added to the report; ``needs_imatrix``: made with
    an imatrix only, though its types can do without (others do, by :data:`NEEDS_IMATRIX`).
    """

    file_type: int
    default: str
    head: str
    rules: tuple[Rule, ...] = ()
    note: str = ""
    needs_imatrix: bool = False


_V, _K, _Q, _OUT = ("attn_v",), ("attn_k",), ("attn_q",), ("attn_output",)
_DOWN = ("ffn_down", "ffn_down_exps")
_GATE_UP = ("ffn_gate", "ffn_up", "ffn_gate_up_exps", "ffn_gate_exps", "ffn_up_exps")
_EXPERTS = ("ffn_gate_up_exps", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
_TERNARY = "meant for models trained with ternary weights; it ruins others"


def _pure(file_type: int, type_name: str, head: str | None = None, *rules: Rule) -> Recipe:
    return Recipe(file_type, type_name, head or type_name, rules)


def _tiny(file_type: int, type_name: str, down: str, output: str | None) -> Recipe:
    """A mix below three bits."""
    rules = [Rule(_V, "Q4_K"), Rule(_DOWN, down, "first eighth")]
    if output is not None:
        rules.append(Rule(_OUT, output))
    return Recipe(file_type, type_name, "Q5_K", tuple(rules))


RECIPES = MappingProxyType(
    {
        "f32": _pure(0, "F32"),
        "f16": _pure(1, "F16"),
        "bf16": _pure(32, "BF16"),
        "q8_0": _pure(7, "Q8_0"),
        "q6_k": _pure(18, "Q6_K"),
        "q5_k_m": _pure(17, "Q5_K", "Q6_K", Rule(_V + _DOWN, "Q6_K", "more bits")),
        "q5_k_s": _pure(16, "Q5_K", "Q6_K"),
        "q5_1": _pure(9, "Q5_1", "Q6_K"),
        "q5_0": _pure(8, "Q5_0", "Q6_K", Rule(_DOWN, "Q5_1", "first eighth", imatrix=True)),
        "q4_k_m": _pure(15, "Q4_K", "Q6_K", Rule(_V + _DOWN, "Q6_K", "more bits")),
        "q4_k_s": _pure(
            14, "Q4_K", "Q6_K", Rule(_V, "Q5_K", "first four"), Rule(_DOWN, "Q5_K", "first eighth")
        ),
        "q4_1": _pure(3, "Q4_1", "Q6_K"),
        "q4_0": _pure(2, "Q4_0", "Q6_K", Rule(_DOWN, "Q4_1", "first eighth", imatrix=True)),
        "iq4_nl": _pure(25, "IQ4_NL", "Q6_K", Rule(_DOWN, "Q5_K", "first eighth", imatrix=False)),
        "iq4_xs": _pure(30, "IQ4_XS", "Q6_K", Rule(_DOWN, "Q5_K", "first eighth", imatrix=False)),
        "q3_k_l": _pure(13, "Q3_K", "Q6_K", Rule(_V + _DOWN + _OUT, "Q5_K")),
        "q3_k_m": _pure(
            12,
            "Q3_K",
            "Q6_K",
            Rule(_V, "Q5_K", "first two"),
            Rule(_DOWN, "Q5_K", "first sixteenth"),
            Rule(_V + _DOWN + _OUT, "Q4_K"),
        ),
        "q3_k_s": _pure(11, "Q3_K", "Q6_K"),
        "iq3_m": _pure(27, "IQ3_S", "Q6_K", Rule(_V + _OUT, "Q4_K"), Rule(_DOWN, "Q4_K", "first eighth")),
        "iq3_s": _pure(26, "IQ3_S", "Q6_K"),
        "iq3_xs": _pure(
            22,
            "IQ3_S",
            "Q6_K",
            Rule(_K + _Q, "IQ3_XXS"),
            Rule(_GATE_UP, "IQ3_XXS", "inner eighths"),
        ),
        "iq3_xxs": _pure(23, "IQ3_XXS", "Q5_K", Rule(_K + _Q, "IQ2_S"), Rule(_OUT, "IQ3_S")),
        "q2_k": _pure(10, "Q2_K", "Q6_K", Rule(_V + _DOWN + _OUT, "Q3_K")),
        "q2_k_s": Recipe(21, "Q2_K", "Q6_K", (Rule(_DOWN, "Q4_K", "first eighth"),), needs_imatrix=True),
        "iq2_m": _tiny(29, "IQ2_S", "IQ3_S", "IQ3_S"),
        "iq2_s": _tiny(28, "IQ2_XS", "IQ3_S", "IQ3_S"),
        "iq2_xs": _tiny(20, "IQ2_XS", "Q2_K", None),
        "iq2_xxs": _tiny(19, "IQ2_XXS", "Q2_K", None),
        "iq1_m": _tiny(31, "IQ1_M", "Q2_K", "IQ2_XXS"),
        "iq1_s": _tiny(24, "IQ1_S", "Q2_K", "IQ2_XXS"),
        "mxfp4": _pure(38, "Q8_0", "Q8_0", Rule(_EXPERTS, "MXFP4")),
        "nvfp4": _pure(39, "Q8_0", "Q8_0", Rule(_EXPERTS, "NVFP4")),
        "tq2_0": Recipe(37, "TQ2_0", "Q6_K", note=_TERNARY),
        "tq1_0": Recipe(36, "TQ1_0", "Q6_K", note=_TERNARY),
    }
)
TYPES: tuple[str, ...] = tuple(RECIPES)

# Other names of recipes, in llama-quantize and elsewhere.
_ALIASES = MappingProxyType(
    {
        "q3_k": "q3_k_m",
        "q4_k": "q4_k_m",
        "q5_k": "q5_k_m",
        "mxfp4_moe": "mxfp4",
        "fp32": "f32",
        "float32": "f32",
        "fp16": "f16",
        "float16": "f16",
        "bfloat16": "bf16",
    }
)

# Without an imatrix, their quantizers fail or produce garbage; no recipe uses them for the embedding.
NEEDS_IMATRIX = frozenset(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"))


def recipe_name(text: str, permitted: Sequence[str] = TYPES) -> str:
    """The recipe that ``text`` names, in any case, with dashes for underscores, or by another program's name
    or number for it (``Q4_K_M``, ``q4-k-m``, ``Q4_K``, ``15``). Raises ValueError, naming the nearest and all
    permitted.
    """
    name = text.lower().replace("-", "_")
    name = _ALIASES.get(name, _of_number(name) if name.isdecimal() else name)
    if name in permitted:
        return name
    near = _nearest(name, permitted)
    hint = f" (the nearest is {near})" if near else ""
    raise ValueError(f"type is {text!r}, which is not known{hint}; permitted are {', '.join(permitted)}")


def _of_number(text: str) -> str:
    """The recipe of llama-quantize's number, as in ``general.file_type``; the text if there is none."""
    from gguf import LlamaFileType

    try:
        name = LlamaFileType(int(text)).name.lower()
    except ValueError:
        return text
    name = name.removeprefix("all_").removeprefix("mostly_")
    return _ALIASES.get(name, name)


def _nearest(name: str, permitted: Sequence[str]) -> str | None:
    """The recipe most like an unknown name, such as Unsloth's UD-Q4_K_XL, whose mixes are of each file."""
    name = name.removeprefix("ud_")
    base = re.sub(r"_(xl|l|m|s)$", "", name)
    for stem in (base, base.rpartition("_")[0]):
        family = [known for known in permitted if known == stem or known.startswith(f"{stem}_")]
        if stem and family:
            return family[0]
    return next(iter(difflib.get_close_matches(name, permitted, n=1)), None)
