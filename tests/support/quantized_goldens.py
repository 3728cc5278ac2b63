"""The quantized tensors that other programs stored, with the values that they read from them.

``reference/make_quantized_goldens.py`` makes them; this reads them with numpy alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

GOLDENS = Path(__file__).parents[1] / "reference" / "goldens" / "quantized.npz"
# (name, bytes of a safetensors file, config.json, float32 values by tensor name)
Case = tuple[str, bytes, dict[str, Any], dict[str, np.ndarray]]


def save_cases(cases: Iterable[Case]) -> None:
    """Write all cases: one array of files, one of values, and an index of both."""
    index, files, values = [], [], []
    for name, data, config, by_name in sorted(cases, key=lambda case: case[0]):
        index.append([name, len(data), config, {key: value.shape for key, value in by_name.items()}])
        files.append(np.frombuffer(data, np.uint8))
        values += [np.asarray(value, np.float32).reshape(-1) for value in by_name.values()]
    text = np.frombuffer(json.dumps(index).encode(), np.uint8)
    np.savez_compressed(GOLDENS, index=text, files=np.concatenate(files), values=np.concatenate(values))


def load_cases() -> list[Case]:
    """All cases, sorted by name."""
    with np.load(GOLDENS) as stored:
        index, files, values = json.loads(stored["index"].tobytes()), stored["files"], stored["values"]
    cases, i_file, i_value = [], 0, 0
    for name, n_bytes, config, shapes in index:
        by_name = {}
        for key, shape in shapes.items():
            count = int(np.prod(shape))
            by_name[key] = values[i_value : i_value + count].reshape(shape)
            i_value += count
        cases.append((name, files[i_file : i_file + n_bytes].tobytes(), config, by_name))
        i_file += n_bytes
    return cases
