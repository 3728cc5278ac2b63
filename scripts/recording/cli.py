"""Every command on the demo model: output, exit code, and the files that it writes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Literal

from .record import CHECKPOINT, Record, digest, program

COMMANDS = (
    "convert", "quantize", "split", "merge", "imatrix", "verify", "evaluate", "inspect", "generate",
    "infill", "batch", "chat", "demo", "bench", "devices", "doctor", "serve",
)  # fmt: skip
TEXT = "sort: c b a\nreverse: x y z\nadd: 12+34\nIn Oslo lives Ada, 33.\n" * 6
# How stdout is kept: a value, a value of JSON, or a text for people.
Kind = Literal["value", "json", "text"]


class Commands:
    """Runs commands in the recording's folder and keeps what they give."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.folder = record.folder

    def run(self, key: str, *arguments: str, out: Kind = "value", typed: str = "") -> str:
        done = program(*arguments, folder=self.folder, typed=typed)
        key = f"cli/{key}"
        self.record.value(f"{key}/exit", done.returncode)
        self.record.text(f"{key}/stderr", done.stderr)
        if out == "json" and done.returncode == 0:
            self.record.json(f"{key}/stdout", json.loads(done.stdout))
        elif out == "text":
            self.record.text(f"{key}/stdout", done.stdout)
        else:
            self.record.value(f"{key}/stdout", self.record.mask(done.stdout))
        return done.stdout

    def gguf(self, name: str) -> None:
        self.record.gguf(f"cli/files/{name}", self.folder / name)


def record(record: Record) -> None:
    commands = Commands(record)
    (record.folder / "text.txt").write_text(TEXT, encoding="utf-8")
    _help(commands)
    _files(commands)
    _judging(commands)
    _texts(commands)
    _chat(commands)
    _errors(commands)


def _help(commands: Commands) -> None:
    """The page is a text; that it has these options, a value."""
    for name in ("", *COMMANDS):
        arguments = [name] if name else []
        page = commands.run(f"help/{name or 'all'}", *arguments, "--help", out="text")
        flags = set()
        for line in page.splitlines():
            if re.match(r"\s+-", line):
                flags |= set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", line.partition("  " * 4)[0]))
        commands.record.value(f"cli/help/{name or 'all'}/options", sorted(flags))
    commands.run("version", "--version", out="text")


def _files(commands: Commands) -> None:
    run, source = commands.run, str(CHECKPOINT)
    for type in ("f32", "bf16", "q8_0", "q4_k_m"):
        run(f"convert-{type}", "convert", source, "-o", f"{type}.gguf", "--type", type, "--threads", "1",
            "--json", out="json")  # fmt: skip
        commands.gguf(f"{type}.gguf")
    run("convert-plain", "convert", source, "-o", "plain.gguf", "--type", "q8_0")
    for name, more in {
        "pad": ["--pad"],
        "no-pad": ["--no-pad"],
        "tensor-type": ["--tensor-type", "ffn_.*_exps=q8_0"],
    }.items():
        run(name, "convert", source, "-o", f"{name}.gguf", *more, "--json", out="json")
        commands.gguf(f"{name}.gguf")
    run("dry-run", "convert", source, "--dry-run", "--json", out="json")
    run("fit", "convert", source, "--dry-run", "--fit", "1G", "--json", out="json")
    run("fit-plain", "convert", source, "--dry-run", "--fit", "1G", out="text")
    run("quantize", "quantize", "f32.gguf", "q6_k.gguf", "--type", "q6_k", "--json", out="json")
    commands.gguf("q6_k.gguf")
    run("imatrix", "imatrix", "bf16.gguf", "text.txt", "-o", "imatrix.gguf", "--chunk", "64",
        "--max-chunks", "2", "--threads", "1")  # fmt: skip
    commands.gguf("imatrix.gguf")
    run("quantize-imatrix", "quantize", "f32.gguf", "weighed.gguf", "--type", "iq4_xs", "--imatrix",
        "imatrix.gguf", "--json", out="json")  # fmt: skip
    commands.gguf("weighed.gguf")
    run("split", "split", "q8_0.gguf", "parts.gguf", "--split-max-size", "2M", "--json", out="json")
    parts = sorted(path.name for path in commands.folder.glob("parts-*.gguf"))
    commands.record.value("cli/files/parts", parts)
    for part in parts:
        commands.gguf(part)
    run("merge", "merge", parts[0], "merged.gguf", "--json", out="json")
    commands.gguf("merged.gguf")


def _judging(commands: Commands) -> None:
    run = commands.run
    run("inspect", "inspect", "q4_k_m.gguf", "--tensors", out="text")
    run("inspect-json", "inspect", "q4_k_m.gguf", "--tensors", "--json", out="json")
    run("inspect-arrays", "inspect", "q4_k_m.gguf", "--arrays", "--json", out="json")
    run("inspect-parts", "inspect", "parts-00001-of-00003.gguf", "--json", out="json")
    run("verify", "verify", "q4_k_m.gguf", out="text")
    run("verify-folder", "verify", "q4_k_m.gguf", "--against", str(CHECKPOINT), "--json", out="json")
    run("verify-gguf", "verify", "q8_0.gguf", "--against", "f32.gguf", "--tensors", "--json", out="json")
    run("verify-text", "verify", "bf16.gguf", "--against", "f32.gguf", out="text")
    (commands.folder / "prompts.txt").write_text("sort: c b a\nadd: 12+34\n", encoding="utf-8")
    evaluation = ["evaluate", "q4_k_m.gguf", "q8_0.gguf", "--reference", "f32.gguf", "--prompts",
                  "prompts.txt", "--noise", "0.3", "-n", "48", "--steps", "4", "--threads", "1"]  # fmt: skip
    run("evaluate", *evaluation, "--json", out="json")
    run("evaluate-text", *evaluation, out="text")
    run("devices", "devices", out="text")
    run("devices-json", "devices", "--json", out="json")
    run("devices-plan", "devices", "-m", "q4_k_m.gguf", "--device", "host", "--json", out="json")
    _bench(commands)


def _bench(commands: Commands) -> None:
    """Figures vary: kept are the names of fields, and the counts."""
    done = program("bench", "-m", "q4_k_m.gguf", "--prompt", "16", "--steps", "2", "--threads", "1",
                   "--json", folder=commands.folder)  # fmt: skip
    figures = json.loads(done.stdout)
    counts = {key: value for key, value in figures.items() if key.startswith("n_")}
    commands.record.value("cli/bench/exit", done.returncode)
    commands.record.value("cli/bench/fields", sorted(figures))
    commands.record.value("cli/bench/parts", list(figures["parts"]))
    commands.record.value("cli/bench/counts", counts)
    commands.record.text("cli/bench/operations", "\n".join(sorted(figures["operation_seconds"])))


def _texts(commands: Commands) -> None:
    run = commands.run
    model = ["-m", "q4_k_m.gguf", "--threads", "1"]
    short = [*model, "--seed", "4", "--steps", "8", "-n", "40"]
    run("generate", "generate", *short, "-p", "sort: c b a")
    run("generate-raw", "generate", *short, "-p", "sort: c b a", "--raw")
    run("generate-json", "generate", *short, "-p", "add: 12+34", "--json", out="json")
    run("generate-stdin", "generate", *short, "-p", "-", "--json", out="json", typed="add: 12+34")
    run("generate-show", "generate", *short, "-p", "add: 12+34", "--show")
    run("generate-options", "generate", *model, "--seed", "5", "--steps", "6", "--t-min", "0.2", "--t-max",
        "0.9", "--entropy-bound", "0.4", "--stability-threshold", "2", "--confidence-threshold", "0.01",
        "--stop", "e", "--ctx", "256", "--cache-type", "f32", "-p", "reverse: a b e f", "--json",
        out="json")  # fmt: skip
    run("generate-trim", "generate", *short, "-p", "sort: c b a", "--trim-after-eos", "--json", out="json")
    run("generate-host", "generate", *short, "-p", "sort: c b a", "--device", "host", "--json", out="json")
    run(
        "generate-kernels", "generate", *short, "-p", "sort: c b a", "--kernels", "ggml", "--json", out="json"
    )
    run("generate-system", "generate", *short, "-p", "add: 1+2", "--system", "be brief")
    run("generate-no-bos", "generate", *short, "-p", "<bos><bos>x", "--raw", "--special")
    schema = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 9}}, "required": ["a"]}
    (commands.folder / "schema.json").write_text(json.dumps(schema), encoding="utf-8")
    run("generate-schema", "generate", *short, "-p", "json: x", "--json-schema", "schema.json")
    run("generate-regex", "generate", *short, "-p", "add: 12+34", "--regex", "[0-9]{2}(, [a-z]+)?")
    run("generate-q8-cache", "generate", *short, "-p", "add: 12+34", "--cache-type", "q8_0")
    run("demo", "demo", "--puzzle", "3", "--seed", "1", "--steps", "6", "--threads", "1")
    run("demo-task", "demo", "--task", "add", "--seed", "1", "--steps", "6", "--threads", "1")
    holes = "json: Ada is <|hole:3|> and lives in <|hole|>."
    (commands.folder / "holes.txt").write_text(holes, encoding="utf-8")
    sampler = ["--seed", "4", "--steps", "6"]
    run("infill", "infill", *model, *sampler, "holes.txt")
    run("infill-json", "infill", *model, *sampler, "--instruction", "facts", "--hole-tokens", "5", "--json",
        "holes.txt", out="json")  # fmt: skip
    run("infill-stdin", "infill", *model, *sampler, "-", typed="one <|hole:2|> three")
    _batch(commands, model)


def _batch(commands: Commands, model: list[str]) -> None:
    lines = [
        "sort: c b a",
        {"prompt": "add: 12+34", "id": "second", "seed": 9},
        {"messages": [{"role": "user", "content": "reverse: a b c"}], "steps": 3},
        {"prompt": "x", "nonsense": 1},
        {"prompt": "count: 1 to 20", "max_tokens": 96},
        [1],
    ]
    path = commands.folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    arguments = ["batch", "prompts.jsonl", *model, "-o", "answers.jsonl", "--seed", "4", "--steps", "5",
                 "-n", "48", "--parallel", "3"]  # fmt: skip
    for name in ("batch", "batch-again"):
        commands.run(name, *arguments)
    answers = [json.loads(line) for line in _read(commands, "answers.jsonl").splitlines()]
    commands.record.json("cli/batch/answers", answers)


def _chat(commands: Commands) -> None:
    arguments = ["chat", "-m", "q4_k_m.gguf", "--threads", "1", "--seed", "4", "--steps", "5", "-n", "40"]
    typed = (
        "sort: c b a\n/steps 3\n/seed 8\nadd: 12+34\n/retry\n/edit add: 21+34\n/save saved\n/reset\n/help\n"
        "/bogus\n/load saved\n\\\n\nand more\\\nof it\n/exit\nnever read\n"
    )
    commands.run("chat", *arguments, typed=typed)
    saved = sorted(path for path in commands.folder.glob("saved*") if path.is_file())
    commands.record.value("cli/chat/saved", {path.name: digest(path.read_bytes()) for path in saved})
    commands.run("chat-system", *arguments, "--system", "be brief", typed="reverse: a b c\n")


def _read(commands: Commands, name: str) -> str:
    return (commands.folder / name).read_text(encoding="utf-8")


def _errors(commands: Commands) -> None:
    folder = commands.folder
    whole = (folder / "q8_0.gguf").read_bytes()
    (folder / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    (folder / "text.gguf").write_text("no model at all", encoding="utf-8")
    (folder / "nan.gguf").write_bytes(whole[:-64] + b"\xff" * 64)
    (folder / "empty").mkdir()
    (folder / "bad.json").write_text("{", encoding="utf-8")
    (folder / "never.json").write_text('{"type": "string", "minLength": 3, "maxLength": 2}', encoding="utf-8")
    ask = ["generate", "-p", "x", "--seed", "1", "--steps", "2", "--threads", "1", "-m"]
    for name, arguments in {
        "none": ["inspect", "none.gguf"],
        "cut": ["inspect", "cut.gguf"],
        "against-none": ["verify", "q8_0.gguf", "--against", "none.gguf"],
        "text": ["inspect", "text.gguf"],
        "open-none": [*ask, "none.gguf"],
        "open-folder": [*ask, "empty"],
        "open-cut": [*ask, "cut.gguf"],
        "open-text": [*ask, "text.gguf"],
        "open-imatrix": [*ask, "imatrix.gguf"],
        "open-second-part": [*ask, "parts-00002-of-00003.gguf"],
        "verify-nan": ["verify", "nan.gguf"],
        "verify-other": ["verify", "q6_k.gguf", "--against", "imatrix.gguf"],
        "command": ["bogus"],
        "option": [*ask, "f32.gguf", "--nonsense"],
        "no-model": ["generate", "-p", "x"],
        "steps": [*ask, "f32.gguf", "--steps", "0"],
        "temperatures": [*ask, "f32.gguf", "--t-min", "2", "--t-max", "1"],
        "threads": [*ask, "f32.gguf", "--threads", "0"],
        "ctx": [*ask, "f32.gguf", "--ctx", "100000"],
        "kernels": [*ask, "f32.gguf", "--kernels", "fast"],
        "device": [*ask, "f32.gguf", "--device", "CUDA7"],
        "cache-type": [*ask, "f32.gguf", "--cache-type", "q3"],
        "long-prompt": [*ask, "f32.gguf", "-p", "word " * 3000],
        "schema": [*ask, "f32.gguf", "--json-schema", "bad.json"],
        "schema-never": [*ask, "f32.gguf", "--json-schema", "never.json"],
        "regex": [*ask, "f32.gguf", "--regex", "(a"],
        "both": [*ask, "f32.gguf", "--regex", "a", "--json-schema", "schema.json"],
        "type": ["convert", str(CHECKPOINT), "--type", "q3"],
        "convert-none": ["convert", "none", "-o", "out.gguf"],
        "convert-empty": ["convert", "empty", "-o", "out.gguf"],
        "convert-mmproj": ["convert", str(CHECKPOINT), "-o", "out.gguf", "--mmproj"],
        "overwrite": ["quantize", "f32.gguf", "q8_0.gguf", "--no-overwrite"],
        "quantize-itself": ["quantize", "f32.gguf", "f32.gguf"],
        "quantize-text": ["quantize", "text.gguf", "out.gguf"],
        "split-size": ["split", "f32.gguf", "out.gguf", "--split-max-size", "none"],
        "merge-second": ["merge", "parts-00002-of-00003.gguf", "out.gguf"],
        "no-hole": ["infill", "-m", "f32.gguf", "text.txt"],
        "batch-none": ["batch", "none.jsonl", "-m", "f32.gguf", "-o", "out.jsonl"],
        "task": ["demo", "--task", "cooking"],
        "puzzle": ["demo", "--puzzle", "-1"],
        "serve-none": ["serve", "-m", "none.gguf"],
        "bench-both": ["bench"],
    }.items():
        commands.run(f"error/{name}", *arguments, out="text")
    left = sorted(path.name for path in Path(folder).glob("out*"))
    commands.record.value("cli/error/files", left)
