"""vLLM in a worker process that answers in JSON lines: what its engines share, and how it ends."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
import time
import weakref
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import IO, Any

from msquant.checkpoint.cache import cache_folder
from msquant.errors import EngineError
from msquant.inference.engine_protocol import Completion, FinishReason, OnText, Sampling, check_prompts
from msquant.inference.launch import Launch

CANCEL_SECONDS = 10.0
_END_SECONDS = 5.0
_LAST_LINES = 8
_LAST_BYTES = 16_384


class AnswerError(EngineError):
    """The child answered a request with an error, and lives.

    Attributes:
        kind: the name of its exception.
        message: the exception's message.
    """

    def __init__(self, what: str, kind: str, message: str, log: Path) -> None:
        super().__init__(what, where=log, remedy="the log has the whole message")
        self.kind = kind
        self.message = message


class WorkerProcess:
    """A child in a process group of its own, which ends with this object and with this process.

    It reads requests from its stdin, each with an `id`, and writes answers to its stdout; an answer has the
    request's `id` and an `event`, and the last one to a request has one of its last events or `error`. Its
    stderr goes to the log. It has to end when its stdin does. Not for several threads at once.

    Args:
        name: what messages call it.
        argv: program and arguments.
        env: its whole environment.
        log: file for its stderr, replaced if it exists.
        check: the command that says what is wrong with its installation.

    Raises:
        EngineError: it cannot be started.
    """

    def __init__(self, name: str, argv: Sequence[str], env: Mapping[str, str], log: Path, check: str) -> None:
        self._name = name
        self._check_command = check
        self.log = log
        self._next_id = 0
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("wb") as stderr:
                self._process = subprocess.Popen(
                    list(argv),
                    env=dict(env),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                    start_new_session=True,
                )
        except OSError as error:
            raise EngineError(
                f"{name} cannot be started: {error.strerror or error}",
                where=error.filename or argv[0],
                remedy=f"check it: {check}",
            ) from error
        assert self._process.stdout is not None
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=_read, args=(self._process.stdout, self._lines), daemon=True).start()
        self._end = weakref.finalize(self, _end, self._process)

    @property
    def pid(self) -> int:
        """Of the child, and of its process group."""
        return self._process.pid

    def close(self) -> None:
        """End the child and all that it started."""
        self._end()

    def ask(
        self,
        last: str,
        doing: str,
        request: Mapping[str, Any],
        *,
        timeout: float | None = None,
        cancel: bool = False,
    ) -> Generator[dict[str, Any], None, None]:
        """Send a request and yield its answers, up to the one with the event `last`.

        Args:
            last: the event that ends the answers.
            doing: what the child does meanwhile, for messages: `loading the model`.
            request: without `id`.
            timeout: seconds until the last answer; the child is ended when they are over.
            cancel: the request can be cancelled, which is done when the iterator is left before its end;
                otherwise the child is ended then.

        Raises:
            AnswerError: the child answered with an error.
            EngineError: it died, wrote something else, or took too long.
        """
        number, self._next_id = self._next_id, self._next_id + 1
        deadline = None if timeout is None else time.monotonic() + timeout
        self._send({"id": number, **request}, doing)
        finished = False
        try:
            while not finished:
                answer = self._answer(doing, deadline)
                if answer["id"] == number:
                    finished = answer["event"] in (last, "error")
                    self._check(answer, doing)
                    yield answer
        except EngineError:
            finished = True
            raise
        finally:
            if not finished and cancel:
                self._cancel(number, last)
            elif not finished:
                self.close()

    def _cancel(self, number: int, last: str) -> None:
        """Stop a request and take its remaining answers off the pipe; end the child if that does not work."""
        try:
            self._send({"op": "cancel", "id": number}, "cancelling")
            deadline = time.monotonic() + CANCEL_SECONDS
            while True:
                answer = self._answer("cancelling", deadline)
                if answer["id"] == number and answer["event"] in (last, "error"):
                    return
        except BaseException as error:
            self.close()
            if not isinstance(error, EngineError):
                raise

    def _send(self, request: Mapping[str, Any], doing: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except (OSError, ValueError) as error:
            raise self._died(doing) from error

    def _answer(self, doing: str, deadline: float | None) -> dict[str, Any]:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        try:
            line = self._lines.get(timeout=left)
        except queue.Empty:
            self.close()
            raise EngineError(
                f"{self._name} did not finish {doing} in time and was ended",
                where=self.log,
                remedy="the log says how far it came; give it more time, or free CPU time and memory",
            ) from None
        if not line:
            # What came is at its end, and stays there for the next one who asks.
            self._lines.put(line)
            raise self._died(doing)
        try:
            answer = json.loads(line)
            if isinstance(answer["id"], int) and isinstance(answer["event"], str):
                return dict(answer)
        except (ValueError, TypeError, KeyError):
            pass
        self.close()
        raise EngineError(
            f"{self._name} wrote {line[:80]!r}, which is no answer, while {doing}",
            where=self.log,
            remedy="something in its environment prints to file descriptor 1 before it starts: "
            "check sitecustomize and .pth files there, or install the engine again",
        )

    def _check(self, answer: Mapping[str, Any], doing: str) -> None:
        if answer["event"] == "error":
            kind, message = str(answer.get("kind")), str(answer.get("message")).strip()
            first = message.partition("\n")[0]
            raise AnswerError(f"{self._name} failed {doing}: {kind}: {first}", kind, message, self.log)

    def _died(self, doing: str) -> EngineError:
        try:
            code = self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            how = "closed its output"
        else:
            how = f"was ended by {_signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
        self.close()
        error = EngineError(
            f"{self._name} {how} while {doing}",
            where=self.log,
            remedy="memory may have run out: choose a smaller model, or give the engine less for its cache "
            "(vLLM on the CPU: VLLM_CPU_KVCACHE_SPACE)"
            if how.endswith("SIGKILL")
            else f"the log says more; then check the engine: {self._check_command}",
        )
        for line in last_lines(self.log):
            error.add_note(line)
        return error


def last_lines(log: Path, count: int = _LAST_LINES) -> list[str]:
    """The last lines of a log that are not empty; none if it cannot be read."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _LAST_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return [line.rstrip() for line in text.splitlines() if line.strip()][-count:]


def _read(stdout: IO[bytes], lines: "queue.SimpleQueue[bytes]") -> None:
    with contextlib.suppress(OSError, ValueError):
        for line in stdout:
            lines.put(line)
    lines.put(b"")


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End the whole group: its leader by the end of its input, what is left by force."""
    assert process.stdin is not None
    with contextlib.suppress(OSError):
        process.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(1.0)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


LOAD_SECONDS = 1800.0
_LOGS_KEPT = 10
# What vLLM raises for a prompt that the model cannot take.
_INVALID = "VLLMValidationError"
_SEEDS = 2**63


class WorkerEngine:
    """A model that a worker process has loaded; see `vllm_site/msquant_vllm_worker.py` for what they say.

    Args:
        title: what messages call it.
        launch: how the worker is started; the first of its requests loads the model.
        load_seconds: time to load the model in; the imports alone take 15 s on a busy machine.
        check: the command that says what is wrong with its installation.

    Attributes:
        loaded: the worker's answer to that request.

    Raises:
        EngineError: the worker cannot be started, or cannot load the model; names its log.
    """

    def __init__(self, title: str, launch: Launch, load_seconds: float, check: str) -> None:
        self._title = title
        self._worker = WorkerProcess(title, launch.argv, launch.environment(), _new_log(), check)
        (self.loaded,) = self._worker.ask(
            "loaded", "loading the model", launch.requests[0], timeout=load_seconds
        )

    @property
    def log(self) -> Path:
        """What the worker wrote: versions, the kernels it chose, its errors."""
        return self._worker.log

    @property
    def pid(self) -> int:
        """Of the worker."""
        return self._worker.pid

    def generate(
        self, prompts: Sequence[str], sampling: Sampling, on_text: OnText | None = None
    ) -> list[Completion]:
        """Continue every prompt, all together; see `Engine.generate`."""
        check_prompts(prompts)
        start = time.perf_counter()
        texts: list[list[str]] = [[] for _ in prompts]
        tokens: list[list[int]] = [[] for _ in prompts]
        reasons: list[FinishReason] = ["length"] * len(prompts)
        request = {"op": "generate", "prompts": list(prompts), "sampling": sampling_params(sampling)}
        try:
            with closing(self._worker.ask("done", "generating", request, cancel=True)) as answers:
                for answer in answers:
                    if answer["event"] != "delta":
                        continue
                    index = answer["index"]
                    texts[index].append(answer["text"])
                    tokens[index] += answer["token_ids"]
                    if answer["finish_reason"] == "stop":
                        reasons[index] = "stop"
                    if on_text is not None and answer["text"]:
                        on_text(index, answer["text"])
        except AnswerError as error:
            if error.kind != _INVALID:
                raise
            raise EngineError(
                f"{self._title}: {error.message}", where="--prompt", remedy="change the prompt"
            ) from error
        seconds = time.perf_counter() - start
        return [
            Completion(prompt, "".join(texts[i]), tuple(tokens[i]), reasons[i], seconds)
            for i, prompt in enumerate(prompts)
        ]

    def close(self) -> None:
        """End the worker."""
        self._worker.close()


def sampling_params(sampling: Sampling) -> dict[str, Any]:
    """The arguments of vLLM's `SamplingParams`."""
    params: dict[str, Any] = {
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "ignore_eos": sampling.ignore_eos,
        "stop": list(sampling.stop),
    }
    if sampling.temperature > 0:
        params["seed"] = sampling.seed % _SEEDS
    return params


def _new_log() -> Path:
    """A log file for a new worker; only the newest ones are kept."""
    folder = cache_folder() / "logs"
    with suppress(OSError):
        older = sorted(folder.glob("vllm-*.log"), key=lambda path: path.stat().st_mtime)
        for path in older[: 1 - _LOGS_KEPT]:
            path.unlink()
    return folder / f"vllm-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
