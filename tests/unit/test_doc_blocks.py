"""What is taken for a block to run, and that one which fails is reported with its place."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import doc_blocks
from support.doc_reader import Files, Reader, worker

from pydiffusion.cli import app

PAGE = """# Page

Run `pydiffusion generate -m model.gguf`, see `pydiffusion bench --compare`.

```sh
A=1 pydiffusion inspect model.gguf --json | jq . > out && pydiffusion bench -m model.gguf # quickly
```

<!-- not run: needs a
GPU -->
```python
1 / 0
```

- In a list:

  <!-- slow -->
  ```console
  $ pydiffusion \\
  >   devices
  2 threads
  ```

```
plain
```
"""


def test_blocks() -> None:
    shell, python, console, plain = doc_blocks.page_blocks("page.md", PAGE)
    assert (shell.language, shell.line, shell.mark) == ("sh", 6, "")
    assert (python.language, python.line, python.mark) == ("python", 12, "not run")
    assert python.reason.split() == ["needs", "a", "GPU"]
    assert (console.mark, console.script) == ("slow", "pydiffusion \\\n  devices\n")
    assert (plain.language, plain.text) == ("", "plain\n")


def test_commands() -> None:
    shell, _, console, _ = doc_blocks.page_blocks("page.md", PAGE)
    found = [mention.command for mention in doc_blocks.commands(shell)]
    assert found == ["pydiffusion inspect model.gguf --json", "pydiffusion bench -m model.gguf"]
    assert [mention.command for mention in doc_blocks.commands(console)] == ["pydiffusion devices"]
    mentions = doc_blocks.mentions("page.md", PAGE)
    assert [mention.command for mention in mentions] == [
        "pydiffusion generate -m model.gguf",
        "pydiffusion bench --compare",
    ]


def test_a_mark_without_a_block_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"page.md:1: no block follows"):
        doc_blocks.page_blocks("page.md", "<!-- not run: why -->\n\nText.\n\n```sh\ntrue\n```\n")


@pytest.mark.parametrize(
    ("command", "wrong"),
    [
        ("pydiffusion --version", ""),
        ("pydiffusion COMMAND --help", ""),
        ("pydiffusion bench --compare", ""),
        ("pydiffusion devices -m", ""),
        ("pydiffusion generate --prompts x", "--prompts"),
        ("pydiffusion generte -m x", "generte"),
        ("pydiffusion --verison", "--verison"),
    ],
)
def test_options_that_do_not_exist(command: str, wrong: str) -> None:
    told = doc_blocks.unknown_options(command, app)
    assert wrong in told
    assert bool(told) == bool(wrong)


def test_what_fails_is_reported_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    with worker(tmp_path) as process:
        reader = Reader(tmp_path / "reader", Files(tmp_path / "files"), process)
        try:
            for page, told in (
                ("```sh\nfalse\necho no\n```\n", "page.md:2: exit code 1"),
                ("```sh\npydiffusion inspect nothing\n```\n", "nothing"),
                ("\n\n```python\nx = 1\n1 / 0\n```\n", 'page.md", line 5'),
                ("```sh\npydiffusion serve -m nothing --port 9999\n```\n", "nothing"),
            ):
                (block,) = doc_blocks.page_blocks("page.md", page)
                with pytest.raises(AssertionError) as failed:
                    reader.run(block)
                assert told in str(failed.value)
                assert "\nno\n" not in str(failed.value).partition("--- printed:")[2]
            shared = doc_blocks.page_blocks(
                "page.md", "```python\nprint(x + 1)\n```\n```sh\necho $((1 + 1))\n```\n"
            )
            assert [reader.run(block) for block in shared] == ["2\n", "2\n"]
        finally:
            reader.close()
