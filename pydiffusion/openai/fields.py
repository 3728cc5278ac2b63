"""Sort the fields of a request body: ours, the same by another name, refused, ignored.

Clients written for other servers send fields that mean nothing here. These are ignored and listed in the
response, but not what would change the meaning of an answer, nor a misspelt field of ours.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import ApiError, invalid

# Of OpenAI's API, sent by most clients by default: without meaning for a diffusion sampler or this server.
IGNORED = (
    "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "user",
    "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "verbosity",
)  # fmt: skip

# Refused, because an answer without them would be another one, except with values that request nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "logprobs": (False,),
    "top_logprobs": (0,),
    "prompt_logprobs": (False,),
    "n_probs": (0,),
    "logit_bias": ({}, []),
    "allowed_token_ids": ([],),
    "modalities": (["text"],),
    "audio": (),
    "images": ([],),
    "image_data": ([],),
    "prediction": (),
    "web_search_options": (),
    "functions": ([],),
    "function_call": ("none",),
    "best_of": (1,),
    "use_beam_search": (False,),
    "chat_template": ("",),
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
    "format": ("",),
    "lora_path": ("", []),
    "adapter_id": ("",),
}

# Names of other servers' fields that resemble one of ours and are no slip of it.
_NO_SLIPS = ("models", "reasoning_format")
# What stands for a slip although no field resembles it.
_HINTS = {
    "extra_body": "put the fields in it into the body itself, as OpenAI's client for Python does",
}
# From this likeness on, a name is taken for a slip. One letter of five missing: 0.89; one replaced: 0.8.
_LIKENESS = 0.86
_SHORTEST_SLIP, _LONGEST_SLIP = 4, 40  # characters
_MAX_FIELDS = 500  # far more than any client sends; each unknown one is compared with all of ours

Fields = dict[str, Any]


# Equivalents: the value of another server's field -> our fields of the same meaning, {} if it requests
# nothing, None if there are none.


def _limit(value: Any) -> Fields:
    return {"max_tokens": -1 if value in (-1, -2) else value}  # -2, "until the context is full", is -1 here


def _stops(value: Any) -> Fields:
    return {"stop": value}


def _schema(value: Any) -> Fields:
    if value in ("", {}, None):
        return {}
    return {"json_schema": value}


def _json_object(value: Any) -> Fields | None:
    return {"response_format": {"type": "json_object"}} if value is True else {} if not value else None


def _regex(value: Any) -> Fields:
    return {"regex": value} if value != "" else {}


def _grammar(value: Any) -> Fields:
    return {"grammar": value} if value != "" else {}


def _choice(value: Any) -> Fields | None:
    if value == []:
        return {}
    if not isinstance(value, list) or not all(isinstance(text, str) and text for text in value):
        return None
    return {"regex": "|".join(map(re.escape, value))}


def _structured(value: Any) -> Fields | None:
    if not isinstance(value, Mapping):
        return None
    kinds = {
        "json": _schema,
        "regex": _regex,
        "choice": _choice,
        "grammar": _grammar,
        "json_object": _json_object,
    }
    found: Fields = {}
    for name, given in value.items():
        if given is not None and name in kinds:
            meant = kinds[name](given)
            if meant is None:
                return None
            found |= meant
    return found


def _thinking(value: Any) -> Fields | None:
    """``{"type": "enabled", "budget_tokens": 100}``, ``{"type": "disabled"}``."""
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind not in ("enabled", "disabled"):
        return None
    budget = value.get("budget_tokens")
    limit = {} if budget is None or kind == "disabled" else {"thinking_budget": budget}
    return {"enable_thinking": kind == "enabled"} | limit


def _reasoning(value: Any) -> Fields | None:
    """``{"effort": "low"}``, ``{"enabled": false}``, ``{"max_tokens": 100}``."""
    if not isinstance(value, Mapping):
        return None
    ours = {"effort": "reasoning_effort", "enabled": "enable_thinking", "max_tokens": "thinking_budget"}
    return {ours[name]: given for name, given in value.items() if name in ours and given is not None}


def _think(value: Any) -> Fields | None:
    if isinstance(value, bool):
        return {"enable_thinking": value}
    return {"reasoning_effort": value} if isinstance(value, str) else None


_EQUIVALENTS: dict[str, Callable[[Any], Fields | None]] = {
    **dict.fromkeys(("n_predict", "num_predict", "max_new_tokens", "max_output_tokens"), _limit),
    **dict.fromkeys(("stop_sequences", "stop_sequence", "stopping_strings"), _stops),
    "guided_json": _schema,
    "guided_json_object": _json_object,
    "guided_regex": _regex,
    "guided_choice": _choice,
    **dict.fromkeys(("guided_grammar", "grammar_string"), _grammar),
    "structured_outputs": _structured,
    "thinking": _thinking,
    "reasoning": _reasoning,
    "think": _think,
    **dict.fromkeys(("parse_special", "control_tokens"), lambda value: {"special": value}),
    "add_bos_token": lambda value: {"add_special_tokens": value},
}
EQUIVALENTS = tuple(_EQUIVALENTS)
# Without them the answer would be another one.
_CONSTRAINING = ("guided_choice", "guided_json_object", "structured_outputs")


@dataclass
class SortedFields:
    """The fields of a body. given: ours with a value; ignored: names without effect, in the body's order;
    sources: of ours, the other server's field that one was given by.
    """

    given: Fields = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    sources: dict[str, str] = field(default_factory=dict)

    def ignore(self, name: str, *, strict: bool) -> None:
        """List a field as ignored. Raises ApiError if strict."""
        if strict:
            raise invalid(
                f"{name!r} has no effect, and such fields are refused here (strict): leave it out"[:200],
                name,
                "unknown_parameter",
            )
        self.ignored.append(name)

    @contextlib.contextmanager
    def blaming(self) -> Iterator[None]:
        """Name the client's own field in an error about one that it gave by another name."""
        try:
            yield
        except ApiError as error:
            source = self.sources.get(error.param or "")
            if source is not None:
                error.message = f"{source}: {error.message}"
                error.param = source
            raise


def sort_fields(
    body: Any, known: Collection[str], endpoints: Mapping[str, Collection[str]], *, strict: bool = False
) -> SortedFields:
    """Sort a body's fields; null counts as absent.

    known: of this endpoint.  endpoints: path -> fields of every endpoint.  strict: refuse what would be
        ignored.
    Raises ApiError for a body that is no object, an unsupported field, a slip, a field of another endpoint.
    """
    if not isinstance(body, dict):
        raise invalid("The body must be a JSON object.")
    if len(body) > _MAX_FIELDS:
        raise invalid(f"The body has {len(body)} fields; permitted are {_MAX_FIELDS}.")
    found = SortedFields(
        given={name: body[name] for name in body if name in known and body[name] is not None}
    )
    for name, value in body.items():
        if value is None or name in known:
            continue
        name = name.encode("utf-8", "replace").decode()  # a lone surrogate can't be sent back
        if name in UNSUPPORTED:
            _check_unsupported(name, value)
        elif not _take_equivalent(name, value, known, body, found):
            _check_unknown(name, value, known, endpoints)
            found.ignore(name, strict=strict)
    return found


def _check_unsupported(name: str, value: Any) -> None:
    if value not in UNSUPPORTED[name]:
        raise invalid(
            f"{name} is not supported by this server with the value {json.dumps(value)}"[:200],
            name,
            "unsupported_parameter",
        )


def _take_equivalent(
    name: str, value: Any, known: Collection[str], body: Fields, found: SortedFields
) -> bool:
    """Give ours the value of another server's field, unless the body has ours; whether it takes effect."""
    meant = _EQUIVALENTS[name](value) if name in _EQUIVALENTS else None
    if meant is None and name in _CONSTRAINING:
        raise invalid(f"{name} has a value that can't be obeyed: {json.dumps(value)}"[:200], name)
    if meant is None or not set(meant) <= set(known):
        return False
    if any(body.get(own) is not None and body[own] != given for own, given in meant.items()):
        return False
    for own, given in meant.items():
        if own not in found.given:
            found.given[own] = given
            found.sources[own] = name
    return True


def _check_unknown(
    name: str, value: Any, known: Collection[str], endpoints: Mapping[str, Collection[str]]
) -> None:
    """Raise ApiError for a slip, or a field of another endpoint with a value that requests something."""
    if name in _HINTS:
        raise invalid(
            f"Unrecognized request argument supplied: {name}: {_HINTS[name]}", name, "unknown_parameter"
        )
    if name in IGNORED or name in _EQUIVALENTS or name in _NO_SLIPS:
        return
    others = [path for path, fields in endpoints.items() if name in fields]
    if others:
        if value in (False, 0, "", [], {}):
            return
        raise invalid(
            f"{name} is a field of {' and '.join(others)}, not of this path", name, "unknown_parameter"
        )
    meant = slip_of(name, known)
    if meant is not None:
        raise invalid(
            f"Unrecognized request argument supplied: {name}; did you mean {meant}?"[:200],
            name,
            "unknown_parameter",
        )


def slip_of(name: str, known: Collection[str]) -> str | None:
    """The field that a name is probably a misspelling of, or None."""
    if not _SHORTEST_SLIP <= len(name) <= _LONGEST_SLIP:
        return None
    folded = {_fold(own): own for own in known}
    close = difflib.get_close_matches(_fold(name), folded, n=1, cutoff=_LIKENESS)
    return folded[close[0]] if close else None


def _fold(name: str) -> str:
    """Alike for max_tokens, maxTokens and Max-Tokens."""
    return re.sub(r"[-_ ]", "", name).lower()
