"""The heap of a training process on a CPU: what is freed stays for the tensors to come, with few holes between them.

The C library gives big blocks back to the system, and they come again page by page, zeroed: 5 % of a step. Told to keep
them, glibc seldom uses a freed block for a tensor of the same size (its `memalign` looks for 96 bytes more, and small
objects have taken those), and a quarter to a half of its heap ends up as holes. heap.cpp, which torch asks in place of
malloc, has neither fault. It is compiled at the first start, in two seconds, where DeepSpeed keeps its own extensions.
"""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from pathlib import Path

from torch.utils.cpp_extension import load

logger = logging.getLogger("radllama")

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # of malloc.h
_LARGEST = 32 * 2**20  # value of M_MMAP_THRESHOLD


def return_freed_memory() -> None:
    """From now on a block of a megabyte or more goes back to the system when it is freed; what is free now, at once.

    For the first step, in which the optimizer makes its moments: in a heap they would come to lie between blocks that
    are freed, and cut up its room for all steps to come. Does nothing where the C library is not glibc.
    """
    _malloc(_M_MMAP_THRESHOLD, 2**20)


def keep_freed_memory() -> bool:
    """From now on freed memory is kept: in a heap of our own (True); where that cannot be compiled, in the C library's.

    Does nothing where there is no compiler and the C library is not glibc.
    """
    try:
        installed = library().install()
        reason = "no range of addresses"
    except Exception as error:  # no compiler, no ninja, a cache that cannot be written: each its own class
        installed, reason = False, type(error).__name__
    if installed:
        _malloc(_M_MMAP_THRESHOLD, _LARGEST)  # the scratch of matrix products is kept, too
        return True
    logger.info("the heap of radllama/heap.cpp cannot be used here (%s): the C library's takes more memory", reason)
    _malloc(_M_MMAP_MAX, 0)  # no block of its own for any allocation: all come from the heap
    _malloc(_M_TRIM_THRESHOLD, -1)  # whose end is never given back
    return False


def _malloc(option: int, value: int) -> None:
    """Set an option of glibc's malloc, and give back what is free now."""
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(option, value)
        libc.malloc_trim(0)
    except (OSError, AttributeError):  # another C library
        return


@cache
def library() -> ctypes.CDLL:
    """heap.cpp, compiled."""
    source = Path(__file__).with_suffix(".cpp")
    found = ctypes.CDLL(load("radllama_heap", [str(source)], extra_cflags=["-O2"], is_python_module=False))
    found.install.restype, found.most.restype = ctypes.c_bool, ctypes.c_size_t
    return found
