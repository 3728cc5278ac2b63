"""Infill: the text around the holes is held fixed on the canvas while the holes are denoised."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence, Sized
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from pydiffusion.errors import ContextOverflowError, OptionError
from pydiffusion.events import Completion
from pydiffusion.options import CONSTRAINTS, GenerationOptions, ResolvedOptions, integer_option

if TYPE_CHECKING:
    from pydiffusion.model import DiffusionModel
    from pydiffusion.tokenizer import Tokenizer

HOLE = "<|hole|>"
_HOLE = re.compile(r"<\|hole(?::(\d{1,6}))?\|>")
DEFAULT_HOLE_TOKENS = 16
# Options that would cut the text, or that the layout sets itself.
NOT_AROUND_HOLES = (
    "max_tokens", "stop", "eos", "canvas", "hold", *CONSTRAINTS, "thinking_budget",
    "stop_on_repetition",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Infill:
    """A filled text.

    text: the whole text.  holes: the text of each hole.  completion: the generation (steps, seed, timings).
    """

    text: str
    holes: tuple[str, ...]
    completion: Completion


@dataclass(frozen=True)
class Hole:
    """A hole of up to ``n_tokens``. tokens: initial tokens instead of noise."""

    n_tokens: int
    tokens: tuple[int, ...] = ()


@dataclass
class Layout:
    """Layout of fixed text and holes on the canvases after a prompt.

    head: text moved into the prompt.  parts: fixed tokens and holes in order.
    """

    head: str
    parts: list[list[int] | Hole] = field(default_factory=list)

    @property
    def n_tokens(self) -> int:
        return sum(part.n_tokens if isinstance(part, Hole) else len(part) for part in self.parts)

    def options(self, options: ResolvedOptions) -> ResolvedOptions:
        """The options for generating this layout; positions after it are held at an eos."""
        canvas: list[int] = []
        hold: list[bool] = []
        for part in self.parts:
            if isinstance(part, Hole):
                start = part.tokens[: part.n_tokens]
                canvas += [*start, *[-1] * (part.n_tokens - len(start))]
                hold += [False] * part.n_tokens
            else:
                canvas += part
                hold += [True] * len(part)
        n_rest = -len(canvas) % options.canvas_length
        canvas += [options.eos[0] if options.eos else -1] * n_rest
        hold += [bool(options.eos)] * n_rest
        # An eos is an end of its hole only, see `read`.
        return replace(options, max_tokens=self.n_tokens, eos=(), canvas=tuple(canvas), hold=tuple(hold))

    @property
    def n_fixed(self) -> int:
        """Tokens that are not in a hole."""
        return sum(len(part) for part in self.parts if not isinstance(part, Hole))

    def read(self, tokens: Sequence[int], tokenizer: Tokenizer) -> tuple[str, tuple[str, ...]]:
        """Extract the text and its holes; a hole ends before its first control token."""
        holes = self.filled(tokens, tokenizer)
        inside = iter(holes)
        parts = (next(inside) if isinstance(part, Hole) else part for part in self.parts)
        text = tokenizer.detokenize(token for part in parts for token in part)
        return self.head + text, tuple(map(tokenizer.detokenize, holes))

    def filled(self, tokens: Sequence[int], tokenizer: Tokenizer) -> list[list[int]]:
        """The tokens of each hole, up to its first control token."""
        found = []
        at = 0
        for part in self.parts:
            n_tokens = part.n_tokens if isinstance(part, Hole) else len(part)
            if isinstance(part, Hole):
                inside = (int(token) for token in tokens[at : at + n_tokens])
                found.append(list(itertools.takewhile(lambda id: not tokenizer.is_control(id), inside)))
            at += n_tokens
        return found


def lay_out(model: DiffusionModel, text: str, hole_tokens: int, whole: bool) -> Layout:
    """Lay out a text that contains ``<|hole|>`` or ``<|hole:N|>``.

    hole_tokens: length of holes without an N.  whole: put the whole text on the canvas; else the text
        before the first hole goes into the prompt.
    Raises OptionError for hole_tokens, ValueError for a text without a hole, or with an empty one.
    """
    hole_tokens = integer_option("hole_tokens", hole_tokens, high=10**6)
    pieces = _HOLE.split(text)
    if len(pieces) == 1:
        raise ValueError(f"the text has no hole: put {HOLE} or <|hole:N|> (N tokens at most) where one is")
    layout = Layout("" if whole else pieces[0])
    for i, piece in enumerate(pieces):
        if i % 2:
            n_tokens = hole_tokens if piece is None else int(piece)
            if n_tokens < 1:
                raise ValueError(f"hole {i // 2 + 1} has no tokens: <|hole:N|> takes an N of at least 1")
            layout.parts.append(Hole(n_tokens))
        elif piece and (i or whole):
            layout.parts.append(model.tokenize(piece, add_bos=False))
    return layout


def lay_out_suffix(model: DiffusionModel, suffix: str, max_tokens: int | None, n_canvas: int) -> Layout:
    """Lay out a hole after the prompt and a suffix after the hole, on one canvas.

    A hole sees only its own canvas: a suffix longer than half of it is truncated. The hole takes at most
    ``max_tokens`` and at most what the suffix leaves.
    """
    held = model.tokenize(suffix, add_bos=False)[: n_canvas // 2]
    room = n_canvas - len(held)
    return Layout("", [Hole(room if max_tokens is None else min(max_tokens, room)), held])


def lay_out_spans(
    model: DiffusionModel, text: str, spans: Sequence[tuple[int, int]], more_tokens: int, whole: bool
) -> Layout:
    """Lay out spans of a text as holes that start from their current tokens, plus ``more_tokens`` each."""
    if not spans:
        raise ValueError("edit needs at least one span, (start, end) in characters")
    end_before = 0
    pieces: list[str] = []
    for start, end in sorted(spans):
        if not end_before <= start <= end <= len(text):
            raise ValueError(
                f"the span ({start}, {end}) overlaps another or is not within the {len(text)} characters"
            )
        pieces += [text[end_before:start], text[start:end]]
        end_before = end
    pieces.append(text[end_before:])
    layout = Layout("" if whole else pieces[0])
    for i, piece in enumerate(pieces):
        ids = model.tokenize(piece, add_bos=False)
        if i % 2:
            if not ids and more_tokens < 1:
                raise OptionError("more_tokens", "an empty span needs more_tokens of at least 1")
            layout.parts.append(Hole(len(ids) + more_tokens, tuple(ids)))
        elif ids and (i or whole):
            layout.parts.append(ids)
    return layout


def prompt_of(model: DiffusionModel, layout: Layout, instruction: str | None) -> list[int]:
    """Prompt tokens: the instruction as a user message; without one, the text before the first hole."""
    if instruction is not None:
        prompt = model.chat_prompt([{"role": "user", "content": instruction}])
        assert isinstance(prompt, list)  # there are no images
        return prompt
    ids = model.tokenize(layout.head)
    if not ids and model.tokenizer.bos_id is not None:
        return [
            model.tokenizer.bos_id
        ]  # a hole needs a token before it, whether or not the file asks for one
    if not ids:
        raise ValueError("the file names no bos, so a text must not begin with its hole: give an instruction")
    return ids


def prepare(
    model: DiffusionModel, layout: Layout, prompt: Sized, options: GenerationOptions, n_ctx: int
) -> ResolvedOptions:
    """Options that generate this layout. Raises ContextOverflowError, OptionError."""
    for name in NOT_AROUND_HOLES:
        if getattr(options, name) is not None:
            raise OptionError(name, f"{name} can't be chosen for a text with holes")
    return hold_around(layout, prompt, model.resolve(options), n_ctx)


def hold_around(layout: Layout, prompt: Sized, options: ResolvedOptions, n_ctx: int) -> ResolvedOptions:
    """As ``prepare``, of options that leave to the layout what it sets. Raises ContextOverflowError."""
    n_canvas = options.canvas_length
    needed = len(prompt) + -(-layout.n_tokens // n_canvas) * n_canvas
    if needed > n_ctx:
        raise ContextOverflowError(
            f"a prompt of {len(prompt)} tokens and canvases for {layout.n_tokens} do not fit the context of"
            f" {n_ctx}: shorten the text or open the model with a larger n_ctx"
        )
    return layout.options(options)


def collect(layout: Layout, completion: Completion, tokenizer: Tokenizer) -> Infill:
    """Build the result of a generation run with the options of ``prepare``."""
    text, holes = layout.read(completion.tokens.tolist(), tokenizer)
    return Infill(text, holes, completion)
