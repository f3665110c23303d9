"""ARC-Challenge (1803.05457) with a chain of thought: a prior task of 2605.30148.

Zero-shot; the answer is to end with 'The answer is (X)'. For the letter alone see
`jes.tasks.arc_c`.
"""

from jes.tasks import arc_c, extract
from jes.tasks.task import Example, Prompt, Reward, Task

SYSTEM = (
    "You are a science question answering expert. Think step by step and finish your "
    'answer with "The answer is (X)" where X is the correct letter choice.'
)
HEADER = (
    "The following are multiple choice science questions. Think step by step and then "
    'finish your answer with "The answer is (X)" where X is the correct letter choice.'
)


def load(root: str = "", seed: int = 0) -> Task:
    """The task; evaluated on `test` (1172 rows), with `train` at hand (1119)."""
    del seed
    return Task(
        name="arc_c_cot",
        train=arc_c.examples("train", root),
        test=arc_c.examples("test", root),
        prompt=prompt,
        reward=reward,
        max_new_tokens=1024,
    )


def prompt(example: Example) -> Prompt:
    """Chat messages: the question and its lettered choices."""
    options = zip(arc_c.LETTERS, example["options"], strict=False)
    lines = [f"{letter}. {text}" for letter, text in options]
    question = [f"Question: {example['question']}", "Options:", *lines, "Answer:"]
    return [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": "\n".join([HEADER, "", "", *question])},
    ]


def reward(example: Example, text: str) -> Reward:
    """1 if the extracted letter is right; see `extract.letter` for the rule."""
    return extract.graded(extract.letter(text, arc_c.LETTERS[-1]), example["answer"])
