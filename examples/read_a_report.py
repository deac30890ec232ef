"""The numbers behind a report: what quantization cost by text, and the decoder layers that cost most.

python examples/read_a_report.py ./smollm2-135m-osl
"""

import argparse
import math
import sys
from pathlib import Path

import msquant


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, help="quantized")
    parser.add_argument("--baseline", help="the float model, if msquant.json does not say it")
    parser.add_argument("--text", action="append", default=[], help="text of your own, too")
    parser.add_argument("--sequence-length", type=int, help="tokens in each window")
    arguments = parser.parse_args()
    try:
        result = msquant.evaluate(
            arguments.folder,
            arguments.baseline,
            texts=arguments.text,
            sequence_length=arguments.sequence_length,
        )
    except msquant.MsquantError as error:
        sys.exit(f"error: {error}")
    for note in result.notes:
        print(f"note: {note}")
    for text in (*result.score.texts, result.score.overall):
        kl = "unknown" if text.kl is None else f"{text.kl:.4f} nats"
        print(f"{text.text}: perplexity {text.perplexity:.2f}, KL {kl}")
    layers = sorted(
        result.score.layers, key=lambda layer: math.inf if layer.own_snr is None else layer.own_snr
    )
    for layer in layers[:3]:
        own = "exact" if layer.own_snr is None else f"{layer.own_snr:.1f} dB"
        print(f"decoder layer {layer.index}: signal to noise of its own {own}")


if __name__ == "__main__":
    main()
