"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): queries, keys and values from few channels."""

from typing import Any

from mindspore import Tensor, nn, ops

from msquant.checkpoint.weights import WeightSource
from msquant.models.attention import KeyValueCache, ScaledDotProduct
from msquant.models.cells import norm_cell, projection
from msquant.models.config import INNER_NORM_EPS, LatentSizes, ModelConfig
from msquant.models.positions import Positions
from msquant.models.rope import softmax_scale


class LatentAttention(nn.Cell):
    """Causal self-attention whose keys and values are made of a compressed state.

    A head's keys are its own rows of `kv_b_proj` without a position, followed by rotated channels that all
    heads share.
    """

    def __init__(
        self, config: ModelConfig, sizes: LatentSizes, source: WeightSource, name: str, dtype: Any
    ) -> None:
        super().__init__()
        self.heads, self.sizes = config.num_attention_heads, sizes
        self.compresses_queries = sizes.q_lora_rank is not None
        if self.compresses_queries:
            self.q_a_proj = projection(config, source, f"{name}.q_a_proj", dtype)
            self.q_a_layernorm = norm_cell(config, source, f"{name}.q_a_layernorm", dtype, INNER_NORM_EPS)
            self.q_b_proj = projection(config, source, f"{name}.q_b_proj", dtype)
        else:
            self.q_proj = projection(config, source, f"{name}.q_proj", dtype)
        self.kv_a_proj_with_mqa = projection(config, source, f"{name}.kv_a_proj_with_mqa", dtype)
        self.kv_a_layernorm = norm_cell(config, source, f"{name}.kv_a_layernorm", dtype, INNER_NORM_EPS)
        self.kv_b_proj = projection(config, source, f"{name}.kv_b_proj", dtype)
        self.o_proj = projection(config, source, f"{name}.o_proj", dtype)
        self.attend = ScaledDotProduct(softmax_scale(config, sizes))

    def compress(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the layer's input is reduced to, `[B*T, H]` to three tensors with `B*T` rows.

        Returns:
            The input of `q_b_proj` (without it, the queries themselves), the input of `kv_b_proj`, and the
            keys' shared channels that are yet to be rotated.
        """
        latent = self.kv_a_proj_with_mqa(x)
        compressed, shared = ops.split(latent, (self.sizes.kv_lora_rank, self.sizes.qk_rope_head_dim), axis=1)
        queries = self.q_a_layernorm(self.q_a_proj(x)) if self.compresses_queries else self.q_proj(x)
        return queries, self.kv_a_layernorm(compressed), shared

    def context(
        self,
        queries: Tensor,
        compressed: Tensor,
        shared: Tensor,
        batch: int,
        places: Positions,
        cache: KeyValueCache | None,
    ) -> Tensor:
        """The input of `o_proj`, `[B*T, heads * v_head_dim]`.

        Args:
            queries: `[B*T, heads * qk_head_dim]`.
            compressed: the input of `kv_b_proj`, `[B*T, kv_lora_rank]`.
            shared: the keys' shared channels, `[B*T, qk_rope_head_dim]`.
            batch: B.
            places: the tokens' positions.
            cache: of the tokens before these; extended in place.
        """
        nope, value = self.sizes.qk_nope_head_dim, self.sizes.v_head_dim
        queries = places.rotate(self._split(queries, batch, self.heads))
        expanded = self._split(self.kv_b_proj(compressed), batch, self.heads)
        own, values = ops.split(expanded, (nope, value), axis=3)
        rotated = ops.tile(places.rotate(self._split(shared, batch, 1)), (1, self.heads, 1, 1))
        keys = ops.cat((own, rotated), axis=3)
        if cache is not None:
            keys, values = cache.extend(keys, values)
        return self.attend(queries, keys, values, places)

    @staticmethod
    def _split(x: Tensor, batch: int, heads: int) -> Tensor:
        return x.reshape(batch, -1, heads, x.shape[1] // heads).transpose(0, 2, 1, 3)
