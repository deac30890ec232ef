"""The verdict on a folder: what a person reads first."""

from msquant.evaluation.ranking import Ranked, listed, rank_layers
from msquant.formats.summary import Summary
from msquant.reporting.data import Level, ReportVerdict
from msquant.reporting.manifest_data import Manifest, RecordedTextScore

_OUTLIER = 10
"""A layer whose noise is so many times the median stands out."""
_REMEDY = "see 'What quantization costs most' for how to spare them"
_SHOWN = 3
_MEASURES = {
    "kl": ("its KL divergence from the float model is {}, the limit {}", 1, ""),
    "perplexity_increase": ("its perplexity is {} above the float model's, the limit {}", 100, "%"),
}


def judge(summary: Summary, manifest: Manifest, *, checked: bool) -> ReportVerdict:
    """Judge a folder by its format's contract, and by its accuracy where that was measured.

    Args:
        summary: of the folder.
        manifest: of the folder.
        checked: whether the summary's findings are all there would be.
    """
    problems: list[tuple[Level, str]] = []
    if summary.findings:
        count = len(summary.findings)
        more = f", and {count - 1} more such places" if count > 1 else ""
        problems.append(("bad", f"It breaks the {summary.quantization} format: {summary.findings[0]}{more}."))
    if summary.quantization is None:
        problems.append(("check", "It is in floating point: nothing was quantized."))
    problems += _accuracy(manifest)
    problems += [("check", _sentence(note)) for note in summary.notes]
    if not checked:
        problems.append(("check", "Its weights were not checked against the format's contract."))
    problems += _few_tokens(manifest)
    remarks = [*_noisy(manifest), *_outliers(manifest)]
    if not problems:
        return ReportVerdict("good", _praise(manifest), tuple(remarks))
    level: Level = "bad" if any(level == "bad" for level, _ in problems) else "check"
    reasons = sorted(problems, key=lambda problem: problem[0] != level)
    return ReportVerdict(level, reasons[0][1], (*(reason for _, reason in reasons[1:]), *remarks))


def beyond_limit(measure: str, value: float, limit: float) -> str:
    """What is beyond a recipe's limit, in as many digits as tell the two apart.

    Args:
        measure: `kl` in nats, or `perplexity_increase` as a part of the float model's.
        value: what was measured.
        limit: what the recipe allows.
    """
    text, scale, unit = _MEASURES.get(measure, (f"its {measure} is {{}}, the limit {{}}", 1, ""))
    pairs = (
        (f"{scale * value:.{digits}g}{unit}", f"{scale * limit:.{digits}g}{unit}") for digits in range(3, 17)
    )
    return text.format(*next((pair for pair in pairs if pair[0] != pair[1]), (value, limit)))


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _accuracy(manifest: Manifest) -> list[tuple[Level, str]]:
    found = manifest.evaluation
    if found is None or found.overall is None or found.overall.kl is None:
        return [("check", "Its accuracy was not measured: msquant evaluate does that.")]
    if found.beyond is None:
        return [("check", f"{_measured(found.overall)}, and no limit for that is recorded.")]
    broken: list[tuple[Level, str]] = [
        (
            "bad",
            _sentence(beyond_limit(limit.measure, limit.value, limit.limit)),
        )
        for limit in found.beyond
        if limit.value is not None and limit.limit is not None
    ]
    return broken


def _measured(score: RecordedTextScore) -> str:
    text = f"Its KL divergence from the float model is {score.kl:.3g}"
    if score.perplexity and score.baseline_perplexity:
        text += f", its perplexity {score.perplexity / score.baseline_perplexity - 1:+.1%}"
    return text


def _praise(manifest: Manifest) -> str:
    assert manifest.evaluation is not None
    assert manifest.evaluation.overall is not None
    measured = _measured(manifest.evaluation.overall)
    return f"{measured}: within the recipe's limits. It keeps its format's contract."


def _noisy(manifest: Manifest) -> list[str]:
    """Where to look when the accuracy is beyond a limit."""
    if manifest.evaluation is None or not manifest.evaluation.beyond:
        return []
    worst = _ranked(manifest)[:_SHOWN]
    if not worst:
        return []
    return [f"Layers {listed(_own_snr(manifest), worst)} add most noise: {_REMEDY}."]


def _ranked(manifest: Manifest) -> list[Ranked[int]]:
    return rank_layers(_own_snr(manifest))


def _own_snr(manifest: Manifest) -> dict[int, float | None]:
    return manifest.evaluation.own_snr if manifest.evaluation else {}


def _few_tokens(manifest: Manifest) -> list[tuple[Level, str]]:
    few = [len(layer.experts.few_tokens) for layer in manifest.layers if layer.experts is not None]
    if not any(few):
        return []
    return [
        (
            "check",
            f"{sum(few)} experts in {sum(map(bool, few))} decoder layers got too few calibration tokens and "
            "were quantized from their weights alone; more and longer samples give them more.",
        )
    ]


def _outliers(manifest: Manifest) -> list[str]:
    ranked = _ranked(manifest)
    if not ranked or (manifest.evaluation and manifest.evaluation.beyond):
        return []
    median = ranked[len(ranked) // 2].noise
    above = [layer for layer in ranked if layer.noise > _OUTLIER * median]
    if not above:
        return []
    layers = listed(_own_snr(manifest), above[:_SHOWN])
    some = f"Layers {layers} add" if len(above) > 1 else f"Layer {layers} adds"
    return [f"{some} more than {_OUTLIER} times the noise of the median layer: {_REMEDY}."]
