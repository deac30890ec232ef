"""golden-stick for vLLM-MindSpore."""
