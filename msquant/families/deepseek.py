"""DeepSeek-V2 and V3, and Kimi-K2: latent attention (arXiv 2405.04434), grouped and shared experts."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from msquant.errors import CheckpointError
from msquant.families.base import Config, LatentSizes, LinearShape, SmoothGroup, positive
from msquant.families.grouped_experts import SIGMOID_ROUTER, GroupedExperts
from msquant.families.row_orders import RopeRows, RowOrder


@dataclass(frozen=True, kw_only=True, eq=False)
class DeepSeek(GroupedExperts):
    """A family with latent attention."""

    attention: Literal["grouped-query", "latent"] = "latent"
    mindspore_backend: Literal["native", "mindformers"] = "mindformers"

    def attention_groups(self, config: Config) -> tuple[SmoothGroup, ...]:
        """See `Family`; queries that are not compressed make no group of their own."""
        names = self.names
        queries, queries_down, queries_up, latent_down, latent_up, output = names.within_attention(
            names.queries,
            names.queries_down,
            names.queries_up,
            names.latent_down,
            names.latent_up,
            names.output,
        )
        queries_norm, latent_norm = names.within_attention(names.queries_down_norm, names.latent_norm)
        tail = (SmoothGroup("kv_b", (latent_up,), latent_norm), SmoothGroup("o", (output,), latent_up))
        if self._query_rank(config) is None:
            return SmoothGroup("q_kv_a", (queries, latent_down), names.input_norm), *tail
        return (
            SmoothGroup("q_kv_a", (queries_down, latent_down), names.input_norm),
            SmoothGroup("q_b", (queries_up,), queries_norm),
            *tail,
        )

    def attention_linears(self, config: Config, hidden: int) -> Iterator[LinearShape]:
        """See `Family`."""
        names = self.names
        heads, bias = positive(config, "num_attention_heads"), bool(config.get("attention_bias"))
        rope, nope = positive(config, "qk_rope_head_dim"), positive(config, "qk_nope_head_dim")
        value, kv_rank = positive(config, "v_head_dim"), positive(config, "kv_lora_rank")
        if self._query_rank(config) is None:
            yield names.queries, heads * (nope + rope), hidden, False
        else:
            q_rank = positive(config, "q_lora_rank")
            yield names.queries_down, q_rank, hidden, bias
            yield names.queries_up, heads * (nope + rope), q_rank, False
        yield names.latent_down, kv_rank + rope, hidden, bias
        yield names.latent_up, heads * (nope + value), kv_rank, False
        yield names.output, hidden, heads * value, bias

    def attention_norms(self, config: Config, hidden: int) -> Iterator[tuple[str, int]]:
        """See `Family`."""
        if self._query_rank(config) is not None:
            yield self.names.queries_down_norm, positive(config, "q_lora_rank")
        yield self.names.latent_norm, positive(config, "kv_lora_rank")

    def _query_rank(self, config: Config) -> Any:
        """None where queries are not compressed, which `config.json` has to say."""
        return config.get("q_lora_rank", self.defaults.get("q_lora_rank"))

    def latent_sizes(self, config: Any) -> LatentSizes:
        """See `Family`."""
        return LatentSizes(
            q_lora_rank=config.q_lora_rank,
            kv_lora_rank=config.kv_lora_rank,
            qk_nope_head_dim=config.qk_nope_head_dim,
            qk_rope_head_dim=config.qk_rope_head_dim,
            v_head_dim=config.v_head_dim,
            rope_interleave=getattr(config, "rope_interleave", True),
        )

    @property
    def fused(self) -> dict[str, tuple[str, ...]]:
        """See `Family`; the queries of a model that does not compress them run alone."""
        names = self.names
        return {
            "gate_up_proj": (names.gate, names.up),
            "fused_qkv_a_proj": (names.queries_down, names.latent_down),
        }

    @property
    def folded(self) -> tuple[str, ...]:
        """See `Family`: engines take the weight that makes keys and values of the latent state apart."""
        return (self.names.latent_up,)

    def row_orders(self, config: Config) -> RopeRows:
        """See `Family`.

        DeepSeek's own checkpoints rotate neighbouring rows (0, 1), (2, 3), ... of a head; MindFormers rotates
        row i with row i + d / 2. It reorders the rows itself when it loads a model in floating point, but
        expects a golden-stick folder to hold them in its order (mindformers 1.7.0,
        parallel_core/inference/weights_utils.py, `infer_trans_rope_weight`, and tensor_parallel/layers.py,
        `rope_transition`). There are none where the rows are in that order already (`rope_interleave` is
        false). It builds the multi-token-prediction layers without quantization, so those stay as they are.

        Raises:
            CheckpointError: a size is missing or no positive integer, or `qk_rope_head_dim` is odd.
        """
        if config.get("rope_interleave") is False:
            return RopeRows({}, 0)
        rope = positive(config, "qk_rope_head_dim")
        if rope % 2:
            raise CheckpointError(
                f"qk_rope_head_dim is {rope}, an even number is expected", where="config.json"
            )
        query = RowOrder(
            positive(config, "num_attention_heads"), positive(config, "qk_nope_head_dim") + rope, rope
        )
        latent = RowOrder(1, positive(config, "kv_lora_rank") + rope, rope)
        names = self.names
        compressed = self._query_rank(config) is not None
        queries, latent_down = names.within_attention(
            names.queries_up if compressed else names.queries, names.latent_down
        )
        return RopeRows({queries: query, latent_down: latent}, positive(config, "num_hidden_layers"))

    def served_formats(self, config: Config) -> tuple[str, ...]:
        """See `Family`; MindFormers does not load queries that are not compressed."""
        if self._query_rank(config) is None:
            return tuple(name for name in self.formats if name != "golden-stick")
        return self.formats


DEEPSEEK_V2 = DeepSeek(
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    feed_forward_biases=True,
    router="softmax",
    defaults={"q_lora_rank": 1536},
    options={
        "topk_method": (None, "greedy", "group_limited_greedy"),
        "scoring_func": (None, "softmax"),
        "norm_topk_prob": (None, False),
        "moe_layer_freq": (None, 1),
    },
    # vLLM-MindSpore 0.5.1 has no DeepSeek-V2.
    formats=("ascend", "compressed-tensors"),
)

DEEPSEEK_V3 = DeepSeek(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    router="sigmoid",
    correction_bias=True,
    predicts=True,
    defaults={"q_lora_rank": 1536, "first_k_dense_replace": 3},
    options=SIGMOID_ROUTER,
)

KIMI_K2 = replace(
    DEEPSEEK_V3,
    model_type="kimi_k2",
    # Its config.json names DeepSeek's own architecture, which it is.
    read_as="deepseek_v3",
    # MindFormers 2.1.0 does not know the name.
    formats=("ascend", "compressed-tensors"),
)
