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
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    from triton_interpreter import mend

    mend(interpreter)
