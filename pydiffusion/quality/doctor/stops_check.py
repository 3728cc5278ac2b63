"""End tokens, and a short generation: does it end, is it clean, does a seed repeat it?"""

from __future__ import annotations

from pydiffusion import CanvasEvent, DiffusionModel, EndEvent
from pydiffusion.generation.image_prompt import AnyPrompt

from . import released
from .report import Result, Section
from .subject import Subject

_QUESTION = [{"role": "user", "content": "What is the capital of France? Answer in one short sentence."}]
_PROMPT = "The capital of France is"  # where there is no chat template
_CANVASES = 2
_SEED = 0
_STEPS = 6  # of the runs that are compared: each is that many steps on one thread
_SHOWN = 160  # characters


def _check_generation(subject: Subject, section: Section) -> None:
    """Generate a short answer."""
    model = subject.model
    if not model.has_chat_template:
        section.skip("the chat template", "the file has none: a plain prompt is used")
    n_tokens = min(_CANVASES * model.canvas_length, model.n_ctx)
    subject.progress("generating", 0.0)
    session = model.new_session()
    session.prefill(_prompt(model))
    canvases, end = [], None
    for event in session.generate_chat(max_tokens=n_tokens, seed=_SEED):
        if isinstance(event, CanvasEvent):
            canvases.append(event)
        elif isinstance(event, EndEvent):
            end = event
    assert end is not None
    _check_answer(model, canvases, end, section)


def _prompt(model: DiffusionModel) -> AnyPrompt:
    return model.chat_prompt(_QUESTION) if model.has_chat_template else model.tokenize(_PROMPT)


def _check_end_tokens(subject: Subject, section: Section) -> None:
    ends = {end.token_id: end for end in subject.tokenizer.end_tokens}
    listed = ", ".join(f"{i} {end.text!r} (by {', by '.join(end.reasons)})" for i, end in ends.items())
    section.judge(
        bool(ends),
        "end tokens",
        listed or "none",
        "at least one",
        "no answer would ever end: set tokenizer.ggml.eos_token_id, or convert the checkpoint again",
    )
    named = {i for i, end in ends.items() if any("tokenizer.ggml.eos_token_id" in r for r in end.reasons)}
    if not named:
        section.warn(
            "eos of the metadata",
            "neither tokenizer.ggml.eos_token_id nor tokenizer.ggml.eos_token_ids",
            "at least one of them",
            "end tokens are known by their texts only: convert the checkpoint again",
        )


def _compare_end_tokens(subject: Subject, section: Section) -> None:
    """Compare the end tokens with the reference's, or with the released checkpoint's."""
    ends = {end.token_id for end in subject.tokenizer.end_tokens}
    wanted, what = released.END_IDS, f"end tokens of {released.NAME}"
    if subject.reference is not None:
        value = subject.reference_metadata.get("tokenizer.ggml.eos_token_ids", ())
        wanted, what = tuple(value), "end tokens of the reference"
    elif not released.is_released(subject.metadata):
        return
    missing = sorted(set(wanted) - ends)
    section.judge(
        not missing,
        what,
        f"not {', '.join(map(str, missing))}" if missing else f"all of {', '.join(map(str, wanted))}",
        ", ".join(map(str, wanted)),
        "answers may run past their end: convert the checkpoint again, with its generation_config.json",
    )


def _check_answer(
    model: DiffusionModel, canvases: list[CanvasEvent], end: EndEvent, section: Section
) -> None:
    n_tokens, n_steps = sum(len(one.tokens) for one in canvases), sum(one.steps for one in canvases)
    figures = (
        f"{n_tokens} tokens, {len(canvases)} canvas{'es' * (len(canvases) != 1)}, {n_steps} steps of"
        f" {1000 * end.timings['denoise'] / max(1, n_steps):.0f} ms"
    )
    # Other models than the released one may have been trained for nothing that ends in so short a text.
    wrong = Result.FAILED if released.is_released(model.metadata) else Result.WARNING
    section.judge(
        end.reason == "eos",
        "a generation ends",
        f"{end.reason}: {figures}",
        f"eos within {_CANVASES} canvases",
        "the model does not stop: compare template and weights (--reference)",
        wrong,
    )
    text = "".join(one.text for one in canvases)
    section.judge(
        bool(text.strip()),
        "its text",
        repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...") if text.strip() else "empty",
        "an answer: Paris",
        "an empty answer points to a wrong template, or to wrong weights (--reference)",
        wrong,
    )
    leaked = model.tokenizer.markers.pattern.findall(text)
    section.judge(
        not leaked,
        "control tokens stay out of the text",
        f"{', '.join(sorted(set(leaked)))} in the text" if leaked else "none in the text",
        "none",
        "these tokens have the wrong type in the file, or the model writes them as words: see tokens",
        wrong,
    )


def _check_threads(subject: Subject, section: Section) -> None:
    """The same seed on one thread and on all, or on two where there is one CPU."""
    counts = (subject.n_threads if subject.n_threads > 1 else 2, 1)
    tokens = []
    for n_threads in counts:
        model = subject.load(n_threads=n_threads)
        found = model.generate(_prompt(model), max_tokens=model.canvas_length, seed=_SEED, steps=_STEPS)
        tokens.append(found.tokens.tolist())
    subject.close_model()
    at = next((i for i, (a, b) in enumerate(zip(*tokens, strict=False)) if a != b), min(map(len, tokens)))
    section.judge(
        tokens[0] == tokens[1],
        "a seed repeats its text",
        f"equal on {counts[0]} threads and on 1"
        if tokens[0] == tokens[1]
        else f"on {counts[0]} threads and on 1, tokens differ from {at} on",
        "equal",
        "a fault of pydiffusion on this machine: report it with this page",
    )


CHECKS = (_check_end_tokens, _compare_end_tokens, _check_generation, _check_threads)
