"""Lets the real vllm_mindspore run on a CPU; `adapt` is called when it has been imported.

With msadapter a tensor of torch is one of MindSpore. Here the scheduler's and the sampler's are torch's and
the model's are MindSpore's, so they are changed into each other where the two meet: at the model's call,
and where vllm_mindspore makes tensors for vLLM's runner.
"""

import os
from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from typing import Any

import mindspore as ms
import numpy as np
import torch
from npu_operators import array, compute_in_float32
from vllm.distributed import get_tensor_model_parallel_rank

LOGITS = "NPU_LOGITS"
"""Names a file to which the logits of every step are appended, as NumPy saves arrays."""


def to_mindspore(value: Any) -> Any:
    """A tensor of torch as one of MindSpore, anything else as it is."""
    return ms.Tensor(value.numpy()) if isinstance(value, torch.Tensor) else value


def to_torch(value: Any) -> Any:
    """A tensor of MindSpore as one of torch, anything else as it is."""
    return torch.from_numpy(np.ascontiguousarray(array(value))) if isinstance(value, ms.Tensor) else value


def _replace(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    real = getattr(owner, name)
    setattr(owner, name, wraps(real)(make(real)))


def adapt() -> None:
    """Replace what asks for an NPU, and change tensors where MindSpore's and torch's meet."""
    import vllm.model_executor.model_loader.base_loader as base_loader
    import vllm.utils
    import vllm_mindspore.utils
    import vllm_mindspore.v1.utils as host_utils
    from vllm.distributed.parallel_state import GroupCoordinator
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    from vllm_mindspore.model_executor.layers import utils as layers_utils
    from vllm_mindspore.model_executor.layers.quantization.golden_stick.golden_stick import GoldenStickConfig
    from vllm_mindspore.model_executor.models.attention_mask import LowerTriangularMask
    from vllm_mindspore.model_executor.models.model_base import MsModelBase
    from vllm_mindspore.platforms.ascend import AscendPlatform
    from vllm_mindspore.v1.sample import sampler
    from vllm_mindspore.v1.sample.ops import topk_topp_sampler
    from vllm_mindspore.v1.worker import block_table, gpu_input_batch, gpu_model_runner

    vllm_mindspore.utils.get_ascend_soc_version = lambda: ["ascend910b"]
    AscendPlatform.dist_backend, AscendPlatform.device_name = "gloo", "cpu"
    AscendPlatform.is_pin_memory_available = classmethod(lambda cls: False)
    vllm.utils.is_pin_memory_available.cache_clear()
    torch.distributed.ProcessGroup._name = "gloo"
    ms.Tensor._ms_device = "Ascend"  # msadapter adds it

    # vLLM's runner and sampler work on the host's tensors.
    for module in (host_utils, block_table, gpu_input_batch, gpu_model_runner):
        module.ms = torch
    for module in (sampler, topk_topp_sampler, layers_utils):
        module.mint = torch
    _replace(
        GPUModelRunner,
        "__init__",
        lambda real: lambda self, config, device: real(self, config, torch.device("cpu")),
    )
    _replace(GPUModelRunner, "load_model", _load_model)

    # A dtype has two names here, and one in msadapter.
    base_loader.set_default_torch_dtype = lambda dtype: nullcontext()
    _replace(
        GoldenStickConfig,
        "get_supported_act_dtypes",
        lambda real: lambda self: [*real(self), torch.bfloat16, torch.float16],
    )
    _replace(base_loader.BaseModelLoader, "load_model", _load_on_cpu)
    # The CPU has no arithmetic of bfloat16; our attention needs no mask.
    _replace(
        LowerTriangularMask,
        "__init__",
        lambda real: lambda self, dtype, *others, **options: real(self, ms.float32, *others, **options),
    )

    def call(real: Any) -> Any:
        def called(self: Any, input_ids: Any, positions: Any, *others: Any, **options: Any) -> Any:
            return to_torch(real(self, to_mindspore(input_ids), to_mindspore(positions), *others, **options))

        return called

    _replace(MsModelBase, "__call__", call)

    def gather(real: Any) -> Any:
        def gathered(self: Any, tensor: Any, *others: Any, **options: Any) -> Any:
            made = real(self, to_torch(tensor), *others, **options)
            return to_mindspore(made) if isinstance(tensor, ms.Tensor) else made

        return gathered

    _replace(GroupCoordinator, "all_gather", gather)
    if vllm_mindspore.utils.is_mindformers_model_backend():
        from vllm_mindspore.model_executor.models.mf_models import mindformers

        _replace(mindformers, "gen_mf_config", _float32_config)


def convert_inputs(model: Any) -> None:
    """Change the tensors at a model's two ends; its class is not known before it is made."""
    kind = type(model)
    if getattr(kind, "on_cpu", False):
        return
    kind.on_cpu = True
    for name in ("prepare_base_inputs", "prepare_inputs"):
        if name in vars(kind) or any(name in vars(base) for base in kind.__mro__[:-1]):
            _replace(kind, name, _prepare)
    _replace(kind, "compute_logits", _logits)


def _logits(real: Any) -> Any:
    def computed(self: Any, hidden: Any, *others: Any) -> Any:
        logits = to_torch(real(self, to_mindspore(hidden), *others))
        if LOGITS in os.environ and get_tensor_model_parallel_rank() == 0:
            with open(os.environ[LOGITS], "ab") as file:
                np.save(file, logits.numpy())
        return logits

    return computed


def _prepare(real: Any) -> Any:
    def prepared(*arguments: Any, **options: Any) -> Any:
        inputs, *phases = real(*arguments, **options)
        return ({name: to_mindspore(value) for name, value in inputs.items()}, *phases)

    return prepared


def _float32_config(real: Any) -> Any:
    """MindFormers' configuration: parameters are loaded in bfloat16, in which a CPU computes nothing."""

    def generate(*arguments: Any) -> Any:
        config = real(*arguments)
        for name in ("compute_dtype", "layernorm_compute_dtype", "rotary_dtype", "router_dense_type"):
            config.model.model_config[name] = "float32"
        return config

    return generate


def _load_on_cpu(real: Any) -> Any:
    def load(self: Any, vllm_config: Any, model_config: Any) -> Any:
        device, dtype = vllm_config.device_config.device, model_config.dtype
        vllm_config.device_config.device = torch.device("cpu")
        model_config.dtype = getattr(ms, str(dtype).rpartition(".")[2].lower())
        model = real(self, vllm_config, model_config)
        vllm_config.device_config.device = device
        convert_inputs(model)
        compute_in_float32(model.get_params_dict().values(), [cell for _, cell in model.named_modules()])
        model_config.dtype = ms.float32
        if hasattr(model, "network"):
            # MindFormers' graphs hold what phase they are for; without them this sets it at each call.
            model.is_eager_mode = True
        for name, cell in model.named_modules():
            _rotary_in_float32(name, cell)
        return model

    return load


def _rotary_in_float32(name: str, cell: Any) -> None:
    """A table of cosines that was computed in the network's dtype is computed once more."""
    if "rotary" in name.rpartition(".")[2] and hasattr(cell, "_compute_cos_sin_cache"):
        cell.dtype = ms.float32
        cell.freqs_cos, cell.freqs_sin = cell._compute_cos_sin_cache()


def _load_model(real: Any) -> Any:
    def load(self: Any, *arguments: Any, **options: Any) -> Any:
        dtype = self.model_config.dtype
        loaded = real(self, *arguments, **options)
        self.kv_cache_dtype = self.dtype = torch.float32
        self.loaded_dtype = dtype
        return loaded

    return load
