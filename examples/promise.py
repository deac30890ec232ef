"""State the accuracy, get the folder: the smallest one that keeps a bound on text that nothing has seen.

python examples/promise.py smollm2-135m ./SmolLM2-small --max-kl 0.02 --server vllm
"""

import argparse
import sys

import msquant


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", help="a model's folder, a recipe, or a recipe's name")
    parser.add_argument("output", help="the folder to make")
    parser.add_argument("--max-kl", type=float, default=0.02, help="KL to the float model, in nats")
    parser.add_argument("--server", default="vllm", help="vllm-mindspore, vllm-ascend or vllm")
    arguments = parser.parse_args()
    try:
        found = msquant.promise(
            arguments.model, arguments.output, max_kl=arguments.max_kl, server=arguments.server
        )
    except msquant.MsquantError as error:
        sys.exit(f"error: {error}")
    for each in found.rounds:
        print(f"round {each.number}: {each.worst:.4f} on the worst text, {each.nbytes / 1e6:.1f} MB")
    if not found.kept:
        sys.exit(f"it cannot be kept: {found.reason}")
    print(f"kept by {found.folder}")


if __name__ == "__main__":
    main()
