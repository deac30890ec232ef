"""DeepSeek-V3.2 and GLM-5: latent attention over the tokens that an indexer picks (arXiv 2512.02556).

For each token the indexer scores all earlier ones and the best `index_topk` of them are attended to. In a
context of at most so many tokens that is all of them, and the layer is latent attention as DeepSeek-V3 has
it. Longer contexts are refused: msquant does not compute the indexer.

vllm-ascend quantizes the keys that the indexer keeps where the description has an `indexer_quant_type`, with
rotations made for it; without that entry, as here, they stay in the model's dtype.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from msquant.families.base import Config, Shapes, SmoothGroup, positive, unexpected
from msquant.families.deepseek import DeepSeek
from msquant.families.grouped_experts import SIGMOID_ROUTER

_INDEXER = "indexer"
# Of the layer's input, and of the compressed queries.
_KEYS, _HEAD_WEIGHTS, _QUERIES = "wk", "weights_proj", "wq_b"
_KEY_NORM = "k_norm"


@dataclass(frozen=True, kw_only=True, eq=False)
class SparseAttention(DeepSeek):
    """A family with latent attention and an indexer, whose weights are carried in floating point."""

    def attention_groups(self, config: Config) -> tuple[SmoothGroup, ...]:
        """See `Family`; what feeds the indexer is smoothed for it too."""
        names = self.names
        (compressed,) = names.within_attention(names.queries_down_norm)
        readers = {
            names.input_norm: self._indexer(_KEYS, _HEAD_WEIGHTS),
            compressed: self._indexer(_QUERIES),
        }
        return tuple(
            replace(group, followers=readers.get(group.previous, ()))
            for group in super().attention_groups(config)
        )

    def never_quantized(self, linear: str) -> bool:
        """See `Family`: the indexer, too."""
        return super().never_quantized(linear) or linear.startswith(f"{self._indexer()[0]}.")

    def most_tokens(self, config: Config) -> tuple[str, int]:
        """See `Family`."""
        return "index_topk", positive(self.completed(config), "index_topk")

    def layer_shapes(self, config: Config, index: int) -> Shapes:
        """See `Family`."""
        shapes = super().layer_shapes(config, index)
        if not self._has_indexer(config, index):
            return shapes
        (indexer,) = self._indexer()
        return shapes | {
            f"{self.layer_name(index)}.{indexer}.{part}": shape
            for part, shape in self._indexer_shapes(config)
        }

    def _indexer(self, *parts: str) -> tuple[str, ...]:
        """Names of its parts within the layer; without any, its own."""
        (indexer,) = self.names.within_attention(_INDEXER)
        return tuple(f"{indexer}.{part}" for part in parts) or (indexer,)

    def _has_indexer(self, config: Config, index: int) -> bool:
        """Whether a layer has one of its own: in GLM-5.2 most take what an earlier layer has picked."""
        kinds = config.get("indexer_types")
        if kinds is None:
            return True
        if not isinstance(kinds, list) or len(kinds) < positive(config, "num_hidden_layers"):
            raise unexpected("indexer_types", kinds, "a list with an entry for each layer")
        return index >= len(kinds) or kinds[index] == "full"

    def _indexer_shapes(self, config: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
        heads, size = positive(config, "index_n_heads"), positive(config, "index_head_dim")
        hidden = positive(config, "hidden_size")
        yield f"{_QUERIES}.weight", (heads * size, positive(config, "q_lora_rank"))
        yield f"{_KEYS}.weight", (size, hidden)
        yield f"{_KEY_NORM}.weight", (size,)
        yield f"{_KEY_NORM}.bias", (size,)
        yield f"{_HEAD_WEIGHTS}.weight", (heads, hidden)


DEEPSEEK_V32 = SparseAttention(
    model_type="deepseek_v32",
    architecture="DeepseekV32ForCausalLM",
    read_as="deepseek_v3",
    router="sigmoid",
    correction_bias=True,
    predicts=True,
    defaults={
        "q_lora_rank": 1536,
        "first_k_dense_replace": 3,
        "index_topk": 2048,
        "index_n_heads": 64,
        "index_head_dim": 128,
    },
    options=SIGMOID_ROUTER,
    # No backend of vLLM-MindSpore has it.
    formats=("ascend", "compressed-tensors"),
)

GLM_MOE_DSA = replace(
    DEEPSEEK_V32,
    model_type="glm_moe_dsa",
    architecture="GlmMoeDsaForCausalLM",
    shares_prediction_ends=True,
    defaults={**DEEPSEEK_V32.defaults, "q_lora_rank": 2048, "index_n_heads": 32},
)
