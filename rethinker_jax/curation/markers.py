"""Where reasoning turns back on itself, and how a trace is cut there (OpenVLThinker: truncated reflections)."""

from collections.abc import Sequence

from rethinker_jax.verify.extract import extract

MARKERS = ("Wait,", "But wait,", "But the question")  # OpenVLThinker's, as they are written
# Why a text was not cut.
UNCHANGED, NO_TAGS, EMPTY, ANSWER_LOST = "unchanged", "no_tags", "empty", "answer_lost"
_OPEN, _CLOSE = "<think>", "</think>"


def cut_reasoning(text: str, markers: Sequence[str] = MARKERS) -> tuple[str, str]:
    """The text without its reasoning from the first marker on, and "" or why there is none such.

    Reasoning is what stands between the first `<think>`, or the beginning, and the last `</think>`. What follows the
    tag, the answer in it, stays; white space before the tag stays too.

    unchanged    no marker stands in the reasoning, or, without the tag, anywhere
    no_tags      a marker, and no `</think>` that would tell reasoning from answer
    empty        the reasoning begins with a marker, so that nothing of it would be left
    answer_lost  the final answer that is read off the cut text would be another
    """
    close = text.rfind(_CLOSE)
    reasoning = text if close < 0 else text[:close]
    begin = reasoning.find(_OPEN)
    begin = 0 if begin < 0 else begin + len(_OPEN)
    places = [place for place in (reasoning.find(marker, begin) for marker in markers) if place >= 0]
    if not places:
        return text, UNCHANGED
    if close < 0:
        return text, NO_TAGS
    kept = reasoning[begin : min(places)].rstrip()
    if not kept:
        return text, EMPTY
    space = reasoning[len(reasoning.rstrip()) :]
    cut = text[:begin] + kept + space + text[close:]
    if extract(cut).text != extract(text).text:
        return text, ANSWER_LOST
    return cut, ""
