"""The pages for users are in step with the code."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from pydantic import BaseModel
from typer.main import get_command

import msquant
from msquant.algorithms import algorithm_names, find_algorithm, make_algorithm
from msquant.algorithms.base import Algorithm
from msquant.cli.app import app
from msquant.errors import MsquantError
from msquant.flows.source import shapes_plans
from msquant.hub.published import published_config
from msquant.models.config_json import parse_config
from msquant.recipe.recipe import (
    CalibrationSettings,
    Recipe,
    default_recipe,
    load_recipe,
    shipped_recipes,
)
from msquant.schemes import FLOAT, W4A8_DYNAMIC, parse_scheme
from tests.test_package import SOURCES
from tests.test_remedies import FILLED, texts

DOCS = Path(msquant.__file__).parents[1] / "docs" / "recipes.md"


def documented_keys(model: type[BaseModel], defaults: dict[str, Any]) -> list[str]:
    """The rows that the page on recipes must have for a section, from the fields themselves."""
    rows = []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            continue
        default = (
            "required" if field.is_required() and model is not Algorithm else f"`{_short(defaults[name])}`"
        )
        rows.append(f"| `{name}` | {default} | {field.description} |")
    return rows


def _short(value: Any) -> str:
    if isinstance(value, list) and len(value) > 4:
        return f"[{value[0]}, {value[1]}, ..., {value[-1]}]"
    if isinstance(value, str):
        return value or '""'
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n").removesuffix("\n...")


def test_the_page_on_recipes_has_every_key_with_its_default() -> None:
    defaults = Recipe(model="x").model_dump(mode="json")
    sections: list[tuple[type[BaseModel], dict[str, Any]]] = [(Recipe, defaults)]
    for name, field in Recipe.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            sections.append((field.annotation, defaults[name]))
    assert len(sections) == 6
    assert CalibrationSettings in dict(sections)
    rows = [row for section in sections for row in documented_keys(*section)]
    common = set(Algorithm.model_fields)
    for name in algorithm_names():
        algorithm = make_algorithm(algorithm=name)
        own = documented_keys(type(algorithm), algorithm.model_dump(mode="json"))
        rows += [row for row in own if row.split("`")[1] not in common]
    lines = DOCS.read_text(encoding="utf-8").splitlines()
    missing = [row for row in rows if row not in lines]
    assert not missing, "put these rows into docs/recipes.md:\n" + "\n".join(missing)
    assert len([line for line in lines if re.match(r"\| `\w+` \|", line)]) == len(rows)


def test_the_page_on_recipes_lists_the_shipped_ones() -> None:
    text = DOCS.read_text(encoding="utf-8")
    for name, path in shipped_recipes().items():
        assert f"| `{name}` | `{load_recipe(path).model}` |" in text or name == "smollm2-135m"
    assert "`smollm2-135m`" in text


def test_the_page_on_algorithms_has_each_with_what_it_says_of_itself() -> None:
    text = DOCS.with_name("algorithms.md").read_text(encoding="utf-8")
    for name in algorithm_names():
        assert f"| `{name}` | {find_algorithm(name).summary} |" in text


SUPPORTED = {
    "Llama 3, SmolLM2, R1-Distill-Llama": "llama-3.1-8b",
    "Qwen2.5, R1-Distill-Qwen": "qwen2.5-7b-instruct",
    "Qwen3": "qwen3-8b",
    "Mistral": "mistral-7b-instruct-v0.3",
    "Qwen3-MoE": "qwen3-30b-a3b",
    "DeepSeek-V2": "deepseek-v2-lite",
    "DeepSeek-V3, R1": "deepseek-r1",
    "DeepSeek-V3.2, GLM-5": "deepseek-v3.2",
    "Kimi-K2": "kimi-k2-instruct",
    "GLM-4": "glm-4-9b-0414",
    "GLM-4.5, 4.6, 4.7": "glm-4.5",
}
"""Rows of the README's matrix, and the recipe whose published config stands for them."""


def _supported(recipe: str) -> list[str]:
    """For each format, and so for its server, the schemes that it takes of the whole model."""
    model = load_recipe(shipped_recipes()[recipe]).model
    raw = published_config(model)
    assert raw is not None
    # The first layers are of every kind that the others are of, and so are the first experts.
    raw["num_hidden_layers"] = min(raw["num_hidden_layers"], 5)
    raw |= {key: min(raw[key], 16) for key in ("num_experts", "n_routed_experts") if raw.get(key)}
    config, base = parse_config(raw, model), default_recipe(model, raw)
    kept = [("lm_head", FLOAT), ("kv_b_proj", FLOAT)] if config.latent else [("lm_head", FLOAT)]
    mixed = make_algorithm(schemes=config.family.default_recipe(raw).schemes)
    ways = {"mixed": mixed} if config.experts else {}
    # With experts in int4 the largest model needs half as many NPUs.
    base = base.replace("serving", tensor_parallel_size=min(base.serving.tensor_parallel_size, 8))
    if config.experts:
        rules = ((".experts.", W4A8_DYNAMIC), *mixed.schemes)
        ways["experts in W4A8_DYNAMIC"] = make_algorithm(schemes=rules)
    for word in ("W8A8", "W8A8_DYNAMIC", "W8A16", "W4A16_G128"):
        rules = (*kept, ("*", parse_scheme(word)))
        ways[word] = make_algorithm(algorithm="rtn", schemes=rules)
    cells = []
    for name in ("golden-stick", "compressed-tensors", "ascend"):
        taken = []
        for word, policy in ways.items():
            try:
                shapes_plans(base.model_copy(update={"quantization": policy, "format": name}), config, [])
            except MsquantError:
                continue
            taken.append(word)
        cells.append(", ".join(taken) or "no")
    return cells


def test_the_readmes_matrix_is_what_the_serving_rules_say() -> None:
    rows = [f"| {title} | {' | '.join(_supported(recipe))} |" for title, recipe in SUPPORTED.items()]
    for name in ("README.md", "README.zh-CN.md"):
        lines = DOCS.parents[1].joinpath(name).read_text(encoding="utf-8").splitlines()
        missing = [row for row in rows if row not in lines]
        assert not missing, f"put these rows into {name}:\n" + "\n".join(missing)


CHINESE = DOCS.parent / "zh-CN"
TRANSLATED = sorted(
    path.relative_to(DOCS.parent).as_posix()
    for path in DOCS.parent.rglob("*.md")
    if CHINESE not in path.parents
)


def _shape(text: str) -> dict[str, Any]:
    """What a page and its translation have in common: headings' levels, commands, tables, links' targets."""
    lines = text.splitlines()
    code = [line for line in lines if line.startswith("    ")]
    inside = False
    for line in lines:
        if line.startswith("```"):
            inside = not inside
        elif inside:
            code.append(line)
    return {
        "headings": [len(line.split()[0]) for line in lines if re.match(r"#+ ", line) and line not in code],
        "code": code,
        "tables": [len(re.split(r"(?<!\\)\|", line)) for line in lines if line.startswith("|")],
        "pages": sorted(set(re.findall(r"\]\(([\w./-]+\.md)", text))),
    }


@pytest.mark.parametrize("name", TRANSLATED)
def test_the_chinese_page_is_in_step(name: str) -> None:
    english = (DOCS.parent / name).read_text(encoding="utf-8")
    chinese = (CHINESE / name).read_text(encoding="utf-8")
    for what, found in _shape(english).items():
        assert _shape(chinese)[what] == found, what
    assert len(re.findall("[\u4e00-\u9fff]", chinese)) > 50


def test_the_chinese_readme_is_in_step() -> None:
    english, chinese = (
        DOCS.parents[1].joinpath(name).read_text(encoding="utf-8")
        for name in ("README.md", "README.zh-CN.md")
    )
    for what in ("headings", "code", "tables"):
        assert _shape(chinese)[what] == _shape(english)[what], what


def test_every_page_has_its_translation_and_no_translation_is_left_over() -> None:
    assert sorted(path.relative_to(CHINESE).as_posix() for path in CHINESE.rglob("*.md")) == TRANSLATED


def _commands(text: str) -> Iterator[list[str]]:
    """The words of every `msquant` command in the blocks of code."""
    for line in re.sub(r"\\\n\s*", "", "\n".join(_shape(text)["code"])).splitlines():
        if "msquant " not in line:
            continue
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        # The end of the line ends a command, as a pipe does.
        for word in (*lexer, ";"):
            if set(word) <= set(lexer.punctuation_chars):
                if words[:1] == ["msquant"]:
                    yield words[1:]
                words = []
            else:
                words.append(word)


@pytest.mark.parametrize("path", ["README.md", *(f"docs/{name}" for name in TRANSLATED)])
def test_the_commands_are_commands(path: str) -> None:
    for words in _commands((DOCS.parents[1] / path).read_text(encoding="utf-8")):
        command, arguments = get_command(app), list(words)
        if words[0] in {option for parameter in command.params for option in parameter.opts}:
            continue
        while hasattr(command, "commands"):
            assert arguments[0] in command.commands, words
            command = command.commands[arguments.pop(0)]
        try:
            command.make_context(command.name, arguments)
        except Exception as error:
            error.add_note(f"msquant {shlex.join(words)}")
            raise


def test_there_are_commands_to_check() -> None:
    text = "    msquant plan a \\\n        --output b > c && msquant run  # now\n"
    assert list(_commands(text)) == [["plan", "a", "--output", "b"], ["run"]]


@pytest.mark.parametrize("name", TRANSLATED)
def test_the_recipes_are_recipes(name: str, tmp_path: Path) -> None:
    text = (DOCS.parent / name).read_text(encoding="utf-8")
    for block in re.findall(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        recipe = yaml.safe_load(block)
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({"model": "any"} | recipe, sort_keys=False))
        load_recipe(path)


def test_the_page_on_errors_quotes_what_the_code_says() -> None:
    text = (DOCS.parent / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall("^### `(.*)`$", text, re.MULTILINE)
    assert len(quoted) > 20
    assert len(re.findall("^### ", text, re.MULTILINE)) == len(quoted)
    said = {text for source in SOURCES.values() for _, text in texts(source)}
    wanted = [quote.replace("...", FILLED) for quote in quoted]
    assert [quote for quote in wanted if not any(quote in text for text in said)] == []
    chinese = (CHINESE / "troubleshooting.md").read_text(encoding="utf-8")
    assert re.findall("^### `(.*)`$", chinese, re.MULTILINE) == quoted


ROOT_PAGES = (
    "README.md",
    "README.zh-CN.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "SECURITY.zh-CN.md",
    "CHANGELOG.md",
)


@pytest.mark.parametrize("path", ROOT_PAGES)
def test_the_links_of_pages_outside_the_site_lead_to_files(path: str) -> None:
    root = DOCS.parents[1]
    links = re.findall(r"\]\(([^)\s]+)\)", (root / path).read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (root / link.partition("#")[0]).is_file()]
    assert missing == []


@pytest.mark.parametrize("path", [*ROOT_PAGES, *(f"docs/{name}" for name in TRANSLATED)])
def test_links_to_elsewhere_are_addresses(path: str) -> None:
    text = (DOCS.parents[1] / path).read_text(encoding="utf-8")
    for link in re.findall(r"\]\((\w+:[^)]*)\)", text):
        parts = urlsplit(link)
        assert parts.scheme == "https", link
        assert re.fullmatch(r"[\w-]+(\.[\w-]+)+", parts.netloc), link
        assert not re.search(r"\s", link), link


def test_every_example_is_named_by_a_guide() -> None:
    named = {
        script
        for path in (DOCS.parent / "guides").glob("*.md")
        for script in re.findall(r"`(examples/\w+\.py)`", path.read_text(encoding="utf-8"))
    }
    examples = (DOCS.parents[1] / "examples").glob("*.py")
    assert named == {path.relative_to(DOCS.parents[1]).as_posix() for path in examples}
