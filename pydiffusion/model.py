"""A model file, opened: weights and tokenizer, shared by all sessions."""

from __future__ import annotations

import functools
import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from . import _native
from ._util import hub
from .chat.messages import plain
from .chat.sanitize import Neutralizer
from .chat.template import ChatTemplate
from .device_plan import check_kv_type, native_wish
from .errors import PyDiffusionError, UnsupportedModelError
from .events import Completion, Event
from .generation import batching as parallel
from .generation import session_file
from .generation.infill import (
    DEFAULT_HOLE_TOKENS,
    Infill,
    Layout,
    collect,
    lay_out,
    lay_out_spans,
    prepare,
    prompt_of,
)
from .generation.token_ids import TokenIds
from .openai import responses as completion
from .options import GenerationOptions, make_options
from .session import Session
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from .constrained import Automaton

DEFAULT_N_CTX = 8192
_N_AUTOMATA = 16


class DiffusionModel:
    """A DiffusionGemma from a GGUF file; may be used from several threads, each with a session of its own.

    Use it as a context manager, or ``close`` it, to give its memory back early.

    Attributes: ``path``; ``metadata``, the file's keys and values; ``hparams``, the checked hyperparameters;
    ``description``, what really runs (backend, cache type, bytes by weight type);
    ``n_vocab``; ``canvas_length``, the tokens denoised at a time; ``n_ctx``, of a new session;
    ``n_ctx_train``, the longest context that the model was made for; ``n_threads``; ``tokenizer``.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        n_ctx: int = DEFAULT_N_CTX,
        n_gpu_layers: int | Literal["auto"] = "auto",
        n_threads: int | None = None,
        kv_type: str = "auto",
        progress: Callable[[float], None] | None = None,
        n_cpu_moe: int | None = None,
        device: str = "auto",
        gpu_memory: int | Sequence[int] | None = None,
        kernels: str = "auto",
        n_sessions: int = 1,
    ) -> None:
        """Open and check a model file.

        path: the GGUF; of a split one the first part, beside which the others lie.
        n_ctx: tokens that a new session holds unless told otherwise. The default, 8192, becomes the model's
            own context where that is shorter; any other value beyond it is refused.
        n_gpu_layers: layers on the GPU, the last ones; 0 for none. "auto" takes what fits its free memory,
            and all on the processor where there is no GPU.
        n_threads: None takes as many as there are CPUs that this process may use.
        kv_type: type of the cache, "auto", "f32", "f16" or "q8_0" (half of f16's size, for models whose heads
            are multiples of 32; it hurts Gemma 4, see docs/gpu.md, and warns). "auto" is never "q8_0".
        progress: called with the share of the file that is loaded, 0 to 1.
        n_cpu_moe: layers, the last ones, whose experts stay with the processor; None: as few as needed.
        device: "auto" (all GPUs), "cpu", or names out of ``devices()`` with commas in between. Several share
            the layers by their free memory.
        gpu_memory: bytes of each GPU to plan with at most, or a list with one number for each. Whatever is
            given, the larger of 512 MB and a twentieth of a GPU's memory stays free.
        kernels: what multiplies on the processor: "auto", "ggml", "avx512-bf16" or "amx" (docs/speed.md).
        n_sessions: sessions for whose caches and steps the GPUs shall have room; more may be made.
        Raises ModelFormatError, UnsupportedModelError, InsufficientMemoryError; ValueError for a wrong
        argument; OSError when the file can't be read.
        """
        self.path = Path(path)
        wish = native_wish(n_gpu_layers, n_cpu_moe, device, gpu_memory, n_sessions)
        check_kv_type(kv_type)
        threads = available_cpus() if n_threads is None else n_threads
        if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
            raise ValueError(f"n_threads is {n_threads!r}; permitted is None or an integer of at least 1")
        check_is_file(self.path)
        native = _native.Model(
            os.fspath(self.path),
            threads,
            kv_type=kv_type,
            progress=progress,
            n_ctx=_to_plan_for(n_ctx),
            kernels=kernels,
            **wish,
        )
        self._native_model: _native.Model | None = native
        self.metadata: dict[str, Any] = native.file.metadata
        self.hparams: dict[str, Any] = native.hparams
        self.description: dict[str, Any] = native.description
        self.n_vocab: int = native.n_vocab
        self.canvas_length: int = native.canvas_length
        self.n_ctx_train: int = native.n_ctx_train
        self.n_threads: int = native.n_threads
        self.n_ctx = self._fitting_n_ctx(n_ctx)
        self.tokenizer = Tokenizer(self.metadata, self.n_vocab)
        self._chat_template: ChatTemplate | None = None
        self._template_lock = threading.Lock()

    @classmethod
    def from_pretrained(
        cls, repo_id: str, filename: str, *, revision: str | None = None, **options: Any
    ) -> DiffusionModel:
        """Open a model of the Hugging Face Hub, which is fetched unless the local cache has it.

        filename: as it stands in the repo, or a pattern with ``*`` that one model matches. Of a split model
            all parts are fetched. options: as for the class itself.
        Needs the package huggingface_hub. Raises PyDiffusionError where it can't be had, else as the class.
        """
        return cls(hub.fetch(repo_id, filename, revision), **options)

    # What the file is

    @property
    def _native(self) -> _native.Model:
        if self._native_model is None:
            raise PyDiffusionError(f"{self.path} is closed")
        return self._native_model

    @property
    def name(self) -> str:
        """The file's name for the model, else that of the file."""
        name = self.metadata.get("general.name")
        return name if isinstance(name, str) and name else self.path.stem

    # Text and tokens

    def tokenize(self, text: str, add_bos: bool | None = None, parse_special: bool = False) -> list[int]:
        """Token ids of a text; see ``Tokenizer.tokenize``. add_bos: None does as the file asks."""
        return self.tokenizer.tokenize(text, add_bos=add_bos, parse_special=parse_special)

    def detokenize(self, ids: Iterable[int], keep_control: bool = False) -> str:
        """Text of token ids; see ``Tokenizer.detokenize``."""
        return self.tokenizer.detokenize(ids, keep_control=keep_control)

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> list[int]:
        """The token ids of messages, rendered through the file's own chat template.

        variables: for the template: ``add_generation_prompt`` (True unless given), ``tools``,
        ``enable_thinking``, ... Markers spelled out in messages or variables stay characters: only the
        template's own steer the model. Raises UnsupportedModelError when the file has no template, else as
        ``ChatTemplate.render``.
        """
        template = self._template()
        neutral = Neutralizer(self.tokenizer)
        render = functools.partial(
            template.render,
            bos_token=self._token_text(self.tokenizer.bos_id),
            eos_token=self._token_text(self.tokenizer.eos_id),
            **neutral.hide({name: plain(value, name) for name, value in variables.items()}),
        )
        ids = neutral.tokenize(neutral.render(render, template.prepare(messages)))
        if (
            self.tokenizer.add_bos
            and self.tokenizer.bos_id is not None
            and ids[:1] != [self.tokenizer.bos_id]
        ):
            ids.insert(0, self.tokenizer.bos_id)
        return ids

    def resolve(self, options: GenerationOptions) -> GenerationOptions:
        """These options with nothing left open; see ``GenerationOptions.resolve``."""
        return options.resolve(self.metadata, self.n_vocab, self.tokenizer.end_ids)

    @property
    def has_chat_template(self) -> bool:
        """Whether the file carries a chat template."""
        return isinstance(self.metadata.get("tokenizer.chat_template"), str)

    def check_chat_template(self) -> None:
        """Raise UnsupportedModelError without a chat template, PyDiffusionError for one that is not valid."""
        self._template()

    def automaton(self, options: GenerationOptions) -> Automaton:
        """The automaton that keeps a text to the options' ``json_schema`` or ``regex``.

        Raises ValueError, with where and what, for one that can't be guaranteed or that nothing satisfies.
        """
        from .constrained import automaton_for

        ends = frozenset(self.tokenizer.end_ids if options.eos is None else options.eos)
        key = (options.json_schema, options.regex, ends)
        cache: dict[Any, Automaton] = self.__dict__.setdefault("_automata", {})
        found = cache.pop(key, None) or automaton_for(options, self.tokenizer, ends)
        cache[key] = found  # the one used last stands last
        if len(cache) > _N_AUTOMATA:
            cache.pop(next(iter(cache)), None)
        return found

    def _template(self) -> ChatTemplate:
        with self._template_lock:
            if self._chat_template is None:
                if not self.has_chat_template:
                    raise UnsupportedModelError(
                        f"{self.path} has no chat template (tokenizer.chat_template): give a plain prompt"
                    )
                self._chat_template = ChatTemplate(self.metadata["tokenizer.chat_template"])
            return self._chat_template

    def _token_text(self, token_id: int | None) -> str:
        return "" if token_id is None else self.tokenizer.token_text(token_id)

    # Generation

    def new_session(self, n_ctx: int | None = None) -> Session:
        """A conversation of its own. n_ctx: as for the model, whose value None takes.

        Raises ValueError for a context that the model hasn't got, InsufficientMemoryError where there is no
        room.
        """
        return Session(self, self.n_ctx if n_ctx is None else self._fitting_n_ctx(n_ctx))

    def _new_batch(self) -> _native.Batch:
        """What denoises several sessions in one graph; for ``generation.batching``."""
        return _native.Batch(self._native)

    def load_session(self, path: str | os.PathLike[str], n_ctx: int | None = None) -> Session:
        """The session that ``Session.save`` wrote, with this same model and cache type.

        n_ctx: as for a new one. Raises FileNotFoundError; ModelFormatError for any other file;
        ContextOverflowError when it is too long.
        """
        session = self.new_session(n_ctx)
        session_file.load(session, Path(path))
        return session

    def generate(
        self,
        prompt: str | TokenIds,
        options: GenerationOptions | None = None,
        *,
        on_event: Callable[[Event], None] | None = None,
        session: Session | None = None,
        **keywords: Any,
    ) -> Completion:
        """Continue a prompt: text (read without control tokens, bos as the file asks) or token ids as they
        are.

        options or keywords: see GenerationOptions.  on_event: called with every event of
        ``Session.generate``.
        session: go on in this one, reusing what its cache shares with the prompt; else a new one is made.
        Raises ContextOverflowError when the prompt does not fit, ValueError when it has no tokens.
        """
        options = make_options(options, keywords)
        return self._start(prompt, session).complete(options, on_event=on_event)

    def stream(
        self,
        prompt: str | TokenIds,
        options: GenerationOptions | None = None,
        *,
        session: Session | None = None,
        **keywords: Any,
    ) -> Iterator[Event]:
        """As ``generate``, but an iterator of its events."""
        options = make_options(options, keywords)
        return self._start(prompt, session).generate(options)

    def generate_batch(
        self,
        prompts: Iterable[str | TokenIds],
        options: GenerationOptions | Iterable[GenerationOptions] | None = None,
        *,
        n_parallel: int = 4,
        n_ctx: int | None = None,
        on_event: Callable[[int, Event], None] | None = None,
        **keywords: Any,
    ) -> Iterator[tuple[int, parallel.Outcome]]:
        """Continue many prompts, up to ``n_parallel`` canvases at a time in one graph.

        On the processor each answer is the one that ``generate`` gives alone; on a GPU, whose kernels depend
        on how much there is to compute, the same batch gives the same answers.

        prompts: taken as lanes get free, so a generator will do.
        options or keywords: for all prompts alike (with a seed of its own for each unless ``seed`` is given),
        or an iterable with the options of each.
        n_ctx: of the sessions, n_parallel of them at most. on_event: called with the prompt's index and each
        event of ``Session.generate``.
        Yields (index of the prompt, its Completion) in the order in which they are done; for a prompt that
        fails, the error (a PyDiffusionError or ValueError) in place of its Completion, and the others go on.
        """
        if isinstance(n_parallel, bool) or not isinstance(n_parallel, int) or n_parallel < 1:
            raise ValueError(f"n_parallel is {n_parallel!r}; permitted is an integer of at least 1")
        if options is None or isinstance(options, GenerationOptions):
            each: Iterable[GenerationOptions] = itertools.repeat(make_options(options, keywords))
        else:
            each = (make_options(one, keywords) for one in options)
        requests = zip(prompts, each, strict=False)
        return parallel.generate_batch(self, requests, n_parallel, n_ctx, on_event)

    def infill(
        self,
        text: str,
        options: GenerationOptions | None = None,
        *,
        instruction: str | None = None,
        hole_tokens: int = DEFAULT_HOLE_TOKENS,
        on_event: Callable[[Event], None] | None = None,
        session: Session | None = None,
        **keywords: Any,
    ) -> Infill:
        """Fill the holes of a text, ``<|hole|>`` or ``<|hole:N|>``, with all around them held.

        instruction: a user's message to which the text is the answer; without one, what stands before the
            first hole is the prompt.
        hole_tokens: how long a hole without an N may get; it may come out shorter.
        Holes see what is on their own canvas and before it. Options as for ``generate``, without
        ``max_tokens``, ``stop`` and ``eos``. Raises ValueError without a hole, ContextOverflowError.
        """
        layout = lay_out(self, text, hole_tokens, whole=instruction is not None)
        return self._fill(layout, instruction, make_options(options, keywords), on_event, session)

    def edit(
        self,
        text: str,
        spans: Sequence[tuple[int, int]],
        options: GenerationOptions | None = None,
        *,
        instruction: str | None = None,
        more_tokens: int = 4,
        on_event: Callable[[Event], None] | None = None,
        session: Session | None = None,
        **keywords: Any,
    ) -> Infill:
        """Write spans of a text anew, (start, end) in characters, beginning with what stands there.

        more_tokens: how much longer each may get. All else as for ``infill``.
        """
        layout = lay_out_spans(self, text, spans, more_tokens, whole=instruction is not None)
        return self._fill(layout, instruction, make_options(options, keywords), on_event, session)

    def _fill(
        self,
        layout: Layout,
        instruction: str | None,
        options: GenerationOptions,
        on_event: Callable[[Event], None] | None,
        session: Session | None,
    ) -> Infill:
        prompt = prompt_of(self, layout, instruction)
        options = prepare(self, layout, prompt, options, self.n_ctx if session is None else session.n_ctx)
        return collect(layout, self._start(prompt, session).complete(options, on_event), self.tokenizer)

    def _start(self, prompt: str | TokenIds, session: Session | None) -> Session:
        ids = self.tokenize(prompt) if isinstance(prompt, str) else prompt
        if len(ids) == 0:
            raise ValueError("the prompt has no tokens")
        if session is None:
            session = self.new_session()
        elif session.model is not self:
            raise ValueError("the session belongs to another model")
        session.prefill(ids)
        return session

    def create_completion(self, prompt: str | TokenIds, **parameters: Any) -> Any:
        """A completion in OpenAI's shape; see ``pydiffusion.openai.responses.create_completion``."""
        return completion.create_completion(self, prompt, **parameters)

    def create_chat_completion(self, messages: Sequence[Mapping[str, Any]], **parameters: Any) -> Any:
        """An answer in that shape; see ``pydiffusion.openai.responses.create_chat_completion``."""
        return completion.create_chat_completion(self, messages, **parameters)

    # Lifetime

    def close(self) -> None:
        """Let go of the weights; sessions that are still alive keep them until they go."""
        self._native_model = None

    def __enter__(self) -> DiffusionModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"DiffusionModel({os.fspath(self.path)!r}, n_ctx={self.n_ctx})"

    def _fitting_n_ctx(self, n_ctx: int) -> int:
        shortest, longest = self.canvas_length + 1, self.n_ctx_train  # a canvas, and a token before it
        if isinstance(n_ctx, bool) or not isinstance(n_ctx, int) or n_ctx < shortest:
            raise ValueError(f"n_ctx is {n_ctx!r}; permitted is an integer from {shortest} to {longest}")
        if n_ctx > longest and n_ctx != DEFAULT_N_CTX:
            raise ValueError(f"n_ctx is {n_ctx}, but this model's context is {longest}")
        return min(n_ctx, longest)


def _to_plan_for(n_ctx: Any) -> int:
    """The context that the placement is planned for; what is wrong with it is said once the file is read."""
    return min(n_ctx, 1 << 31) if isinstance(n_ctx, int) and n_ctx > 0 else DEFAULT_N_CTX


def check_is_file(path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(
            f"{path} is a folder; a model is a GGUF file: make one with 'pydiffusion convert'"
        )
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file")


def available_cpus() -> int:
    """CPUs that this process may use: under taskset or in a container, fewer than the machine has."""
    if hasattr(os, "process_cpu_count"):  # Python 3.13
        return os.process_cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0)) or 1
    return os.cpu_count() or 1
