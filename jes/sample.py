"""What a model answers: text in, text out.

    python -m jes.sample --model=tiny --prompt="12+7="
    python -m jes.sample --model=FOLDER --prompts=FILE --out=answers.jsonl
    python -m jes.sample --model=runs/mine                  # held-out rows of its task
    python -m jes.sample --model=FOLDER --chat              # a conversation

A file of prompts has one in each line; of jsonl, a column `prompt` with text or chat
messages. Text becomes a chat message where the model has a chat template.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from jes.api import answer
from jes.core.ledger import append_row
from jes.errors import InputError
from jes.evaluate import is_run, load_model, settings_of
from jes.experiment import make_evaluation, task_for
from jes.io.command_line import at_least, guarded
from jes.io.console import console
from jes.models.weights import Pretrained
from jes.questions import prepare
from jes.rollout import examine
from jes.run_folder import answer_row, prompt_text
from jes.sampling.generate import generate
from jes.sampling.prompts import encode
from jes.scoring import decoded
from jes.tasks import Prompt, Task
from jes.tasks.rows import read_data

SLICE = 16
"""Tokens of a conversation that are shown at a time."""


def stream(
    pretrained: Pretrained,
    messages: Prompt,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[str]:
    """An answer as it grows: the text so far, every `SLICE` tokens."""
    prompt, said = encode(pretrained.tokenizer, messages), list[int]()
    while len(said) < max_new_tokens:
        (new,) = generate(
            pretrained.model,
            pretrained.params,
            [prompt + said],
            min(SLICE, max_new_tokens - len(said)),
            temperature=temperature,
            key=jax.random.fold_in(jax.random.key(seed), len(said)),
            eos_ids=pretrained.eos_ids,
            keep_end=True,
        )
        ended = not new or new[-1] in pretrained.eos_ids
        said += new[:-1] if new and ended else new
        yield decoded(pretrained.tokenizer, [said])[0]
        if ended:
            return


def chat(pretrained: Pretrained, system: str, new: int, temperature: float) -> None:
    """A conversation in the terminal, until an empty line or the end of the input.

    Raises:
      InputError: if the model has no chat template.
    """
    if pretrained.tokenizer is None or not pretrained.tokenizer.chat_template:
        raise InputError("this model has no chat template to converse with: --prompt")
    messages = [{"role": "system", "content": system}] if system else []
    while True:
        try:
            said = input("you: ").strip()
        except EOFError:
            said = ""
        if not said:
            return
        messages.append({"role": "user", "content": said})
        text = ""
        print("model: ", end="", flush=True)
        for longer in stream(pretrained, messages, new, temperature, len(messages)):
            print(longer[len(text) :], end="", flush=True)
            text = longer
        print()
        messages.append({"role": "assistant", "content": text})


def prompts_in(path: str) -> list[Prompt]:
    """The prompts in a file.

    Raises:
      InputError: if it cannot be read, or a row has no prompt.
    """
    if not path.endswith(".jsonl"):
        try:
            lines = Path(path).expanduser().read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--prompts: {error}") from None
        return [line for line in lines if line.strip()]
    rows = read_data(path)
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str | list):
            raise InputError(f"{path}: row {number} has no column 'prompt'")
    return [row["prompt"] for row in rows]


def answers_to(
    pretrained: Pretrained, task: Task, count: int, dtype: str
) -> list[dict[str, Any]]:
    """Answers to held-out rows of a task, with their rewards."""
    evaluation = make_evaluation(pretrained, task, dtype=dtype)
    questions = prepare(evaluation, task.test[:count])
    found: dict[int, dict[str, Any]] = {}

    def note(number: int, text: str, reward: Any) -> None:
        found[number] = answer_row(task, task.test[number], text, reward)

    examine(evaluation, pretrained.params, questions, listen=note, shown=count)
    return [found[number] for number in sorted(found)]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="tiny", help="folder, hub id, 'tiny', or run")
    add("--prompt", help="text to answer")
    add("--prompts", help="a file of prompts")
    add("--task", help="a task by name; by default that of the run")
    add("--chat", action="store_true", help="a conversation in the terminal")
    add("--system", default="", help="system message")
    add("--count", type=at_least(1), default=8, help="rows of the task")
    add("--max-new-tokens", type=at_least(1), default=256)
    add("--temperature", type=float, default=0.0)
    add("--seed", type=at_least(0), default=0, help="of the sampling")
    add("--out", type=Path, help="jsonl file to write to")
    args = parser.parse_args()

    def command() -> None:
        if sum(map(bool, (args.prompt, args.prompts, args.task, args.chat))) > 1:
            raise InputError("give one of --prompt, --prompts, --task and --chat")
        given = args.prompt or args.prompts or args.task or args.chat
        if not given and not is_run(args.model):
            raise InputError(
                "say what to answer: --prompt, --prompts, --task or --chat"
            )
        prompts = prompts_in(args.prompts) if args.prompts else [args.prompt or ""]
        pretrained, dtype = load_model(args.model)
        if args.chat:
            chat(pretrained, args.system, args.max_new_tokens, args.temperature)
            return
        if args.prompt or args.prompts:
            options = {"temperature": args.temperature, "system": args.system}
            options["key"] = jax.random.key(args.seed)
            said = answer(pretrained, prompts, args.max_new_tokens, **options)
            pairs = zip(prompts, said, strict=True)
            rows = [{"prompt": prompt_text(p), "answer": text} for p, text in pairs]
        else:
            settings = settings_of(args.model)
            data = {"seed": settings.seed} | vars(settings.data)
            name = args.task or settings.task
            task = task_for(pretrained, name, settings.asking, **data)
            rows = answers_to(pretrained, task, args.count, dtype)
        for row in rows:
            if len(rows) > 1 or "reward" in row:
                console.print(f"> {row['prompt']}", markup=False, style="dim")
            console.print(row["answer"], markup=False)
            if "reward" in row:
                right = "" if row["right"] is None else f", right: {row['right']}"
                console.print(f"  reward {row['reward']:g}{right}", markup=False)
            if args.out:
                append_row(args.out, row)

    guarded(command)


if __name__ == "__main__":
    main()
