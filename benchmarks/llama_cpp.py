"""llama.cpp's C interface, as xllamacpp exports it: ggml's own quantizers, and the logits of every position.

The structures are those of xllamacpp 2026.10.11549 (tests/engines/make_llama_cpp.sh); defaults that are not as expected
stop the benchmark.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from ctypes import POINTER, c_bool, c_byte, c_char_p, c_float, c_int8, c_int32, c_int64, c_size_t, c_uint32, c_void_p
from pathlib import Path

import gguf
import numpy
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

BATCH, MICRO_BATCH, F16 = 2048, 512, 1  # llama.cpp's defaults: tokens of a batch, of a part of it; type of the KV cache
F32 = 0
NO_FLASH_ATTENTION = 0
LOG = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)


class ModelParams(ctypes.Structure):
    """llama_model_params up to the last field that is set; the rest is passed on as it came."""

    _fields_ = (
        ("devices", c_void_p), ("overrides", c_void_p), ("n_gpu_layers", c_int32), ("rest", c_byte * 320),
    )  # fmt: skip


class ContextParams(ctypes.Structure):
    """llama_context_params, likewise."""

    _fields_ = (
        ("n_ctx", c_uint32), ("n_batch", c_uint32), ("n_ubatch", c_uint32), ("counts", c_uint32 * 4),
        ("n_threads", c_int32), ("n_threads_batch", c_int32), ("kinds", c_int32 * 4), ("flash_attention", c_int32),
        ("rope", c_float * 6), ("original_context", c_uint32), ("defragment", c_float), ("callback", c_void_p * 2),
        ("type_k", c_int32), ("type_v", c_int32), ("rest", c_byte * 512),
    )  # fmt: skip


class Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", c_int32), ("token", POINTER(c_int32)), ("embd", POINTER(c_float)), ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)), ("seq_id", POINTER(POINTER(c_int32))), ("logits", POINTER(c_int8)),
    )  # fmt: skip


SIGNATURES = {
    "llama_backend_init": (None,),
    "llama_log_set": (None, LOG, c_void_p),
    "llama_model_default_params": (ModelParams,),
    "llama_context_default_params": (ContextParams,),
    "llama_model_load_from_file": (c_void_p, c_char_p, ModelParams),
    "llama_init_from_model": (c_void_p, c_void_p, ContextParams),
    "llama_get_memory": (c_void_p, c_void_p),
    "llama_memory_clear": (None, c_void_p, c_bool),
    "llama_batch_init": (Batch, c_int32, c_int32, c_int32),
    "llama_batch_free": (None, Batch),
    "llama_decode": (c_int32, c_void_p, Batch),
    "llama_get_logits": (POINTER(c_float), c_void_p),
    "llama_free": (None, c_void_p),
    "llama_model_free": (None, c_void_p),
    "ggml_quantize_chunk": (c_size_t, c_int32, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p),
}


class LlamaCpp:
    def __init__(self, environment: Path) -> None:
        """environment: as make_llama_cpp.sh makes it."""
        (path,) = environment.glob("lib/python3*/site-packages/xllamacpp/xllamacpp.abi3.so")
        self.library = ctypes.CDLL(str(path))
        for name, (result, *arguments) in SIGNATURES.items():
            function = getattr(self.library, name)
            function.restype, function.argtypes = result, arguments
        self.silent = LOG(lambda level, text, user: None)  # kept: llama.cpp calls it as long as it runs
        self.library.llama_log_set(self.silent, None)
        self.library.llama_backend_init()

    def quantize(self, weight_NK: Tensor, kind: GGMLQuantizationType, importance_K: Tensor | None) -> numpy.ndarray:
        """Return ggml's blocks of a matrix, uint8 [N, bytes of a row]; importance_K: of the imatrix, mean squares."""
        weight_NK = weight_NK.float().contiguous()
        rows, columns = weight_NK.shape
        elements, size = gguf.GGML_QUANT_SIZES[kind]
        blocks = numpy.empty((rows, columns // elements * size), dtype=numpy.uint8)
        importance = None if importance_K is None else importance_K.float().contiguous()
        pointer = None if importance is None else importance.data_ptr()
        written = self.library.ggml_quantize_chunk(
            kind.value, weight_NK.data_ptr(), blocks.ctypes.data, 0, rows, columns, pointer
        )
        assert written == blocks.nbytes, (written, blocks.nbytes)
        return blocks

    def logits(self, path: Path, token_RT: Tensor, vocabulary: int) -> Iterator[Tensor]:
        """Yield fp32 [T, V] of each row of tokens. One thread, KV cache in fp32, no flash attention."""
        lib, length = self.library, token_RT.shape[1]
        model_params = lib.llama_model_default_params()
        model_params.n_gpu_layers = 0
        model = lib.llama_model_load_from_file(str(path).encode(), model_params)
        params = lib.llama_context_default_params()
        defaults = params.n_batch, params.n_ubatch, params.type_k, params.type_v
        assert model and defaults == (BATCH, MICRO_BATCH, F16, F16), (path, defaults)
        params.n_ctx = params.n_batch = params.n_ubatch = length
        params.n_threads = params.n_threads_batch = 1
        params.flash_attention, params.type_k, params.type_v = NO_FLASH_ATTENTION, F32, F32
        context = lib.llama_init_from_model(model, params)
        batch = lib.llama_batch_init(length, 0, 1)
        for row_T in token_RT.tolist():
            lib.llama_memory_clear(lib.llama_get_memory(context), True)
            batch.n_tokens = length
            for place, token in enumerate(row_T):
                batch.token[place], batch.pos[place] = token, place
                batch.n_seq_id[place], batch.seq_id[place][0], batch.logits[place] = 1, 0, 1
            assert lib.llama_decode(context, batch) == 0, path
            found = numpy.ctypeslib.as_array(lib.llama_get_logits(context), (length, vocabulary))
            yield torch.from_numpy(found.copy())
        lib.llama_batch_free(batch)
        lib.llama_free(context)
        lib.llama_model_free(model)
