"""The engine that always works: msquant's own decoder layers, with a key-value cache."""

import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msquant.checkpoint.weights import WeightSource
from msquant.errors import EngineError
from msquant.inference.answer import Answer
from msquant.inference.batch import BatchModel, DecodeBatch
from msquant.inference.engine_protocol import Completion, OnText, Sampling, check_prompts
from msquant.inference.sampling import Sampler
from msquant.inference.token_bytes import TokenBytes
from msquant.models.config import ModelConfig

NAME = "embedded"


class EmbeddedEngine:
    """Runs a whole model in this process: on a CPU in NumPy and oneDNN, on Ascend in MindSpore.

    `generate` takes one prompt after another; iterators of `tokens` that are advanced in turn are computed
    together.

    Quantized linears are computed with the exact integer arithmetic of their static or per-token
    quantization, the others in floating point.

    Args:
        config: the model's shape.
        source: its weights; all of them are read here.
        tokenizer: a Hugging Face tokenizer of the same model.
        device: `cpu` or `ascend`.

    Raises:
        EngineError: the device is not there.
        CheckpointError: a weight is missing, damaged or does not fit the config.
    """

    name = NAME

    def __init__(
        self, config: ModelConfig, source: WeightSource, tokenizer: Any, device: str = "cpu"
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        if device == "cpu":
            from msquant.inference.cpu.cpu_model import CpuModel

            model: BatchModel = CpuModel(config, source)
        else:
            from msquant.inference.mindspore_model import MindSporeModel

            model = MindSporeModel(config, source, device)
        self._batch = DecodeBatch(model)

    @cached_property
    def token_bytes(self) -> TokenBytes:
        """The bytes of the vocabulary's tokens."""
        return TokenBytes(self.tokenizer)

    def generate(
        self, prompts: Sequence[str], sampling: Sampling, on_text: OnText | None = None
    ) -> list[Completion]:
        """Continue every prompt; see `Engine.generate`."""
        check_prompts(prompts)
        encoded = [self.encode(prompt) for prompt in prompts]
        return [
            self._continue(i, prompt, ids, sampling, on_text)
            for i, (prompt, ids) in enumerate(zip(prompts, encoded, strict=True))
        ]

    def close(self) -> None:
        """Free the weights; see `Engine.close`."""
        del self._batch

    def encode(self, prompt: str) -> list[int]:
        """The tokens of a prompt, with what the tokenizer puts in front of a text.

        Raises:
            EngineError: it has too many tokens, or none, or one that the model does not know.
        """
        ids = [int(token) for token in self.tokenizer.encode(prompt)]
        self._check(ids)
        return ids

    def tokens(self, ids: Sequence[int], sampling: Sampling, index: int = 0) -> Iterator[int]:
        """Continue tokens, each new one being computed when it is asked for.

        Several such iterators may be advanced in turn, in one thread: a token is then computed for all of
        them at once, which is far faster than one by one. Each is so at most one token ahead. One that is
        closed or dropped lets go of its key-value cache.

        Args:
            ids: the tokens to continue.
            sampling: how tokens are chosen; at most `max_tokens` of them, fewer where the model ends. It
                is `answer` that has the log probabilities.
            index: so that equal prompts are continued differently.

        Returns:
            The new tokens; the last is an end-of-sequence token, unless there was no room for it or
            `ignore_eos` is set.

        Raises:
            EngineError: as `encode`; or, while iterating, the logits are not finite.
        """
        return self._tokens(ids, sampling, Sampler(sampling, index))

    def answer(self, ids: Sequence[int], sampling: Sampling, index: int = 0) -> Answer:
        """The text of `tokens`, piece by piece, with log probabilities; it ends at a stop string too."""
        sampler = Sampler(sampling, index)
        return Answer(
            self._tokens(ids, sampling, sampler),
            self.tokenizer,
            ids,
            sampling,
            lambda token: self._ends(token, sampling),
            sampler.logprobs,
            sampler.prompt_logprobs,
        )

    def logits(self, ids: Sequence[int], count: int) -> Iterator[NDArray[np.float32]]:
        """What the model predicts after each of the last `count` of `ids`, to score tokens that are given.

        Args:
            ids: tokens; at most as many as the model takes.
            count: at least 1, at most as many as there are `ids`.

        Returns:
            float32 logits in order, in blocks of rows `[rows, V]` that are computed when they are asked for.

        Raises:
            EngineError: there are too many `ids`, or none, or one that the model does not know.
        """
        self._check(ids, room=0)
        return self._batch.logits(ids, count)

    def _tokens(self, ids: Sequence[int], sampling: Sampling, sampler: Sampler) -> Iterator[int]:
        self._check(ids, room=min(sampling.max_tokens, 1))
        room = min(sampling.max_tokens, self.config.longest - len(ids))
        ends = () if sampling.ignore_eos else self.config.eos_token_ids
        return self._batch.tokens(ids, sampler, room, ends)

    def _ends(self, token: int, sampling: Sampling) -> bool:
        return token in self.config.eos_token_ids and not sampling.ignore_eos

    def _check(self, ids: Sequence[int], room: int = 1) -> None:
        entry, longest = self.config.longest_by
        if len(ids) + room > longest:
            raise EngineError(
                f"a prompt of {len(ids)} tokens leaves no room for an answer: "
                f"this engine computes {longest} tokens of the model ({entry})",
                where="--prompt",
                remedy="shorten the prompt",
            )
        outside = [token for token in ids if not 0 <= token < self.config.vocab_size]
        if outside or not ids:
            found = f"token {outside[0]}" if outside else "no token"
            raise EngineError(
                f"the tokenizer makes {found} of the prompt; "
                f"the model's vocabulary is 0 to {self.config.vocab_size - 1}",
                where="tokenizer.json",
                remedy="copy the tokenizer files of the same model into the folder",
            )

    def _continue(
        self, index: int, prompt: str, ids: list[int], sampling: Sampling, on_text: OnText | None
    ) -> Completion:
        start = time.perf_counter()
        answer = self.answer(ids, sampling, index)
        pieces: list[str] = []
        for piece in answer:
            if piece:
                pieces.append(piece)
                if on_text is not None:
                    on_text(index, piece)
        seconds = time.perf_counter() - start
        reason = answer.finish_reason or "length"
        return Completion(prompt, "".join(pieces), tuple(answer.token_ids), reason, seconds)
