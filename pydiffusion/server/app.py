"""ASGI application: endpoints, API key, errors. ``create_app`` builds it around a model."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pydiffusion.errors import PyDiffusionError
from pydiffusion.openai.answers import Answer
from pydiffusion.openai.errors import ApiError, from_exception, invalid
from pydiffusion.openai.reports import Failed, Finished, Report
from pydiffusion.openai.requests import ChatRequest, chat_request, completion_request, infill_request
from pydiffusion.openai.requests import Request as ApiRequest
from pydiffusion.openai.response_format import check_constraint, held_options
from pydiffusion.openai.tool_choice import ToolUse

from .http import (
    KEEP_ALIVE_SECONDS,
    Disconnected,
    EventStream,
    read_json,
    to_json,
    unless_disconnected,
)
from .jobs import Job, Run
from .metrics import Metrics
from .page import PAGE_PATHS, add_page
from .scheduler import Scheduler

if TYPE_CHECKING:
    from pydiffusion.model import DiffusionModel

log = logging.getLogger("pydiffusion.server")

_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/infill", "/v1/models", "/health", "/metrics")
# Paths that need no API key: the page asks for it itself.
OPEN_PATHS = frozenset(("/health", *PAGE_PATHS))


@dataclass(frozen=True)
class Settings:
    """Server settings. n_parallel: most sequences in flight; n_sessions: KV caches kept.
    timeout: seconds from a request's arrival to its end, None for no limit.
    cors: origins whose pages may use the server.
    """

    api_key: str | None = None
    max_queue: int = 64
    n_parallel: int = 4
    n_sessions: int = 4
    timeout: float | None = 600.0
    max_body: int = 8 * 1024 * 1024
    cors: tuple[str, ...] = ()


class JsonResponse(Response):
    """Compact UTF-8 JSON."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_json(content)


def create_app(model: DiffusionModel, settings: Settings | None = None) -> FastAPI:
    """Build the application. Close its ``state.scheduler`` at the end."""
    settings = settings or Settings()
    app = FastAPI(title="pydiffusion", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.scheduler = Scheduler(
        model,
        max_queue=settings.max_queue,
        n_parallel=settings.n_parallel,
        n_sessions=settings.n_sessions,
    )
    endpoints = _Endpoints(model, settings, app.state.scheduler)
    app.add_api_route("/v1/chat/completions", endpoints.chat, methods=["POST"])
    app.add_api_route("/v1/completions", endpoints.completion, methods=["POST"])
    app.add_api_route("/v1/infill", endpoints.infill, methods=["POST"])
    app.add_api_route("/v1/models", endpoints.models, methods=["GET"])
    app.add_api_route("/v1/models/{name:path}", endpoints.model, methods=["GET"])
    app.add_api_route("/health", endpoints.health, methods=["GET"])
    app.add_api_route("/metrics", endpoints.metrics_page, methods=["GET"])
    add_page(app)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_middleware(_Guard, settings=settings, metrics=endpoints.metrics)
    if settings.cors:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(settings.cors), allow_methods=["*"], allow_headers=["*"]
        )
    return app


class _Endpoints:
    def __init__(self, model: DiffusionModel, settings: Settings, scheduler: Scheduler) -> None:
        self._model = model
        self._settings = settings
        self._scheduler = scheduler
        self._started = int(time.time())
        self._flaws_told: set[str] = set()
        self.metrics = Metrics()
        # A client may call the model by its name or by that of its file.
        self._names = tuple(dict.fromkeys((model.path.stem, model.path.name, model.name)))

    async def chat(self, request: Request) -> Response:
        body = await read_json(request, self._settings.max_body)
        wanted = chat_request(body, self._model, self._names)
        prompt = await asyncio.to_thread(self._chat_prompt, wanted.messages, wanted.variables)
        self._check_context(prompt, "messages")
        await asyncio.to_thread(self._check_constraint, wanted, prompt)
        prompts = [prompt] * len(wanted.options)
        answer = Answer(wanted, self._names[0], self._model.tokenizer, prompts)
        runs = [Run(prompt, options) for options in wanted.options]
        return await self._answer(request, wanted, answer, runs)

    async def completion(self, request: Request) -> Response:
        body = await read_json(request, self._settings.max_body)
        wanted = completion_request(body, self._model, self._names)
        ids = await asyncio.to_thread(self._prompt_ids, wanted.prompts)
        runs, heads = [], []
        for prompt, tokens in zip(wanted.prompts, ids, strict=True):
            self._check_context(tokens, "prompt")
            text = prompt if isinstance(prompt, str) else self._model.detokenize(tokens)
            heads += [text if wanted.echo else ""] * len(wanted.options)
            if wanted.layout is None:
                await asyncio.to_thread(self._check_constraint, wanted, tokens)
                options = wanted.options
            else:
                options = held_options(self._model, wanted.layout, tokens, wanted.options)
            runs += [Run(tokens, each) for each in options]
        prompts = [run.prompt for run in runs]
        answer = Answer(wanted, self._names[0], self._model.tokenizer, prompts, heads)
        return await self._answer(request, wanted, answer, runs)

    async def infill(self, request: Request) -> Response:
        body = await read_json(request, self._settings.max_body)
        wanted = await asyncio.to_thread(infill_request, body, self._model, self._names)
        self._check_context(wanted.prompt, "text")
        options = held_options(self._model, wanted.layout, wanted.prompt, wanted.options)
        runs = [Run(wanted.prompt, each) for each in options]
        answer = Answer(wanted, self._names[0], self._model.tokenizer, [wanted.prompt])
        return await self._answer(request, wanted, answer, runs)

    def _check_constraint(self, wanted: ApiRequest, prompt: list[int]) -> None:
        use = wanted.use if isinstance(wanted, ChatRequest) else ToolUse()
        check_constraint(self._model, wanted.options[0], len(prompt), use)

    def _chat_prompt(self, messages: list[dict[str, Any]], variables: dict[str, Any]) -> list[int]:
        try:
            return self._model.chat_prompt(messages, **variables)
        except (PyDiffusionError, ValueError) as error:  # refused by the template, as a rule
            raise invalid(str(error), "messages") from None

    def _prompt_ids(self, prompts: list[str | list[int]]) -> list[list[int]]:
        try:
            return [self._model.tokenize(p) if isinstance(p, str) else p for p in prompts]
        except (PyDiffusionError, ValueError) as error:
            raise invalid(str(error), "prompt") from None

    def _check_context(self, tokens: list[int], param: str) -> None:
        room = self._model.n_ctx - self._model.canvas_length
        if not tokens:
            raise invalid(f"{param} has no tokens", param)
        if len(tokens) > room:
            raise invalid(
                f"This server's context is {self._model.n_ctx} tokens, of which a canvas takes"
                f" {self._model.canvas_length}: {param} resulted in {len(tokens)} tokens, and {room} fit.",
                param,
                "context_length_exceeded",
            )

    def _log_flaws(self, runs: list[Run]) -> None:
        """Log problems of prompts that are answered anyway, each problem once."""
        for run in runs:
            flaw = self._model.tokenizer.bos_flaw(run.prompt)
            if flaw is not None and flaw not in self._flaws_told:
                self._flaws_told.add(flaw)
                log.warning("%s", flaw)

    # Scheduling

    async def _answer(
        self, request: Request, wanted: ApiRequest, answer: Answer, runs: list[Run]
    ) -> Response:
        self._log_flaws(runs)
        loop = asyncio.get_running_loop()
        arrivals: asyncio.Queue[tuple[int, Report]] = asyncio.Queue()

        def emit(i_run: int, report: Report) -> None:
            with contextlib.suppress(RuntimeError):  # the event loop has ended
                loop.call_soon_threadsafe(arrivals.put_nowait, (i_run, report))

        chat = isinstance(wanted, ChatRequest)
        one_call = isinstance(wanted, ChatRequest) and wanted.one_call
        job = Job(runs, emit, chat=chat, drafts=wanted.drafts, one_call=one_call)
        self._scheduler.submit(job)
        reports = self._reports(job, arrivals)
        if wanted.stream:
            return EventStream(_chunks(answer, reports))
        return JsonResponse(await unless_disconnected(request.receive, _whole(answer, reports)))

    async def _reports(
        self, job: Job, arrivals: asyncio.Queue[tuple[int, Report]]
    ) -> AsyncIterator[tuple[int, Report] | None]:
        """Yield a job's reports until it ends, None as a keep-alive while nothing happens. Raises ApiError.

        Left early, in whichever way, it stops the job.
        """
        limit = self._settings.timeout
        end = None if limit is None else time.monotonic() + limit
        finished = False
        try:
            while not finished:
                wait = KEEP_ALIVE_SECONDS if end is None else min(KEEP_ALIVE_SECONDS, end - time.monotonic())
                if wait <= 0:
                    raise ApiError(
                        504,
                        f"The request took longer than the {limit:g} s that this server allows.",
                        code="timeout",
                        headers={"x-should-retry": "false"},
                    )
                try:
                    i_run, report = await asyncio.wait_for(arrivals.get(), wait)
                except (TimeoutError, asyncio.TimeoutError):
                    yield None
                    continue
                finished = isinstance(report, (Failed, Finished))
                if isinstance(report, Failed):
                    raise report.error
                yield i_run, report
        finally:
            if not finished:
                self._scheduler.cancel(job, ApiError(499, "The request was cancelled.", code="cancelled"))

    # Models, health, metrics

    async def models(self) -> Response:
        return JsonResponse({"object": "list", "data": [self._model_object()]})

    async def model(self, name: str) -> Response:
        if name not in self._names:
            raise ApiError(
                404, f"The model {name!r} does not exist here."[:300], param="model", code="model_not_found"
            )
        return JsonResponse(self._model_object())

    def _model_object(self) -> dict[str, Any]:
        return {
            "id": self._names[0],
            "object": "model",
            "created": self._started,
            "owned_by": "pydiffusion",
            "context_length": self._model.n_ctx,
            "canvas_length": self._model.canvas_length,
        }

    async def health(self) -> Response:
        return JsonResponse(
            {
                "status": "ok",
                "model": self._names[0],
                "active": self._scheduler.n_active,
                "waiting": self._scheduler.n_waiting,
            }
        )

    async def metrics_page(self) -> Response:
        return PlainTextResponse(
            self.metrics.text(self._scheduler), media_type="text/plain; version=0.0.4; charset=utf-8"
        )


async def _whole(answer: Answer, reports: AsyncIterator[tuple[int, Report] | None]) -> dict[str, Any]:
    async with contextlib.aclosing(reports):  # type: ignore[type-var]
        async for arrival in reports:
            if arrival is not None:
                answer.take(*arrival)
    return answer.whole()


async def _chunks(
    answer: Answer, reports: AsyncIterator[tuple[int, Report] | None]
) -> AsyncIterator[dict[str, Any] | None]:
    try:
        async with contextlib.aclosing(reports):  # type: ignore[type-var]
            async for arrival in reports:
                if arrival is None:
                    yield None
                    continue
                for chunk in answer.chunks(*arrival):
                    yield chunk
        usage = answer.usage_chunk()
        if usage is not None:
            yield usage
    except ApiError as error:  # the status line is sent already: the stream has to carry the error
        yield error.body()
    except Exception as error:
        yield from_exception(error).body()


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JsonResponse(error.body(), status_code=error.status, headers=error.headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = {404: f"Unknown request URL: {request.method} {request.url.path}"}.get(
        error.status_code, f"{error.detail}: {request.method} {request.url.path}"
    )
    code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code)
    return await _api_error(
        request, ApiError(error.status_code, message[:300], code=code, headers=dict(error.headers or {}))
    )


class _CountedSend:
    """Sends the messages of one response, and counts it by path and status."""

    def __init__(self, send: Send, path: str, metrics: Metrics) -> None:
        self._send = send
        self._path = path if path in _PATHS else "other"
        self._metrics = metrics
        self.is_started = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.is_started = True
            self._metrics.responses[self._path, message["status"]] += 1
        await self._send(message)


class _Guard:
    """Middleware: API key, cross-origin pages, response counts, unexpected errors."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _CountedSend(send, scope["path"], self._metrics)
        try:
            self._check(Request(scope))
            await self._app(scope, receive, answer)
        except Disconnected:
            pass
        except Exception as error:
            if answer.is_started:
                log.error("unexpected error", exc_info=error)
                raise
            response = await _api_error(Request(scope), from_exception(error))
            await response(scope, receive, answer)

    def _check(self, request: Request) -> None:
        """Raise ApiError for a request without the key, or from a page of another host."""
        if request.url.path in OPEN_PATHS:
            return
        origin = request.headers.get("origin")
        if origin is not None and not self._may_use(origin, request.headers.get("host", "")):
            raise ApiError(403, f"Pages of {origin} may not use this server (--cors)."[:300], code="origin")
        if self._settings.api_key is None:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(
            key.strip().encode("latin-1"), self._settings.api_key.encode()
        ):
            raise ApiError(
                401,
                "Incorrect API key provided." if key else "You didn't provide an API key.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _may_use(self, origin: str, host: str) -> bool:
        return (
            origin.partition("://")[2] == host or origin in self._settings.cors or "*" in self._settings.cors
        )
