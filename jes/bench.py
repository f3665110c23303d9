"""Measures speed as ratios of two things, interleaved in one run, on an idle machine.

    python -m jes.bench [--repeats=7] [--members=16] [--noise] [--out=FILE.json]

(a) A generation (ask and tell) over N times the answers of the unperturbed model.
(b) Generated tokens per second over the published way of 2509.24372: perturb the
    weights in place, `transformers.generate` on PyTorch, restore them. Needs PyTorch
    (`pip install jes[parity]`); left out with a note where that is not installed.

(c) Of quantised ES: drawing noise entry by entry over drawing it sparsely.
(d) Of quantised ES: an update by seed replay over 50 generations, over one with dense
    noise and a kept residual.
(e) Exact normal noise over noise from a table; with `--noise` nothing but that.
(f) Reading prompts in full, over with their common beginning computed once.
(g) Answers of long-tailed lengths by the plain loop, over in slots.

The rows of (a) and (b) answer the same prompts with the same weights and generate the
same number of tokens: none ends early. Medians, with the quartiles of the ratio over
the repeats. Beside the ratio of times on the clock stands that of processor time, which
other work on the machine disturbs less; it says nothing of accelerators.
"""

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from jes import bench_noise as laws
from jes import bench_rollouts as long_tail
from jes import bench_rounding as rounding
from jes.ask import Examiner, Question, ask, examine
from jes.core.noise import generation_key
from jes.errors import InputError
from jes.io import command_line, memory
from jes.io.metrics import write_json
from jes.io.progress import console
from jes.io.runs import versions
from jes.models.config import ModelConfig
from jes.models.qwen import Decoder
from jes.models.weights import Pretrained, load
from jes.sampling.generate import decode_members, unrolled_members
from jes.sampling.prompts import share
from jes.tasks.task import Reward, Task
from jes.tell import Evolution, first_state, tell


class Row(NamedTuple):
    """One comparison: medians in seconds, and quartiles of the ratio of the repeats.

    `processor` is the median ratio of processor time, of all threads together.
    """

    what: str
    goal: str
    numerator: float
    denominator: float
    ratio: float
    low: float
    high: float
    processor: float


class Case(NamedTuple):
    """A model and what it is asked: `rows` prompts of `prompt` tokens, `new` new."""

    name: str
    pretrained: Pretrained
    rows: int
    prompt: int
    new: int


def compare(
    what: str,
    goal: str,
    numerator: Callable[[], Any],
    denominator: Callable[[], Any],
    repeats: int,
    scale: float = 1.0,
) -> Row:
    """Times two functions in turn; the first call of each compiles and is left out.

    The ratio is numerator / (denominator x scale).
    """
    numerator(), denominator()
    times = np.array(
        [[timed(numerator), timed(denominator)] for _ in range(repeats)]
    ) * np.array([[1], [scale]])
    clock, processor = np.moveaxis(times[:, 0] / times[:, 1], 1, 0)
    low, ratio, high = np.percentile(clock, [25, 50, 75])
    first, second = np.median(times[..., 0], axis=0)
    measured = first, second, ratio, low, high, np.median(processor)
    return Row(what, goal, *map(float, measured))


def timed(function: Callable[[], Any]) -> tuple[float, float]:
    """Seconds that a call takes, with everything that it leaves on the device.

    On the clock, and of the processor.
    """
    began, busy = time.perf_counter(), time.process_time()
    jax.block_until_ready(function())
    return time.perf_counter() - began, time.process_time() - busy


def examination(case: Case) -> tuple[Examiner, list[Question]]:
    """Random prompts to a task whose rewards cost as little as a lookup."""
    task = Task(
        name="bench",
        train=(),
        test=(),
        prompt=lambda example: "",
        reward=lambda example, text: Reward(len(text) % 7, False, False, False),
        max_new_tokens=case.new,
    )
    examiner = Examiner(
        model=case.pretrained.model,
        tokenizer=case.pretrained.tokenizer,
        task=task,
        eos_ids=(),
        buckets=(case.prompt,),
    )
    rng = np.random.default_rng(0)
    vocabulary = case.pretrained.config.vocab_size
    prompts = rng.integers(0, vocabulary, (case.rows, case.prompt)).tolist()
    return examiner, [Question({}, prompt, []) for prompt in prompts]


def generation(
    case: Case, evolution: Evolution, *, update: bool = True, chunk: int = 0
) -> Callable[[], Any]:
    """A function that runs one generation, on a copy of the weights.

    Args:
      case: the model and what it is asked.
      evolution: settings.
      update: whether it is ask and tell, or `ask` alone.
      chunk: members held at once; 0 for what fits.
    """
    examiner, questions = examination(case)
    params = jax.tree.map(jnp.array, case.pretrained.params)
    state = first_state(evolution, params)
    chunk = chunk or fitting(case, evolution.population, examiner.dtype)
    key = generation_key(jax.random.key(0), 0)

    def run() -> Any:
        nonlocal params, state
        scores = ask(
            examiner,
            params,
            key,
            questions,
            noise=evolution.noise,
            population=evolution.population,
            chunk=chunk,
        )
        if not update:
            return scores.reward
        params, state = tell(evolution, params, state, key, scores.reward)
        return params

    return run


def fitting(case: Case, members: int, dtype: Any) -> int:
    """How many of the members to hold at once."""
    config, params = case.pretrained.config, case.pretrained.params
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    return memory.choose_chunk(
        config,
        memory.weight_bytes(config, parameters, dtype),
        dtype,
        case.rows,
        case.prompt,
        case.new,
        population=members,
        budget=memory.free_bytes(),
    )


def unperturbed(case: Case) -> Callable[[], Any]:
    """A function that answers the prompts with the weights as they are."""
    examiner, questions = examination(case)
    params = case.pretrained.params
    return lambda: examine(examiner, params, questions, batch_size=case.rows)


def published(case: Case) -> Callable[[], Any]:
    """One member by the published method: perturb in place, generate, restore."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        case.pretrained.save(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    _, questions = examination(case)
    prompts = torch.tensor([question.prompt for question in questions])
    mask = torch.ones_like(prompts)
    settings = GenerationConfig(
        max_new_tokens=case.new,
        min_new_tokens=case.new,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
    )
    model.generation_config = GenerationConfig()

    def shift(sigma: float) -> None:
        generator = torch.Generator()
        for weight in model.parameters():
            generator.manual_seed(7)
            noise = torch.randn(weight.shape, generator=generator)
            weight.data.add_(noise, alpha=sigma)

    @torch.inference_mode()
    def member() -> int:
        shift(1e-3)
        answers = model.generate(
            prompts, attention_mask=mask, generation_config=settings
        )
        shift(-1e-3)
        if answers.shape[1] != case.prompt + case.new:
            raise AssertionError(f"{answers.shape[1]} tokens, not all that were asked")
        return 0

    return member


def random_model(like: Pretrained, **shape: int) -> Pretrained:
    """A model with random weights of another shape, with the same tokenizer."""
    hf_config = {**like.hf_config, **shape}
    config = ModelConfig.from_hf(hf_config)
    model = Decoder(config)
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    return dataclasses.replace(
        like, model=model, params=params, config=config, hf_config=hf_config
    )


def rows(members: int, repeats: int) -> list[Row]:
    """All comparisons."""
    tiny = load("tiny")
    larger = random_model(
        tiny, hidden_size=256, num_hidden_layers=6, intermediate_size=704
    )
    small = Case("tiny model, 64 prompts x 24 + 5 tokens", tiny, 64, 24, 5)
    many = Case("tiny model, 256 prompts x 24 + 5 tokens", tiny, 256, 24, 5)
    middle = Case("4.5M model, 64 prompts x 64 + 32 tokens", larger, 64, 64, 32)
    evolution = Evolution(population=members, sigma=1e-3, alpha=0.0)
    out = []
    for case, goal in ((small, "<= 1.3"), (many, "<= 1.15")):
        out.append(
            compare(
                f"(a) generation / (N x inference): {case.name}",
                goal,
                generation(case, evolution),
                unperturbed(case),
                repeats,
                scale=members,
            )
        )
    out += rounding_rows(repeats) + noise_rows(repeats)
    out.append(prefix_row(tiny, repeats))
    out += rollout_rows({"tiny": tiny, "4.5M": larger}, repeats)
    if find_spec("torch") is None:
        console.print("(b) is left out: PyTorch is not installed")
        return out
    for case, goal in ((small, ">= 1.5"), (middle, ">= 1")):
        row = compare(
            f"(b) tokens/s, jes / PyTorch: {case.name}",
            goal,
            published(case),
            generation(case, evolution, update=False),
            repeats,
            scale=1 / members,
        )
        out.append(row)
    return out


def rounding_rows(repeats: int) -> list[Row]:
    """What sparse noise saves, of 50 members."""
    out = []
    for sigma, goal in rounding.SIGMAS.items():
        dense, sparse = 2, 100
        out.append(
            compare(
                f"(c) dense / sparse noise, sigma = {sigma}",
                goal,
                rounding.dense_estimate(sigma, dense),
                rounding.sparse_estimate(sigma, sparse),
                repeats,
                scale=dense / sparse,
            )
        )
    for sigma in (0.001, 0.01):
        out.append(
            compare(
                f"(d) seed-replay update / dense-noise update, sigma = {sigma}",
                "<= 0.5",
                rounding.replayed_update(sigma),
                rounding.dense_update(sigma),
                repeats,
            )
        )
    return out


def noise_rows(repeats: int) -> list[Row]:
    """What the table saves, over jax's normal numbers and over the fused ones."""
    return [
        compare(
            f"(e) {law} / table, {use}",
            goal,
            laws.used(use, law),
            laws.used(use, "table"),
            repeats,
        )
        for law, goal in (("jax.random.normal", ">= 1.8"), ("normal", ""))
        for use in laws.USES
    ]


def prefix_row(pretrained: Pretrained, repeats: int) -> Row:
    """What a shared prefix saves: 32 prompts of 600 tokens in common and 60 own."""
    rng = np.random.default_rng(0)
    vocabulary = pretrained.config.vocab_size
    common = rng.integers(0, vocabulary, 600).tolist()
    prompts = [common + rng.integers(0, vocabulary, 60).tolist() for _ in range(32)]
    return compare(
        "(f) prefill in full / shared: tiny model, 32 prompts x (600 + 60) tokens",
        ">= 5",
        reading(pretrained, prompts, parts=()),
        reading(pretrained, prompts),
        repeats,
    )


def rollout_rows(models: dict[str, Pretrained], repeats: int) -> list[Row]:
    """What slots save where a few answers are far longer than most."""
    return [
        compare(
            f"(g) plain loop / slots: {name} model, {long_tail.DESCRIPTION}",
            ">= 2",
            *long_tail.rollouts(model),
            repeats,
        )
        for name, model in models.items()
    ]


def reading(
    pretrained: Pretrained,
    prompts: Sequence[Sequence[int]],
    parts: Sequence[int] | None = None,
) -> Callable[[], Any]:
    """A function that reads prompts, up to their first new token."""
    model = pretrained.model
    weights = jax.tree.map(lambda leaf: leaf[None], pretrained.params)
    weights = unrolled_members(model, weights)
    prefix, rest = share(prompts, parts=parts)
    return lambda: decode_members(
        model.unrolled(),
        weights,
        rest,
        jax.random.split(jax.random.key(0), 1),
        max_new_tokens=1,
        eos_ids=(),
        prefix=prefix,
    )


def table(measured: list[Row]) -> Table:
    """The rows as a table, times in milliseconds."""
    columns = ("", "goal", "ratio", "quartiles", "processor")
    shown = Table(*columns, "numerator ms", "denominator ms")
    for row in measured:
        shown.add_row(
            row.what,
            row.goal,
            f"{row.ratio:.2f}",
            f"{row.low:.2f} - {row.high:.2f}",
            f"{row.processor:.2f}",
            f"{1e3 * row.numerator:.1f}",
            f"{1e3 * row.denominator:.1f}",
        )
    return shown


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--members", type=int, default=16)
    parser.add_argument(
        "--noise", action="store_true", help="only the rows of (e), in seconds"
    )
    parser.add_argument("--out", type=Path, help="JSON file to write too")
    args = parser.parse_args()

    def command() -> None:
        if args.repeats < 1 or args.members < 1:
            raise InputError("--repeats and --members must be at least 1")
        measured = (
            noise_rows(args.repeats) if args.noise else rows(args.members, args.repeats)
        )
        console.print(table(measured))
        if args.out:
            named = [row._asdict() for row in measured]
            write_json(args.out, {"rows": named, "versions": versions()})

    command_line.guarded(command)


if __name__ == "__main__":
    main()
