"""The command `llm`, with the server in its extra-openai-models.yaml."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from checks import MODEL, URL, run

folder = Path(tempfile.mkdtemp(dir=os.environ.get("CLIENTS_FOLDER")))
(folder / "extra-openai-models.yaml").write_text(
    f"""- model_id: ours
  model_name: {MODEL}
  api_base: "{URL}"
  supports_schema: true
  supports_tools: true
- model_id: ours-completion
  model_name: {MODEL}
  api_base: "{URL}"
  completion: true
"""
)
ENVIRONMENT = {**os.environ, "LLM_USER_PATH": str(folder), "OPENAI_API_KEY": "none"}


def llm(*arguments: str) -> str:
    command = [sys.executable, "-m", "llm", *arguments]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, input="")
    assert done.returncode == 0, done.stderr
    return done.stdout


def stream() -> None:
    llm("-m", "ours", "Hello", "-o", "max_tokens", "32", "--usage")
    (logged,) = json.loads(llm("logs", "--json", "-n", "1"))
    assert logged["output_tokens"] > 0


def without_a_stream() -> None:
    settings = ["-o", "max_tokens", "32", "-o", "temperature", "0.7", "-s", "Be brief"]
    llm("-m", "ours", "Hello", "--no-stream", *settings)


def schema() -> None:
    person = json.loads(llm("-m", "ours", "--schema", "name, age int", "Who was Ada Lovelace?"))
    assert isinstance(person["name"], str)
    assert isinstance(person["age"], int)


def with_tools() -> None:
    llm("-m", "ours", "-T", "llm_version", "-o", "max_tokens", "32", "Which version?")


def conversation() -> None:
    llm("-m", "ours", "Hello", "-o", "max_tokens", "16")
    llm("-c", "And now?", "-o", "max_tokens", "16")


def completion() -> None:
    llm("-m", "ours-completion", "Once upon a time", "-o", "max_tokens", "32")


run("llm", [stream, without_a_stream, schema, with_tools, conversation, completion])
