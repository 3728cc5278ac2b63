"""
The native runtime: GGUF files, models, sessions, sampler, quantization. Private; use pydiffusion.
"""

from collections.abc import Iterable, Sequence
from typing import Annotated

import numpy
from numpy.typing import NDArray

from pydiffusion._native import testing as testing


class TensorInfo:
    """A tensor's name, type, shape and location in a GGUF file."""

    @property
    def name(self) -> object: ...

    @property
    def type(self) -> str: ...

    @property
    def shape(self) -> tuple:
        """Dimensions in numpy order, slowest first."""

    @property
    def offset(self) -> int:
        """Bytes from the start of the file (of its part if split)."""

    @property
    def n_bytes(self) -> int: ...

    @property
    def part(self) -> int:
        """0-based part of a split file."""

    def __repr__(self) -> str: ...

class GgufFile:
    """
    A GGUF file of any architecture, memory-mapped and validated.

    Raises ModelFormatError, naming the key or tensor, if the file is not valid GGUF.
    """

    def __init__(self, path: str) -> None: ...

    @staticmethod
    def open_all_parts(path: str) -> GgufFile:
        """
        Open a file, or all parts of a split file, given its first part, as one.
        """

    @property
    def path(self) -> object: ...

    @property
    def paths(self) -> list:
        """Paths of all parts; one path if the file is not split."""

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
        """Keys and values in file order; a new dict at each access."""

    @property
    def other_kind(self) -> object:
        """
        The kind of a GGUF without a model, and what to do with it; empty for a model.
        """

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

    def __init__(self, path: str, n_threads: int, kv_type: str = 'auto', progress: object | None = None, device: str = 'cpu', n_gpu_layers: int = -1, n_cpu_moe: int = -1, memory_limits: Sequence[int] = [], n_ctx: int = 8192, kernels: str = 'auto', n_sessions: int = 1, dense_type: str = 'auto', mmproj: str = '') -> None: ...

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
    def image_tokens(self) -> dict[str, int]: ...

    @property
    def bidirectional_images(self) -> bool: ...

    @property
    def n_ctx_train(self) -> int: ...

    @property
    def n_threads(self) -> int: ...

def devices() -> list:
    """The GPUs that this build can use."""

def why_no_device(name: str) -> str:
    """Why a name that is not in devices() can't be used."""

def plan(path: str, device: str, memory_limits: Sequence[int] = [], n_gpu_layers: int = -1, n_cpu_moe: int = -1, n_ctx: int = 8192, kv_type: str = 'auto', n_sessions: int = 1, dense_type: str = 'auto', mmproj: str = '') -> dict:
    """
    Plan which layers and experts go to which device, with the memory that each needs; with the file of a vision tower also that of the tower, which the main device has.
    """

def memory_use(header: bytes, n_ctx: int) -> dict:
    """
    Memory that a model takes on a device with one session, from the header of its file alone: dict of weight_bytes, cache_bytes, step_bytes, and reserved_bytes to keep free besides.
    """

class Adapter:
    """
    Low-rank changes of a model's matrices (LoRA); immutable, shared by sessions.
    """

    def __init__(self, model: Model, name: str, targets: Iterable) -> None:
        """
        targets: (tensor, side, a, b) of each change b @ a, pulled one at a time: the matrix's name without '.weight'; 'encoder', 'decoder' or 'both'; a (rank, n_in) and b (n_out, rank) float32, of experts with their number first.
        """

    def __eq__(self, other: object, /) -> bool: ...

    def __hash__(self) -> int: ...

    @property
    def name(self) -> object: ...

    @property
    def n_bytes(self) -> int:
        """Bytes of its factors, on whatever device they are."""

    @property
    def n_targets(self) -> int: ...

    @property
    def rank(self) -> int:
        """The largest of its factors."""

    @property
    def n_owners(self) -> int:
        """Objects like this one, and sessions, that keep its factors in memory."""

class Step:
    """
    Result of one denoising step; arrays have one entry per canvas position.
    """

    @property
    def canvas_index(self) -> int: ...

    @property
    def step(self) -> int:
        """Counts down from the number of steps to 1."""

    @property
    def draft(self) -> Annotated[NDArray[numpy.int32], dict(shape=(None,))]:
        """argmax, int32"""

    @property
    def canvas(self) -> Annotated[NDArray[numpy.int32], dict(shape=(None,))]:
        """input of the next step, int32"""

    @property
    def entropy(self) -> Annotated[NDArray[numpy.float32], dict(shape=(None,))]:
        """nats, float32"""

    @property
    def accepted(self) -> Annotated[NDArray[numpy.bool_], dict(shape=(None,))]:
        """bool"""

    @property
    def canvas_done(self) -> bool: ...

    @property
    def tokens(self) -> Annotated[NDArray[numpy.int32], dict(shape=(None,))]:
        """
        If canvas_done: the canvas, cut before the first eos and at max_tokens, int32; else empty.
        """

    @property
    def finish(self) -> str: ...

    @property
    def timings(self) -> dict[str, float]:
        """Seconds of the generation so far."""

def token_array(ids: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], n_vocab: int) -> Annotated[NDArray[numpy.int32], dict(shape=(None,))]:
    """Token ids as int32; raises ValueError for one outside the vocabulary."""

class Session:
    """
    State of one conversation on a model. Use it from one thread at a time.
    """

    def __init__(self, model: Model, n_ctx: int, image_tokens: int = 0) -> None:
        """
        image_tokens: most soft tokens of an image that the cache is to have room for.
        """

    @property
    def n_past(self) -> int: ...

    @property
    def n_ctx(self) -> int: ...

    @property
    def cache_bytes(self) -> int: ...

    def set_adapters(self, adapters: Sequence[tuple[Adapter, float]]) -> None:
        """
        Use these adapters, each with the factor of its changes, from now on. Others than before end the generation, and the content is encoded anew before anything next reads it.
        """

    @property
    def adapters(self) -> list[tuple[Adapter, float]]: ...

    def collect_imatrix(self, on: bool) -> None:
        """
        Start a new imatrix over everything encoded and denoised from now on, or discard it.
        """

    def imatrix(self) -> dict:
        """
        Weight name -> (sums of squares (n_matrices, n_per_row) float64, counts (n_matrices,) int64).
        """

    def trace_layers(self, on: bool) -> None:
        """
        Start a new trace of the layers of everything encoded and denoised from now on, or discard it.
        """

    def layer_trace(self) -> dict:
        """
        (layer, name) -> values (n_tokens, width) float32: input of the first layer, and of each its hidden states after attention, the output of its dense MLP, its router's scores times sqrt(d), its output.
        """

    @property
    def tokens(self) -> Annotated[NDArray[numpy.int32], dict(shape=(None,))]: ...

    @property
    def step_ops(self) -> dict:
        """Operations of the last denoising step: name -> number of graph nodes."""

    @property
    def n_splits(self) -> int:
        """
        Number of splits of the last graph; a new one begins wherever the device changes.
        """

    def profile_step(self, by_operation: bool = False) -> dict:
        """
        Run the last step's graph again, part by part: name -> (seconds, operations, bytes read).
        """

    def encode(self, ids: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], images: Sequence[tuple[int, Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], bytes]] = [], return_hidden: bool = False, progress: object | None = None) -> Annotated[NDArray[numpy.float32], dict(shape=(None, None))] | None:
        """
        images: (index in ids of the first soft token, features (n, d), key) of each, in order; at its places ids has the image token.
        """

    @property
    def images(self) -> list[tuple[int, int, bytes]]:
        """
        Images in the cache: (position of the first soft token, number of soft tokens, key).
        """

    def image_features(self, i: int) -> Annotated[NDArray[numpy.float32], dict(shape=(None, None))]:
        """Of images[i], a copy, (n, d)."""

    def next_logits(self, ids: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> Annotated[NDArray[numpy.float32], dict(shape=(None,))]:
        """
        Encode ids and return the soft-capped logits of the token that would follow them when the model is read causally, (n_vocab,) float32.
        """

    @property
    def n_encoded(self) -> int:
        """Number of tokens encoded so far."""

    def cache_rows(self) -> list:
        """Per layer (k, v), uint8 (n_rows, row_bytes), for restore()."""

    def restore(self, tokens: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], layers: Sequence[tuple[Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order='C', device='cpu', writable=False)], Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order='C', device='cpu', writable=False)]]], images: Sequence[tuple[int, Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], bytes]] = []) -> None:
        """
        Replace the content by tokens, cache_rows() and images of a session of the same model and KV cache type.
        """

    def copy_from(self, source: Session) -> None:
        """
        Replace the content by a copy of another session's, which may have another n_ctx; the session itself: nothing happens.
        """

    def truncate(self, n: int) -> None: ...

    def denoise(self, canvas: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], self_conditioning: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)] | None) -> Annotated[NDArray[numpy.float32], dict(shape=(None, None))]: ...

    def begin(self, *, max_tokens: int, seed: int, eos: Sequence[int], canvas: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)] | None = None, hold: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)] | None = None, dropped_mass: float = 0.0, canvas_length: int = 0, trim_after_eos: bool = False, guided: bool = False, **sampler_options) -> None:
        """
        Start a generation. sampler_options: all options of the model's sampler, see sampler_options().
        """

    def next_step(self) -> Step | None:
        """Run one denoising step of the generation; None after its end."""

    def impose(self, tokens: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> Step:
        """
        Second half of a guided step: these tokens are its draft and fill the accepted positions.
        """

    def amend(self, tokens: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> str:
        """
        After the step that finished a canvas: replace it by these tokens and continue after them. Returns the finish reason if they end the generation, else an empty string.
        """

    def candidates(self, k: int, extra: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> tuple[Annotated[NDArray[numpy.int32], dict(shape=(None, None))], Annotated[NDArray[numpy.float32], dict(shape=(None, None))], Annotated[NDArray[numpy.float32], dict(shape=(None, None))]]:
        """
        Between the halves of a guided step: the top k tokens of each position (canvas_length, k), their logits, and the logits of the extra tokens (canvas_length, n_extra).
        """

    def cancel(self) -> None:
        """
        Make the current or next call raise GenerationCancelled; may be called from any thread.
        """

class Batch:
    """
    Batched denoising of several sessions of a model in one graph. Use it from one thread at a time.
    """

    def __init__(self, model: Model) -> None: ...

    @property
    def n_graphs(self) -> int:
        """
        Number of graphs used by the last step; more than 1 if memory for one ran out.
        """

    def next_steps(self, sessions: Sequence[Session]) -> list[Step | Exception | None]:
        """
        Run one step of each session's generation. Per session: its Step, None if its generation has ended, or the exception that ended it.
        """

def tensor_types() -> dict:
    """Type name -> (number in ggml, weights per block, bytes per block)."""

def quantize_rows(rows: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], type: str, n_threads: int = 1, importance: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)] | None = None) -> Annotated[NDArray[numpy.uint8], dict(shape=(None, None))]:
    """
    Quantize rows (n_rows, n_per_row) float32 -> blocks (n_rows, bytes_per_row) uint8.
    """

def dequantize_rows(data: Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order='C', device='cpu', writable=False)], type: str, n_per_row: int) -> Annotated[NDArray[numpy.float32], dict(shape=(None, None))]:
    """
    Dequantize blocks (n_rows, bytes_per_row) uint8 -> rows (n_rows, n_per_row) float32.
    """

def convert_rows(data: Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order='C', device='cpu', writable=False)], source: str, target: str, n_per_row: int, importance: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)] | None = None, keeps_nonfinite: bool = False) -> tuple[Annotated[NDArray[numpy.uint8], dict(shape=(None, None))], int]:
    """
    Convert blocks (n_rows, bytes_per_row) uint8 to another type on the calling thread. Returns them and -1, or the index of the first non-finite weight; rows from its chunk on are then undefined.
    """

def find_nonfinite(data: Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order='C', device='cpu', writable=False)], type: str, n_per_row: int) -> int:
    """Index of the first non-finite weight, or -1."""

def row_errors(data: Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order='C', device='cpu', writable=False)], type: str, rows: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)]) -> tuple[Annotated[NDArray[numpy.float64], dict(shape=(None,))], Annotated[NDArray[numpy.float64], dict(shape=(None,))]]:
    """
    Per row, the sum of squares of `rows` (n_rows, n_per_row) float32 and the sum of squared errors of the quantized `data`: two arrays (n_rows,) float64.
    """

CANVAS_LENGTH_KEY: str = 'diffusion.canvas_length'

def samplers_of_architectures() -> dict:
    """Name of the architecture -> name of its models' sampler."""

def sampler_options() -> dict:
    """
    Options of each sampler that a file can set: by sampler, dicts of name, key, integer, default, low, high.
    """

def step_temperature(step: int, steps: int, t_min: float, t_max: float) -> float: ...

def measure(logits: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], temperature: float, u: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> tuple[Annotated[NDArray[numpy.int32], dict(shape=(None,))], Annotated[NDArray[numpy.float32], dict(shape=(None,))], Annotated[NDArray[numpy.int32], dict(shape=(None,))]]: ...

def accept(entropy: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)], bound: float) -> Annotated[NDArray[numpy.bool_], dict(shape=(None,))]: ...

def random_draws(seed: int, canvas_index: int, step: int, n: int, n_vocab: int) -> tuple[Annotated[NDArray[numpy.float32], dict(shape=(None,))], Annotated[NDArray[numpy.int32], dict(shape=(None,))]]: ...

def version() -> dict:
    """
    Versions of the linked libraries, and the instruction sets that they were built for.
    """

def measure_read_rate(n_threads: int, device: str = 'cpu') -> float:
    """
    Memory bandwidth in bytes per second: reads on the CPU; on a device, reads and writes of a copy.
    """

def measure_matrix_rate(n_threads: int, type: str, device: str = 'cpu', kernels: str = 'auto') -> float:
    """
    Operations per second of a matmul: a 4096 x 4096 matrix of a tensor type times 256 activations.
    """

def kernels() -> list[str]:
    """Names of the matmul kernels that this CPU supports."""

class Vision:
    """
    Vision tower and projector of a mmproj file, for a model; immutable, shared by threads.
    """

    def __init__(self, path: str, model: Model) -> None: ...

    def encode(self, patches: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], positions: Annotated[NDArray[numpy.int32], dict(shape=(None, None), order='C', device='cpu', writable=False)]) -> Annotated[NDArray[numpy.float32], dict(shape=(None, None))]:
        """
        Features of an image's soft tokens: float32 (n // pooling**2, projection_dim). patches: float32 (n, 3 * patch_size**2), pixels from 0 to 1 with their channels side by side; positions: int32 (n, 2), column and row of each patch, together a full grid.
        """

    @property
    def info(self) -> dict: ...
