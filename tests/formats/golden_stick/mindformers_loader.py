"""Builds MindFormers' DeepSeek-V3 for inference on the CPU and loads a folder with its own loader.

Run as `python -m tests.formats.golden_stick.mindformers_loader FOLDER OUTPUT`: writes every parameter as
float32 to `OUTPUT`, an `.npz` file, with the names of those that were not loaded. Only building and
loading work on a CPU; nothing can be computed. Replaced are `mint.zeros` and the like, which cannot make
bfloat16 tensors there, and the step after loading, which changes the weights' memory layout for an NPU.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def load(folder: Path, output: Path) -> None:
    """Load `folder` and write what the network holds then."""
    import mindspore
    from mindspore import Tensor, mint

    mindspore.set_context(device_target="CPU", mode=mindspore.PYNATIVE_MODE)

    def filled(value: float) -> Any:
        def make(*shape: Any, dtype: Any = mindspore.float32, **_: Any) -> Tensor:
            sizes = shape[0] if len(shape) == 1 else shape
            return Tensor(np.full(sizes, value, np.float32), dtype)

        return make

    mint.zeros, mint.empty, mint.ones = filled(0), filled(0), filled(1)

    from mindformers.models.deepseek3.configuration_deepseek_v3 import DeepseekV3Config
    from mindformers.models.deepseek3.modeling_deepseek_v3_infer import InferenceDeepseekV3ForCausalLM
    from mindformers.parallel_core.inference.base_models.gpt import gpt_model
    from mindformers.parallel_core.utils import model_mixin

    model_mixin.is_legacy_model = lambda: False
    config = json.loads((folder / "config.json").read_text())
    # What vllm_mindspore 0.5.1 sets in its generated MindFormers configuration, and what the model asks for.
    types = ("compute", "params", "layernorm_compute", "rotary")
    settings = {
        **{name: value for name, value in config.items() if name not in ("architectures", "torch_dtype")},
        **{f"{name}_dtype": "bfloat16" for name in types},
        **{"router_dense_type": "bfloat16", "quantization": "golden-stick", "use_flash_attention": True},
        **{"pretrained_model_dir": str(folder), "multi_latent_attention": True, "pre_process": True},
        **{"post_process": True, "max_position_embeddings": 64, "seq_length": 64, "block_size": 16},
        **{"num_blocks": 8, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
        **{"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    }
    network = InferenceDeepseekV3ForCausalLM(DeepseekV3Config(**settings))
    network.process_weights_after_loading = lambda *arguments: None
    messages: list[str] = []
    gpt_model.logger.warning = lambda text, *arguments: messages.append(text)
    network.load_weights(str(folder))
    parameters = network.model.get_params_dict()
    values = {name: parameter.astype(mindspore.float32).asnumpy() for name, parameter in parameters.items()}
    np.savez(output, **values, _messages=np.array(messages))


if __name__ == "__main__":
    load(Path(sys.argv[1]), Path(sys.argv[2]))
