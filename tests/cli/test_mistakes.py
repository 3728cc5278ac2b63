"""Plausible mistakes of a newcomer: each ends with the documented exit code and words that say what to do."""

from __future__ import annotations

import io
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from pydiffusion.cli import main

GEN = "generate -m model.gguf -p x"
# What is typed -> what is said. {none}: no such file.
USAGE = {  # exit code 2
    # no or unknown commands, options before one
    "generate": "give a model: -m FILE",
    "chat": "give a model",
    "run": "give a model",
    "infill -m model.gguf": "FILE",
    "batch -m model.gguf": "PROMPTS",
    "serve": "--model",
    "bench": "give either --model or --synthetic",
    "split model.gguf": "OUT",
    "merge model.gguf": "OUT",
    "quantize model.gguf": "give OUT, the file to write, or TYPE",
    "convert": "Missing argument",
    "evaluate model.gguf": "--reference",
    "imatrix model.gguf": "Missing argument",
    "pull": "MODEL",
    "pull {none}.gguf": "is no repo; give OWNER/NAME",
    "frobnicate": "commands are",
    "generte": "did you mean generate?",
    "Chat": "did you mean chat?",
    "convert-hf-to-gguf": "did you mean convert",
    "model.gguf": "pydiffusion run model.gguf chats",
    "model.gguf hello": "pydiffusion run model.gguf TEXT answers",
    "./model.gguf": "pydiffusion run ./model.gguf",
    "-m model.gguf -p hi": "A command comes first",
    "-p hi": "A command comes first",
    "-v": "--version prints the version",
    "-V": "--version prints the version",
    "--vers": "--version",
    "--verbose": "--version",
    "rm model.gguf": "files are yours to delete",
    "ps": "no model stays loaded",
    "create mymodel -f Modelfile": "pydiffusion convert or quantize makes a GGUF",
    "push org/name": "hf upload",
    "perplexity -m model.gguf -f t.txt": "pydiffusion evaluate",
    "embedding -m model.gguf": "embeddings are not available",
    # options of ours, wrongly
    f"{GEN} --stesp 3": "--steps",
    f"{GEN} --max-token 3": "--max-tokens",
    f"{GEN} --json-shema x": "--json-schema",
    f"{GEN} --nonsense": "--nonsense",
    f"{GEN} -z": "-z",
    f"{GEN} -n 0": "max_tokens",
    f"{GEN} -n -2": "max_tokens",
    f"{GEN} -n 1.5": "--max-tokens",
    f"{GEN} -n lots": "--max-tokens",
    f"{GEN} -n ''": "--max-tokens",
    f"{GEN} -n": "argument",
    f"{GEN} --steps 0": "steps is 0",
    f"{GEN} --steps -5": "steps is -5",
    f"{GEN} --steps": "argument",
    f"{GEN} --seed -2": "seed is -2",
    f"{GEN} --seed x": "--seed",
    f"{GEN} -s 1e3": "--seed",
    f"{GEN} -s 99999999999999999999": "seed is",
    f"{GEN} --temp -1": "temperature is -1",
    f"{GEN} --temp nan": "temperature",
    f"{GEN} --temp hot": "--temp",
    f"{GEN} --temp 1000": "temperature is 1000",
    f"{GEN} --t-min 2 --t-max 1": "t_min",
    f"{GEN} --entropy-bound -1": "entropy_bound",
    f"{GEN} -c 0": "--ctx is 0",
    f"{GEN} -c -1": "--ctx is -1",
    f"{GEN} -c 4k": "--ctx",
    f"{GEN} -t 0": "--threads is 0",
    f"{GEN} -t all": "--threads",
    f"{GEN} -ngl some": "permitted is auto, all or",
    f"{GEN} -ngl -1": "--gpu-layers is -1",
    f"{GEN} --device gpu": "no device 'gpu'",
    f"{GEN} --device CUDA7": "no device 'CUDA7'",
    f"{GEN} --kernels fast": "--kernels is fast",
    f"{GEN} --cache-type q4_0": "--cache-type is q4_0",
    f"{GEN} --gpu-memory lots": "is not a size",
    f"{GEN} --stop ''": "stop holds ''",
    f"{GEN} --json=true": "--json",
    f"{GEN} --show=yes": "--show",
    f"{GEN} --raw --system hi": "--system needs --chat",
    f"{GEN} --raw --chat-template diffusion-gemma": "--chat-template needs --chat",
    f"{GEN} --thinking-budget -1": "thinking_budget",
    # constraints, before the (missing) model is loaded
    "generate -m {none} -p x --regex '['": "is not a valid regular expression",
    "generate -m {none} -p x --regex '(a'": "is not a valid regular expression",
    "generate -m {none} -p x --regex ''": "regex is ''",
    "generate -m {none} -p x --regex 'b(?=a)c'": "regex",
    "generate -m {none} -p x -j '{{'": "json_schema is not valid JSON",
    "generate -m {none} -p x -j '{{type: object}}'": "json_schema is not valid JSON",
    """generate -m {none} -p x -j '{{"type": "foo"}}'""": "the type 'foo' is invalid",
    """generate -m {none} -p x --regex a -j '{{"type": "string"}}'""": "exclude each other",
    "chat -m {none} --steps 0": "steps is 0",
    "infill -m {none} text.txt --steps 0": "steps is 0",
    # prompts
    "generate -m model.gguf -p ''": "the prompt is empty",
    "generate -m model.gguf -p '  '": "the prompt is empty",
    "generate -m model.gguf ''": "the prompt is empty",
    "run model.gguf ''": "the prompt is empty",
    "generate -m model.gguf -p a -p b": "the prompt is given twice",
    "generate -m model.gguf -p a b": "the prompt is given twice",
    "generate -m model.gguf -p a -f text.txt": "the prompt is given twice",
    "generate -p": "argument",
    "generate -m model.gguf -p '\udcff'": "the prompt is not valid UTF-8",
    f"{GEN} --system '\udcff'": "--system is not valid UTF-8",
    "chat model.gguf hello": "chat asks for messages; for one answer: pydiffusion run",
    "chat -m model.gguf -p hello": "pydiffusion generate takes a prompt",
    "generate -m model.gguf -i": "pydiffusion chat",
    "generate -m model.gguf -cnv": "pydiffusion chat",
    # flags of other programs that mean nothing here
    f"{GEN} --top-k 40": "--top-k: a diffusion sampler",
    f"{GEN} --top-p 0.9": "--top-p: a diffusion sampler",
    f"{GEN} --min-p=0.05": "--min-p: a diffusion sampler",
    f"{GEN} --repeat-penalty 1.1": "--stop-on-repetition",
    f"{GEN} --mirostat 2": "--mirostat",
    f"{GEN} -ctk q8_0": "--cache-type",
    f"{GEN} --kv-cache-dtype fp8": "--cache-type",
    f"{GEN} --lora x.gguf": "adapters are not supported",
    f"{GEN} -md draft.gguf": "speculative decoding",
    f"{GEN} --raw --image x.png": "--image needs --chat",
    f"{GEN} --no-mmproj": "--mmproj none",
    f"{GEN} -mmu http://x/y.gguf": "download it first",
    f"{GEN} --audio x.wav": "audio is not read",
    "infill -m model.gguf text.txt --image x.png": "this command has no --image",
    "serve -m model.gguf --media-path x": "clients send their images",
    f"{GEN} -ts 3,1": "--device CUDA0,CUDA1",
    f"{GEN} --rope-scaling yarn": "positions are as the file says",
    f"{GEN} --format json": "--json-schema",
    f"{GEN} --think": "--thinking-budget",
    f"{GEN} --logprobs 5": "log probabilities",
    f"{GEN} --ignore-eos": "a text ends at its eos",
    f"{GEN} -e": "escapes are the shell's",
    f"{GEN} -hft token": "HF_TOKEN",
    f"{GEN} -mu http://x/y.gguf": "-m OWNER/NAME",
    f"{GEN} --prompt-cache x": "Session.save",
    f"{GEN} --parallel 4": "--parallel",
    "serve -m model.gguf --alias x": "the model's own name",
    "serve -m model.gguf --temp 0.7": "requests set it",
    "serve -m model.gguf -n 100": "requests set max_tokens",
    "serve -m model.gguf --embedding": "embeddings are not available",
    "serve -m model.gguf --port 99999": "--port",
    "serve -m model.gguf --port http": "--port",
    "serve -m model.gguf -np 0": "--parallel",
    "serve -m model.gguf --tensor-parallel-size 2": "see --device",
    "serve -m model.gguf --gpu-memory-utilization 0.9": "--gpu-memory 20GiB",
    "quantize model.gguf out.gguf Q4_K_M --pure": "--tensor-type",
    "quantize model.gguf -o out.gguf": "the second argument",
    "quantize model.gguf out.gguf Q9_9": "permitted are",
    "quantize model.gguf out.gguf 99": "permitted are",
    "quantize model.gguf out.gguf Q8_0 --type q8_0": "given twice",
    "quantize model.gguf out.gguf Q8_0 two": "THREADS",
    "quantize model.gguf out/": "no file; give the name of the file to write",
    "quantize model.gguf ''": "no file",
    "convert folder -o a.gguf b.gguf": "given twice",
    "convert folder -o out/": "no file",
    "convert folder --outtype q3": "permitted are",
    "convert folder --model-name x": "the first argument",
    "convert folder --fit much": "--fit",
    "convert folder --tensor-type x": "PATTERN=TYPE",
    "split model.gguf out.gguf": "--split-max-size",
    "split model.gguf out.gguf --split-max-size big": "--split-max-size",
    "split model.gguf out.gguf --split-max-tensors 10": "--split-max-size 5G",
    "split model.gguf nofolder/ --split-max-size 1M": "no file",
    "imatrix model.gguf -f text.txt -o x": "the second argument",
    "imatrix model.gguf text.txt": "--output",
    "imatrix model.gguf text.txt -o x --chunk 0": "at least 1",
    "evaluate model.gguf --reference model.gguf --noise 2": "--noise",
    "evaluate model.gguf --reference model.gguf --plot x.bmp": "should end with",
    "bench -m model.gguf -n 128": "denoising steps are timed",
    "bench -m model.gguf --synthetic tiny": "give either",
    "bench --synthetic huge": "known are",
    "bench -m model.gguf --compare fast": "neither a file nor settings",
    "demo --task cooking": "permitted are",
    "demo --puzzle 99999": "permitted is",
    "demo --task sort --puzzle 1": "--puzzle goes with",
    "doctor model.gguf --reference {none}": "is not a folder",
    "inspect": "Missing argument",
    "inspect model.gguf --tensor": "--tensors",
}
FAILS = {  # exit code 1
    "generate -m {none} -p x": "there is no such file",
    "generate -m folder -p x": "folder is a folder",
    "generate -m . -p x": "model.gguf: give the file",
    "generate -m text.txt -p x": "GGUF",
    "generate -m empty.gguf -p x": "empty",
    "generate -m '~nobody/x.gguf' -p x": "there is no such file",
    "generate -m '~/x.gguf' -p x": "x.gguf: there is no such file",
    "generate -m 'model.gguf ' -p x": "without the blanks",
    "generate -m model -p x": "did you mean model.gguf?",
    "generate -m Model.gguf -p x": "did you mean model.gguf?",
    "generate -m model.ggfu -p x": "did you mean model.gguf?",
    "generate -m models/model.gguf -p x": "there is no folder models",
    "generate -m 'C:\\models\\x.gguf' -p x": "Windows path",
    "run llama3.2:3b hi": "Ollama's library",
    "run nowhere.gguf hi": "there is no such file",
    "chat -m {none}": "there is no such file",
    "infill -m {none} text.txt": "there is no such file",
    "serve -m {none} --port 0": "there is no such file",
    "bench -m {none}": "there is no such file",
    "devices -m {none}": "there is no such file",
    "doctor {none}": "there is no such file",
    "inspect {none}": "there is no such file",
    "inspect text.txt": "GGUF",
    "show {none}": "there is no such file",
    "verify {none}": "no such file",
    "verify folder": "folder",
    "evaluate {none} --reference model.gguf": "there is no such file",
    "imatrix {none} text.txt -o x": "no such file",
    "imatrix model.gguf {none} -o x": "No such file",
    "imatrix model.gguf text.txt -o nofolder/x": "no such folder; make it first",
    "imatrix model.gguf latin.txt -o x": "not valid UTF-8 at byte 1",
    "quantize {none} out.gguf": "no such file",
    "quantize model.gguf nofolder/out.gguf": "no such folder; make it first",
    "quantize model.gguf folder": "is a folder; give the name of the file",
    "quantize model.gguf model.gguf Q8_0": "one of the files being read",
    "quantize model.gguf text.txt Q8_0 --no-overwrite": "already exists",
    "merge {none} out.gguf": "no such file",
    "merge model.gguf folder": "is a folder",
    "split model.gguf nofolder/out.gguf --split-max-size 1M": "no such folder; make it first",
    "split model.gguf folder --split-max-size 1K": "is a folder; give the name",
    "split model.gguf . --split-max-size 1K": "is a folder; give the name",
    "convert {none}": "no such",
    "convert folder": "config.json",
    "convert model.gguf": "pydiffusion quantize",
    "generate -m model.gguf -f {none}": "No such file",
    "generate -m model.gguf -f folder": "Is a directory",
    "generate -m model.gguf -f latin.txt": "not valid UTF-8 at byte 1",
    "generate -m model.gguf -f utf16.txt": "is UTF-16, as PowerShell writes",
    "generate -m model.gguf -f nul.txt": "is UTF-16",
    "generate -m model.gguf -f blank.txt": "is empty; it should be the prompt",
    "generate -m model.gguf": "standard input is empty",
    "generate -m model.gguf -p -": "standard input is empty",
    f"{GEN} -j {{none}}.json": "No such file",
    f"{GEN} -j folder": "Is a directory",
    f"{GEN} -j utf16.txt": "is UTF-16",
    f"{GEN} --chat-template nope": "nor a built-in template",
    f"{GEN} -c 9999999": "",
    "infill -m model.gguf {none}": "No such file",
    "infill -m model.gguf text.txt": "the text has no hole",
    "doctor model.gguf -o nofolder/x.md": "no such folder",
    "evaluate model.gguf --reference model.gguf --plot nofolder/x.svg": "no such folder",
    "batch {none} -m model.gguf -o out.jsonl": "No such file",
    "chat -m model.gguf --continue": "no saved conversation",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, gguf_file: Callable[..., Path]) -> Path:
    """A folder with a model and other files."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "model.gguf").symlink_to(gguf_file("tiny", "q8_0"))
    (folder / "folder").mkdir()
    contents = {"text.txt": b"plain text", "empty.gguf": b"", "latin.txt": b"f\xfcr", "blank.txt": b" \n"}
    contents |= {"utf16.txt": "für".encode("utf-16"), "nul.txt": "hello".encode("utf-16-le")}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize(
    ("typed", "said", "expected"),
    [(typed, said, code) for table, code in ((USAGE, 2), (FAILS, 1)) for typed, said in table.items()],
)
def test_mistakes(
    typed: str, said: str, expected: int, place: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(place)
    monkeypatch.setenv("XDG_STATE_HOME", str(place / "state"))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))
    before = sorted(place.iterdir())
    typed = typed.format(none="nowhere") if "{" in typed else typed
    code = main(shlex.split(typed))
    out, err = capsys.readouterr()
    assert (code, out) == (expected, ""), err
    assert said in " ".join(err.split())
    assert "Traceback" not in err and "PYDIFFUSION_DEBUG" not in err
    assert sorted(place.iterdir()) == before, "nothing is written"


def test_there_are_two_hundred() -> None:
    assert len(USAGE) + len(FAILS) >= 200
