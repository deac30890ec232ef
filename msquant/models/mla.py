"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): queries, keys and values from few channels."""

from typing import Any

from mindspore import Tensor, nn, ops

from msquant.checkpoint.weights import WeightSource
from msquant.families.base import LatentSizes
from msquant.models.attention import KeyValueCache, ScaledDotProduct
from msquant.models.cells import add_linears, norm_cell
from msquant.models.config import INNER_NORM_EPS, ModelConfig
from msquant.models.positions import Positions
from msquant.models.rope import softmax_scale


class LatentAttention(nn.Cell):
    """Causal self-attention whose keys and values are made of a compressed state.

    A head's keys are its own rows, without a position, of what the compressed state is expanded to, followed
    by rotated channels that all heads share.
    """

    def __init__(
        self, config: ModelConfig, sizes: LatentSizes, source: WeightSource, name: str, dtype: Any
    ) -> None:
        super().__init__()
        self.heads, self.sizes = config.num_attention_heads, sizes
        self.compresses_queries = sizes.q_lora_rank is not None
        self.names = names = config.family.names
        linears, norms = [names.queries], [names.latent_norm]
        if self.compresses_queries:
            linears, norms = [names.queries_down, names.queries_up], [names.queries_down_norm, *norms]
        linears += [names.latent_down, names.latent_up, names.output]
        add_linears(self, config, source, name, dtype, *linears)
        for norm in norms:
            setattr(self, norm, norm_cell(config, source, f"{name}.{norm}", dtype, INNER_NORM_EPS))
        self.attend = ScaledDotProduct(softmax_scale(config, sizes))

    def compress(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the layer's input is reduced to, `[B*T, H]` to three tensors with `B*T` rows.

        Returns:
            The compressed queries (or the queries themselves where they are not), the compressed keys and
            values, and the keys' shared channels that are yet to be rotated.
        """
        names = self.names
        latent = getattr(self, names.latent_down)(x)
        compressed, shared = ops.split(latent, (self.sizes.kv_lora_rank, self.sizes.qk_rope_head_dim), axis=1)
        if self.compresses_queries:
            queries = getattr(self, names.queries_down_norm)(getattr(self, names.queries_down)(x))
        else:
            queries = getattr(self, names.queries)(x)
        return queries, getattr(self, names.latent_norm)(compressed), shared

    def expand_queries(self, compressed: Tensor) -> Tensor:
        """Compressed queries to `[B*T, heads * qk_head_dim]`."""
        return getattr(self, self.names.queries_up)(compressed)

    def context(
        self,
        queries: Tensor,
        compressed: Tensor,
        shared: Tensor,
        batch: int,
        places: Positions,
        cache: KeyValueCache | None,
    ) -> Tensor:
        """The input of the output projection, `[B*T, heads * v_head_dim]`.

        Args:
            queries: `[B*T, heads * qk_head_dim]`.
            compressed: keys and values, `[B*T, kv_lora_rank]`.
            shared: the keys' shared channels, `[B*T, qk_rope_head_dim]`.
            batch: B.
            places: the tokens' positions.
            cache: of the tokens before these; extended in place.
        """
        nope, value = self.sizes.qk_nope_head_dim, self.sizes.v_head_dim
        queries = places.rotate(self._split(queries, batch, self.heads))
        expanded = self._split(getattr(self, self.names.latent_up)(compressed), batch, self.heads)
        own, values = ops.split(expanded, (nope, value), axis=3)
        rotated = ops.tile(places.rotate(self._split(shared, batch, 1)), (1, self.heads, 1, 1))
        keys = ops.cat((own, rotated), axis=3)
        if cache is not None:
            keys, values = cache.extend(keys, values)
        return self.attend(queries, keys, values, places)

    @staticmethod
    def _split(x: Tensor, batch: int, heads: int) -> Tensor:
        return x.reshape(batch, -1, heads, x.shape[1] // heads).transpose(0, 2, 1, 3)
