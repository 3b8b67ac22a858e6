"""Launching: a kernel is looked up by what it was compiled for, once, and then started directly.

`kernel[grid](...)` analyses every argument at every call, which costs more host time than a small layer
has GPU time. Here the exact integers, dtypes and alignments are the key of a table of compiled kernels.
"""

from __future__ import annotations

import json
import threading
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

_compiled: dict[tuple[Any, ...], tuple[Any, ...]] = {}
_interpreter = threading.Lock()  # it keeps the program index, and patches triton.language, globally
_MAX_KERNELS = 4096  # keys, not compiled kernels: training on many lengths makes a key for each


def descriptor(t: Tensor, block: list[int]) -> TensorDescriptor:
    """`TensorDescriptor.from_tensor` without its checks, which `fits_tma` and the configs stand for.

    Fields with a default (padding, and what newer Tritons add) are left to the class.
    """
    d = TensorDescriptor.__new__(TensorDescriptor)
    d.base, d.shape, d.strides, d.block_shape = t, t.shape, t.stride(), block
    return d


def _compile_and_run(
    kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]
) -> Any:
    """Triton's own launch; where it stumbles over its cache on disk, the error says what to do."""
    try:
        return kernel[grid](*args, **options)
    except (OSError, json.JSONDecodeError) as error:
        raise RuntimeError(
            f"Triton failed to read or write a file while it compiled {kernel.__name__}, most likely in "
            f"its cache, {knobs.cache.dir}: {error}. Empty that folder, or let TRITON_CACHE_DIR name "
            "one that can be written"
        ) from error


def launch(
    kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **options: Any
) -> None:
    """``kernel[grid](*args, **options)`` on the current stream of ``device``.

    Args:
        kernel: a `triton.jit` function.
        grid (tuple[int, ...]): programs in each dimension.
        device (torch.device): where the tensors are.
        *args: the kernel's run-time arguments, in order.
        **options: its constexpr parameters, and launch options.
    """
    if device.type != "cuda":
        with _interpreter:
            _compile_and_run(kernel, grid, args, options)
        return
    if device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, grid, device, *args, **options)
        return
    # id(), since a JITFunction computes its hash at every call; those kept in the table never die.
    key: list[Any] = [id(kernel), device.index, *options.values()]
    for a in args:
        kind = type(a)
        if kind is int or a is None:
            key.append(a)
        elif kind is TensorDescriptor:
            key.append(a.base.dtype)
        elif kind is float:  # never specialised on
            key.append(float)
        else:
            key.append(a.dtype)
            key.append(a.data_ptr() & 15 == 0)
    signature = tuple(key)
    found = _compiled.get(signature)
    hook = knobs.runtime.launch_enter_hook  # a profiler's; a function in Triton 3.4, then a chain
    if found is None or (hook is not None and getattr(hook, "calls", True)):
        made = _compile_and_run(kernel, grid, args, options)
        names = getattr(kernel, "arg_names", None)
        if names is not None:
            if len(_compiled) >= _MAX_KERNELS:
                _compiled.clear()
            constants = tuple(options[name] for name in names[len(args) :])
            _compiled[signature] = (made.run, made.function, made.packed_metadata, constants)
        return
    run, function, metadata, constants = found
    run(
        grid[0],
        grid[1] if len(grid) > 1 else 1,
        1,
        torch._C._cuda_getCurrentRawStream(device.index),
        function,
        metadata,
        None,
        None,
        None,
        *args,
        *constants,
    )
