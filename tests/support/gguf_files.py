"""Write and read GGUF files with the gguf package."""

from __future__ import annotations

import numpy as np
from gguf import GGUFReader, GGUFWriter, quants

#: Types that are refused without an importance matrix.
NEED_IMATRIX = ("iq3_xs", "iq3_xxs", "q2_k_s", "iq2_m", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_m", "iq1_s")


def finish(writer: GGUFWriter, tensors: dict[str, np.ndarray]) -> None:
    """Add the tensors, write everything, close."""
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_tensors(reader: GGUFReader) -> dict[str, np.ndarray]:
    """All tensors as float32 in C order."""
    return {
        t.name: quants.dequantize(t.data, t.tensor_type).reshape([int(n) for n in reversed(t.shape)])
        for t in reader.tensors
    }


def fields_of(reader: GGUFReader) -> dict[str, tuple[str, object]]:
    return {
        key: ("/".join(t.name for t in field.types), field.contents())
        for key, field in reader.fields.items()
        if not key.startswith("GGUF.")
    }
