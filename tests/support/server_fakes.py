"""A scripted model for the server's tests: no weights, written answers, steps without computation.

All above the native session is real: tokenizer, template, Session, streams.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np

from pydiffusion.adapters.adapter import Adapter
from pydiffusion.adapters.applied import AdapterStore
from pydiffusion.chat.formats.gemma import GEMMA
from pydiffusion.errors import ContextOverflowError, GenerationCancelled
from pydiffusion.model import DiffusionModel
from pydiffusion.server.app import Settings
from pydiffusion.server.run import Server
from pydiffusion.tokenizer import Tokenizer, TokenType
from pydiffusion.vision.methods import ModelVision

CANVAS = 64
TEMPLATE = (
    "{{ bos_token }}{% if enable_thinking %}<|think|>{% endif %}"
    "{% for tool in tools or [] %}<|tool>{{ tool.function.name }}<tool|>{% endfor %}"
    "{% for m in messages %}<|turn>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<|tool_call>call:{{ call.function.name }}"
    "{{ call.function.arguments | tojson }}<tool_call|>{% endfor %}<turn|>\n{% endfor %}"
    "{% if messages[0].content == 'forbidden' %}{{ raise_exception('no such talk') }}{% endif %}"
    "<|turn>model\n"
)
# What the model answers: prompt as text and number of the answer -> the texts of its canvases.
Script = Callable[[str, int], Sequence[str]]


def metadata() -> dict[str, Any]:
    control = ["<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>", "<|channel>"]
    visible = [marker for marker in GEMMA.markers if marker not in control]
    letters = ["\u2581", *(chr(i) for i in range(33, 127))]
    tokens = [*control, *visible, *(f"<0x{i:02X}>" for i in range(256)), *letters]
    kinds = [TokenType.CONTROL] * len(control) + [TokenType.USER_DEFINED] * len(visible)
    kinds += [TokenType.BYTE] * 256 + [TokenType.NORMAL] * len(letters)
    return {
        "diffusion.canvas_length": CANVAS,
        "general.architecture": "diffusion-gemma",
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [int(kind) for kind in kinds],
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": TEMPLATE,
    }


class ScriptedModel(DiffusionModel):
    """``script`` gives the answers; a canvas takes ``steps``, each of ``step_seconds``."""

    vision = None

    def __init__(self, script: Script, *, n_ctx: int = 1024, steps: int = 3) -> None:
        self.script = script
        self.steps = steps
        self.step_seconds = 0.0
        self.n_steps = 0
        self.n_answers = 0
        self.lora_of_answers: list[list[tuple[str, float]]] = []
        self.path = Path("scripted.gguf")
        self.metadata = metadata()
        self.n_vocab = len(self.metadata["tokenizer.ggml.tokens"])
        self.canvas_length = CANVAS
        self.n_ctx = self.n_ctx_train = n_ctx
        self.native = ScriptedWeights(self)  # type: ignore[assignment]
        self.tokenizer = Tokenizer(self.metadata, self.n_vocab)
        self._vision = ModelVision(self, self.native, None)
        self.adapters = AdapterStore(self.metadata, self.native.new_adapter)
        self._chat_template = None
        self._lock = threading.Lock()
        self._automata = {}


class ScriptedWeights:
    """In place of the model's weights: what runs on them is scripted."""

    def __init__(self, model: ScriptedModel) -> None:
        self._model = model

    image_tokens: dict[str, int] = {}  # noqa: RUF012

    def new_session(self, n_ctx: int, image_tokens: int = 0) -> ScriptedNative:
        return ScriptedNative(self._model, n_ctx)

    def new_adapter(self, adapter: Adapter) -> str:
        return adapter.name

    def new_batch(self) -> ScriptedBatch:
        return ScriptedBatch()


class ScriptedBatch:
    """One step of each session's generation; an error ends its own session's only."""

    def next_steps(self, sessions: Sequence[ScriptedNative]) -> list[Any]:
        return [self._step(session) for session in sessions]

    def _step(self, session: ScriptedNative) -> Any:
        try:
            return session.next_step()
        except GenerationCancelled as error:
            return error


class ScriptedNative:
    """Behaves as the native session does: cancellation is raised by the running or the next call."""

    def __init__(self, model: ScriptedModel, n_ctx: int) -> None:
        self._model = model
        self.n_ctx = n_ctx
        self._ids: list[int] = []
        self.images: list[tuple[int, int, bytes]] = []
        self.adapters: list[tuple[Any, float]] = []
        self._cancelled = threading.Event()
        self._steps: list[SimpleNamespace] = []

    @property
    def n_past(self) -> int:
        return len(self._ids)

    @property
    def tokens(self) -> np.ndarray:
        return np.asarray(self._ids, dtype=np.int32)

    def cancel(self) -> None:
        self._cancelled.set()

    def encode(self, ids: np.ndarray, images: Any, return_hidden: bool = False, progress: Any = None) -> None:
        self._enter()
        if self.n_past + len(ids) > self.n_ctx:
            raise ContextOverflowError("too long")
        self.images += [(self.n_past + begin, len(features), key) for begin, features, key in images]
        self._ids += ids.tolist()

    def set_adapters(self, adapters: Sequence[tuple[Any, float]]) -> None:
        self._enter()
        self.adapters = list(adapters)

    def truncate(self, n: int) -> None:
        self._enter()
        del self._ids[n:]
        self.images = [image for image in self.images if image[0] < n]

    def copy_from(self, source: ScriptedNative) -> None:
        self._enter()
        self._ids, self.images = source._ids.copy(), source.images.copy()

    def begin(self, *, max_tokens: int, steps: int, eos: list[int], **_: Any) -> None:
        self._enter()
        self._begun = {"max_tokens": max_tokens, "steps": steps, "eos": eos}
        prompt = self._model.detokenize(self._ids, keep_control=True)
        texts = self._model.script(prompt, self._model.n_answers)
        self._model.n_answers += 1
        self._model.lora_of_answers.append(list(self.adapters))
        canvases = [self._model.tokenize(text, add_bos=False, parse_special=True) for text in texts]
        self._steps = []
        left = max_tokens
        for i, ids in enumerate(canvases):
            assert len(ids) <= CANVAS
            last = i == len(canvases) - 1
            finish = "length" if len(ids) > left or (len(ids) == left and not last) else "eos" if last else ""
            self._steps += self._canvas(i, ids, ids[:left], min(steps, self._model.steps), steps, finish)
            left -= len(ids)
            if finish:
                break

    def amend(self, tokens: np.ndarray) -> str:
        """Continue with the script after the amended text."""
        self._ids += tokens.tolist()
        self._begun["max_tokens"] -= len(tokens)  # or thinking again and again would never end
        if self._begun["max_tokens"] <= 0:
            return "length"
        self.begin(**self._begun)
        return ""

    def _canvas(
        self, i: int, ids: list[int], kept: list[int], n_steps: int, steps: int, finish: str
    ) -> list[SimpleNamespace]:
        draft = np.asarray(ids + [1] * (CANVAS - len(ids)), dtype=np.int32)
        made = []
        for n in range(n_steps):
            done = n == n_steps - 1
            accepted = np.arange(CANVAS) < CANVAS * (n + 1) // n_steps
            made.append(
                SimpleNamespace(
                    canvas_index=i,
                    step=steps - n,
                    draft=draft,
                    entropy=np.where(accepted, 0.0, 1.5).astype(np.float32),
                    accepted=accepted,
                    canvas_done=done,
                    tokens=np.asarray(kept if done else [], dtype=np.int32),
                    finish=finish if done else "",
                    timings={"encode": 0.0, "denoise": 0.0},
                )
            )
        return made

    def next_step(self) -> SimpleNamespace | None:
        self._enter()
        if not self._steps:
            return None
        end = time.monotonic() + self._model.step_seconds
        while time.monotonic() < end:
            if self._cancelled.wait(max(0.0, end - time.monotonic())):
                self._enter()
        self._model.n_steps += 1
        self._last = self._steps.pop(0)
        return self._last

    def candidates(self, k: int, extra: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Top-k of a guided step: all tokens are equally likely."""
        tokens = np.tile(np.arange(k, dtype=np.int32), (CANVAS, 1))
        return tokens, np.zeros((CANVAS, k), np.float32), np.zeros((CANVAS, len(extra)), np.float32)

    def impose(self, tokens: np.ndarray) -> SimpleNamespace:
        """Replace the tokens of the guided step just taken."""
        self._last.draft = tokens
        if self._last.canvas_done:
            ends = np.flatnonzero(tokens == 1)
            self._last.tokens = tokens[: ends[0]] if len(ends) else tokens
        return self._last

    def _enter(self) -> None:
        if self._cancelled.is_set():
            self._cancelled.clear()
            self._steps = []
            raise GenerationCancelled("cancelled")


# A server around it, and what its tests share

CALL = '<|tool_call>call:get_weather{city:<|"|>Oslo<|"|>,days:3}<tool_call|>'
TOOLS = [
    {
        "type": "function",
        "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}},
    }
]


def script(prompt: str, i_answer: int) -> list[str]:
    """Answer by the text of the last message."""
    asked = prompt.rpartition("<|turn>user\n")[2] if "<|turn>" in prompt else prompt
    if "<|turn>tool" in asked:
        return ["It rains in Oslo."]
    if "weather" in asked:
        return ["<|channel>thought\nI'll look it up.\n<channel|>", CALL + "<|tool_call>call:b{}<tool_call|>"]
    if "ponder" in asked:
        if prompt.endswith("<channel|>"):
            return ["So it is."]
        return ["<|channel>thought\n" + "Hm. " * 9, "Hm. " * 10, "Hm.<channel|>Ah."]
    if "again" in asked:
        return ["Well: " + "la " * 16] + ["la " * 16] * 40
    if "think" in asked:
        return ["<|channel>thought\nHm, ", "yes.\n<channel|>", "It is ", "so. Über!"]
    if "long" in asked:
        return [f"canvas {i}, " for i in range(1000)]
    return ["Hello, ", "world!"]


@contextmanager
def serving(model: ScriptedModel, *, grace: float = 5.0, **settings: Any) -> Iterator[tuple[str, Server]]:
    server = Server(model, Settings(**settings), port=0, grace=grace)
    address: list[str] = []
    started = threading.Event()
    server.on_started = lambda where: (address.append(where), started.set())  # type: ignore[assignment]
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        assert started.wait(60)
        yield f"http://{address[0]}", server
    finally:
        server.should_exit = True
        server.scheduler.abort()
        thread.join(60)
        assert not thread.is_alive()


def ask(text: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def eventually(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def events(response: httpx.Response) -> list[Any]:
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


CHAT = {"messages": ask("Hi")}
