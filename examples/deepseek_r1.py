"""DeepSeek-R1 from the published FP8 weights to a folder for every server, on a host without an NPU.

python examples/deepseek_r1.py --weights /data/DeepSeek-R1 --output /data/DeepSeek-R1-W8A8
"""

import argparse
import sys

import msquant


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--recipe", default="deepseek-r1", help="a recipe's name or file, or a model's folder"
    )
    parser.add_argument("--weights", help="their folder; without it they are downloaded")
    parser.add_argument("--output", default="DeepSeek-R1-W8A8", help="the folder for vLLM-MindSpore")
    parser.add_argument("--samples", type=int, help="calibration sequences, in place of the recipe's")
    parser.add_argument("--plan-only", action="store_true", help="only say what it takes")
    arguments = parser.parse_args()
    try:
        recipe = msquant.find_recipe(arguments.recipe).adjusted(samples=arguments.samples)
        planned = msquant.plan(recipe, arguments.output, source=arguments.weights)
        print(f"{planned.model}: {planned.parameters / 1e9:.1f} B parameters")
        print(f"{planned.disk_bytes / 1e9:.1f} GB of disk and {planned.peak_memory / 1e9:.1f} GB of memory")
        if arguments.plan_only:
            return
        if planned.problems:
            sys.exit("\n".join(planned.problems))
        # Killed or interrupted, the same call continues with the decoder layer that it was in.
        result = msquant.quantize(recipe, arguments.output, source=arguments.weights, algo="osl")
        for layer in result.layers:
            few = len(layer["experts"]["few_tokens"]) if "experts" in layer else 0
            print(f"decoder layer {layer['index']}: error {layer['error']:.2e}, {few} experts fed too little")
        folders = [result.folder]
        folders += [one.folder for one in msquant.export(result.folder, "ascend")]
        for folder in folders:
            for verdict in msquant.inspect(folder).served:
                sizes = ", ".join(map(str, verdict.tensor_parallel))
                if verdict.served:
                    print(f"{folder} is served by {verdict.server}, tensor parallel {sizes}")
    except msquant.MsquantError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
