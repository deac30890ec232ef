"""How a model is served: sizes, parallelism and the engine's settings, as a section of a recipe.

The names are those of vLLM's arguments. The values are closed and typed because they also come with folders
that somebody else made: none of them can name a file, a module or a variable of one's choice.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

Interface = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.@:-]{0,14}$")]
"""A network interface's name: Linux allows 15 characters."""
Address = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9.:-]{0,252}$")]
Port = Annotated[int, Field(ge=1, le=65535)]
_SETTING = "[a-z_]+: ?[A-Za-z0-9.-]+"
MemoryPolicy = Annotated[str, StringConstraints(pattern=f"^{_SETTING}(, ?{_SETTING})*$")]
"""MindSpore's way to write one: `name:value`, separated by commas."""


class ServingSettings(BaseModel):
    """How vLLM-MindSpore serves a model; nothing here changes the weights."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    max_model_len: int | None = Field(
        None, ge=1, description="Longest prompt and text together, in tokens; null: what the model takes."
    )
    max_num_seqs: int | None = Field(
        None, ge=1, description="Most requests worked on at a time; null: the engine's choice."
    )
    max_num_batched_tokens: int | None = Field(
        None, ge=1, description="Most tokens in one step of the engine; null: the engine's choice."
    )
    block_size: int = Field(128, ge=1, description="Tokens in a block of the key-value cache.")
    gpu_memory_utilization: float = Field(
        0.9, gt=0, le=1, description="Part of an NPU's memory for weights and key-value cache."
    )
    tensor_parallel_size: int = Field(1, ge=1, description="NPUs that share each matrix.")
    data_parallel_size: int = Field(1, ge=1, description="Copies of the attention, each with its requests.")
    expert_parallel_size: int | None = Field(
        None, ge=1, description="NPUs that share the experts out whole; null: each expert is split."
    )
    nodes: int = Field(1, ge=1, description="Machines, each with the same number of NPUs.")
    devices: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None, min_length=1, description="The NPUs to use on each node; null: the first ones."
    )
    launcher: Literal["mp", "ray"] = Field(
        "mp", description="What starts the processes of several NPUs; tensors split over nodes need ray."
    )
    head_address: Address | None = Field(None, description="IP address of the first of several nodes.")
    network_interface: Interface | None = Field(
        None, description="Interface that the nodes reach each other by, such as enp189s0f0."
    )
    ray_port: Port = Field(6379, description="Port of Ray on the first node.")
    data_parallel_rpc_port: Port = Field(12370, description="Port of data parallelism on the first node.")
    model_backend: Literal["MindFormers", "Native", "MindONE"] | None = Field(
        None, description="`VLLM_MS_MODEL_BACKEND`; null: what serves the architecture's folders."
    )
    hccl_op_expansion_mode: Literal["AIV", "AI_CPU", "HOST", "HOST_TS"] = Field(
        "AIV", description="`HCCL_OP_EXPANSION_MODE`: where collective operations are unfolded."
    )
    hccl_buffsize: int | None = Field(
        None, ge=1, description="`HCCL_BUFFSIZE`: MB of the buffer between two NPUs; null: not set."
    )
    ms_enable_lccl: bool = Field(False, description="`MS_ENABLE_LCCL`: LCCL in place of HCCL in one node.")
    ms_alloc_conf: MemoryPolicy = Field(
        "enable_vmm:true", description="`MS_ALLOC_CONF`: MindSpore's memory policy."
    )
    ms_mempool_block_size: int | None = Field(
        None, ge=1, description="`MS_MEMPOOL_BLOCK_SIZE`: GB that the memory pool grows by; null: not set."
    )

    @property
    def world_size(self) -> int:
        """NPUs in all."""
        return self.tensor_parallel_size * self.data_parallel_size

    @property
    def npus_per_node(self) -> int:
        """NPUs used on each node."""
        return self.world_size // self.nodes

    @property
    def uses_ray(self) -> bool:
        """Whether a Ray cluster must be up before the engine starts."""
        return self.launcher == "ray"

    def visible_devices(self) -> tuple[int, ...]:
        """The NPUs to use on each node."""
        return self.devices or tuple(range(self.npus_per_node))

    def changed(self, values: Mapping[str, Any]) -> Self:
        """A checked copy with other values; those that are None stay as they are.

        Raises:
            ValidationError: a value is not valid.
        """
        given = {name: value for name, value in values.items() if value is not None}
        return type(self).model_validate(self.model_dump() | given)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.world_size % self.nodes:
            raise ValueError(f"{self.world_size} NPUs cannot be shared evenly by {self.nodes} nodes")
        if self.nodes > 1 and self.data_parallel_size == 1 and not self.uses_ray:
            raise ValueError("tensor parallelism over several nodes needs launcher: ray")
        if self.data_parallel_size > 1 and self.data_parallel_size % self.nodes:
            raise ValueError(
                f"data_parallel_size {self.data_parallel_size} is not a multiple of {self.nodes} nodes"
            )
        if self.expert_parallel_size is not None and self.world_size % self.expert_parallel_size:
            raise ValueError(
                f"expert_parallel_size {self.expert_parallel_size} does not divide "
                f"tensor_parallel_size x data_parallel_size = {self.world_size}"
            )
        if self.devices is not None and (
            len(self.devices) != self.npus_per_node or len(set(self.devices)) != len(self.devices)
        ):
            raise ValueError(f"devices must name {self.npus_per_node} different NPUs of each node")
        return self

    def engine_arguments(self) -> dict[str, Any]:
        """vLLM's `EngineArgs` for what this section says, `None` and sizes of 1 left out.

        They are keyword arguments of `LLM`, and with dashes for underscores options of `vllm serve`.
        """
        arguments: dict[str, Any] = {
            "max_num_seqs": self.max_num_seqs,
            "max_model_len": self.max_model_len,
            "max_num_batched_tokens": self.max_num_batched_tokens,
            "block_size": self.block_size,
            "gpu_memory_utilization": self.gpu_memory_utilization,
        }
        if self.tensor_parallel_size > 1:
            arguments["tensor_parallel_size"] = self.tensor_parallel_size
        if self.uses_ray and self.data_parallel_size == 1:
            arguments["distributed_executor_backend"] = "ray"
        if self.expert_parallel_size is not None:
            arguments["enable_expert_parallel"] = True
            # Without it vLLM-MindSpore takes all NPUs.
            arguments["additional_config"] = {"expert_parallel": self.expert_parallel_size}
        return {name: value for name, value in arguments.items() if value is not None}
