"""How far the channels that a smooth group reads reach, before and after smoothing."""

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msquant.kernels.layer_report import ChannelRanges, GroupReport, LayerReport


def channel_ranges(maxima: NDArray[np.float32]) -> ChannelRanges:
    """Sum up what may be thousands of channels in three numbers.

    Args:
        maxima: the greatest magnitude of each channel, any shape, at least one.
    """
    values = np.asarray(maxima, np.float64).reshape(-1)
    median, high, largest = (float(f"{np.quantile(values, q):.4g}") for q in (0.5, 0.99, 1))
    return ChannelRanges(median, high, largest)


class GroupReporter:
    """What golden-stick's smoothers have in common when they report a group; a base beside one of them."""

    report: LayerReport
    act_stats: Any
    is_gqa_wo_layer: bool

    def report_group(self, group: GroupReport, smooth_scale: Any, key_value_heads: int) -> None:
        """Report the group at hand, with its channels' ranges.

        Args:
            group: what was chosen.
            smooth_scale: Tensor, what the weights' columns are to be multiplied by, `[K]`.
            key_value_heads: of the attention.
        """
        before, scale = self.act_stats.asnumpy(), smooth_scale.asnumpy()
        if self.is_gqa_wo_layer:
            # Tiled to the query heads, while the statistics are those of the key-value heads.
            scale = scale.reshape(key_value_heads, -1, before.size // key_value_heads)[:, 0].reshape(-1)
        ranged = replace(group, before=channel_ranges(before), after=channel_ranges(before / scale))
        self.report.groups.append(ranged)
