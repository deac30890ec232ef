"""Which packed layers, and which int4 layers with int8 inputs, vLLM has kernels for.

Read in vllm 0.11.0, for GPUs (compressed_tensors_moe.py, schemes/compressed_tensors_wNa16.py and
compressed_tensors_w4a8_int.py, quantization/kernels/mixed_precision), and in vllm 0.32.0, for a CPU
(kernels/linear/mixed_precision/cpu.py: `CPUWNA16LinearKernel.can_implement`, dynamic_4bit.py,
compressed_tensors_moe_wna16.py, fused_moe/experts/cpu_moe.py: `CPUExpertsInt4`, cpu_int4_moe.py). What
dynamic_4bit.py calls, torch's `_dyn_quant_pack_4bit_weight`, was run.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from msquant.families import expected_shapes, find_family
from msquant.families.base import Family
from msquant.formats.compressed_tensors.packed import is_packed, per_word
from msquant.formats.fused_layers import experts_parent, fused_layers
from msquant.schemes import Scheme

_BITS = {"0.11.0": (4, 8), "0.32.0": (4,)}
_INT4 = 4
_ON_CPU = "0.32.0"
_MULTIPLE = 32


def int4_problems(
    version: str, linears: Mapping[str, Scheme], config: Mapping[str, Any], tensor_parallel: int
) -> Iterator[tuple[str, str]]:
    """The layers with int4 weights and int8 inputs that a version of vLLM does not run, and why.

    Arguments as for `kernel_problems`.
    """
    found = [
        (module, scheme.weights)
        for module, scheme in linears.items()
        if scheme.is_dynamic and scheme.weights is not None and scheme.weights.bits == _INT4
    ]
    family = find_family(config.get("model_type"))
    shapes = (expected_shapes(dict(config)) or {}) if found and family is not None else {}
    for module, quant in found:
        _, columns = shapes.get(f"{module}.weight", (0, 0))
        if family is not None and _shares_inputs(module, family):
            columns //= tensor_parallel
        size = quant.group_size
        if version != _ON_CPU:
            yield module, "no kernel for GPUs takes int4 weights with int8 activations"
        elif size is not None and size % _MULTIPLE:
            yield module, f"its kernel takes groups of multiples of {_MULTIPLE}"
        elif columns % (size or 2):
            whole = f"groups of {size}" if size else "pairs"
            yield module, f"{whole} do not divide the {columns} inputs of each processor"


def _shares_inputs(module: str, family: Family) -> bool:
    """Whether processors share out the inputs of a layer, and not its outputs."""
    return module.rpartition(".")[2] in (family.names.output, family.names.down)


def kernel_problems(
    version: str, linears: Mapping[str, Scheme], config: Mapping[str, Any], tensor_parallel: int
) -> Iterator[tuple[str, str]]:
    """The layers that a version of vLLM does not run, and why.

    Args:
        version: of vLLM.
        linears: the scheme of each linear layer by module.
        config: the content of the model's `config.json`.
        tensor_parallel: processors that share each matrix.
    """
    alone = {module: scheme for module, scheme in linears.items() if is_packed(scheme)}
    family = find_family(config.get("model_type"))
    if not alone or family is None:
        return
    shapes = expected_shapes(dict(config)) or {}
    sizes = {
        module: shapes[f"{module}.weight"] for module in alone if len(shapes.get(f"{module}.weight", ())) == 2
    }
    fused = fused_layers(module for module in sizes if not experts_parent(module))
    together = {
        member: sum(sizes[one][0] for one in members) for members in fused.values() for member in members
    }
    for module, scheme in alone.items():
        quant = scheme.weights
        assert quant is not None
        if quant.bits not in _BITS.get(version, (quant.bits,)):
            known = " and ".join(map(str, _BITS[version]))
            yield module, f"its kernels for weights alone take {known} bits"
            continue
        expert, (rows, columns) = experts_parent(module), sizes.get(module, (0, 0))
        if expert and version == _ON_CPU and quant.group_size is None:
            yield module, "its experts on a CPU have groups"
        if expert and version != _ON_CPU and not quant.symmetric:
            yield module, "its experts have no zero points"
        shared_inputs = _shares_inputs(module, family)
        columns //= tensor_parallel if shared_inputs else 1
        width = together.get(module, rows) // (1 if shared_inputs else tensor_parallel)
        if quant.group_size is not None and columns % quant.group_size:
            yield module, f"groups of {quant.group_size} do not divide the {columns} inputs of each processor"
        elif not quant.symmetric and rows % per_word(quant):
            yield module, f"the zero points of its {rows} rows do not fill whole numbers"
        elif version == _ON_CPU and not expert and (width % _MULTIPLE or columns % _MULTIPLE):
            yield module, f"its kernel takes multiples of {_MULTIPLE}, not {width} rows and {columns} columns"
