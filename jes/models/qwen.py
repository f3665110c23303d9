"""One decoder for Qwen2/2.5, Qwen3 and Llama-3.x, in Flax Linen.

Two layouts of the same parameters are understood:

- stacked (the canonical one: files, noise, updates): `params['layers']` holds every
  layer's arrays on a leading axis, and the layers run under `nn.scan`;
- unrolled (`model.unrolled().apply({'params': model.unrolled_params(params)}, ...)`):
  one subtree a layer. Decoding uses it: a scan would copy each layer's weights out of
  the stack for every token.

Axis letters: B batch, T tokens, D hidden, F feed-forward, N query heads, K key-value
heads, G query heads per key-value head, H head dimension, S cache slots, V vocabulary.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jes.models.cache import PADDING, Cache, write
from jes.models.config import ModelConfig, RopeScaling
from jes.models.member_layers import embed, matmul, parameter, unembed
from jes.models.quantized import Quantized

MASKED = -1e30
"""Score of a masked slot: finite, so that a row of padding gives no NaN."""


class Place(NamedTuple):
    """Where tokens stand, int [B, T]: segment and trunk are None for one text a row."""

    position: jax.Array
    segment: jax.Array | None = None
    trunk: jax.Array | None = None


def sees(queries: Place, keys: Place) -> jax.Array:
    """Which keys a query attends to, bool [B, T, S]: of its text, not after itself."""
    position = keys.position[:, None, :]
    visible = (position <= queries.position[:, :, None]) & (position != PADDING)
    if queries.segment is None or queries.trunk is None or keys.segment is None:
        return visible
    segment = keys.segment[:, None, :]
    own, trunk = queries.segment[:, :, None], queries.trunk[:, :, None]
    return visible & ((segment == own) | (segment == trunk))


class Decoder(nn.Module):
    """Decoder-only transformer: grouped-query attention, rotary positions, SwiGLU."""

    config: ModelConfig
    scan_layers: bool = True

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        cache: Cache | None = None,
        *,
        last: int | None = None,
        at: jax.Array | None = None,
        prefix: Cache | None = None,
        segments: tuple[jax.Array, jax.Array] | tuple[()] = (),
    ) -> tuple[jax.Array, Cache]:
        """Logits of the next token at every position, and the cache.

        Args:
          tokens: int [B, T].
          positions: int [B, T], -1 for padding; by default 0..T-1, or what
            follows `cache.length`.
          cache: keys and values of earlier tokens, with room for T more. Without
            it the T tokens see each other only, and the returned cache holds them.
          last: how many of the last tokens to give logits for; None for all.
          at: int [B, Q], which tokens to give logits for instead.
          prefix: a cache of batch 1 with tokens that come before those of every row.
            Positions count from its first token on. It is read only.
          segments: where rows hold several texts, the segment of each token, and that
            which it branches from, int [B, T]: it sees these two. Not with a `cache`.

        Returns:
          float32 logits [B, T, `last` or Q, V], and the new `Cache`.
        """
        chex.assert_rank(tokens, 2)
        cfg = self.config
        length = tokens.shape[1]
        if positions is None:
            start = 0 if cache is None else cache.length
            start += 0 if prefix is None else prefix.positions.max() + 1
            positions = jnp.broadcast_to(start + jnp.arange(length), tokens.shape)
        chex.assert_equal_shape([tokens, positions])
        slot, own = jnp.int32(0), Place(positions, *segments)
        seen = own
        if cache is not None:
            slot = cache.length
            seen = Place(write(cache.positions, positions, slot, 1))
        visible = sees(own, seen)
        if prefix is not None:
            shape = (*visible.shape[:2], prefix.positions.shape[1])
            shared = sees(own, Place(prefix.positions))
            visible = jnp.concatenate([jnp.broadcast_to(shared, shape), visible], 2)
        given = visible, rope_angles(positions, cfg), slot

        table, noise = Embedding(cfg.vocab_size, cfg.hidden_size, name="embed")()
        x = embed(table, noise, tokens)
        run = self._scanned if self.scan_layers else self._unrolled
        x, keys, values = run(x, cache and cache[:2], prefix and prefix[:2], given)
        if at is not None:
            x = jnp.take_along_axis(x, at[..., None], axis=1)
        elif last is not None:
            x = x[:, -last:]
        x = RMSNorm(cfg.rms_norm_eps, name="final_norm")(x)
        head = table
        if not cfg.tie_word_embeddings:
            shape = (cfg.hidden_size, cfg.vocab_size)
            head = self.param("lm_head", nn.initializers.normal(0.02), shape)
            noise = self.get_variable("noise", "lm_head")
        logits = unembed(x, head, noise, tied=cfg.tie_word_embeddings)
        return logits, Cache(keys, values, seen.position, slot + length)

    def _scanned(self, x, cache, prefix, given):
        """Layers on a leading axis: one compiled layer, whatever their number."""
        layers = nn.scan(
            Layer,
            variable_axes={"params": 0, "noise": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, nn.broadcast),
            out_axes=0,
            length=self.config.num_hidden_layers,
        )(self.config, name="layers")
        cache, prefix = (
            part and tuple(map(jnp.stack, part)) for part in (cache, prefix)
        )
        x, (keys, values) = layers(x, cache, prefix, given)
        return x, tuple(keys), tuple(values)

    def _unrolled(self, x, cache, prefix, given):
        pairs = []
        for i in range(self.config.num_hidden_layers):
            own, shared = (
                part and (part[0][i], part[1][i]) for part in (cache, prefix)
            )
            x, pair = Layer(self.config, name=f"layers_{i}")(x, own, shared, given)
            pairs.append(pair)
        return x, *zip(*pairs, strict=True)

    def unrolled(self) -> "Decoder":
        """The same model over `unrolled_params`."""
        return self.clone(scan_layers=False)

    @staticmethod
    def unrolled_params(
        params: Mapping[str, Any], first: jax.Array | None = None
    ) -> dict[str, Any]:
        """Stacked parameters as one subtree a layer (`layers_0`, `layers_1`, ...).

        `first` is a traced 0, to slice layers by a number that XLA does not know.
        """

        def pick(leaf: jax.Array, i: int) -> jax.Array:
            if first is None:
                return leaf[i]
            return jax.lax.dynamic_index_in_dim(leaf, first + i, keepdims=False)

        params = dict(params)
        stacked = params.pop("layers")
        (count,) = {leaf.shape[0] for leaf in jax.tree.leaves(stacked)}
        for i in range(count):
            params[f"layers_{i}"] = jax.tree.map(partial(pick, i=i), stacked)
        return params


class Embedding(nn.Module):
    """A vector [D] for each token, and its noise: used at both ends."""

    tokens: int
    features: int

    @nn.compact
    def __call__(self):
        init = nn.initializers.normal(0.02)
        table = self.param("embedding", init, (self.tokens, self.features))
        return table, self.get_variable("noise", "embedding")


class Layer(nn.Module):
    """Attention and feed-forward, both behind a norm, added to the residual stream."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x, cache, prefix, given):
        eps = self.config.rms_norm_eps
        normed = RMSNorm(eps, name="attention_norm")(x)
        attend = Attention(self.config, name="attention")
        attended, cache = attend(normed, cache, prefix, *given)
        x = x + attended
        normed = RMSNorm(eps, name="mlp_norm")(x)
        return x + FeedForward(self.config, name="mlp")(normed), cache


class Attention(nn.Module):
    """Grouped-query attention over the cache, or over the tokens at hand."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x, cache, prefix, visible, angles, slot):
        cfg = self.config
        batch, length, _ = x.shape
        heads, kv_heads = cfg.num_attention_heads, cfg.num_key_value_heads
        dim = cfg.head_dim

        def project(name: str, count: int) -> jax.Array:
            out = Dense(count * dim, cfg.qkv_bias, name=name)(x)
            return out.reshape(batch, length, count, dim)

        q, k, v = project("q", heads), project("k", kv_heads), project("v", kv_heads)
        if cfg.qk_norm:
            q = RMSNorm(cfg.rms_norm_eps, name="q_norm")(q)
            k = RMSNorm(cfg.rms_norm_eps, name="k_norm")(k)
        q = rotate(q, angles).reshape(batch, length, kv_heads, heads // kv_heads, dim)
        keys = rotate(k, angles).transpose(0, 2, 3, 1)  # [B, K, H, T]
        values = v.transpose(0, 2, 1, 3)  # [B, K, T, H]
        if cache is not None:
            keys = write(cache[0], keys, slot, 3)
            values = write(cache[1], values, slot, 2)
        out = attend(q * dim**-0.5, keys, values, visible, prefix)
        out = out.reshape(batch, length, heads * dim).astype(x.dtype)
        return Dense(cfg.hidden_size, name="o")(out), (keys, values)


class FeedForward(nn.Module):
    """SwiGLU."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x):
        width = self.config.intermediate_size
        gate, up = (Dense(width, name=name)(x) for name in ("gate", "up"))
        return Dense(self.config.hidden_size, name="down")(nn.silu(gate) * up)


class Dense(nn.Module):
    """x @ kernel + bias, with kernel [in, out] in the dtype of the parameters.

    The kernel may be `Quantized`. Here and in every module with weights, the collection
    'noise' says how a member's differ: see `jes.models.member_layers`.
    """

    features: int
    use_bias: bool = False

    @nn.compact
    def __call__(self, x):
        kernel: Any = self.get_variable("params", "kernel")
        if not isinstance(kernel, Quantized):
            init = nn.initializers.normal(0.02)
            kernel = self.param("kernel", init, (x.shape[-1], self.features))
        y = matmul(x, kernel, self.get_variable("noise", "kernel"))
        if self.use_bias:
            zeros = nn.initializers.zeros_init()
            bias = parameter(self, "bias", zeros, (self.features,))
            y += on_last_axis(bias, y.ndim)
        return y


class RMSNorm(nn.Module):
    """Root-mean-square norm, in float32 whatever the dtype of the residual stream."""

    eps: float

    @nn.compact
    def __call__(self, x):
        ones = nn.initializers.ones_init()
        scale = parameter(self, "scale", ones, (x.shape[-1],))
        y = x.astype(jnp.float32)
        y *= jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return y.astype(x.dtype) * on_last_axis(scale, y.ndim)


def on_last_axis(vector: jax.Array, ndim: int) -> jax.Array:
    """`vector` as the last of `ndim` axes: jes never promotes ranks implicitly."""
    return jax.lax.expand_dims(vector, range(ndim - 1))


def attend(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    visible: jax.Array,
    prefix: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """Softmax attention with scaled queries; scores and weights in float32.

    Args:
      q: [B, T, K, G, H], already scaled.
      keys: [B, K, H, S].
      values: [B, K, S, H].
      visible: bool [B, T, S], with a prefix [B, T, P + S].
      prefix: keys [1, K, H, P] and values [1, K, P, H] before those of every row.

    Returns:
      float32 [B, T, K, G, H].
    """
    if prefix is None:
        return _attend(q, keys, values, visible)[0]
    # All queries attend to the prefix as one long row: it is read once. A softmax over
    # both parts is the mean of theirs, weighted by their sums.
    batch, length = q.shape[:2]
    slots = prefix[0].shape[-1]
    before = visible[..., :slots].reshape(1, batch * length, slots)
    shared, shared_sum = _attend_products(
        q.reshape(1, batch * length, *q.shape[2:]), *prefix, before
    )
    own, own_sum = _attend(q, keys, values, visible[..., slots:])
    part = jax.nn.sigmoid(shared_sum.reshape(own_sum.shape) - own_sum)[..., None]
    return part * shared.reshape(own.shape) + (1 - part) * own


def _attend(q, keys, values, visible):
    """Attention [B, T, K, G, H] and the logsumexp of its scores [B, T, K, G]."""
    if q.shape[1] == 1:
        # CPUs run matrix-vector products faster as one fused multiply-and-sum.
        return jax.lax.platform_dependent(
            q, keys, values, visible, cpu=_attend_fused, default=_attend_products
        )
    return _attend_products(q, keys, values, visible)


def _attend_products(q, keys, values, visible):
    f32 = jnp.float32
    scores = jnp.einsum("btkgh,bkhs->bkgts", q, keys, preferred_element_type=f32)
    weights, log_sum = _softmax(scores, visible[:, None, None])
    weights = weights.astype(values.dtype)
    equation = "bkgts,bksh->btkgh"
    out = jnp.einsum(equation, weights, values, preferred_element_type=f32)
    return out, log_sum.transpose(0, 3, 1, 2)


def _attend_fused(q, keys, values, visible):
    q, keys, values = (a.astype(jnp.float32) for a in (q[:, 0], keys, values))
    scores = (q[..., None] * keys[:, :, None]).sum(-2)  # [B, K, G, S]
    weights, log_sum = _softmax(scores, visible[:, :, None])
    out = (weights[..., None] * values[:, :, None]).sum(-2)
    return out[:, None], log_sum[:, None]


def _softmax(scores: jax.Array, visible: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Softmax weights, and the logsumexp of the scores."""
    scores = jnp.where(visible, scores, MASKED)
    # Written as softmax computes it, so that the compiler merges the two.
    largest = scores.max(-1, keepdims=True)
    total = jnp.exp(scores - largest).sum(-1, keepdims=True)
    return jax.nn.softmax(scores, axis=-1), (largest + jnp.log(total))[..., 0]


def rope_angles(positions: jax.Array, config: ModelConfig) -> jax.Array:
    """Rotation angles in radians, float32 [B, T, H/2]."""
    half = config.head_dim // 2
    frequencies = config.rope_theta ** -(np.arange(half) / half)
    if config.rope_scaling is not None:
        frequencies = scaled_frequencies(frequencies, config.rope_scaling)
    angles = on_last_axis(jnp.asarray(frequencies, jnp.float32), positions.ndim + 1)
    return positions[..., None].astype(jnp.float32) * angles


def scaled_frequencies(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Llama 3.1: long wavelengths stretched by `factor`, short kept, smooth between."""
    turns = scaling.original_max_position_embeddings * frequencies / (2 * np.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Rotary position embedding of [B, T, heads, H] in the half-split convention."""
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
