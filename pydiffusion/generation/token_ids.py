"""Validation of token ids and prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pydiffusion import _native
from pydiffusion._util.warn import warn_caller
from pydiffusion.errors import PromptWarning

if TYPE_CHECKING:
    from pydiffusion.tokenizer import Tokenizer

# Tokens at the end of a prompt that may open a reasoning block: the marker, "thought", a line break.
_THOUGHT_OPENING = 16

TokenIds = Sequence[int] | npt.NDArray[np.integer[Any]]


def check_bos(tokenizer: Tokenizer, prompt: np.ndarray) -> None:
    """Warn (PromptWarning) about a missing or doubled bos, at the line that called this package."""
    flaw = tokenizer.bos_flaw(prompt[:2].tolist())
    if flaw is not None:
        warn_caller(flaw, PromptWarning)


def prompt_end(tokens: np.ndarray) -> np.ndarray:
    """The last tokens of a prompt, in which a reasoning block may begin."""
    return tokens[-_THOUGHT_OPENING:]


def cut_at_eos(tokens: np.ndarray, eos: np.ndarray) -> np.ndarray:
    """Truncate at the first eos."""
    ends = np.flatnonzero(np.isin(tokens, eos))
    return tokens[: ends[0]] if len(ends) else tokens


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the common prefix of two token sequences."""
    n = min(len(a), len(b))
    differing = np.flatnonzero(a[:n] != b[:n])
    return int(differing[0]) if len(differing) else n


def token_array(ids: TokenIds, n_vocab: int) -> npt.NDArray[np.int32]:
    """Token ids as contiguous int32 (n,). TypeError unless they are integers, ValueError out of range."""
    try:
        array = np.asarray(ids)
    except ValueError:  # lists of different lengths
        raise ValueError("token ids must be one-dimensional; these are nested lists") from None
    if array.ndim != 1:
        raise ValueError(f"token ids must be one-dimensional; these have the shape {array.shape}")
    if array.size == 0:
        return np.empty(0, dtype=np.int32)
    if not np.issubdtype(array.dtype, np.integer):
        wrong = next((token for token in ids if not hasattr(token, "__index__")), ids[0])
        raise TypeError(f"token ids must be integers, not {array.dtype}; one of them is {wrong!r}"[:200])
    return _native.token_array(np.ascontiguousarray(array, dtype=np.int64), n_vocab)
