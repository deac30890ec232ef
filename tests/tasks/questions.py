"""Questions in the format of the hub's data sets: lm_eval's own examples for MMLU, and sums for GSM8K."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_QUESTION = re.compile(
    r"Q: (.*?)\n\(A\) (.*?) \(B\) (.*?) \(C\) (.*?) \(D\) (.*?)\nA:.*?The answer is \(([ABCD])\)", re.S
)


def write_records(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def mmlu_questions() -> list[dict[str, Any]]:
    """Real questions of 56 subjects, from the examples with reasoning that lm_eval carries."""
    import lm_eval

    folder = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "flan_cot_fewshot"
    prompts = json.loads((folder / "_cot_prompts.json").read_text(encoding="utf-8"))
    rows = []
    for subject, text in prompts.items():
        for question, *choices, answer in _QUESTION.findall(text):
            rows.append(
                {
                    "question": question,
                    "subject": subject,
                    "choices": choices,
                    "answer": "ABCD".index(answer),
                }
            )
    return rows


def sums(count: int) -> list[dict[str, Any]]:
    """So many different questions as GSM8K writes them."""
    pairs = [(i + 2, 2 * i + 3) for i in range(count)]
    return [
        {
            "question": f"Tom has {a} apples and buys {b} more. How many apples does he have?",
            "answer": f"{a} + {b} = <<{a}+{b}={a + b}>>{a + b} apples.\n#### {a + b}",
        }
        for a, b in pairs
    ]
