"""Runs vLLM for msquant, in vLLM's own Python environment, over JSON lines; it imports nothing of msquant.

Requests come on stdin, one object a line. When stdin ends, the process ends at once, whatever it does.

    {"op": "load", "id": 0, "model": FOLDER, "dtype": "auto"}
    {"op": "generate", "id": 1, "prompts": [TEXT, ...], "sampling": {arguments of vLLM's SamplingParams}}
    {"op": "cancel", "id": 1}

Answers go to what was stdout when the process began, tagged with the request's id:

    {"id": 0, "event": "loaded", "vllm": VERSION, "dtype": NAME, "max_model_len": TOKENS}
    {"id": 1, "event": "delta", "index": PROMPT, "text": NEW, "token_ids": [NEW, ...], "finish_reason": WHY}
    {"id": 1, "event": "done"}
    {"id": 1, "event": "error", "kind": EXCEPTION, "message": TEXT}

`finish_reason` is null until the prompt's last delta; `done` comes when every prompt is finished or the
request was cancelled; `error` in place of `loaded` or `done`. All that anything else prints goes to stderr.
"""

import json
import os
import queue
import sys
import threading
import traceback
from typing import Any, BinaryIO

import msquant_vllm_workarounds as workarounds


class Worker:
    """Answers requests, one after the other; `cancel` reaches the one that is running."""

    def __init__(self, requests: BinaryIO, answers: BinaryIO) -> None:
        self._requests = requests
        self._answers = answers
        self._waiting: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._cancelled: set[int] = set()
        self._llm: Any = None

    def run(self) -> None:
        """Answer until the requests end, which ends the process."""
        threading.Thread(target=self._read, daemon=True).start()
        while True:
            request = self._waiting.get()
            try:
                {"load": self._load, "generate": self._generate}[request["op"]](request)
            except Exception as error:
                traceback.print_exc()
                self._answer(request, "error", kind=type(error).__name__, message=str(error))

    def _read(self) -> None:
        for line in self._requests:
            request = json.loads(line)
            if request["op"] == "cancel":
                self._cancelled.add(request["id"])
            else:
                self._waiting.put(request)
        os._exit(0)

    def _answer(self, request: dict[str, Any], event: str, **values: Any) -> None:
        line = json.dumps({"id": request.get("id"), "event": event, **values})
        self._answers.write(line.encode() + b"\n")
        self._answers.flush()

    def _load(self, request: dict[str, Any]) -> None:
        workarounds.apply()
        import vllm

        with open(os.path.join(request["model"], "config.json"), encoding="utf-8") as file:
            architectures = json.load(file).get("architectures") or []
        options = workarounds.llm_options(architectures)
        self._llm = vllm.LLM(model=request["model"], dtype=request["dtype"], **options)
        config = self._llm.llm_engine.model_config
        self._answer(
            request,
            "loaded",
            vllm=vllm.__version__,
            dtype=str(config.dtype).removeprefix("torch."),
            max_model_len=config.max_model_len,
        )

    def _generate(self, request: dict[str, Any]) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine = self._llm.llm_engine
        running: dict[str, int] = {}
        try:
            for index, prompt in enumerate(request["prompts"]):
                name = f"{request['id']}-{index}"
                params = SamplingParams(output_kind=RequestOutputKind.DELTA, **request["sampling"])
                engine.add_request(name, prompt, params)
                running[name] = index
            while running and request["id"] not in self._cancelled:
                for output in engine.step():
                    self._delta(request, running[output.request_id], output.outputs[0])
                    if output.finished:
                        del running[output.request_id]
        finally:
            if running:
                engine.abort_request(list(running))
        self._answer(request, "done")

    def _delta(self, request: dict[str, Any], index: int, part: Any) -> None:
        self._answer(
            request,
            "delta",
            index=index,
            text=part.text,
            token_ids=list(part.token_ids),
            finish_reason=part.finish_reason,
        )


def main(worker: type[Worker] = Worker) -> None:
    """Keep the two pipes to ourselves, then answer."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(sys.stderr.fileno(), 1)
    worker(requests, answers).run()


if __name__ == "__main__":
    main()
