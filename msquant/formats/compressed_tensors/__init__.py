"""compressed-tensors for vLLM."""
