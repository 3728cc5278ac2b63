"""``pydiffusion serve`` on the demo model: statuses, bodies, streams, the page."""

from __future__ import annotations

import http.client
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .record import Record, demo_model, digest, environment

_HEADERS = ("content-type", "content-security-policy", "cache-control", "allow", "retry-after",
            "www-authenticate", "access-control-allow-origin", "x-should-retry")  # fmt: skip
SHORT = {"max_tokens": 60, "steps": 5, "seed": 3}
ASK = [{"role": "user", "content": "sort: c b a"}]
CHAT, TEXT, INFILL = "/v1/chat/completions", "/v1/completions", "/v1/infill"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TOOLS = [
    {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
]
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}


def record(record: Record) -> None:
    with _serving(record) as client:
        _get(client)
        _chats(client)
        _texts(client)
        _refused(client)
        body = client.ask("metrics", "GET", "/metrics", keep=False)
        names = sorted(set(re.findall(r"^[a-z_]+", body, re.MULTILINE)))
        record.value("http/metrics/names", names)
    with _serving(record, "--api-key", "secret", "--cors", "http://there") as client:
        client.ask("key/none", "GET", "/v1/models")
        client.ask("key/wrong", "GET", "/v1/models", headers={"Authorization": "Bearer x"})
        client.ask("key/right", "GET", "/v1/models", headers={"Authorization": "Bearer secret"})
        client.ask("key/health", "GET", "/health")
        client.ask("key/origin", "GET", "/v1/models", headers={"Origin": "http://here"})
        cors = {"Origin": "http://there", "Authorization": "Bearer secret"}
        client.ask("key/cors", "GET", "/v1/models", headers=cors)


@contextmanager
def _serving(record: Record, *options: str) -> Iterator[_Client]:
    command = [sys.executable, "-m", "pydiffusion", "serve", "-m", str(demo_model(record, "q4_k_m")),
               "--port", "0", "--threads", "1", *options]  # fmt: skip
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=record.folder, env=environment(record.folder)
    ) as process:
        try:
            assert process.stderr is not None
            for line in process.stderr:
                if found := re.search(r"http://([^\s/]+)", line):
                    break
            else:
                raise RuntimeError("the server ended before it was up")
            yield _Client(record, found[1])
            process.send_signal(signal.SIGTERM)
            code = process.wait(60)
            record.value(f"http/exit/{len(options)}", code)
        finally:
            process.kill()


class _Client:
    """Keeps status, headers that matter, and body: messages of errors among the texts."""

    def __init__(self, record: Record, host: str) -> None:
        self.record = record
        self._host = host

    def ask(self, key: str, method: str, path: str, body: Any = None, keep: bool = True, **more: Any) -> str:
        key = f"http/{key}"
        connection = http.client.HTTPConnection(self._host, timeout=300)
        content = body if isinstance(body, (str, bytes)) or body is None else json.dumps(body)
        headers = {"Content-Type": "application/json"} | more.get("headers", {})
        connection.request(method, path, body=content, headers=headers)
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        self.record.value(f"{key}/status", response.status)
        kept = {name: response.getheader(name) for name in _HEADERS if response.getheader(name)}
        self.record.value(f"{key}/headers", kept)
        if keep:
            self._keep(key, response.getheader("content-type") or "", text)
        return text

    def post(self, key: str, path: str, **fields: Any) -> None:
        self.ask(key, "POST", path, fields)

    def _keep(self, key: str, content_type: str, text: str) -> None:
        if content_type.startswith("application/json"):
            self.record.json(f"{key}/body", json.loads(text))
        elif content_type.startswith("text/event-stream"):
            lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
            self.record.value(f"{key}/end", lines[-1])
            self.record.json(f"{key}/chunks", [json.loads(line) for line in lines[:-1]])
        else:
            self.record.text(f"{key}/digest", digest(text))


def _get(client: _Client) -> None:
    for name, path in {
        "models": "/v1/models",
        "model": "/v1/models/demo-q4_k_m",
        "model-file": "/v1/models/demo-q4_k_m.gguf",
        "model-none": "/v1/models/other",
        "health": "/health",
        "page": "/",
        "page.css": "/page.css",
        "page.js": "/page.js",
        "heatmap.js": "/heatmap.js",
        "none": "/v1/nothing",
        "openapi": "/openapi.json",
        "docs": "/docs",
    }.items():
        client.ask(f"get/{name}", "GET", path)
    client.ask("get/method", "GET", CHAT)
    client.ask("post/method", "POST", "/v1/models", {})
    client.ask("head/page", "HEAD", "/", keep=False)
    client.ask("get/foreign", "GET", "/v1/models", headers={"Origin": "http://elsewhere"})


def _chats(client: _Client) -> None:
    def chat(name: str, messages: Any = ASK, **more: Any) -> None:
        client.post(f"chat/{name}", CHAT, **{"messages": messages, **SHORT, **more})

    chat("plain")
    chat("cached")
    chat("stream", stream=True, stream_options={"include_usage": True})
    chat("drafts", stream=True, stream_options={"diffusion": True})
    chat("choices", n=3)
    chat("model", model="demo-q4_k_m", temperature=0.5, top_p=0.9, user="me")
    chat("tools", tools=TOOLS, tool_choice="auto", parallel_tool_calls=False)
    called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    chat("tool-result", [*ASK, called, {"role": "tool", "tool_call_id": "1", "content": "3"}], tools=TOOLS)
    chat("parts", [{"role": "user", "content": [{"type": "text", "text": "add: 1+2"}]}])
    chat("roles", [{"role": "developer", "content": "be brief"}, *ASK])
    format = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    chat("schema", response_format=format)
    chat("schema-stream", response_format=format, stream=True)
    chat("object", response_format={"type": "json_object"}, max_tokens=30)
    chat("object-schema", response_format={"type": "json_object", "schema": SCHEMA})
    chat("regex", regex="[a-c]( [a-c]){2}")
    chat("stop", stop=["b"])
    chat("thinking", enable_thinking=False, thinking_budget=3, reasoning_effort="low")
    chat("options", t_min=0.3, t_max=0.7, entropy_bound=0.3, stability_threshold=2, trim_after_eos=True,
         confidence_threshold=0.01, stop_on_repetition=True)  # fmt: skip
    chat("nulls", stop=None, tools=None, n=None, logprobs=False)


def _texts(client: _Client) -> None:
    def text(name: str, prompt: Any = "sort: c b a", **more: Any) -> None:
        client.post(f"text/{name}", TEXT, **{"prompt": prompt, **SHORT, **more})

    text("plain")
    text("echo", echo=True)
    text("stream", stream=True, echo=True)
    text("tokens", [2, 5, 6, 7])
    text("several", ["add: 1+2", "reverse: a b"], n=2)
    text("suffix", suffix=" and d")
    text("default", max_tokens=None)
    infill = {"text": "The <|hole:2|> jumps over <|hole|>.", "steps": 4, "seed": 3}
    client.post("infill/plain", INFILL, **infill)
    client.post("infill/instruction", INFILL, **infill, instruction="say", hole_tokens=4)
    client.post("infill/stream", INFILL, **infill, stream=True, stream_options={"diffusion": True})


def _refused(client: _Client) -> None:
    client.ask("wrong/json", "POST", CHAT, "{")
    client.ask("wrong/list", "POST", CHAT, [])
    client.ask("wrong/utf8", "POST", CHAT, b"\xff")
    for name, fields in {
        "none": {},
        "messages": {"messages": []},
        "messages-type": {"messages": "x"},
        "role": {"messages": [{"role": "x", "content": "y"}]},
        "content": {"messages": [{"role": "user"}]},
        "image": {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "unknown": {"messages": ASK, "nonsense": 1},
        "unsupported": {"messages": ASK, "logprobs": True},
        "type": {"messages": ASK, "steps": "x"},
        "range": {"messages": ASK, "steps": 0},
        "temperatures": {"messages": ASK, "t_min": 2, "t_max": 1},
        "seed": {"messages": ASK, "seed": -1},
        "n": {"messages": ASK, "n": 99},
        "stop": {"messages": ASK, "stop": [1]},
        "tokens": {"messages": ASK, "max_tokens": 0},
        "model": {"messages": ASK, "model": "other"},
        "tool-choice": {"messages": ASK, "tools": TOOLS, "tool_choice": "required"},
        "tool": {"messages": ASK, "tools": [{"type": "x"}]},
        "format": {"messages": ASK, "response_format": {"type": "x"}},
        "format-schema": {"messages": ASK, "response_format": {"type": "text", "schema": {}}},
        "schema": {"messages": ASK, "response_format": {"type": "json_schema", "json_schema": {}}},
        "schema-never": {
            "messages": ASK,
            "response_format": {"type": "json_object", "schema": {"enum": []}},
        },
        "schema-long": {
            "messages": ASK,
            "max_tokens": 3,
            "response_format": {"type": "json_object", "schema": {"type": "string", "minLength": 50}},
        },
        "regex": {"messages": ASK, "regex": "(a"},
        "regex-tools": {"messages": ASK, "regex": "a", "tools": TOOLS},
        "long": {"messages": [{"role": "user", "content": "word " * 3000}]},
    }.items():
        client.post(f"wrong/{name}", CHAT, **fields)
    for name, fields in {
        "prompt": {},
        "prompt-empty": {"prompt": []},
        "prompt-tokens": {"prompt": [10**7]},
        "prompt-suffix": {"prompt": "x", "suffix": "y", "stop": "z"},
        "completion-tokens": {"prompt": "x", "max_completion_tokens": 3},
    }.items():
        client.post(f"wrong/{name}", TEXT, **fields)
    client.post("wrong/hole", INFILL, text="no hole")
    client.post("wrong/infill", INFILL)
