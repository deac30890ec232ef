"""How NumPy's matrix products are computed: by which kernels, in how many threads."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_CORE = "OPENBLAS_CORETYPE"
# What a processor must have for the kernels of a type, the fastest type first: OpenBLAS, `cpuid_x86.c`.
_CORES = {
    "SkylakeX": {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl", "avx2", "fma"},
    "Haswell": {"avx2", "fma"},
}
_CPU_INFO = Path("/proc/cpuinfo")


def choose_core(cpu_info: Path = _CPU_INFO) -> None:
    """Let OpenBLAS choose its kernels by what the processor can do, unless OPENBLAS_CORETYPE says otherwise.

    The OpenBLAS of NumPy 1.26 knows x86 processors by their model numbers, and takes its oldest kernels, four
    to five times slower, for one made after it (Emerald Rapids). By what a processor can do, all that have
    AVX-512 also compute the same bytes, and so do all that have AVX2 alone. Other processors are left alone.

    Nothing is chosen once NumPy is loaded: this process could not follow, and its children would differ.
    """
    if "numpy" in sys.modules or _CORE in os.environ:
        return
    try:
        # Whatever a firmware calls its processor, importing this package must not fail.
        with cpu_info.open(encoding="ascii", errors="replace") as lines:
            flags = next((line for line in lines if line.startswith("flags")), "")
    except OSError:
        return
    able = set(flags.split())
    for core, needed in _CORES.items():
        if needed <= able:
            os.environ[_CORE] = core
            return


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Within the block NumPy and SciPy compute a matrix product in one thread.

    OpenBLAS cuts a product by the number of its threads, so the last digits depend on that; MindSpore's do
    not. With one thread a result has the same bytes on any number of cores.
    """
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, user_api="blas"):
        yield
