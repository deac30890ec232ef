"""How many threads NumPy's matrix products take."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Within the block NumPy and SciPy compute a matrix product in one thread.

    OpenBLAS cuts a product by the number of its threads, so the last digits depend on that; MindSpore's do
    not. With one thread a result has the same bytes on any number of cores.
    """
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, user_api="blas"):
        yield
