"""Prompts through the real `vllm.LLM` with vLLM-MindSpore: loader, scheduler, paged caches, model and
sampler.

Run as `python serve_prompts.py CASES.json` in the servers' environment, with `stand_ins` in PYTHONPATH. Each
case is an object with `folder`, `options` (arguments of `LLM`), `prompts` (lists of tokens), `tokens` (how
many to continue each with) and `output`, a file for what was found: the tokens, and the logits of every
step of the first prompt alone. What a case raises is written to the same file as `error`. `custom_ops:
false` is a machine without the package ms_custom_ops. Each case runs in a process of its own, forked from
this one once everything is imported.
"""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import vllm_mindspore  # noqa: F401  # isort: skip  # before vllm
import npu_operators
import numpy as np
import vllm.model_executor.models.registry as registry
from vllm import LLM, SamplingParams

# Else vLLM imports all of this in another process, to look at a model's class.
registry._run_in_subprocess = lambda function: function()


def serve(case: dict[str, Any]) -> None:
    """Load a folder and continue its prompts."""
    if not case.get("custom_ops", True):
        sys.modules["ms_custom_ops"] = None  # type: ignore[assignment]
    record = Path(case["output"]).with_suffix(".logits")
    os.environ["NPU_LOGITS"] = str(record)
    llm = LLM(model=case["folder"], **case["options"])
    sampling = SamplingParams(max_tokens=case["tokens"], temperature=0.0, ignore_eos=True)
    record.write_bytes(b"")
    first, *others = ({"prompt_token_ids": prompt} for prompt in case["prompts"])
    (alone,) = llm.generate([first], sampling, use_tqdm=False)
    rows = []
    with record.open("rb") as file:
        while file.tell() < record.stat().st_size:
            rows.append(np.load(file))
    together = llm.generate([first, *others], sampling, use_tqdm=False)
    np.savez(
        case["output"],
        alone=np.array(alone.outputs[0].token_ids),
        together=np.array([answer.outputs[0].token_ids for answer in together]),
        logits=np.concatenate(rows),
        casts=np.array(npu_operators.CASTS),
        calls=np.array(sorted(npu_operators.CALLS)),
        dtype=np.array(str(llm.llm_engine.model_config.dtype)),
    )


def main(path: str) -> None:
    """Every case of a file, one after the other."""
    for case in json.loads(Path(path).read_text()):
        process = os.fork()
        if not process:
            try:
                serve(case)
            except BaseException:
                np.savez(case["output"], error=np.array(traceback.format_exc()))
                raise
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(0)
        os.waitpid(process, 0)


if __name__ == "__main__":
    main(sys.argv[1])
