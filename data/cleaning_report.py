"""Describes what the construction of a token cache kept, discarded and lost."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from llm.errors import DataError

COUNTED = ("documents", "bytes", "duplicates", "empty", "invalid_utf8", "long_lines", "broken_lines", "overlap")
"""Counts of the report; `overlap` counts training documents that the validation set contains too."""

WARNED_LOSS, REFUSED_LOSS = 0.001, 0.05
"""Shares of a text's bytes that a tokenizer may lose before a warning and before an error.

NFKC normalisation of ordinary English loses about 0.05 %, which no figure shows. A loss of 5 % already moves bits per
byte by 5 %.
"""
_EXAMPLES = 3
_REASONS = {
    "duplicates": "duplicates",
    "overlap": "also in the validation set",
    "empty": "empty",
    "invalid_utf8": "not UTF-8",
    "long_lines": "with over-long lines",
    "broken_lines": "broken lines",
}
_REMEDIES = {
    "duplicates": "set loader.deduplicate=false to keep copies",
    "overlap": "give a validation set that is not the training text",
    "empty": "give files with text",
    "invalid_utf8": "convert the files to UTF-8, for example with iconv -f latin1 -t utf-8",
    "long_lines": "raise loader.max_line_bytes, or set it to null",
    "broken_lines": "correct the broken lines, or set data.field to the field that holds the text",
}


def describe_report(report: Mapping[str, Any]) -> str:
    """Return in one line what the cleaning kept and discarded."""
    dropped = [f"{report[key]:_} {words}" for key, words in _REASONS.items() if report.get(key)]
    kept = f"{report['documents']:_} documents, {report['bytes'] / 1e6:.1f} MB, tokenised in {report['seconds']:.1f} s"
    return f"{kept}; discarded: {', '.join(dropped) or 'nothing'}"


def describe_discarded(report: Mapping[str, Any]) -> str:
    """Return how many documents were kept, and how many were discarded for each reason."""
    dropped = ", ".join(f"{report.get(key, 0)} {key}" for key in _REASONS)
    return f"{report['documents']} documents; discarded: {dropped}"


def remedy_for(report: Mapping[str, Any], otherwise: str) -> str:
    """Return what to do about the reason that discarded the most documents, or `otherwise` where few were discarded."""
    key = max(_REASONS, key=lambda reason: report.get(reason, 0))
    return _REMEDIES[key] if report.get(key, 0) >= max(report["documents"], 1) else otherwise


def summarize(results: Iterable[Mapping[str, Any]], counts: Counter[str]) -> dict[str, Any]:
    """Return the report of all pieces.

    Args:
        results: the result of each piece; `lost` counts lost characters, `overlap` quotes overlapping documents.
        counts: the sums of the pieces' counts, after the removal of duplicates.
    """
    results = list(results)
    report: dict[str, Any] = {key: counts[key] for key in COUNTED}
    examples = [text for result in results for text in result["overlap"]]
    lost = sum((Counter(result["lost"]) for result in results), Counter())
    report["overlap_examples"] = examples[:_EXAMPLES]
    report["lost_bytes"] = counts["lost_bytes"]
    report["lost_characters"] = [character for character, _ in lost.most_common(8)]
    return report


def refuse_loss(report: Mapping[str, Any]) -> None:
    """Raise DataError where the tokenizer lost more than REFUSED_LOSS of the bytes."""
    if _lost_share(report) > REFUSED_LOSS:
        raise DataError(
            f"tokenizer: {_describe_loss(report)}; a model would not learn this text, and its bits per byte would be "
            "wrong; use tokenizer=bytes, tokenizer=bpe, or a tokenizer with byte fallback"
        )


def warnings_of(report: Mapping[str, Any]) -> list[str]:
    """Return a warning for documents in both splits and one for text that the tokenizer lost."""
    warnings = []
    if report.get("overlap"):
        examples = ", ".join(repr(text) for text in report["overlap_examples"])
        warnings.append(
            f"data: {report['overlap']:_} documents of the training text are also in the validation set; they are "
            f"removed from training: {examples}"
        )
    if _lost_share(report) > WARNED_LOSS:
        warnings.append(f"tokenizer: {_describe_loss(report)}")
    return warnings


def _lost_share(report: Mapping[str, Any]) -> float:
    return report.get("lost_bytes", 0) / max(report["bytes"], 1)


def _describe_loss(report: Mapping[str, Any]) -> str:
    characters = " ".join(map(repr, report["lost_characters"]))
    return f"{_lost_share(report):.2%} of the text's bytes are lost when it is tokenised, most often {characters}"
