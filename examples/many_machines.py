"""Quantize with several processes: of this machine, or of a Ray cluster that shares a disk.

python examples/many_machines.py qwen3-8b ./Qwen3-8B-W8A8 --workers 4
"""

import argparse
import sys

import msquant


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", help="a model's folder, a recipe, or a recipe's name")
    parser.add_argument("output", help="the folder to make, on a disk that all machines have")
    parser.add_argument("--workers", type=int, help="processes that share the decoder layers")
    parser.add_argument("--ray-address", help="HOST:PORT of a cluster; without it they are of this machine")
    arguments = parser.parse_args()
    try:
        planned = msquant.plan(arguments.model, arguments.output, workers=arguments.workers)
        print(f"{planned.peak_memory / 1e9:.2f} GB for each worker")
        result = msquant.quantize(
            arguments.model,
            arguments.output,
            workers=arguments.workers,
            ray_address=arguments.ray_address,
            progress=msquant.Progress(layer=lambda record: print(f"decoder layer {record['index']} is done")),
        )
        print(f"written to {result.folder}")
    except msquant.MsquantError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
