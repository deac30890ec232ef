"""Tasks of lm_eval over files on this machine, asked of the tiny model; and everything that is refused."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from msquant.errors import CalibrationError, EngineError, RecipeError
from msquant.progress import Progress
from msquant.tasks.task_run import evaluate_tasks
from tests.fixtures.raw_server import RawServer
from tests.inference.quantized_folder import write_quantized
from tests.server.running import RunningServer, running
from tests.tasks.questions import mmlu_questions, sums, write_records

pytest.importorskip("lm_eval", reason="tasks need the extra eval")

ENDPOINT = "http://127.0.0.1:9/v1"


@pytest.fixture(scope="module")
def quantized(roomy_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_quantized(roomy_llama, tmp_path_factory.mktemp("tasks") / "tiny", list(range(3, 120)))


@pytest.fixture(scope="module")
def server(quantized: Path) -> Iterator[RunningServer]:
    from msquant.flows.engines import load_embedded

    with running(load_embedded(quantized)) as server:
        yield server


@pytest.fixture
def raw_server() -> Iterator[RawServer]:
    server = RawServer()
    yield server
    server.close()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_scores_are_those_of_lm_eval(roomy_llama: Path, question_folder: Path) -> None:
    """The same tasks by lm_eval's own model of transformers: 56 subjects, two groups of answers, and sums."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    from msquant.tasks.loading import load_tasks, quiet
    from msquant.tasks.records import TaskFolder

    names = ["mmlu", "ceval-valid_law"]
    result = evaluate_tasks(str(roomy_llama), names, task_data=question_folder, limit=1, num_fewshot=0)
    loaded = load_tasks(names, TaskFolder(question_folder), 0)
    model = HFLM(pretrained=str(roomy_llama), device="cpu", dtype="float32", batch_size=8)
    groups = {name: group.child_names for name, group in loaded.groups.items()}
    with quiet():
        expected = evaluate(
            model,
            {"tasks": loaded.tasks, "groups": loaded.groups, "group_map": groups},
            limit=1,
            bootstrap_iters=0,
            log_samples=False,
        )
    found = {(score.task, score.metric): score for score in result.scores}
    assert len(found) == 56 + 5 + 2
    for (task, metric), score in found.items():
        assert score.value == pytest.approx(expected["results"][task][f"{metric},none"])
    whole = found["mmlu", "acc"]
    assert (whole.group, whole.member, whole.questions, whole.version) == (True, False, 56, "2")
    assert 0 < whole.value < 1
    assert found["mmlu_anatomy", "acc"].member
    assert result.absent == ["mmlu_elementary_mathematics"]
    assert result.lm_eval == "0.4.13"


def test_both_models_and_the_endpoint(
    quantized: Path, roomy_llama: Path, question_folder: Path, server: RunningServer
) -> None:
    """Free answers with examples before every question: here, and by HTTP, the same ones."""
    stages: list[str] = []
    settings: dict[str, Any] = {"task_data": question_folder, "num_fewshot": 2, "limit": 3}
    here = evaluate_tasks(
        str(quantized),
        ["gsm8k"],
        baseline=str(roomy_llama),
        progress=Progress(stage=stages.append),
        **settings,
    )
    assert [score.metric for score in here.scores] == [
        "exact_match,strict-match",
        "exact_match,flexible-extract",
    ]
    assert [score.task for score in here.baseline_scores] == ["gsm8k", "gsm8k"]
    assert {(score.num_fewshot, score.questions) for score in here.scores} == {(2, 3)}
    assert stages.count("writing answers") == 2
    there = evaluate_tasks(str(quantized), ["gsm8k"], endpoint=f"{server.url}/v1", **settings)
    assert there.scores == here.scores
    assert json.loads(json.dumps(there.as_dict()))["endpoint"] == f"{server.url}/v1"


def test_given_answers_by_the_endpoint(quantized: Path, question_folder: Path, server: RunningServer) -> None:
    settings: dict[str, Any] = {"task_data": question_folder, "num_fewshot": 0, "limit": 8}
    here = evaluate_tasks(str(quantized), ["ceval-valid_law"], **settings)
    there = evaluate_tasks(str(quantized), ["ceval-valid_law"], endpoint=f"{server.url}/v1", **settings)
    assert there.scores == here.scores
    assert [score.metric for score in there.scores] == ["acc", "acc_norm"]


def test_an_endpoint_without_log_probabilities(
    quantized: Path, question_folder: Path, raw_server: RawServer
) -> None:
    """It says which model it has, and says the same to everything else."""
    raw_server.answer = b'HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n{"data": [{"id": "tiny"}]}'
    settings: dict[str, Any] = {"task_data": question_folder, "endpoint": f"{raw_server.address}/v1"}
    with pytest.raises(EngineError, match=r"no log probabilities(.|\n)*gsm8k"):
        evaluate_tasks(str(quantized), ["ceval-valid_law"], **settings)


@pytest.mark.parametrize("url", [ENDPOINT, "127.0.0.1:9/v1"])
def test_no_endpoint(quantized: Path, question_folder: Path, url: str) -> None:
    with pytest.raises(EngineError, match=r"cannot be reached(.|\n)*msquant serve"):
        evaluate_tasks(str(quantized), ["gsm8k"], task_data=question_folder, num_fewshot=0, endpoint=url)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([" "], "no task is named"),
        (["gsm8kk"], r"no task 'gsm8kk'(.|\n)*did you mean gsm8k"),
        (["ceval-valid", "ceval-valid_law"], "ceval-valid_law is asked for twice"),
    ],
)
def test_tasks_that_cannot_be_asked(
    tiny_llama: Path, question_folder: Path, tasks: list[str], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        evaluate_tasks(str(tiny_llama), tasks, task_data=question_folder, num_fewshot=0)


def test_without_the_extra(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EngineError, match=r"pip install .*lm-eval\[api\]"):
        evaluate_tasks(str(tiny_llama), ["gsm8k"])


def test_no_file_and_no_hub(tiny_llama: Path, tmp_path: Path, offline: None) -> None:
    with pytest.raises(CalibrationError, match=r"gsm8k/test.jsonl or .*gsm8k.jsonl"):
        evaluate_tasks(str(tiny_llama), ["gsm8k"], task_data=tmp_path)
    with pytest.raises(CalibrationError, match=r"cannot be had(.|\n)*gsm8k.jsonl(.|\n)*--task-data"):
        evaluate_tasks(str(tiny_llama), ["gsm8k"])


def test_examples_that_are_not_there(tiny_llama: Path, tmp_path: Path) -> None:
    write_records(tmp_path / "gsm8k.jsonl", sums(3))
    with pytest.raises(CalibrationError, match=r"gsm8k/train.jsonl: gsm8k shows 5 examples(.|\n)*fewshot 0"):
        evaluate_tasks(str(tiny_llama), ["gsm8k"], task_data=tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"answer": 4}, "answer 4 is none of the 4 choices"), ({"choices": ["one"]}, "does not fit the task")],
)
def test_records_of_another_form(
    tiny_llama: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    rows = mmlu_questions()[:3]
    rows[2] |= change
    write_records(tmp_path / "mmlu_anatomy.jsonl", rows)
    with pytest.raises(CalibrationError, match=f"mmlu_anatomy.jsonl:3: .*{message}"):
        evaluate_tasks(str(tiny_llama), ["mmlu_anatomy"], task_data=tmp_path)


def test_records_of_another_task(tiny_llama: Path, tmp_path: Path) -> None:
    write_records(tmp_path / "mmlu_anatomy.jsonl", sums(3))
    with pytest.raises(CalibrationError, match=r"anatomy.jsonl:1: .*'choices' is undefined"):
        evaluate_tasks(str(tiny_llama), ["mmlu_anatomy"], task_data=tmp_path)
