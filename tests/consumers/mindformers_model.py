"""MindFormers' own DeepSeek-V3, given the caches and tables that vLLM-MindSpore gives it.

Run as `python mindformers_model.py CASES.json` in the servers' environment, with `stand_ins` in PYTHONPATH;
cases and results are those of `serve_prompts`. `custom_ops: false` is a machine without the package
ms_custom_ops, whose attention keeps one cache a layer, as at a tensor parallelism of 16 and above; with it
there are two.
"""

import os

os.environ["RUN_MODE"] = "predict"  # before MindFormers
import json
import sys
import traceback
from pathlib import Path
from typing import Any

import mindspore as ms
import npu_operators
import numpy as np
from npu_operators import array, compute_in_float32

BLOCK, BLOCKS = 16, 8


class Model:
    """A folder that MindFormers has loaded."""

    def __init__(self, folder: Path, fused: bool) -> None:
        from mindformers.models.deepseek3.configuration_deepseek_v3 import DeepseekV3Config
        from mindformers.models.deepseek3.modeling_deepseek_v3_infer import InferenceDeepseekV3ForCausalLM
        from mindformers.parallel_core.inference.base_models.gpt import gpt_model
        from mindformers.parallel_core.utils import model_mixin

        model_mixin.is_legacy_model = lambda: False
        self.config = json.loads((folder / "config.json").read_text())
        # What vllm_mindspore 0.5.1 puts into its generated configuration (mf_models/config.py).
        # Parameters are loaded in bfloat16; a CPU computes nothing in it.
        types = ("compute", "layernorm_compute", "rotary")
        settings = {
            **{
                key: value
                for key, value in self.config.items()
                if key not in ("architectures", "torch_dtype")
            },
            **{f"{name}_dtype": "float32" for name in types},
            **{
                "params_dtype": "bfloat16",
                "router_dense_type": "float32",
                "quantization": "golden-stick",
                "use_flash_attention": True,
            },
            **{"pretrained_model_dir": str(folder), "multi_latent_attention": True, "pre_process": True},
            **{"post_process": True, "max_position_embeddings": 256, "seq_length": 256},
            **{"block_size": BLOCK, "num_blocks": BLOCKS, "use_fused_mla": fused},
        }
        network = InferenceDeepseekV3ForCausalLM(DeepseekV3Config(**settings))
        self.messages: list[str] = []
        gpt_model.logger.warning = lambda text, *_: self.messages.append(text)
        network.load_weights(str(folder))
        cells = [cell for _, cell in network.cells_and_names()]
        compute_in_float32(network.model.get_params_dict().values(), cells)
        network.model.return_hidden_states = True  # as vllm_mindspore sets it
        self.network, self.fused = network, fused
        rank, rope = self.config["kv_lora_rank"], self.config["qk_rope_head_dim"]
        layers = range(self.config["num_hidden_layers"])
        widths = (rank, rope) if fused else (rank + rope,)
        caches = [
            [ms.Tensor(np.zeros((BLOCKS, BLOCK, 1, width), np.float32)) for _ in layers] for width in widths
        ]
        self.keys, self.values = caches if fused else (caches[0], None)

    def step(self, tokens: list[list[int]], lengths: list[int], tables: Any) -> Any:
        """Logits `[sequences, V]` after the last of each sequence's new tokens; `lengths` count them all."""
        counts = [len(new) for new in tokens]
        prefill = lengths == counts
        places = [np.arange(n - count, n) for n, count in zip(lengths, counts, strict=True)]
        slots = [table[at // BLOCK] * BLOCK + at % BLOCK for table, at in zip(tables, places, strict=True)]
        self.network.add_flags_custom_mcore(is_prefill=prefill)
        if hasattr(self.network, "add_flags_chunked"):
            self.network.add_flags_chunked(is_chunked=False)
        hidden = self.network.model(
            _integers(np.concatenate([np.array(new) for new in tokens])),
            positions=_integers(np.concatenate(places)),
            batch_valid_length=_integers(lengths),
            context_lens_tensor=_integers(np.subtract(lengths, counts)),
            q_seq_lens=_integers(counts),
            block_tables=_integers(tables),
            slot_mapping=_integers(np.concatenate(slots)),
            attention_mask=None,
            key_cache=self.keys,
            value_cache=self.values,
        )
        logits = array(self.network.model.output_layer(hidden))
        logits = logits.reshape(-1, logits.shape[-1])
        return logits[np.cumsum(counts) - 1] if len(logits) == sum(counts) else logits

    def continued(self, prompts: list[list[int]], count: int) -> tuple[list[list[int]], Any]:
        """The most probable tokens after each prompt, and the logits `[count, prompts, V]` behind them."""
        # Blocks in no order, so that a table that is not read is noticed.
        tables = np.array([[5, 2, 7], [6, 0, 3]])[: len(prompts)]
        new, lengths = list(prompts), [len(prompt) for prompt in prompts]
        made: list[list[int]] = [[] for _ in prompts]
        rows = []
        for _ in range(count):
            logits = self.step(new, lengths, tables)
            rows.append(logits)
            new = [[int(token)] for token in logits.argmax(-1)]
            lengths = [length + 1 for length in lengths]
            for tokens, token in zip(made, new, strict=True):
                tokens += token
        return made, np.stack(rows)


def _integers(values: Any) -> ms.Tensor:
    return ms.Tensor(np.asarray(values, np.int32))


def compute(case: dict[str, Any]) -> None:
    """Load a folder and continue its prompts."""
    fused = case.get("custom_ops", True)
    if not fused:
        sys.modules["ms_custom_ops"] = None  # type: ignore[assignment]
    model = Model(Path(case["folder"]), fused)
    (alone,), logits = model.continued(case["prompts"][:1], case["tokens"])
    together, _ = model.continued(case["prompts"], case["tokens"])
    np.savez(
        case["output"],
        alone=np.array(alone),
        together=np.array(together),
        logits=logits[:, 0],
        casts=np.array(npu_operators.CASTS),
        calls=np.array(sorted(npu_operators.CALLS)),
        messages=np.array(model.messages),
    )


def main(path: str) -> None:
    """Every case of a file, one after the other, each in a process of its own."""
    for case in json.loads(Path(path).read_text()):
        process = os.fork()
        if not process:
            try:
                compute(case)
            except BaseException:
                np.savez(case["output"], error=np.array(traceback.format_exc()))
                raise
            finally:
                sys.stderr.flush()
                os._exit(0)
        os.waitpid(process, 0)


npu_operators.install()
if __name__ == "__main__":
    import mindformers  # noqa: F401  # before the processes part

    main(sys.argv[1])
