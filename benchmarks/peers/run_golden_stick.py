"""golden-stick's stock path, in msquant's own environment: `MODEL TOKENS.npy OUTPUT static|dynamic|mixed`.

The calls of its documentation, on its own models; msquant's are not used.
"""

import sys


def main() -> None:
    """Write the folder in the ascend format."""
    model_folder, tokens_file, output, scheme = sys.argv[1:]
    import mindspore as ms
    import numpy as np
    from mindspore_gs.common import BackendTarget
    from mindspore_gs.ptq import OutliersSuppressionType, PTQConfig, PTQMode, QuantGranularity
    from mindspore_gs.ptq.models import AutoQuantForCausalLM

    granularity = QuantGranularity.PER_TOKEN if scheme == "dynamic" else QuantGranularity.PER_TENSOR
    config = PTQConfig(
        mode=PTQMode.QUANTIZE,
        backend=BackendTarget.ASCEND,
        weight_quant_dtype=ms.dtype.int8,
        act_quant_dtype=ms.dtype.int8,
        outliers_suppression=OutliersSuppressionType.OUTLIER_SUPPRESSION_LITE,
        opname_blacklist=["lm_head"],
        act_quant_granularity=granularity,
    )
    model = AutoQuantForCausalLM.from_pretrained(model_folder)
    tokens = [{"input_ids": ms.Tensor(row[None])} for row in np.load(tokens_file)]
    model.calibrate(config, None, tokens)
    model.save_quantized(output, backend=BackendTarget.ASCEND)


if __name__ == "__main__":
    main()
