"""Asks every node of a running Ray cluster what it has; run as a script, by the Python that has Ray.

It imports nothing of msquant, and what runs on the other nodes is sent to them whole: they need no msquant.
The only argument is a JSON object: `address` of the cluster (`auto`: the one that this machine belongs to),
`folder` of the model, `packages` whose versions are wanted, `variables` whose values are. One JSON object
comes back on stdout:

    {"nodes": [{"address": IP, "npus": N, "free_npus": N, "host": NAME, "python": VERSION,
                "packages": {NAME: VERSION or null}, "variables": {NAME: VALUE or null},
                "cann": TEXT or null, "interfaces": [NAME], "model": DIGEST or null}]}
    {"error": TEXT}
"""

import json
import logging
import os
import sys
from typing import Any

SECONDS = 60.0


def look(folder: str, packages: list[str], variables: list[str]) -> dict[str, Any]:
    """What a node has; all that it uses is imported here, because it runs on other nodes."""
    import hashlib
    import os
    import platform
    import socket
    from importlib.metadata import PackageNotFoundError, version
    from pathlib import Path

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    model = None
    if (Path(folder) / "config.json").is_file():
        digest = hashlib.sha256((Path(folder) / "config.json").read_bytes())
        for path in sorted(Path(folder).iterdir()):
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        model = digest.hexdigest()
    home = os.environ.get("ASCEND_HOME_PATH", "/usr/local/Ascend/ascend-toolkit/latest")
    compiler = Path(home) / "compiler" / "version.info"
    lines = compiler.read_text(errors="replace").splitlines() if compiler.is_file() else []
    return {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "packages": {name: installed(name) for name in packages},
        "variables": {name: os.environ.get(name) for name in variables},
        "cann": next((line.partition("=")[2] for line in lines if line.lower().startswith("version=")), None),
        "interfaces": [name for _, name in socket.if_nameindex()],
        "model": model,
    }


def ask(address: str, folder: str, packages: list[str], variables: list[str]) -> dict[str, Any]:
    """Join the cluster and look at each of its nodes."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    remote = ray.remote(num_cpus=0)(look)
    alive = [node for node in ray.nodes() if node["Alive"]]
    # What vLLM itself asks (executor/ray_utils.py); Ray's public calls do not say it by node.
    free = ray._private.state.available_resources_per_node()
    running = [
        remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
            folder, packages, variables
        )
        for node in alive
    ]
    found = ray.get(running, timeout=SECONDS)
    return {
        "nodes": [
            {
                "address": node["NodeManagerAddress"],
                "npus": int(node["Resources"].get("NPU", 0)),
                "free_npus": int(free.get(node["NodeID"], {}).get("NPU", 0)),
                **answer,
            }
            for node, answer in zip(alive, found, strict=True)
        ]
    }


def main() -> None:
    """Answer on the descriptor that was stdout; Ray writes to the present one."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    request = json.loads(sys.argv[1])
    try:
        answer = ask(**request)
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    answers.write(json.dumps(answer))
    answers.flush()
    # Ray's own end waits for its threads.
    os._exit(0)


if __name__ == "__main__":
    main()
