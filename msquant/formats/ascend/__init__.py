"""msModelSlim's format for vllm-ascend."""
