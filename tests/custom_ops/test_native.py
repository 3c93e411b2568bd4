"""C kernels: compiled once, kept by what they are made of, and never missing in silence."""

import ctypes
import os
import shutil
import struct
import textwrap
from pathlib import Path

import pytest
import torch

from autodeploy.custom_ops import native
from autodeploy.custom_ops.attention import paged_attention
from autodeploy.custom_ops.native import Kernel, NativeError, library_path
from autodeploy.custom_ops.norm import rms_norm
from autodeploy.custom_ops.op import Choice

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """An empty folder of libraries, and nothing remembered."""
    monkeypatch.setenv("AUTODEPLOY_CACHE", str(tmp_path / "cache"))
    native._library.cache_clear()
    native._say_once.cache_clear()
    yield
    native._library.cache_clear()
    native._say_once.cache_clear()


def write(folder, body):
    source = folder / "kernel.c"
    source.write_text(textwrap.dedent(body))
    return source


DOUBLE = """
    #include <omp.h>
    #include "native.h"
    typedef struct { float *values; int64_t count; } Call;
    int twice(const Call *c) {
        for (int64_t i = 0; i < c->count; i++) c->values[i] *= 2.0f;
        return omp_get_max_threads();
    }
"""


def libraries(folder):
    return sorted(p.name for p in (folder / "cache" / "native").iterdir())


@needs_compiler
def test_a_kernel_is_compiled_once_and_shares_the_threads_of_torch(tmp_path):
    kernel = Kernel(write(tmp_path, DOUBLE), "twice")
    values = torch.arange(5.0)
    before = torch.get_num_threads()
    try:
        for threads in (2, 1):
            torch.set_num_threads(threads)
            # torch sets the count of the OpenMP runtime it has; seeing it here means one runtime
            assert kernel(struct.pack("Qq", values.data_ptr(), 5)) == threads
    finally:
        torch.set_num_threads(before)
    assert values.tolist() == [0.0, 4.0, 8.0, 12.0, 16.0]
    made = (tmp_path / "cache" / "native").glob("kernel-*.so")
    (path,) = made
    stamp = path.stat().st_mtime_ns
    native._library.cache_clear()
    Kernel(kernel.source, "twice")(struct.pack("Qq", values.data_ptr(), 0))
    assert path.stat().st_mtime_ns == stamp
    assert libraries(tmp_path) == [path.name]


@needs_compiler
def test_another_source_is_another_library(tmp_path):
    source = write(tmp_path, DOUBLE)
    before = library_path(source, "cc")
    assert library_path(source, "cc") == before
    source.write_text(source.read_text().replace("2.0f", "3.0f"))
    assert library_path(source, "cc") != before


@needs_compiler
def test_a_kernel_that_does_not_compile_names_the_line_and_leaves_nothing(tmp_path):
    kernel = Kernel(write(tmp_path, "int broken(const void *c) { return missing; }\n"), "broken")
    with pytest.raises(NativeError, match=r"failed on kernel\.c: .*'missing'|kernel\.c"):
        kernel(b"")
    assert libraries(tmp_path) == []


@needs_compiler
def test_a_compiler_that_fails_leaves_the_work_to_the_next(tmp_path, monkeypatch):
    programs = tmp_path / "programs"
    programs.mkdir()
    broken = programs / "cc"
    broken.write_text("#!/bin/sh\necho no licence >&2\nexit 1\n")
    broken.chmod(0o755)
    path = os.environ["PATH"]
    monkeypatch.setenv("PATH", str(programs))
    kernel = Kernel(write(tmp_path, DOUBLE), "twice")
    with pytest.raises(NativeError, match=r"failed on kernel\.c: no licence; install a C11"):
        kernel(b"")
    (programs / "gcc").symlink_to(shutil.which("cc", path=path))
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{path}")
    native._library.cache_clear()
    values = torch.ones(3)
    kernel(struct.pack("Qq", values.data_ptr(), 3))
    assert values.tolist() == [2.0, 2.0, 2.0]


def test_of_several_openmp_runtimes_the_one_of_torch_is_linked(tmp_path):
    native._openmp_runtime.cache_clear()
    own = native._openmp_runtime()
    if own is None or not str(own).startswith(str(Path(torch.__file__).parent)):
        pytest.skip("torch brings no libgomp of its own")
    other = tmp_path / "libgomp.so.1"
    shutil.copy(own, other)
    ctypes.CDLL(str(other))
    native._openmp_runtime.cache_clear()
    assert str(other) in Path("/proc/self/maps").read_text()
    assert native._openmp_runtime() == own


@needs_compiler
def test_a_folder_that_cannot_be_written_says_what_to_set(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AUTODEPLOY_CACHE", str(tmp_path / "file"))
    with pytest.raises(NativeError, match="set AUTODEPLOY_CACHE to a folder"):
        Kernel(write(tmp_path, DOUBLE), "twice")(b"")


def test_without_a_compiler_plain_torch_serves_and_says_so_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("PATH", str(tmp_path))
    q, index = torch.empty(1, 4, 16), torch.zeros(1, dtype=torch.int32)
    args = (q, q, q, q[None], q[None], index, index, index[None], index.long(), 0.5)
    choice = Choice(torch.device("cpu"), paged_attention.bind(args, {}))
    for _ in range(3):
        assert paged_attention.choose(choice).name == "torch_cpu"
    norm = Choice(torch.device("cpu"), rms_norm.bind((q, None, 1e-5), {}))
    assert rms_norm.choose(norm).name == "reference"
    said = [record.message for record in caplog.records]
    assert len(said) == 2
    assert "paged_attention runs as 'torch_cpu', which is slower" in said[0]
    assert all("install one, such as gcc" in sentence for sentence in said)


@needs_compiler
def test_with_a_compiler_the_kernels_serve(caplog):
    for dtype in (torch.float32, torch.bfloat16):
        q, index = torch.empty(1, 4, 16, dtype=dtype), torch.zeros(1, dtype=torch.int32)
        args = (q, q, q, q[None], q[None], index, index, index[None], index.long(), 0.5)
        choice = Choice(torch.device("cpu"), paged_attention.bind(args, {}))
        assert paged_attention.choose(choice).name == "native_cpu"
    half = {name: torch.empty(1, 4, 16, dtype=torch.half) for name in ("q", "k", "v")}
    caches = {name: torch.empty(1, 1, 4, 16, dtype=torch.half) for name in ("k_cache", "v_cache")}
    choice = Choice(torch.device("cpu"), choice.args | half | caches)
    assert paged_attention.choose(choice).name == "torch_cpu"
    assert caplog.text == ""
