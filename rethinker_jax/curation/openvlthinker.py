"""When OpenVLThinker's released generator takes a trace for correct: the stated answer, its cleaning, the comparison.

Rejection sampling between its iterations (version 1.2 of the code) keeps a trace whose cleaned answer is the gold. The
quirks are kept, because they decide which traces are learned: cleaning looks for substrings, so that "volcano, lava" is
"no", and "gram" is cut before "kilogram" is looked for. Where the texts differ the generator asks MathRuler's
`grade_answer`; here our verifier is asked, as in the reward term `openvlthinker`.
"""

MIN_RANGE_CHARS = 5
_WHOLE_ANSWERS = (("yes", ("yes,", "yes. ")), ("no", ("no,", "no. ")))
_SAYS = (" is ", " = ", " ≈ ")
# In the order in which they are looked for; each is cut off what the ones before it left.
_UNITS = (
    "degree", "cm", "centimeter", "meter", "mile", "second", "minute", "hour", "day", "week", "month", "year", "foot",
    "feet", "inch", "yard", "liter", "gram", "kilogram", "ounce", "pound",
)  # fmt: skip


def stated_answer(completion: str) -> str | None:
    """The cleaned text after the last `<answer>`, up to a `</answer>`; None where no `</answer>` stands anywhere."""
    if "</answer>" not in completion:
        return None
    begin = completion.rfind("<answer>")
    stated = completion if begin < 0 else completion[begin + len("<answer>") :]
    return clean_answer(stated.partition("</answer>")[0].strip())


def clean_answer(answer: str) -> str:
    """Lower case, without a last full stop, alternatives, what leads up to the value, and units."""
    answer = answer.lower().removesuffix(".")
    for whole, signs in _WHOLE_ANSWERS:
        if any(sign in answer for sign in signs):
            return whole
    before, bracket, _ = answer.partition("(")
    if bracket and ")" in answer and before.strip():
        answer = before.strip()
    if " or " in answer:
        answer = answer.partition(" or ")[0].strip()
    for word in _SAYS:
        if word in answer:
            answer = answer.rpartition(word)[2].strip()
    for unit in _UNITS:
        if unit in answer:
            answer = answer.partition(unit)[0].strip()
    return answer


def same_text(answer: str, gold: str) -> bool | None:
    """Are answer and gold the same text, in any case; None where they differ and the verifier decides.

    Golds with a hyphen and five characters or more (ranges, dates) must be the same text.
    """
    if answer.lower() == gold.lower():
        return True
    return False if "-" in gold and len(gold) >= MIN_RANGE_CHARS else None
