"""The command that serves a folder with vLLM's own OpenAI-compatible server, on the CPU."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from msquant.inference.environments import VLLM_CPU, require_ready
from msquant.inference.launch import Launch
from msquant.inference.vllm_cpu import child_environment, require_servable
from msquant.inference.vllm_site import msquant_vllm_workarounds as workarounds


def server_command(
    folder: Path,
    host: str,
    port: int,
    *,
    served_name: str | None = None,
    dtype: str = "auto",
    options: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Launch:
    """What serves a folder with vLLM's own server.

    Args:
        folder: a floating-point or compressed-tensors folder.
        host: address that the server listens on.
        port: its port.
        served_name: what clients call the model; by default the folder's name.
        dtype: of activations, as vLLM has it.
        options: more of the server's own options, `--max-num-seqs 16`.
        environment: what the process inherits, this process's own by default; variables that it sets win.

    Raises:
        EngineError: vLLM is not installed, or cannot read this folder.
        ModelError: the folder holds no tokenizer.
    """
    require_servable(folder)
    python = require_ready(VLLM_CPU).python
    llm = workarounds.LLM_OPTIONS
    argv = [str(python), "-m", workarounds.SERVER_MODULE, "--model", str(folder.resolve())]
    argv += ["--served-model-name", served_name or folder.resolve().name, "--host", host, "--port", str(port)]
    argv += ["--dtype", dtype, "--max-model-len", str(llm["max_model_len"]), "--enforce-eager", *options]
    return Launch(tuple(argv), child_environment(workarounds.server_environment(), environment))
