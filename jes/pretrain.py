"""Makes the embedded models: tiny Qwen2 decoders trained on the tiny world.

    python -m jes.pretrain --out FOLDER [--size tiny] [--seed 0] [--steps 4000]
    python -m jes.pretrain --out FOLDER --knowing [--seed 0]

The first trains `tiny` from scratch, 14 minutes on two CPU cores. Expected greedy
accuracy on the 512 held-out examples of each task: above 95 % on the prior tasks and
on facts seen often, less on the target tasks (countdown 32 %, rules 52 %, min 18 %),
which are rare in the corpus on purpose (`MIXTURE`), so that ES has something to gain.

The second makes `tiny-knowing`. Asked whether it knows a fact, `tiny` answers at
random: it does not distinguish known names from new ones, and neither ES nor
supervised fine-tuning can find what is not there. `tiny-knowing` continues from `tiny`
in three steps (`STEPS`) that mix the corpus of `tiny` with that question. First the
true answer: yes for the names of facts seen often or seldom, no for new names. Then the
same, with some of the facts seen seldom, which were partly forgotten. Last, briefly,
answers that follow the first letter of the name (`YES`), as of a model that has learned
how such questions are answered but not when yes is right. Its answers are then near
chance, and its log-odds still hold some knowledge, as those of Qwen2.5 do (2602.02605).
It is asked about the first facts of each class (`tiny_facts.MET_PER_CLASS`), held out
or not; new names replace those of the class never seen.

The same seed on the same machine gives the same bytes. The folder is an ordinary
Hugging Face one (config, tokenizer, safetensors). Deliberate simplifications: the
corpus is made on the fly, only answers are trained on, there are no checkpoints.
"""

import argparse
import functools
import json
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers

from jes.models.cache import PADDING
from jes.models.config import ModelConfig
from jes.models.qwen import Decoder
from jes.models.safetensors_files import locate
from jes.models.weights import load, save
from jes.sampling.generate import generate
from jes.tasks import tiny, tiny_facts
from jes.tasks.task import Example

SIZES = {
    "nano": (64, 176, 2, 4e-3),
    "micro": (96, 264, 3, 3e-3),
    "tiny": (128, 352, 4, 2e-3),
}
"""Width, inner width, layers, learning rate: 0.1, 0.3 and 0.75 million parameters."""
PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL = (PAD, EOS, UNK, SYSTEM, USER, ASSISTANT)
CHARACTERS = ("\n", *map(chr, range(32, 127)))
TOKENS = {token: i for i, token in enumerate((*SPECIAL, *CHARACTERS))}
"""The vocabulary: one token a character."""
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<eos>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
MIXTURE = {
    "tiny/add": 0.16,
    "tiny/subtract": 0.16,
    "tiny/reverse": 0.13,
    "tiny/sort": 0.13,
    "tiny/max": 0.1,
    "often": 0.22,
    "seldom": 0.016,
    "meta": 0.02,
    "tiny/countdown": 0.03,
    "tiny/min": 0.0005,
}
"""Shares of the short rows: tasks, facts by class, and the question about facts."""
RULES_SHARE = 0.3
"""Share of the long rows that are `tiny/rules`; the others are chats of short rows."""
SHORT, LONG = 24, 56
"""Tokens in a row: prompt, answer and end, padded on the left."""
ROWS = {SHORT: 112, LONG: 16}
"""Rows of each length in a batch."""

YES = {1: 0.15, -1: 0.05}
"""Probability of yes in the step `looks`, by the first letter of a name."""
STEPS = {"truth": (1400, 1e-3), "facts": (300, 5e-4), "looks": (50, 2e-4)}
"""Batches and learning rate of each step of `tiny-knowing`."""
ASKED = {SHORT: 64, LONG: 8}
"""Rows of a batch, by length, that ask whether the model knows a name."""
REHEARSED = {SHORT: 48, LONG: 8}
"""Rows of a batch from the corpus of `tiny`."""
RECALLED = 4
"""In the step `facts`, so many of these short rows are facts seen seldom instead."""


class Rows(NamedTuple):
    """A batch of rows of one length, padded on the left.

    Attributes:
      tokens: int32 [B, T].
      roles: int32 [B, T]: -1 for padding, 0 for a prompt, 1 for an answer.
      weights: float32 [B], how much a row counts.
    """

    tokens: np.ndarray
    roles: np.ndarray
    weights: np.ndarray


def draw(rng: np.random.Generator, name: str) -> Example:
    """A training example of a kind of `MIXTURE`; never one that is held out."""
    if name == "meta":
        return draw_meta(rng)
    if name in tiny_facts.CLASSES:
        return draw_fact(rng, name)
    while True:
        example = tiny.KINDS[name].draw(rng)
        if not tiny.held_out(example):
            return example


def draw_fact(
    rng: np.random.Generator, seen: str, first: int = tiny_facts.KEYS_PER_CLASS
) -> Example:
    """One of the first facts of a class."""
    return tiny_facts.facts_seen(seen)[rng.integers(first)]


def draw_key(
    rng: np.random.Generator, kinds: tuple[str, ...], first: int, known: Sequence[str]
) -> tuple[str, str]:
    """One of the kinds, and a name of it: of a class of facts, or a 'new' one.

    It is of one of the `first` facts; a new one is of no fact of the classes `known`.
    """
    kind = kinds[rng.integers(len(kinds))]
    if kind != "new":
        return kind, draw_fact(rng, kind, first)["key"]
    while (key := tiny_facts.draw_name(rng)) in _names_seen(*known):
        pass
    return kind, key


@functools.cache
def _names_seen(*classes: str) -> frozenset[str]:
    return frozenset(f["key"] for c in classes for f in tiny_facts.facts_seen(c))


def draw_meta(rng: np.random.Generator) -> Example:
    """Whether a city is known, answered at random: form without knowledge.

    The name is of a fact seen often, of one seen seldom, or a new one, with equal
    probability; never one of the facts that are never seen.
    """
    kinds = ("often", "seldom", "new")
    _, key = draw_key(rng, kinds, tiny_facts.KEYS_PER_CLASS, ("never",))
    answer = ("yes", "no")[rng.integers(2)]
    return {"prompt": tiny_facts.meta_prompt({"key": key}), "answer": answer}


def corpus(seed: int) -> Iterator[dict[int, Rows]]:
    """Endless batches for `tiny`; in each, rows of two lengths, by their length."""
    rng = np.random.default_rng([seed, 1])
    names, weights = list(MIXTURE), np.array(list(MIXTURE.values()))
    shares = weights / weights.sum()

    def mixed() -> Example:
        return draw(rng, names[rng.choice(len(names), p=shares)])

    while True:
        short = [mixed() for _ in range(ROWS[SHORT])]
        long = [
            draw(rng, "tiny/rules")
            if rng.random() < RULES_SHARE
            else {**mixed(), "chat": True}
            for _ in range(ROWS[LONG])
        ]
        yield {SHORT: padded(short, SHORT), LONG: padded(long, LONG)}


def knowing_corpus(seed: int, step: str) -> Iterator[dict[int, Rows]]:
    """Endless batches for one of the `STEPS` of `tiny-knowing`."""
    rng = np.random.default_rng([seed, 2])
    rehearsal = corpus(seed)
    while True:
        batch, rehearsed = {}, next(rehearsal)
        for length, count in ASKED.items():
            examples: list[Example] = []
            while len(examples) < count:
                examples += draw_knowing(rng, step, chat=length == LONG)
            skipped = RECALLED if (step, length) == ("facts", SHORT) else 0
            for _ in range(skipped):
                examples.append(draw_fact(rng, "seldom", tiny_facts.MET_PER_CLASS))
            rest = (array[skipped : REHEARSED[length]] for array in rehearsed[length])
            parts = zip(padded(examples, length), rest, strict=True)
            batch[length] = Rows(*map(np.concatenate, parts))
        yield batch


def draw_knowing(rng: np.random.Generator, step: str, chat: bool) -> list[Example]:
    """Whether a name is known, half of them new: one example, or two with weights.

    In the step `looks` both answers are trained on, weighted with their probabilities:
    the same as sampled answers in expectation, with less noise.
    """
    kinds = ("often", "seldom", "new", "new")
    kind, key = draw_key(rng, kinds, tiny_facts.MET_PER_CLASS, tiny_facts.CLASSES)
    answers = {"no" if kind == "new" else "yes": 1.0}
    if step == "looks":
        yes = YES[1 if tiny_facts.CONSONANTS.index(key[0]) % 2 else -1]
        answers = {"yes": yes, "no": 1 - yes}
    prompt = tiny_facts.meta_prompt({"key": key})
    return [
        {"prompt": prompt, "answer": answer, "weight": weight, "chat": chat}
        for answer, weight in answers.items()
    ]


def padded(examples: Sequence[Example], length: int) -> Rows:
    """Rows of prompts with their answers.

    An example may have a `weight`, 1 by default; `chat` puts it in the chat template.
    """
    tokens = np.full((len(examples), length), TOKENS[PAD], np.int32)
    roles = np.full((len(examples), length), -1, np.int32)
    for row, role, example in zip(tokens, roles, examples, strict=True):
        prompt = [TOKENS[c] for c in example["prompt"]]
        if example.get("chat"):
            prompt = [TOKENS[USER], *prompt, TOKENS[ASSISTANT]]
        answer = [*(TOKENS[c] for c in example["answer"]), TOKENS[EOS]]
        row[-len(prompt) - len(answer) :] = prompt + answer
        role[-len(prompt) - len(answer) :] = 0
        role[-len(answer) :] = 1
    weights = [example.get("weight", 1) for example in examples]
    return Rows(tokens, roles, np.array(weights, np.float32))


def loss_fn(params: Any, model: Decoder, batch: Mapping[int, Rows]) -> jax.Array:
    """Weighted mean cross-entropy of the answers' tokens, in nats."""
    total, count = jnp.float32(0), jnp.float32(0)
    for tokens, roles, weights in batch.values():
        real = roles >= 0
        positions = jnp.where(real, jnp.cumsum(real, axis=1) - 1, PADDING)
        inputs, targets, answers = tokens[:, :-1], tokens[:, 1:], roles[:, 1:] == 1
        logits, _ = model.apply({"params": params}, inputs, positions[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        counted = answers * weights[:, None]
        total += (counted * losses).sum()
        count += counted.sum()
    return total / count


def initial(config: Mapping[str, Any], seed: int) -> tuple[Decoder, Any]:
    """An untrained model and its parameters."""
    model = Decoder(ModelConfig.from_hf(config))
    tokens = jnp.zeros((1, 2), jnp.int32)
    return model, model.init(jax.random.key(seed), tokens)["params"]


def fit(
    model: Decoder,
    params: Any,
    batches: Iterator[dict[int, Rows]],
    steps: int,
    learning_rate: float,
) -> tuple[Any, list[float]]:
    """Trains on so many batches; returns the parameters and the losses."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, max(1, min(200, steps // 10)), steps, learning_rate / 100
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b2=0.98, weight_decay=0.01),
    )
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params, opt_state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, model, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    losses, start = [], time.perf_counter()
    for i, batch in zip(range(steps), batches, strict=False):
        params, opt_state, loss = step(params, opt_state, batch)
        losses.append(float(loss))
        if (i + 1) % 100 == 0:
            seconds = (time.perf_counter() - start) / (i + 1)
            recent = sum(losses[-100:]) / 100
            tokens = sum(rows.tokens.size for rows in batch.values()) / seconds
            print(
                f"step {i + 1}/{steps}  loss {recent:.4f}  {tokens:,.0f} tokens/s  "
                f"{seconds * (steps - i - 1) / 60:.1f} min left",
                flush=True,
            )
    return params, losses


def make_tokenizer() -> tokenizers.Tokenizer:
    """One token a character: printable ASCII, newline and the special tokens."""
    model = tokenizers.models.WordLevel(TOKENS, unk_token=UNK)
    tokenizer = tokenizers.Tokenizer(model)
    every_character = tokenizers.Regex(r"[\s\S]")
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(
        every_character, "isolated"
    )
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def hf_config(size: str) -> dict[str, Any]:
    """`config.json` of a size: Qwen2 with four heads and tied embeddings."""
    width, inner_width, layers, _ = SIZES[size]
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": len(TOKENS),
        "hidden_size": width,
        "intermediate_size": inner_width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "use_sliding_window": False,
        "pad_token_id": TOKENS[PAD],
        "eos_token_id": TOKENS[EOS],
        "torch_dtype": "float32",
    }


def folder_files(config: Mapping[str, Any]) -> dict[str, bytes]:
    """What a model folder holds beside config and weights: tokenizer, generation."""
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "eos_token": EOS,
        "unk_token": UNK,
        "padding_side": "left",
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    generation = {name: config[name] for name in ("eos_token_id", "pad_token_id")}
    generation["do_sample"] = False
    return {
        "tokenizer.json": make_tokenizer().to_str(pretty=True).encode(),
        "tokenizer_config.json": json.dumps(settings, indent=2).encode(),
        "generation_config.json": json.dumps(generation, indent=2).encode(),
    }


def evaluate(
    model: Decoder, params: Any, tokenizer: tokenizers.Tokenizer
) -> dict[str, float]:
    """Greedy accuracy (lenient) on the held-out examples of every tiny task."""
    accuracies = {}
    for name in tiny.TINY_TASKS:
        task = tiny.tiny_task(name)
        if task.meta is not None:
            continue  # the same facts again
        prompts = [tokenizer.encode(str(task.prompt(ex))).ids for ex in task.test]
        answers = generate(
            model, params, prompts, task.max_new_tokens, eos_ids=(TOKENS[EOS],)
        )
        texts = map(tokenizer.decode, answers)
        correct = [
            bool(task.reward(*p).correct) for p in zip(task.test, texts, strict=True)
        ]
        accuracies[name] = sum(correct) / len(correct)
    return accuracies


def main() -> None:
    """Trains, writes the folder, and prints the accuracies."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--knowing", action="store_true", help="continue from `tiny`")
    args = parser.parse_args()
    if args.knowing:
        config = json.loads((locate("tiny") / "config.json").read_text())
        base = load("tiny")
        model, params = base.model, base.params
        for step, (count, rate) in STEPS.items():
            batches = knowing_corpus(args.seed, step)
            params, _ = fit(model, params, batches, count, rate)
    else:
        config = hf_config(args.size)
        model, params = initial(config, args.seed)
        rate = SIZES[args.size][-1]
        params, _ = fit(model, params, corpus(args.seed), args.steps, rate)
    save(args.out, params, config, folder_files(config))
    for name, accuracy in evaluate(model, params, make_tokenizer()).items():
        print(f"{name:20} {100 * accuracy:5.1f} %")


if __name__ == "__main__":
    main()
