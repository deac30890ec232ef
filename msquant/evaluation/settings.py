"""The section of a recipe on how a result is measured, and what is too much."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from msquant.evaluation.domain_scores import ModelScore


class EvaluationSettings(BaseModel):
    """The short evaluation at the end of `msquant quantize`, and the limits of a good result."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sequences: int = Field(1, ge=0, description="Windows of each builtin text; 0 measures nothing.")
    sequence_length: int = Field(256, ge=2, description="Tokens in each, at most what the model takes.")
    max_kl: float = Field(
        0.1, gt=0, description="Warn when the KL divergence from the float model is greater, in nats."
    )
    max_perplexity_increase: float = Field(
        0.1, gt=0, description="Warn when perplexity rises by more than this part of the float model's."
    )

    def beyond(self, score: ModelScore) -> list[dict[str, Any]]:
        """The limits that a result breaks: each one's `measure`, `value` and `limit`."""
        overall = score.overall
        values: dict[str, float] = {}
        if overall.kl is not None and overall.baseline_perplexity:
            values["max_kl"] = overall.kl
            values["max_perplexity_increase"] = overall.perplexity / overall.baseline_perplexity - 1
        return [
            {
                "measure": name.removeprefix("max_"),
                "value": float(f"{value:.6g}"),
                "limit": getattr(self, name),
            }
            for name, value in values.items()
            if value > getattr(self, name)
        ]
