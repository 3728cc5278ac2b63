"""The Containerfile, without a container runtime: it is parsed, and its commands run on this machine.

What only a build can show (base images, apt, the copied environment) is not tested.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from support.paths import REPOSITORY
from support.server_fakes import ScriptedModel, script, serving
from support.server_process import process


def instructions() -> list[tuple[str, str]]:
    """(instruction, its arguments) in order, lines joined, comments left out."""
    text = (REPOSITORY / "Containerfile").read_text(encoding="utf-8")
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", lines)
    found = [line.strip().partition(" ")[::2] for line in joined.splitlines() if line.strip()]
    return [(name, rest.strip()) for name, rest in found]


ALL = instructions()
LAST_STAGE = ALL[max(i for i, (name, _) in enumerate(ALL) if name == "FROM") :]


def last(name: str) -> str:
    (found,) = [rest for each, rest in LAST_STAGE if each == name]
    return found


def healthcheck(url: str) -> int:
    """Exit code of the health check's command against a server."""
    command = json.loads(last("HEALTHCHECK").partition(" CMD ")[2])
    assert command[0] == "python"
    port = url.rpartition(":")[2]
    assert ":8080/" in command[-1]
    here = [sys.executable, *command[1:-1], command[-1].replace(":8080/", f":{port}/")]
    return subprocess.run(here, capture_output=True, timeout=60).returncode


def test_it_has_two_stages_and_no_root() -> None:
    known = {
        "FROM",
        "RUN",
        "WORKDIR",
        "COPY",
        "ARG",
        "ENV",
        "USER",
        "EXPOSE",
        "HEALTHCHECK",
        "ENTRYPOINT",
        "CMD",
    }
    assert {name for name, _ in ALL} <= known
    stages = [rest.split() for name, rest in ALL if name == "FROM"]
    assert len(stages) == 2 and stages[0][0] == stages[1][0], "the environment's Python is the same"
    assert last("COPY").split()[0] == f"--from={stages[0][2]}"
    uid = last("USER")
    assert uid.isdecimal() and uid != "0", "Kubernetes' runAsNonRoot needs a number"
    assert f"--uid {uid} " in last("RUN")
    assert "g++" not in str(LAST_STAGE), "no compiler in the image"


def test_what_is_installed_exists() -> None:
    (install,) = [rest for name, rest in ALL if name == "RUN" and "pip install" in rest]
    words = shlex.split(install)
    project = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    (extra,) = re.findall(r"^\.\[(\w+)\]$", "\n".join(words), re.MULTILINE)
    assert re.search(rf"^{extra} = \[", project, re.MULTILINE)
    (option,) = re.findall(r"cmake\.define\.(\w+)=", install)
    assert re.search(rf"^option\({option} ", (REPOSITORY / "CMakeLists.txt").read_text(), re.MULTILINE)
    left_out = (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").split()
    needed = {
        "pyproject.toml",
        "CMakeLists.txt",
        "README.md",
        "LICENSE",
        "native",
        "pydiffusion",
        "convert",
        "cmake",
        "vendor",
    }
    assert not needed & set(left_out)


def test_the_health_check_follows_the_server() -> None:
    with serving(ScriptedModel(script), api_key="secret") as (url, server):
        assert healthcheck(url) == 0, "without the key"
        server.scheduler.begin_shutdown()
        assert healthcheck(url) != 0
    assert healthcheck(url) != 0, "the server has ended"


def test_its_command_serves_with_the_key_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pydiffusion.convert import convert
    from pydiffusion.demo import checkpoint_path

    convert(checkpoint_path(), tmp_path / "model.gguf", "q8_0")
    (tmp_path / "key.txt").write_text("secret\n", encoding="utf-8")
    monkeypatch.setenv("PYDIFFUSION_API_KEY_FILE", os.fspath(tmp_path / "key.txt"))
    entry, default = json.loads(last("ENTRYPOINT")), json.loads(last("CMD"))
    assert entry[:2] == ["pydiffusion", "serve"] and default[0] == "-m"
    assert entry[-1] == last("EXPOSE")
    # The port in the image may be taken here; of an option that is given twice, the last counts.
    with process(tmp_path / "model.gguf", *entry[2:], "--port", "0", "--threads", "1") as (running, url):
        url = url.replace("0.0.0.0", "127.0.0.1")
        assert healthcheck(url) == 0
        assert httpx.get(url + "/v1/models").status_code == 401
        right = {"Authorization": "Bearer secret"}
        assert httpx.get(url + "/v1/models", headers=right).status_code == 200
        running.send_signal(signal.SIGTERM)  # as `docker stop` does
        assert running.wait(60) == 0
