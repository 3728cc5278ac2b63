"""Merging against PEFT's own merge, where that one is right: of one mode's set, meant for both.

transformers ties the weights of encoder and decoder, so PEFT's merge of a set for the decoder changes both,
as ours does of a shared set. (Of two sets it adds both to the one weight, which is neither; ours refuses.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from reference.random_checkpoint import random_ids
from support.gguf_files import read_tensors
from support.models import compare

from pydiffusion import _native
from pydiffusion.adapters.adapter import Adapter, Target
from pydiffusion.adapters.loading import load_adapter
from pydiffusion.convert import convert, open_parts
from pydiffusion.errors import ConversionError

pytestmark = pytest.mark.reference

DECODER = r"model\.decoder\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj|router\.proj)"
BOTH = r"model\.(decoder|encoder\.language_model)\.layers\.\d+\.self_attn\.[qkvo]_proj"
SELF_CONDITIONING = r"model\.decoder\.self_conditioning\.(gate|up|down)_proj"


def merged_by_peft(checkpoint: Path, folder: Path, targets: str, parameters: list[str]) -> tuple[Path, Path]:
    """A random adapter as PEFT saves it, and the checkpoint that it merges it into."""
    import torch
    from peft import LoraConfig, get_peft_model
    from reference.hf_model import load_reference

    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, target_parameters=parameters)
    model = get_peft_model(load_reference(checkpoint), config)
    with torch.no_grad():
        for name, values in model.named_parameters():
            if "lora_" in name and "encoder" in name and "encoder" not in targets:
                values.zero_()  # of the experts' parameters, which have no mode in their names
            elif "lora_" in name:
                values.copy_(0.1 * torch.randn_like(values))
    model.save_pretrained(folder / "adapter")
    model.merge_and_unload().save_pretrained(folder / "merged")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / "merged" / file).write_bytes((checkpoint / file).read_bytes())
    return folder / "adapter", folder / "merged"


def for_both(adapter: Adapter) -> Adapter:
    """The decoder's set, for both modes."""
    factors = {
        Target(target.tensor, "decoder" if target.tensor.startswith("self_cond") else "both"): one
        for target, one in adapter.factors.items()
        if target.side == "decoder"
    }
    return dataclasses.replace(adapter, factors=factors)


def test_the_weights_are_those_of_peft(checkpoint_folder: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = checkpoint_folder("small")
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    folders = merged_by_peft(checkpoint, tmp_path, f"{DECODER}|{SELF_CONDITIONING}", parameters)
    convert(checkpoint, tmp_path / "base.gguf", "f32")
    adapter = for_both(load_adapter(folders[0], open_parts(tmp_path / "base.gguf").metadata))
    convert(checkpoint, tmp_path / "ours.gguf", "f32", lora=[adapter])
    convert(folders[1], tmp_path / "theirs.gguf", "f32")
    before, ours, theirs = (
        read_tensors(GGUFReader(tmp_path / f"{n}.gguf")) for n in ("base", "ours", "theirs")
    )
    changed = {name for name in before if not np.array_equal(theirs[name], before[name])}
    assert changed == {f"{target.tensor}.weight" for target in adapter.factors} and len(changed) == 32
    for name, values in theirs.items():
        np.testing.assert_allclose(ours[name], values, rtol=0, atol=2e-6, err_msg=name)


def test_the_logits_are_those_of_the_model_that_peft_merged(
    checkpoint_folder: Callable[..., Path], tmp_path: Path, report: Callable[[str], None]
) -> None:
    from reference.hf_model import Context, load_reference

    checkpoint = checkpoint_folder("small")
    folders = merged_by_peft(checkpoint, tmp_path, f"{DECODER}|{SELF_CONDITIONING}", [])
    convert(checkpoint, tmp_path / "ours.gguf", "f32", lora=[for_both(load_adapter(folders[0], None))])
    session = _native.Session(_native.Model(str(tmp_path / "ours.gguf"), n_threads=1, kv_type="f32"), 128)
    context = Context.new(load_reference(folders[1]))
    prompt, canvas = random_ids(1, "prompt", 40, 512), random_ids(1, "canvas", 8, 512)
    session.encode(prompt)
    context.encode(prompt)
    difference = compare(session.denoise(canvas, None), context.denoise(canvas, None))
    report(f"merged by us against merged by PEFT, logits: {difference}")
    assert difference.mean < 2e-5 and difference.max < 2e-3 and difference.agreement == 1


def test_two_sets_are_not_merged(checkpoint_folder: Callable[..., Path], tmp_path: Path) -> None:
    """PEFT adds both to the weight that both modes share."""
    checkpoint = checkpoint_folder("tiny")
    folders = merged_by_peft(checkpoint, tmp_path, BOTH, [])
    convert(folders[1], tmp_path / "theirs.gguf", "f32")
    convert(checkpoint, tmp_path / "base.gguf", "f32")
    theirs, before = (read_tensors(GGUFReader(tmp_path / f"{name}.gguf")) for name in ("theirs", "base"))
    adapter = load_adapter(folders[0], None)
    sets = [adapter.factors[Target("blk.1.attn_q", side)].delta() for side in ("encoder", "decoder")]
    added = theirs["blk.1.attn_q.weight"] - before["blk.1.attn_q.weight"]
    np.testing.assert_allclose(added, sets[0] + sets[1], rtol=0, atol=2e-6)
    with pytest.raises(ConversionError, match=r"changes blk\.0\.attn_k differently for encoder and decoder"):
        convert(checkpoint, tmp_path / "ours.gguf", "f32", lora=[adapter])
