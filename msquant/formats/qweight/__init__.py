"""The formats whose weights are in `qweight`: GPTQ's, AWQ's, and AutoRound's, which is one of both."""
