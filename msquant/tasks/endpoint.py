"""A model behind an OpenAI-compatible endpoint as a language model of lm_eval; needs lm_eval installed."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import requests
from lm_eval.api.model import LM
from lm_eval.models.openai_completions import LocalCompletionsAPI

from msquant.errors import EngineError
from msquant.progress import Progress

TIMEOUT = 30.0
RETRIES = 2
KEY_VARIABLE = "OPENAI_API_KEY"


class EndpointLM(LM):
    """lm_eval's `local-completions`, one request after another, with progress and clear errors.

    Args:
        url: of the endpoint, up to `/v1`.
        folder: the same model's folder, of which the tokenizer is taken.
        longest: the most tokens that the model takes.
        scores: whether answers are to be scored, for which the endpoint must serve log probabilities.
        progress: `layers` is called with the number of requests, and `layer` with each one's `index`.

    Raises:
        EngineError: the endpoint is not there, or serves no log probabilities and they are needed.
    """

    def __init__(self, url: str, folder: Path, longest: int, scores: bool, progress: Progress) -> None:
        super().__init__()
        self._url, self._progress = url.rstrip("/"), progress
        name = self._served_name()
        if scores:
            self._require_scores(name)
        self._model = LocalCompletionsAPI(
            base_url=f"{self._url}/completions",
            model=name,
            tokenizer=str(folder),
            tokenizer_backend="huggingface",
            max_length=longest,
            max_retries=RETRIES,
        )

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """See `LM.loglikelihood`."""
        return self._each("scoring answers", requests, self._model.loglikelihood)

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """See `LM.loglikelihood_rolling`."""
        return self._each("scoring texts", requests, self._model.loglikelihood_rolling)

    def generate_until(self, requests: list[Any]) -> list[str]:
        """See `LM.generate_until`."""
        return self._each("writing answers", requests, self._model.generate_until)

    def _each(self, stage: str, asked: list[Any], ask: Callable[..., list[Any]]) -> list[Any]:
        self._progress.stage(stage)
        self._progress.layers(len(asked), 0)
        replies = []
        for i, request in enumerate(asked):
            try:
                replies += ask([request], disable_tqdm=True)
            # Of the connection, of the retries, or of a reply that is not what OpenAI's is.
            except Exception as error:
                raise EngineError(
                    f"question {i + 1} of {len(asked)} was not answered ({type(error).__name__}: {error})",
                    where=self._url,
                    remedy="see what the server says, and begin again",
                ) from error
            self._progress.layer({"index": i})
        return replies

    def _served_name(self) -> str:
        reply = self._request("get", "/models")
        try:
            return str(reply.json()["data"][0]["id"])
        except (ValueError, LookupError, TypeError) as error:
            raise EngineError(
                f"answers {reply.status_code} to /models, and names no model",
                where=self._url,
                remedy="give the address of an OpenAI-compatible server, up to /v1, and its key, if it asks "
                f"for one, in the variable {KEY_VARIABLE}",
            ) from error

    def _require_scores(self, name: str) -> None:
        body = {
            "model": name,
            "prompt": "a b",
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": 1,
            "echo": True,
        }
        reply = self._request("post", "/completions", json=body)
        try:
            served = len(reply.json()["choices"][0]["logprobs"]["token_logprobs"]) > 1
        except (ValueError, LookupError, TypeError):
            served = False
        if not served:
            raise EngineError(
                f"serves no log probabilities of a prompt's tokens (it answers {reply.status_code}), which "
                "tasks with given answers need",
                where=self._url,
                remedy="leave --endpoint out, serve the model with vLLM, or choose tasks that are answered "
                "in free text, as gsm8k",
            )

    def _request(self, method: str, path: str, **options: Any) -> requests.Response:
        key = os.environ.get(KEY_VARIABLE)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            return requests.request(method, self._url + path, headers=headers, timeout=TIMEOUT, **options)
        except requests.RequestException as error:
            raise EngineError(
                f"cannot be reached ({type(error).__name__})",
                where=self._url,
                remedy="start it, as with `msquant serve`, and give its address up to /v1",
            ) from error
