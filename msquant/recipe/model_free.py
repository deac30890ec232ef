"""The section of a recipe that says which tensors are linear layers, where no modelling code says it."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from msquant.algorithms.base import matches

KEPT_FLOAT = (
    # Embeddings, also of positions and of patches.
    "embed",
    "wte",
    "wpe",
    # Output heads, of the multi-token-prediction layers as well.
    "*head",
    "score",
    "classifier",
    "*output_layer",
    # Norms that are stored as matrices.
    "*norm",
    # Routers, and gates with an output or a few.
    "*.gate",
    "*.gate.*",
    "*_gate",
    "router",
    # What decides how fast a recurrent state decays, and convolutions.
    "*.in_proj_a",
    "*.in_proj_b",
    "*.in_proj_ba",
    "*.x_proj",
    "*.dt_proj",
    "conv",
    # Engines multiply it into the attention, and rank tokens by the indexer of sparse attention.
    "*.kv_b_proj",
    "indexer",
    # What joins the hidden state and the next embedding in multi-token prediction.
    "*.eh_proj",
    "*mtp.fc",
    # Towers for images and sound, and what leads from them to the text.
    "visual",
    "vision",
    "image",
    "audio",
    "projector",
    "mlp1.*",
)
"""Names of matrices that stay in floating point where a recipe does not say others."""


class ModelFreeSettings(BaseModel):
    """How linear layers are found without modelling code."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    keep_float: tuple[str, ...] = Field(
        KEPT_FLOAT,
        description="Patterns of names of matrices that stay in floating point whatever schemes says; as "
        "those of schemes. A list in a recipe takes the place of this one.",
    )
    expert_layout: Literal["auto", "outputs-first", "inputs-first"] = Field(
        "auto",
        description="How an expert lies in a tensor that holds all experts of a layer: [outputs, inputs], or "
        "[inputs, outputs]; auto: by hidden_size and model_type.",
    )
    gate_up: Literal["auto", "halves", "alternating"] = Field(
        "auto",
        description="How gate and up lie in such a tensor: one behind the other, or row by row; auto: by "
        "model_type.",
    )

    def kept_by(self, module: str) -> str | None:
        """The pattern that keeps a matrix in floating point, by its name without `.weight`; None if none."""
        return next((pattern for pattern in self.keep_float if matches(pattern, module)), None)
