"""``collect_imatrix``: activation statistics of a diffusion model.

A diffusion model meets its weights in two ways: causally, reading clean text into the cache, and denoising
canvases that are noise to begin with. Each chunk of text is seen in both: its first part is encoded, the
canvas behind it is noised to every level and denoised, without self-conditioning and then with the logits of
that pass, as generation does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pydiffusion import _native
from pydiffusion.convert.gguf.report import ConversionProgress
from pydiffusion.convert.quantization.imatrix_file import Entry, write_imatrix
from pydiffusion.errors import ConversionError

NOISE = (0.1, 0.4, 0.7, 1.0)
CHUNK = 512
_SEED = 0


@dataclass(frozen=True)
class ImatrixReport:
    """``n_left_out``: texts of fewer than two tokens. ``unreached``: for each tensor, experts that no token
    of the texts was sent to.
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
    progress: Callable[[ConversionProgress], None] | None = None,
) -> ImatrixReport:
    """Run a model over text and write the statistics of its activations.

    Args:
        model: a GGUF of as many bits as memory allows.
        texts: one text, cut into chunks, or several, each of which begins a chunk; text, in which control
            tokens spelled out count as such, or tokens. A text of a canvas or less is half encoded and half
            denoised, with padding behind it.
        noise: shares of the canvas's tokens that are replaced by random ones, one denoising each.
        chunk: tokens encoded at most before a canvas.
        max_chunks: stop after so many.
        datasets: names of the texts, written into the file.

    Raises:
        ConversionError: the texts are too short for one chunk, or the target can't be written.
        ValueError: a noise or a length out of range.
        Other PyDiffusionErrors: the model can't be loaded.
    """
    from pydiffusion import DiffusionModel

    if not noise or not all(0 < t <= 1 for t in noise):
        raise ValueError(f"noise is {tuple(noise)}; levels are probabilities above 0, up to 1")
    if chunk < 1 or (max_chunks is not None and max_chunks < 1):
        raise ValueError("chunk and max_chunks must be at least 1")
    with DiffusionModel(model, n_gpu_layers=0, n_threads=n_threads) as opened:  # only there are they gathered
        chunk = min(chunk, opened.n_ctx - opened.canvas_length)
        by_text = [_chunks(opened, text, chunk) for text in ([texts] if isinstance(texts, str) else texts)]
        chunks = [each for of_text in by_text for each in of_text][:max_chunks]
        if not chunks:
            raise ConversionError("the text is too short: a chunk needs a token to encode and one to denoise")
        session = _native.Session(opened._native, chunk + opened.canvas_length)
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
    """(tokens to encode, clean canvas behind them), both int32; none of a text without two tokens.

    A canvas is text that the next chunk encodes again: so every token but those of the last canvas is met in
    both ways. A text that fills no canvas and a token before it is halved: as a short answer is, its end is
    a canvas with an eos and padding behind it.
    """
    n_canvas = model.canvas_length
    ids = model.tokenize(text, parse_special=True) if isinstance(text, str) else text
    ids = np.asarray(ids, np.int32)
    if len(ids) < 2:
        return []
    if len(ids) <= n_canvas:
        n_prompt = min(size, len(ids) // 2)
        return [(ids[:n_prompt], _filled_up(model, ids[n_prompt:]))]
    result = []
    for start in range(0, len(ids) - n_canvas, size):
        end = min(start + size, len(ids) - n_canvas)
        result.append((ids[start:end], ids[end : end + n_canvas]))
    return result


def _filled_up(model: Any, ids: np.ndarray) -> np.ndarray:
    tokenizer = model.tokenizer
    known = [token for token in (tokenizer.eos_id, tokenizer.pad_id) if token is not None] or [0]
    canvas = np.full(model.canvas_length, known[-1], np.int32)
    canvas[: len(ids)] = ids
    canvas[len(ids) : len(ids) + 1] = known[0]
    return canvas
