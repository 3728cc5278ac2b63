"""The library on the demo model: logits, tokens, generations, sessions, the sampler."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

import pydiffusion
from pydiffusion import CanvasEvent, DiffusionModel, DraftEvent, EndEvent, GenerationOptions, sampling
from pydiffusion.convert import TYPES, convert, plan_sizes, quantize

from .record import CHECKPOINT, Record, demo_model, digest

PROMPTS = ("sort: c b a", "reverse: x y z", "count: 1 to 30", "In Oslo lives Ada, 33.", "für 🙂 <|turn>")
SHORT = {"max_tokens": 96, "steps": 6, "seed": 11}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
}


def record(record: Record) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _record(record)
    # A warning has to point at the line that called pydiffusion, here that of this file.
    places = [[warning.category.__name__, Path(warning.filename).name] for warning in caught]
    record.value("library/warnings", places)
    record.text("library/warnings", "\n".join(sorted({str(warning.message) for warning in caught})))


def _record(record: Record) -> None:
    _conversions(record)
    _logits(record)
    with DiffusionModel(demo_model(record, "q4_k_m"), n_threads=1) as model:
        _model(record, model)
        _generations(record, model)
        _batches(record, model)
        _sessions(record, model)
        _completions(record, model)
        _wrong_arguments(record, model)
    _sampler(record)


def _conversions(record: Record) -> None:
    """Every type, from the checkpoint; some from F32."""
    for type in sorted(TYPES):
        key, target = f"library/convert/{type}", record.folder / f"demo-{type}.gguf"
        report = record.attempt(
            key, lambda type=type, target=target: convert(CHECKPOINT, target, type, n_threads=1)
        )
        if report is not None:  # types of few bits need an imatrix
            record.value(f"{key}/report", _counts(report))
            record.gguf(key, target)
    for type in ("q5_k_m", "iq4_xs"):
        target = record.folder / f"requantized-{type}.gguf"
        quantize(demo_model(record, "f32"), target, type, n_threads=1)
        record.gguf(f"library/quantize/{type}", target)
    record.value("library/plan_sizes", record.mask(repr(plan_sizes(CHECKPOINT))))


def _counts(report: Any) -> dict[str, int]:
    return {name: value for name, value in vars(report).items() if isinstance(value, int)}


def _logits(record: Record) -> None:
    """After prefill and over denoising steps, by type of the weights, kernels, device and cache."""
    for type in ("f32", "bf16", "q4_k_m", "q8_0"):
        for kernels in ("ggml", "avx512-bf16", "amx"):
            for device in ("cpu", "host"):
                key = f"library/logits/{type}/{kernels}/{device}"
                model = record.attempt(
                    key,
                    lambda type=type, kernels=kernels, device=device: DiffusionModel(
                        demo_model(record, type), n_threads=1, kernels=kernels, device=device
                    ),
                )
                if model is not None:
                    _steps(record, key, model)
                    model.close()
    for kv_type in ("f32", "f16", "q8_0"):
        with DiffusionModel(demo_model(record, "f32"), n_threads=2, kv_type=kv_type) as model:
            _steps(record, f"library/logits/cache-{kv_type}", model)


def _steps(record: Record, key: str, model: DiffusionModel) -> None:
    record.text(f"{key}/description", repr(model.description))
    session = model.new_session()
    hidden = session.encode(model.tokenize(PROMPTS[2] * 8), return_hidden=True)
    digests = [digest(hidden)]
    canvas = np.arange(model.canvas_length) * 7 % model.n_vocab
    conditioning = None
    for _ in range(3):
        logits = session.denoise(canvas, conditioning)
        digests.append(digest(logits))
        conditioning, canvas = logits / 0.7, logits.argmax(axis=1)
    session.encode(canvas)
    digests.append(digest(session.denoise(canvas)))
    record.value(f"{key}/digests", digests)
    record.value(f"{key}/n_ops", sum(session.step_ops.values()))
    record.text(f"{key}/ops", "\n".join(f"{name} {n}" for name, n in sorted(session.step_ops.items())))


def _model(record: Record, model: DiffusionModel) -> None:
    record.value("library/model/metadata", digest(repr(list(model.metadata.items()))))
    record.value("library/model/hparams", json.loads(json.dumps(model.hparams, default=repr)))
    for name in (
        "n_vocab",
        "canvas_length",
        "n_ctx",
        "n_ctx_train",
        "n_threads",
        "name",
        "has_chat_template",
    ):
        record.value(f"library/model/{name}", getattr(model, name))
    record.value("library/model/repr", record.mask(repr(model)))
    record.value("library/model/ends", [repr(end) for end in model.tokenizer.end_tokens])
    record.text("library/plan", repr(pydiffusion.plan(model.path, device="host")))
    record.value("library/devices", [repr(device) for device in pydiffusion.devices()])
    for i, text in enumerate(PROMPTS):
        ids = [model.tokenize(text), model.tokenize(text, add_bos=False, parse_special=True)]
        record.value(f"library/tokens/{i}", ids)
        record.value(f"library/texts/{i}", [model.detokenize(each, keep_control=True) for each in ids])
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "add: 1+2 <|turn>model"}]},
        {"role": "assistant", "content": "3"},
        {"role": "user", "content": "add: 2+2"},
    ]
    record.value("library/chat_prompt", model.chat_prompt(messages))
    record.value("library/chat_prompt/open", model.chat_prompt(messages, add_generation_prompt=False))
    resolved = model.resolve(GenerationOptions(seed=1))
    record.value("library/resolved", {name: repr(value) for name, value in vars(resolved).items()})


def _events(record: Record, key: str, events: Any) -> None:
    found = []
    for event in events:
        if isinstance(event, DraftEvent):
            arrays = [digest(each)[:16] for each in (event.tokens, event.entropy, event.accepted)]
            found.append(["draft", event.step, event.canvas_index, event.steps, *arrays, event.text])
        elif isinstance(event, CanvasEvent):
            found.append(["canvas", event.steps, event.canvas_index, event.tokens.tolist(), event.text])
            found[-1].append([repr(part) for part in event.parts])
        elif isinstance(event, EndEvent):
            found.append(["end", event.reason, event.seed, sorted(event.timings)])
    record.value(key, found)


def _completion(done: Any) -> dict[str, Any]:
    names = ("text", "steps", "finish_reason", "seed", "n_prompt", "canvas_steps")
    return {"tokens": done.tokens.tolist()} | {name: getattr(done, name) for name in names}


def _generations(record: Record, model: DiffusionModel) -> None:
    cases: dict[str, Mapping[str, Any]] = {
        "plain": {},
        "long": {"max_tokens": 200},
        "sampler": {"t_min": 0.1, "t_max": 1.2, "entropy_bound": 0.5, "stability_threshold": 0},
        "conditioned": {"dropped_mass": 0.0},
        "dropped": {"dropped_mass": 0.2},
        "short-canvas": {"canvas_length": 16},
        "stop": {"stop": ["b", "1 2"]},
        "no-eos": {"eos": ()},
        "trim": {"trim_after_eos": True, "steps": 12},
        "repetition": {"stop_on_repetition": True, "max_tokens": 900, "eos": (), "steps": 2},
        "thinking": {"thinking_budget": 5},
        "held": {"canvas": [5, 6, -1, 7, None, 8], "hold": [1, 0, 0, 1, 0, 1]},
        "schema": {"json_schema": SCHEMA},
        "regex": {"regex": "([0-9]+ ){1,4}(a|b)"},
    }
    for name, options in cases.items():
        done = model.generate(PROMPTS[2], **{**SHORT, **options})
        record.value(f"library/generate/{name}", _completion(done))
    for kernels in ("ggml", "avx512-bf16"):
        for device in ("cpu", "host"):
            key = f"library/generate/{kernels}-{device}"
            opened = record.attempt(
                key,
                lambda kernels=kernels, device=device: DiffusionModel(
                    model.path, n_threads=2, kernels=kernels, device=device
                ),
            )
            if opened is not None:
                record.value(key, _completion(opened.generate(PROMPTS[0], **SHORT)))
    _events(record, "library/stream", model.stream(PROMPTS[1], **SHORT))
    thought = model.chat_prompt([{"role": "user", "content": "x"}])
    thought += model.tokenize("<|channel>thought\n", add_bos=False, parse_special=True)
    budgets = {"chat": {}, "budget": {"thinking_budget": 6}, "no-thought": {"thinking_budget": 0}}
    for name, options in budgets.items():
        session = model.new_session()
        session.prefill(thought)
        _events(record, f"library/generate_chat/{name}", session.generate_chat(**{**SHORT, **options}))
    filled = model.infill("json: <|hole:3|> is <|hole|> and", **{"steps": 6, "seed": 11})
    record.value("library/infill", [filled.text, filled.holes, _completion(filled.completion)])
    filled = model.infill("<|hole:3|> is <|hole|>", instruction="json: x", hole_tokens=4, steps=6, seed=11)
    record.value("library/infill/instruction", [filled.text, filled.holes, _completion(filled.completion)])
    edited = model.edit("sort: c b a, then d", [(6, 11), (13, 17)], steps=6, seed=11)
    record.value("library/edit", [edited.text, edited.holes, _completion(edited.completion)])


def _batches(record: Record, model: DiffusionModel) -> None:
    many = [*PROMPTS, "x " * 3000, "add: 12+34", [2, 5, 6]]
    for n_parallel in (1, 3):
        outcomes = {}
        for index, done in model.generate_batch(many, n_parallel=n_parallel, **SHORT):
            failed = isinstance(done, Exception)
            outcomes[index] = type(done).__name__ if failed else _completion(done)
        record.value(f"library/batch/{n_parallel}", [outcomes[index] for index in sorted(outcomes)])
    each = [GenerationOptions(**{**SHORT, "seed": i, "steps": 2 + i}) for i in range(3)]
    each += [GenerationOptions(**SHORT, regex="[a-z]{3}"), GenerationOptions(**SHORT, trim_after_eos=True)]
    mixed = model.generate_batch(PROMPTS, each, n_parallel=5)
    record.value("library/batch/mixed", [[index, _completion(done)] for index, done in mixed])


def _sessions(record: Record, model: DiffusionModel) -> None:
    ids = model.tokenize(PROMPTS[2] * 10)
    canvas = np.arange(model.canvas_length) % model.n_vocab

    def state(key: str, session: Any) -> None:
        record.value(
            f"library/session/{key}",
            [session.n_past, session.n_ctx, session.n_encoded, session.tokens.tolist(),
             digest(session.denoise(canvas))],
        )  # fmt: skip

    session = model.new_session(512)
    session.encode(ids)
    state("encoded", session)
    session.save(record.folder / "session")
    with safe_open(record.folder / "session", framework="numpy") as file:  # in no order of its own
        arrays = {name: digest(file.get_tensor(name)) for name in sorted(file.keys())}
        record.value("library/session/file", [dict(sorted(file.metadata().items())), arrays])
    record.value("library/session/kept", session.prefill([*ids[:40], *ids[:20]]))
    state("prefilled", session)
    session.truncate(30)
    state("truncated", session)
    fork = session.fork()
    fork.encode(ids[:8])
    state("forked", fork)
    state("not-forked", session)
    restored = model.load_session(record.folder / "session", 640)
    state("restored", restored)
    record.value("library/session/after", _completion(restored.complete(**SHORT)))
    record.value("library/session/again", _completion(restored.complete(**SHORT)))
    state("generated", restored)
    restored.truncate(len(ids))
    state("taken-back", restored)


def _completions(record: Record, model: DiffusionModel) -> None:
    ask = [{"role": "user", "content": PROMPTS[0]}]
    record.json("library/completion", model.create_completion(PROMPTS[0], echo=True, **SHORT))
    record.json("library/completion/stream", list(model.create_completion(PROMPTS[0], stream=True, **SHORT)))
    record.json("library/chat", model.create_chat_completion(ask, **SHORT))
    record.json("library/chat/stream", list(model.create_chat_completion(ask, stream=True, **SHORT)))
    format = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    record.json("library/chat/schema", model.create_chat_completion(ask, response_format=format, **SHORT))


def _wrong_arguments(record: Record, model: DiffusionModel) -> None:
    def options(**keywords: Any) -> Any:
        return lambda: GenerationOptions(**keywords)

    def opened(**keywords: Any) -> Any:
        return lambda: DiffusionModel(**({"path": model.path, "n_threads": 1} | keywords))

    session = model.new_session(128)
    session.encode([2, 5, 6])
    for name, action in {
        "steps": options(steps=0),
        "steps-type": options(steps="many"),
        "unknown": options(temperature=1),
        "temperatures": options(t_min=2.0, t_max=1.0),
        "hold": options(hold=[True]),
        "schema": options(json_schema="{"),
        "both": options(json_schema={}, regex="a"),
        "stop": options(stop=""),
        "threads": opened(n_threads=0),
        "ctx": opened(n_ctx=7),
        "kv": opened(kv_type="q3"),
        "kernels": opened(kernels="fast"),
        "device": opened(device="CUDA9"),
        "gpu-memory": opened(gpu_memory="x"),
        "none": opened(path="none.gguf"),
        "small-host": opened(device="host", gpu_memory=1000),
        "empty-prompt": lambda: model.generate([]),
        "token": lambda: session.encode([10**6]),
        "token-type": lambda: session.encode([0.5]),
        "canvas": lambda: session.denoise([1, 2]),
        "conditioning": lambda: session.denoise([1] * model.canvas_length, np.zeros((2, 2))),
        "truncate": lambda: session.truncate(99),
        "overflow": lambda: session.encode([5] * 400),
        "load": lambda: model.load_session(CHECKPOINT / "config.json"),
        "regex": lambda: model.generate("x", regex="(a", **SHORT),
        "backreference": lambda: model.generate("x", regex=r"(a)\1", **SHORT),
        "never": lambda: model.generate("x", json_schema={"minLength": 2, "maxLength": 1, "type": "string"}),
        "no-room": lambda: model.generate("x", regex="a{500}", max_tokens=10),
        "no-hole": lambda: model.infill("no hole"),
        "messages": lambda: model.chat_prompt([{"role": 3}]),
        "parameter": lambda: model.create_completion("x", temperature=1.0),
        "parallel": lambda: list(model.generate_batch(["x"], n_parallel=0)),
    }.items():
        record.attempt(f"library/wrong/{name}", action)
    session.cancel()
    record.attempt("library/wrong/cancelled", lambda: session.denoise([1] * model.canvas_length))


def _sampler(record: Record) -> None:
    rng = np.random.default_rng(3)
    logits = rng.normal(0, 4, (24, 300)).astype(np.float32)
    u, tokens = sampling.draws(2**63 + 5, 2, 7, 24, 300)
    record.value("library/sampler/draws", [digest(u), tokens.tolist()])
    for temperature in (0.3, 1.0, 4.0):
        found = sampling.measure(logits, temperature, u)
        record.value(f"library/sampler/measure/{temperature}", [digest(array) for array in found])
        accepted = [sampling.accept(found[1], bound).tolist() for bound in (0.0, 0.5, 20.0)]
        record.value(f"library/sampler/accept/{temperature}", accepted)
    temperatures = [sampling.temperature(step, 12, 0.4, 0.8) for step in range(1, 13)]
    record.value("library/sampler/temperature", temperatures)
    record.attempt("library/sampler/step", lambda: sampling.temperature(0, 4, 0.4, 0.8))
    record.attempt("library/sampler/shape", lambda: sampling.measure(logits, 1.0, u[:3]))
