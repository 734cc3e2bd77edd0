"""llama.cpp's flash attention on the CPU (``ggml_flash_attn_ext``): a peer in ``bench attend``.

It is called through ctypes in the ggml libraries that the ``llama-cpp-python`` package carries, or
in the folder that the environment variable ``SVDQ_GGML_LIB`` names. Neither is ever needed.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

LIBRARY_VARIABLE = "SVDQ_GGML_LIB"
PACKAGE = "llama_cpp"
F32 = 0
# The types of caches that llama.cpp offers, by ggml's numbers, and their bits a number.
CACHE_TYPES = {"f16": (1, 16.0), "q8_0": (8, 8.5), "q4_0": (2, 4.5)}
OVERHEAD_BYTES = 1 << 20  # of a context: headers of tensors and a graph of one node


class _InitParams(ctypes.Structure):
    _fields_ = [
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    ]


def library_folder() -> Path | None:
    """The folder of ggml's libraries, None without one."""
    named = os.environ.get(LIBRARY_VARIABLE)
    if named:
        return Path(named)
    package = find_spec(PACKAGE)
    if package is None or not package.submodule_search_locations:
        return None
    return Path(package.submodule_search_locations[0]) / "lib"


def missing() -> str | None:
    """Why ggml cannot be timed here, in one line; None if it can."""
    folder = library_folder()
    if folder is None:
        return (
            "ggml is left out: llama-cpp-python is not installed and "
            f"{LIBRARY_VARIABLE} names no folder with its libraries."
        )
    absent = [name for name in ("base", "cpu") if not (folder / f"libggml-{name}.so").exists()]
    if absent:
        return f"ggml is left out: {folder} has no libggml-{absent[0]}.so."
    return None


@functools.cache
def _libraries(folder: Path) -> tuple[ctypes.CDLL, ctypes.CDLL]:
    base = ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
    cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"), mode=ctypes.RTLD_GLOBAL)
    pointer, number, size = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t
    signatures = [
        (base.ggml_init, pointer, [_InitParams]),
        (base.ggml_free, None, [pointer]),
        (base.ggml_new_tensor_3d, pointer, [pointer, ctypes.c_int, number, number, number]),
        (base.ggml_get_data, pointer, [pointer]),
        (base.ggml_nbytes, size, [pointer]),
        (base.ggml_row_size, size, [ctypes.c_int, number]),
        (
            base.ggml_quantize_chunk,
            size,
            [ctypes.c_int, pointer, pointer, number, number, number, pointer],
        ),
        (base.ggml_flash_attn_ext, pointer, [pointer] * 5 + [ctypes.c_float] * 3),
        (base.ggml_new_graph, pointer, [pointer]),
        (base.ggml_build_forward_expand, None, [pointer, pointer]),
        (base.ggml_backend_graph_compute, ctypes.c_int, [pointer, pointer]),
        (base.ggml_backend_free, None, [pointer]),
        (cpu.ggml_backend_cpu_init, pointer, []),
        (cpu.ggml_backend_cpu_set_n_threads, None, [pointer, ctypes.c_int]),
    ]
    for function, result, arguments in signatures:
        function.restype, function.argtypes = result, arguments
    return base, cpu


class FlashAttention:
    """One decode step over keys and values in a cache type of llama.cpp.

    Parameters
    ----------
    query : [Hq, D] float32.
    keys, values : [H, T, D] float32; quantized by ggml's own functions.
    cache_type : a name of ``CACHE_TYPES``.
    """

    def __init__(self, query: Tensor, keys: Tensor, values: Tensor, cache_type: str) -> None:
        why = missing()
        if why is not None:
            raise RuntimeError(why)
        self._base, cpu = _libraries(library_folder())
        number, _ = CACHE_TYPES[cache_type]
        heads, tokens, dim = keys.shape
        qo_heads = query.shape[0]
        one = self._base.ggml_row_size(number, dim) * tokens * heads
        room = 2 * one + 8 * query.nbytes + OVERHEAD_BYTES
        self._context = self._base.ggml_init(_InitParams(room, None, False))
        self._backend = cpu.ggml_backend_cpu_init()
        cpu.ggml_backend_cpu_set_n_threads(self._backend, torch.get_num_threads())
        q = self._base.ggml_new_tensor_3d(self._context, F32, dim, 1, qo_heads)
        query = query.float().contiguous()
        ctypes.memmove(self._base.ggml_get_data(q), query.data_ptr(), query.nbytes)
        packed = [self._quantize(number, rows.float().contiguous()) for rows in (keys, values)]
        self._out = self._base.ggml_flash_attn_ext(
            self._context, q, *packed, None, dim**-0.5, 0.0, 0.0
        )
        self._graph = self._base.ggml_new_graph(self._context)
        self._base.ggml_build_forward_expand(self._graph, self._out)
        self._shape = (qo_heads, dim)
        self.num_bytes = sum(self._base.ggml_nbytes(tensor) for tensor in packed)

    def _quantize(self, number: int, rows: Tensor) -> int:
        heads, tokens, dim = rows.shape
        tensor = self._base.ggml_new_tensor_3d(self._context, number, dim, tokens, heads)
        data = self._base.ggml_get_data(tensor)
        self._base.ggml_quantize_chunk(number, rows.data_ptr(), data, 0, heads * tokens, dim, None)
        return tensor

    def run(self) -> None:
        """Attend once."""
        status = self._base.ggml_backend_graph_compute(self._backend, self._graph)
        if status != 0:
            raise RuntimeError(f"ggml_backend_graph_compute returned {status}")

    def output(self) -> Tensor:
        """Output of the last run, [Hq, D] float32."""
        out = torch.empty(self._shape)
        ctypes.memmove(out.data_ptr(), self._base.ggml_get_data(self._out), out.nbytes)
        return out

    def __del__(self) -> None:
        """Give ggml's memory back."""
        if getattr(self, "_backend", None):
            self._base.ggml_backend_free(self._backend)
        if getattr(self, "_context", None):
            self._base.ggml_free(self._context)


def ggml_call(
    query: Tensor, keys: Tensor, values: Tensor, cache_type: str, working_set_bytes: int
) -> tuple[Callable[[int], object], int, int]:
    """A call that rotates among copies, the bytes that one reads, and the number of copies."""
    first = FlashAttention(query, keys, values, cache_type)
    copies = max(1, -(-working_set_bytes // first.num_bytes))
    layers = [first, *(FlashAttention(query, keys, values, cache_type) for _ in range(copies - 1))]
    return lambda index: layers[index % copies].run(), first.num_bytes, copies
