"""Go up a ladder until a limit holds: more calibration, then the worst matrices in floating point.

Each rung costs more than the one before: time first, then bytes. What is tried is compared on the same text.

python examples/accuracy.py ./Llama-3.1-8B ./Llama-3.1-8B-W8A8 --limit 0.02
"""

import argparse
import sys
from pathlib import Path

import msquant


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", help="a model's folder, a recipe, or a recipe's name")
    parser.add_argument("output", type=Path, help="folders are made beside this one: OUTPUT-1, OUTPUT-2, ...")
    parser.add_argument("--limit", type=float, default=0.05, help="of the KL to the float model, in nats")
    parser.add_argument("--samples", type=int, default=16, help="calibration sequences of the first rung")
    parser.add_argument("--keep", type=int, default=6, help="matrices that the last rung keeps in float")
    arguments = parser.parse_args()
    try:
        recipe = msquant.find_recipe(arguments.model).adjusted(algo="osl", samples=arguments.samples)
        for rung in (1, 2, 3):
            if rung == 2:
                recipe = recipe.adjusted(samples=4 * arguments.samples)
            if rung == 3:
                mixed = msquant.analyze(recipe, keep_float=arguments.keep).recipe
                assert mixed is not None, "a budget was given"
                recipe = mixed
            output = arguments.output.with_name(f"{arguments.output.name}-{rung}")
            result = msquant.quantize(recipe, output)
            if result.evaluation is None:
                sys.exit("error: the recipe leaves the evaluation out")
            kl = result.evaluation["overall"]["kl"]
            print(f"{output}: {result.output_bytes / 1e9:.2f} GB, KL {kl:.4f} (limit {arguments.limit:.4f})")
            if kl <= arguments.limit:
                return
    except msquant.MsquantError as error:
        sys.exit(f"error: {error}")
    sys.exit("no rung holds the limit; see docs/evaluating.md for what else there is")


if __name__ == "__main__":
    main()
