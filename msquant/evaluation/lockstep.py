"""Several models of one architecture over the same tokens, layer by layer side by side.

One decoder layer of one model is in memory at a time, of a mixture of experts one expert; hidden states go to
disk when they outgrow a budget; the head is read in blocks of the vocabulary. So memory grows neither with
the number of layers nor with that of models.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice, pairwise
from typing import Any

import numpy as np
from mindspore import Tensor, ops
from numpy.typing import NDArray

from msquant.checkpoint.hidden_states import HiddenStateStore
from msquant.errors import MsquantError
from msquant.evaluation.distributions import Distributions, Divergence
from msquant.evaluation.domain_scores import LayerScore, ModelScore, Noise, text_score
from msquant.evaluation.inputs import Model, Text, require_alike
from msquant.interrupts import check_interrupt
from msquant.models.config import ModelConfig
from msquant.models.layers import DecoderLayer, Positions, State, positions
from msquant.models.network import Embedding, Head

Floats = NDArray[np.float32]

# Tokens that go through a decoder layer together, and from a width on.
BATCH_TOKENS, WIDE_BATCH_TOKENS, WIDE = 2048, 512, 2048

# Tokens that every layer's own noise is measured on, of all texts together.
OWN_TOKENS = 512

# Of the hidden states that go through a mixture of experts together, four arrays of them.
EXPERT_BYTES = 512 << 20

# Of the logits in float64 and of the head's rows in float32 that are in memory at once.
LOGIT_ROWS, LOGIT_BYTES, HEAD_BYTES = 512, 32 << 20, 64 << 20


def evaluate(
    models: Sequence[Model],
    texts: Sequence[Text],
    dtype: Any,
    store: HiddenStateStore,
    on_layer: Callable[[int, list[LayerScore]], None] = lambda index, layers: None,
    stage: Callable[[str], None] = lambda text: None,
) -> list[ModelScore]:
    """Score models on texts; the first is the baseline of all others.

    Args:
        models: at least one, all of one architecture.
        texts: at least one.
        dtype: compute dtype, as `use_device` returned it.
        store: of nothing else; takes the hidden states.
        on_layer: called with a decoder layer's index and its scores in every model but the first.
        stage: called with a line that says what begins.

    Returns:
        One score a model, in their order; the first has no divergence and no layers.

    Raises:
        CalibrationError: there is no sequence, it is too short or too long, or it holds an id that is no
            token.
        ModelError: a model is of another architecture than the first.
        CheckpointError: a weight is missing, damaged or does not fit the config.
        MsquantError: a model computed NaN or infinity.
    """
    require_alike(models, texts)
    run = Lockstep(models, texts, dtype, store)
    for number in range(len(models)):
        run.embed(number)
    layers: list[list[LayerScore]] = []
    for index in range(models[0].config.num_hidden_layers):
        for number in range(len(models)):
            run.forward(index, number)
        layers.append(run.differ(index))
        run.discard(index)
        on_layer(index, layers[-1])
    stage("comparing the predicted tokens")
    return run.scores([run.predict()], layers)


def first_layer(model: Model, texts: Sequence[Text], dtype: Any, store: HiddenStateStore) -> None:
    """Run the first decoder layer of one model as `evaluate` does, to see how long that takes.

    Args and errors as of `evaluate`.
    """
    run = Lockstep([model], texts, dtype, store)
    run.embed(0)
    run.forward(0, 0)


Predictions = tuple[list[Distributions], list[Divergence]]
"""Of each model; and how far those of each but the first are from the first's."""


class Lockstep:
    """Does the steps of `evaluate`, each on some of the tokens; what goes between them is in the store.

    Several processes may share them: a step's numbers do not depend on who did it, nor on how many pieces
    there are.

    Args:
        models: as for `evaluate`, which has checked them.
        texts: likewise.
        dtype: likewise.
        store: likewise; of all who share the steps.
        pieces: into how many the tokens are cut. A model with experts computes as many tokens at once as
            memory takes, so its layers are not cut.
    """

    def __init__(
        self,
        models: Sequence[Model],
        texts: Sequence[Text],
        dtype: Any,
        store: HiddenStateStore,
        pieces: int = 1,
    ) -> None:
        self._models, self._texts, self._dtype, self._store = models, texts, dtype, store
        config = models[0].config
        self._config, self._own = config, max(1, OWN_TOKENS // len(texts))
        self._kept_places: dict[int, Positions] = {}
        self._batches: list[NDArray[np.int32]] = []
        # The first batch of every text.
        self._firsts: list[int] = []
        most = WIDE_BATCH_TOKENS if config.hidden_size >= WIDE else BATCH_TOKENS
        for text in texts:
            step = max(1, most // text.tokens.shape[1])
            self._firsts.append(len(self._batches))
            self._batches += [text.tokens[i : i + step] for i in range(0, len(text.tokens), step)]
        experts = any(map(config.has_experts, range(config.num_hidden_layers)))
        self._pieces = _cut(len(self._batches), 1 if experts else pieces)
        self._ends = _cut(len(self._batches), pieces)

    def _places(self, length: int) -> Positions:
        if length not in self._kept_places:
            self._kept_places[length] = positions(self._config, length, self._dtype)
        return self._kept_places[length]

    @property
    def pieces(self) -> int:
        """Of a layer."""
        return len(self._pieces)

    @property
    def ends(self) -> int:
        """Pieces of the head."""
        return len(self._ends)

    def embed(self, number: int) -> None:
        """Put the inputs of a model's first decoder layer into the store."""
        model = self._models[number]
        embedding = Embedding(model.config, model.source, self._dtype)
        for piece, places in enumerate(self._pieces):
            with self._store.write(_name(0, number, piece)) as hidden:
                for place in places:
                    hidden.append(_floats(embedding(self._batches[place])))

    def forward(self, index: int, number: int, piece: int = 0) -> None:
        """Run one decoder layer of a model; and the baseline's inputs of `OWN_TOKENS` through it, too.

        Hidden states are kept as the models have them.
        """
        baseline, model = self._models[0], self._models[number]
        inputs = self._store.open(_name(index, number, piece))
        samples: Iterable[Floats] = ()
        if number:
            expected = self._store.open(_name(index, 0, piece))
            first = self._pieces[piece][0]
            samples = (
                _rotated(model, _unrotated(baseline, expected[place - first][:1, : self._own]))
                for place in self._firsts
                if place in self._pieces[piece]
            )
        outputs = self._outputs(model, index, chain(inputs, samples))
        with self._store.write(_name(index + 1, number, piece)) as written:
            for output in islice(outputs, len(inputs)):
                written.append(output)
        if number:
            with self._store.write(_name(index, number, piece, "own")) as own:
                for output in outputs:
                    own.append(output)

    def differ(self, index: int) -> list[LayerScore]:
        """How far the outputs of one decoder layer are apart, without the models' rotations."""
        baseline, scores = self._models[0], []
        for number, model in enumerate(self._models[1:], start=1):
            noise, own = Noise(), Noise()
            computed = chain.from_iterable(
                self._store.open(_name(index, number, piece, "own")) for piece in range(self.pieces)
            )
            both = zip(self._hidden(index + 1, 0), self._hidden(index + 1, number), strict=True)
            for place, (states, output) in enumerate(both):
                noise.add(_unrotated(baseline, states), _unrotated(model, output))
                if place in self._firsts:
                    sample = _unrotated(baseline, states[:1, : self._own])
                    own.add(sample, _unrotated(model, next(computed)))
            scores.append(LayerScore(index, noise.decibels, own.decibels))
        return scores

    def discard(self, index: int) -> None:
        """Remove what was before a decoder layer, when all of it is compared."""
        for number in range(len(self._models)):
            for piece in range(self.pieces):
                self._store.discard(_name(index, number, piece))
                self._store.discard(_name(index, number, piece, "own"))

    def _hidden(self, index: int, number: int, places: range | None = None) -> Iterator[Floats]:
        """Some batches, or all, as a model has them before a decoder layer."""
        for piece, run in enumerate(self._pieces):
            states = self._store.open(_name(index, number, piece))
            yield from (states[place - run[0]] for place in run if places is None or place in places)

    def _outputs(self, model: Model, index: int, inputs: Iterable[Floats]) -> Iterator[Floats]:
        """One layer's outputs; each expert is read once for as many batches as memory takes."""
        layer = DecoderLayer(model.config, model.source, index, self._dtype)
        experts = model.config.has_experts(index)
        last = layer.steps - 1 if experts else layer.steps
        for batches in _rounds(inputs, EXPERT_BYTES if experts else 0):
            states: list[State] = []
            for batch in batches:
                check_interrupt()
                flat = (Tensor(batch.reshape(-1, batch.shape[-1]), self._dtype),)
                states.append(layer.run(flat, len(batch), self._places(batch.shape[1]), stop=last))
            together = states[0]
            if experts:
                together = tuple(
                    ops.cat(parts) if parts[1:] else parts[0] for parts in zip(*states, strict=True)
                )
                del states
                together = layer.run(together, 1, self._places(1), start=last)
            rest = _floats(together[0])
            if not np.isfinite(rest).all():
                raise MsquantError(
                    f"{model.config.family.layer_name(index)} computes NaN or infinity",
                    where=model.name,
                    remedy="check the folder with `msquant inspect`",
                )
            for batch in batches:
                output, rest = np.split(rest, [batch.size // batch.shape[-1]])
                yield output.reshape(batch.shape)

    def predict(self, piece: int = 0) -> Predictions:
        """Compare what comes out for a part of the tokens, in blocks of the vocabulary."""
        places = self._ends[piece]
        targets = np.concatenate([_next_tokens(self._batches[place]) for place in places])
        found = [Distributions(targets) for _ in self._models]
        apart = [Divergence(found[0], other) for other in found[1:]]
        for block in vocabulary_blocks(self._config):
            heads = [Head(model.config, model.source, self._dtype, block) for model in self._models]
            for rows, states in self._head_rows(places):
                check_interrupt()
                logits = [
                    _floats(head(Tensor(x, self._dtype))) for head, x in zip(heads, states, strict=True)
                ]
                expected = found[0].add(rows, block.start, logits[0])
                for other, divergence, values in zip(found[1:], apart, logits[1:], strict=True):
                    divergence.add(rows, expected, other.add(rows, block.start, values))
        return found, apart

    def scores(
        self, predictions: Sequence[Predictions], layers: Sequence[Sequence[LayerScore]]
    ) -> list[ModelScore]:
        """One score a model.

        Args:
            predictions: of each piece.
            layers: what `differ` found of each.
        """
        by_model: list[tuple[LayerScore, ...]] = [(), *zip(*layers, strict=True)]
        found = [Distributions.joined(parts) for parts in zip(*(p[0] for p in predictions), strict=True)]
        apart = [
            Divergence.joined(parts, found[0], other)
            for parts, other in zip(zip(*(p[1] for p in predictions), strict=True), found[1:], strict=True)
        ]
        return [
            self._score(number, found, None if not number else apart[number - 1], by_model[number])
            for number in range(len(self._models))
        ]

    def _head_rows(self, places: range) -> Iterator[tuple[slice, list[Floats]]]:
        """The same tokens' hidden states in every model, as many as have their logits in memory at once."""
        start, last = 0, self._config.num_hidden_layers
        for batches in zip(*(self._hidden(last, n, places) for n in range(len(self._models))), strict=True):
            flat = [batch.reshape(-1, batch.shape[-1]) for batch in batches]
            for i in range(0, len(flat[0]), LOGIT_ROWS):
                parts = [part[i : i + LOGIT_ROWS] for part in flat]
                yield slice(start + i, start + i + len(parts[0])), parts
            start += len(flat[0])

    def _score(
        self,
        number: int,
        found: Sequence[Distributions],
        divergence: Divergence | None,
        layers: Sequence[LayerScore],
    ) -> ModelScore:
        reference = found[0] if number else None
        ends = np.cumsum([text.tokens.size for text in self._texts]).tolist()
        spans = [slice(start, end) for start, end in pairwise([0, *ends])]
        where = self._models[number].name
        scores = [
            text_score(text.name, span, found[number], reference, divergence, where)
            for text, span in zip(self._texts, spans, strict=True)
        ]
        overall = text_score("all", slice(0, ends[-1]), found[number], reference, divergence, where)
        best = found[number].best[:, 0]
        next_tokens = (best[span].reshape(t.tokens.shape) for t, span in zip(self._texts, spans, strict=True))
        return ModelScore(tuple(scores), overall, tuple(layers), tuple(next_tokens))


def _cut(count: int, pieces: int) -> list[range]:
    """So many batches in runs of nearly the same length."""
    ends = [count * piece // pieces for piece in range(pieces + 1)]
    return [range(first, end) for first, end in pairwise(ends) if first < end]


def _name(index: int, number: int, piece: int, kind: str = "states") -> str:
    """Of what model `number` has before decoder layer `index`, or made of the baseline's there."""
    return f"{kind}-{index:05d}-{number}-{piece:03d}"


def vocabulary_blocks(config: ModelConfig) -> Iterator[range]:
    """The tokens whose rows of the head, and logits of `LOGIT_ROWS` tokens, are in memory together."""
    width = max(1, min(LOGIT_BYTES // (8 * LOGIT_ROWS), HEAD_BYTES // (4 * config.hidden_size)))
    for first in range(0, config.vocab_size, width):
        yield range(first, min(first + width, config.vocab_size))


def _rounds(batches: Iterable[Floats], budget: int) -> Iterator[list[Floats]]:
    """As many batches at once as the budget takes four of, at least one."""
    held: list[Floats] = []
    for batch in batches:
        if held and 4 * sum(b.nbytes for b in [*held, batch]) > budget:
            yield held
            held = []
        held.append(batch)
    if held:
        yield held


def _rotated(model: Model, states: Floats) -> Floats:
    """Hidden states as a model has them, `[B, T, H]`."""
    return states if model.rotation is None else model.rotation.rotate(states)


def _unrotated(model: Model, states: Floats) -> Floats:
    """A model's hidden states without its rotation, `[B, T, H]`."""
    return states if model.rotation is None else model.rotation.undo(states)


def _floats(tensor: Tensor) -> Floats:
    values: Floats = tensor.asnumpy().astype(np.float32, copy=False)
    return values


def _next_tokens(tokens: NDArray[np.int32]) -> NDArray[np.integer]:
    """The token after each, flat; -1 after the last of a sequence."""
    return np.pad(tokens[:, 1:], ((0, 0), (0, 1)), constant_values=-1).reshape(-1)
