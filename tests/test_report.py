"""The report of a made-up run: what the file holds, what of it is inert, and what a click does in a real browser."""

import base64
import hashlib
import html.parser
import io
import json
import math
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from rethinker_jax.errors import UserError
from rethinker_jax.report import write_report
from rethinker_jax.report.charts import format_value, smooth, thin, ticks
from rethinker_jax.report.page import render_page
from rethinker_jax.report.read import Metrics, RolloutFile, as_number, fold_pads, read_run
from rethinker_jax.report.subset import choose_evenly, choose_rollouts

HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"><!-- & \u2028 \u2029 \u202e abc \ud83d"


def make_image(rng: random.Random, kind: str) -> bytes:
    image = Image.frombytes("L", (84, 84), bytes(rng.choices(range(90, 166), k=84 * 84))).convert("RGB")
    pen = ImageDraw.Draw(image)
    for cell in range(9):
        x, y = 28 * (cell % 3), 28 * (cell // 3)
        color = rng.choice([(200, 30, 30), (30, 60, 210), (10, 130, 60), (190, 120, 0)])
        if kind == "count":
            (pen.rectangle if rng.random() < 0.5 else pen.ellipse)((x + 6, y + 6, x + 22, y + 22), fill=color)
        else:
            pen.text((x + 8, y + 4), str(rng.randrange(10)), fill=color, font_size=18)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def make_sample(rng: random.Random, index: int, answer: int, skill: float, forced_share: float) -> dict:
    right_first, right_last = rng.random() < skill, rng.random() < skill + 0.15
    forced = rng.random() < forced_share

    def written(right: bool) -> str:
        a, b = rng.randrange(10), rng.randrange(10)
        shown = answer if right else answer + rng.choice([-2, -1, 1, 3])
        return f"{a}+{b}={a + b}, {a + b}+{shown - a - b}={shown} \\boxed{{{shown}}}"

    segments = [{"kind": "first", "text": written(right_first)}]
    right = right_first
    if forced:
        right = right_last
        segments.append({"kind": "trigger", "text": rng.choice(["\n\nWait, let's double check", "\n\nWait"])})
        segments.append({"kind": "second_look", "text": ": " + written(right)})
    elif rng.random() < 0.4 * skill:
        segments[0]["text"] += "\n\nWait, there might be a mistake. " + written(right)
    extracted = re.findall(r"boxed\{(-?\d+)\}", segments[-1]["text"])[-1]
    verdict = "correct" if right else "wrong"
    if not forced and rng.random() < 0.1 * (1 - skill):
        segments[0]["text"], extracted, verdict, right = "3+4=7, 7+4=11, 11+0=", None, "no_answer", False
    return {
        "sample": index,
        "segments": segments,
        "verdict": verdict,
        "first_verdict": "correct" if right_first else "wrong",
        "reward": float(right),
        "extracted": extracted,
        "rule": "number" if extracted else "no box",
        "num_tokens": 12 + 14 * len(segments) + rng.randrange(9),
        "finish_reason": "stop" if extracted else "length",
        "forced": forced,
    }


def make_group(images: dict[str, bytes], index: int, step: int | None, skill: float, n: int) -> dict:
    """A problem that depends on `index` alone, and samples that get better with `skill`."""
    rng = random.Random(index)
    kind = rng.choice(["sum", "sum", "count", "pair", "text"])
    names = []
    for _ in range({"pair": 2, "text": 0}.get(kind, 1)):
        image = make_image(rng, kind)
        names.append(f"{hashlib.sha256(image).hexdigest()}.png")
        images[names[-1]] = image
    words = {"sum": "sum row 2?", "count": "count red?", "pair": "add both images?", "text": "add 3 5 2?"}[kind]
    question, answer = "<image>" * len(names) + words, rng.randrange(3, 20)
    chance = min(0.98, max(0.05, skill + rng.choice([-0.3, 0.0, 0.15])))
    samples = [make_sample(rng, i, answer, chance, 0.0 if step is None else 0.25) for i in range(n)]
    mean = sum(sample["reward"] for sample in samples) / n
    for sample in samples:
        sample["advantage"] = sample["reward"] - mean if step is not None else 0.0
    pads = "<|vision_start|>" + "<|image_pad|>" * 9 + "<|vision_end|>"
    problem = {"id": f"{kind}-1-{index}", "question": question, "answer": str(answer), "choices": [], "type": "number"}
    return {
        "step": step,
        "problem": problem | {"source": kind},
        "prompt_text": f"<|im_start|>user\n{pads * len(names)}{words}<|im_end|>\n<|im_start|>assistant\n",
        "images": names,
        "samples": samples,
    }


def make_metrics(rng: random.Random, step: int, num_steps: int) -> dict:
    share = 1 / (1 + math.exp(-6 * (step / num_steps - 0.35)))
    accuracy = 0.3 + 0.6 * share + rng.gauss(0, 0.03)
    forced = 0.25 if step % 7 else None
    return {
        "step": step, "reward": accuracy + rng.gauss(0, 0.01), "accuracy": accuracy, "loss": rng.gauss(0, 0.02),
        "effective_share": 0.97 + rng.gauss(0, 0.01), "zero_advantage_share": 0.1 + 0.5 * share + rng.gauss(0, 0.04),
        "completion_length": 26 + 8 * share + rng.gauss(0, 0.8), "truncated_share": 0.04 * (1 - share),
        "rethink_ratio": 0.02 + 0.3 * share + rng.gauss(0, 0.015), "forced_share": forced,
        "forced_first_accuracy": forced and accuracy - 0.03 + rng.gauss(0, 0.04),
        "forced_final_accuracy": forced and min(1, accuracy + 0.08 + rng.gauss(0, 0.04)),
        "wrong_to_right": forced and 0.16 - 0.08 * share, "right_to_wrong": forced and 0.05 - 0.03 * share,
        "entropy": 0.9 - 0.6 * share + rng.gauss(0, 0.03), "gradient_norm": math.exp(rng.gauss(-0.3, 0.3)),
        "clip_fraction": abs(rng.gauss(0.01, 0.005)), "sampler_trainer_gap": 10 ** rng.gauss(-5.6, 0.3),
        "tokens_per_second": 2400 + rng.gauss(0, 120), "replay_share": 0.3 * share, "replay_size": 40 * step,
        "learning_rate": 1e-3 * (1 - 0.5 * step / num_steps), "seconds_rollout": 1.4 + rng.gauss(0, 0.1),
        "seconds_update": 0.8 + rng.gauss(0, 0.05), "seconds_verify": 0.05, "odd_new_metric": share,
    }  # fmt: skip


def make_run(run_dir: Path, num_steps: int = 20, num_files: int = 3, num_groups: int = 4, n: int = 4) -> Path:
    """A finished run with evaluations, as the training loop leaves it."""
    rng = random.Random(0)
    images: dict[str, bytes] = {}
    (run_dir / "evaluations").mkdir(parents=True)
    (run_dir / "rollouts" / "images").mkdir(parents=True)
    (run_dir / "config.yaml").write_text(f"run:\n  seed: 0\n  num_steps: {num_steps}\nmodel:\n  path: example\n")
    lines = [json.dumps(make_metrics(rng, step, num_steps)) for step in range(num_steps)]
    (run_dir / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    steps = [round(i * (num_steps - 1) / (num_files - 1)) for i in range(num_files)]
    for step in steps:
        skill = 0.35 + 0.5 * step / num_steps
        groups = [make_group(images, 1000 + 100 * step + i, step, skill, n) for i in range(num_groups)]
        write_lines(run_dir / "rollouts" / f"step_{step:06d}.jsonl", groups)
    for name, skill in (("before", 0.35), ("after", 0.85)):
        groups = [make_group(images, i, None, skill, n) for i in range(num_groups)]
        write_lines(run_dir / "evaluations" / f"{name}.jsonl", groups)
    for name, image in images.items():
        (run_dir / "rollouts" / "images" / name).write_bytes(image)
    summary = {
        "before": {"greedy": 0.371, "pass@1": 0.342, "pass@8": 0.78, "rethink_ratio": 0.021},
        "after": {"greedy": 0.883, "pass@1": 0.861, "pass@8": 0.97, "rethink_ratio": 0.31},
        "zero_advantage_share": {"first": 0.11, "last": 0.6}, "effective_share": {"first": 0.96, "last": 0.98},
        "wall_s": 192.4, "cpu_s": 371.0, "seed": 0, "commit": "0123456789abcdef", "device": "2 CPU devices",
        "versions": {"jax": "0.10.2", "flax": "0.12.8"},
    }  # fmt: skip
    (run_dir / "summary.json").write_text(json.dumps(summary))
    return run_dir


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Page(html.parser.HTMLParser):
    """Elements with their attributes, and the text of every script, as a browser would cut them."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self.in_script = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")
            self.in_script = True

    def handle_endtag(self, tag: str) -> None:
        self.in_script = False

    def handle_data(self, data: str) -> None:
        if self.in_script:
            self.scripts[-1] += data
        else:
            self.text += data

    @property
    def payload(self) -> dict:
        return json.loads(self.scripts[0])


def page_of(run_dir: Path) -> Page:
    return Page(write_report(run_dir).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture(scope="module")
def page(run_dir: Path) -> Page:
    return page_of(run_dir)


def test_page_stands_alone(page: Page) -> None:
    """Catches a stylesheet, script, font or image that would be fetched, and a policy that would allow it."""
    for tag, attributes in page.elements:
        assert tag not in {"link", "iframe", "object", "embed", "base", "form"}
        assert not {"src", "srcset", "href", "action"} & attributes.keys(), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
    policies = [a["content"] for t, a in page.elements if t == "meta" and a.get("http-equiv")]
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    allowed = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert policies == [f"{allowed}; base-uri 'none'; form-action 'none'"]


def test_page_never_makes_markup_of_data(page: Page) -> None:
    """The one place where model text could become HTML is a sink in our script: none may appear."""
    sinks = r"innerHTML|outerHTML|insertAdjacent|document\.write|DOMParser|ContextualFragment|srcdoc|eval\(|Function\("
    assert not re.search(sinks, page.scripts[1])


def test_payload_is_what_the_run_wrote(run_dir: Path, page: Page) -> None:
    """Catches a group, sample or field that is lost, reordered or changed between the run's files and the page."""
    files = {path.stem: read_lines(path) for path in run_dir.glob("*/*.jsonl")}
    sets = {s["name"]: s for s in page.payload["sets"]}
    assert [s["name"] for s in page.payload["sets"]] == ["before", "step_000000", "step_000010", "step_000019", "after"]
    assert sets.keys() == files.keys()
    for name, rows in files.items():
        assert sets[name]["num_groups"] == len(rows)
        for shown, row in zip(sets[name]["groups"], rows, strict=True):
            assert shown["samples"] == row["samples"]
            assert {key: shown[key] for key in row["problem"]} == row["problem"]
            assert shown["images"] == [image.removesuffix(".png") for image in row["images"]]


def test_images_stand_once_each_and_whole(run_dir: Path, page: Page) -> None:
    """Before and after show the same pictures: a page that inlines them per group holds them twice."""
    used = [image for s in page.payload["sets"] for g in s["groups"] for image in g["images"]]
    assert len(used) > len(set(used)) and set(used) == page.payload["images"].keys()
    for key, image in page.payload["images"].items():
        encoded = base64.b64decode(image["uri"].removeprefix("data:image/png;base64,"))
        assert hashlib.sha256(encoded).hexdigest() == key
        assert (image["width"], image["height"], image["redrawn"]) == (84, 84, False)


def test_charts_hold_known_metrics_and_the_rest_is_listed(page: Page) -> None:
    charts = page.payload["charts"]
    assert {"learning", "signal", "rethinking", "second_look", "length", "entropy", "gradient", "gap"} <= charts.keys()
    assert page.payload["steps"] == list(range(20))
    assert all(len(series["values"]) == 20 for chart in charts.values() for series in chart["series"])
    assert charts["gap"]["log"] and not charts["learning"]["log"]
    assert "odd_new_metric" in page.text and "seconds_update" in page.text
    assert charts["second_look"]["series"][0]["values"][7] is None  # a step without forced completions: a gap, not 0


def test_table_shows_before_and_after(page: Page) -> None:
    """Worked out by hand from the made-up summary: 37.1 → 88.3 is +51.2 points; 34.2 → 86.1 is +51.9."""
    words = " ".join(page.text.split())
    for piece in ("37.1% 88.3% +51.2", "34.2% 86.1% +51.9", "78.0% 97.0% +19.0", "2.1% 31.0% +28.9", "3 min 12 s"):
        assert piece in words, piece


def test_hostile_text_is_inert(tmp_path: Path) -> None:
    """Text that closes the data block, opens a comment or breaks lines stays text and adds no element."""
    run = make_run(tmp_path / "run")
    clean = [tag for tag, _ in page_of(run).elements]
    path = run / "evaluations" / "after.jsonl"
    rows = read_lines(path)
    rows[0]["problem"] |= {"question": HOSTILE, "id": HOSTILE, "answer": HOSTILE, "choices": [HOSTILE]}
    rows[0]["prompt_text"] = HOSTILE
    rows[0]["samples"][0] |= {"segments": [{"kind": "first", "text": HOSTILE}], "extracted": HOSTILE, "rule": HOSTILE}
    rows[0]["samples"][0]["verdict"] = "correct"
    write_lines(path, rows)
    page = page_of(run)
    assert [tag for tag, _ in page.elements] == clean
    group = page.payload["sets"][-1]["groups"][0]
    assert group["question"] == group["prompt_text"] == group["samples"][0]["segments"][0]["text"] == HOSTILE
    assert page.scripts[0].isascii() and not set("<>&") & set(page.scripts[0])


def test_hostile_names_in_metrics_config_and_source_are_escaped(tmp_path: Path) -> None:
    """These go through the template, not through the data block."""
    run = make_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 20, HOSTILE: 1.0}) + "\n")
    (run / "config.yaml").write_text(f"model:\n  path: {json.dumps(HOSTILE)}\n")
    path = run / "evaluations" / "after.jsonl"
    rows = read_lines(path)
    rows[0]["problem"]["source"] = HOSTILE
    write_lines(path, rows)
    page = page_of(run)
    assert not any("onerror" in attributes for _, attributes in page.elements)
    assert len(page.scripts) == 2
    assert sum(tag == "img" for tag, _ in page.elements) == 1  # the empty one of the zoom


def test_image_names_cannot_leave_the_folder(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    Image.new("RGB", (8, 8)).save(run / "rollouts" / "secret.png")
    path = run / "rollouts" / "step_000019.jsonl"
    rows = read_lines(path)
    rows[0]["images"] = ["../secret.png", "/etc/passwd", "0" * 64 + ".svg", "0" * 64 + ".png"]
    write_lines(path, rows)
    payload = page_of(run).payload
    assert payload["sets"][3]["groups"][0]["images"] == ["0" * 64]
    assert "0" * 64 not in payload["images"]  # named rightly, but missing: shown as unreadable


def test_a_run_in_progress_is_shown(tmp_path: Path) -> None:
    """No summary yet, one half-written line in each file, a NaN, and a step written twice by a resumed run."""
    run = make_run(tmp_path / "run", num_steps=40)
    (run / "summary.json").unlink()
    (run / "evaluations" / "after.jsonl").unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines()[:30]
    again = json.dumps(json.loads(lines[5]) | {"entropy": float("nan"), "reward": 0.125})
    (run / "metrics.jsonl").write_text("\n".join([*lines, again, lines[0][:50]]))
    with (run / "rollouts" / "step_000000.jsonl").open("a") as file:
        file.write('{"step": 0, "pro')
    page = page_of(run)
    assert "in progress" in page.text and "30 of 40 steps" in page.text
    assert "No evaluation has been written yet" in page.text
    assert page.payload["charts"]["entropy"]["series"][0]["values"][5] is None
    assert page.payload["charts"]["learning"]["series"][0]["values"][5] == 0.125
    assert len(page.payload["steps"]) == 30
    assert "1 unreadable line of metrics.jsonl left out" in page.text and "1 unreadable line left out" in page.text


def test_a_run_that_just_began_is_shown(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("run: {num_steps: 3}\n")
    page = page_of(tmp_path)
    assert "No metrics have been written yet" in page.text and "No rollouts have been written yet" in page.text


def test_no_run_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="wanted a run directory"):
        write_report(tmp_path)


def test_rows_of_another_shape_are_survived(tmp_path: Path) -> None:
    """JSON that is right as JSON and wrong as a rollout or a metric: no traceback at the end of an hour's run."""
    run = make_run(tmp_path / "run")
    rows = ["[]", "3", "null", '{"problem": 3, "samples": [1, null, {"segments": "x", "reward": "high"}]}']
    (run / "rollouts" / "step_000019.jsonl").write_text("\n".join(rows))
    (run / "metrics.jsonl").write_text('{"step": "one"}\n{"step": 1, "reward": [1], "accuracy": true}\n')
    (run / "summary.json").write_text('{"before": 4, "after": {"greedy": "good"}, "versions": []}')
    (run / "config.yaml").write_text("run: [1\n")
    shown = page_of(run).payload["sets"][3]
    assert len(shown["groups"]) == 1 and shown["num_groups"] == 4
    assert [sample["reward"] for sample in shown["groups"][0]["samples"]] == [None, None, None]


@pytest.mark.parametrize("max_bytes", [130_000, 200_000, 400_000])
def test_page_keeps_its_size_and_says_what_it_left_out(run_dir: Path, max_bytes: int) -> None:
    """Catches a budget that forgets base64, escaping or the page itself, and a file that fills before the others."""
    text = render_page(read_run(run_dir), max_bytes)
    assert max_bytes * 0.5 < len(text) <= max_bytes
    page = Page(text.decode())
    counts = [len(s["groups"]) for s in page.payload["sets"]]
    shown = sum(counts)
    assert (f"{shown} of 20" in page.text) if shown < 20 else ("all 20" in page.text)
    assert max(counts) - min(counts) <= 2


def test_default_size_holds_for_a_run_that_is_too_large(tmp_path: Path) -> None:
    """40 MB of completions: the page keeps under 15 MB and still shows every file it chose."""
    run = make_run(tmp_path / "run", num_steps=60, num_files=30)
    for path in run.glob("rollouts/*.jsonl"):
        rows = read_lines(path)
        for row in rows:
            for sample in row["samples"]:
                sample["segments"][0]["text"] = "<é>" * 28_000 if path.stem == "step_000000" else "word " * 17_000
        write_lines(path, rows)
    size = write_report(run).stat().st_size
    payload = Page((run / "report.html").read_text()).payload
    assert 10_000_000 < size <= 15_000_000
    assert len(payload["sets"]) == 14 and all(s["groups"] for s in payload["sets"])


def test_large_images_are_drawn_smaller_and_small_ones_kept(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    buffer = io.BytesIO()
    Image.effect_noise((1600, 400), 90).convert("RGB").save(buffer, "PNG")
    key = hashlib.sha256(buffer.getvalue()).hexdigest()
    (run / "rollouts" / "images" / f"{key}.png").write_bytes(buffer.getvalue())
    rows = read_lines(run / "evaluations" / "after.jsonl")
    rows[0]["images"] = [f"{key}.png"]
    write_lines(run / "evaluations" / "after.jsonl", rows)
    image = page_of(run).payload["images"][key]
    assert (image["width"], image["height"], image["redrawn"]) == (1600, 400, True)
    encoded = base64.b64decode(image["uri"].removeprefix("data:image/webp;base64,"))
    with Image.open(io.BytesIO(encoded)) as shown:
        assert shown.size == (768, 192)
    assert len(encoded) < len(buffer.getvalue()) / 4


def test_unreadable_image_is_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    path = next((run / "rollouts" / "images").iterdir())
    path.write_bytes(path.read_bytes()[:300])
    subset = choose_rollouts(read_run(run), 10_000_000)
    assert path.stem not in subset.images and subset.images


def test_choose_evenly_keeps_first_and_last() -> None:
    """Of 0, 10, ..., 990, five evenly spaced by place are 0, 250, 500, 740, 990 (24.75 → 25, 49.5 → 50, 74.25 → 74)."""
    files = [RolloutFile(f"step_{s:06d}", "", s, Path()) for s in range(0, 1000, 10)]
    assert [file.step for file in choose_evenly(files, 5)] == [0, 250, 500, 740, 990]
    assert choose_evenly(files[:4], 5) == files[:4]


def test_smooth_skips_gaps_and_keeps_constants() -> None:
    """A missing value must neither count as 0 nor be invented."""
    assert smooth([2.0, None, 2.0, 2.0], 1.0) == [2.0, None, 2.0, pytest.approx(2.0)]
    assert smooth([0.0, 0.0, 1.0, 0.0, 0.0], 1.0)[2] == pytest.approx(1 / (1 + 2 * math.exp(-0.5) + 2 * math.exp(-2)))


def test_thin_averages_neighbours() -> None:
    metrics = Metrics((0, 1, 2, 3), {"a": (1.0, 3.0, None, 8.0), "b": (None, None, 1.0, 2.0)})
    thinned = thin(metrics, 2)
    assert thinned.steps == (1, 3)
    assert thinned.series == {"a": (2.0, 8.0), "b": (None, 1.5)}


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0.0, 1.0, 4) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert ticks(0.0, 59.0, 6) == [0, 10, 20, 30, 40, 50]
    assert [format_value(v, "share") for v in (0.0, 0.25)] == ["0%", "25%"]
    assert [format_value(v, "number") for v in (0.0, 2500.0, 25e3, 2.5e6, 0.00125)] == [
        "0",
        "2500",
        "25k",
        "2.5M",
        "0.00125",
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**400, True, "1", None])
def test_no_number_is_none(value: object) -> None:
    assert as_number(value) is None


def test_fold_pads_counts() -> None:
    assert (
        fold_pads("a<|image_pad|><|image_pad|><|image_pad|>b<|image_pad|>")
        == "a<|image_pad|>\N{MULTIPLICATION SIGN}3b<|image_pad|>"
    )


# ---- in a real browser ----


@pytest.fixture(scope="module")
def browser() -> Iterator:
    webdriver = pytest.importorskip("selenium.webdriver", reason="NOT RUN: selenium is not installed")
    chromium = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("NOT RUN: chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    flags = "headless no-sandbox disable-gpu disable-quic disable-dev-shm-usage no-first-run disable-sync"
    quiet = "disable-background-networking disable-component-update window-size=1400,1200"
    for flag in f"{flags} {quiet}".split():
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    running = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield running
    running.quit()


@pytest.fixture
def opened(browser, run_dir: Path):
    """The page of the made-up run, freshly loaded, at the evaluation after training."""
    browser.get("about:blank")
    browser.get(write_report(run_dir).as_uri())
    yield browser
    assert browser.get_log("browser") == []  # no error of the script, nothing refused by the policy


def element(browser, css: str):
    return browser.find_element("css selector", css)


def texts(browser, css: str) -> list[str]:
    return [found.text for found in browser.find_elements("css selector", css)]


def selected(browser) -> list[str | None]:
    return [item.get_attribute("id") for item in browser.find_elements("css selector", '#list [aria-selected="true"]')]


def open_set(browser, index: int) -> None:
    browser.find_elements("css selector", "#sets button")[index].click()


def test_browser_opens_another_step(opened, run_dir: Path) -> None:
    """Catches a click that changes the list but not the group, or shows another file's texts."""
    assert texts(opened, "#group .bar .id")[0] == "After training"
    open_set(opened, 2)
    assert texts(opened, "#group .bar .id")[0] == "Step 10"
    row = read_lines(run_dir / "rollouts" / "step_000010.jsonl")[0]
    assert texts(opened, "#group .gold-line b") == [row["problem"]["answer"]]
    written = ["".join("".join(s["text"] for s in sample["segments"]).split()) for sample in row["samples"]]
    assert ["".join(text.split()) for text in texts(opened, ".sample .text")] == written
    assert opened.current_url.endswith("#step_000010/0")


def test_browser_shows_forced_looks(opened, run_dir: Path) -> None:
    """First and final verdict of a forced completion, its trigger marked, its second look in the tinted block."""
    files = sorted(run_dir.glob("rollouts/*.jsonl"))
    at, index, row = next(
        (a, i, r)
        for a, f in enumerate(files)
        for i, r in enumerate(read_lines(f))
        if any(s["forced"] for s in r["samples"])
    )
    open_set(opened, 1 + at)
    element(opened, f"#item-{index}").click()
    forced = [sample for sample in row["samples"] if sample["forced"]]
    looks = opened.find_elements("css selector", ".sample .look")
    assert [look.find_element("css selector", "mark").text for look in looks] == [
        s["segments"][1]["text"].strip() for s in forced
    ]
    assert [look.find_element("css selector", ".answer").text for look in looks] == [s["extracted"] for s in forced]
    cards = [look.find_element("xpath", "ancestor::section[1]") for look in looks]
    for card, sample in zip(cards, forced, strict=True):
        chips = [chip.get_attribute("class") for chip in card.find_elements("css selector", ".chip")]
        assert chips == [f"chip {sample['first_verdict']}", f"chip {sample['verdict']}"]


def test_browser_filters(opened, run_dir: Path) -> None:
    """Each filter leaves exactly the groups that a reading of the file finds."""
    open_set(opened, 1)
    rows = read_lines(run_dir / "rollouts" / "step_000000.jsonl")

    def expect(wanted) -> None:
        found = [f"item-{i}" for i, row in enumerate(rows) if wanted(row)]
        assert [item.get_attribute("id") for item in opened.find_elements("css selector", "#list li")] == found
        assert len(selected(opened)) == bool(found)  # a group that was filtered away does not stay open
        assert len(opened.find_elements("css selector", "#group .samples")) == bool(found)

    element(opened, "#mixed + span").click()
    expect(lambda row: len({sample["verdict"] == "correct" for sample in row["samples"]}) == 2)
    element(opened, "#mixed + span").click()
    element(opened, "#forced + span").click()
    expect(lambda row: any(sample["forced"] for sample in row["samples"]))
    element(opened, "#forced + span").click()
    source = rows[-1]["problem"]["source"]
    element(opened, f'#source option[value="{source}"], #source option:last-child').click()
    chosen = element(opened, "#source").get_property("value")
    expect(lambda row: row["problem"]["source"] == chosen)
    element(opened, "#source option").click()
    element(opened, '#verdict option[value="wrong"]').click()
    expect(lambda row: any(sample["verdict"] == "wrong" for sample in row["samples"]))
    element(opened, "#verdict option").click()
    element(opened, "#search").send_keys(rows[2]["problem"]["id"])
    expect(lambda row: row is rows[2])
    element(opened, "#search").send_keys("no such text")
    expect(lambda row: False)
    assert "No group passes" in element(opened, "#group").text


def test_browser_arrow_keys(opened) -> None:
    """Right and left walk the problems and stop at the ends; with shift, the steps; not in the search field."""
    from selenium.webdriver.common.keys import Keys

    body = element(opened, "body")
    assert selected(opened) == ["item-0"]
    body.send_keys(Keys.ARROW_LEFT)
    assert selected(opened) == ["item-0"]
    body.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert selected(opened) == ["item-2"] and "3 of 4" in element(opened, ".bar .move").text
    element(opened, "#list").send_keys(Keys.ARROW_UP)
    assert selected(opened) == ["item-1"]
    body.send_keys(Keys.SHIFT, Keys.ARROW_LEFT)
    assert texts(opened, "#group .bar .id")[0] == "Step 19"
    element(opened, "#search").send_keys("m", Keys.ARROW_LEFT)
    assert texts(opened, "#group .bar .id")[0] == "Step 19" and selected(opened) == ["item-0"]


def test_browser_follows_a_problem_and_enlarges_its_image(opened, run_dir: Path) -> None:
    rows = read_lines(run_dir / "evaluations" / "after.jsonl")
    index = next(i for i, row in enumerate(rows) if row["images"])
    element(opened, f"#item-{index}").click()
    image = element(opened, ".pictures img")
    assert image.get_property("naturalWidth") == 84 and "pixelated" in image.get_attribute("class")
    assert image.size["width"] in (84 * 2 + 2, 84 * 3, 84 * 2, 84 * 3 + 2)
    element(opened, ".pictures button").click()
    assert element(opened, "#zoom img").is_displayed()
    element(opened, "#zoom").click()
    next(b for b in opened.find_elements("css selector", ".elsewhere button") if "Before" in b.text).click()
    assert texts(opened, "#group .bar .id")[:2] == ["Before training", rows[index]["problem"]["id"]]


def test_browser_reads_all_charts_at_the_step_pointed_at(opened, run_dir: Path) -> None:
    """Pointing at the middle of one chart shows a middle step of 0 to 19 on every chart, with its values."""
    from selenium.webdriver.common.action_chains import ActionChains

    svg = element(opened, "[data-chart=learning] svg")
    ActionChains(opened).move_to_element(svg).perform()
    step = int(element(opened, "[data-chart=learning] .when").text.removeprefix("step "))
    assert step in (9, 10, 11)
    row = read_lines(run_dir / "metrics.jsonl")[step]
    assert texts(opened, "[data-chart=learning] .legend b") == [
        f"{100 * row['reward']:.1f}%",
        f"{100 * row['accuracy']:.1f}%",
    ]
    assert element(opened, "[data-chart=entropy] .when").text == f"step {step}"
    assert float(element(opened, "[data-chart=entropy] .legend b").text) == pytest.approx(row["entropy"], rel=0.01)


def test_browser_shows_hostile_text_as_text(browser, tmp_path: Path) -> None:
    """The attack, read in a real browser: nothing runs, nothing is added, and the direction override is spelled out."""
    run = make_run(tmp_path / "run")
    path = run / "evaluations" / "after.jsonl"
    rows = read_lines(path)
    rows[0]["problem"] |= {"question": HOSTILE, "source": HOSTILE, "choices": [HOSTILE, "b"]}
    rows[0]["prompt_text"] = HOSTILE
    for sample in rows[0]["samples"]:
        sample |= {
            "segments": [{"kind": kind, "text": HOSTILE} for kind in ("first", "trigger", "second_look")],
            "rule": HOSTILE,
        }
        sample |= {"extracted": HOSTILE, "verdict": HOSTILE, "forced": True, "finish_reason": HOSTILE}
    write_lines(path, rows)
    browser.get(write_report(run).as_uri())
    assert browser.title == "run · rethinker_jax"
    assert browser.find_elements("css selector", "[onerror]") == []
    shown = element(browser, "#group .question").text
    assert shown.startswith("</script><img src=x onerror=") and "U+202E" in shown and "\u202e" not in shown
    assert browser.get_log("browser") == []
