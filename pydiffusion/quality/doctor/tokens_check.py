"""The tokenizer: special tokens, round trips, and the ids of the reference's tokenizer."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from pydiffusion.convert.checkpoint.tokenizer_files import TOKENIZER
from pydiffusion.tokenizer import Tokenizer, TokenType

from .battery import TEXTS
from .report import Result, Section
from .subject import Subject

_CONVERT = "the tokenizer was converted wrongly: convert the checkpoint again"


def _compare_reference(subject: Subject, section: Section) -> None:
    """Compare with the reference's tokenizer, if there is one."""
    if subject.reference is None:
        section.skip("ids of the reference", "no --reference", "give the checkpoint's folder")
    elif not (subject.reference / TOKENIZER).is_file():
        section.skip("ids of the reference", f"the reference has no {TOKENIZER}", "download it, too")
    else:
        _compare(subject.tokenizer, subject.reference / TOKENIZER, section)


def _check_special(subject: Subject, section: Section) -> None:
    tokenizer = subject.tokenizer
    ids = {
        "bos": tokenizer.bos_id,
        "eos": tokenizer.eos_id,
        "padding": tokenizer.pad_id,
        "unknown": tokenizer.unknown_id,
        "mask": tokenizer.mask_id,
    }
    listed = ", ".join(f"{n} {_named(tokenizer, i)}" for n, i in ids.items() if i is not None)
    missing = [name for name, token_id in ids.items() if token_id is None]
    section.judge(
        not {"bos", "eos"} & set(missing),
        "special tokens",
        listed + (f"; none for {', '.join(missing)}" if missing else ""),
        "at least bos and eos",
        f"the file lacks tokenizer.ggml.*_token_id of {', '.join(missing)}: convert the checkpoint again",
    )
    section.judge(
        tokenizer.add_bos,
        "bos before a text",
        "added" if tokenizer.add_bos else "not added",
        "added",
        "without it the model answers badly: set tokenizer.ggml.add_bos_token to true",
        Result.WARNING,
    )


def _named(tokenizer: Tokenizer, token_id: int) -> str:
    return f"{token_id} {tokenizer.token_text(token_id)!r}"


def _check_markers(subject: Subject, section: Section) -> None:
    """Typed as normal text, a marker breaks into pieces, and the model doesn't recognize it."""
    tokenizer = subject.tokenizer
    wrong, missing = [], []
    for marker in tokenizer.chat_format.markers:
        token_id = tokenizer.token_id(marker)
        if token_id is None:
            missing.append(marker)
        elif tokenizer.token_type(token_id) not in (TokenType.CONTROL, TokenType.USER_DEFINED):
            wrong.append(f"{marker} ({tokenizer.token_type(token_id).name})")
    section.judge(
        not wrong,
        "types of the chat format's markers",
        f"wrong: {', '.join(wrong)}" if wrong else "control or user-defined",
        "control or user-defined",
        _CONVERT,
    )
    section.judge(
        not missing,
        "the chat format's markers",
        f"missing: {', '.join(missing)}" if missing else f"all {len(tokenizer.chat_format.markers)}",
        "all in the vocabulary",
        "reasoning and tool calls, or those of them that these mark, won't work with this file",
        Result.WARNING,
    )


def _check_round_trips(subject: Subject, section: Section) -> None:
    tokenizer = subject.tokenizer
    wrong = {}
    for name, text in TEXTS.items():
        back = tokenizer.detokenize(tokenizer.tokenize(text, add_bos=False), keep_control=True)
        if back != text:
            wrong[name] = back
    first = next(iter(wrong), "")
    section.judge(
        not wrong,
        "texts survive a round trip",
        f"{', '.join(wrong)}: {TEXTS[first][:40]!r} became {wrong[first][:40]!r}"
        if wrong
        else f"all {len(TEXTS)}",
        "all: 16 languages, emoji, whitespace, numbers, code",
        _CONVERT,
    )


def _check_control(subject: Subject, section: Section) -> None:
    """Control tokens are parsed where asked for, and plain text elsewhere."""
    tokenizer = subject.tokenizer
    wrong = []
    for token_id in range(tokenizer.n_vocab):
        if not tokenizer.is_control(token_id) or not tokenizer.token_text(token_id):
            continue
        text = tokenizer.token_text(token_id)
        parsed = tokenizer.tokenize(text, add_bos=False, parse_special=True)
        plain = tokenizer.tokenize(text, add_bos=False)
        if parsed != [token_id] or token_id in plain:
            wrong.append(f"{token_id} {text!r}")
    section.judge(
        not wrong,
        "control tokens",
        f"wrong: {', '.join(wrong[:5])}" if wrong else "parsed only where asked for",
        "parsed only where asked for",
        _CONVERT,
    )


def _compare(tokenizer: Tokenizer, path: Path, section: Section) -> None:
    """Compare vocabulary and ids with those of the library ``tokenizers``."""
    from tokenizers import Tokenizer as Reference

    try:
        reference = Reference.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        section.fail("the reference's tokenizer", str(error), "it loads", f"download {TOKENIZER} again")
        return
    theirs = reference.get_vocab(with_added_tokens=True)
    differing = [
        f"{token_id} is {_spelled(tokenizer, token_id)}, not {text!r}"
        for text, token_id in sorted(theirs.items(), key=lambda item: item[1])
        if token_id >= tokenizer.n_vocab or tokenizer.token_text(token_id) != text
    ]
    section.judge(
        not differing,
        "vocabulary of the reference",
        f"{len(differing)} tokens differ: {'; '.join(differing[:4])}"
        if differing
        else f"all {len(theirs)} tokens agree",
        f"{len(theirs)} equal tokens",
        "the file is of another model, or its vocabulary was changed: convert the checkpoint again",
    )
    _compare_ids(tokenizer, reference, section)


def _spelled(tokenizer: Tokenizer, token_id: int) -> str:
    return repr(tokenizer.token_text(token_id)) if token_id < tokenizer.n_vocab else "absent"


def _compare_ids(tokenizer: Tokenizer, reference: Any, section: Section) -> None:
    control = (tokenizer.token_text(i) for i in range(tokenizer.n_vocab) if tokenizer.is_control(i))
    texts = TEXTS | {"control tokens": " text ".join(islice((text for text in control if text), 40))}
    wrong = []
    for name, text in texts.items():
        ours = tokenizer.tokenize(text, add_bos=False, parse_special=True)
        theirs = reference.encode(text, add_special_tokens=False).ids
        if ours != theirs:
            at = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), -1)
            wrong.append(f"{name} (token {at}: {ours[at : at + 3]}, not {theirs[at : at + 3]})")
    section.judge(
        not wrong,
        "ids of the reference",
        "; ".join(wrong[:4]) if wrong else f"equal in all {len(texts)} texts",
        f"equal in all {len(texts)} texts",
        _CONVERT,
    )


CHECKS = (_check_special, _check_markers, _check_round_trips, _check_control, _compare_reference)
