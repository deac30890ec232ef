"""The row order of rotary projections in multi-head latent attention: interleaved, or even rows then odd.

DeepSeek's own checkpoints rotate neighbouring rows (0, 1), (2, 3), ... of a head; MindFormers rotates row i
with row i + d / 2. It reorders the rows itself when it loads a model in floating point, but expects a
golden-stick folder to hold them in its order (mindformers 1.7.0, parallel_core/inference/weights_utils.py,
`infer_trans_rope_weight`, and tensor_parallel/layers.py, `rope_transition`). It builds the
multi-token-prediction layers without quantization, so those stay as they are.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msquant.checkpoint.decoder_layout import LATENT_TYPES, positive
from msquant.errors import CheckpointError

_LAYERS = "model.layers."


@dataclass(frozen=True)
class RowOrder:
    """How the rows of one projection are reordered: those of each head alike.

    Attributes:
        heads: number of heads.
        head_rows: rows of a head.
        rope_rows: the last rows of a head, which are rotated; an even number.
    """

    heads: int
    head_rows: int
    rope_rows: int

    @property
    def rows(self) -> int:
        """Rows of the whole projection."""
        return self.heads * self.head_rows

    def deinterleaved(self) -> NDArray[np.int64]:
        """`[rows]`: `tensor[order.deinterleaved()]` has the even rope rows of a head first, then the odd."""
        plain = self.head_rows - self.rope_rows
        rope = plain + np.concatenate([np.arange(0, self.rope_rows, 2), np.arange(1, self.rope_rows, 2)])
        head = np.concatenate([np.arange(plain), rope])
        starts = np.arange(self.heads) * self.head_rows
        return (starts[:, None] + head).reshape(-1).astype(np.int64)

    def interleaved(self) -> NDArray[np.int64]:
        """`[rows]`: the inverse of `deinterleaved`, from the stored to the Hugging Face order."""
        return np.argsort(self.deinterleaved(), kind="stable").astype(np.int64)


@dataclass(frozen=True)
class RopeRows:
    """The projections of a model whose rows are reordered.

    Attributes:
        orders: by the projection's name below its decoder layer, for example `self_attn.q_b_proj`.
        layers: decoder layers it applies to; the multi-token-prediction layers follow after them.
    """

    orders: Mapping[str, RowOrder]
    layers: int

    def of(self, module: str) -> RowOrder | None:
        """The order of a layer's rows by its full name, or None if they stay as they are."""
        number, _, suffix = module.removeprefix(_LAYERS).partition(".")
        if not module.startswith(_LAYERS) or not number.isdecimal() or int(number) >= self.layers:
            return None
        return self.orders.get(suffix)


def rope_rows(config: Mapping[str, Any]) -> dict[str, RowOrder]:
    """Projections of a decoder layer whose rope rows MindFormers wants de-interleaved.

    Args:
        config: the content of `config.json`.

    Returns:
        By the name below the layer; empty for a model without latent attention, and for one whose rows are
        in that order already (`rope_interleave` is false).

    Raises:
        CheckpointError: a size is missing or no positive integer, or `qk_rope_head_dim` is odd.
    """
    if config.get("model_type") not in LATENT_TYPES or config.get("rope_interleave") is False:
        return {}
    rope = positive(config, "qk_rope_head_dim")
    if rope % 2:
        raise CheckpointError(f"qk_rope_head_dim is {rope}, an even number is expected", where="config.json")
    query = RowOrder(
        positive(config, "num_attention_heads"), positive(config, "qk_nope_head_dim") + rope, rope
    )
    latent = RowOrder(1, positive(config, "kv_lora_rank") + rope, rope)
    query_name = "q_proj" if config.get("q_lora_rank", 0) is None else "q_b_proj"
    return {f"self_attn.{query_name}": query, "self_attn.kv_a_proj_with_mqa": latent}


def model_rope_rows(config: Mapping[str, Any]) -> RopeRows:
    """`rope_rows` with the number of layers it applies to. Raises CheckpointError as that does."""
    orders = rope_rows(config)
    return RopeRows(orders, positive(config, "num_hidden_layers") if orders else 0)
