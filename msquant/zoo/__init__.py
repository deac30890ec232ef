"""Models that come without a hub: the demo model, and GGUF files."""
