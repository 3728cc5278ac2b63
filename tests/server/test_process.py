"""`pydiffusion serve` in a process of its own, on random weights: the same answers as the library's."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import openai
import pytest
from support.server_process import process

from pydiffusion import DiffusionModel, cli

ASK = {"messages": [{"role": "user", "content": "the river"}], "seed": 3, "max_tokens": 24}


def test_answers_equal_the_librarys(gguf_file: Callable[..., Path]) -> None:
    file = gguf_file("small")
    with DiffusionModel(file, n_threads=1) as model:
        expected = model.create_chat_completion(ASK["messages"], seed=3, max_tokens=24, steps=4)
    with process(file, "--threads", "1") as (running, url):
        client = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
        name = client.models.list().data[0].id
        for _ in range(2):  # with an empty cache, and with a full one
            answer = client.chat.completions.create(model=name, **ASK, extra_body={"steps": 4})
            assert answer.choices[0].message.content == expected["choices"][0]["message"]["content"]
            assert answer.usage.completion_tokens == expected["usage"]["completion_tokens"]
        assert answer.usage.prompt_tokens_details.cached_tokens == answer.usage.prompt_tokens
        chunks = client.chat.completions.create(model=name, **ASK, extra_body={"steps": 4}, stream=True)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == expected["choices"][0]["message"]["content"]
        running.send_signal(signal.SIGTERM)
        assert running.stderr is not None and running.stderr.read() == ""  # no complaints, no leaks
        assert running.wait(60) == 0


def test_ctrl_c_ends_with_130(gguf_file: Callable[..., Path]) -> None:
    with process(gguf_file("small"), "--threads", "1", "--api-key", "k") as (running, url):
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=url + "/v1", api_key="x", max_retries=0).models.list()
        running.send_signal(signal.SIGINT)
        assert running.wait(60) == 130


def test_without_the_extra_it_says_what_to_install(
    gguf_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in list(sys.modules):
        if name.startswith("pydiffusion.server"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert cli.main(["serve", "-m", str(gguf_file("small"))]) == 1
    assert "pip install fastapi uvicorn" in capsys.readouterr().err


def test_a_port_in_use_is_an_error(gguf_file: Callable[..., Path]) -> None:
    with process(gguf_file("small"), "--threads", "1") as (_, url):
        command = [sys.executable, "-m", "pydiffusion", "serve", "-m", str(gguf_file("small"))]
        second = subprocess.run(
            [*command, "--port", url.rpartition(":")[2]], capture_output=True, text=True, timeout=120
        )
    assert second.returncode == 1 and "Address already in use" in second.stderr
