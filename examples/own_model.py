"""Quantize a model of your own: see whether there is room, quantize it, see what it cost, ask it something.

python examples/own_model.py ./Llama-3.1-8B ./Llama-3.1-8B-W8A8 --calibration texts.jsonl
"""

import argparse
import sys

import msquant


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", help="a model's folder, a recipe, or a recipe's name")
    parser.add_argument("output", help="the folder to make")
    parser.add_argument("--calibration", action="append", help="text of the kind that the model will read")
    parser.add_argument("--samples", type=int, help="calibration sequences")
    parser.add_argument("--prompt", default="I am")
    arguments = parser.parse_args()
    try:
        planned = msquant.plan(arguments.model, arguments.output)
        print(f"{planned.source_bytes / 1e9:.2f} GB become {planned.output_bytes / 1e9:.2f} GB")
        if planned.problems:
            sys.exit("\n".join(planned.problems))
        result = msquant.quantize(
            arguments.model,
            arguments.output,
            calibration=arguments.calibration,
            samples=arguments.samples,
            progress=msquant.Progress(layer=lambda record: print(f"decoder layer {record['index']} is done")),
        )
        if result.evaluation is not None:
            overall = result.evaluation["overall"]
            print(f"KL to the float model: {overall['kl']:.4f} nats; top 1 agrees on {overall['top1']:.1%}")
        with msquant.load(result.folder) as model:
            print(arguments.prompt + model.generate(arguments.prompt, max_tokens=24)[0].text)
    except msquant.MsquantError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
