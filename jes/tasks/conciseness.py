"""Conciseness (2509.24372, section 3.2): answers as long as the shortest right one.

The reward is minus the difference of lengths, in characters of the completion alone.
The reward ignores what is said. `correct` does not (the answer and nothing else, in
any case, with or without a full stop); `formatted` means that the lengths are equal.
"""

from jes.tasks.task import Example, Prompt, Reward, Task

TRAIN = {
    "Solve: 3 + 5 =": "8",
    "If all birds can fly and penguins are birds, can penguins fly?": "No",
}
TEST = {
    "What is the capital of France?": "Paris",
    "Calculate: 12 x 7 =": "84",
    'Is the statement "All cats are mammals" true or false?': "True",
    "What comes next in the sequence: 2, 4, 6, 8, ?": "10",
    'Translate "Hello" to Spanish:': "Hola",
    "What is 15% of 200?": "30",
    "Name one primary color:": "Red",
    "How many days are in a week?": "7",
}
READ = 256
"""A longer answer is never `correct`; it is not read."""


def load(root: str = "") -> Task:
    """The task: two prompts to train on and eight held out, as in the paper."""
    del root
    train, test = (
        [{"question": q, "answer": a} for q, a in pairs.items()]
        for pairs in (TRAIN, TEST)
    )
    return Task("conciseness", train, test, prompt, reward, max_new_tokens=100)


def prompt(example: Example) -> Prompt:
    """Chat messages: the question, from the user alone."""
    return [{"role": "user", "content": example["question"]}]


def reward(example: Example, text: str) -> Reward:
    """Minus the difference between the lengths of the text and of the answer."""
    answer = example["answer"]
    difference = abs(len(text) - len(answer))
    said = text.strip().removesuffix(".").lower() if len(text) <= READ else ""
    correct, equal = said == answer.lower(), difference == 0
    return Reward(-float(difference), correct, correct and equal, formatted=equal)
