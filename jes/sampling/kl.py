"""KL(base || tuned) on the base model's own answers, the estimator of 2605.30148.

The answers are sampled once, from the base model at temperature 1; tuned models are
then compared with it on them. Axis letters: B answers, K tokens of the longest.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jes.core.placement import on_device
from jes.core.population import chunks
from jes.core.tree import with_dtype
from jes.sampling.generate import generate
from jes.sampling.prompts import BUCKETS, pad


class Answers(NamedTuple):
    """Sampled answers as token ids, each with its end token if it came to one."""

    prompts: list[list[int]]
    answers: list[list[int]]


class KL(NamedTuple):
    """KL(base || tuned) in nats a token.

    Attributes:
      sampled: mean over all tokens of log p_base - log p_tuned of the token that was
        sampled, the paper's estimator; a single one can be negative.
      by_prompt: the same, averaged within each answer first.
      full: mean over all tokens of the whole sum over the vocabulary; the same
        expectation with far less noise, so short answers will do.
      error: standard error of `full` over the answers.
      tokens: number of tokens.
    """

    sampled: float
    by_prompt: float
    full: float
    error: float
    tokens: int


def sample_answers(
    model: Any,
    params: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    **settings: Any,
) -> Answers:
    """Answers of the base model at temperature 1; settings as for `generate`."""
    settings = {"batch_size": 32, **settings, "temperature": 1.0, "keep_end": True}
    answers = generate(model, params, prompts, max_new_tokens, **settings)
    return Answers([list(prompt) for prompt in prompts], answers)


def divergence(
    model: Any,
    base: Any,
    params: Any,
    answers: Answers,
    *,
    batch_size: int = 8,
    buckets: Sequence[int] = BUCKETS,
    dtype: Any = jnp.float32,
) -> KL:
    """KL(base || tuned) on these answers; prompt tokens do not count.

    Args:
      model: a decoder.
      base, params: parameters of the base and of the tuned model.
      answers: of the base model, from `sample_answers`.
      batch_size: answers compared at once; each takes two arrays of logits, of the
        tokens of the longest answer times the vocabulary.
      buckets: lengths of prompt and answer to pad to; the longest of all is one too.
      dtype: of the weights that are compared; the log-softmax is in float32.
    """
    rows = [[*prompt, *answer] for prompt, answer in zip(*answers, strict=True)]
    lengths = np.array([len(answer) for answer in answers.answers])
    order = np.argsort([len(row) for row in rows], kind="stable")
    sums = np.zeros((len(rows), 2))
    size = min(batch_size, len(rows))
    for chosen in chunks(order, size):
        batch = pad([rows[i] for i in chosen], (*buckets, max(map(len, rows))))
        # One length for all batches of a bucket; the first token is never an answer's.
        longest = min(int(lengths.max()), batch.tokens.shape[1] - 1)
        counted = np.arange(longest) >= longest - lengths[chosen][:, None]
        given = base, params, batch[:2], counted
        sums[chosen] = _log_ratios(model, jnp.dtype(dtype), *given)
    tokens = int(lengths.sum())
    sampled, full = sums.sum(0) / tokens
    # Of a ratio of means, to first order.
    spread = np.std(sums[:, 1] - full * lengths, ddof=min(1, len(rows) - 1))
    error = spread * len(rows) ** 0.5 / tokens
    by_prompt = (sums[:, 0] / lengths).mean()
    return KL(float(sampled), float(by_prompt), float(full), float(error), tokens)


@partial(jax.jit, static_argnums=(0, 1))
def _log_ratios(model, dtype, base, params, text, counted):
    """Sums over an answer of the log ratio and of the full KL: float32 [B, 2]."""
    tokens, positions = text
    longest = counted.shape[1]
    targets = tokens[:, -longest:, None]

    def log_probabilities(weights: Any) -> jax.Array:
        weights = with_dtype(jax.tree.map(on_device, weights), dtype)
        logits, _ = model.apply(
            {"params": weights}, tokens, positions, last=longest + 1
        )
        return jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32), axis=-1)

    of_base, of_tuned = log_probabilities(base), log_probabilities(params)
    ratio = of_base - of_tuned
    sampled = jnp.take_along_axis(ratio, targets, axis=-1)[..., 0]
    full = (jnp.exp(of_base) * ratio).sum(-1)
    both = jnp.stack([sampled, full], axis=-1)
    return jnp.where(counted[..., None], both, 0).sum(1)
