"""The command line: stdout and stderr, exit codes, drawing on a terminal, interruption."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.paths import REPOSITORY
from support.terminal import needs_terminal, on_terminal, program

from pydiffusion import DiffusionModel
from pydiffusion._util.sizes import count
from pydiffusion.cli import main
from pydiffusion.cli._text import one_line, printable

COMMANDS = [
    "convert",
    "quantize",
    "split",
    "merge",
    "imatrix",
    "verify",
    "evaluate",
    "inspect",
    "generate",
    "infill",
    "batch",
    "chat",
    "demo",
    "bench",
]
PROMPT = "the river"


@pytest.fixture(scope="module")
def model(gguf_file: Callable[..., Path]) -> str:
    return str(gguf_file("small"))


def short(model: str, *more: str) -> list[str]:
    return ["generate", "-m", model, "-n", "10", "--steps", "3", "--seed", "4", "--threads", "1", *more]


# Answers and everything else


def test_generate_puts_the_text_on_stdout_and_the_rest_on_stderr(
    model: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(short(model, "-p", PROMPT, "--raw")) == 0
    out, err = capfd.readouterr()
    with DiffusionModel(model, n_threads=1) as opened:
        expected = opened.generate(PROMPT, max_tokens=10, steps=3, seed=4)
    assert out == expected.text + "\n"
    assert "seed 4" in err and "steps per canvas" in err and "ms per step" in err
    assert "\x1b" not in err, "no drawing in a pipe"


def test_generate_goes_through_the_chat_template_unless_raw(
    model: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(short(model, "-p", PROMPT, "--json")) == 0
    chat = json.loads(capfd.readouterr().out)
    assert main(short(model, "-p", PROMPT, "--json", "--raw")) == 0
    raw = json.loads(capfd.readouterr().out)
    with DiffusionModel(model) as opened:
        assert chat["n_prompt"] == len(opened.chat_prompt([{"role": "user", "content": PROMPT}]))
        assert raw["n_prompt"] == len(opened.tokenize(PROMPT))
    assert set(raw) == {
        *("text", "tokens", "finish_reason", "n_prompt", "steps", "canvas_steps", "seed", "timings"),
    }
    assert len(raw["tokens"]) <= 10 and raw["seed"] == 4


@pytest.mark.parametrize("arguments", [["-p", "-"], []])
def test_the_prompt_comes_from_standard_input(model: str, arguments: list[str]) -> None:
    def run(*more: str, typed: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            program(*short(model, "--raw", *more)), input=typed, capture_output=True, check=True
        )

    assert run(*arguments, typed="für 🙂".encode()).stdout == run("-p", "für 🙂").stdout


def test_input_that_is_not_utf8_is_refused(model: str) -> None:
    done = subprocess.run(program(*short(model, "-p", "-")), input=b"a\xff", capture_output=True)
    assert done.returncode == 1 and b"not valid UTF-8 at byte 1" in done.stderr and done.stdout == b""


def test_chat_answers_line_by_line_in_a_pipe(model: str) -> None:
    arguments = ["chat", "-m", model, "-n", "8", "--steps", "2", "--seed", "4", "--threads", "1"]

    def run(typed: str) -> str:
        done = subprocess.run(program(*arguments), input=typed, capture_output=True, text=True, check=True)
        assert "Traceback" not in done.stderr
        return done.stdout

    first = run("hi\n")
    assert first.strip("\n")
    assert run("hi\n/reset\n\nhi\n/exit\nnever read\n") == first + first
    two = run("hi\nhi\n")
    assert two.startswith(first) and two != first + first, "the second turn knows the first"


def test_chat_goes_on_after_a_message_that_does_not_fit(model: str) -> None:
    arguments = ["chat", "-m", model, "-n", "8", "--steps", "2", "--seed", "4", "--ctx", "64"]
    typed = "word " * 100 + "\nhi\n"
    done = subprocess.run(program(*arguments), input=typed, capture_output=True, text=True)
    assert done.returncode == 0 and "do not fit" in done.stderr and done.stdout.strip("\n")


def test_chat_needs_a_template(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(DiffusionModel, "has_chat_template", False)
    assert main(["chat", "-m", model]) == 1
    assert "no chat template" in capsys.readouterr().err


def test_inspect_reads_every_key_and_tensor(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", model, "--json", "--tensors"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["metadata"]["general.architecture"] == "diffusion-gemma"
    assert found["metadata"]["tokenizer.ggml.tokens"] == {"type": "array[str]", "length": 512}
    assert len(found["tensors"]) == found["n_tensors"]
    assert sum(int(np.prod(t["shape"])) for t in found["tensors"]) == found["n_weights"]
    assert main(["inspect", model, "--json", "--arrays"]) == 0
    assert len(json.loads(capsys.readouterr().out)["metadata"]["tokenizer.ggml.tokens"]) == 512
    assert main(["inspect", model, "--tensors"]) == 0
    out = capsys.readouterr().out
    assert "token_embd.weight" in out and "diffusion.canvas_length" in out and "... (512)" in out


def test_convert_then_quantize(
    checkpoint_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "a.gguf", tmp_path / "b.gguf"
    assert main(["convert", str(checkpoint_folder("tiny")), "-o", str(first), "--type", "f32"]) == 0
    out, err = capsys.readouterr()
    assert out == "" and "bits per weight" in err and "\x1b" not in err
    assert main(["quantize", str(first), str(second), "--type", "q8_0", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["type"] == "q8_0" and report["target"] == str(second)
    assert second.stat().st_size < first.stat().st_size
    assert main(["quantize", str(first), str(second), "--no-overwrite"]) == 1


def test_an_unknown_type_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    from pydiffusion.convert import TYPES

    assert main(["convert", "x", "--type", "q3"]) == 2
    err = capsys.readouterr().err
    assert all(name in err for name in TYPES)


# Exit codes and errors


@pytest.mark.parametrize(
    "arguments",
    [
        ["bogus"],
        ["generate"],
        ["generate", "-m", "x", "-p", "y", "--nonsense"],
        ["generate", "-m", "x", "-p", "y", "--steps", "0"],
        ["generate", "-m", "x", "-p", "y", "--steps", "many"],
        ["generate", "-m", "x", "-p", "y", "--t-min", "2", "--t-max", "1"],
        ["generate", "-m", "x", "-p", "y", "--threads", "0"],
        ["generate", "-m", "x", "-p", "y", "--ctx", "-5"],
        ["convert", "x", "--type", "q3"],
        ["demo", "--task", "cooking"],
        ["demo", "--puzzle", "-1"],
    ],
)
def test_wrong_use_is_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err and "Error" in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "-m", "{none}", "-p", "x"],
        ["generate", "-m", "{folder}", "-p", "x"],
        ["generate", "-m", "{text}", "-p", "x"],
        ["generate", "-m", "{model}", "-p", "x", "--ctx", "100000"],
        ["generate", "-m", "{model}", "-p", "{long}"],
        ["inspect", "{none}"],
        ["inspect", "{text}"],
        ["convert", "{none}", "-o", "{out}"],
        ["convert", "{folder}", "-o", "{out}"],
        ["quantize", "{text}", "{out}"],
    ],
)
def test_failure_is_1_with_one_line(
    arguments: list[str], model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "text.gguf").write_text("no model at all")
    names = {
        "none": tmp_path / "none.gguf",
        "folder": folder,
        "text": tmp_path / "text.gguf",
        "out": tmp_path / "out.gguf",
        "model": model,
        "long": "x " * 3000,
    }
    assert main([argument.format(**names) for argument in arguments]) == 1
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    assert len([line for line in err.splitlines() if line.startswith("pydiffusion: ")]) == 1
    assert not (tmp_path / "out.gguf").exists()


def test_debug_mode_prints_the_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.environ["PYDIFFUSION_DEBUG"] = "1"
    try:
        assert main(["inspect", str(tmp_path / "none")]) == 1
    finally:
        del os.environ["PYDIFFUSION_DEBUG"]
    assert "Traceback" in capsys.readouterr().err


def test_control_characters_of_a_hostile_name_stay_off_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["inspect", "a\x1b[31m\nb.gguf"]) == 1
    err = capsys.readouterr().err
    assert "\x1b" not in err and err.count("\n") == 1


def test_a_closed_pipe_ends_quietly(model: str) -> None:
    process = subprocess.Popen(
        program("generate", "-m", model, "-p", PROMPT, "-n", "500", "--steps", "2", "--seed", "1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(60) == 1 and b"Traceback" not in err and b"Exception" not in err


@pytest.mark.skipif(os.name == "nt", reason="NOT CHECKED: Ctrl-C on Windows")
def test_ctrl_c_is_130(model: str) -> None:
    process = subprocess.Popen(
        program("generate", "-m", model, "-p", PROMPT, "--steps", "1000", "--confidence-threshold", "0"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    process.stderr.readline()  # the model is loaded
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"interrupted" in err and b"Traceback" not in err


# Help


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_needs_no_native_module(command: list[str]) -> None:
    script = (
        "import sys; sys.modules['pydiffusion._native'] = None;"
        "from pydiffusion.cli import main; code = main([*sys.argv[1:], '--help']);"
        "heavy = [m for m in ('numpy', 'tokenizers', 'jinja2', 'rich.live') if m in sys.modules];"
        "sys.exit(code or (3 if heavy else 0))"
    )
    done = subprocess.run([sys.executable, "-c", script, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Usage: pydiffusion" in done.stdout
    if not command:
        assert all(name in done.stdout for name in COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from pydiffusion import __version__

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"pydiffusion {__version__}\n"


def test_the_bill_of_materials(capsys: pytest.CaptureFixture[str]) -> None:
    """All linked libraries with their licences, and every required package."""
    from pydiffusion import _native

    assert main(["--version", "--verbose"]) == 0
    out = capsys.readouterr().out
    for part in ("ggml", "nanobind"):
        assert re.search(
            rf"^{part} {re.escape(_native.version()[part])} .*linked in.*MIT$", out, re.MULTILINE
        )
    requirements = [line.partition(";") for line in importlib.metadata.requires("pydiffusion-gguf") or ()]
    wanted = {
        re.split(r"[^\w.-]", name)[0] for name, _, extra in requirements if not extra or "server" in extra
    }
    listed = {line.split()[0] for line in out.splitlines() if "(needed: " in line}
    assert listed == wanted and {"numpy", "tokenizers", "fastapi"} <= listed


def test_the_bill_of_materials_of_a_tree_that_was_never_installed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pydiffusion.DISTRIBUTION", "no-such-distribution")
    assert main(["--version", "--verbose"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("no-such-distribution is not installed")


def test_the_page_says_what_the_commands_do() -> None:
    script = REPOSITORY / "docs" / "cli_reference.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# On a terminal


@needs_terminal
def test_show_draws_the_canvas_as_it_settles(model: str) -> None:
    seen, code = on_terminal(short(model, "-p", PROMPT, "--show", "--raw"))
    assert code == 0
    assert "step 1 of 3" in seen and "step 3 of 3" in seen and "canvas 2" in seen
    assert "entropy " in seen and "settled " in seen and "3.0 steps per canvas" in seen
    assert "\x1b[1m" in seen and "\x1b[2m" in seen, "settled tokens are bright, the others dim"


@needs_terminal
def test_without_show_the_steps_are_shown_and_no_text(model: str) -> None:
    seen, code = on_terminal(short(model, "-p", PROMPT, "--raw"))
    assert code == 0 and "\x1b[2m" not in seen, "no draft"
    assert "step 1 of 3" in seen, "but the steps"
    seen, code = on_terminal(short(model, "-p", PROMPT, "--raw", "--quiet"))
    assert code == 0 and "step" not in seen and "loaded" not in seen and "loading" not in seen


@needs_terminal
def test_chat_on_a_terminal(model: str) -> None:
    """Ctrl-C stops an answer, not the chat; twice at the prompt it ends the chat."""
    endless = ["chat", "-m", model, "--steps", "1000", "--confidence-threshold", "0"]
    typed = [("> ", "hi\n"), ("step 3 of", "\x03"), ("stopped", "/reset\n"), ("forgotten", "\x03")]
    seen, code = on_terminal(endless, typed)
    assert code == 130, seen
    assert "stopped" in seen and "forgotten" in seen and "Traceback" not in seen
    assert "Ctrl-C again ends the chat" in seen[seen.index("forgotten") :]


@needs_terminal
def test_ctrl_d_ends_a_chat(model: str) -> None:
    seen, code = on_terminal(["chat", "-m", model], [("> ", "\x04")])
    assert code == 0 and "Traceback" not in seen


@needs_terminal
def test_a_prompt_is_asked_for(model: str) -> None:
    seen, code = on_terminal(["generate", "-m", model])
    assert code == 2 and "give a prompt" in seen


def test_settled_tokens_are_bright_and_a_split_character_is_one(model: str) -> None:
    from pydiffusion.cli._display import CanvasDisplay

    with DiffusionModel(model) as opened:
        tokens = [*opened.tokenize("a🙂b", add_bos=False), opened.tokenizer.eos_id, 300]
        accepted = [True, True, True, True, False, False, True, True]
        assert len(tokens) == len(accepted)
        text = CanvasDisplay(opened.tokenizer, (opened.tokenizer.eos_id,)).styled(
            np.array(tokens), np.array(accepted)
        )
    assert text.plain == "a🙂b", "nothing after a settled eos"
    assert [(text.plain[span.start : span.end], span.style) for span in text.spans] == [
        ("a", "bold"),
        ("🙂", "dim"),
        ("b", "dim"),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain\ttext\n", "plain\ttext\n"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07x", "x"),
        ("\x1b]8;;http://a\x1b\\link", "link"),
        ("\x9b2Jx", "x"),
        ("\x1bcx", "x"),
        ("a\x00\x08\x7f\rb", "ab"),
        ("half \x1b", "half "),
        ("a\u202eb\u2066c", "abc"),
        ("漢字 🙂 é", "漢字 🙂 é"),
        ("👩‍👩‍👧", "👩‍👩‍👧"),
    ],
)
def test_terminal_escapes_are_stripped(text: str, expected: str) -> None:
    assert printable(text) == expected


def test_human_readable_counts_and_lines() -> None:
    assert [count(n, "B") for n in (0, 999, 12_000, 438e6, 25.2e9)] == [
        "0 B",
        "999 B",
        "12 kB",
        "438 MB",
        "25.2 GB",
    ]
    assert one_line(" a\n b\x1b[1m\tc ") == "a b c"


# The demo


def demo_is_there() -> bool:
    from pydiffusion import demo

    try:
        demo.checkpoint_path()
    except FileNotFoundError:
        return False
    return True


needs_demo = pytest.mark.skipif(
    not demo_is_there(), reason="NOT CHECKED: pydiffusion demo; its checkpoint is not in this tree"
)


def test_demo_says_when_the_answer_is_wrong(
    checkpoint_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With random weights, which solve nothing, in place of the checkpoint."""
    from pydiffusion import demo
    from pydiffusion.demo import sudoku

    monkeypatch.setattr(demo, "checkpoint_path", lambda: checkpoint_folder("small"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["demo", "--puzzle", "3", "--steps", "2", "--seed", "1"]) == 0
    out, err = capsys.readouterr()
    puzzle, solution = demo.puzzles()[3]
    assert sudoku.as_rows(puzzle) in out
    assert out.endswith(f"Wrong. It should be:\n{sudoku.as_rows(solution)}\n")
    assert "held-out puzzle 3" in err and "converted" in err
    if sys.platform.startswith("linux"):
        assert len(list((tmp_path / "pydiffusion").glob("demo-q4_k_m-*.gguf"))) == 1
    assert main(["demo", "--task", "sort", "--steps", "2", "--seed", "1"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("sort: ") and "converted" not in err, "the second time it is in the cache"
    assert main(["demo", "--puzzle", str(len(demo.puzzles()))]) == 2


@needs_demo
@pytest.mark.parametrize("task", ["sudoku", "json"])
def test_demo_in_a_pipe(task: str, tmp_path: Path) -> None:
    from pydiffusion.demo import tasks

    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}

    def run() -> subprocess.CompletedProcess[str]:
        arguments = ["demo", "--task", task, "--seed", "1"]
        return subprocess.run(
            program(*arguments), capture_output=True, text=True, env=environment, check=True
        )

    first, second = run(), run()
    assert first.stdout == second.stdout
    prompt, answer, verdict = first.stdout.rstrip("\n").split("\n\n")
    assert verdict.startswith("Right." if tasks.check(task, prompt, answer) else "Wrong. It should be:\n")
    assert "converted" in first.stderr and "converted" not in second.stderr, (
        "the second run finds it in the cache"
    )
    assert "\x1b" not in first.stdout + first.stderr


@needs_demo
@needs_terminal
def test_demo_without_a_cache_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    seen, code = on_terminal(["demo", "--puzzle", "0"], env={"XDG_CACHE_HOME": str(tmp_path / "file")})
    assert code == 0 and "step 1 of" in seen and re.search(r"Right\.|Wrong\.", seen)
