"""`docs/peers.md`, in both languages: the table of the peers, as the benchmark measured it."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.peers.environments import PACKAGES, versions
from benchmarks.peers.jobs import SCHEMES

if TYPE_CHECKING:
    from benchmarks.peers.jobs import Result

DOCS = Path(__file__).parents[2] / "docs"
INTRODUCTION = """# Beside its peers

Written by `python -m benchmarks peers`, one process after the other on {cores} cores:
{versions}. All get the same float32 model and the same 16 x 128 calibration tokens. CPU seconds, wall
time and peak memory are of the whole process, imports and writing included. KL is to the float model in
nats per token, on 4 x 512 tokens of each text (16 x 512 for the tiny models): the calibrated kind, the
King James Bible and Hamlet; every folder is computed by the same integer arithmetic on torch, which shares
no code with msquant, and once more by `msquant compare`. Lower is better.

`static` quantizes activations with one scale per tensor, `dynamic` with one per token; `mixed` is static
in attention and per token in feed-forward blocks, which is how experts can be served. llm-compressor runs
SmoothQuant at 0.5, AutoRound SignRound in 200 steps a layer, msModelSlim `iter_smooth`, golden-stick its
own OSL on its own models. msquant is `msquant quantize` with the recipe it makes for such a model, and
once more with `--algo smoothquant`, whose migration strength is 0.6.

Schemes in four bits are named as `--scheme` names them, and of all linears but the head. There msquant is
`--algo gptq` and, as what everybody can have, `--algo rtn`; llm-compressor its GPTQ and its AWQ, whose call
of `pin_memory` is left out because it crashes on a machine without an accelerator; GPTQModel its GPTQ,
AutoRound SignRound, msModelSlim `flex_smooth_quant` and `ssz`. Who has no such scheme says so, and who
refuses groups of 128 for the 576 columns of SmolLM2.
"""
INTRODUCTION_ZH = """# 与同类工具的对比

由 `python -m benchmarks peers` 生成，在 {cores} 个核上逐个进程运行：{versions}。所有工具使用同一个 float32 模型和同样的 16 x 128 个校准 token。CPU 秒数、实际耗时和内存峰值针对整个进程，包括导入和写出。KL 相对浮点模型，单位为每个 token 的 nat 数，每种文本 4 x 512 个 token（微型模型为 16 x 512）：与校准同类的文本、英王钦定版《圣经》和《哈姆雷特》；每个目录都用同一套 torch 整数运算计算，其代码与 msquant 没有共用部分，另外再用 `msquant compare` 计算一遍。数值越低越好。

`static` 以每个张量一个缩放因子量化激活，`dynamic` 以每个 token 一个缩放因子量化激活；`mixed` 在注意力中为静态，在前馈块中为逐 token，这是专家能够提供推理服务的方式。llm-compressor 运行 0.5 的 SmoothQuant，AutoRound 运行每层 200 步的 SignRound，msModelSlim 运行 `iter_smooth`，golden-stick 在它自己的模型上运行它自己的 OSL。msquant 即 `msquant quantize`，使用它为这类模型生成的配方，另外再以 `--algo smoothquant` 运行一次，其迁移强度为 0.6。

四位方案按 `--scheme` 的写法命名，用于除输出头以外的全部线性层。此处 msquant 为 `--algo gptq`，另有人人可得的 `--algo rtn`；llm-compressor 运行它的 GPTQ 与 AWQ，其中对 `pin_memory` 的调用已略去，因为它在没有加速器的机器上会崩溃；GPTQModel 运行它的 GPTQ，AutoRound 运行 SignRound，msModelSlim 运行 `flex_smooth_quant` 和 `ssz`。没有该方案的工具会自己说明，拒绝在 SmolLM2 的 576 列上以 128 列为一组的工具也是如此。
"""  # noqa: E501, RUF001
COLUMNS = ("", "KL", "KL, `msquant compare`", "perplexity", "CPU s", "wall s", "peak GB", "shards MB")


@dataclass(frozen=True)
class Language:
    """How one of the two documents says it.

    Attributes:
        document: under `docs/`.
        introduction: with `{cores}` and `{versions}`.
        columns: of the tables.
        title: of a section, with `{model}` and `{scheme}`.
        schemes: what the schemes are called; the others by their words.
        measured: a line with `{dates}`.
        comma: between the versions.
        also: between two dates.
        failed: before an error.
    """

    document: str = "peers.md"
    introduction: str = INTRODUCTION
    columns: tuple[str, ...] = COLUMNS
    title: str = "{model}, {scheme}"
    schemes: Mapping[str, str] = field(default_factory=dict)
    measured: str = "Measured on {dates}."
    comma: str = ", "
    also: str = " and "
    failed: str = "failed: "

    def title_of(self, model: str, scheme: str) -> str:
        """The heading of a setting."""
        return self.title.format(model=model, scheme=self.schemes.get(scheme, scheme))


ENGLISH = Language()
CHINESE = Language(
    document="zh-CN/peers.md",
    introduction=INTRODUCTION_ZH,
    columns=("", "KL", "KL，`msquant compare`", "困惑度", "CPU s", "实际耗时 s", "内存峰值 GB", "分片 MB"),  # noqa: RUF001
    title="{model}，{scheme}",  # noqa: RUF001
    schemes={"static": "静态（static）", "dynamic": "动态（dynamic）", "mixed": "混合（mixed）"},  # noqa: RUF001
    measured="测于 {dates}。",
    comma="、",
    also=" 和 ",
    failed="失败：",  # noqa: RUF001
)


def write_table(settings: Sequence[Sequence["Result"]], docs: Path = DOCS) -> None:
    """Write the document in both languages; what it says of settings that are not given stays.

    Args:
        settings: the results of each model and scheme.
        docs: the folder of the documents.
    """
    known = [versions(name) for name in PACKAGES]
    for language in (ENGLISH, CHINESE):
        document = docs / language.document
        sections = _sections(document)
        for found in settings:
            job = found[0].job
            rows = "\n".join(_rows(found, language))
            dates = language.also.join(sorted({result.date for result in found}))
            text = f"{language.measured.format(dates=dates)}\n\n{rows}\n"
            sections[language.title_of(job.model, job.scheme)] = text
        titles = [
            language.title_of(model, scheme) for model, schemes in SCHEMES.items() for scheme in schemes
        ]
        introduction = language.introduction.format(cores=os.cpu_count(), versions=language.comma.join(known))
        parts = [f"## {title}\n\n{sections[title]}" for title in titles if title in sections]
        document.write_text("\n".join([introduction, *parts]), encoding="utf-8")


def _sections(document: Path) -> dict[str, str]:
    """What stands under each heading of an earlier document."""
    if not document.is_file():
        return {}
    _, *sections = document.read_text(encoding="utf-8").split("\n## ")
    pairs = (section.partition("\n\n") for section in sections)
    return {title: text.rstrip("\n") + "\n" for title, _, text in pairs}


def _rows(results: Sequence["Result"], language: Language = ENGLISH) -> Iterator[str]:
    yield _line(language.columns)
    yield _line(["---"] * len(language.columns))
    for result in results:
        measured = result.measured
        costs = [
            f"{measured.cpu_seconds:.0f}",
            f"{measured.seconds:.0f}",
            f"{measured.peak_memory / 1e9:.1f}",
        ]
        if result.error:
            yield _line([result.job.peer, f"{language.failed}`{_plain(result.error)}`", "", "", *costs, ""])
            continue
        kl, compared = (_listed(values, ".3g") for values in (result.kl, result.compared_kl))
        perplexity = _listed(result.perplexity, ".2f")
        yield _line([result.job.peer, kl, compared, perplexity, *costs, f"{result.nbytes / 1e6:.1f}"])


def _listed(values: Mapping[str, float], form: str) -> str:
    return ", ".join(f"{value:{form}}" for value in values.values())


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _plain(text: str) -> str:
    return text.replace("|", "/").replace("`", "'")
