"""One decoder for Qwen2/2.5, Qwen3 and Llama-3.x, in Flax Linen.

Two layouts of the same parameters are understood:

- stacked (the canonical one: files, noise, updates): `params['layers']` holds every
  layer's arrays on a leading axis, and the layers run under `nn.scan`;
- unrolled (`model.unrolled().apply({'params': model.unrolled_params(params)}, ...)`):
  one subtree a layer. Decoding uses it: a scan would copy each layer's weights out of
  the stack for every token.

Axis letters: B batch, T tokens, D hidden, K key-value heads, H head dimension, S cache
slots, V vocabulary.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jes.core.stack import STACK, layer_name, unstacked
from jes.models.attention import Place, attend
from jes.models.cache import Cache, write
from jes.models.config import ModelConfig, RopeScaling
from jes.models.member_layers import embed, matmul, parameter, unembed
from jes.models.quantized import Quantized


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
        shared = None if prefix is None else prefix.positions
        given = (own, seen, shared), rope_angles(positions, cfg), slot

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
        )(self.config, name=STACK)
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
            x, pair = Layer(self.config, name=layer_name(i))(x, own, shared, given)
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

        return unstacked(
            params, lambda stack, i: jax.tree.map(partial(pick, i=i), stack)
        )


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
    def __call__(self, x, cache, prefix, places, angles, slot):
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
        own, seen, shared = places
        prefix = prefix and (*prefix, shared)
        given = q * dim**-0.5, keys, values, own, seen, prefix
        out = attend(*given, causal=cache is None)
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
