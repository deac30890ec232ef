"""A tiny model with room for a question, and a folder of questions."""

from pathlib import Path

import pytest

from tests.fixtures.tiny_model import write_tiny_llama


@pytest.fixture(scope="session")
def roomy_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_llama` for 1,024 tokens; read it, never change it."""
    return write_tiny_llama(tmp_path_factory.mktemp("roomy") / "llama", max_position_embeddings=1024)


@pytest.fixture(scope="session")
def question_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions of MMLU, GSM8K and one subject of C-Eval; read it, never change it."""
    from tests.tasks.questions import mmlu_questions, sums, write_records

    folder = tmp_path_factory.mktemp("questions")
    write_records(folder / "mmlu.jsonl", mmlu_questions())
    write_records(folder / "gsm8k" / "test.jsonl", sums(24))
    write_records(folder / "gsm8k" / "train.jsonl", sums(30)[24:])
    ceval = [
        {
            "question": f"{a} 加 {a} 等于",
            "A": str(a),
            "B": str(2 * a),
            "C": str(3 * a),
            "D": "0",
            "answer": "B",
        }
        for a in range(1, 13)
    ]
    write_records(folder / "ceval-valid_law" / "val.jsonl", ceval)
    return folder
