"""HallusionBench (arXiv 2310.14566): yes or no about pictures that mislead."""

from rethinker_jax.benchmarks.adapters.fields import Place, Row, categories_of, make_problem, text_of
from rethinker_jax.benchmarks.items import Item
from rethinker_jax.prompts.rows import BadField

_YES_NO = {"1": "yes", "0": "no"}


def read_hallusionbench(row: Row, place: Place) -> list[Item]:
    """`gt_answer` is "1" for yes and "0" for no. The questions about one set of pictures are a cluster."""
    gold = text_of(row, "gt_answer").strip()
    if gold not in _YES_NO:
        raise BadField("bad_answer", f"wanted 1 or 0 as gt_answer, found {gold[:40]!r}")
    image = place.media.image(row.get("image")) or place.media.image(row.get("filename") if not _is_text(row) else None)
    names = ("category", "subcategory", "set_id", "figure_id", "question_id")
    parts = [text_of(row, name, "") for name in names]
    problem = make_problem(
        row, place, id="-".join(parts) if all(parts) else place.row_id, question=text_of(row, "question"),
        answer=_YES_NO[gold], images=[image] if image else [], type="yesno",
    )  # fmt: skip
    categories = categories_of(row, {"category": "category", "subcategory": "subcategory"})
    return [Item(problem, "", categories, "-".join(parts[:3]) if all(parts[:3]) else "")]


def _is_text(row: Row) -> bool:
    """Questions of the split non_image have visual_input 0 and no picture."""
    return text_of(row, "visual_input", "1").strip() == "0"
