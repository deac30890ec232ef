"""golden-stick's module for the search in `held_out.py`: its groups, statistics and folding, our choice."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from mindspore import Tensor
from mindspore_gs.common import logger
from mindspore_gs.ptq.ptq_config import QuantGranularity
from mindspore_gs.ptq.quant_cells.quant_cell import QuantCell
from numpy.typing import NDArray

from msquant.algorithms.held_out import SEARCH_TOKENS, GroupInputs, HeldOutSearch, typical_magnitudes
from msquant.algorithms.smoothers import Batch, FastOSLSmoother, GroupCells, nothing_finite
from msquant.interrupts import check_interrupt
from msquant.kernels.report import GroupReport
from msquant.models.layers import DecoderLayer

RESIDUAL_GROUPS = ("o", "down")
"""Groups whose output is added to the residual stream."""


class HeldOutSmoother(FastOSLSmoother):
    """OutlierSuppressionLite with ranges and alphas that hold on text which calibration has not seen."""

    def _search_best_ratio(
        self, name: str, layer: DecoderLayer, group: GroupCells, search_inputs: Any, *heads: int
    ) -> tuple[Tensor, float]:
        policy = self.get_layer_policy(group.curr_layer[0].layer_name)
        search = HeldOutSearch(
            self._inputs(layer, group, self.batches_of(layer, search_inputs), heads),
            [cell.layer.weight.asnumpy() for cell in group.curr_layer],
            per_token=policy.act_quant_granularity is QuantGranularity.PER_TOKEN,
            check=check_interrupt,
        )
        choice = search.best(policy.algo_args["smooth_alpha"], policy.algo_args["range_floor"])
        if not math.isfinite(choice.loss):
            raise nothing_finite(group.name, self.report.name)
        logger.info(f"{self.report.name} {group.name}: {choice}")
        scale = Tensor(search.scale(choice))
        chosen = GroupReport(group.name, choice.alpha, choice.loss, choice.range_floor)
        self.report_group(chosen, scale, heads[-1])
        return scale, choice.alpha

    def _inputs(
        self, layer: DecoderLayer, group: GroupCells, batches: Sequence[Batch], heads: tuple[int, ...]
    ) -> GroupInputs:
        query, key_value = heads
        states = [batch.states[group.step] for batch in batches]
        inputs = [
            state[1].asnumpy().reshape(batch.samples, -1, state[1].shape[-1])
            for batch, state in zip(batches, states, strict=True)
        ]
        samples, length = sum(len(x) for x in inputs), inputs[0].shape[1]
        places = slice(0, None, math.ceil(samples * length / SEARCH_TOKENS))
        rows = np.arange(samples * length)[places]
        residual = None
        if group.name in RESIDUAL_GROUPS:
            residual = np.concatenate([state[0].asnumpy() for state in states])[places]
        return GroupInputs(
            low=np.concatenate([x.min(axis=1) for x in inputs]),
            high=np.concatenate([x.max(axis=1) for x in inputs]),
            x=np.concatenate([x.reshape(-1, x.shape[-1]) for x in inputs])[places],
            sample=rows // length,
            residual=residual,
            typical=_typical(layer, group, key_value, query // key_value if self.is_gqa_wo_layer else 1),
            query_groups=(key_value, query // key_value) if self.is_gqa_wo_layer else None,
        )


def _typical(layer: DecoderLayer, group: GroupCells, heads: int, repeat: int) -> NDArray[np.float32]:
    """By the norm's weight or the rows in front; what a key-value head makes is read by several queries."""
    before = [_unwrapped(group.prev_layer).weight.clone().asnumpy()]
    if group.name == "down":
        before.append(_unwrapped(layer.mlp.gate_proj).weight.asnumpy())
    typical = typical_magnitudes(*before)
    return np.repeat(typical.reshape(heads, 1, -1), repeat, axis=1).reshape(-1) if repeat > 1 else typical


def _unwrapped(cell: Any) -> Any:
    return cell.layer if isinstance(cell, QuantCell) else cell
