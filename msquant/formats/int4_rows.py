"""Int4 weights with two rows in a byte, as msModelSlim and golden-stick store routed experts.

Rows 2j are the low halves of the bytes, rows 2j + 1 the high ones (msModelSlim, save/utils/pack.py;
mindspore_gs 1.4.1, ptq/basic_functions/basic_quant_func.py: `np_int4data_pack_to_int8_3d`).
"""

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from msquant.families import fused_linears
from msquant.formats.folder_rules import Finding, StoredTensor
from msquant.schemes import Scheme


def pack_rows(weight: NDArray[np.int8]) -> NDArray[np.int8]:
    """int4 `[N, K]` to bytes `[N / 2, K]`: rows 2j in the low halves, rows 2j + 1 in the high ones."""
    return (weight[0::2] & 0xF) | (weight[1::2] << 4)


def unpack_rows(packed: NDArray[np.int8]) -> NDArray[np.int8]:
    """The int4 `[N, K]`, one in each, of what `pack_rows` returned."""
    weight = np.empty((2 * len(packed), packed.shape[1]), np.int8)
    # Shifted to the right, the sign fills what is left free.
    weight[0::2] = (packed << 4) >> 4
    weight[1::2] = packed >> 4
    return weight


def group_scales(scale: NDArray[np.float32], groups: int) -> NDArray[np.float32]:
    """Scales `[N]` or `[N, G]` as those of so many groups, `[N, groups]`; a row's own is that of each."""
    return np.ascontiguousarray(np.broadcast_to(scale.reshape(len(scale), -1), (len(scale), groups)))


def splits_outputs(module: str) -> bool:
    """Whether processors share an expert's linear by its outputs, as gate and up, and not by its inputs."""
    name = module.rpartition(".")[2]
    return any(name in members for members in fused_linears().values())


def check_one_size(linears: Mapping[str, Scheme]) -> Iterator[Finding]:
    """Check that all int4 weights are in the same groups: a description has one `group_size` for them."""
    small = [module for module, scheme in linears.items() if scheme.is_int4]
    for module in small:
        if linears[module] != linears[small[0]]:
            problem = f"is {linears[module]}, unlike {small[0]} ({linears[small[0]]}): a folder has one size"
            yield Finding(module, f"{problem} of groups")
            return


def unpacked(found: StoredTensor | None) -> StoredTensor | None:
    """A weight whose bytes hold two rows each, with the shape that the model has."""
    if found is None or not found.shape:
        return found
    return StoredTensor(found.name, (2 * found.shape[0], *found.shape[1:]))
