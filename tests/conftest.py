"""Settings of the whole suite."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # Read when torch is imported, and by the processes that tests start: workers share the cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    # Read by triton when it is first imported: kernels are checked in its interpreter.
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_xdist_auto_num_workers():
    """What `-n auto` means. More than 8 would wait for the longest files, and each takes memory."""
    mine = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())
    return min(len(mine), 8)


def pytest_configure():
    """Mends triton's interpreter where kernels compiled for a GPU are right (triton 3.6)."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    _mend_ranges(interpreter)
    _mend_dots(interpreter)


def _mend_ranges(interpreter):
    """Loops over a range of loaded numbers: numpy 2.4 makes no int of an array of one element."""
    patch_tensor = interpreter._patch_lang_tensor

    class Scope:
        def __init__(self, scope):
            self.scope = scope

        def set_attr(self, owner, name, value):
            item = (lambda tensor: tensor.handle.data.item()) if name == "__index__" else value
            self.scope.set_attr(owner, name, item)

    interpreter._patch_lang_tensor = lambda tensor, scope: patch_tensor(tensor, Scope(scope))


def _mend_dots(interpreter):
    """Products of bfloat16: their bits, kept as integers, are multiplied as integers."""
    create_dot = interpreter.InterpreterBuilder.create_dot

    def float32(handle):
        if handle.dtype.scalar is not interpreter.tl.bfloat16:
            return handle
        bits = handle.data.astype("uint32") << 16
        return interpreter.TensorHandle(bits.view("float32"), interpreter.tl.float32)

    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *others: create_dot(
        self, float32(a), float32(b), *others
    )
