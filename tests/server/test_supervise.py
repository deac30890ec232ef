"""A server of another program as a child: a small one stands for the engine's."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from msquant.errors import EngineError
from msquant.inference.launch import Launch
from msquant.server.supervise import supervise

# Answers /health, and says on standard output what it was given and which signal ended it.
SERVER = """
import http.server, os, signal, sys, time
def end(number, frame):
    print("signal", number, flush=True)
    if "--stubborn" not in sys.argv:
        sys.exit(0)
signal.signal(signal.SIGTERM, end)
signal.signal(signal.SIGINT, end)
print("key", os.environ["KEY"], "name", os.environ["NAME"], flush=True)
time.sleep(0.3)
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
    def log_message(self, *_): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Health).serve_forever()
"""
WRAPPER = """
import sys
from msquant.inference.launch import Launch
from msquant.server.supervise import supervise
port, program, *rest = sys.argv[1:]
launch = Launch((sys.executable, "-c", program, port, *rest), {"NAME": "msquant"})
try:
    supervise(launch, f"http://127.0.0.1:{port}/health", lambda pid: print("ready", pid, flush=True),
              {"KEY": "s3cret"}, sys.stderr.fileno(), end_seconds=1.0)
except KeyboardInterrupt:
    sys.exit(130)
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
@pytest.mark.parametrize("options", [[], ["--stubborn"]])
def test_signals_reach_the_server_once(number: signal.Signals, code: int, options: list[str]) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WRAPPER, str(free_port()), SERVER, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "http_proxy": "http://127.0.0.1:9"},
    )
    assert process.stdout
    word, pid = process.stdout.readline().split()
    assert word == "ready"
    process.send_signal(number)
    rest, log = process.communicate(timeout=30)
    assert process.returncode == code
    assert rest == "", "what the server prints goes elsewhere"
    assert log.splitlines() == ["key s3cret name msquant", f"signal {int(number)}"]
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


def test_a_server_that_fails() -> None:
    launch = Launch((sys.executable, "-c", "import sys; sys.exit(3)"))
    with pytest.raises(EngineError, match="ended with exit code 3"):
        supervise(launch, "http://127.0.0.1:9/health", lambda _: pytest.fail("it was never ready"))


def test_no_such_program() -> None:
    with pytest.raises(EngineError, match="cannot start /no/such") as caught:
        supervise(Launch(("/no/such", "serve")), None, lambda _: None)
    assert "msquant doctor" in str(caught.value.remedy)


def test_without_a_health_page_it_is_ready_at_once() -> None:
    ready: list[int] = []
    supervise(Launch((sys.executable, "-c", "")), None, ready.append)
    assert len(ready) == 1
