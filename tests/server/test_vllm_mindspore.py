"""The server of vLLM-MindSpore as a child process, with a stand-in of the package that records its call.

It stands for the missing NPU only: the command, its environment, the console script as pip makes it, and the
watching of the child are the real ones. The stand-in says nothing about the real engine.
"""

import json
import os
import socket
import sys
from pathlib import Path

import pytest

from msquant.deploy.vllm_mindspore_server import server_command
from msquant.inference.serving_settings import ServingSettings
from msquant.server.supervise import supervise

SCRIPTS = """
import http.server, json, os, sys

def main():
    names = "VLLM_MS_MODEL_BACKEND HCCL_BUFFSIZE MS_ALLOC_CONF ASCEND_RT_VISIBLE_DEVICES VLLM_API_KEY".split()
    with open(os.environ["RECORD"], "w") as file:
        json.dump({"argv": sys.argv[1:], "env": {n: os.environ[n] for n in names if n in os.environ}}, file)

    class Health(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
        def log_message(self, *_):
            pass

    port = int(sys.argv[sys.argv.index("--port") + 1])
    http.server.HTTPServer(("127.0.0.1", port), Health).handle_request()
"""
# As pip writes it for `vllm-mindspore = vllm_mindspore.scripts:main`.
CONSOLE_SCRIPT = """#!{python}
import sys
from vllm_mindspore.scripts import main
if __name__ == '__main__':
    sys.exit(main())
"""


def test_the_package_is_called_with_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "a model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"architectures": ["Qwen3ForCausalLM"]}))
    (model / "quantization_description.json").write_text("{}")
    package = tmp_path / "packages" / "vllm_mindspore"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "scripts.py").write_text(SCRIPTS)
    script = tmp_path / "bin" / "vllm-mindspore"
    script.parent.mkdir()
    script.write_text(CONSOLE_SCRIPT.format(python=sys.executable))
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent), prepend=os.pathsep)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.setenv("RECORD", str(tmp_path / "record.json"))
    # What the user has set wins over the recipe.
    monkeypatch.setenv("MS_ALLOC_CONF", "enable_vmm:false")
    for name in ("VLLM_MS_MODEL_BACKEND", "HCCL_BUFFSIZE", "ASCEND_RT_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

    settings = ServingSettings(tensor_parallel_size=2, max_model_len=2048, hccl_buffsize=512)
    launch = server_command(model, settings, "127.0.0.1", port)
    ready: list[int] = []
    supervise(launch, f"http://127.0.0.1:{port}/health", ready.append, {"VLLM_API_KEY": "s3cret"})

    assert len(ready) == 1
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["argv"] == [
        *("serve", str(model), "--served-model-name", "a model"),
        *("--host", "127.0.0.1", "--port", str(port), "--quantization", "golden-stick"),
        *("--max-model-len", "2048", "--block-size", "128", "--gpu-memory-utilization", "0.9"),
        *("--tensor-parallel-size", "2"),
    ]
    assert record["env"] == {
        "VLLM_MS_MODEL_BACKEND": "Native",
        "HCCL_BUFFSIZE": "512",
        "MS_ALLOC_CONF": "enable_vmm:false",
        "ASCEND_RT_VISIBLE_DEVICES": "0,1",
        "VLLM_API_KEY": "s3cret",
    }
    assert launch.argv[0] == "vllm-mindspore"
    assert "s3cret" not in launch.shell()
