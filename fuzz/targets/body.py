"""Fuzz target for request bodies: parsing, validation, chat template, scheduler, response.

The model's output is scripted (tests/support/server_fakes.py); everything above the native session is real.
"""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

from support.server_fakes import TOOLS, ScriptedModel, ask, script

from pydiffusion._util.sampler_options import ENTROPY_BOUND_DEFAULTS
from pydiffusion.server.app import Settings, create_app

from .mutation import damaged, mutated

_MAX_BODY = 200_000
_SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 8},
        "days": {"type": "integer", "minimum": 0, "maximum": 20},
        "kind": {"enum": ["a", "b", 3, None]},
        "tags": {"type": "array", "items": {"type": "string", "pattern": "[a-z]{1,4}"}, "maxItems": 3},
    },
    "required": ["city", "kind"],
    "additionalProperties": False,
}
_CALLS = [
    {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
]
_CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "the weather"}, {"type": "text", "text": "?"}]},
    {"role": "assistant", "content": None, "tool_calls": _CALLS},
    {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    {"role": "assistant", "content": "Rain."},
    {"role": "user", "content": "think"},
]
_COMMON: dict[str, Any] = {
    "model": "scripted", "stream": False, "seed": 7, "n": 1, "stop": ["!", "xyz"], **ENTROPY_BOUND_DEFAULTS,
    "steps": 4, "temperature": 1.0, "top_p": 0.9, "user": "me", "metadata": {"a": "b"}, "logprobs": False,
}  # fmt: skip

#: Valid requests: (path, body). Unchanged, each gets status 200.
BODIES: list[tuple[str, dict[str, Any]]] = [
    ("chat/completions", {**_COMMON, "messages": ask("Hi"), "max_completion_tokens": 20}),
    ("chat/completions", {"messages": _CONVERSATION, "tools": TOOLS, "tool_choice": "auto",
    "parallel_tool_calls": False}),
    ("chat/completions", {"messages": ask("weather"), "tools": TOOLS, "stream": True,
                          "stream_options": {"include_usage": True, "diffusion": True}}),
    ("chat/completions", {"messages": ask("think"), "reasoning_effort": "high", "enable_thinking": True,
                          "chat_template_kwargs": {"mood": "good", "enable_thinking": True},
                          "max_tokens": 30}),
    ("chat/completions", {"messages": ask("Hi"), "tool_choice": "none",
                          "response_format": {"type": "json_schema", "json_schema": {"name": "x",
                          "schema": _SCHEMA}}}),
    ("chat/completions", {"messages": ask("Hi"), "regex": "[a-z]{2,5}( [0-9]+)?", "max_tokens": 60}),
    ("chat/completions", {"messages": ask("Hi"), "guided_choice": ["a b", "c"], "n_predict": 40, "tfs_z": 2,
                          "thinking": {"type": "disabled"}, "temperature": 0}),
    ("chat/completions", {"messages": ask("Hi"), "max_new_tokens": 9, "ignore_eos": True,
                          "stop_token_ids": [1]}),
    ("completions", {**_COMMON, "prompt": "the road", "max_tokens": 16, "echo": True}),
    ("completions", {"prompt": ["a", [40, 41, 42]], "n": 2, "stream": True, "stop": "w"}),
    ("completions", {"prompt": [40, 41, 42], "suffix": " end", "max_tokens": 8}),
    ("completions", {"prompt": "x", "response_format": {"type": "json_object"}, "max_tokens": 200}),
    ("infill", {"model": "scripted", "text": "a <|hole:4|> b <|hole|>", "hole_tokens": 6, "seed": 1,
    "steps": 3}),
    ("infill", {"text": "a <|hole|>", "instruction": "fill it", "stream": True,
    "stream_options": {"diffusion": True}}),
]  # fmt: skip


class Target:
    """Every response is 2xx, or 4xx with an error in OpenAI's format; nothing is raised."""

    def __init__(self, folder: Path) -> None:
        self._model = ScriptedModel(script, steps=1)
        settings = Settings(max_body=_MAX_BODY, timeout=None)
        self._app = create_app(self._model, settings)
        self._loop = asyncio.new_event_loop()
        self.scheduler = self._app.state.scheduler
        for path, body in BODIES:
            status = self.ask(path, json.dumps(body).encode())
            assert status == 200, (path, body, status)

    def close(self) -> None:
        self.scheduler.close()
        self._loop.close()

    def make(self, draw: random.Random) -> tuple[str, bytes]:
        """Create an input: endpoint and request body."""
        path, body = draw.choice(BODIES)
        changed = mutated(draw, body, draw.choice(BODIES)[1])
        try:
            data = json.dumps(changed, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")
        except (RecursionError, ValueError):
            data = b"[" * 5000
        if draw.random() < 0.1:
            data = damaged(draw, data)
        return path, data

    def one(self, given: tuple[str, bytes]) -> str:
        """Send the request, check the response and return its status."""
        return str(self.ask(*given))

    def ask(self, path: str, body: bytes) -> int:
        """Send a request, check the response and return its status."""
        return self._loop.run_until_complete(asyncio.wait_for(self._ask(path, body), 200))

    async def _ask(self, path: str, body: bytes) -> int:
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
            "scheme": "http",
            "path": f"/v1/{path}", "raw_path": f"/v1/{path}".encode(), "query_string": b"", "root_path": "",
            "headers": [(b"content-type", b"application/json"), (b"host", b"localhost")],
            "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80),
        }  # fmt: skip
        left = asyncio.Event()  # never set: the client does not disconnect
        sent = [{"type": "http.request", "body": body, "more_body": False}]
        status, parts = 0, []

        async def receive() -> dict[str, Any]:
            if sent:
                return sent.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            else:
                parts.append(message.get("body", b""))

        await self._app(scope, receive, send)
        check(status, b"".join(parts))
        return status


def check(status: int, body: bytes) -> None:
    """Raise AssertionError for a response that no client should get."""
    assert 200 <= status < 300 or 400 <= status < 500, (status, body[:300])
    values = []
    if body.startswith(b"data: "):
        lines = [line for line in body.decode().split("\n\n") if line.startswith("data: ")]
        assert lines[-1] == "data: [DONE]", lines[-1]
        values = [json.loads(line[6:]) for line in lines[:-1]]
    else:
        values = [json.loads(body)]
    for value in values:
        error = value.get("error")
        assert (status < 400) == (error is None) or status == 200, (status, value)
        if error is not None:
            assert set(error) == {"message", "type", "param", "code"}, error
            assert error["type"] != "server_error", error
            assert isinstance(error["message"], str) and len(error["message"]) < 1000, error
