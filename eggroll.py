"""EGGROLL in one file: evolution strategies with low-rank noise, in JAX.

Evolution strategies (ES) train without backpropagation: perturb the parameters with noise, score
every perturbed copy, step towards the perturbations that scored well. EGGROLL [1] makes the noise
of a weight matrix W (m, n) a product of two thin matrices, so that scoring thousands of members
costs little more than inference, while the update, a sum of many products, can have full rank:

    noise      E = A Bᵀ/√r                         A (m, r), B (n, r): iid, symmetric, variance 1
    forward    x (W + σE) = xW + σ (xA) Bᵀ/√r      no perturbed matrix is ever formed
    update     W ← W + α g,  g = 1/(Nσ) Σᵢ fᵢ Eᵢ   nearly the gradient of the mean of f(W + σE)

The fitness f may be any JAX function, differentiable or not. The N members are pairs W ± σE:

    import jax, jax.numpy as jnp
    from eggroll import Eggroll

    es, key = Eggroll(sigma=0.1), jax.random.key(0)
    params = {"W": jnp.zeros((8, 4)), "b": jnp.zeros(4)}  # of a linear model
    data = jax.random.normal(key, (512, 8))  # an example for each of 512 pairs, so N = 1024

    def fitness(params, x):  # of one member on one example; higher is better
        return -jnp.sum((x @ params["W"] + params["b"] - x[:4]) ** 2)

    @jax.jit
    def train_step(params, key):
        return es.step(fitness, params, key, data, lr=0.05)

    for t in range(300):
        params, scores = train_step(params, jax.random.fold_in(key, t))
    print(scores.mean())  # -4 at first, now about -0.4

[1] Sarkar et al., Evolution Strategies at the Hyperscale, 2026, arXiv:2511.16652v2.
[2] Zhou et al., Minimal Gated Unit for Recurrent Neural Networks, 2016, arXiv:1603.09420.
"""

# To use the method in a project of your own, copy from here …
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

# isort: split
# Not for the method, only for integers and the command line:
import argparse
import os
import pydoc_data.topics
import sys
import time
from pathlib import Path

import numpy as np

# Noise: iid entries, symmetric about zero, of unit variance (Sec. 4.1 of [1]) --------------------


def normal(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """Standard normal entries, the paper's choice (kurtosis 3)."""
    # Drawn in float32: in bfloat16 jax.random.normal has but 128 values, of mean -0.01.
    return jax.random.normal(key, shape, jnp.float32).astype(dtype)


def uniform(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """Entries uniform on (-√3, √3) (kurtosis 9/5)."""
    return jax.random.uniform(key, shape, jnp.float32, -math.sqrt(3), math.sqrt(3)).astype(dtype)


def signs(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """Entries -1 and 1 (kurtosis 1), one random bit each: by far the fastest to draw."""
    size = math.prod(shape)
    words = jax.random.bits(key, (-(-size // 32), 1), jnp.uint32)  # (⌈size/32⌉, 1)
    bits = words & (1 << jnp.arange(32, dtype=jnp.uint32)[None])  # (⌈size/32⌉, 32), one a column
    return jnp.where(bits.ravel()[:size].reshape(shape) > 0, 1, -1).astype(dtype)


# Forward: x (W + σE) without forming W + σE (Sec. 4.2 of [1]) ------------------------------------


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class LowRank:
    """Stands for the matrix M = W + A Bᵀ, of W (m, n), A (m, r) and B (n, r), without forming it.

    A model may write x @ M, M @ x, M.T, and M[i] for rows, as of an embedding: integers i of any
    shape, to (*i.shape, n). All else is an error and needs the array `dense(M)`. But jax.tree.map
    acts on W, A and B: that is right for a cast, and for nothing else, so give it dense(params).

    Leading axes, common to W, A and B, make a stack of matrices. Take it apart by scan, by M[i], or
    by vmap over its first axis. Stack the layers of a deep network: 128 in a list take 20 times as
    long to compile.
    """

    W: jax.Array
    A: jax.Array
    B: jax.Array

    shape = property(lambda self: self.W.shape)
    ndim = property(lambda self: self.W.ndim)
    dtype = property(lambda self: self.W.dtype)
    __array_ufunc__ = __iter__ = None  # NumPy leaves array @ M to __rmatmul__; rows are M[i]

    def _refuse(self, *_, **__):
        raise TypeError("LowRank only multiplies and gives rows; all else needs dense(M)")

    __array__ = __bool__ = __eq__ = _refuse  # which Python and NumPy would make up

    def __rmatmul__(self, x):
        if jnp.ndim(x) == 1 and self.ndim > 2:
            return (x[None] @ self)[..., 0, :]  # (..., n)
        return x @ self.W + (x @ self.A) @ self._Bt  # (..., n)

    def __matmul__(self, x):
        if jnp.ndim(x) == 1 and self.ndim > 2:
            return (self @ x[:, None])[..., 0]  # (..., m)
        return self.W @ x + self.A @ (self._Bt @ x)  # (m,) or (m, k)

    def __getitem__(self, i):
        if i is ...:  # so Flax NNX reads a weight
            return self
        if not jnp.issubdtype(getattr(i, "dtype", type(i)), jnp.integer):
            raise TypeError(f"M[i] takes integers, got {i!r}; dense(M)[i] takes anything")
        if self.ndim > 2:
            return LowRank(self.W[i], self.A[i], self.B[i])
        return self.W[i] + self.A[i] @ self._Bt  # (*i.shape, n)

    @property
    def T(self):
        if self.ndim > 2:
            raise TypeError(f"a stack {self.shape} has no .T; its matrices have, and dense(M)")
        return LowRank(self.W.T, self.B, self.A)

    @property
    def _Bt(self):  # (..., r, n)
        if jnp.issubdtype(self.dtype, jnp.integer):
            raise TypeError("integers wrap: write product(x, M) for x @ M, rows(M, i) for M[i]")
        return self.B.mT


def dense(tree: Any) -> Any:
    """`tree` with the array W + A Bᵀ in place of every LowRank."""
    return jax.tree.map(
        lambda x: x.W + x.A @ x._Bt if isinstance(x, LowRank) else x,
        tree,
        is_leaf=lambda x: isinstance(x, LowRank),
    )


# Update: score the population, estimate the gradient, ascend (Eq. 6, Algorithm 1 of [1]) ---------


def standardize(fitness: jax.Array) -> jax.Array:
    """Fitness shifted and scaled to zero mean and unit variance over the population, in float32.

    NaN and infinities count as the worst finite score. If nothing can be told apart, all is zero.
    """
    f = jnp.asarray(fitness, jnp.float32)
    finite = jnp.isfinite(f)
    f = jnp.where(finite, f, 0)
    f = jnp.ldexp(f, -jnp.frexp(jnp.max(jnp.abs(f)))[1])  # below 1 by powers of 2: no overflow
    f = jnp.where(finite, f - jnp.min(f, where=finite, initial=1), 0)  # all were below 1
    f = f - jnp.mean(f)
    return f / jnp.maximum(jnp.sqrt(jnp.mean(f**2)), jnp.finfo(f.dtype).tiny)


def weighted_sum(w: jax.Array, e: Any, dtype) -> jax.Array:
    """Σₚ wₚ Eₚ of w (P,) and arrays e (P, ...), or of factors ((P, ..., m, r), (P, ..., n, r))."""
    if not isinstance(e, tuple):
        return jnp.tensordot(w, e, axes=1, preferred_element_type=dtype)
    A, B = e
    wA = jax.vmap(jnp.multiply)(w, A)  # (P, ..., m, r)
    return jnp.einsum("p...mr,p...nr->...mn", wA, B, preferred_element_type=dtype)


@partial(
    jax.tree_util.register_dataclass, data_fields=["sigma"], meta_fields=["rank", "draw", "chunk"]
)
@dataclass(frozen=True)
class Eggroll:
    """Evolution strategies with low-rank noise and antithetic pairs.

    sigma    noise scale σ > 0, in units of the parameters; may be traced: to follow a schedule, make
             the Eggroll inside of the jitted function, or pass it in
    rank     rank r ≥ 1 of the noise; None for full rank: ordinary ES, the baseline
    draw     entries of the noise: signs, normal, uniform or your own (key, shape, dtype) -> array
    chunk    pairs to evaluate at a time, to bound memory, a divisor of all; None for all at once

    params   θ, a pytree of floating-point arrays: two axes are a matrix, more a stack of them, fewer
             a vector, whose noise is dense. (Biases stacked for a scan are a matrix, too: `dense`
             them first.) Keep float32: bfloat16 loses small steps. Cast members in the fitness.
    key      a new one for every population. Noise is a function of key, pair and leaf alone, so
             `gradient` draws again what `evaluate` drew. (With impl="rbg", for an equal `chunk`.)
    fitness  (params, example) -> scalar, higher is better; for `gradient`, the scores (pairs, 2)
    data     a pytree of arrays with a first axis of N/2 pairs: both members of pair i see data[i].
             With nothing to see, jnp.arange(pairs). For many devices, shard this axis over a mesh
             in automatic mode, axis_types=(AxisType.Auto,).

    Raises ValueError, or TypeError for a leaf of params, if one of these is not as it says here.
    """

    sigma: float
    rank: int | None = 1
    draw: Callable = signs
    chunk: int | None = None

    _kind, _noise = jnp.floating, None  # dtypes: of params, and of noise if it is another one

    def __post_init__(self):
        try:
            if not 0 < float(self.sigma) < math.inf:
                raise ValueError(f"sigma must be positive and finite, got {self.sigma}")
        except TypeError:
            pass  # traced: it has no value to check
        for name, value in (("rank", self.rank), ("chunk", self.chunk)):
            if value is not None and not (isinstance(value, int | jnp.integer) and value >= 1):
                raise ValueError(f"{name} must be None or an integer of at least 1, got {value!r}")

    def noise(self, key: jax.Array, params: Any) -> Any:
        """E of one pair: of a matrix (m, n) the factors (A/√r (m, r), B (n, r)), else an array."""
        leaves, treedef = jax.tree.flatten_with_path(params)
        noise = []
        for i, (path, p) in enumerate(leaves):
            if not (hasattr(p, "dtype") and jnp.issubdtype(p.dtype, self._kind)):
                where, got = jax.tree_util.keystr(path), getattr(p, "dtype", repr(p))
                what = f"params{where} must be an array of {self._kind.__name__}, got {got}"
                raise TypeError(f"{what}; close over what is not to be trained")
            leaf_key, dtype = jax.random.fold_in(key, i), self._noise or jnp.result_type(p)
            if self.rank is None or p.ndim < 2:
                noise.append(self.draw(leaf_key, p.shape, dtype))
            else:
                *stack, m, n = p.shape
                AB = self.draw(leaf_key, (*stack, m + n, self.rank), dtype)
                A, B = AB[..., :m, :], AB[..., m:, :]  # (..., m, r), (..., n, r)
                noise.append((A * jnp.asarray(1 / math.sqrt(self.rank), dtype), B))
        return treedef.unflatten(noise)

    def perturb(self, params: Any, noise: Any, sign: float = 1.0) -> Any:
        """The member θ + sign·σ·E, with a LowRank wherever E is given by its factors."""

        def leaf(p, e):
            scale = jnp.asarray(sign * self.sigma, jnp.result_type(p))
            return LowRank(p, scale * e[0], e[1]) if isinstance(e, tuple) else p + scale * e

        return jax.tree.map(leaf, params, noise)

    def _chunks(self, data):
        """The numbers j of the chunks, and a function of j: (numbers of its pairs, their data)."""
        data = jax.tree.map(jnp.asarray, data)
        sizes = {x.shape[:1] for x in jax.tree.leaves(data)}
        if len(sizes) != 1 or sizes & {(), (0,)}:
            shapes = jax.tree.map(jnp.shape, data)
            raise ValueError(f"arrays of data must share a first axis, pairs ≥ 1, got {shapes}")
        ((pairs,),) = sizes
        if pairs % (chunk := self.chunk or pairs):
            raise ValueError(f"chunk must divide the pairs, got chunk={chunk} and {pairs} pairs")
        if any(jax.typeof(x).sharding.mesh.explicit_axes for x in jax.tree.leaves(data)):
            raise ValueError("data must be on a mesh made with axis_types=(AxisType.Auto,)")
        # A chunk is a column: every (pairs/chunk)-th pair, so of each of many devices an equal
        # share. To slice it out takes no copy of the data.
        size = chunk, pairs // chunk
        columns = jax.tree.map(lambda x: x.reshape(size + x.shape[1:]), (jnp.arange(pairs), data))
        return jnp.arange(size[1]), lambda j: jax.tree.map(lambda x: x[:, j], columns)

    def evaluate(self, fitness: Callable, params: Any, key: jax.Array, data: Any) -> jax.Array:
        """Fitness of every member, (pairs, 2): of θ + σE and of θ - σE."""

        def member(sign, pair):
            i, example = pair
            noise = self.noise(jax.random.fold_in(key, i), params)
            score = fitness(self.perturb(params, noise, sign), example)
            if (shape := jax.tree.map(jnp.shape, score)) != ():
                raise ValueError(f"fitness must return a scalar, got shape {shape}")
            return score

        # vmap batches only what differs between members: W does not, so x @ W is one product for
        # all, and noise does not differ by sign, so a pair shares one draw.
        members = jax.vmap(jax.vmap(member, (None, 0)), (0, None), out_axes=1)  # (chunk, 2)
        both, (chunks, at) = jnp.array([1, -1], jnp.int8), self._chunks(data)
        scores = jax.lax.map(lambda j: members(both, at(j)), chunks)  # (chunks, chunk, 2)
        return scores.swapaxes(0, 1).reshape(-1, 2)

    def _weights(self, f):  # of the pairs in the gradient, (pairs,); the second member has -E
        f = f.astype(jnp.promote_types(f.dtype, jnp.float32))
        return (f[:, 0] - f[:, 1]) / (f.size * self.sigma)

    def gradient(self, params: Any, key: jax.Array, fitness: jax.Array) -> Any:
        """1/(Nσ) Σᵢ fᵢ Eᵢ over all members, like params: an estimate of ∇J, J(θ) = E[f(θ + σE)].

        Its mean is ∇J if E is normal and of full rank. At rank r a matrix has an error of O(1/r): with
        normal and uniform for any bounded f, with signs if f is a superposition of waves. A vector's
        does not depend on r, and is zero with normal (theory/3-convergence.md).
        """
        f = jnp.asarray(fitness)
        if f.ndim != 2 or f.shape[1] != 2 or not len(f):
            raise ValueError(f"fitness must have shape (pairs, 2), pairs ≥ 1, got {f.shape}")

        def add(g, j):
            i, w = at(j)
            noise = jax.vmap(lambda i: self.noise(jax.random.fold_in(key, i), params))(i)
            return jax.tree.map(lambda g, e: g + weighted_sum(w, e, g.dtype), g, noise), None

        # A scan over one chunk is no loop: in one jit with `evaluate`, XLA sees that both draw the
        # same noise, and draws it once. The sum is in float32, at least.
        w = self._weights(f)
        chunks, at = self._chunks(w)
        g = jax.tree.map(
            lambda p: jnp.zeros(p.shape, jnp.promote_types(jnp.result_type(p), w.dtype)), params
        )
        g, _ = jax.lax.scan(add, g, chunks)
        return jax.tree.map(lambda p, g: g.astype(jnp.result_type(p)), params, g)

    def step(self, fitness: Callable, params: Any, key: jax.Array, data: Any, lr: float) -> Any:
        """One generation, θ ← θ + lr·g with g from standardised fitness: (new params, fitness).

        Call it inside of jit: outside, every call compiles anew. Noise moves an entry by about
        lr/(σ√N), or less if scores differ by their examples more than by the noise; so half as many
        members need a lr lower by √2. For Adam and the like, call the three parts yourself.
        """
        scores = self.evaluate(fitness, params, key, data)
        g = self.gradient(params, key, standardize(scores))
        return jax.tree.map(lambda p, g: (p + lr * g).astype(jnp.result_type(p)), params, g), scores


# … and copy up to here: this is the whole method -------------------------------------------------

# Models: plain functions of plain pytrees, written for arrays and for LowRank alike ---------------


def mlp_init(key: jax.Array, sizes: tuple[int, ...]) -> list[dict[str, jax.Array]]:
    """A layer {W (m, n), b (n,)} for every two consecutive sizes m, n."""
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        {"W": normal(k, (m, n)) / math.sqrt(m), "b": jnp.zeros(n)}
        for k, m, n in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def mlp(params: list[dict[str, jax.Array]], x: jax.Array) -> jax.Array:
    """Multilayer perceptron, tanh between its layers: x (..., sizes[0]) to (..., sizes[-1])."""
    *hidden, last = params
    for layer in hidden:
        x = jnp.tanh(x @ layer["W"] + layer["b"])  # (..., n)
    return x @ last["W"] + last["b"]


def rnn_init(key: jax.Array, vocab: int, hidden: int) -> dict[str, jax.Array]:
    """Parameters for `rnn`: `vocab` different tokens and `hidden` units of memory."""
    key_emb, key_W, key_U = jax.random.split(key, 3)
    return {
        "emb": normal(key_emb, (vocab, hidden)),
        "W": normal(key_W, (hidden, 2 * hidden)) / math.sqrt(hidden),
        "U": normal(key_U, (hidden, 2 * hidden)) / math.sqrt(hidden),
        "b": jnp.zeros(2 * hidden),
        "head": jnp.zeros((hidden, vocab)),
    }


def rnn(params: dict[str, Any], h: jax.Array, token: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Read a token: (memory h (hidden,), token ()) to (new h, logits (vocab,) of the next token).

    A minimal gated unit [2]: a GRU whose update and reset gate are one, z. With
    [x₁ x₂] = emb[token] W + b and [u₁ u₂] = h U,

        z = sigmoid(x₁ + u₁)    h ← h + z (tanh(x₂ + z u₂) - h)    logits = h head
    """
    x1, x2 = jnp.split(params["emb"][token] @ params["W"] + params["b"], 2)  # (hidden,) each
    u1, u2 = jnp.split(h @ params["U"], 2)  # (hidden,) each
    z = jax.nn.sigmoid(x1 + u1)
    h = h + z * (jnp.tanh(x2 + z * u2) - h)
    return h, h @ params["head"]


def log2_softmax(logits: jax.Array, token: jax.Array) -> jax.Array:
    """log₂ p(token) of logits (vocab,), in bits: ()."""
    return (logits[token] - jax.nn.logsumexp(logits)) / math.log(2)


def bits(params: Any, text: jax.Array, cell=rnn, log2_p=log2_softmax) -> jax.Array:
    """Σ log₂ p(next token) over text (length + 1,), read from an empty memory."""

    def read(h, tokens):
        token, next_token = tokens
        h, logits = cell(params, h, token)
        return h, log2_p(logits, next_token)

    h = jnp.zeros(params["U"].shape[0], params["U"].dtype)
    return jnp.sum(jax.lax.scan(read, h, (text[:-1], text[1:]))[1])


def sample(params: Any, key: jax.Array, token, length: int, cell=rnn, unit=1.0) -> jax.Array:
    """Let the model write `length` tokens after the given one, p ~ exp(unit · logit)."""

    def write(carry, key):
        h, logits = cell(params, *carry)
        token = jax.random.categorical(key, unit * logits).astype(jnp.int32)
        return (h, token), token

    h = jnp.zeros(params["U"].shape[0], params["U"].dtype)
    return jax.lax.scan(write, (h, jnp.int32(token)), jax.random.split(key, length))[1]


# Integers: the same method and network without a float (Sec. 6.1, App. G and H of [1]) ------------

# Fixed point: an int8 i, from -127 to 127, stands for i/16. A parameter is an int32 in units of 2⁻¹⁶
# of that: the network sees its upper half, rounded; the lower half keeps votes too few to move it.


def weights(params: Any) -> Any:
    """What the network sees of int32 params: matrices in int8, vectors in int32."""
    upper = jax.tree.map(lambda p: (p + 2**15) >> 16, params)
    return jax.tree.map(lambda w: w.astype(jnp.int8) if w.ndim > 1 else w, upper)


@jax.tree_util.register_static
@dataclass(frozen=True)
class IntEggroll(Eggroll):
    """`Eggroll` without a float: noise, members, fitness, update and params are integers.

    sigma   noise scale, an integer of 1 to 127 sixteenths: 2 stands for σ = 1/8
    params  int32, from -127 · 2¹⁶ to 127 · 2¹⁶; members have what `weights` makes of them
    lr      an integer, what a vote adds to a parameter; above 2³⁰/pairs it counts as that

    The noise has rank 1 and signs for entries, so a member W ± σ a bᵀ is a matrix of integers. Models
    write product(x, M) for x @ M and rows(M, i) for M[i].

    Raises as Eggroll does, and TypeError if lr or the fitness is not an integer.
    """

    sigma: int = 2

    _kind, _noise = jnp.int32, jnp.int8

    def __post_init__(self):
        super().__post_init__()
        if not (isinstance(self.sigma, int | jnp.integer) and self.sigma <= 127):
            raise ValueError(f"sigma must be an integer of 1 to 127 sixteenths, got {self.sigma!r}")
        if (self.rank, self.draw) != (1, signs):
            draw = getattr(self.draw, "__name__", self.draw)
            raise ValueError(f"integers need rank=1 and draw=signs, got {self.rank} and {draw}")

    def perturb(self, params, noise, sign=1):
        """The member θ + sign·σ·E."""
        return super().perturb(weights(params), noise, sign)

    def evaluate(self, fitness, params, key, data):
        """Fitness of every member, as of Eggroll."""
        scores = super().evaluate(fitness, params, key, data)
        if not jnp.issubdtype(scores.dtype, jnp.integer):
            raise TypeError(f"fitness must be an integer, by product(x, M), got {scores.dtype}")
        return scores

    def _weights(self, f):  # votes for E or against it, so `gradient` counts them, in int32
        return jnp.int8(f[:, 0] > f[:, 1]) - jnp.int8(f[:, 0] < f[:, 1])  # f₊ - f₋ may overflow

    def step(self, fitness, params, key, data, lr):
        """One generation, θ ← θ + lr·votes, clipped, with Σ sign(f₊ - f₋) E over the pairs as votes.

        A weight that does not matter gets votes of mean 0 and variance of at most the number of pairs.
        """
        if not jnp.issubdtype(jnp.result_type(lr), jnp.integer):
            raise TypeError(f"lr must be an integer, got {lr}")
        scores, end = self.evaluate(fitness, params, key, data), 127 << 16
        votes, lr = self.gradient(params, key, scores), jnp.minimum(lr, 2**30 // len(scores))
        return jax.tree.map(lambda p, v: jnp.clip(p + lr * v, -end, end), params, votes), scores


def saturate(x: jax.Array) -> jax.Array:
    """x (int32), clipped to -127 … 127, as int8."""
    return jnp.clip(x, -127, 127).astype(jnp.int8)


def product(x: jax.Array, M: jax.Array | LowRank) -> jax.Array:
    """x M/√m in fixed point, rounded down: x (..., m) and M (m, n) in int8, to (..., n) in int32."""
    if not x.dtype == M.dtype == jnp.int8:
        raise TypeError(f"product(x, M) takes int8, got {x.dtype} and {M.dtype}")
    if x.shape[-1] > 1024:
        raise ValueError(f"product takes 1024 inputs at most, or int32 overflows, got {x.shape}")
    dot = partial(jnp.matmul, preferred_element_type=jnp.int32)
    if isinstance(M, LowRank):
        y = dot(x, M.W) + dot(x, M.A) @ M.B.mT.astype(jnp.int32)
    else:
        y = dot(x, M)
    return (y * round(2**11 / math.sqrt(x.shape[-1]))) >> 15  # 2¹¹ of the factor, and 2⁴ = 16


def rows(M: jax.Array | LowRank, i: jax.Array) -> jax.Array:
    """M[i] in int8: of M (m, n), to (*i.shape, n)."""
    return saturate(M.W[i] + jnp.int32(M.A[i] @ M.B.mT)) if isinstance(M, LowRank) else M[i]


def exp2(x: jax.Array) -> jax.Array:
    """2^(x/16) of int8 x, in uint32 and units of 2⁻¹⁶, within 0.31 %; 256 of them can be added."""
    q, u = jnp.int32(x) >> 4, jnp.int32(x) & 15  # x/16 = q + u/16
    power = 256 + ((u * (174 + 5 * u)) >> 4)  # 2^(u/16) in units of 2⁻⁸, by a polynomial
    return jnp.uint32(power << (q + 8))


LOG2 = np.round(256 * np.log2(1 + (np.arange(256) + 0.5) / 256)).astype(np.int32)  # (256,)


def log2(x: jax.Array) -> jax.Array:
    """log₂ of positive uint32 x, in int32 and units of 2⁻⁸, within 0.005."""
    zeros = jax.lax.clz(x)
    fraction = ((x << zeros) >> 23) & 255  # 8 bits after the leading one
    return (jnp.int32(31 - zeros) << 8) + jnp.asarray(LOG2)[fraction]


def int_log2_softmax(logits: jax.Array, token: jax.Array) -> jax.Array:
    """log₂ p(token), p ~ 2^(logit/16), in int32 and units of 2⁻⁸, of logits (vocab ≤ 256,): ()."""
    return (jnp.int32(logits[token]) << 4) - log2(jnp.sum(exp2(logits))) + (16 << 8)


def int_rnn_init(key: jax.Array, vocab: int, hidden: int) -> dict[str, jax.Array]:
    """Parameters for `int_rnn`, int32: those of `rnn` without the 1/√m, by which `product` divides."""
    params = rnn_init(key, vocab, hidden)
    params |= {name: params[name] * math.sqrt(hidden) for name in ("W", "U")}
    return jax.tree.map(lambda p: jnp.int32(saturate(jnp.round(16 * p))) << 16, params)


def int_rnn(params: dict[str, Any], h: jax.Array, token: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`rnn` in integers: (memory h (hidden,), token ()) to (new h, logits (vocab,)), all int8.

    `saturate` takes the place of tanh, and (saturate + 127)/256 that of the sigmoid.
    """
    x1, x2 = jnp.split(product(rows(params["emb"], token), params["W"]) + params["b"], 2)
    u1, u2 = jnp.split(product(h, params["U"]), 2)  # (hidden,) each
    z = saturate(x1 + u1) + jnp.int32(127)  # in units of 2⁻⁸
    candidate = saturate(x2 + ((z * u2) >> 8))
    h = (h + ((z * (candidate - jnp.int32(h))) >> 8)).astype(jnp.int8)  # between h and candidate
    return h, saturate(product(h, params["head"]))


# Command line: train the RNN on text, or on any other file, byte by byte --------------------------

# In either arithmetic: method, network, log₂ p, what the network sees of params, the unit of log₂ p
# in bits, and that of logits in nats.
FLOATS = Eggroll, rnn_init, rnn, log2_softmax, lambda params: params, 1, 1
INTEGERS = IntEggroll, int_rnn_init, int_rnn, int_log2_softmax, weights, 2**-8, math.log(2) / 16


def load_text(path: str | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The different bytes of a file (None: of Python's own help), and the file as their numbers:
    nine tenths to learn and the last one, held out."""
    topics = pydoc_data.topics.topics
    data = Path(path).read_bytes() if path else "\n\n".join(topics.values()).encode()
    alphabet, tokens = np.unique(np.frombuffer(data, np.uint8), return_inverse=True)
    return alphabet, *np.split(tokens.astype(np.int32), [len(tokens) * 9 // 10])


def ngram_bits(train: np.ndarray, test: np.ndarray, vocab: int) -> tuple[float, float]:
    """Bits/byte on test of the unigram and the bigram counts of train, 0.1 added to each count."""
    unigram = np.bincount(train, minlength=vocab) + 0.1  # (vocab,)
    bigram = np.full((vocab, vocab), 0.1)
    np.add.at(bigram, (train[:-1], train[1:]), 1)
    p_unigram = unigram[test[1:]] / unigram.sum()
    p_bigram = bigram[test[:-1], test[1:]] / bigram.sum(axis=1)[test[:-1]]
    return -np.mean(np.log2(p_unigram)), -np.mean(np.log2(p_bigram))


def save(path: str, params: dict[str, Any], progress: dict[str, Any]) -> None:
    """Write all arrays to path, atomically: the old file, until the new one is complete."""
    with open(f"{path}.tmp", "wb") as file:
        np.savez(file, **params, **progress)
        os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)


def load(path: str, params: dict[str, Any], progress: dict[str, Any]) -> tuple[dict, dict]:
    """What `save` wrote to path; ValueError unless it has the kinds of arrays that these are."""
    try:
        with open(path, "rb") as file:
            saved = dict(np.load(file))
    except Exception as error:  # NumPy has many kinds of them for what is no checkpoint
        raise ValueError(f"{path} is not a checkpoint: {error}") from error
    both = saved, jax.tree.map(np.asarray, params | progress)
    got, want = ({(name, f"{x.dtype}{x.shape}") for name, x in a.items()} for a in both)
    if got != want:
        has = f"has {sorted(got - want)}, expected {sorted(want - got)}"
        raise ValueError(f"{path} is of another network or text: {has}")
    if (saved["alphabet"] != progress["alphabet"]).any():
        raise ValueError(f"{path} is of another text: it has other bytes")
    return {name: saved[name] for name in params}, {name: saved[name] for name in progress}


def parse_args(argv: list[str] | None) -> tuple[argparse.Namespace, Callable]:
    """The options, and a function that ends the program with a line that says why."""
    what = "Train a recurrent network on text with EGGROLL, without backpropagation."
    parser = argparse.ArgumentParser("eggroll.py", argparse.SUPPRESS, what)
    add = parser.add_argument
    add("--text", metavar="FILE", help="any file, learned byte by byte; else Python's own help")
    add("--integer", action="store_true", help="train the network of integers")
    add("--seconds", type=float, default=60, help="how long to train, from now on: 60")
    add("--steps", type=int, help="how many steps to train instead, from now on")
    add("--population", type=int, default=4096, help="members, an even number: 4096")
    add("--chunk", type=int, help="pairs to evaluate at a time, to save memory; else all")
    add("--rank", default="1", help="rank of the noise, a number or full: 1")
    add("--sigma", type=float, help="scale of the noise: 0.04 (integers: 0.125, in sixteenths)")
    add("--lr", type=float, help="learning rate at first: 0.35 (integers: 1448) for 4096 members")
    add("--hidden", type=int, default=32, help="units of memory: 32")
    add("--length", type=int, default=32, help="bytes that a member predicts: 32")
    add("--seed", type=int, default=0, help="seed of everything random: 0")
    add("--checkpoint", metavar="FILE", help="save to it every two seconds; go on from it")
    args = parser.parse_args(argv)
    for name in "seconds", "steps", "population", "sigma", "lr", "hidden", "length":
        if (value := getattr(args, name)) is not None and not 0 < value < math.inf:
            parser.error(f"--{name} must be positive and finite, got {value}")
    if args.population % 2:
        parser.error(f"--population must be even, got {args.population}")
    if args.rank != "full" and not (args.rank.isdecimal() and int(args.rank)):
        parser.error(f"--rank must be full or a number of at least 1, got {args.rank}")
    args.rank = None if args.rank == "full" else int(args.rank)
    args.sigma = args.sigma or (0.125 if args.integer else 0.04)
    N = args.population  # noise moves a number by lr/(σ√N) in a step, an integer by lr √(N/2)
    args.lr = args.lr or (2**16 / math.sqrt(N / 2) if args.integer else 0.35 * math.sqrt(N / 4096))
    if args.integer:
        if 16 * args.sigma % 1 or not 1 <= args.lr < 2**31 / N:
            what = "--integer needs a multiple of 1/16 for --sigma, --lr of 1 to 2³¹/population"
            parser.error(what)
        args.sigma, args.lr = int(16 * args.sigma), int(args.lr)
    return args, parser.error


def learn(args: argparse.Namespace, state, text, train_step, held_out, unit: float) -> Any:
    """Go on from state, (params, progress), for as long as args say, or until Ctrl-C: the new one."""
    first, earlier = int(state[1]["step"]), float(state[1]["seconds"])
    clock, reported, done = time.perf_counter(), 0.0, 0.0
    try:
        while done < 1:
            params, progress = state
            step = int(progress["step"])
            lr = type(args.lr)(args.lr / (1 + step / 600))  # an int stays one
            params, scores = jax.block_until_ready(train_step(params, step, lr, text))
            elapsed, steps = time.perf_counter() - clock, step + 1 - first
            state = params, progress | {"step": step + 1, "seconds": earlier + elapsed}
            done = steps / args.steps if args.steps else elapsed / args.seconds
            if elapsed - reported > 2:
                reported = elapsed
                if args.checkpoint:
                    save(args.checkpoint, *state)
                members = -unit * np.mean(scores) / args.length
                speed = steps * args.population * args.length / elapsed / 1e6
                print(
                    f"step {step + 1:6,}   bits/byte: members {members:.2f}, held-out "
                    f"{held_out(params):.2f}   {speed:.2f} million bytes/s   "
                    f"{max(elapsed / done - elapsed, 0):.0f} s left",
                    flush=True,
                )
    except KeyboardInterrupt:
        print("interrupted")
    return state


def train(args: argparse.Namespace) -> None:
    """Train, with a line of progress every two seconds; then print a sample and the score."""
    method, init, cell, log2_p, see, unit, nat = INTEGERS if args.integer else FLOATS
    es, pairs = method(args.sigma, args.rank, chunk=args.chunk), args.population // 2
    fitness = partial(bits, cell=cell, log2_p=log2_p)
    alphabet, text, test = load_text(args.text)
    if len(test) <= args.length:
        raise ValueError(f"--length {args.length} needs more than {len(test)} bytes held out")
    window = min(257, len(test))  # of what is held out; each is read from an empty memory
    windows = test[: len(test) // window * window].reshape(-1, window)
    key_init, key_train, key_sample = jax.random.split(jax.random.key(args.seed), 3)

    @jax.jit
    def train_step(params, step, lr, text):
        key_data, key_noise = jax.random.split(jax.random.fold_in(key_train, step))
        starts = jax.random.randint(key_data, (pairs, 1), 0, len(text) - args.length)
        texts = text[starts + jnp.arange(args.length + 1)[None]]  # (pairs, length + 1)
        return es.step(fitness, params, key_noise, texts, lr)

    @jax.jit
    def held_out(params):
        scores = jax.vmap(partial(fitness, see(params)))(windows)
        return -unit * jnp.mean(scores) / (window - 1)

    progress = {"step": 0, "seconds": 0.0, "alphabet": alphabet}
    state = init(key_init, len(alphabet), args.hidden), progress
    if args.checkpoint:
        state = load(args.checkpoint, *state) if os.path.exists(args.checkpoint) else state
        save(args.checkpoint, *state)  # finds out now whether it can be written
    size = sum(p.size for p in state[0].values())
    print(f"{len(text):,} bytes to learn, {len(test):,} held out, {len(alphabet)} different")
    print(f"{size:,} parameters, population {args.population:,}, {jax.default_backend()}")
    clock = time.perf_counter()
    train_step = train_step.lower(state[0], 0, args.lr, text).compile()
    held_out(state[0])
    print(f"compiled in {time.perf_counter() - clock:.1f} s", flush=True)
    params, progress = state = learn(args, state, text, train_step, held_out, unit)
    if args.checkpoint:
        save(args.checkpoint, *state)
    written = alphabet[sample(see(params), key_sample, text[0], 300, cell, nat)]
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"  # which may lack characters
    shown = bytes(written).decode(errors="replace").encode(encoding, "replace").decode(encoding)
    unigram, bigram = ngram_bits(text, test, len(alphabet))
    print(f"\n{shown}\n")
    print(
        f"held-out {held_out(params):.2f} bits/byte after {progress['seconds']:.0f} s "
        f"(unigram {unigram:.2f}, bigram {bigram:.2f})"
    )


def main(argv: list[str] | None = None) -> None:
    """Train as the options say; what is wrong with them ends the program with one line."""
    args, refuse = parse_args(argv)
    try:
        train(args)
    except (OSError, ValueError, OverflowError) as error:
        refuse(str(error))
    except jax.errors.JaxRuntimeError as error:
        what = str(error).splitlines()[0]
        refuse(f"{what} (out of memory? --chunk evaluates fewer pairs at a time)")


if __name__ == "__main__":
    main()
