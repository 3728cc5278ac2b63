"""``collect_imatrix``: collect the importance matrix of a diffusion model.

A diffusion model uses its weights in two modes: encoding clean text causally, and denoising canvases. Each
chunk of text is run in both: its first part is encoded, the canvas after it is noised to every level and
denoised, first without self-conditioning and then with the logits of that pass, as in generation.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pydiffusion import ConversionError, _native
from pydiffusion.convert.gguf.report import ConversionProgress
from pydiffusion.convert.quantization.imatrix_file import Entry, write_imatrix

if TYPE_CHECKING:
    from pydiffusion.options import Lora

NOISE = (0.1, 0.4, 0.7, 1.0)
CHUNK = 512
_SEED = 0


@dataclass(frozen=True)
class ImatrixReport:
    """Result of a collection. ``n_left_out``: texts of fewer than two tokens. ``unreached``: for each tensor,
    experts that no token was routed to.
    """

    target: Path
    n_chunks: int
    n_tokens: int
    n_denoised: int
    n_entries: int
    n_left_out: int
    unreached: dict[str, list[int]] = field(default_factory=dict)


def collect_imatrix(
    model: str | os.PathLike[str],
    texts: str | Sequence[str | Sequence[int]],
    target: str | os.PathLike[str],
    *,
    noise: Sequence[float] = NOISE,
    chunk: int = CHUNK,
    max_chunks: int | None = None,
    datasets: Sequence[str] = (),
    n_threads: int | None = None,
    lora: Lora = (),
    progress: Callable[[ConversionProgress], None] | None = None,
) -> ImatrixReport:
    """Run a model over text and write its importance matrix (imatrix).

    Args:
        model: a GGUF with as many bits as memory allows.
        texts: one text, cut into chunks, or several, each of which begins a chunk; as text, in which control
            tokens are parsed, or as tokens. A text no longer than a canvas is half encoded and half denoised,
            with padding after it.
        noise: fractions of the canvas's tokens to replace by random ones, one denoising each.
        chunk: maximum number of tokens encoded before a canvas.
        max_chunks: maximum number of chunks.
        datasets: names of the texts, stored in the file.
        lora: adapters to apply, as of ``DiffusionModel``.

    Raises:
        ConversionError: the texts are too short for one chunk, or the target can't be written.
        ValueError: a noise level or a length out of range.
        Other PyDiffusionErrors: the model can't be loaded.
    """
    from pydiffusion import DiffusionModel

    if not noise or not all(0 < t <= 1 for t in noise):
        raise ValueError(f"noise is {tuple(noise)}; levels are probabilities above 0, up to 1")
    if chunk < 1 or (max_chunks is not None and max_chunks < 1):
        raise ValueError("chunk and max_chunks must be at least 1")
    # Collected on the CPU only.
    with DiffusionModel(model, n_gpu_layers=0, n_threads=n_threads, lora=lora) as opened:
        chunk = min(chunk, opened.n_ctx - opened.canvas_length)
        by_text = [_chunks(opened, text, chunk) for text in ([texts] if isinstance(texts, str) else texts)]
        chunks = [each for of_text in by_text for each in of_text][:max_chunks]
        if not chunks:
            raise ConversionError("the text is too short: a chunk needs a token to encode and one to denoise")
        session = opened.new_session(chunk + opened.canvas_length).native
        session.collect_imatrix(True)
        for index, (prompt, clean) in enumerate(chunks):
            session.truncate(0)
            session.encode(prompt)
            for level, t in enumerate(noise):
                u, tokens = _native.random_draws(_SEED, index, level, len(clean), opened.n_vocab)
                canvas = np.where(u < t, tokens, clean).astype(np.int32)
                logits = session.denoise(canvas, None)
                session.denoise(canvas, logits / np.float32(0.4 + 0.4 * t))
            if progress is not None:
                progress(ConversionProgress("imatrix", f"chunk {index + 1}", index + 1, len(chunks)))
        entries = {
            name: Entry(sums.astype(np.float32), counts.astype(np.float32))
            for name, (sums, counts) in session.imatrix().items()
        }
    write_imatrix(target, entries, list(datasets), len(chunks), chunk)
    return ImatrixReport(
        Path(target),
        len(chunks),
        sum(len(prompt) for prompt, _ in chunks),
        2 * len(noise) * sum(len(clean) for _, clean in chunks),
        len(entries),
        sum(not of_text for of_text in by_text),
        {name: entry.unreached for name, entry in entries.items() if entry.unreached},
    )


def _chunks(model: Any, text: str | Sequence[int], size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Chunks as (tokens to encode, clean canvas after them), both int32; none for a text of fewer than two
    tokens.

    The next chunk encodes the canvas's tokens again, so that every token but those of the last canvas is seen
    in both modes. A text shorter than a canvas and one token is halved: its second half is a canvas with an
    eos and padding, as a short answer's.
    """
    n_canvas = model.canvas_length
    ids = model.tokenize(text, parse_special=True) if isinstance(text, str) else text
    ids = np.asarray(ids, np.int32)
    if len(ids) < 2:
        return []
    if len(ids) <= n_canvas:
        n_prompt = min(size, len(ids) // 2)
        return [(ids[:n_prompt], _pad_to_canvas(model, ids[n_prompt:]))]
    result = []
    for start in range(0, len(ids) - n_canvas, size):
        end = min(start + size, len(ids) - n_canvas)
        result.append((ids[start:end], ids[end : end + n_canvas]))
    return result


def _pad_to_canvas(model: Any, ids: np.ndarray) -> np.ndarray:
    tokenizer = model.tokenizer
    known = [token for token in (tokenizer.eos_id, tokenizer.pad_id) if token is not None] or [0]
    canvas = np.full(model.canvas_length, known[-1], np.int32)
    canvas[: len(ids)] = ids
    canvas[len(ids) : len(ids) + 1] = known[0]
    return canvas
