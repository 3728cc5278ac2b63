"""
The native runtime: GGUF files, models, sessions, sampler, quantization. Private; use pydiffusion.
"""

from collections.abc import Sequence
from typing import Annotated

import numpy
from numpy.typing import NDArray

from pydiffusion._native import testing as testing


class TensorInfo:
    """A tensor's place in a GGUF file."""

    @property
    def name(self) -> object: ...

    @property
    def type(self) -> str: ...

    @property
    def shape(self) -> tuple:
        """Dimensions in numpy's order, slowest first."""

    @property
    def offset(self) -> int:
        """Bytes from the start of the file, or of its part."""

    @property
    def n_bytes(self) -> int: ...

    @property
    def part(self) -> int:
        """Of a split file, counted from 0."""

    def __repr__(self) -> str: ...

class GgufFile:
    """
    A GGUF file of any architecture, memory-mapped and validated.

    Raises ModelFormatError, naming key or tensor, when anything in it is not as the format asks.
    """

    def __init__(self, path: str) -> None: ...

    @staticmethod
    def open_all_parts(path: str) -> GgufFile:
        """
        A file; of a split one, whose first part is given, all parts as the file that was split.
        """

    @property
    def path(self) -> object: ...

    @property
    def paths(self) -> list:
        """Of all parts; of a file that is not split its own."""

    @property
    def version(self) -> int: ...

    @property
    def alignment(self) -> int: ...

    @property
    def data_offset(self) -> int: ...

    @property
    def n_bytes(self) -> int: ...

    @property
    def metadata(self) -> dict:
        """Keys and values in the file's order; made anew at each access."""

    @property
    def metadata_types(self) -> dict: ...

    @property
    def tensors(self) -> list: ...

    def tensor_bytes(self, name: str) -> Annotated[NDArray[numpy.uint8], dict(shape=(None,), writable=False)]:
        """
        The tensor's bytes as a read-only view of the mapping, shape (n_bytes,), uint8.
        """

class Model:
    """
    Weights and hyperparameters; immutable, shared by sessions and threads.
    """

    def __init__(self, path: str, n_threads: int, kv_type: str = 'auto', progress: object | None = None, device: str = 'cpu', n_gpu_layers: int = -1, n_cpu_moe: int = -1, memory_limits: Sequence[int] = [], n_ctx: int = 8192, kernels: str = 'auto', n_sessions: int = 1) -> None: ...

    @property
    def file(self) -> GgufFile: ...

    @property
    def hparams(self) -> dict: ...

    @property
    def description(self) -> dict: ...

    @property
    def n_vocab(self) -> int: ...

    @property
    def canvas_length(self) -> int: ...

    @property
    def n_ctx_train(self) -> int: ...

    @property
    def n_threads(self) -> int: ...

def devices() -> list:
    """The GPUs that this build can compute on."""

def why_no_device(name: str) -> str:
    """What is wrong with a name that devices() has not."""

def plan(path: str, device: str, memory_limits: Sequence[int] = [], n_gpu_layers: int = -1, n_cpu_moe: int = -1, n_ctx: int = 8192, kv_type: str = 'auto', n_sessions: int = 1) -> dict:
    """
    What of a model would lie on which device, and the bytes that takes there.
    """

class Step:
    """
    What one denoising step did; arrays have one entry per canvas position.
    """

    @property
    def canvas_index(self) -> int: ...

    @property
    def step(self) -> int:
        """Counts down from the number of steps to 1."""

    @property
    def draft(self) -> object:
        """argmax, int32"""

    @property
    def canvas(self) -> object:
        """input of the next step, int32"""

    @property
    def entropy(self) -> object:
        """nats, float32"""

    @property
    def accepted(self) -> object:
        """bool"""

    @property
    def canvas_done(self) -> bool: ...

    @property
    def tokens(self) -> object:
        """
        When canvas_done: the canvas cut before the first eos and at max_tokens, int32; else empty.
        """

    @property
    def finish(self) -> str: ...

    @property
    def timings(self) -> dict: ...

class Session:
    """One conversation on a model. Use it from one thread at a time."""

    def __init__(self, model: Model, n_ctx: int) -> None: ...

    @property
    def n_past(self) -> int: ...

    @property
    def n_ctx(self) -> int: ...

    @property
    def cache_bytes(self) -> int: ...

    def collect_imatrix(self, on: bool) -> None:
        """
        Begin anew, or end, the imatrix of activations of all that is encoded and denoised.
        """

    def imatrix(self) -> dict:
        """
        Weight's name -> (sums of squares (n_matrices, n_per_row) float64, counts (n_matrices,) int64).
        """

    @property
    def tokens(self) -> object: ...

    @property
    def step_ops(self) -> dict:
        """
        What the last denoising step ran: ggml's operation name -> how many nodes of the graph.
        """

    @property
    def n_splits(self) -> int:
        """
        Into how many pieces the last graph was cut, one wherever the place changes.
        """

    def profile_step(self, by_operation: bool = False) -> dict:
        """
        Run the last step's graph again, part by part: name -> (seconds, operations, bytes read).
        """

    def encode(self, ids: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], return_hidden: bool = False, progress: object | None = None) -> object: ...

    @property
    def n_encoded(self) -> int:
        """Tokens put through the encoder so far."""

    def cache_rows(self) -> list:
        """Per layer (k, v), uint8 (n_rows, row_bytes): what a copy needs."""

    def restore(self, tokens: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], layers: Sequence[tuple[Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order='C', device='cpu', writable=False)], Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order='C', device='cpu', writable=False)]]]) -> None:
        """
        Take over the tokens and cache_rows() of another session of the same model and cache type.
        """

    def truncate(self, n: int) -> None: ...

    def denoise(self, canvas: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], self_conditioning: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)] | None) -> object: ...

    def begin(self, *, max_tokens: int, steps: int, t_min: float, t_max: float, entropy_bound: float, stability_threshold: int, confidence_threshold: float, seed: int, eos: Sequence[int], canvas: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)] | None = None, hold: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)] | None = None, dropped_mass: float = 0.0, canvas_length: int = 0, trim_after_eos: bool = False, guided: bool = False) -> None: ...

    def next_step(self) -> object:
        """One denoising step of the generation begun; None after its end."""

    def impose(self, tokens: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> object:
        """
        The second half of a guided step: its draft, and what the accepted positions take.
        """

    def amend(self, tokens: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> str:
        """
        After the step that finished a canvas: put these tokens in its place and go on behind them. Returns how they finish the generation, or nothing.
        """

    def candidates(self, k: int, extra: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> tuple:
        """
        Between the halves: the k likeliest tokens of each position (canvas_length, k), their logits, and the logits of the extra tokens (canvas_length, n_extra).
        """

    def cancel(self) -> None:
        """
        From any thread: the running or the next call raises GenerationCancelled.
        """

class Batch:
    """
    Denoises several sessions of a model in one graph. One thread at a time.
    """

    def __init__(self, model: Model) -> None: ...

    @property
    def n_graphs(self) -> int:
        """Graphs that the last step took; of few memory, several."""

    def next_steps(self, sessions: Sequence[Session]) -> list:
        """
        One step of each session's generation: its Step, None after its end, or the exception that ended it.
        """

def tensor_types() -> dict:
    """Type name -> (ggml's number, weights per block, bytes per block)."""

def quantize_rows(rows: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], type: str, n_threads: int = 0, importance: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)] | None = None) -> object:
    """
    Rows (n_rows, n_per_row) float32 -> blocks (n_rows, bytes_per_row) uint8.
    """

def dequantize_rows(data: Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order='C', device='cpu', writable=False)], type: str, n_per_row: int) -> object:
    """
    Blocks (n_rows, bytes_per_row) uint8 -> rows (n_rows, n_per_row) float32.
    """

def convert_rows(data: Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order='C', device='cpu', writable=False)], source: str, target: str, n_per_row: int, importance: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)] | None = None, keeps_nonfinite: bool = False) -> tuple:
    """
    Blocks (n_rows, bytes_per_row) uint8 of one type as those of another, on the calling thread, and -1 or the index of the first weight that is not finite, from whose rows on nothing was written.
    """

def find_nonfinite(data: Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order='C', device='cpu', writable=False)], type: str, n_per_row: int) -> int:
    """The index of the first weight that is not finite, or -1."""

def row_errors(data: Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order='C', device='cpu', writable=False)], type: str, rows: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)]) -> tuple:
    """
    Sums of squares of each of the rows (n_rows, n_per_row) float32, and of what the blocks differ from them: two of (n_rows,) float64.
    """

def step_temperature(step: int, steps: int, t_min: float, t_max: float) -> float: ...

def measure(logits: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], temperature: float, u: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> tuple: ...

def accept(entropy: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)], bound: float) -> object: ...

def random_draws(seed: int, canvas_index: int, step: int, n: int, n_vocab: int) -> tuple: ...

def version() -> dict:
    """
    Versions of what is linked in, and the instruction sets that it was built for.
    """

def measure_read_rate(n_threads: int, device: str = 'cpu') -> float:
    """
    Bytes per second read from memory; on a device, read and written by a copy.
    """

def measure_matrix_rate(n_threads: int, type: str, device: str = 'cpu', kernels: str = 'auto') -> float:
    """
    Operations per second of a 4096 x 4096 matrix of a tensor type times 256 columns.
    """

def kernels() -> list[str]:
    """The kernels of products that this processor has."""
