"""msquant: end-to-end W8A8 quantization of large language models for MindSpore and Ascend."""

__version__ = "0.1.0"
