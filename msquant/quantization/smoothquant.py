"""SmoothQuant (arXiv 2211.10438) as golden-stick modules: one alpha for every group, nothing searched."""

from typing import Any

from mindspore import Tensor
from mindspore_gs.ptq.algo_modules.mindone import SmoothQuantSmoother

from msquant.quantization.osl import HostSmoother
from msquant.quantization.ranges import GroupReporter
from msquant.quantization.report import GroupReport, LayerReport


class ReferenceSmoothQuantSmoother(GroupReporter, SmoothQuantSmoother):
    """golden-stick's own, whose alpha is 0.5, which also reports the groups."""

    alpha = 0.5

    def __init__(self, net_config: Any, layer_policies: Any, *, report: LayerReport) -> None:
        super().__init__(net_config, layer_policies)
        self.report = report

    def _compute_smooth_scale(self, **kwargs: Any) -> Tensor:
        scale = super()._compute_smooth_scale(**kwargs)
        group = GroupReport(kwargs["layer_info"].name, self.alpha)
        self.report_group(group, scale, kwargs["num_key_value_heads"])
        return scale


class FastSmoothQuantSmoother(HostSmoother, ReferenceSmoothQuantSmoother):
    """The same with the policy's alpha; weights are read and smoothed on the host."""

    def _compute_smooth_scale(self, **kwargs: Any) -> Tensor:
        group = kwargs["layer_info"]
        alpha = self.get_layer_policy(group.curr_layer[0].layer_name).algo_args["smoothquant_alpha"]
        heads = kwargs["num_attention_heads"], kwargs["num_key_value_heads"]
        scale = self._calculate_smooth_scale(self.act_stats, self.weight_stats, alpha, *heads)
        self.report_group(GroupReport(group.name, alpha), scale, heads[1])
        return scale
