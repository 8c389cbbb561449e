"""oneMKL's inspector-executor sparse product, out of the `mkl` wheel's libmkl_rt.

The library is loaded beside torch's own MKL, which is linked into torch: it looks its names up in itself first
(RTLD_DEEPBIND) and shows them to nobody (RTLD_LOCAL). One process has one threading layer: GNU's OpenMP, whose pool
torch uses too; on one thread it opens no parallel region.
"""

import ctypes
import os
import weakref
from collections.abc import Callable
from ctypes import POINTER, byref, c_float, c_int, c_void_p
from functools import cache
from importlib.metadata import PackageNotFoundError, files

import pytest
import torch
from torch import Tensor

NON_TRANSPOSED, GENERAL, ZERO_BASED, ROW_MAJOR, COLUMN_MAJOR, AGGRESSIVE, GNU = 10, 20, 0, 101, 102, 1, 3
CALLS = 1_000_000  # expected
STATUS = ["success", "not initialised", "out of memory", "invalid value", "failed", "internal error", "not supported"]


class Description(ctypes.Structure):
    """matrix_descr."""

    _fields_ = (("type", c_int), ("mode", c_int), ("diag", c_int))


GENERAL_MATRIX = Description(GENERAL, 0, 0)


@cache
def library() -> ctypes.CDLL:
    try:
        listed = files("mkl") or []
    except PackageNotFoundError:
        pytest.skip("mkl is not installed: pip install 'pykd[peers]'")
    path = next(file.locate().resolve() for file in listed if file.name.startswith("libmkl_rt.so"))
    mkl = ctypes.CDLL(str(path), mode=os.RTLD_NOW | os.RTLD_LOCAL | os.RTLD_DEEPBIND)
    mkl.MKL_Set_Threading_Layer(GNU)
    arrays = [c_int] * 2 + [c_void_p] * 4
    mkl.mkl_sparse_s_create_csr.argtypes = [POINTER(c_void_p), c_int, *arrays]
    mkl.mkl_sparse_s_create_bsr.argtypes = [POINTER(c_void_p), c_int, c_int, *arrays[:2], c_int, *arrays[2:]]
    mkl.mkl_sparse_set_mv_hint.argtypes = [c_void_p, c_int, Description, c_int]
    mkl.mkl_sparse_set_mm_hint.argtypes = [c_void_p, c_int, Description, c_int, c_int, c_int]
    return mkl


def check(call: str, status: int) -> None:
    if status:
        pytest.skip(f"MKL's {call} says: {STATUS[status]}")


def product(weight: Tensor, x: Tensor, out: Tensor, threads: int, *, transposed: bool) -> Callable[..., Tensor]:
    """A call that multiplies what ``x`` holds by a weight [out, in], into ``out`` or a tensor like it that it is given.

    Args:
        weight: CSR, or BSR of square blocks, float32.
        x: the vectors: columns of [in, vectors] where ``transposed``, else rows of [vectors, in]; contiguous.
        out: likewise.
    """
    mkl, handle, (rows, columns) = library(), c_void_p(), weight.shape
    arrays = weight.crow_indices().int(), weight.col_indices().int(), weight.values().contiguous()
    begins, indices, values = (array.data_ptr() for array in arrays)
    pointers = begins, begins + 4, indices, values
    mkl.MKL_Set_Num_Threads(threads)
    if weight.layout == torch.sparse_bsr:
        side = arrays[2].shape[1]
        grid = rows // side, columns // side
        status = mkl.mkl_sparse_s_create_bsr(byref(handle), ZERO_BASED, ROW_MAJOR, *grid, side, *pointers)
    else:
        status = mkl.mkl_sparse_s_create_csr(byref(handle), ZERO_BASED, rows, columns, *pointers)
    check("mkl_sparse_s_create", status)
    vectors, layout = x.numel() // columns, ROW_MAJOR if transposed else COLUMN_MAJOR
    if vectors == 1:
        check("hint", mkl.mkl_sparse_set_mv_hint(handle, NON_TRANSPOSED, GENERAL_MATRIX, CALLS))
        function, middle, end = mkl.mkl_sparse_s_mv, (), ()
    else:
        check("hint", mkl.mkl_sparse_set_mm_hint(handle, NON_TRANSPOSED, GENERAL_MATRIX, layout, vectors, CALLS))
        function, middle = mkl.mkl_sparse_s_mm, (c_int(vectors), c_int(vectors if transposed else columns))
        end = (c_int(vectors if transposed else rows),)
    mkl.mkl_sparse_set_memory_hint(handle, AGGRESSIVE)
    check("mkl_sparse_optimize", mkl.mkl_sparse_optimize(handle))
    layouts = (c_int(layout),) if vectors > 1 else ()
    to = c_void_p()
    arguments = (c_int(NON_TRANSPOSED), c_float(1), handle, GENERAL_MATRIX, *layouts, c_void_p(x.data_ptr()), *middle)
    arguments += (c_float(0), to, *end)

    def call(out: Tensor = out, keep: object = (arrays, x)) -> Tensor:
        to.value = out.data_ptr()
        function(*arguments)
        return out

    weakref.finalize(call, mkl.mkl_sparse_destroy, handle)
    return call
