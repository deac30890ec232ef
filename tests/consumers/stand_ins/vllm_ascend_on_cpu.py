"""Lets vllm-ascend's quantization and mixture-of-experts code run on a CPU, without vLLM; import it first.

Executed from the wheel are the modules of `REAL`. What they import of vLLM and of the rest of vllm-ascend is
stood in for: classes are empty, functions decorate with nothing, and `ANSWERS` says the rest.
"""

import enum
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

REAL = (
    "vllm_ascend.quantization.modelslim_config",
    "vllm_ascend.quantization.quant_type",
    "vllm_ascend.quantization.tp_weight_switch",
    "vllm_ascend.quantization.utils",
    "vllm_ascend.attention.attention_v1",
    "vllm_ascend.attention.mla_v1",
    "vllm_ascend.quantization.methods.base",
    "vllm_ascend.quantization.methods.kv_c8",
    "vllm_ascend.quantization.methods.registry",
    "vllm_ascend.quantization.methods.w4a8",
    "vllm_ascend.quantization.methods.w8a8_static",
    "vllm_ascend.quantization.methods.w8a8_dynamic",
    "vllm_ascend.quantization.methods.w8a8_pdmix",
    "vllm_ascend.quantization.methods.w8a16",
    "vllm_ascend.device.device_op",
    "vllm_ascend.ops.fused_moe.experts_selector",
    "vllm_ascend.ops.fused_moe.moe_comm_method",
    "vllm_ascend.ops.fused_moe.moe_mlp",
    "vllm_ascend.ops.fused_moe.moe_runtime_args",
    "vllm_ascend.ops.fused_moe.moe_stage_contracts",
    "vllm_ascend.ops.fused_moe.moe_stage_params",
    "vllm_ascend.ops.fused_moe.token_dispatcher",
)


class MoECommType(enum.Enum):
    """How experts' tokens travel between NPUs; on one, they do not."""

    ALLGATHER = 0
    MC2 = 1
    ALLTOALL = 2
    FUSED_MC2 = 3


class AscendDeviceType(enum.Enum):
    """Of Atlas A2."""

    A2 = 0
    A3 = 1
    _310P = 2
    A5 = 3


class MoEActivation(enum.Enum):
    """What is between an expert's projections, where it is not `silu(gate) * up`."""

    SWIGLUSTEP = "swiglustep"
    SWIGLUOAI = "swigluoai"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"


class QuantizationConfig:
    """Of vLLM, which knows no names of caches' scales here."""

    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}

    @staticmethod
    def get_cache_scale_mapper() -> "WeightsMapper":
        """Names of other formats."""
        return WeightsMapper()


class WeightsMapper:
    """Of vLLM: how a checkpoint's names become a model's."""

    def __init__(self, orig_to_new_suffix: Any = None, orig_to_new_regex: Any = None, **_: Any) -> None:
        self.orig_to_new_suffix = orig_to_new_suffix or {}
        self.orig_to_new_regex = orig_to_new_regex or {}

    def __or__(self, other: "WeightsMapper") -> "WeightsMapper":
        return WeightsMapper(
            self.orig_to_new_suffix | other.orig_to_new_suffix,
            self.orig_to_new_regex | other.orig_to_new_regex,
        )


class AttentionMetadataBuilder:
    """Of vLLM, generic."""

    def __class_getitem__(cls, item: Any) -> type:
        return cls


class _Anything:
    """An object whose every method does nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: None


CONFIG = SimpleNamespace(
    compilation_config=SimpleNamespace(mode=None),
    model_config=SimpleNamespace(enforce_eager=False, dtype=None),
    parallel_config=SimpleNamespace(enable_expert_parallel=False),
    quant_config=None,
    kv_transfer_config=None,
    cache_config=None,
)
"""vLLM's config; who makes a scheme sets the dtype, what is said of the folder's quantization, whether the
engine takes another one's cache, and the cache's blocks."""
CONTEXT = SimpleNamespace(
    moe_comm_type=MoECommType.ALLGATHER,
    moe_comm_method=None,
    use_mega_moe=False,
    capturing=False,
    is_draft_model=False,
    num_tokens=0,
)
ASCEND_CONFIG = SimpleNamespace(
    multistream_overlap_gate=False,
    eplb_config=SimpleNamespace(dynamic_eplb=False),
    enable_fused_mc2=0,
    ascend_fusion_config=SimpleNamespace(fusion_ops_gmmswigluquant=True),
    enable_kv_nz=False,
    layer_sharding=None,
)
ANSWERS: dict[str, dict[str, Any]] = {
    "vllm.config": {
        "get_current_vllm_config": lambda: CONFIG,
        "CompilationMode": SimpleNamespace(VLLM_COMPILE=3),
    },
    "vllm.distributed": {
        "get_tensor_model_parallel_world_size": lambda: 1,
        "get_tensor_model_parallel_rank": lambda: 0,
    },
    "vllm.logger": {"logger": _Anything(), "init_logger": lambda *_: _Anything()},
    "vllm.model_executor.layers.attention.mla_attention": {
        "MLACommonMetadataBuilder": AttentionMetadataBuilder
    },
    "vllm.model_executor.layers.fused_moe.activation": {
        "MoEActivation": MoEActivation,
    },
    "vllm.model_executor.layers.quantization.base_config": {"QuantizationConfig": QuantizationConfig},
    "vllm.model_executor.models.utils": {"WeightsMapper": WeightsMapper},
    "vllm.triton_utils": {"HAS_TRITON": False},
    "vllm.v1.attention.backend": {
        "AttentionType": SimpleNamespace(DECODER="decoder", ENCODER_DECODER="encoder_decoder"),
        "AttentionMetadataBuilder": AttentionMetadataBuilder,
    },
    "vllm.v1.attention.backends.registry": {"AttentionBackendEnum": SimpleNamespace(CUSTOM=None)},
    "vllm_ascend.attention.utils": {
        "enabling_mlapo": lambda config: False,
        "maybe_save_kv_layer_to_connector": lambda *_: None,
        "needs_layer_aware_fia_graph_replay": lambda: False,
        "notify_kv_cache_written": lambda *_: None,
    },
    "vllm_ascend.attention.kvcomp_attn.attention_utils": {"is_enable_hamming_sparse": lambda: False},
    "vllm_ascend.envs": {"VLLM_ASCEND_MLA_FIA_SPLIT": False},
    "vllm_ascend.ascend_config": {"get_ascend_config": lambda: ASCEND_CONFIG},
    "vllm_ascend.ascend_forward_context": {
        "_EXTRA_CTX": CONTEXT,
        "MoECommType": MoECommType,
        "use_cann_megamoe": lambda *_: False,
    },
    "vllm_ascend.distributed.parallel_state": {"get_mc2_group": lambda: object()},
    "vllm_ascend.utils": {
        "ACL_FORMAT_FRACTAL_NZ": 29,
        "ASCEND_QUANTIZATION_METHOD": "ascend",
        "COMPRESSED_TENSORS_METHOD": "compressed-tensors",
        "AscendDeviceType": AscendDeviceType,
        "dispose_tensor": lambda *_: None,
        "enable_custom_op": lambda: True,
        "enable_dsa_cp": lambda: False,
        "get_ascend_device_type": lambda: AscendDeviceType.A2,
        "get_weight_prefetch_method": _Anything,
        "maybe_trans_nz": lambda weight: weight,
        "vllm_version_is": lambda version: version == "0.23.0",
    },
}


class _StandIn(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or f"{self.__name__}.{name}" in REAL:
            raise AttributeError(name)
        if name in ANSWERS.get(self.__name__, {}):
            return ANSWERS[self.__name__][name]
        if name.lstrip("_")[0].isupper() and not name.isupper():
            return type(
                name, (), {"__init__": lambda self, *_, **__: None, "__class_getitem__": lambda item: item}
            )
        if name.isupper():
            return name.lower()
        return lambda *_, **__: lambda decorated: decorated


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in ("vllm", "vllm_ascend"):
            return None
        if name in REAL:
            folders = [f"{entry}/{name.rpartition('.')[0].replace('.', '/')}" for entry in sys.path]
            return importlib.machinery.PathFinder.find_spec(name, folders)
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing to execute."""


sys.meta_path.insert(0, _Finder())
