"""What evolution costs over inference."""

from jes.bench.cases import (
    MEMBERS,
    Case,
    generation,
    larger_model,
    qwen_shape,
    settings,
    unperturbed,
)
from jes.bench.timing import Row, compare
from jes.models.weights import load


def rows(repeats: int) -> list[Row]:
    """The rows of `jes.bench`."""
    tiny, larger = load("tiny"), larger_model()
    cases = [
        (Case(f"{name}, {count} prompts x {text} tokens", model, count, *lengths), goal)
        for name, model, text, lengths in (
            ("tiny", tiny, "24 + 5", (24, 5)),
            ("4.5M", larger, "64 + 32", (64, 32)),
        )
        for count, goal in ((64, "<= 1.3"), (256, "<= 1.15"))
    ]
    out = []
    for case, goal in cases:
        for law in ("normal", "table"):
            name = f"generation / (N x inference), {law} noise: {case.name}"
            run = generation(case, settings(MEMBERS, law))
            out.append(compare(name, goal, run, unperturbed(case), repeats, MEMBERS))
    case = Case("0.5B shape, 32 prompts x 64 + 5 tokens", qwen_shape(), 32, 64, 5)
    name = f"generation / (N x inference), table noise: {case.name}"
    run = generation(case, settings(2, "table"), chunk=1)
    out.append(compare(name, "<= 1.25", run, unperturbed(case), min(repeats, 3), 2))
    return out
