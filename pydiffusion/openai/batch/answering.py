"""Answers to the lines of a batch, each an object to be written as a line.

Every line becomes a request, validated and answered by the code that the server uses; a line in the short
form gets a short answer, made of the response.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from pydiffusion.chat.image_parts import ImageRules
from pydiffusion.errors import OptionError, PyDiffusionError
from pydiffusion.events import CanvasEvent, DraftEvent, EndEvent, Event
from pydiffusion.generation.batching import ActiveSequence, BatchRequest, batched_events
from pydiffusion.openai.errors import ApiError, from_exception, invalid
from pydiffusion.openai.fields import sort_fields
from pydiffusion.openai.lora import LoadedAdapters
from pydiffusion.openai.prepared import PREPARE, Prepared, PreparedRun
from pydiffusion.openai.reports import Prefilled, up_to_first_call
from pydiffusion.openai.requests import ENDPOINTS, ChatRequest, Terms
from pydiffusion.options import GenerationOptions

from .lines import Json, Line

if TYPE_CHECKING:
    from pydiffusion.model import DiffusionModel

_CHAT, _COMPLETION = "/v1/chat/completions", "/v1/completions"
# Options of the library that no endpoint takes; lines in the short form may have them.
_LIBRARY_ONLY = ("canvas_length", "dropped_mass", "eos", "canvas", "hold", "function_calls")
# Of an answer in OpenAI's form: number and digest of its line, so that a resumed run knows what is answered.
_OWN_ID = re.compile(r"batch_req_(\d+)_([0-9a-f]{8})")
_NO_LIMIT = -1  # as in a chat, where the endpoint's own would be 256 tokens
# Fields of which a line's own keeps the defaults of the others away.
_ONE_OF = (
    {"response_format", "json_schema", "regex", "grammar"},
    {"max_tokens", "max_completion_tokens"},
    {"temperature", "t_min", "t_max"},
)


@dataclass(frozen=True)
class Defaults:
    """Options of lines that leave them open; can be pickled, for other processes.

    options: of GenerationOptions, by name, and temperature; the seed is line 1's, each further line adds 1;
        lora as requests have it, by ids of the model's adapters.
    chat: pass a ``prompt`` as a user message through the chat template, or raw; None: if there is a template.
    system: system message for a ``prompt``.  special: parse control tokens in a raw ``prompt``.
    strict: refuse lines with fields without effect.
    """

    options: Json = field(default_factory=dict)
    chat: bool | None = None
    system: str | None = None
    special: bool = False
    strict: bool = False

    @property
    def salt(self) -> str:
        """For ``read_lines``: how a ``prompt`` is passed to the model. Empty for raw text."""
        if self.chat is False:
            return "special" if self.special else ""
        return f"chat {self.system or ''}"

    def uses_chat(self, model: DiffusionModel) -> bool:
        """Whether a ``prompt`` is a user message. Raises OptionError if that contradicts the other fields."""
        chat = model.has_chat_template if self.chat is None else self.chat
        if chat and self.special:
            raise OptionError("special", "control tokens of a prompt are parsed in raw text only")
        if not chat and self.system is not None:
            raise OptionError("system", "a system message needs the chat template")
        return chat


def answer_lines(
    model: DiffusionModel, lines: Iterable[Line], defaults: Defaults | None = None, *, n_parallel: int = 4
) -> Iterator[Json]:
    """Yield an answer for each line, in order of completion, with up to ``n_parallel`` in one graph.

    lines: consumed as sequences finish.
    An answer in the short form has ``line`` (the number), ``digest``, ``id`` if given, and ``text``,
    ``finish_reason``, ``seed``, ``steps``, ``prompt_tokens``, ``tokens``, where there are any ``reasoning``,
    ``tool_calls``, ``ignored`` (fields without effect); or ``error``. In OpenAI's form it is ``{"id",
    "custom_id", "response": {"status_code", "request_id", "body"}, "error"}``; ``error_of`` reads both.
    An error fails its line only. Raises OptionError for contradicting defaults.
    """
    defaults = defaults or Defaults()
    for name in defaults.options:
        if name not in _DEFAULTS:
            raise TypeError(f"unknown option {name!r}")
    jobs = _Jobs(model, defaults)
    for index, sequence, event in batched_events(model, jobs.requests(lines), n_parallel):
        jobs.take(index, sequence, event)
        yield from jobs.finished()
    yield from jobs.finished()


_OPTIONS = frozenset(option.name for option in fields(GenerationOptions))
_DEFAULTS = _OPTIONS | {"temperature"}


@dataclass
class _Job:
    """A line being answered: its request, and how many of its runs are left."""

    line: Line
    prepared: Prepared
    n_left: int
    sequences: list[ActiveSequence] = field(default_factory=list)
    is_over: bool = False


class _Jobs:
    """The lines being answered, by the indices of their runs."""

    def __init__(self, model: DiffusionModel, defaults: Defaults) -> None:
        self._model = model
        self._defaults = defaults
        self._chat = defaults.uses_chat(model)
        names = tuple(dict.fromkeys((model.path.stem, model.path.name, model.name)))
        adapters = LoadedAdapters(model.lora, names)
        # Whoever has this run on lines may read the files that they name.
        self._terms = Terms(names, defaults.strict, defaults.special, ImageRules(), adapters)
        self._index_to_run: dict[int, tuple[_Job, int]] = {}
        self._finished: deque[Json] = deque()

    def finished(self) -> Iterator[Json]:
        """Take the answers that are ready."""
        while self._finished:
            yield self._finished.popleft()

    def requests(self, lines: Iterable[Line]) -> Iterator[BatchRequest]:
        """The runs of all lines; a line that is refused has its answer at once."""
        index = 0
        for line in lines:
            try:
                prepared = self._prepare(line)
            except Exception as error:  # of this line only
                self._finished.append(failed_answer(line, error))
                continue
            chat = isinstance(prepared.request, ChatRequest)
            job = _Job(line, prepared, len(prepared.runs))
            for i_run, run in enumerate(prepared.runs):
                if job.is_over:  # one of its runs has failed
                    break
                self._index_to_run[index] = job, i_run
                yield BatchRequest(run.prompt, run.options, chat)
                index += 1

    def take(self, index: int, sequence: ActiveSequence | None, event: Event | Exception) -> None:
        """Add an event of a run to its line's answer."""
        job, i_run = self._index_to_run[index]
        if isinstance(event, DraftEvent):
            return
        if isinstance(event, Exception):
            self._fail(job, event)
            return
        assert sequence is not None  # it has events
        if job.is_over:
            sequence.leave()
            return
        answer, request = job.prepared.answer, job.prepared.request
        if sequence not in job.sequences:
            job.sequences.append(sequence)
            answer.take(i_run, Prefilled(sequence.n_cached))
        called = False
        if isinstance(event, CanvasEvent) and isinstance(request, ChatRequest) and request.one_call:
            event, called = up_to_first_call(event)
        answer.take(i_run, event)
        if called:
            sequence.leave()
            event = EndEvent(reason="stop", timings={}, seed=job.prepared.runs[i_run].options.seed)
            answer.take(i_run, event)
        if isinstance(event, EndEvent):
            del self._index_to_run[index]
            job.n_left -= 1
            if not job.n_left:
                self._finished.append(_answer(job.line, answer.whole()))

    def _fail(self, job: _Job, error: Exception) -> None:
        if not job.is_over:
            job.is_over = True
            self._finished.append(failed_answer(job.line, error))
        for sequence in job.sequences:
            sequence.leave()

    def _prepare(self, line: Line) -> Prepared:
        if line.error is not None:
            raise invalid(line.error)
        present = {name: value for name, value in line.fields.items() if value is not None}
        if line.form == "openai":
            url = line.url.rstrip("/")
            if url not in PREPARE:
                raise invalid(f"url is {line.url!r}; known are {', '.join(PREPARE)}"[:300], "url")
            if present.get("stream"):
                raise invalid("stream is true; an answer in a batch is whole", "stream")
            return self._prepared(url, present, line.number)
        own = {name: value for name, value in present.items() if name in _LIBRARY_ONLY}
        given = {name: value for name, value in present.items() if name not in _LIBRARY_ONLY}
        url, body = self._short_request(given)
        base = {} if "suffix" in body else {"max_tokens": _NO_LIMIT}
        prepared = self._prepared(url, body, line.number, base)
        return replace(prepared, runs=[self._with_options(run, own) for run in prepared.runs])

    def _prepared(self, url: str, body: Json, number: int, base: Json | None = None) -> Prepared:
        body = self._defaults_for(url, body, number, base or {}) | body
        prepared: Prepared = PREPARE[url](body, self._model, self._terms)
        return prepared

    def _short_request(self, body: Json) -> tuple[str, Json]:
        """Endpoint and body of a line in the short form."""
        schema = body.pop("json_schema", None)
        if schema is not None:
            if body.get("response_format") is not None:
                raise invalid("response_format and json_schema exclude each other: give one", "json_schema")
            body["response_format"] = _as_format(schema)
        own_system = body.pop("system", None)
        prompt, system = body.get("prompt"), self._defaults.system if own_system is None else own_system
        if own_system is not None and not (isinstance(prompt, str) and self._chat):
            raise invalid("system goes with a prompt that is passed through the chat template", "system")
        if isinstance(prompt, str) and self._chat:
            del body["prompt"]
            before = [] if system in (None, "") else [{"role": "system", "content": system}]
            body["messages"] = [*before, {"role": "user", "content": prompt}]
        return _CHAT if "messages" in body else _COMPLETION, body

    def _defaults_for(self, url: str, body: Json, number: int, base: Json) -> Json:
        """The default options that a body leaves open, as fields of its endpoint. base: those of these."""
        options = base | {name: value for name, value in self._defaults.options.items() if value is not None}
        if "seed" in options:
            options["seed"] = (options["seed"] + number - 1) % 2**64
        if "json_schema" in options:
            options["response_format"] = _as_format(options.pop("json_schema"))
        # Which of ours the body has, perhaps by another server's names.
        given = sort_fields(body, ENDPOINTS[url], ENDPOINTS).given
        left_open = set(ENDPOINTS[url]) - set(given)
        for group in _ONE_OF:
            if group & set(given):
                left_open -= group
        return {name: value for name, value in options.items() if name in left_open}

    def _with_options(self, run: PreparedRun, own: Json) -> PreparedRun:
        if not own:
            return run
        known = {option: getattr(run.options, option) for option in _OPTIONS}
        return replace(run, options=self._model.resolve(GenerationOptions(**{**known, **own})))


def _as_format(schema: Any) -> Json:
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise OptionError("json_schema", f"json_schema is not valid JSON: {error}") from None
    return {"type": "json_schema", "json_schema": {"name": "line", "schema": schema}}


def error_of(answer: Json) -> str | None:
    """The error of an answer in either form, None for a success."""
    if "custom_id" not in answer:
        error = answer.get("error")
        return error if error is None or isinstance(error, str) else json.dumps(error)
    response = answer.get("response") or {}
    if answer.get("error") is None and response.get("status_code") == 200:
        return None
    return str((answer.get("error") or {}).get("message", "failed"))


def failed_answer(line: Line, error: Exception) -> Json:
    """The answer to a line that can't be answered."""
    shown = _api_error(error)
    if line.form == "short":
        return _head(line) | {"error": shown.message}
    code = shown.code or ("invalid_request" if shown.status < 500 else "server_error")
    return _envelope(line, shown.status, shown.body()) | {"error": {"code": code, "message": shown.message}}


def _api_error(error: Exception) -> ApiError:
    if isinstance(error, (ApiError, PyDiffusionError, ValueError)):
        return from_exception(error)
    return ApiError(500, f"{type(error).__name__}: {error}")  # `from_exception` refers to a server's log


def _answer(line: Line, body: Json) -> Json:
    if line.form == "openai":
        return _envelope(line, 200, body) | {"error": None}
    choice, figures = body["choices"][0], body["diffusion"]
    return {
        **_head(line),
        **_said(choice),
        "finish_reason": figures["finish_reasons"][0],
        "seed": figures["seeds"][0],
        "steps": figures["steps"],
        "prompt_tokens": body["usage"]["prompt_tokens"],
        "tokens": body["usage"]["completion_tokens"],
        **({"ignored": figures["ignored_parameters"]} if figures["ignored_parameters"] else {}),
    }


def _said(choice: Json) -> Json:
    """Text, reasoning and tool calls of a response's choice."""
    message = choice.get("message")
    if message is None:
        return {"text": choice["text"]}
    calls = [
        {"name": call["function"]["name"], "arguments": json.loads(call["function"]["arguments"])}
        for call in message.get("tool_calls", ())
    ]
    reasoning = message.get("reasoning_content")
    return {
        "text": message["content"] or "",
        **({"reasoning": reasoning} if reasoning else {}),
        **({"tool_calls": calls} if calls else {}),
    }


def _head(line: Line) -> Json:
    return {"line": line.number, **({} if line.id is None else {"id": line.id}), "digest": line.digest}


def _envelope(line: Line, code: int, body: Json) -> Json:
    own_id = f"batch_req_{line.number}_{line.digest}"
    response = {"status_code": code, "request_id": own_id.replace("batch_", ""), "body": body}
    return {"id": own_id, "custom_id": line.id, "response": response}


def line_of(answer: Any) -> tuple[int, str]:
    """Number and digest of the line that an answer, in either form, belongs to. Raises ValueError."""
    if isinstance(answer, dict):
        number, digest = answer.get("line"), answer.get("digest")
        if found := _OWN_ID.fullmatch(str(answer.get("id"))):
            number, digest = int(found[1]), found[2]
        if type(number) is int and isinstance(digest, str):
            return number, digest
    raise ValueError("not an answer to a line of a batch")
