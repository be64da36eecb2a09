r"""How many answers the verifier judges per second, through the pool with one worker process. Prints one JSON line.

    taskset -c 0 python scripts/bench_verifier.py      # half a minute
    python scripts/bench_verifier.py --mixed 1000 --seed 3

Every gold is new, so neither the pool's nor the gold's cache helps. Half of the answers are right in another dress,
half are near misses, each at the end of some sentences of reasoning.
 * easy: option letters, integers, decimals
 * mixed: 40 % easy; 30 % fractions, percents, units, tuples, sets, intervals, ratios, text; 30 % algebra (radicals, pi,
   polynomials, trigonometry, logarithms, equations)
 * algebra: that part of it alone
 * sympy: answers that only math-verify decides (relations of several variables, `\pm` inside an expression)
`cpu_s` is the CPU time of the worker per group, so the rate holds on a busy machine too.
"""

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path

from rethinker_jax.config import VerifierConfig
from rethinker_jax.verify.judge import JudgeItem
from rethinker_jax.verify.pool import VerifierPool

Case = tuple[str, str, str, tuple[str, ...]]  # gold, right answer, wrong answer, choices
REASONING = "Reading the lengths off the figure, I first name the unknown side and then write down what is given. " * 6


def letter(r: random.Random, n: int) -> Case:
    choices = tuple(f"{n + k} cm" for k in r.sample(range(100), 4))
    right, wrong = r.sample(range(4), 2)
    dress = r.choice(("{0}", "({0})", "{0}.", r"\text{{{0}}}", "{0}. {1}", "{1}"))
    good, bad = (dress.format(chr(65 + k), choices[k]) for k in (right, wrong))
    return chr(65 + right), good, bad, choices


def integer(r: random.Random, n: int) -> Case:
    return str(n), r.choice((f"{n}", f"{n:,}", f"{n}.0", f"x = {n}")), str(n + r.choice((-1, 1, 10))), ()


def decimal(r: random.Random, n: int) -> Case:
    gold = f"{n / 100:.2f}"
    return gold, r.choice((gold, gold + "0")), f"{n / 100 + 0.01:.2f}", ()


def fraction(r: random.Random, n: int) -> Case:
    d = r.randrange(2, 30)
    return rf"\frac{{{n}}}{{{d}}}", r.choice((f"{n}/{d}", rf"\dfrac{{{2 * n}}}{{{2 * d}}}")), f"{d}/{n}", ()


def percent(r: random.Random, n: int) -> Case:
    return rf"{n / 10:.1f}\%", r.choice((f"{n / 10:.1f}", f"{n / 1000:.3f}")), rf"{n / 10 + 1:.1f}\%", ()


def units(r: random.Random, n: int) -> Case:
    unit, word = r.choice((("cm", "centimeters"), ("m/s", "meters per second"), ("cm^2", "square cm"), ("kg", "kg")))
    return rf"{n} \mathrm{{~{unit}}}", r.choice((f"{n} {word}", f"{n}")), f"{n + 2} {word}", ()


def point(r: random.Random, n: int) -> Case:
    m = r.randrange(2, 50)
    return rf"({n}, -\frac{{1}}{{{m}}})", rf"\left({n}, \frac{{-1}}{{{m}}}\right)", rf"(-\frac{{1}}{{{m}}}, {n})", ()


def number_set(r: random.Random, n: int) -> Case:
    m = r.randrange(2, 50)
    return rf"\{{-{m}, {n}, \sqrt{{{m}}}\}}", rf"\sqrt{{{m}}}, {n}, -{m}", rf"\{{-{m}, {n}\}}", ()


def interval(r: random.Random, n: int) -> Case:
    return rf"[-{n}, \sqrt{{{n}}})", rf"-{n} \le x < \sqrt{{{n}}}", rf"(-{n}, \sqrt{{{n}}})", ()


def ratio(r: random.Random, n: int) -> Case:
    return f"{n}:{n + 7}", f"{2 * n}:{2 * n + 14}", f"{n + 7}:{n}", ()


def text(r: random.Random, n: int) -> Case:
    noun = r.choice(("triangle", "circle", "bridge", "red car"))
    return f"the {noun} number {n}", rf"\text{{The {noun} number {n}.}}", f"the {noun} number {n + 1}", ()


def radical(r: random.Random, n: int) -> Case:
    a, b = r.randrange(2, 9), r.choice((2, 3, 5, 7))
    return (
        rf"{n}+{a}\sqrt{{{b}}}",
        r.choice((rf"\sqrt{{{a * a * b}}}+{n}", rf"{n}+{a}√{b}")),
        rf"{n}-{a}\sqrt{{{b}}}",
        (),
    )


def multiple_of_pi(r: random.Random, n: int) -> Case:
    d = r.choice((3, 7, 9))
    return rf"\frac{{{n}\pi}}{{{d}}}", rf"\frac{{{n}}}{{{d}}}\pi", rf"\frac{{{n + d}\pi}}{{{d}}}", ()


def polynomial(r: random.Random, n: int) -> Case:
    a = r.randrange(1, 20)
    return f"x^2+{n + a}x+{n * a}", f"(x+{a})(x+{n})", f"(x-{a})(x+{n})", ()


def trigonometry(r: random.Random, n: int) -> Case:
    return rf"{n}\sin 2x", rf"{2 * n}\sin x\cos x", rf"{2 * n}\sin x", ()


def logarithm(r: random.Random, n: int) -> Case:
    return rf"{n}\ln 2+x", rf"x+\ln 2^{{{n}}}" if n < 300 else rf"x+{n}\ln 2", rf"{n}\ln 3+x", ()


def quotient(r: random.Random, n: int) -> Case:
    return rf"\frac{{x+{n}}}{{x-1}}", rf"1+\frac{{{n + 1}}}{{x-1}}", rf"\frac{{x-{n}}}{{x-1}}", ()


def line(r: random.Random, n: int) -> Case:
    a = r.randrange(2, 9)
    return f"{a}x+y={n}", f"y={n}-{a}x", f"y={n}+{a}x", ()


def circle(r: random.Random, n: int) -> Case:
    return f"(x-{n})^2+y^2=9", f"x^2-{2 * n}x+y^2+{n * n - 9}=0", f"(x+{n})^2+y^2=9", ()


def half_plane(r: random.Random, n: int) -> Case:
    return f"x+y<{n}", f"{n}>x+y", f"x+y>{n}", ()


def two_values(r: random.Random, n: int) -> Case:
    return rf"{n}+\sqrt{{2}}\pm x", rf"\sqrt{{2}}+{n}\pm x", rf"\sqrt{{3}}+{n}\pm x", ()


EASY = (letter, letter, integer, decimal)
STRUCTURED = (fraction, percent, units, point, number_set, interval, ratio, text)
ALGEBRA = (radical, multiple_of_pi, polynomial, trigonometry, logarithm, quotient, line, circle)
GROUPS = {
    "easy": ((1.0, EASY),),
    "mixed": ((0.4, EASY), (0.3, STRUCTURED), (0.3, ALGEBRA)),
    "algebra": ((1.0, ALGEBRA),),
    "sympy": ((1.0, (half_plane, two_values)),),
}


def make_items(group: str, count: int, seed: int) -> list[tuple[JudgeItem, bool]]:
    """(item, is it right) of a group; the same for the same seed."""
    r = random.Random(f"{group} {seed}")
    numbers = r.sample(range(10, 10 + 40 * count), count)
    made = []
    for n in numbers:
        kinds: tuple[Callable[[random.Random, int], Case], ...] = r.choices(
            [kinds for _, kinds in GROUPS[group]], [share for share, _ in GROUPS[group]]
        )[0]
        gold, right, wrong, choices = r.choice(kinds)(r, n)
        is_right = r.random() < 0.5
        made.append(
            (
                JudgeItem(rf"{REASONING} So the answer is $\boxed{{{right if is_right else wrong}}}$.", gold, choices),
                is_right,
            )
        )
    return made


def cpu_seconds(pids: list[int]) -> float:
    """CPU time of the processes so far, from Linux's /proc."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / 100


def measure(pool: VerifierPool, group: str, count: int, seed: int) -> dict[str, float]:
    cases = make_items(group, count, seed)
    before, started = cpu_seconds(pool.worker_pids), time.perf_counter()
    verdicts = pool.judge_many([item for item, _ in cases])
    seconds, cpu = time.perf_counter() - started, cpu_seconds(pool.worker_pids) - before
    wrong = [(item.answer, v) for (item, right), v in zip(cases, verdicts, strict=True) if v.correct != right]
    for gold, verdict in wrong[:3]:
        print(f"judged wrongly: gold {gold!r}, {verdict}")
    return {
        "items": count,
        "per_s": round(count / seconds, 1),
        "per_cpu_s": round(count / max(cpu, 0.01), 1),
        "cpu_s": round(cpu, 2),
        "max_ms": round(max(v.ms for v in verdicts), 1),
        "misjudged": len(wrong),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for group, count in (("easy", 20_000), ("mixed", 4_000), ("algebra", 2_000), ("sympy", 500)):
        parser.add_argument(f"--{group}", type=int, default=count)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with VerifierPool(VerifierConfig(num_workers=1)) as pool:
        pool.judge_many([JudgeItem(r"\boxed{1}", "1")])  # the worker is up
        groups = {group: measure(pool, group, getattr(options, group), options.seed) for group in GROUPS}
    mix = "40 % easy, 30 % structured, 30 % algebra"
    print(json.dumps({"workers": 1, "seed": options.seed, "mix": mix, **groups}))


if __name__ == "__main__":
    main()
