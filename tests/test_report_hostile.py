"""Hostile text from the model, the data and the config, through the files of a run onto its pages: it stays text."""

import dataclasses
import html.parser
import io
import re
from pathlib import Path

import numpy as np
import pytest
from benchmark_cases import samples
from PIL import Image

from rethinker_jax.benchmarks.numbers import evaluation_numbers
from rethinker_jax.config import Config
from rethinker_jax.metrics import MetricsLog
from rethinker_jax.report import write_report
from rethinker_jax.report.evaluation import render_evaluation
from rethinker_jax.report.page import CONTROL
from rethinker_jax.rollout import Group
from rethinker_jax.run_directory import RunDirectory
from rethinker_jax.types import FIRST, SECOND, TRIGGER, Completion, Problem, Prompt, Rollout, Verdict

TAME = "five apples"
HOSTILE = [
    "<script>document.title='owned'</script>",
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "\"><svg onload=document.title='owned'><a href='javascript:document.title=1'>",
    "' onmouseover='document.title=1' x='",
    "javascript:document.title='owned'",
    "]]><!--</style></textarea></select></title><iframe srcdoc='<script>top.document.title=1</script>'>",
    "{{ 7 * 7 }}{% for x in ().__class__ %}{{ x }}{% endfor %}${7*7}",
    "&lt;script&gt;&#60;script&#62;",
    "a\u202eb\u2066c\u200bd\u2028e\x00f\x1b[2Jg\x9b2Jh\x7fi\ufeff\U0001f600",
    "<b>" * 50_000,
]


class Page(html.parser.HTMLParser):
    """The elements with the names of their attributes, the attributes' values, and the text outside of scripts."""

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, tuple[str, ...]]] = []
        self.values: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, tuple(name for name, _ in attrs)))
        self.values += [value or "" for _, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (28, 28), "red").save(buffer, "PNG")
    return buffer.getvalue()


def written(text: str, kind: int) -> Completion:
    ids = np.zeros(3, np.int32)
    parts = ((FIRST, text), (TRIGGER, text), (SECOND, text))[: kind + 1]
    return Completion(ids, np.zeros(3, np.float32), np.zeros(3, np.int8), "stop", text, parts)


def group_of(text: str) -> Group:
    """Every text that a dataset, a model, a verifier or a reward function gives is `text`; so is an image file."""
    problem = Problem(
        id=text, question=text, answer=text, images=(png(), text.encode()[:2000]), choices=(text, text), type=text,
        source=text,
    )  # fmt: skip
    nothing = np.zeros(0, np.int32)
    prompt = Prompt(problem, nothing, np.zeros((3, 0), np.int32), nothing, 0, text=text)
    verdict = Verdict("wrong", 0.0, text, text, parts={text: 0.0}, missing={"judge": text})
    rollout = Rollout(prompt, 0, written(text, 0), verdict, written(text, 2), verdict, advantage=0.5)
    return Group(0, prompt, (rollout, dataclasses.replace(rollout, sample=1, forced=None, forced_verdict=None)))


def run_page(folder: Path, text: str) -> bytes:
    """The page of a run whose files were written by what writes them in training."""
    run = RunDirectory(folder, "rl")
    with run.locked():
        config = Config()
        data = dataclasses.replace(config.data, train=text[:1000])
        run.start(dataclasses.replace(config, data=data, model=dataclasses.replace(config.model, path=text[:1000])))
        run.write_rollouts(0, [group_of(text)])
        run.write_evaluation("before", [group_of(text)])
        with MetricsLog(folder) as log:
            for step in range(2):
                log.write(step, {"reward": 0.5, f"reward/{text[:1000]}": 1.0, f"alarm/{text[:1000]}": 1.0})
        run.note_bad_row(0, text, text[:1000], text, 10)
        left_out = {"rows_left_out": {text[:1000]: 1}, "device": text[:1000], "versions": {text[:99]: text[:1000]}}
        run.write_summary({"before": {"greedy": 0.5}, "after": {"greedy": 0.5}} | left_out)
    return write_report(folder).read_bytes()


def evaluation_page(text: str) -> bytes:
    records = [
        dataclasses.replace(
            one, question=text, answer=text, choices=(text,), categories={text: text}, completion=text,
            extracted=text, rule=text, forced=f"{text} wait {text}", forced_verdict="wrong", forced_extracted=text,
        )
        for one in samples(text, "+-")
    ]  # fmt: skip
    result = evaluation_numbers(records, benchmark=text[:1000], protocol={"name": text[:1000]})
    result["made_by"] = {"model": text[:1000], "weights": text, "commit": text}
    return render_evaluation(text[:1000], result, records, {text: [png(), text.encode()[:2000]]})


def check_inert(page: bytes, tame: Page, text: str) -> None:
    source = page.decode("utf-8")
    assert not CONTROL.search(source), "a control character reached the page"
    found = Page(source)
    assert found.elements == tame.elements
    names = {name for _, attributes in found.elements for name in attributes}
    assert not [name for name in names if name.startswith("on") or name in ("srcdoc", "href", "action", "formaction")]
    assert not [value for value in found.values if value.strip().lower().startswith(("javascript:", "data:text"))]
    assert "49{" not in found.text and "'49'" not in source  # of the template in the text
    if len(text) < 1000 and "{" not in text:
        assert CONTROL.sub(lambda one: f"[U+{ord(one[0]):04X}]", text) in found.text  # shown, as it is written


@pytest.fixture(scope="module")
def tame_pages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, Page]:
    run = run_page(tmp_path_factory.mktemp("runs") / "run", TAME)
    return Page(run.decode()), Page(evaluation_page(TAME).decode())


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_no_element_is_made_of_text(tmp_path: Path, tame_pages: tuple[Page, Page], text: str) -> None:
    """The pages have the elements and attributes that tame text has, and no others. Catches text that is markup."""
    check_inert(run_page(tmp_path / "run", text), tame_pages[0], text)
    check_inert(evaluation_page(text), tame_pages[1], text)


def test_the_check_sees_what_it_looks_for(tame_pages: tuple[Page, Page]) -> None:
    """Catches a check that lets through what a page without escaping would hold."""
    clean = evaluation_page(TAME)
    check_inert(clean, tame_pages[1], TAME)
    for text in (HOSTILE[0], HOSTILE[2], HOSTILE[9]):
        with pytest.raises(AssertionError):
            check_inert(re.sub(b"</h1>", text.encode() + b"</h1>", clean, count=1), tame_pages[1], TAME)
