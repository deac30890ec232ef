"""Runs vLLM-MindSpore for msquant, as `msquant_vllm_worker` runs vLLM; only loading differs.

{"op": "load", "id": 0, "model": FOLDER, "options": {arguments of vLLM's LLM}}
"""

from typing import Any

from msquant_vllm_worker import Worker, main


class MindSporeWorker(Worker):
    """The same on NPUs."""

    def _load(self, request: dict[str, Any]) -> None:
        # Must come before vllm: it puts MindSpore in torch's place.
        import vllm_mindspore  # noqa: F401  # isort: skip
        import vllm

        self._llm = vllm.LLM(model=request["model"], **request["options"])
        config = self._llm.llm_engine.model_config
        self._answer(
            request,
            "loaded",
            vllm=vllm.__version__,
            dtype=str(config.dtype).removeprefix("torch."),
            max_model_len=config.max_model_len,
        )


if __name__ == "__main__":
    main(MindSporeWorker)
