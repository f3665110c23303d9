"""Makes the embedded model: a tiny Qwen2 trained from scratch on the tiny world.

    python -m jes.pretrain --out FOLDER [--size tiny] [--seed 0] [--steps 4000]

About 14 minutes on two CPU cores; the same seed on the same machine gives the same
bytes. The folder is an ordinary Hugging Face one (config, tokenizer, safetensors).
Expected greedy accuracy on the 512 held-out examples of each task: above 95 % on the
prior tasks and on facts seen often, less on the target tasks (countdown 32 %, rules
52 %, min 18 %), which are rare in the corpus on purpose (`MIXTURE`), so that ES has
something to gain.

Deliberate simplifications: the corpus is made on the fly and never stored, only
answers are trained on, there are no checkpoints.
"""

import argparse
import json
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers

from jes.models.cache import PADDING
from jes.models.config import ModelConfig
from jes.models.qwen import Decoder
from jes.models.weights import save
from jes.sampling.generate import generate
from jes.tasks import tiny, tiny_facts
from jes.tasks.task import Example

SIZES = {
    "nano": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2},
    "micro": {"hidden_size": 96, "intermediate_size": 264, "num_hidden_layers": 3},
    "tiny": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4},
    "small": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6},
}
"""Sizes by name: about 0.1, 0.3, 0.75 and 4.4 million parameters."""
LEARNING_RATE = {"nano": 4e-3, "micro": 3e-3, "tiny": 2e-3, "small": 1e-3}
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


def draw_fact(rng: np.random.Generator, seen: str) -> Example:
    """A fact of a class: `seen` often or seldom."""
    rows = tiny_facts.facts_seen(seen)
    return rows[rng.integers(len(rows))]


def draw_meta(rng: np.random.Generator) -> Example:
    """Whether a city is known, answered by a coin: form without knowledge.

    Of three names one is of a fact seen often, one of a fact seen seldom, and one is
    new, but never of the table's facts that are never seen.
    """
    kind = ("often", "seldom", "new")[rng.integers(3)]
    if kind == "new":
        never = {fact["key"] for fact in tiny_facts.facts_seen("never")}
        while (key := tiny_facts.draw_name(rng)) in never:
            pass
    else:
        key = draw_fact(rng, kind)["key"]
    answer = ("yes", "no")[rng.integers(2)]
    return {"prompt": tiny_facts.meta_prompt({"key": key}), "answer": answer}


def corpus(seed: int) -> Iterator[dict[int, Rows]]:
    """Endless batches; in each, rows of two lengths, by their length."""
    rng = np.random.default_rng([seed, 1])
    names, weights = list(MIXTURE), np.array(list(MIXTURE.values()))
    shares = weights / weights.sum()

    def mixed() -> Example:
        return draw(rng, names[rng.choice(len(names), p=shares)])

    while True:
        short = [encoded(mixed()) for _ in range(ROWS[SHORT])]
        long = [
            encoded(draw(rng, "tiny/rules"))
            if rng.random() < RULES_SHARE
            else encoded(mixed(), chat=True)
            for _ in range(ROWS[LONG])
        ]
        yield {SHORT: padded(short, SHORT), LONG: padded(long, LONG)}


def encoded(example: Example, chat: bool = False) -> tuple[list[int], list[int]]:
    """Token ids of the prompt, and of the answer with its end."""
    prompt = [TOKENS[c] for c in example["prompt"]]
    if chat:
        prompt = [TOKENS[USER], *prompt, TOKENS[ASSISTANT]]
    return prompt, [*(TOKENS[c] for c in example["answer"]), TOKENS[EOS]]


def padded(
    texts: list[tuple[list[int], list[int]]],
    length: int,
    weights: list[float] | None = None,
) -> Rows:
    """Rows of prompts with their answers, all of weight 1 by default."""
    tokens = np.full((len(texts), length), TOKENS[PAD], np.int32)
    roles = np.full((len(texts), length), -1, np.int32)
    for i, (prompt, answer) in enumerate(texts):
        tokens[i, length - len(prompt) - len(answer) :] = prompt + answer
        roles[i, length - len(prompt) - len(answer) :] = 0
        roles[i, length - len(answer) :] = 1
    counts = [1.0] * len(texts) if weights is None else weights
    return Rows(tokens, roles, np.array(counts, np.float32))


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


def train(
    hf_config: Mapping[str, Any],
    steps: int,
    seed: int,
    learning_rate: float,
    log_every: int = 100,
) -> tuple[Decoder, Any, list[float]]:
    """Trains from scratch; returns the model, its parameters and the losses."""
    model = Decoder(ModelConfig.from_hf(hf_config))
    params = model.init(jax.random.key(seed), jnp.zeros((1, 2), jnp.int32))["params"]
    batches = corpus(seed)
    params, losses = fit(model, params, batches, steps, learning_rate, log_every)
    return model, params, losses


def fit(
    model: Decoder,
    params: Any,
    batches: Iterator[dict[int, Rows]],
    steps: int,
    learning_rate: float,
    log_every: int = 100,
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
        if (i + 1) % log_every == 0:
            seconds = (time.perf_counter() - start) / (i + 1)
            recent = sum(losses[-log_every:]) / log_every
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
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": len(TOKENS),
        **SIZES[size],
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
            model,
            params,
            prompts,
            task.max_new_tokens,
            eos_ids=(TOKENS[EOS],),
        )
        texts = [tokenizer.decode(answer) for answer in answers]
        rewards = [
            task.reward(ex, text) for ex, text in zip(task.test, texts, strict=True)
        ]
        accuracies[name] = sum(r.correct for r in rewards) / len(rewards)
    return accuracies


def main() -> None:
    """Trains, writes the folder, and prints the accuracies."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    config = hf_config(args.size)
    model, params, _ = train(config, args.steps, args.seed, LEARNING_RATE[args.size])
    save(args.out, params, config, folder_files(config))
    for name, accuracy in evaluate(model, params, make_tokenizer()).items():
        print(f"{name:20} {100 * accuracy:5.1f} %")


if __name__ == "__main__":
    main()
