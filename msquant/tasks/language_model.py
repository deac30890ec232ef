"""The embedded engine, or an OpenAI-compatible endpoint, as a language model of lm_eval, which it imports."""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import requests
from lm_eval.api.model import LM, TemplateLM
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from numpy.typing import NDArray

from msquant.errors import EngineError
from msquant.inference.embedded import EmbeddedEngine
from msquant.inference.engine_protocol import Sampling
from msquant.inference.logprobs import log_softmax, require_finite
from msquant.progress import Progress

# What lm_eval's own models take where a task says nothing.
MAX_NEW_TOKENS = 256

# Prompts that are continued together.
TOGETHER = 8

Request = tuple[tuple[str, str], list[int], list[int]]


class EmbeddedLM(TemplateLM):
    """Scores and continues texts as lm_eval's model of transformers does, with the embedded engine.

    Contexts that are too long lose their beginning.

    Args:
        engine: a loaded model.
        progress: `layers` is called with the number of requests, and `layer` with each one's `index`.
    """

    def __init__(self, engine: EmbeddedEngine, progress: Progress) -> None:
        super().__init__()
        self.tokenizer = engine.tokenizer
        self._engine, self._progress = engine, progress
        self._longest = engine.config.longest
        self._newest: tuple[tuple[int, ...], NDArray[np.float64]] | None = None

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        own = self.tokenizer.eos_token_id
        return int(own if own is not None else self._engine.config.eos_token_ids[0])

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context."""
        first = self.tokenizer.bos_token_id
        return int(first) if first is not None else self.eot_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokens of a text; what the tokenizer puts in front of one is not put there twice."""
        if add_special_tokens is None and string.startswith(self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return [int(token) for token in self.tokenizer.encode(string, **options)]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Natural logarithm of each continuation's probability, and whether it is the most likely one."""
        self._begin("scoring answers", len(requests))
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: list[Request], **_: Any) -> list[tuple[float, bool]]:
        scores = []
        for i, (_texts, context, continuation) in enumerate(requests):
            scores.append(self._score(context, continuation))
            self._progress.layer({"index": i})
        return scores

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Natural logarithm of each whole text's probability, in windows as long as the model takes."""
        self._begin("scoring texts", len(requests))
        scores = []
        for i, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._longest,
                context_len=1,
            )
            scores.append(sum(self._score(*make_disjoint_window(window))[0] for window in windows))
            self._progress.layer({"index": i})
        return scores

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Continue each context until a stop string or the end of the text."""
        self._begin("writing answers", len(requests))
        texts: list[str] = []
        for start in range(0, len(requests), TOGETHER):
            answers = [self._answer(*request.args) for request in requests[start : start + TOGETHER]]
            texts += in_turn(answers, partial(self._ended, start))
        return texts

    def _ended(self, start: int, count: int) -> None:
        self._progress.layer({"index": start + count})

    def _begin(self, stage: str, count: int) -> None:
        self._progress.stage(stage)
        self._progress.layers(count, 0)

    def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        if not continuation:
            return 0.0, True
        # The continuation's last token predicts nothing that is asked for.
        ids = (context + continuation)[-(self._longest + 1) :][:-1]
        wanted = continuation[-len(ids) :]
        total, greedy, done = 0.0, True, 0
        for rows in self._log_probabilities(ids, len(wanted)):
            targets = wanted[done : done + len(rows)]
            total += float(rows[np.arange(len(rows)), targets].sum())
            greedy = greedy and bool((rows.argmax(axis=1) == targets).all())
            done += len(rows)
        return total, greedy

    def _log_probabilities(self, ids: list[int], count: int) -> Iterator[NDArray[np.float64]]:
        """Of the token after each of the last `count` of `ids`, in blocks `[rows, V]`."""
        # The answers A, B, C and D of a question follow the same tokens.
        if count == 1 and self._newest is not None and self._newest[0] == tuple(ids):
            yield self._newest[1]
            return
        for logits in self._engine.logits(ids, count):
            require_finite(logits)
            rows = log_softmax(logits)
            if count == 1:
                self._newest = tuple(ids), rows
            yield rows

    def _answer(self, context: str, settings: dict[str, Any]) -> Iterator[str]:
        stops = settings.get("until") or []
        most = int(settings.get("max_gen_toks") or settings.get("max_tokens") or MAX_NEW_TOKENS)
        sampled = bool(settings.get("do_sample"))
        sampling = Sampling(
            max_tokens=most,
            temperature=float(settings.get("temperature", 1.0)) if sampled else 0.0,
            top_p=float(settings.get("top_p", 1.0)),
            stop=tuple(stop for stop in ([stops] if isinstance(stops, str) else stops) if stop),
        )
        # At least half of what the model takes is left to the context.
        kept = max(self._longest - most, self._longest // 2)
        ids = self.tok_encode(context)[-kept:] or [self.prefix_token_id]
        return iter(self._engine.answer(ids, sampling))


def in_turn(answers: Sequence[Iterator[str]], on_end: Callable[[int], None]) -> list[str]:
    """Advance answers in turn, which computes them together; `on_end` is told how many ended before."""
    texts = [""] * len(answers)
    going, ended = dict(enumerate(answers)), 0
    while going:
        for i in list(going):
            piece = next(going[i], None)
            if piece is None:
                del going[i]
                on_end(ended)
                ended += 1
            else:
                texts[i] += piece
    return texts


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
                remedy="leave --endpoint out, serve the model with `msquant serve`, or choose tasks that are "
                "answered in free text, as gsm8k",
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
