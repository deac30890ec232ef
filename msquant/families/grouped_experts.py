"""The mixture of experts of DeepSeek-V2 (arXiv 2405.04434) and V3, which other families have as it is."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from msquant.families.base import Config, ExpertSizes, Family, positive, unexpected

SIGMOID_ROUTER: Mapping[str, tuple[Any, ...]] = {
    "topk_method": (None, "noaux_tc"),
    "scoring_func": (None, "sigmoid"),
    "moe_layer_freq": (None, 1),
}
"""The `options` of a family with the router of DeepSeek-V3, which others name or leave out."""


@dataclass(frozen=True, kw_only=True, eq=False)
class GroupedExperts(Family):
    """A family whose experts are ranked in groups, beside shared ones, in all layers but the first."""

    expert_count: str | None = "n_routed_experts"

    def has_experts(self, config: Config, index: int) -> bool:
        """See `Family`: all but the first layers."""
        dense = config.get("first_k_dense_replace", 0)
        if type(dense) is not int or dense < 0:
            raise unexpected("first_k_dense_replace", dense, "a number of layers")
        return index >= dense

    def shared_experts(self, config: Config) -> int:
        """See `Family`."""
        return positive(config, "n_shared_experts")

    def expert_sizes(self, config: Any) -> ExpertSizes:
        """See `Family`."""
        # DeepSeek-V2 counts groups even where its greedy router does not look at them.
        grouped = getattr(config, "topk_method", None) != "greedy"
        return ExpertSizes(
            count=config.n_routed_experts,
            per_token=config.num_experts_per_tok,
            intermediate_size=config.moe_intermediate_size,
            shared=config.n_shared_experts,
            groups=config.n_group if grouped else 1,
            groups_per_token=config.topk_group if grouped else 1,
            group_score=2 if self.correction_bias else 1,
            normalize=config.norm_topk_prob,
            scaling_factor=float(config.routed_scaling_factor),
        )
