"""Render findings of benchmarks/gpu.py, gpu_kernels.py and the checks of scripts/gpu_run.py as Markdown.

python benchmarks/gpu.py page results.jsonl [more.jsonl ...]
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

from gpu_findings import read

Entry = dict[str, Any]

MEASUREMENTS = (
    "machine", "rates", "load", "first-step", "steps", "peaked", "answer", "determinism",
    "batch", "file-types", "ggml-kernels", "graphs-off", "cpu-experts", "memory", "step-kernels",
)  # fmt: skip
_HEADER = ("when", "finding", "commit", "shape", "type", "variant", "ok", "took", "seconds", "begun")
_CHECKED = ("call", "file", "what", "test")  # keys that identify a check, besides its finding's name
_SHORT = 100  # longest detail of a check shown in the table

#: Published results for the 26B: (part of the GPU's name, software and weights, result).
ANCHORS = (
    ("H200", "vLLM, FP8", "12 to 16 ms a step; 1,024 in and out at 16 steps: 1,288 tokens/s"),
    ("H100", "vLLM, FP8", "16 ms a step; 1,024 in and out at 16 steps: 1,004 to 1,008 tokens/s"),
    ("RTX PRO 6000", "vLLM, NVFP4", "1,062 tokens/s"),
    ("5090", "vendor", "over 700 tokens/s"),
    ("4090", "vLLM, AWQ int4", "290 to 700 tokens/s"),
    ("4090", "llama.cpp PR 24423, Q4_K_M", "63 to 108 tokens/s; 21.6 after a prompt of 1,000"),
    ("A100", "llama.cpp PR 24423, Q4_K_M", "369 ms a step after 920 tokens"),
    ("L4", "llama.cpp PR 24423, Q4_K_M", "217 ms a step"),
)


# Findings


def key_of(entry: Entry) -> tuple[str, str | None, str]:
    return entry["finding"], entry.get("type"), entry.get("variant", "")


def kind_of(entry: Entry) -> str:
    return entry["finding"].partition(":")[0]


def latest(entries: Iterable[Entry]) -> list[Entry]:
    """Return the last entry of each measurement and check, in order of first appearance."""
    last: dict[tuple[Any, ...], Entry] = {}
    for entry in entries:
        if entry["finding"] == "tests" and "begun" in entry:  # a new test run: drop earlier failures
            last = {key: one for key, one in last.items() if one.get("of") != entry.get("what")}
        last[key_of(entry) + tuple(entry.get(name) for name in _CHECKED)] = entry
    return list(last.values())


def is_check(entry: Entry) -> bool:
    return "ok" in entry or kind_of(entry) not in MEASUREMENTS


def finished(entries: Iterable[Entry]) -> set[tuple[str, str | None, str]]:
    """Return the measurements that --resume skips.

    These are successful, or failed on their own: as the first in a series, or by ending the process.
    """
    return {
        key_of(entry)
        for entry in latest(entries)
        if "skipped" not in entry and ("error" not in entry or entry.get("in_a_row") == 1)
    }


# Markdown


def table(head: str, rows: Iterable[Sequence[str]]) -> str:
    rows = [list(row) for row in rows]
    if not rows:
        return ""
    titles = head.split(" | ")
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def section(title: str, *parts: str) -> str:
    body = [part for part in parts if part]
    return (
        "\n".join([f"## {title}", "", *(part + ("" if part.endswith("\n") else "\n") for part in body)])
        if body
        else ""
    )


def ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.2f}"


def gb(n_bytes: float | None) -> str:
    return "?" if n_bytes is None else f"{n_bytes / 1e9:.2f}"


def per_second(amount: float, seconds: float, unit: float) -> str:
    return f"{amount / seconds / unit:.2f}" if seconds > 0 and amount > 0 else ""


def label(entry: Entry) -> str:
    return " ".join(filter(None, [entry.get("type"), entry.get("variant")]))


def clock_text(entry: Entry) -> str:
    """Format clocks and power right after a measurement."""
    return "; ".join(", ".join(one.values()) for one in entry.get("clocks", []))


class Findings:
    """Latest findings, and among them the successful measurements by kind."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self.all = latest(entries)
        self.good = [
            entry
            for entry in self.all
            if not is_check(entry) and not any(word in entry for word in ("error", "skipped", "begun"))
        ]

    def of(self, kind: str) -> list[Entry]:
        return [entry for entry in self.good if kind_of(entry) == kind]

    def related(self, entry: Entry, kind: str) -> Entry | None:
        """Return a finding of the same type: of the same variant, else of the run without a variant."""
        same = [other for other in self.of(kind) if other.get("type") == entry.get("type")]
        own = [other for other in same if other.get("variant") == entry.get("variant")]
        return (own or [other for other in same if "variant" not in other] or [None])[0]

    def floor(self, entry: Entry) -> float | None:
        """Return the time to copy all weights at the device's bandwidth: a step reads all of them."""
        load, rates = self.related(entry, "load"), self.related(entry, "rates")
        return load["n_bytes"] / rates["copy"] if load and rates else None


# Sections


def gpu_names(found: Findings) -> list[str]:
    """Return the GPUs' names from the driver, or else from ggml."""
    first = (found.of("machine") or [{}])[0]
    named = [gpu["name"] for gpu in first.get("gpus", [])]
    return list(dict.fromkeys(named or [one["description"] for one in first.get("devices", [])]))


def header(found: Findings) -> str:
    first = (found.of("machine") or [{}])[0]
    shapes = dict.fromkeys(str(entry["shape"] or "a model file") for entry in found.all if "shape" in entry)
    types = dict.fromkeys(entry["type"] for entry in found.all if entry.get("type"))
    dates = sorted({entry["when"][:10] for entry in found.all if entry.get("when")})
    commits = dict.fromkeys(entry["commit"] for entry in found.all if entry.get("commit"))
    version = first.get("version", {})
    facts = [
        ("what", f"{', '.join(shapes)} ({', '.join(types)}), random weights unless a model file is named"),
        ("date", " to ".join(dict.fromkeys(dates[:1] + dates[-1:]))),
        ("commit", ", ".join(commits)),
        ("versions", ", ".join(f"{name} {value}" for name, value in version.items())),
        ("CPU", f"{first.get('cpu', '?')}, {first.get('threads', '?')} threads"),
        *(
            (f"GPU {i}", ", ".join(f"{name} {value}" for name, value in gpu.items()))
            for i, gpu in enumerate(first.get("gpus", []))
        ),
        ("environment", ", ".join(f"{name}={value}" for name, value in first.get("environment", {}).items())),
    ]
    lines = [f"- {name}: {value}" for name, value in facts if value]
    return "\n".join([f"# pydiffusion on {', '.join(gpu_names(found)) or 'no GPU'}", "", *lines, ""])


def checks(found: Findings) -> str:
    """Table of checks (pass, FAIL, skipped), followed by the failures in full."""
    rows, failures = [], []
    for entry in filter(is_check, found.all):
        if entry.get("ok") is False or "begun" in entry:  # started but never finished
            state = "FAIL"
        elif "ok" in entry:
            state = "pass"
        else:  # skipped, or informative only
            state = "skipped" if "skipped" in entry else ""
        name = ": ".join([entry["finding"], *(str(entry[of]) for of in _CHECKED if entry.get(of))])
        details = {key: value for key, value in entry.items() if key not in (*_HEADER, *_CHECKED)}
        short = ", ".join(
            f"{key} {f'{value:.3g}' if isinstance(value, float) else value}"
            for key, value in details.items()
            if len(str(value)) <= _SHORT and "\n" not in str(value)
        )
        seconds = entry.get("took", entry.get("seconds"))
        took = f"{seconds:.1f}" if isinstance(seconds, int | float) else ""
        rows.append([name, label(entry), state, took, short.replace("|", "\\|")])
        if state == "FAIL":
            failures.append(in_full(name, details))
    n = {state: sum(row[2] == state for row in rows) for state in ("pass", "FAIL", "skipped")}
    line = f"{n['pass']} pass, {n['FAIL']} fail, {n['skipped']} skipped."
    return section(
        "Checks", line if rows else "", table("check | of | result | s | details", rows), *failures
    )


def in_full(name: str, details: dict[str, Any]) -> str:
    lines = [f"### {name}", ""]
    for key, value in details.items():
        text = value if isinstance(value, str) else json.dumps(value, indent=1)
        lines += [f"{key}:", "", "```", text.rstrip().replace("```", "'''"), "```", ""]
    return "\n".join(lines)


def rates(found: Findings) -> str:
    rows = []
    for entry in found.of("rates"):
        matmuls = ", ".join(f"{name} {rate / 1e12:.1f}" for name, rate in entry["matmul"].items())
        rows.append(
            [
                label(entry),
                entry["device"],
                f"{entry['copy'] / 1e9:.0f}",
                matmuls or entry.get("matmul_skipped", ""),
            ]
        )
    head = "of | device | copy, GB/s read and written | matmul of 4096 x 4096 and 256 activations, TFLOP/s"
    return section("Bandwidth and matmul rates", table(head, rows))


def memory(found: Findings) -> str:
    rows = []
    for entry in found.of("load"):
        planned, first = entry["plan"], found.related(entry, "first-step") or {}
        rows.append([
            label(entry), f"{entry['load']:.1f}", f"{entry['n_bytes'] / entry['load'] / 1e9:.2f}",
            gb(entry["n_bytes"]), f"{planned['n_gpu_layers']} of {planned['n_layer']}",
            str(planned["n_cpu_moe"]), planned.get("dense_type", "file"), gb(planned["total_bytes"]),
            gb(entry["used_by_model"]), gb(entry["used_with_session"]), gb(first.get("used")),
            gb(first.get("free")),
        ])  # fmt: skip
    head = (
        "of | load, s | GB/s | weights | layers on GPUs | experts on the CPU | other matrices | planned | "
        "in use: model | with a session | after steps | free then"
    )
    contexts = dict.fromkeys(str(entry["n_ctx"]) for entry in found.of("load"))
    note = (
        f"In GB; context of {', '.join(contexts)} tokens. In use: growth since before the load, so without "
        "the CUDA context but with kernel code."
    )
    return section("Load and memory", note if rows else "", table(head, rows))


def steps(found: Findings) -> str:
    rows = []
    for entry in found.of("steps"):
        floor = found.floor(entry)
        rows.append([
            label(entry), str(entry["prompt"]), ms(entry["step"]), ms(entry["best"]), ms(entry["first"]),
            ms(entry["outside"]), ms(floor), f"{entry['step'] / floor:.1f}" if floor else "",
            f"{entry['prefill']:.0f}", gb(entry["used"]), clock_text(entry),
        ])  # fmt: skip
    head = (
        "of | prompt | step, ms | best | first, builds the graph | outside the step | floor | step / floor | "
        "prefill, tokens/s | in use, GB | clocks, power"
    )
    note = (
        "One canvas, full steps with self-conditioning, medians. Random weights give flat logits. Floor: "
        "reading all weights once at the bandwidth of a copy."
    )
    return section("Steps", note if rows else "", table(head, rows), anchors(found) if rows else "")


def anchors(found: Findings) -> str:
    names = " ".join(gpu_names(found))
    if not names or not any(entry.get("shape") == "26b-a4b" for entry in found.all):
        return ""
    known = [anchor for anchor in ANCHORS if re.search(rf"\b{anchor[0]}\b", names)]
    lines = [f"{where}, {what}: {figure}" for where, what, figure in known or ANCHORS[:2]]
    return "Published results for the 26B: " + ". ".join(lines) + "."


def parts(found: Findings) -> str:
    tables = []
    for entry in found.of("steps") + found.of("peaked"):
        if "parts" not in entry:
            if "parts_skipped" in entry:
                tables.append(f"{label(entry)} {entry['finding']}: {entry['parts_skipped']}.")
            continue
        total = sum(cost[0] for cost in entry["parts"].values())
        rows = []
        for name, (s, n_ops, n_bytes) in sorted(entry["parts"].items(), key=lambda item: -item[1][0]):
            # The work of self-conditioning depends on the logits and isn't counted.
            counted = (0, 0) if name == "self-conditioning" else (n_ops, n_bytes)
            rates = [per_second(n, s, unit) for n, unit in zip(counted, (1e12, 1e9), strict=True)]
            rows.append([name, ms(s), f"{s / total:.0%}", *rates])
        tables += [
            f"**{label(entry)} {entry['finding']}**: {ms(total)} ms in total, compared to "
            f"{ms(entry['step'])} ms for the whole step:",
            table("part | ms | share | TFLOP/s | GB/s", rows),
        ]
    return section("Parts of a step", *tables)


def peaked(found: Findings) -> str:
    rows = []
    for entry in found.of("peaked"):
        flat = [o for o in found.of("steps") if o["prompt"] == entry["prompt"] and label(o) == label(entry)]
        rows.append([
            label(entry), str(entry["asked"]),
            f"{entry['kept']:.0f} ({entry['kept_least']} to {entry['kept_most']})",
            f"{entry['temperature']:.4f}", f"{entry['entropy_expected']:.2f}", f"{entry['entropy']:.2f}",
            ms(entry["step"]), ms(entry["best"]), ms(flat[0]["step"]) if flat else "",
        ])  # fmt: skip
    head = (
        "of | kept tokens, target | actual, mean (range) | temperature | entropy expected | measured | step, "
        "ms | best | flat, ms"
    )
    note = (
        "Self-conditioning that keeps few tokens per position, like late steps of a trained model. Ordinary "
        "steps at a temperature chosen from the model's logits; the counts are from a sample of positions "
        "and valid as far as the entropies (nats, median) agree."
    )
    return section("Peaked logits", note if rows else "", table(head, rows))


def answers(found: Findings) -> str:
    rows, blocks = [], []
    for entry in found.of("answer"):
        rows.append([
            label(entry), str(entry["prompt"]), str(entry["tokens"]), str(entry["canvas_steps"]),
            f"{entry['total']:.3f}", f"{entry['rate']:.1f}", f"{1e3 * entry['first_canvas']:.0f}",
            f"{1e3 * entry['prefill_seconds']:.0f}", clock_text(entry),
        ])  # fmt: skip
        blocks += [
            [label(entry), str(i + 1), f"{1e3 * b['seconds']:.0f}", ms(b["step"]), ms(b["commit"]),
             f"{b['step'] / entry['blocks'][0]['step']:.3f}"]
            for i, b in enumerate(entry["blocks"])
        ]  # fmt: skip
    head = "of | in | out | steps per canvas | s | tokens/s | first canvas, ms | prefill, ms | clocks, power"
    block_head = "of | block | ms | step, ms | commit of the previous block, ms | step / block 1's"
    note = "Includes prefill and commits; no canvas stops early."
    return section("Whole output", note if rows else "", table(head, rows), table(block_head, blocks))


def batches(found: Findings) -> str:
    rows = [
        [label(e), str(e["n"]), str(e["prompt"]), ms(e["step"]), ms(e["one"]), f"{e['rate']:.0f}",
         str(e["n_graphs"])]
        for e in found.of("batch")
    ]  # fmt: skip
    head = "of | canvases | prompt each | step of all, ms | of one | tokens/s | graphs"
    note = "Canvases of several sessions in one graph, steps as in whole output, without prefill and commits."
    return section("Batches", note if rows else "", table(head, rows))


def memory_limits(found: Findings) -> str:
    rows = []
    for e in found.of("memory"):
        beyond = "" if e["used"] is None else f"{e['used'] / e['planned'] - 1:+.1%}"
        rows.append([
            label(e), f"{e['limit'] >> 30} GiB", str(e["n_gpu_layers"]), str(e["n_cpu_moe"]), e["dense_type"],
            gb(e["planned"]), gb(e["used"]), beyond, ms(e["step"]),
        ])  # fmt: skip
    head = (
        "of | limit | layers on GPUs | of them, experts on the CPU | other matrices | planned, GB "
        "| in use, GB | beyond the plan | step, ms"
    )
    note = "The model loaded again into a part of the GPU's memory, a prompt of 32 tokens."
    return section("Less memory", note if rows else "", table(head, rows))


def comparisons(found: Findings) -> str:
    lines = []
    for entry in found.of("determinism"):
        same = "the same tokens" if entry["same"] else (
            f"OTHER tokens: {entry['n_differences']} differ, the first at {entry['first_difference']}"
        )  # fmt: skip
        other = "other tokens" if entry["seeds_differ"] else "THE SAME tokens"
        lines.append(
            f"- {label(entry)}: the same seed again gave {same}, another seed {other}; "
            f"{entry['rate']:.1f} tokens/s the second time."
        )
    for entry in found.of("steps"):
        with_graphs = [
            o
            for o in found.of("steps")
            if o["finding"] == entry["finding"] and o.get("type") == entry.get("type") and "variant" not in o
        ]  # fmt: skip
        if entry.get("variant") and with_graphs:
            ratio = entry["step"] / with_graphs[0]["step"]
            lines.append(
                f"- {label(entry)}, {entry['finding']}: {ms(entry['step'])} ms per step compared to "
                f"{ms(with_graphs[0]['step'])} (ratio {ratio:.3f})."
            )
    for name, what in (
        ("file-types", "all matrices in the file's types"),
        ("ggml-kernels", "without kernels of our own"),
    ):
        for entry in found.of(name):
            compared = "" if entry["before"] is None else (
                f" compared to {ms(entry['before'])} (ratio {entry['step'] / entry['before']:.3f})"
            )  # fmt: skip
            lines.append(f"- {label(entry)}: {what}: {ms(entry['step'])} ms per step{compared}.")
    for entry in found.of("cpu-experts"):
        compared = "" if entry["per_layer"] is None else (
            f" compared to {ms(entry['all_on_gpu'])}: {ms(entry['per_layer'])} per layer"
        )  # fmt: skip
        lines.append(
            f"- {label(entry)}: experts of {entry['n_cpu_moe']} layers on the CPU: {ms(entry['step'])} ms "
            f"per step{compared}; {gb(entry['used'])} GB in use."
        )
    return section("Comparisons", "\n".join(lines))


def kernels(found: Findings, n: int = 40) -> str:
    tables = []
    for entry in found.of("step-kernels"):
        total = sum(row[2] for row in entry["kernels"])
        rows = [
            [f"`{name}`", str(launches), f"{us:.1f}", f"{us / launches:.2f}", f"{us / total:.1%}"]
            for name, launches, us in entry["kernels"][:n]
        ]
        tables += [
            f"{label(entry)} {entry.get('source', '')}: {entry['launches']} launches, {total / 1e3:.2f} ms.",
            table("kernel | launches | µs | each | share", rows),
        ]
    return section("Kernels of a step", *tables)


def left_out(found: Findings) -> str:
    lines, failures = [], []
    for entry in found.all:
        name = f"{label(entry)} {entry['finding']}".strip()
        if is_check(entry):
            continue
        if entry.get("begun"):
            lines.append(f"- {name}: ended the process, or is still running")
        elif "skipped" in entry:
            lines.append(f"- {name}: skipped, {entry['skipped']}")
        elif "error" in entry:
            lines.append(f"- {name}: FAILED, {entry['error']}")
            if entry.get("traceback"):
                failures.append(in_full(name, {"traceback": entry["traceback"]}))
    return section("Not measured", "\n".join(lines), *failures)


_SECTIONS: tuple[Callable[[Findings], str], ...] = (
    checks, rates, memory, steps, peaked, answers, batches, comparisons, memory_limits, parts, kernels,
    left_out,
)  # fmt: skip


def page(entries: Iterable[Entry]) -> str:
    found = Findings(entries)
    return "\n".join(filter(None, [header(found), *(one(found) for one in _SECTIONS)]))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu.py page", description=__doc__)
    parser.add_argument("results", type=Path, nargs="+")
    arguments = parser.parse_args(argv)
    missing = [str(path) for path in arguments.results if not path.exists()]
    if missing:
        parser.error(f"no such file: {', '.join(missing)}")
    print(page(read(*arguments.results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
