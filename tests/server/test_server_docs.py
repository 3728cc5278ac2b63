"""The examples of docs/server.md run unchanged, against a server on the demo model."""

from __future__ import annotations

import json
import re
from itertools import chain
from pathlib import Path

import jsonschema
import pytest
from support.paths import REPOSITORY
from support.server_fakes import serving

from pydiffusion import DiffusionModel
from pydiffusion.openai.fields import EQUIVALENTS, IGNORED, UNSUPPORTED
from pydiffusion.openai.requests import ENDPOINTS

PAGE = (REPOSITORY / "docs" / "server.md").read_text(encoding="utf-8")


def test_the_examples_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pydiffusion.convert import convert
    from pydiffusion.demo import checkpoint_path

    convert(checkpoint_path(), tmp_path / "model.gguf", "q8_0")
    examples = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(examples) == 3
    names: dict[str, object] = {}
    with serving(DiffusionModel(tmp_path / "model.gguf", n_threads=1, n_ctx=512)) as (url, _):
        for example in examples:
            code = example.replace("http://127.0.0.1:8080", url)
            exec(compile(code, "docs/server.md", "exec"), names)
    printed = capsys.readouterr().out
    answer = re.search(r"^\{.*\}$", printed, re.MULTILINE)
    assert answer is not None
    jsonschema.validate(json.loads(answer.group()), {"required": ["name"]})
    assert re.search(r"^The .* jumps over the .*\.", printed, re.MULTILINE | re.DOTALL)


def test_every_field_is_described() -> None:
    for field in (*chain(*ENDPOINTS.values()), *IGNORED, *UNSUPPORTED, *EQUIVALENTS):
        assert f"`{field}`" in PAGE, field
