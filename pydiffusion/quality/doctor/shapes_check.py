"""Hyperparameters and shapes: does the model load, and is it the one that was released?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import released
from .report import Result, Section
from .subject import Subject


def _compare_released(subject: Subject, section: Section) -> None:
    """Compare the metadata with the released checkpoint's."""
    metadata = subject.metadata
    if released.is_released(metadata):
        _compare(section, f"metadata of {released.NAME}", metadata, released.released_metadata())
    else:
        section.skip(
            f"metadata of {released.NAME}",
            f"{metadata.get('diffusion-gemma.block_count')} layers of"
            f" {metadata.get('diffusion-gemma.embedding_length')}: another model",
        )


def _compare_reference(subject: Subject, section: Section) -> None:
    """Compare the metadata with the reference's."""
    if subject.reference is None:
        section.skip("metadata of the reference", "no --reference", "give the checkpoint's folder")
        return
    wanted = {k: v for k, v in subject.reference_metadata.items() if released.is_compared(k)}
    _compare(section, "metadata of the reference", subject.metadata, wanted)


def _compare(section: Section, what: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """One finding for each key that differs, or one that says that none does."""
    defaults = released.sampler_keys(wanted)
    differing = released.differences(found, wanted)
    if not differing:
        section.passed(what, f"{len(wanted)} keys agree")
    for key, value, expected in differing:
        absent_default = value is None and key in defaults
        section.judge(
            False,
            f"{what}: {key}",
            "absent" if value is None else _short(value),
            _short(expected),
            "the runtime's own default is used; convert the checkpoint again to have it in the file"
            if absent_default
            else "the file is of another model, or its converter was wrong: convert the checkpoint again",
            Result.WARNING if absent_default else Result.FAILED,
        )


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _describe(subject: Subject, section: Section) -> None:
    """Load the model, which compares every tensor's shape with the hyperparameters."""
    model = subject.load()
    h, d = model.hparams, model.description
    section.passed("loads", f"every tensor has the shape that the metadata ask for, {d['n_weights']} weights")
    sliding = list(h["sliding"])
    section.judge(
        not sliding[-1],
        "layers",
        f"{sum(sliding)} with a sliding window of {h['window']}, {len(sliding) - sum(sliding)} full:"
        f" {''.join('s' if each else 'f' for each in sliding)}",
        "the last one is full",
        "the reference always ends with a full layer: compare with --reference",
        Result.WARNING,
    )
    heads = sorted(set(zip(h["sliding"], h["n_head_kv"], h["head_dim"], strict=True)), reverse=True)
    listed = "; ".join(
        f"{'sliding' if slides else 'full'} {n_kv} KV heads of {dim}" for slides, n_kv, dim in heads
    )
    section.passed("heads", f"{h['n_head']} query heads; {listed}")
    section.passed("experts", f"{h['n_expert']} of {h['n_ff_expert']}, {h['n_expert_used']} per token")
    section.passed(
        "canvas", f"{model.canvas_length} tokens, context {model.n_ctx_train}, vocabulary {model.n_vocab}"
    )
    where = "the CPU" if not d["n_gpu_layers"] else f"{d['n_gpu_layers']} layers on {d['backend']}"
    section.passed("runs on", f"{where}, kernels {d['kernels']}, KV cache {d['kv_type']}")


def _describe_adapters(subject: Subject, section: Section) -> None:
    """Show what the adapters change that were given; loading the model has checked that they fit."""
    if not subject.runtime.get("lora"):
        return
    for adapter, scale in subject.model.lora:
        ranks = sorted({factors.rank for factors in adapter.factors.values()})
        sides = sorted({target.side for target in adapter.factors})
        section.passed(
            f"adapter {adapter.name}",
            f"scale {scale:g}, {len(adapter.factors)} matrices ({', '.join(sides)}), rank"
            f" {ranks[0] if len(ranks) == 1 else f'{ranks[0]} to {ranks[-1]}'}",
        )


CHECKS = (_compare_released, _compare_reference, _describe, _describe_adapters)
