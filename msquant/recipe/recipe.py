"""Recipes: everything that affects a result, typed and closed, found by name in configs/ or by path."""

import difflib
import os
import reprlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from msquant.algorithms import DEFAULT, find_algorithm, make_algorithm, options_in_common
from msquant.algorithms.base import Algorithm
from msquant.calibration.rows import Template
from msquant.calibration.sources import NO_TEXT, parse_source
from msquant.checkpoint.json_file import read_json
from msquant.errors import CalibrationError, CheckpointError, OutputError, RecipeError
from msquant.evaluation.settings import EvaluationSettings
from msquant.families import find_family
from msquant.formats.registry import (
    DEFAULT_FORMAT,
    FORMAT_DESCRIPTION,
    FormatName,
    FormatNames,
    any_model_formats,
    find_format,
    names_of,
    parse_formats,
)
from msquant.hub.published import configs_folder, published_config, published_name
from msquant.inference.serving_settings import ServingSettings
from msquant.recipe.model_free import ModelFreeSettings
from msquant.recipe.recipe_yaml import read_yaml
from msquant.schemes import W8A8_DYNAMIC, Scheme, parse_scheme

SUFFIXES = (".yaml", ".yml")

WITHOUT_TEXT = "rtn"

_WILDCARDS = set("*?[")
# Of what is wrong with a recipe, so much at a time.
_SHOWN, _LONGEST_PLACE = 10, 200


class CalibrationSettings(BaseModel):
    """Which tokens the ranges and the search are computed on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str | list[str] = Field(
        "builtin",
        description="A source, or a list of them for a mix; see docs/calibration.md. none: no text at all, "
        "for a model of any architecture.",
    )
    template: str | None = Field(
        None, description="How a row becomes text, with columns in braces; None: by the columns it has."
    )
    chat_template: bool = Field(
        True, description="Put conversations through the tokenizer's chat template, if it has one."
    )
    pack: bool = Field(True, description="Fill a sequence with several documents; else one document each.")
    samples: int = Field(16, ge=1, description="How many sequences.")
    max_samples: int | None = Field(
        None,
        ge=1,
        description="For a mixture of experts: sampling goes on up to so many sequences, and those beyond "
        "samples only feed experts; null: no further ones.",
    )
    sequence_length: int = Field(128, ge=2, description="Tokens in each, at most.")
    seed: int = Field(0, ge=0, description="Seed of the choice of sequences.")

    @model_validator(mode="before")
    @classmethod
    def _refuse_text_field(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and "text_field" in raw:
            raise ValueError(f"text_field is now written as template: '{{{raw['text_field']}}}'")
        return raw

    @field_validator("source", "template")
    @classmethod
    def _known(cls, value: str | list[str] | None, info: ValidationInfo) -> str | list[str] | None:
        if isinstance(value, list) and NO_TEXT in value:
            raise ValueError(f"{NO_TEXT} stands alone; write source: {NO_TEXT}")
        try:
            if info.field_name == "source" and value != NO_TEXT:
                for word in [value] if isinstance(value, str) else value or [""]:
                    parse_source(word)
            elif info.field_name == "template" and isinstance(value, str):
                Template(value)
        except CalibrationError as error:
            raise ValueError(f"{error.what}; {error.remedy}") from error
        return value

    @property
    def sources(self) -> tuple[str, ...]:
        """The words of the mix."""
        return (self.source,) if isinstance(self.source, str) else tuple(self.source)

    @property
    def is_none(self) -> bool:
        """Whether there is no text."""
        return self.source == NO_TEXT

    @property
    def total(self) -> int:
        """The sequences: `samples`, or the sum of the counts where every source has one."""
        counts = [parse_source(word).count for word in self.sources]
        return self.samples if None in counts else sum(count or 0 for count in counts)

    @property
    def most(self) -> int:
        """The sequences, those that only feed experts included."""
        return max(self.total, self.max_samples or 0)


def _algorithm(value: Any) -> Any:
    return (
        value
        if not isinstance(value, dict)
        else find_algorithm(value.get("algorithm", DEFAULT)).model_validate(value)
    )


class Recipe(BaseModel):
    """A model and what to do with it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    description: str = Field("", description="One line for people.")
    model: str = Field(description="A bundled model's name, a hub id, or a local Hugging Face folder.")
    quantization: Annotated[SerializeAsAny[Algorithm], BeforeValidator(_algorithm)] = Field(
        default_factory=make_algorithm
    )
    calibration: CalibrationSettings = Field(default_factory=CalibrationSettings)
    model_free: ModelFreeSettings = Field(default_factory=ModelFreeSettings)
    evaluation: EvaluationSettings = Field(default_factory=EvaluationSettings)
    serving: ServingSettings = Field(default_factory=ServingSettings)
    format: FormatNames = Field(DEFAULT_FORMAT, description=FORMAT_DESCRIPTION)
    prediction_layers: Literal["quantized", "float", "none"] = Field(
        "quantized",
        description="quantized: multi-token-prediction layers by the same schemes as the decoder layers, "
        "where the formats' servers take that; float: in floating point; none: left out, and with them "
        "speculative decoding.",
    )

    @field_validator("prediction_layers", mode="before")
    @classmethod
    def _refuse_switch(cls, value: Any) -> Any:
        if isinstance(value, bool):
            word = "float" if value else "none"
            raise ValueError(f"{str(value).lower()} is now written as prediction_layers: {word}")
        return value

    @model_validator(mode="after")
    def _check_without_text(self) -> "Recipe":
        if not self.calibration.is_none:
            return self
        policy = self.quantization
        if not policy.looks_at_weights_alone:
            raise ValueError(
                f"{policy.algorithm} needs calibration text, and its source is none; write algorithm: "
                f"{WITHOUT_TEXT}"
            )
        if policy.cache_quant is not None:
            raise ValueError(f"cache: {policy.cache} needs calibration text, and its source is none")
        if policy.rotation != "none" or policy.rotation_matrix:
            raise ValueError("rotation needs a model that msquant knows, and calibration has source: none")
        for pattern, scheme in policy.schemes:
            if scheme.is_static:
                raise ValueError(
                    f"{pattern} is {scheme}, whose activations are calibrated, and the source is none; write "
                    f"{scheme.per_token}"
                )
        for name in self.formats:
            if not find_format(name).takes_any_model:
                raise ValueError(
                    f"{name} is written with calibration alone; write format: {any_model_formats()[0]}"
                )
        return self

    @property
    def formats(self) -> tuple[FormatName, ...]:
        """The formats to write, in order."""
        return names_of(self.format)

    @property
    def keeps_predictions(self) -> bool:
        """Whether multi-token-prediction layers are written, quantized or not."""
        return self.prediction_layers != "none"

    def _without_text(self) -> "Recipe":
        """A copy that can do without calibration text: what needs it is replaced by what is nearest to it."""
        policy = self.quantization
        name = policy.algorithm if policy.looks_at_weights_alone else WITHOUT_TEXT
        kept = tuple(form for form in self.formats if find_format(form).takes_any_model)
        changed = self._per_token().replace("quantization", algorithm=name, rotation="none", cache="none")
        return changed.model_copy(
            update={"format": kept[0] if len(kept) == 1 else kept or any_model_formats()[0]}
        )

    def _per_token(self) -> "Recipe":
        """A copy whose static schemes are those per token, without rules that are then the last one's."""
        rules = [(pattern, scheme.per_token) for pattern, scheme in self.quantization.schemes]
        while len(rules) > 1 and rules[-2][1] == rules[-1][1]:
            del rules[-2]
        return self.replace("quantization", schemes=tuple(rules))

    def _static(self) -> "Recipe":
        """A copy in which all that is W8A8_DYNAMIC by its last rule alone is what the model's family has."""
        config, rules = published_config(self.model) or {}, self.quantization.schemes
        family = find_family(config.get("model_type"))
        if family is None or rules[-1][1] != W8A8_DYNAMIC:
            return self
        own = dict(rules[:-1])
        usual = family.default_recipe(config).schemes
        others = [(pattern, scheme) for pattern, scheme in usual if pattern not in own]
        return self.replace("quantization", schemes=(*own.items(), *others))

    def _for(self, formats: str | Sequence[str] | None) -> "Recipe":
        """A copy that writes other formats, None for its own, in the schemes that all their servers run."""
        changed = self.adjusted(formats=formats)
        if all(find_format(name).per_token for name in changed.formats):
            return changed._per_token()
        return changed._static() if all(find_format(name).per_token for name in self.formats) else changed

    def adjusted(
        self,
        *,
        algo: str | None = None,
        scheme: str | Scheme | None = None,
        group_size: int | None = None,
        rotation: str | None = None,
        cache: str | None = None,
        calibration: str | Sequence[str] | None = None,
        template: str | None = None,
        chat_template: bool | None = None,
        pack: bool | None = None,
        samples: int | None = None,
        max_samples: int | None = None,
        sequence_length: int | None = None,
        seed: int | None = None,
        formats: str | Sequence[str] | None = None,
        evaluate: bool = True,
    ) -> "Recipe":
        """A copy with what is given in place of its own; the names are those of the command's options.

        Args:
            algo: the algorithm; options that it has in common with the recipe's are kept.
            scheme: of all linears but those that the recipe keeps in floating point.
            group_size: columns that share a scale of the weights, in that scheme.
            rotation: none or hadamard.
            cache: none or int8, of keys and values.
            calibration: a source, or several for a mix; `none` for no text at all: unless they are given too,
                the algorithm is then rtn, static schemes are those per token, and the format one that takes
                any model.
            template: how a row becomes text, with columns in braces.
            chat_template: put conversations through the tokenizer's chat template.
            pack: fill a sequence with several documents.
            samples: calibration sequences.
            max_samples: with those that only feed experts.
            sequence_length: tokens in each.
            seed: of the choice of sequences.
            formats: to write; a name, names with commas between them, or several.
            evaluate: False leaves out the short comparison with the float model.

        Raises:
            RecipeError: a value is not valid.
        """
        rules = self._rules(scheme, group_size)
        words = [calibration] if isinstance(calibration, str) else list(calibration or ())
        base = self
        if words == [NO_TEXT]:
            base = self._without_text()
        changed = base.replace("quantization", algorithm=algo, schemes=rules, rotation=rotation, cache=cache)
        if formats is not None:
            names = formats if isinstance(formats, str) else ",".join(formats)
            changed = changed.model_copy(update={"format": parse_formats(names)})
        changed = changed.replace(
            "calibration",
            source=NO_TEXT if words == [NO_TEXT] else words or None,
            template=template,
            chat_template=chat_template,
            pack=pack,
            samples=samples,
            max_samples=max_samples,
            sequence_length=sequence_length,
            seed=seed,
        )
        return changed if evaluate else changed.replace("evaluation", sequences=0)

    def _rules(
        self, scheme: str | Scheme | None, group_size: int | None
    ) -> tuple[tuple[str, Scheme], ...] | None:
        """The rules for one scheme in place of all others but floating point; None to keep the recipe's."""
        if scheme is None:
            if group_size is not None:
                raise RecipeError(
                    "is given without a scheme",
                    where="--group-size",
                    remedy=f"name the scheme that it is of: --scheme W4A16 --group-size {group_size}",
                )
            return None
        wanted = _scheme_of(scheme, group_size)
        kept = [(pattern, own) for pattern, own in self.quantization.schemes if own.is_float]
        return (*(rule for rule in kept if rule[0] != "*"), ("*", wanted))

    def replace(self, section: str, **values: Any) -> "Recipe":
        """A copy with those values that are not None put into a section.

        Raises:
            RecipeError: a value is not valid.
        """
        given = {key: value for key, value in values.items() if value is not None}
        raw = self.model_dump()
        if section == "quantization" and "algorithm" in given:
            raw[section] = options_in_common(self.quantization, given["algorithm"])
        raw[section] = {**raw[section], **given}
        return validate_recipe(raw, "the options given")


def _scheme_of(scheme: str | Scheme, group_size: int | None) -> Scheme:
    """A scheme by its word, in groups of so many columns where they are given. Raises RecipeError."""
    try:
        found = parse_scheme(scheme) if isinstance(scheme, str) else scheme
    except RecipeError as error:
        raise RecipeError(error.what, where="--scheme", remedy=error.remedy) from error
    if group_size is None:
        return found
    if group_size < 1:
        raise RecipeError(
            f"is {group_size}, a number of columns is expected",
            where="--group-size",
            remedy="use 32, 64, 128 or 256",
        )
    if found.is_float:
        raise RecipeError(
            f"{found} has no groups", where="--group-size", remedy="leave it out, or choose another --scheme"
        )
    if isinstance(scheme, str) and ("_G" in scheme or "_CHANNEL" in scheme):
        raise RecipeError(
            f"is {group_size}, and {scheme} says by itself what shares a scale",
            where="--group-size",
            remedy=f"leave one of them out: --scheme {found.in_groups(group_size)}",
        )
    return found.in_groups(group_size)


def find_recipe(name: str, formats: str | Sequence[str] | None = None) -> Recipe:
    """Load a recipe by its path or its name, or make the default one for a model's folder.

    A file that names schemes is taken as it is. Any other recipe is for its formats: static schemes are those
    per token where the servers of all of them run these for every linear.

    Args:
        name: a recipe file (`.yaml`), a model's folder, or whatever `find_shipped_recipe` takes. The exact
            name of a recipe that comes with msquant wins over a folder that is called the same.
        formats: to write in place of its own; a name, names with commas between them, or several.

    Raises:
        RecipeError: there is none of that name, or it is not valid.
    """
    path = Path(os.path.expanduser(name))
    if path.suffix in SUFFIXES:
        own = load_recipe(path)
        named = "schemes" in own.quantization.model_fields_set
        return own.adjusted(formats=formats) if named else own._for(formats)
    if name and name not in shipped_recipes() and os.path.isdir(path):
        return default_recipe(str(path), _config(path), formats)
    return load_recipe(find_shipped_recipe(name))._for(formats)


def default_folder(model: str, recipe: Recipe) -> Path:
    """MODEL-ALGO in the current folder; only a recipe file's suffix is left out: `qwen2.5-7b` stays whole."""
    path = Path(model)
    name = path.stem if path.suffix in SUFFIXES else path.resolve().name
    return Path(f"{name}-{recipe.quantization.algorithm}")


def default_recipe(
    model: str, config: Mapping[str, Any], formats: str | Sequence[str] | None = None
) -> Recipe:
    """What is done to a model without a recipe: as its family has it, and else that of `Recipe`.

    Args:
        model: its folder.
        config: the content of its `config.json`.
        formats: as for `find_recipe`; None for the first that a server of the family reads.
    """
    family = find_family(config.get("model_type"))
    if family is None:
        return Recipe(model=model)._for(formats)
    default = family.default_recipe(config)
    policy = make_algorithm(schemes=default.schemes, **default.options)
    recipe = Recipe.model_validate({"model": model, "quantization": policy, "format": default.formats[0]})
    return recipe._for(formats)


def _config(folder: Path) -> dict[str, Any]:
    """Empty where there is no readable config.json, which whoever opens the model reports."""
    try:
        return read_json(folder / "config.json")
    except CheckpointError:
        return {}


def find_shipped_recipe(name: str) -> Path:
    """The file of a recipe that comes with msquant.

    Args:
        name: its name (`deepseek-r1`), the hub id of its model (`deepseek-ai/DeepSeek-R1`), or a pattern that
            matches one name (`*-llama-70b`); upper and lower case are the same.

    Raises:
        RecipeError: there is none, or several match the pattern; names the nearest, or the matching ones.
    """
    known = shipped_recipes()
    wanted = published_name(name) or name.lower()
    if wanted in known:
        return known[wanted]
    if _WILDCARDS & set(name):
        matching = matching_recipes(name)
        if len(matching) == 1:
            return next(iter(matching.values()))
        raise RecipeError(
            f"{name!r} matches {len(matching)} recipes", remedy=f"choose one of {', '.join(matching)}"
        )
    raise _no_recipe(name)


def matching_recipes(pattern: str) -> dict[str, Path]:
    """The recipes that come with msquant whose name matches a shell pattern (`deepseek-r1-distill-*`).

    Raises:
        RecipeError: none does.
    """
    matching = {name: path for name, path in shipped_recipes().items() if fnmatchcase(name, pattern.lower())}
    if not matching:
        raise _no_recipe(pattern)
    return matching


def copy_recipe(name: str, target: Path, *, overwrite: bool = False) -> None:
    """Copy a recipe that comes with msquant to a file of one's own, whole or not at all.

    Args:
        name: as for `find_shipped_recipe`.
        target: the file to make; its name ends in `.yaml` or `.yml`.
        overwrite: replace the file if there is one.

    Raises:
        RecipeError: there is no such recipe, or the file's name would not be taken for a recipe's.
        OutputError: the file exists, or cannot be written.
    """
    source = find_shipped_recipe(name)
    check_target(target, overwrite=overwrite)
    _write(source.read_bytes(), target)


def recipe_text(recipe: Recipe, *, defaults: bool = True) -> str:
    """A recipe as YAML.

    Args:
        recipe: what to write.
        defaults: write every value; else those alone that make it another recipe than its model's and its
            algorithm's without them.
    """
    raw = recipe.model_dump(mode="json")
    if not defaults:
        algorithm = make_algorithm(algorithm=recipe.quantization.algorithm)
        usual = Recipe(model=recipe.model, quantization=algorithm).model_dump(mode="json")
        chosen = {"algorithm": recipe.quantization.algorithm}
        changed = _changed(raw, usual)
        raw = {"model": recipe.model, "quantization": chosen | changed.pop("quantization", {}), **changed}
    return yaml.dump(raw, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def _changed(raw: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    """The values that are others than usual, section by section."""
    found = {}
    for key, value in raw.items():
        other = usual.get(key)
        if isinstance(value, dict) and isinstance(other, dict):
            value, other = _changed(value, other), {}
        if value != other:
            found[key] = value
    return found


def write_recipe(recipe: Recipe, target: Path, *, overwrite: bool = False) -> None:
    """Write a recipe to a file, whole or not at all. Raises as `copy_recipe`."""
    check_target(target, overwrite=overwrite)
    _write(recipe_text(recipe).encode(), target)


def check_target(target: Path, *, overwrite: bool = False) -> None:
    """Check that a recipe may be written to a file. Raises as `copy_recipe`, but for what only writing shows.

    Args:
        target: the file to make.
        overwrite: whether it may exist.
    """
    if target.suffix not in SUFFIXES:
        raise RecipeError(
            "a recipe's file name ends in .yaml", where=target, remedy=f"call it {target.name}.yaml"
        )
    folder = os.path.isdir(target)
    if folder or (os.path.lexists(target) and not overwrite):
        raise OutputError(
            "is a folder" if folder else "exists already",
            where=target,
            remedy="give a file name" if folder else "give another name, or --overwrite",
        )


def _write(content: bytes, target: Path) -> None:
    temporary = target.with_name(f".msquant.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(target)
    except OSError as error:
        raise OutputError(
            f"cannot be written: {error.strerror or error}",
            where=target,
            remedy="give a file in a folder that exists and may be written to",
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


class _Dumper(yaml.SafeDumper):
    """YAML's safe dumper, which would give every element of a list a line."""

    def represent_list(self, data: Any) -> yaml.SequenceNode:
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)


_Dumper.add_representer(list, _Dumper.represent_list)


def load_recipe(path: Path) -> Recipe:
    """Read a recipe file.

    Raises:
        RecipeError: it cannot be read, or a key or value is not valid; names the nearest known key.
    """
    return validate_recipe(read_yaml(path), path)


def validate_recipe(raw: Any, where: str | Path) -> Recipe:
    """Build a recipe from plain data.

    Raises:
        RecipeError: a key or value is not valid.
    """
    if not isinstance(raw, dict):
        raise RecipeError(f"holds a {type(raw).__name__}, a mapping is expected", where=where)
    problems = []
    section = raw.get("quantization", {})
    if isinstance(section, dict):
        # By itself, because which keys it may have depends on the algorithm that it names.
        try:
            algorithm = find_algorithm(section.get("algorithm", DEFAULT))
            raw = {**raw, "quantization": algorithm.model_validate(section)}
        except RecipeError as error:
            raise RecipeError(error.what, where=where, remedy=error.remedy) from error
        except ValidationError as error:
            problems = [_problem(detail, algorithm, "quantization") for detail in error.errors()]
            raw = {key: value for key, value in raw.items() if key != "quantization"}
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        problems += [_problem(detail, Recipe) for detail in error.errors()]
    if problems:
        more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        raise RecipeError("; ".join(problems[:_SHOWN] + more), where=where)
    return recipe


@cache
def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with msquant, by name."""
    return {path.stem: path for path in sorted(configs_folder().glob("*.yaml"), key=lambda path: path.stem)}


def _no_recipe(name: str) -> RecipeError:
    close = difflib.get_close_matches(name.lower().rsplit("/", 1)[-1], shipped_recipes(), n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return RecipeError(
        f"{name!r} is neither a recipe nor a folder",
        remedy=f"{hint}see all with: msquant recipes list; or give a recipe file (.yaml) or a model's folder",
    )


def _problem(detail: Any, model: type[BaseModel], *within: str) -> str:
    place = ".".join(str(part) for part in (*within, *detail["loc"]))[:_LONGEST_PLACE]
    if detail["type"] == "extra_forbidden":
        known = _known_keys(model, detail["loc"][:-1])
        close = difflib.get_close_matches(str(detail["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
        return f"unknown key {place} ({hint})"
    return f"{place}: {detail['msg']} (it is {reprlib.repr(detail['input'])})"


def _known_keys(model: type[BaseModel], section: tuple[Any, ...]) -> list[str]:
    for part in section:
        annotation = model.model_fields[part].annotation
        assert isinstance(annotation, type)
        model = annotation
    return list(model.model_fields)
