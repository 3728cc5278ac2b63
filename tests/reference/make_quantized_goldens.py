"""Record small quantized tensors as other programs store them, and what these programs dequantize them to.

Each program is needed only for its own cases; those of the others stay as they are:

    pip install torch transformers compressed-tensors mlx[cpu] nvidia-modelopt gptqmodel autoawq
    cd tests
    python -m reference.make_quantized_goldens compressed-tensors mlx modelopt gptqmodel autoawq transformers
    python -m reference.make_quantized_goldens old-compressed-tensors   # with compressed-tensors==0.9.4

No GPU is needed. Written with compressed-tensors 0.20.0 and 0.9.4, mlx 0.32.4, nvidia-modelopt 0.47.0,
gptqmodel 7.7.0, autoawq 0.2.9 and transformers 5.23.0. The programs dequantize in the dtype of the scales;
scales of 16 bits are widened to float32 before, so that the values are not rounded to 16 bits.

Into goldens/quantized.npz, of each case: a safetensors file, config.json, and the float32 values by tensor.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from support.quantized_goldens import GOLDENS, Case, load_cases, save_cases

NAME = "layer.weight"


def weights(*shape: int) -> np.ndarray:
    """Random weights whose rows differ in size. Many repeat themselves, so that the file stays small."""
    random = np.random.default_rng(sum(shape))
    if np.prod(shape) > 10_000:
        return np.resize(random.standard_normal(97), shape).astype(np.float32)
    rows = np.exp(random.standard_normal((*shape[:-1], 1)))
    return (random.standard_normal(shape) * rows).astype(np.float32)


def torch_case(case: str, tensors: dict[str, Any], config: dict[str, Any], values: dict[str, Any]) -> Case:
    """A case whose tensors are torch's."""
    from safetensors.torch import save

    data = save({name: tensor.detach().contiguous() for name, tensor in tensors.items()})
    floats = {name: value.detach().float().numpy() for name, value in values.items()}
    return case, data, {"quantization_config": config}, floats


def _compressed(case: str, shape: tuple[int, int], dtype: str = "float32", **arguments: Any) -> Case:
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import dequantize
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    format_name = case.removeprefix("ct-").split(":")[0]
    args = QuantizationArgs(**arguments)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    weight = torch.from_numpy(weights(*shape))
    state = {"weight": weight}
    n_rows, n_columns = shape
    if args.strategy == "block":
        high, wide = args.block_structure
        padded = torch.nn.functional.pad(weight, (0, -n_columns % wide, 0, -n_rows % high))
        grid = padded.reshape(padded.shape[0] // high, high, -1, wide)
        low, top = grid.amin(dim=(1, 3)), grid.amax(dim=(1, 3))
    else:
        group = {"tensor": None, "channel": n_columns}.get(args.strategy, args.group_size)
        rows = weight.reshape(1, -1) if group is None else weight.reshape(n_rows, -1, group)
        low, top = rows.amin(dim=-1), rows.amax(dim=-1)
    globally = {}
    if args.strategy == "tensor_group":
        state["weight_global_scale"] = generate_gparam(weight.min(), weight.max()).reshape(1)
        globally = {"global_scale": state["weight_global_scale"]}
    scale, zero_point = calculate_qparams(low, top, args, **globally)
    state["weight_scale"] = scale.to(getattr(torch, dtype))
    if not args.symmetric:
        state["weight_zero_point"] = zero_point
    compressor = BaseCompressor.get_value_from_registry(format_name)
    stored = compressor.compress(dict(state), scheme)
    wide_scale = {"weight_scale": stored["weight_scale"]}
    if stored["weight_scale"].dtype in (torch.bfloat16, torch.float16):
        wide_scale = {"weight_scale": stored["weight_scale"].float()}
    if args.strategy == "tensor_group":  # decompress() would compute in bfloat16
        codes = unpack_fp4_from_uint8(stored["weight_packed"], *shape, dtype=torch.float32)
        value = dequantize(codes, stored["weight_scale"].float(), None, args, torch.float32, **globally)
    else:
        value = compressor.decompress({**stored, **wide_scale}, scheme)["weight"]
    config = {
        "quant_method": "compressed-tensors",
        "format": format_name,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": args.model_dump(mode="json")}},
    }
    tensors = {f"layer.{name}": tensor for name, tensor in stored.items()}
    return torch_case(case, tensors, config, {NAME: value})


def compressed_tensors_cases() -> Iterator[Case]:
    """compressed-tensors, all of its formats with scales."""
    fp8 = {"num_bits": 8, "type": "float"}
    yield _compressed("ct-float-quantized:tensor", (3, 20), **fp8, strategy="tensor")
    yield _compressed("ct-float-quantized:channel", (5, 24), "bfloat16", **fp8, strategy="channel")
    yield _compressed("ct-float-quantized:group", (3, 48), **fp8, strategy="group", group_size=16)
    block = {"strategy": "block", "block_structure": [128, 128]}
    yield _compressed("ct-float-quantized:block", (130, 140), **fp8, **block)
    int8 = {"num_bits": 8, "type": "int"}
    yield _compressed("ct-int-quantized:channel", (5, 24), "bfloat16", **int8, strategy="channel")
    yield _compressed("ct-int-quantized:tensor", (3, 20), **int8, strategy="tensor")
    yield _compressed("ct-int-quantized:zeros", (5, 24), **int8, strategy="channel", symmetric=False)
    for bits in (2, 3, 4, 5, 6, 7, 8):
        args = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": 16}
        yield _compressed(f"ct-pack-quantized:{bits}", (5, 48), "float16", **args)
        # Neither 34 rows nor 48 or 16 columns fill the words of 3 and 5 bits.
        yield _compressed(f"ct-pack-quantized:{bits}-zeros", (34, 16), **args, symmetric=False)
    channel = {"num_bits": 4, "type": "int", "strategy": "channel"}
    yield _compressed("ct-pack-quantized:4-channel", (5, 36), **channel)
    yield _compressed("ct-pack-quantized:4-channel-zeros", (5, 36), **channel, symmetric=False)
    nvfp4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    yield _compressed("ct-nvfp4-pack-quantized:", (5, 48), **nvfp4)
    yield _compressed("ct-nvfp4-pack-quantized:64", (5, 128), **nvfp4)
    mx = {"type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
    yield _compressed("ct-mxfp4-pack-quantized:", (5, 96), num_bits=4, **mx)
    yield _compressed("ct-mxfp8-quantized:", (3, 96), num_bits=8, **mx)


def old_compressed_tensors_cases() -> Iterator[Case]:
    """compressed-tensors of before 2026: words without codes across their borders, and columns in groups of
    any order."""
    import torch
    from compressed_tensors.compressors.quantized_compressors.pack_quantized import (
        pack_to_int32,
        unpack_from_int32,
    )
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize

    for bits, shape, ordered in ((3, (5, 96), True), (6, (5, 48), True), (4, (5, 48), False)):
        args = QuantizationArgs(num_bits=bits, type="int", strategy="group", group_size=16)
        weight = torch.from_numpy(weights(*shape))
        order = torch.from_numpy(np.random.default_rng(0).permutation(shape[1]))
        g_idx = None if ordered else (order // 16).to(torch.int32)
        scale = weight.reshape(shape[0], -1, 16).abs().amax(-1) / (2 ** (bits - 1) - 1)
        zero = torch.zeros_like(scale, dtype=torch.int8)
        codes = quantize(weight, scale, zero, args, dtype=torch.int8, g_idx=g_idx)
        tensors = {
            "layer.weight_packed": pack_to_int32(codes, bits),
            "layer.weight_scale": scale,
            "layer.weight_shape": torch.tensor(shape),
        }
        if g_idx is not None:
            tensors["layer.weight_g_idx"] = g_idx
        unpacked = unpack_from_int32(tensors["layer.weight_packed"], bits, torch.Size(shape))
        value = dequantize(unpacked, scale, None, args, g_idx=g_idx)
        groups = {"group_0": {"targets": ["Linear"], "weights": args.model_dump(mode="json")}}
        config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
        yield torch_case(f"old-ct:{bits}{'' if ordered else '-g_idx'}", tensors, config, {NAME: value})


def mlx_cases() -> Iterator[Case]:
    """MLX: its modes, a stack of matrices, and modules with settings of their own."""
    import mlx.core as mx

    def stored(name: str, shape: tuple[int, ...], dtype: Any, **settings: Any) -> tuple[dict, dict]:
        weight = mx.array(weights(*shape)).astype(dtype)
        tensors = dict(zip(("weight", "scales", "biases"), mx.quantize(weight, **settings), strict=False))
        wide = dict(tensors)
        if settings["mode"] == "affine":
            wide |= {part: tensors[part].astype(mx.float32) for part in ("scales", "biases")}
        values = mx.dequantize(
            wide["weight"], wide["scales"], wide.get("biases"), **settings, dtype=mx.float32
        )
        named = {f"{name}.{part}": tensor for part, tensor in tensors.items()}
        return named, {f"{name}.weight": np.array(values)}

    def case(name: str, parts: list[tuple[dict, dict]], config: dict[str, Any], key: str) -> Case:
        tensors = {key: value for part in parts for key, value in part[0].items()}
        values = {key: value for part in parts for key, value in part[1].items()}
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "x.safetensors")
            mx.save_safetensors(path, tensors, metadata={"format": "mlx"})
            data = Path(path).read_bytes()
        return name, data, {key: config}, values

    for bits in (1, 2, 3, 4, 5, 6, 8):
        settings = {"group_size": 32, "bits": bits, "mode": "affine"}
        dtype = mx.bfloat16 if bits % 2 else mx.float16
        yield case(f"mlx:{bits}", [stored("layer", (5, 96), dtype, **settings)], settings, "quantization")
    for mode, group, bits in (("mxfp4", 32, 4), ("mxfp8", 32, 8), ("nvfp4", 16, 4)):
        settings = {"group_size": group, "bits": bits, "mode": mode}
        part = stored("layer", (3, 128), mx.bfloat16, **settings)
        yield case(f"mlx:{mode}", [part], settings, "quantization_config")
    own = {"group_size": 64, "bits": 8, "mode": "affine"}
    all_others = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    parts = [stored("layer", (2, 64), mx.bfloat16, **all_others)]
    parts.append(stored("other.experts", (3, 2, 64), mx.bfloat16, **own))
    config = {**all_others, "other.experts": {"group_size": 64, "bits": 8}, "third": False}
    yield case("mlx:modules", parts, config, "quantization")
    three = stored("layer", (3, 2, 64), mx.float32, group_size=64, bits=3, mode="affine")
    yield case("mlx:stack", [three], {"group_size": 64, "bits": 3}, "quantization")


def modelopt_cases() -> Iterator[Case]:
    """ModelOpt: NVFP4 with a scale per matrix, FP8 of a scale per matrix, row and block, MXFP8."""
    import torch
    from modelopt.torch.quantization.qtensor import FP8QTensor, MXFP8QTensor, NVFP4QTensor

    config = {"quant_method": "modelopt", "quant_algo": "NVFP4", "producer": {"name": "modelopt"}}
    for n_columns in (48, 128):
        weight = torch.from_numpy(weights(5, n_columns))
        stored, scale, scale_2 = NVFP4QTensor.quantize(weight.clone(), 16)
        tensors = {
            "layer.weight": stored._quantized_data,
            "layer.weight_scale": scale,
            "layer.weight_scale_2": scale_2,
            "layer.input_scale": torch.tensor(0.25),
        }
        value = stored.dequantize(torch.float32, scale=scale, double_scale=scale_2, block_sizes={-1: 16})
        yield torch_case(f"modelopt:nvfp4-{n_columns}", tensors, config, {NAME: value})
    kinds: dict[str, dict[str, Any]] = {
        "tensor": {},
        "rows": {"axis": 0},
        "blocks": {"block_sizes": {-1: 16, -2: 8}},
    }
    for kind, options in kinds.items():
        weight = torch.from_numpy(weights(24, 48))
        stored, scale = FP8QTensor.quantize(weight, **options)
        value = stored.dequantize(torch.float32, scale=scale, **options)
        if kind != "blocks":
            scale = scale.reshape(() if kind == "tensor" else -1)
        tensors = {"layer.weight": stored._quantized_data, "layer.weight_scale": scale}
        config = {"quant_method": "modelopt", "quant_algo": "FP8"}
        config |= {"weight_block_size": [8, 16]} if kind == "blocks" else {}
        yield torch_case(f"modelopt:fp8-{kind}", tensors, config, {NAME: value})
        if kind == "blocks":  # its export leaves the maxima's dimensions within a block, which are 1
            tensors["layer.weight_scale"] = scale.reshape(scale.shape[0], 1, scale.shape[1], 1)
            yield torch_case(f"modelopt:fp8-{kind}-4d", tensors, config, {NAME: value})
    weight = torch.from_numpy(weights(3, 96))
    stored, scale = MXFP8QTensor.quantize(weight)
    value = stored.dequantize(torch.float32, scale=scale)
    tensors = {"layer.weight": stored._quantized_data, "layer.weight_scale": scale}
    config = {"quant_method": "modelopt", "quant_algo": "MXFP8"}
    yield torch_case("modelopt:mxfp8", tensors, config, {NAME: value})


def gptqmodel_cases() -> Iterator[Case]:
    """GPTQ in both versions: 2, 3, 4 and 8 bits, with and without columns in groups of any order."""
    from gptqmodel import QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    # (bits, format, columns in groups of any order, least zero point)
    for bits, version, act, least in (
        (2, "gptq", False, 1),
        (2, "gptq_v2", True, 0),
        (3, "gptq", True, 1),
        (3, "gptq_v2", False, 0),
        (4, "gptq", False, 1),
        (4, "gptq", True, 1),
        (4, "gptq_v2", True, 0),
        (8, "gptq", True, 1),
        (8, "gptq_v2", False, 0),
        # The first version takes one from all zero points of a word at once: one of 0 borrows from the next.
        (2, "gptq", False, 0),
        (3, "gptq", False, 0),
        (4, "gptq", False, 0),
        (8, "gptq", False, 0),
    ):
        module, value = _gptq(bits, act, least)
        scales = module.scales.half()
        settings = QuantizeConfig(bits=bits, group_size=16, desc_act=act, sym=False)
        if version == "gptq":
            convert_gptq_v2_to_v1_format_module(module, settings)
        tensors = {f"layer.{part}": getattr(module, part) for part in ("qweight", "qzeros", "g_idx")}
        config = {"quant_method": "gptq", "checkpoint_format": version, "bits": bits}
        config |= {"group_size": 16, "desc_act": act, "sym": False}
        case = f"{version}:{bits}{'-desc_act' if act else ''}{'' if least else '-zero'}"
        yield torch_case(case, tensors | {"layer.scales": scales}, config, {NAME: value})


def _gptq(bits: int, act: bool, least: int) -> tuple[Any, Any]:
    """A packed module with scales of float32, and its values."""
    import torch
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    n_rows, n_columns, group = 32, 32, 16
    linear = torch.nn.Linear(n_columns, n_rows, bias=False)
    # A quarter of the rows are positive, so their zero point is the least.
    weight = weights(n_rows, n_columns)
    weight[::4] = np.abs(weight[::4])
    linear.weight.data = torch.from_numpy(weight)
    g_idx = torch.arange(n_columns, dtype=torch.int32) // group
    if act:
        g_idx = g_idx[torch.from_numpy(np.random.default_rng(1).permutation(n_columns))]
    grouped = linear.weight.data.reshape(n_rows, -1, group)
    low, top = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    scale = ((top - low) / (2**bits - 1)).half().float()
    zero = torch.round(-low / scale).clamp(least, 2**bits - 1)
    module = TorchLinear(bits, group, False, act, n_columns, n_rows)
    module.pack_original(linear, scale, zero, g_idx)
    module.post_init()
    module.scales.data = module.scales.float()
    return module, module.dequantize_weight().T


def autoawq_cases() -> Iterator[Case]:
    """AutoAWQ's version "gemm"."""
    import torch
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    for n_rows, n_columns, group in ((32, 48, 16), (32, 32, -1)):
        linear = torch.nn.Linear(n_columns, n_rows, bias=False)
        linear.weight.data = torch.from_numpy(weights(n_rows, n_columns))
        size = n_columns if group < 0 else group
        grouped = linear.weight.data.reshape(n_rows, -1, size)
        low, top = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        scale = ((top - low) / 15).half().float()
        zero = torch.round(-low / scale).clamp(0, 15)
        # Codes beyond the range would spill into their neighbours: AutoAWQ packs clipped weights.
        high = (15 - zero).repeat_interleave(size, 1) * scale.repeat_interleave(size, 1)
        least = -zero.repeat_interleave(size, 1) * scale.repeat_interleave(size, 1)
        linear.weight.data = torch.minimum(torch.maximum(linear.weight.data, least), high)
        module = WQLinear_GEMM.from_linear(
            linear, 4, size, scales=scale.T.contiguous(), zeros=zero.T.contiguous()
        )
        value = dequantize_gemm(module.qweight, module.qzeros, module.scales.float(), 4, size).T
        tensors = {f"layer.{part}": getattr(module, part) for part in ("qweight", "qzeros", "scales")}
        config = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": group}
        config |= {"zero_point": True}
        yield torch_case(f"awq:{group}", tensors, config, {NAME: value})


def transformers_cases() -> Iterator[Case]:
    """transformers: FP8 in blocks, of matrices and stacks of them, and MXFP4 in blocks as gpt-oss."""
    import torch
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    for name, shape, scale_format in (
        (NAME, (16, 48), None),
        ("layer.experts.gate_up_proj", (3, 16, 32), None),
        (NAME, (16, 64), "ue8m0"),
    ):
        config = {"quant_method": "fp8", "weight_block_size": [8, 16], "activation_scheme": "dynamic"}
        settings = SimpleNamespace(weight_block_size=[8, 16], scale_fmt=scale_format)
        holder = SimpleNamespace(quantization_config=settings)
        stored = Fp8Quantize(holder).convert({name: torch.from_numpy(weights(*shape))})
        scales = stored[next(key for key in stored if key.endswith("_scale_inv"))]
        value = Fp8Dequantize(holder)._dequantize_one(stored[name], scales, torch.float32)
        case = f"fp8:{len(shape)}d{'-ue8m0' if scale_format else ''}"
        yield torch_case(case, stored, config, {name: value})
    random = np.random.default_rng(2)
    blocks, scales = random.integers(0, 256, (2, 3, 3, 16)), random.integers(100, 150, (2, 3, 3))
    tensors = {
        "layer.experts.gate_up_proj_blocks": torch.from_numpy(blocks.astype(np.uint8)),
        "layer.experts.gate_up_proj_scales": torch.from_numpy(scales.astype(np.uint8)),
    }
    # It transposes the two last dimensions, as gpt-oss has its experts.
    value = convert_moe_packed_tensors(*tensors.values(), dtype=torch.float32).transpose(1, 2).contiguous()
    config = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    yield torch_case("mxfp4:blocks", tensors, config, {"layer.experts.gate_up_proj": value})


PROGRAMS: dict[str, Callable[[], Iterator[Case]]] = {
    "compressed-tensors": compressed_tensors_cases,
    "old-compressed-tensors": old_compressed_tensors_cases,
    "mlx": mlx_cases,
    "modelopt": modelopt_cases,
    "gptqmodel": gptqmodel_cases,
    "autoawq": autoawq_cases,
    "transformers": transformers_cases,
}


def main() -> None:
    """Record the cases of the programs named, keep the others'."""
    recorded = {case[0]: case for case in load_cases()} if GOLDENS.exists() else {}
    for program in sys.argv[1:]:
        for case in PROGRAMS[program]():
            recorded[case[0]] = case
            print(f"{case[0]}: {len(case[1])} bytes")
    save_cases(recorded.values())


if __name__ == "__main__":
    main()
