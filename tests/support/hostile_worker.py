"""Open suspect files in a process of its own, so that a crash fails one case only.

Reads one JSON object per line ({"path": ..., "call": name or null}), answers with one line: {"ok": true, ...}
or the classes and message of what was raised. ``call`` names a function of ``CALLS``; without one the file is
loaded, a prompt encoded and a canvas denoised.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress

import numpy as np

from pydiffusion import DiffusionModel, _native, sampling
from pydiffusion._util.sampler_options import ENTROPY_BOUND_DEFAULTS
from pydiffusion.errors import PyDiffusionError

N_CTX = 48


def ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def run(path: str) -> dict[str, object]:
    """Load and use a file; any result will do."""
    model = _native.Model(path, n_threads=1)
    session = _native.Session(model, min(N_CTX, model.n_ctx_train))
    session.encode(ids(2, 1, 0))
    logits = session.denoise(np.zeros(model.canvas_length, dtype=np.int32), None)
    return {"shape": list(logits.shape)}


def generate(session: _native.Session, **changed: object) -> None:
    options: dict[str, object] = {
        **ENTROPY_BOUND_DEFAULTS,
        "max_tokens": 4,
        "steps": 2,
        "seed": 0,
        "eos": [1],
    }
    session.begin(**options | changed)
    while session.next_step() is not None:
        pass


def with_session(use: Callable[[_native.Model, _native.Session], object]) -> Callable[[str], None]:
    """A call on a session that has read three tokens, and that must still work afterwards."""

    def call(path: str) -> None:
        model = _native.Model(path, n_threads=1, kv_type="f32")
        session = _native.Session(model, N_CTX)
        session.encode(ids(2, 3, 4))
        canvas = np.arange(model.canvas_length, dtype=np.int32)
        before = session.denoise(canvas, None)
        try:
            use(model, session)
        except (PyDiffusionError, ValueError, TypeError):
            session.truncate(3)
            if not np.array_equal(session.tokens, ids(2, 3, 4)):
                raise AssertionError("the refused call changed the session's tokens") from None
            if not np.array_equal(session.denoise(canvas, None), before):
                raise AssertionError("the refused call changed what the session computes") from None
            raise

    return call


def conditioning(model: _native.Model, value: float = 0.0, dtype: str = "float32") -> np.ndarray:
    return np.full((model.canvas_length, model.n_vocab), value, dtype=dtype)


def canvas(model: _native.Model, length: int | None = None, dtype: str = "int32") -> np.ndarray:
    return np.zeros(model.canvas_length if length is None else length, dtype=dtype)


def use_in_python(path: str) -> str:
    """Use the file from Python: tokenizer, chat template, sampler defaults, eos ids."""
    model = DiffusionModel(path, n_threads=1)
    model.chat_prompt([{"role": "user", "content": "the road"}])
    return model.generate("the road", max_tokens=4, steps=2).text


def in_python(use: Callable[[DiffusionModel], object]) -> Callable[[str], object]:
    return lambda path: use(DiffusionModel(path, n_threads=1, n_ctx=N_CTX))


#: Invalid arguments of the public API, where a wrong type too gives a one-line error.
PUBLIC_CALLS: dict[str, Callable[[str], object]] = {
    "public: no such file": lambda path: DiffusionModel(path + ".missing"),
    "public: a folder": lambda path: DiffusionModel(path.rpartition("/")[0]),
    "public: path of wrong type": lambda path: DiffusionModel(3),
    "public: path with nul": lambda path: DiffusionModel(path + "\0x"),
    "public: context beyond the model's": lambda path: DiffusionModel(path, n_ctx=65),
    "public: context below zero": lambda path: DiffusionModel(path, n_ctx=-1),
    "public: session's context of text": in_python(lambda m: m.new_session("many")),
    "public: layers on a device that is not there": lambda path: DiffusionModel(path, n_gpu_layers=4),
    "public: tokens of float": in_python(lambda m: m.new_session().encode(np.array([2.5]))),
    "public: tokens of two dimensions": in_python(lambda m: m.new_session().encode(ids(2, 3)[None])),
    "public: tokens of text": in_python(lambda m: m.new_session().encode("the road")),
    "public: tokens none": in_python(lambda m: m.new_session().encode(None)),
    "public: token past int32": in_python(lambda m: m.new_session().encode([2, 2**40])),
    "public: token past the vocabulary": in_python(lambda m: m.new_session().encode([2, m.n_vocab])),
    "public: prompt longer than the context": in_python(lambda m: m.generate([2] * (N_CTX + 1))),
    "public: text longer than the context": in_python(lambda m: m.generate("xyz " * N_CTX)),
    "public: prompt of nothing": in_python(lambda m: m.generate([])),
    "public: canvas too short": in_python(lambda m: m.new_session().denoise([1, 2, 3])),
    "public: canvas of float": in_python(lambda m: m.new_session().denoise([0.5] * m.canvas_length)),
    "public: conditioning of nan": in_python(
        lambda m: m.new_session().denoise([0] * m.canvas_length, conditioning(m, np.nan))
    ),
    "public: conditioning of one dimension": in_python(
        lambda m: m.new_session().denoise([0] * m.canvas_length, conditioning(m)[0])
    ),
    "public: conditioning of text": in_python(
        lambda m: m.new_session().denoise([0] * m.canvas_length, "hot")
    ),
    "public: unknown option": in_python(lambda m: m.generate("a", temperature=1.0)),
    "public: steps of zero": in_python(lambda m: m.generate("a", steps=0)),
    "public: steps of text": in_python(lambda m: m.generate("a", steps="many")),
    "public: temperature nan": in_python(lambda m: m.generate("a", t_min=float("nan"))),
    "public: seed below zero": in_python(lambda m: m.generate("a", seed=-(2**70))),
    "public: eos past the vocabulary": in_python(lambda m: m.generate("a", eos=[m.n_vocab])),
    "public: adapters of text": in_python(lambda m: m.set_lora("folder")),
    "public: adapters that are not there": lambda path: DiffusionModel(path, lora=[path + ".missing"]),
    "public: a model as adapter": in_python(lambda m: m.load_lora(m.path)),
    "public: adapters of numbers": in_python(lambda m: m.new_session(lora=np.zeros((2, 2)))),
    "public: adapter's scale nan": in_python(lambda m: m.new_session().set_lora([("a", float("nan"))])),
    "public: adapter's scale past float32": in_python(lambda m: m.generate("a", lora=[("a", 10**400)])),
    "public: detokenize past the vocabulary": in_python(lambda m: m.detokenize([m.n_vocab])),
    "public: accept with bound nan": lambda path: sampling.accept(np.zeros(3), float("nan")),
    "public: measure of wrong shape": lambda path: sampling.measure(np.zeros(4), 1.0, [0.5]),
    "public: step past the steps": lambda path: sampling.temperature(9, 8, 0.4, 0.8),
}

CALLS: dict[str, Callable[[str], object]] = {
    "use in python": use_in_python,
    **PUBLIC_CALLS,
    "a folder": lambda path: _native.Model(path.rpartition("/")[0], n_threads=1),
    "no such file": lambda path: _native.Model(path + ".missing", n_threads=1),
    "path of wrong type": lambda path: _native.Model(3, n_threads=1),
    "path with nul": lambda path: _native.Model(path + "\0x", n_threads=1),
    "unknown cache type": lambda path: _native.Model(path, n_threads=1, kv_type="q3"),
    "threads below zero": lambda path: _native.Model(path, n_threads=-1),
    "threads without number": lambda path: _native.Model(path, n_threads=2**31 - 1),
    "context of zero": lambda path: _native.Session(_native.Model(path, n_threads=1), 0),
    "context below zero": lambda path: _native.Session(_native.Model(path, n_threads=1), -5),
    "context smaller than canvas": lambda path: _native.Session(_native.Model(path, n_threads=1), 3),
    "token below zero": with_session(lambda m, s: s.encode(ids(2, -1))),
    "token past the vocabulary": with_session(lambda m, s: s.encode(ids(2, m.n_vocab))),
    "token of 2^31 - 1": with_session(lambda m, s: s.encode(ids(2, 2**31 - 1))),
    "tokens of int64": with_session(lambda m, s: s.encode(np.array([2, 3]))),
    "tokens of float": with_session(lambda m, s: s.encode(np.array([2.0], dtype=np.float32))),
    "tokens of two dimensions": with_session(lambda m, s: s.encode(ids(2, 3)[None])),
    "tokens none": with_session(lambda m, s: s.encode(None)),
    "prompt longer than the context": with_session(
        lambda m, s: s.encode(np.zeros(N_CTX + 1, dtype=np.int32))
    ),
    "prompt that leaves no room for a canvas": with_session(
        lambda m, s: (s.encode(np.zeros(N_CTX - 4, dtype=np.int32)), s.denoise(canvas(m), None))
    ),
    "truncate below zero": with_session(lambda m, s: s.truncate(-1)),
    "truncate past the end": with_session(lambda m, s: s.truncate(4)),
    "canvas too short": with_session(lambda m, s: s.denoise(canvas(m, m.canvas_length - 1), None)),
    "canvas too long": with_session(lambda m, s: s.denoise(canvas(m, m.canvas_length + 1), None)),
    "canvas empty": with_session(lambda m, s: s.denoise(canvas(m, 0), None)),
    "canvas of int64": with_session(lambda m, s: s.denoise(canvas(m, dtype="int64"), None)),
    "canvas token below zero": with_session(lambda m, s: s.denoise(canvas(m) - 1, None)),
    "canvas token past the vocabulary": with_session(lambda m, s: s.denoise(canvas(m) + m.n_vocab, None)),
    "conditioning of nan": with_session(lambda m, s: s.denoise(canvas(m), conditioning(m, np.nan))),
    "conditioning of inf": with_session(lambda m, s: s.denoise(canvas(m), conditioning(m, np.inf))),
    "conditioning of float64": with_session(
        lambda m, s: s.denoise(canvas(m), conditioning(m, dtype="float64"))
    ),
    "conditioning too narrow": with_session(lambda m, s: s.denoise(canvas(m), conditioning(m)[:, 1:].copy())),
    "conditioning of one dimension": with_session(lambda m, s: s.denoise(canvas(m), conditioning(m)[0])),
    "conditioning of strides": with_session(
        lambda m, s: s.denoise(canvas(m), np.asfortranarray(conditioning(m)))
    ),
    "generate zero tokens": with_session(lambda m, s: generate(s, max_tokens=0)),
    "generate with zero steps": with_session(lambda m, s: generate(s, steps=0)),
    "generate with temperature nan": with_session(lambda m, s: generate(s, t_min=float("nan"))),
    "generate with temperature zero": with_session(lambda m, s: generate(s, t_min=0.0, t_max=0.0)),
    "generate with temperature below zero": with_session(lambda m, s: generate(s, t_min=-1.0)),
    "generate with bound nan": with_session(lambda m, s: generate(s, entropy_bound=float("nan"))),
    "generate with bound below zero": with_session(lambda m, s: generate(s, entropy_bound=-0.5)),
    "generate with stability below zero": with_session(lambda m, s: generate(s, stability_threshold=-1)),
    "generate with confidence nan": with_session(lambda m, s: generate(s, confidence_threshold=float("nan"))),
    "generate with eos past the vocabulary": with_session(lambda m, s: generate(s, eos=[m.n_vocab])),
    "generate with seed of text": with_session(lambda m, s: generate(s, seed="one")),
    "measure with u out of range": lambda path: _native.measure(
        np.zeros((1, 4), np.float32), 1.0, np.array([1.5], np.float32)
    ),
    "measure with temperature zero": lambda path: _native.measure(
        np.zeros((1, 4), np.float32), 0.0, np.array([0.5], np.float32)
    ),
    "measure with draws missing": lambda path: _native.measure(
        np.zeros((2, 4), np.float32), 1.0, np.array([0.5], np.float32)
    ),
    "accept with bound nan": lambda path: _native.accept(np.zeros(3, np.float32), float("nan")),
    "quantize with unknown type": lambda path: _native.quantize_rows(np.zeros((1, 256), np.float32), "Q9_X"),
    "quantize rows of 100": lambda path: _native.quantize_rows(np.zeros((1, 100), np.float32), "Q4_K"),
    "dequantize short rows": lambda path: _native.dequantize_rows(np.zeros((1, 3), np.uint8), "Q8_0", 32),
    "convert short rows": lambda path: _native.convert_rows(np.zeros((1, 3), np.uint8), "Q8_0", "F32", 32),
    "convert rows whose size overflows": lambda path: _native.convert_rows(
        np.zeros((1, 0), np.uint8), "F32", "F32", 2**62
    ),
    "compare with more rows": lambda path: _native.row_errors(
        np.zeros((1, 4), np.uint8), "F32", np.zeros((2, 1), np.float32)
    ),
}


def limit_memory(n_bytes: int) -> None:
    """Limit the address space, so that a file can't make the worker exhaust the machine's memory."""
    if "libasan" in os.environ.get("LD_PRELOAD", ""):  # which reserves terabytes of addresses
        return
    try:
        import resource
    except ImportError:  # no such thing on Windows
        return
    with suppress(ValueError, OSError):  # macOS has the call but does not always grant it
        resource.setrlimit(resource.RLIMIT_AS, (n_bytes, n_bytes))


def main() -> None:
    limit_memory(8 << 30)
    for line in sys.stdin:
        case = json.loads(line)
        try:
            call = CALLS[case["call"]] if case["call"] else run
            answer = {"ok": True, "result": repr(call(case["path"]))}
        except BaseException as error:
            kinds = [kind.__name__ for kind in type(error).__mro__]
            answer = {"ok": False, "kinds": kinds, "message": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
