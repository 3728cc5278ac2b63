"""Model: weights and tokenizer of a GGUF, shared by all sessions."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from . import _native
from ._util import hub
from ._util.cpus import step_threads
from ._util.files import check_is_gguf
from ._util.log import logger
from ._util.warn import warn_caller
from .adapters.applied import AdapterStore, n_loaded_bytes
from .adapters.methods import LoraMethods
from .chat.formats.registry import BUILT_IN_TEMPLATES
from .chat.messages import plain
from .chat.sanitize import Sanitizer
from .chat.template import ChatTemplate
from .chat.template_source import OUTDATED, REPLACE_IT, TEMPLATE_KEY, find_template, is_outdated
from .device_plan import DEFAULT_N_CTX, check_kv_type, device_request, limits_beside
from .errors import PyDiffusionWarning, UnsupportedModelError
from .generation import batching, session_file
from .generation.async_methods import AsyncMethods
from .generation.chat_images import images_of, with_images
from .generation.image_prompt import AnyPrompt
from .generation.infill_methods import InfillMethods
from .generation.native_model import NativeModel
from .generation.prompt import check_prompts, prefilled_session
from .openai.chat import Chat, ChatSettings, Messages, Tools
from .options import CONSTRAINTS, GenerationOptions, Lora, ResolvedOptions, make_options
from .session import Session
from .tokenizer import Tokenizer
from .vision.finding import AUTO, planned_for
from .vision.methods import ModelVision, VisionMethods

if TYPE_CHECKING:
    from .constrained import Automaton
    from .events import ChatCompletion, Completion, Event
    from .vision.prompt import Prompt

_N_AUTOMATA = 16


class DiffusionModel(VisionMethods, LoraMethods, InfillMethods, AsyncMethods):
    """A DiffusionGemma model from a GGUF file. Thread-safe if each thread uses its own session.

    Use it as a context manager, or ``close`` it, to free its memory early.

    Attributes: ``path``; ``metadata``, the file's keys and values; ``hparams``, the validated
    hyperparameters; ``description``, the actual configuration (backend, cache type, bytes by weight type);
    ``n_vocab``; ``canvas_length``, tokens denoised at a time; ``n_ctx``, context length of a new session;
    ``n_ctx_train``, the context length the model was trained for; ``n_threads``; ``tokenizer``. For this
    package only: ``native``, the weights; ``adapters``, the loaded ones.
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
        dense_type: str = "auto",
        chat_template: str | os.PathLike[str] | None = None,
        mmproj: str | os.PathLike[str] | None = AUTO,
        lora: Lora | None = None,
    ) -> None:
        """Open and validate a model file.

        path: the GGUF; for a split one its first part, with the others in the same folder.
        n_ctx: default context length of a session. The default, 8192, is lowered to the model's own context
            length; any other value beyond it raises.
        n_gpu_layers: number of layers on GPUs, counted from the last; 0 for none. "auto" offloads what fits
            into free memory, and runs on the CPU if there is no GPU.
        n_threads: None uses one per core that this process may use: of hybrid CPUs the performance cores,
            within the CPU quota of a container. `pydiffusion devices` says how many and why.
        kv_type: type of the KV cache, "auto", "f32", "f16" or "q8_0" (half of f16's size, for head sizes that
            are multiples of 32; it hurts Gemma 4, see docs/gpu.md, and warns). "auto" never chooses "q8_0".
        progress: called with the fraction of the file that is loaded, 0 to 1.
        n_cpu_moe: number of layers, counted from the last, whose experts stay on the CPU; None: as few as
            needed.
        device: "auto" (all GPUs), "cpu", or comma-separated names from ``devices()``. Layers are split over
            several devices in proportion to their free memory.
        gpu_memory: maximum bytes to plan with per GPU, or a list with one number for each. In any case the
            larger of 512 MB and a twentieth of a GPU's memory stays free.
        kernels: matmul kernels: on the CPU "auto", "ggml", "avx512-bf16" or "amx" (docs/speed.md); on a GPU
            "auto", "ggml", or "cuda" for kernels of our own (docs/gpu.md).
        n_sessions: number of sessions to reserve GPU memory for; more may be created.
        dense_type: type of the matrices other than experts on GPUs: "file" as in the file, "bf16" to convert
            quantized ones to BF16 when they are loaded (faster on A100, H100 and H200), "auto" to do so on
            these GPUs where the whole model still fits.
        chat_template: a file, or the name of a built-in template ("diffusion-gemma"), instead of the file's
            own; it takes its place in ``metadata``.
        mmproj: the file of the vision tower, with which the model reads images. "auto" looks for one beside
            the model, and on the hub if it is from there, when the first image comes; None for none.
        lora: adapters, as of ``set_lora``; None: none.
        Raises ModelFormatError, UnsupportedModelError, InsufficientMemoryError, AdapterError;
        PyDiffusionError for an invalid template; ValueError for a wrong argument; OSError when the file can't
        be read.
        """
        self.path = Path(path)
        template = None if chat_template is None else find_template(chat_template)
        request = device_request(n_gpu_layers, n_cpu_moe, device, gpu_memory, n_sessions, dense_type)
        check_kv_type(kv_type)
        threads = step_threads().n if n_threads is None else n_threads
        if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
            raise ValueError(f"n_threads is {n_threads!r}; permitted is None or an integer of at least 1")
        check_is_gguf(self.path)
        file = _native.GgufFile(os.fspath(path)) if lora else None
        self.adapters = AdapterStore(file.metadata if file else {})
        lora = self.adapters.read(lora or ())  # before the weights: what is wrong with them is found at once
        if file:
            request["memory_limits"] = limits_beside(n_loaded_bytes(lora, file), request)
        del file
        native = _native.Model(
            os.fspath(self.path),
            threads,
            kv_type=kv_type,
            progress=progress,
            n_ctx=_n_ctx_to_plan(n_ctx),
            kernels=kernels,
            mmproj=planned_for(self.path, mmproj, request["device"]),
            **request,
        )
        self.native = NativeModel(native, self.path)
        self.metadata: dict[str, Any] = native.file.metadata
        self.adapters.begin(self.metadata, self.native.new_adapter)
        if template is not None:
            self.metadata[TEMPLATE_KEY] = template
        self.hparams: dict[str, Any] = native.hparams
        self.description: dict[str, Any] = native.description
        self.n_vocab: int = native.n_vocab
        self.canvas_length: int = native.canvas_length
        self.n_ctx_train: int = native.n_ctx_train
        self.n_threads: int = native.n_threads
        self.n_ctx = self._fitting_n_ctx(n_ctx)
        self.tokenizer = Tokenizer(self.metadata, self.n_vocab)
        self._vision = ModelVision(self, self.native, mmproj)
        self.set_lora(lora)
        self._chat_template: ChatTemplate | None = None
        self._lock = threading.Lock()  # of what is made on first use
        self._automata: dict[Any, Automaton] = {}
        logger.info("opened %s: %s, context %d", self.path, self.description, self.n_ctx)

    @classmethod
    def from_pretrained(
        cls, repo_id: str, filename: str, *, revision: str | None = None, **options: Any
    ) -> DiffusionModel:
        """Open a model from the Hugging Face Hub; downloads it unless it is in the local cache.

        filename: name in the repo, or a pattern with ``*`` that matches one model. All parts of a split model
            are downloaded. options: as for the class itself.
        Needs the package huggingface_hub. Raises PyDiffusionError if the download fails, else as the class.
        """
        return cls(hub.fetch(repo_id, filename, revision), **options)

    # File

    @property
    def name(self) -> str:
        """The model's name from the metadata, else the file's."""
        name = self.metadata.get("general.name")
        return name if isinstance(name, str) and name else self.path.stem

    # Text and tokens

    def tokenize(self, text: str, add_bos: bool | None = None, parse_special: bool = False) -> list[int]:
        """Tokenize a text; see ``Tokenizer.tokenize``. add_bos: None follows the file."""
        return self.tokenizer.tokenize(text, add_bos=add_bos, parse_special=parse_special)

    def detokenize(self, ids: Iterable[int], keep_control: bool = False) -> str:
        """Decode token ids; see ``Tokenizer.detokenize``."""
        return self.tokenizer.detokenize(ids, keep_control=keep_control)

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> list[int] | Prompt:
        """Render messages through the file's chat template and tokenize the result.

        variables: template variables: ``add_generation_prompt`` (default True), ``tools``,
            ``enable_thinking``, ...
        Returns token ids; of messages with images (docs/vision.md) a Prompt, which has them too.
        Markers spelled out in messages or variables are tokenized as plain text: only the template's own
        become control tokens. Raises UnsupportedModelError if the file has no template, or reads no images;
        ValueError for an image that can't be read; else as ``ChatTemplate.render``.
        """
        messages, images = images_of(self, messages)
        template = self._template()
        sanitizer = Sanitizer(self.tokenizer)
        given = sanitizer.hide({name: plain(value, name) for name, value in variables.items()})
        render = functools.partial(template.render, **(self._token_variables() | given))
        ids = sanitizer.tokenize(sanitizer.render(render, template.prepare(messages)))
        if (
            self.tokenizer.add_bos
            and self.tokenizer.bos_id is not None
            and ids[:1] != [self.tokenizer.bos_id]
        ):
            ids.insert(0, self.tokenizer.bos_id)
        return with_images(self, ids, images)

    def resolve(self, options: GenerationOptions) -> ResolvedOptions:
        """Fill in unset options, and load adapters; see ``GenerationOptions.resolve`` and ``load_lora``."""
        return self.adapters.loaded_in(options.resolve(self.metadata, self.n_vocab, self.tokenizer.end_ids))

    @property
    def has_chat_template(self) -> bool:
        """Whether there is a chat template, the file's or the given one."""
        return isinstance(self.metadata.get(TEMPLATE_KEY), str)

    def check_chat_template(self) -> None:
        """Raise UnsupportedModelError without a chat template, PyDiffusionError for an invalid one; warn of
        an outdated one, as its first use does.
        """
        self._template()

    def automaton(self, options: GenerationOptions) -> Automaton:
        """Compile the options' constraint to an automaton over tokens, with an LRU cache.

        Raises OptionError, saying what and where, for a constraint that is unsupported or unsatisfiable.
        """
        from .constrained import automaton_for

        ends = frozenset(self.resolve(options).eos)
        key = (*(getattr(options, name) for name in CONSTRAINTS), ends)
        found = self._automata.pop(key, None)
        if found is None:
            found = automaton_for(options, self.tokenizer, ends)
            unenforced = self.unenforced(options)
            if unenforced:
                name = options.constraint
                warn_caller(f"{name}: not enforced: {'; '.join(unenforced)}", PyDiffusionWarning)
        with self._lock:
            self._automata[key] = found  # most recently used last
            if len(self._automata) > _N_AUTOMATA:
                del self._automata[next(iter(self._automata))]
        return found

    def unenforced(self, options: GenerationOptions) -> tuple[str, ...]:
        """The constraints of the options' schemas that a text may violate, each with its place
        (``"uniqueItems at properties/tags"``). Raises OptionError as ``automaton``.
        """
        from .constrained import unenforced_by

        return unenforced_by(options)

    def _template(self) -> ChatTemplate:
        with self._lock:
            if self._chat_template is None:
                if not self.has_chat_template:
                    raise UnsupportedModelError(
                        f"{self.path} has no chat template (tokenizer.chat_template): give a plain prompt, or"
                        f" a template (--chat-template FILE, or {', '.join(BUILT_IN_TEMPLATES)})"
                    )
                source = self.metadata[TEMPLATE_KEY]
                self._chat_template = ChatTemplate(source)
                if is_outdated(source):
                    warn_caller(
                        f"{self.path}: the chat template is {OUTDATED}; {REPLACE_IT}", PyDiffusionWarning
                    )
            return self._chat_template

    def _token_variables(self) -> dict[str, str]:
        """The texts of special tokens, by the names that templates know them by."""
        known = self.tokenizer
        ids = {"pad_token": known.pad_id, "unk_token": known.unknown_id, "mask_token": known.mask_id}
        texts = {name: known.token_text(i) for name, i in ids.items() if i is not None}
        for name, i in (("bos_token", known.bos_id), ("eos_token", known.eos_id)):
            texts[name] = "" if i is None else known.token_text(i)  # templates print them without asking
        return texts

    # Generation

    def new_session(self, n_ctx: int | None = None, lora: Lora | None = None) -> Session:
        """Create a session. n_ctx: context length; None uses the model's default. lora: adapters of its own,
        as of ``set_lora``; None: the model's, also when these change.

        Raises ValueError for a context length that the model does not support, InsufficientMemoryError; for
        adapters as ``set_lora``.
        """
        own = None if lora is None else self.adapters.set_of(lora)
        return Session(self, self.n_ctx if n_ctx is None else self._fitting_n_ctx(n_ctx), own)

    def load_session(
        self, path: str | os.PathLike[str], n_ctx: int | None = None, lora: Lora | None = None
    ) -> Session:
        """Load a session written by ``Session.save`` with the same model, cache type and adapters.

        n_ctx, lora: as for a new session. Raises FileNotFoundError; ModelFormatError for any other file;
        ContextOverflowError if it has more tokens than ``n_ctx``; for adapters as ``set_lora``.
        """
        session = self.new_session(n_ctx, lora)
        session_file.load(session, Path(path))
        return session

    def generate(
        self,
        prompt: str | AnyPrompt,
        options: GenerationOptions | None = None,
        *,
        on_event: Callable[[Event], None] | None = None,
        session: Session | None = None,
        **keywords: Any,
    ) -> Completion:
        """Complete a prompt: text (without parsing control tokens, bos as the file asks) or token ids.

        options or keywords: see GenerationOptions.  on_event: called with every event of
            ``Session.generate``.
        session: session to use, reusing its cached prefix; by default a new one.
        Raises ContextOverflowError if the prompt does not fit, ValueError if it is empty.
        """
        resolved = self.resolve(make_options(options, keywords))
        return prefilled_session(self, prompt, session, resolved.lora).complete(resolved, on_event=on_event)

    def stream(
        self,
        prompt: str | AnyPrompt,
        options: GenerationOptions | None = None,
        *,
        session: Session | None = None,
        **keywords: Any,
    ) -> Iterator[Event]:
        """As ``generate``, but yields the events."""
        resolved = self.resolve(make_options(options, keywords))
        return prefilled_session(self, prompt, session, resolved.lora).generate(resolved)

    def generate_batch(
        self,
        prompts: Iterable[str | AnyPrompt],
        options: GenerationOptions | Iterable[GenerationOptions] | None = None,
        *,
        n_parallel: int = 4,
        n_ctx: int | None = None,
        on_event: Callable[[int, Event], None] | None = None,
        **keywords: Any,
    ) -> Iterator[tuple[int, batching.Outcome]]:
        """Complete many prompts with continuous batching, up to ``n_parallel`` canvases in one graph.

        On the CPU each result equals that of ``generate``; on a GPU, whose kernels depend on the batch size,
        the same batch gives the same results.

        prompts: consumed as sequences finish, so a generator works.
        options or keywords: shared by all prompts (each with its own seed unless ``seed`` is given), or an
            iterable with the options of each.
        n_ctx: context length of the sessions, of which there are at most n_parallel.
        on_event: called with the prompt's index and each event of ``Session.generate``.
        Yields (index of the prompt, its Completion) in order of completion; for a prompt that fails, the
        error (a PyDiffusionError or ValueError) instead of its Completion, while the others continue.
        """
        check_prompts(prompts, "prompts", "model.generate")
        requests = batching.requests_of(prompts, options, keywords)
        return batching.generate_batch(self, requests, n_parallel, n_ctx, on_event)

    def chat(
        self,
        messages: Messages,
        options: GenerationOptions | None = None,
        *,
        tools: Tools | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        enable_thinking: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        on_event: Callable[[Event], None] | None = None,
        session: Session | None = None,
        **keywords: Any,
    ) -> ChatCompletion:
        """Answer messages, ``{"role": ..., "content": ...}``, with the model's chat template.

        tools, tool_choice: as in OpenAI's API; a call that is required is guaranteed.
        enable_thinking, chat_template_kwargs: passed to the template. False also closes reasoning that the
            model starts anyway (``thinking_budget=0``).
        options or keywords: see GenerationOptions; without ``max_tokens`` the answer runs to its end or that
            of the context. Stop strings cut the answer only.
        on_event, session: as for ``generate``; with a session the next turn encodes only what is new.
        Raises as ``chat_prompt`` and ``generate``.
        """
        settings = ChatSettings(tools, tool_choice, None, enable_thinking, chat_template_kwargs)
        return Chat(self, messages, make_options(options, keywords), settings, session).complete(on_event)

    def stream_chat(
        self,
        messages: Messages,
        options: GenerationOptions | None = None,
        *,
        tools: Tools | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        enable_thinking: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        session: Session | None = None,
        **keywords: Any,
    ) -> Iterator[Event]:
        """As ``chat``, but yields the events; ``CanvasEvent.parts`` separates reasoning, answer and calls."""
        settings = ChatSettings(tools, tool_choice, None, enable_thinking, chat_template_kwargs)
        return Chat(self, messages, make_options(options, keywords), settings, session).events()

    def chat_batch(
        self,
        conversations: Iterable[Messages],
        options: GenerationOptions | Iterable[GenerationOptions] | None = None,
        *,
        tools: Tools | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        enable_thinking: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        n_parallel: int = 4,
        n_ctx: int | None = None,
        on_event: Callable[[int, Event], None] | None = None,
        **keywords: Any,
    ) -> Iterator[tuple[int, batching.Outcome]]:
        """As ``generate_batch``, for conversations: yields (index, ChatCompletion or error)."""
        check_prompts(conversations, "conversations", "model.chat")
        settings = ChatSettings(tools, tool_choice, None, enable_thinking, chat_template_kwargs)
        requests = batching.requests_of(conversations, options, keywords, settings)
        return batching.generate_batch(self, requests, n_parallel, n_ctx, on_event)

    def create_completion(self, prompt: str | AnyPrompt, **parameters: Any) -> Any:
        """Completion in OpenAI's format; see ``pydiffusion.openai.responses.create_completion``."""
        from .openai import responses  # on first use: importing pydiffusion is to be quick

        return responses.create_completion(self, prompt, **parameters)

    def create_chat_completion(self, messages: Sequence[Mapping[str, Any]], **parameters: Any) -> Any:
        """Chat completion in OpenAI's format; see ``pydiffusion.openai.responses.create_chat_completion``."""
        from .openai import responses

        return responses.create_chat_completion(self, messages, **parameters)

    # Lifetime

    def close(self) -> None:
        """Release the weights; existing sessions keep them alive until they are gone."""
        self._vision.close()
        self.adapters.close()
        self.native.close()

    def __enter__(self) -> DiffusionModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"a DiffusionModel can't be pickled or copied: open {self.path} in each process; threads can"
            " share one, and sessions share its weights"
        )

    def __repr__(self) -> str:
        return f"DiffusionModel({os.fspath(self.path)!r}, n_ctx={self.n_ctx})"

    def _fitting_n_ctx(self, n_ctx: int) -> int:
        shortest, longest = self.canvas_length + 1, self.n_ctx_train  # a canvas and one token before it
        if isinstance(n_ctx, bool) or not isinstance(n_ctx, int) or n_ctx < shortest:
            raise ValueError(f"n_ctx is {n_ctx!r}; permitted is an integer from {shortest} to {longest}")
        if n_ctx > longest and n_ctx != DEFAULT_N_CTX:
            raise ValueError(f"n_ctx is {n_ctx}, but this model's context is {longest}: give at most that")
        return min(n_ctx, longest)


def _n_ctx_to_plan(n_ctx: Any) -> int:
    """Context length for the device plan; invalid values are reported once the file has been read."""
    return min(n_ctx, 1 << 31) if isinstance(n_ctx, int) and n_ctx > 0 else DEFAULT_N_CTX
