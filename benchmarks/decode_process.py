"""`python -m benchmarks.decode_process FOLDER PROMPT`: load the embedded engine once, and report as JSON."""

import json
import sys
import time
from pathlib import Path


def main() -> None:
    """Measure from the start of the process, so that all imports count."""
    import psutil

    from msquant.checkpoint.transformers_import import leave_torch_out
    from msquant.flows.generation import load_engine
    from msquant.inference.embedded import EmbeddedEngine
    from msquant.inference.engine_protocol import Sampling

    process = psutil.Process()
    leave_torch_out()
    engine = load_engine(Path(sys.argv[1]), "embedded")
    assert isinstance(engine, EmbeddedEngine)
    load, processor = time.time() - process.create_time(), time.process_time()
    started = time.perf_counter()
    next(engine.tokens(engine.encode(sys.argv[2]), Sampling(max_tokens=2, ignore_eos=True)))
    first = time.perf_counter() - started
    result = {"load": load, "load_cpu": processor, "first": first, "memory": process.memory_info().rss}
    sys.stdout.write(json.dumps(result))


if __name__ == "__main__":
    main()
