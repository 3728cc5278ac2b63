"""ASGI application: endpoints, API key, errors. ``create_app`` builds it around a model."""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from pydiffusion.chat.image_parts import ImageRules
from pydiffusion.openai.answers import Answer
from pydiffusion.openai.errors import ApiError, from_exception
from pydiffusion.openai.lora import LoadedAdapters, NamedAdapter, check_name
from pydiffusion.openai.prepared import PREPARE, Prepared
from pydiffusion.openai.reports import Failed, Finished, Report
from pydiffusion.openai.requests import ENDPOINTS, ChatRequest, Terms

from .access import Access, clean_host, clean_key, clean_origin
from .fetching import Fetcher
from .guard import Guard, PrivateNetwork
from .http import KEEP_ALIVE_SECONDS, EventStream, read_json, to_json, unless_disconnected
from .jobs import Job
from .metrics import Metrics
from .page import PAGE_PATHS, add_page
from .scheduler import Scheduler

if TYPE_CHECKING:
    from pydiffusion.model import DiffusionModel

log = logging.getLogger("pydiffusion.server")

# As llama.cpp, vLLM, Kubernetes and others probe; none needs a key.
HEALTH_PATHS = (
    "/health", "/v1/health", "/healthz", "/ping", "/livez", "/health/live", "/v1/health/live",
)  # fmt: skip
READY_PATHS = ("/v1/health/ready", "/health/ready", "/ready", "/readyz")
_LORA_PATH = "/lora-adapters"  # as llama.cpp
_PATHS = (*ENDPOINTS, "/v1/models", _LORA_PATH, "/metrics", *HEALTH_PATHS, *READY_PATHS)
# Paths that need no API key: the page asks for it itself.
OPEN_PATHS = frozenset((*HEALTH_PATHS, *READY_PATHS, *PAGE_PATHS))
# Of Ollama, llama.cpp's own, OpenAI's newer ones, Anthropic's.
_NOT_SERVED = (
    "/api/", "/v1/responses", "/v1/messages", "/v1/embeddings", "/embedding", "/props", "/slots", "/tokenize",
    "/detokenize", "/apply-template", "/rerank",
)  # fmt: skip
_READ = ["GET", "HEAD"]
_MAX_BODY = 8 << 20
_MAX_BODY_WITH_IMAGES = 32 << 20  # several photographs of a phone, in base64
_MAX_TOLD = 1000  # names of ignored fields that are logged at most


@dataclass(frozen=True)
class Settings:
    """Server settings. n_parallel: most sequences in flight; n_sessions: KV caches kept.
    timeout: seconds from a request's arrival to its end, None for no limit.
    cors: origins whose pages may use the server.  allowed_hosts: names that it has besides the machine's own.
    strict: refuse fields without effect, and names of other models.
    special: control tokens in the prompt texts of completions are such, unless the request says otherwise.
    max_body: bytes of a request; None: 8 MiB, 32 MiB if the model reads images.
    fetch_images: get images that requests name by http(s) URLs.
    apply_lora: the model's adapters are on in requests that choose none, until POST /lora-adapters.
    """

    api_key: str | None = None
    max_queue: int = 64
    n_parallel: int = 4
    n_sessions: int = 4
    timeout: float | None = 600.0
    max_body: int | None = None
    cors: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    strict: bool = False
    special: bool = False
    fetch_images: bool = False
    apply_lora: bool = True

    def __post_init__(self) -> None:
        """Raises ValueError for a key, an origin or a host name that no request could have."""
        if self.api_key is not None:
            object.__setattr__(self, "api_key", clean_key(self.api_key, "the API key"))
        object.__setattr__(self, "cors", tuple(map(clean_origin, self.cors)))
        object.__setattr__(self, "allowed_hosts", tuple(map(clean_host, self.allowed_hosts)))

    def body_limit(self, model: DiffusionModel) -> int:
        """Bytes of the largest request."""
        default = _MAX_BODY if model.vision is None else _MAX_BODY_WITH_IMAGES
        return default if self.max_body is None else self.max_body


class JsonResponse(Response):
    """Compact UTF-8 JSON."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_json(content)


def create_app(model: DiffusionModel, settings: Settings | None = None) -> FastAPI:
    """Build the application. Close its ``state.scheduler`` at the end."""
    settings = settings or Settings()
    app = FastAPI(
        title="pydiffusion", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
    )
    app.state.scheduler = Scheduler(
        model,
        max_queue=settings.max_queue,
        n_parallel=settings.n_parallel,
        n_sessions=settings.n_sessions,
    )
    endpoints = _Endpoints(model, settings, app.state.scheduler)
    for path in ENDPOINTS:
        app.add_api_route(path, endpoints.generation(path), methods=["POST"])
    app.add_api_route("/v1/models", endpoints.models, methods=_READ)
    app.add_api_route("/v1/models/{name:path}", endpoints.model, methods=_READ)
    for path in HEALTH_PATHS:
        app.add_api_route(path, endpoints.health, methods=_READ)
    for path in READY_PATHS:
        app.add_api_route(path, endpoints.ready, methods=_READ)
    app.add_api_route(_LORA_PATH, endpoints.adapters, methods=[*_READ, "POST"])
    app.add_api_route("/metrics", endpoints.metrics_page, methods=_READ)
    add_page(app, settings.body_limit(model))
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    access = Access(settings.api_key, settings.cors, settings.allowed_hosts)
    app.add_middleware(
        Guard, access=access, metrics=endpoints.metrics, open_paths=OPEN_PATHS, respond=_error_response
    )
    if settings.cors:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
        app.add_middleware(PrivateNetwork)
    return app


class _Endpoints:
    def __init__(self, model: DiffusionModel, settings: Settings, scheduler: Scheduler) -> None:
        self._model = model
        self._settings = settings
        self._scheduler = scheduler
        self._max_body = settings.body_limit(model)
        self._started = int(time.time())
        self._told: set[str] = set()
        self.metrics = Metrics(_PATHS)
        # A client may call the model by its name or by that of its file.
        names = tuple(dict.fromkeys((model.path.stem, model.path.name, model.name)))
        self._adapters = LoadedAdapters(model.lora, names, apply=settings.apply_lora)
        self._terms = Terms(names, settings.strict, settings.special, adapters=self._adapters)

    def generation(self, path: str) -> Callable[[Request], Awaitable[Response]]:
        """The endpoint of a path that generates."""

        async def endpoint(request: Request) -> Response:
            body = await read_json(request, self._max_body)
            prepared = await asyncio.to_thread(PREPARE[path], body, self._model, self._terms_of_request())
            self._log_flaws(prepared)
            return await self._answer(request, prepared)

        return endpoint

    def _terms_of_request(self) -> Terms:
        """The server's terms, with a time limit of this request's for what it has fetched."""
        if not self._settings.fetch_images:
            return self._terms
        return replace(self._terms, images=ImageRules(files=False, fetch=Fetcher().fetch))

    def _log_flaws(self, prepared: Prepared) -> None:
        """Log problems of requests that are answered anyway, each problem once."""
        flaws = {flaw for run in prepared.runs if (flaw := self._model.tokenizer.bos_flaw(run.first_ids))}
        flaws |= {f"request field {name[:100]!r} has no effect here" for name in prepared.request.ignored}
        for flaw in sorted(flaws - self._told):
            if len(self._told) < _MAX_TOLD:
                self._told.add(flaw)
                log.warning("%s", flaw)

    # Scheduling

    async def _answer(self, request: Request, prepared: Prepared) -> Response:
        wanted, answer = prepared.request, prepared.answer
        loop = asyncio.get_running_loop()
        arrivals: asyncio.Queue[tuple[int, Report]] = asyncio.Queue()

        def emit(i_run: int, report: Report) -> None:
            with contextlib.suppress(RuntimeError):  # the event loop has ended
                loop.call_soon_threadsafe(arrivals.put_nowait, (i_run, report))

        chat = isinstance(wanted, ChatRequest)
        one_call = isinstance(wanted, ChatRequest) and wanted.one_call
        job = Job(prepared.runs, emit, chat=chat, drafts=wanted.drafts, one_call=one_call)
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

    # Models, adapters, health, metrics

    async def models(self) -> Response:
        objects = [self._model_object(), *map(self._adapter_object, self._adapters.adapters)]
        return JsonResponse({"object": "list", "data": objects})

    async def model(self, name: str) -> Response:
        adapter = self._adapters.find(name)
        if adapter is not None:
            return JsonResponse(self._adapter_object(adapter))
        check_name(name, self._terms.names, self._adapters)
        return JsonResponse(self._model_object())

    async def adapters(self, request: Request) -> Response:
        """List them; by POST, set the scales of requests that come from now on: others keep theirs."""
        if request.method != "POST":
            return JsonResponse(self._adapters.shown())
        self._adapters.set_scales(await read_json(request, self._max_body))
        return JsonResponse({"success": True})

    def _adapter_object(self, named: NamedAdapter) -> dict[str, Any]:
        """As a model of its own, which requests choose by its name."""
        base = self._model_object()
        return base | {"id": named.name, "parent": base["id"], "lora": {"id": named.id, "scale": named.scale}}

    def _model_object(self) -> dict[str, Any]:
        return {
            "id": self._terms.names[0],
            "object": "model",
            "created": self._started,
            "owned_by": "pydiffusion",
            "context_length": self._model.n_ctx,
            "canvas_length": self._model.canvas_length,
            "vision": self._model.vision is not None,
        }

    async def health(self) -> Response:
        return self._health("ok")

    async def ready(self) -> Response:
        """Whether new requests are taken: not while the server is shutting down."""
        if self._scheduler.is_closing:
            return self._health("shutting down", 503)
        return self._health("ok")

    def _health(self, status: str, code: int = 200) -> Response:
        return JsonResponse(
            {
                "status": status,
                "model": self._terms.names[0],
                "active": self._scheduler.n_active,
                "waiting": self._scheduler.n_waiting,
            },
            code,
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


def _error_response(error: ApiError) -> Response:
    return JsonResponse(error.body(), status_code=error.status, headers=error.headers)


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _error_response(error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    if error.status_code == 405 and request.method == "OPTIONS":
        return Response(
            status_code=204, headers={"Allow": f"{headers.get('Allow', '')}, OPTIONS".lstrip(", ")}
        )
    message = f"{error.detail}: {request.method} {request.url.path}"
    if error.status_code == 404:
        message = f"Unknown request URL: {request.method} {request.url.path}{_path_hint(request.url.path)}"
    code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code)
    return _error_response(ApiError(error.status_code, message[:300], code=code, headers=headers))


def _path_hint(path: str) -> str:
    """A base URL with ``/v1`` missing or twice is the usual mistake."""
    if path.startswith(_NOT_SERVED):
        return f"; not served here, but OpenAI's {', '.join(ENDPOINTS)}"
    close = difflib.get_close_matches(path, _PATHS, n=1, cutoff=0.75)
    return f"; did you mean {close[0]}?" if close else ""
