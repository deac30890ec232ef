"""Which server takes a quantized folder, why another does not, and with what command it is started.

python examples/serve_on_ascend.py ./DeepSeek-R1-W8A8 --export ascend
"""

import argparse
import sys
from pathlib import Path

import msquant


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, help="quantized, of any format")
    parser.add_argument("--export", help="write the folder in this format first: ascend, golden-stick")
    arguments = parser.parse_args()
    try:
        folder = arguments.folder
        if arguments.export:
            folder = msquant.export(folder, arguments.export)[0].folder
        summary = msquant.inspect(folder)
        if summary.findings:
            sys.exit("\n".join(f"{finding.where}: {finding.problem}" for finding in summary.findings))
        for verdict in summary.served:
            sizes = ", ".join(map(str, verdict.tensor_parallel))
            if verdict.served:
                print(f"{verdict.server}: yes, on {sizes} NPUs")
            for reason in verdict.refusals:
                print(f"{verdict.server}: no, {reason.where}: {reason.problem}; {reason.remedy}")
        print(f"on this machine: msquant serve --model {folder}")
        print(f"what an Ascend host would start: msquant serve --model {folder} --dry-run")
    except msquant.MsquantError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
