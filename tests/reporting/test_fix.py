"""The command that a report gives for losing less is run as it stands, and does what it says."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from msquant.checkpoint.writer import write_json
from msquant.flows.pipeline import quantize
from msquant.formats.summary import summarize
from msquant.recipe.recipe import Recipe, load_recipe, recipe_text, shipped_recipes, validate_recipe
from msquant.reporting.collect import collect
from msquant.reporting.data import Fix
from msquant.reporting.write import html_page, markdown_page
from tests.fixtures.tiny_model import write_tiny_llama
from tests.formats.folders import change_json, write_folder
from tests.test_pipeline import short_recipe


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that was quantized here, with a name that a shell would take apart."""
    output = tmp_path_factory.mktemp("fix")
    source = write_tiny_llama(output / "float", dtype="bfloat16")
    recipe = short_recipe(source).replace("evaluation", sequence_length=32)
    recipe = recipe.replace("quantization", algorithm="rtn")
    return quantize(recipe, output / "tiny rtn", remember=False).folder


def found(folder: Path, **options: Any) -> Fix:
    fix = collect(folder, check=False, **options).fix
    assert fix is not None
    return fix


def test_pasted_into_a_shell_it_makes_the_folder_that_it_promises(result: Path, tmp_path: Path) -> None:
    fix = found(result)
    program = tmp_path / "bin" / "msquant"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m msquant "$@"\n')
    program.chmod(0o755)
    environment = os.environ | {"PATH": f"{program.parent}:{os.environ['PATH']}"}
    # All but the comparison of both, whose test is another.
    script = "\n".join(line for line in fix.command.lines if not line.startswith("msquant report"))
    done = subprocess.run(
        ["bash", "-e", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    made, before = summarize(tmp_path / "tiny-rtn-spared"), summarize(result)
    assert made.findings == []
    assert made.nbytes - before.nbytes == fix.nbytes
    (layer,) = fix.spared
    spared = {m.name for m in made.modules if m.scheme == "FLOAT"} - {
        m.name for m in before.modules if m.scheme == "FLOAT"
    }
    index = layer.removeprefix("layer ")
    assert len(spared) == 7
    assert all(name.startswith(f"model.layers.{index}.") for name in spared)
    before_kl, after_kl = (
        json.loads((folder / "msquant.json").read_text())["evaluation"]["overall"]["kl"]
        for folder in (result, tmp_path / "tiny-rtn-spared")
    )
    assert after_kl < before_kl


def test_the_page_has_it_ready_to_paste(result: Path) -> None:
    report = collect(result, check=False)
    assert report.fix is not None
    assert report.fix.command.lines[-2:] == (
        "msquant quantize tiny-rtn-spared.yaml --output tiny-rtn-spared",
        f"msquant report '{result}' tiny-rtn-spared",
    )
    assert "\n".join(f"    {line}" for line in report.fix.command.lines) in markdown_page(report)
    assert "How to lose less" in html_page(report)


def test_with_an_analysis_matrices_are_spared(result: Path, tmp_path: Path) -> None:
    names = [f"model.layers.{i}.{part}_proj" for i in (0, 1) for part in ("mlp.down", "self_attn.o")]
    groups = [
        {
            "layer": int(name.split(".")[2]),
            "group": name.split(".")[-1],
            "linears": [name],
            "scheme": "W8A8",
            "error": 1e-3 * place,
            # The last one is not served in floating point.
            "float_bytes": 100 if place < 4 else None,
        }
        for place, name in enumerate(names, 1)
    ]
    write_json(tmp_path / "ranking.json", {"groups": groups})
    fix = found(result, sensitivity=tmp_path / "ranking.json")
    assert fix.spared == ("layer 1 down_proj", "layer 0 o_proj", "layer 0 down_proj")
    assert fix.share == pytest.approx(0.6)
    text = "\n".join(fix.command.lines[1 : fix.command.lines.index("RECIPE")])
    recipe = validate_recipe(yaml.safe_load(text), "the page")
    own = Recipe.model_validate(json.loads((result / "msquant.json").read_text())["recipe"])
    kept = recipe.quantization.schemes[:3]
    assert [name for name, scheme in kept if scheme.is_float] == [names[2], names[1], names[0]]
    assert (own.quantization.algorithm, recipe.quantization.algorithm, fix.algorithm) == ("rtn", "osl", "osl")
    assert recipe.replace("quantization", schemes=recipe.quantization.schemes[3:]) == own.replace(
        "quantization", algorithm="osl"
    )


def test_without_a_recipe_or_a_ranking_there_is_none(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model")
    layers = [{"index": i, "snr": 20.0, "own_snr": 30.0 + i} for i in range(2)]
    change_json(folder / "msquant.json", lambda m: m.update(evaluation={"layers": layers}))
    report = collect(folder, check=False)
    assert report.ranking is not None
    assert report.fix is None
    assert "How to lose less" not in html_page(report)


HOSTILE = "x\nRECIPE\nrm -rf ~\n'$(reboot)`id`"


def test_no_name_in_a_manifest_becomes_a_command(result: Path, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "-r $(id)\n;x")
    manifest = json.loads((result / "msquant.json").read_text())
    recipe = manifest["recipe"] | {"model": HOSTILE, "description": HOSTILE}
    change_json(folder / "msquant.json", lambda m: m.update(recipe=recipe, evaluation=manifest["evaluation"]))
    lines = found(folder).command.lines
    assert lines[0] == "cat > r-id-x-spared.yaml <<'RECIPE'"
    assert lines.count("RECIPE") == 1
    end = lines.index("RECIPE")
    assert lines[end + 1] == "msquant quantize r-id-x-spared.yaml --output r-id-x-spared"
    assert len(lines) == end + 3
    assert not any("\n" in line for line in lines[:-1])
    assert shlex.split(lines[-1]) == ["msquant", "report", str(folder), "r-id-x-spared"]
    # What the shell is given for the file is the recipe, word for word.
    script = "\n".join([lines[0].replace("r-id-x-spared.yaml", "out.yaml"), *lines[1 : end + 1]])
    subprocess.run(["bash", "-e", "-c", script], cwd=tmp_path, check=True)
    assert load_recipe(tmp_path / "out.yaml").model == HOSTILE


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_a_recipe_without_its_defaults_is_the_same_recipe(name: str) -> None:
    recipe = load_recipe(shipped_recipes()[name])
    text = recipe_text(recipe, defaults=False)
    assert validate_recipe(yaml.safe_load(text), name) == recipe
    assert len(text) < len(recipe_text(recipe))
