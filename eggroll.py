"""EGGROLL in one file: evolution strategies with low-rank noise, in JAX.

Evolution strategies (ES) train without backpropagation: perturb the parameters with noise, score
every perturbed copy, step towards the perturbations that scored well. EGGROLL [1] makes the noise
of a weight matrix the product of two thin matrices: evaluating a population of thousands then
costs about as much as batched inference, while the averaged update still has full rank.

    noise      E = A Bᵀ/√r                    A (m, r), B (n, r): iid, symmetric, unit variance
    forward    x (W + σE) = xW + σ (xA) Bᵀ/√r       no perturbed matrix is ever formed
    update     W ← W + α g,  g = 1/(Nσ) Σᵢ fᵢ Eᵢ    g estimates the gradient of mean f(W + σE)

Any function of a pytree of arrays can be trained, here a linear model:

    import jax, jax.numpy as jnp
    from eggroll import Eggroll, signs

    def fitness(params, example):               # one member, one example; higher is better
        x, y = example
        return -jnp.sum((x @ params["W"] + params["b"] - y) ** 2)

    key = jax.random.key(0)
    params = {"W": jnp.zeros((8, 4)), "b": jnp.zeros(4)}
    x = jax.random.normal(key, (512, 8))        # an example a pair: N = 1024 members
    step = jax.jit(Eggroll(sigma=0.1, draw=signs).step, static_argnames="fitness")
    for t in range(300):
        new_key = jax.random.fold_in(key, t)    # new noise for every step
        params, scores = step(fitness, params, new_key, data=(x, x[:, :4]), lr=0.05)
    print(scores.mean())                        # -4 at first, now about -0.4

`python eggroll.py` trains a recurrent network on real text, and with `--integer` one whose weights,
activations, fitness and update are integers.

Letters: N members make the population, N/2 antithetic pairs θ ± σE, θ being all the parameters. A
weight matrix W is (m, n), from m inputs to n outputs, x @ W. The rank of the noise is r; that of
the update, a sum over N/2 pairs, is min(rN/2, m, n): full, if the population is not tiny.

Differences from the paper and from the authors' code, and why:
  - g keeps the 1/σ that Eq. 8 of the paper leaves to the learning rate α, so that it can be held
    against jax.grad. Eqs. 4 and 5 of the paper have the wrong sign, Eq. 8 the right one.
  - The two members of a pair share their example and one draw of the noise: what differs between
    their scores is due to the noise alone, and half as much noise is drawn.
  - `step` standardizes the scores, as the authors' code does: f above has mean 0 and variance 1, so
    that a learning rate does not depend on the scale of the fitness.
  - A perturbed matrix is an object that multiplies, `LowRank`, so models need no special layers.
  - The entries of the noise may be random signs: 32 from one random word, and g varies less.
  - In integers, votes that do not suffice to move a weight are kept for the next step, and the noise
    is of signs, not from a table of normal numbers.
  - Embeddings and stacks of matrices have low-rank noise too. Vectors have dense noise, as there.

References:
  [1] Sarkar et al., Evolution Strategies at the Hyperscale, 2025, arXiv:2511.16652.
  [2] Salimans et al., Evolution Strategies as a Scalable Alternative to Reinforcement Learning,
      2017, arXiv:1703.03864.
  [3] Zhou et al., Minimal Gated Unit for Recurrent Neural Networks, 2016, arXiv:1603.09420.
"""

import argparse
import contextlib
import json
import math
import os
import pathlib
import pydoc_data.topics
import signal
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

# -------------------------------------------------------------------------------------------------
# Noise: iid entries, symmetric about zero and of unit variance (Sec. 4.1 of [1])
# -------------------------------------------------------------------------------------------------


def normal(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """Standard normal entries, the paper's choice (kurtosis 3)."""
    # Drawn in float32, since in bfloat16 jax.random.normal has but 128 values, of mean -0.01.
    return jax.random.normal(key, shape, jnp.float32).astype(dtype)


def uniform(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """Entries uniform on (-√3, √3) (kurtosis 9/5)."""
    return jax.random.uniform(key, shape, jnp.float32, -math.sqrt(3), math.sqrt(3)).astype(dtype)


def signs(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """Entries -1 and 1 (kurtosis 1), one random bit each: by far the fastest to draw."""
    size = math.prod(shape)
    words = jax.random.bits(key, (-(-size // 32), 1), jnp.uint32)  # (⌈size/32⌉, 1)
    masks = 1 << jnp.arange(32, dtype=jnp.uint32)[None]  # (1, 32)
    bits = words & masks  # (⌈size/32⌉, 32), bit j in column j
    return jnp.where(bits.ravel()[:size].reshape(shape) > 0, 1, -1).astype(dtype)


def draw_noise(key: jax.Array, params: Any, kind: tuple, draw: Callable, rank: int | None) -> Any:
    """For every leaf drawn entries: of a matrix (m, n) A (m, r) and B (n, r), else an array.

    TypeError unless every leaf is of the kind, given as (dtype, its name).
    """
    dtype, name = kind
    leaves, treedef = jax.tree.flatten_with_path(params)
    noise = []
    for i, (path, p) in enumerate(leaves):
        if not (hasattr(p, "dtype") and jnp.issubdtype(p.dtype, dtype)):
            raise TypeError(
                f"params{jax.tree_util.keystr(path)} must be {name}, got {p!r}; "
                "close over what is not to be trained"
            )
        leaf_key, p_dtype = jax.random.fold_in(key, i), jnp.result_type(p)
        if rank is None or p.ndim < 2:
            noise.append(draw(leaf_key, p.shape, p_dtype))
            continue
        *stack, m, n = p.shape
        AB = draw(leaf_key, (*stack, m + n, rank), p_dtype)
        noise.append((AB[..., :m, :], AB[..., m:, :]))  # (..., m, r), (..., n, r)
    return treedef.unflatten(noise)


# -------------------------------------------------------------------------------------------------
# Forward: x (W + σE) without forming W + σE (Sec. 4.3 of [1])
# -------------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class LowRank:
    """Stands for the matrix M = W + A Bᵀ, multiplies like it, and never forms it.

    W is (m, n), A is (m, r), B is (n, r). A model that has M in place of a weight matrix may write

        x @ M     x (..., m)                (..., n)           a dense layer
        M @ x     x (n,) or (n, k)          (m,) or (m, k)
        M[i]      i integers of any shape   (*i.shape, n)      rows, as of an embedding
        M.T                                 LowRank, (n, m)

    Leading axes common to W, A and B make a stack of matrices; jax.lax.scan, jax.vmap and M[i] take
    it apart. All else needs the array `dense(M)`. Operators, methods and functions of arrays, such
    as jnp.sum(M) or jnp.dot(x, M), raise TypeError. But M is a pytree: jax.tree.map and the like
    see W, A and B, so a penalty on the weights must be one on those of dense(params).
    """

    W: jax.Array
    A: jax.Array
    B: jax.Array

    shape = property(lambda self: self.W.shape)
    ndim = property(lambda self: self.W.ndim)
    dtype = property(lambda self: self.W.dtype)

    def __rmatmul__(self, x):
        return x @ self.W + (x @ self.A) @ self.B.mT  # (..., n)

    def __matmul__(self, x):
        return self.W @ x + self.A @ (self.B.mT @ x)  # (m,) or (m, k)

    def __getitem__(self, i):
        if not jnp.issubdtype(getattr(i, "dtype", type(i)), jnp.integer):
            self._refuse()
        if self.ndim > 2:
            return LowRank(self.W[i], self.A[i], self.B[i])
        return self.W[i] + self.A[i] @ self.B.mT  # (*i.shape, n)

    @property
    def T(self):
        return LowRank(self.W.T, self.B, self.A) if self.ndim == 2 else self._refuse()

    def _refuse(self, *_, **__):
        raise TypeError(
            f"LowRank{self.shape} can do x @ M, M @ x, M[integers] and, if it is no stack, M.T; "
            "write dense(M) for an array that can do the rest"
        )

    def __getattr__(self, name):
        if hasattr(jax.Array, name):  # M.sum(), M.reshape(...)
            self._refuse()
        raise AttributeError(name)

    __array_ufunc__ = None  # makes NumPy, too, leave x @ M to M
    __array__ = __iter__ = __len__ = __contains__ = __bool__ = __int__ = __float__ = _refuse
    __neg__ = __pos__ = __abs__ = __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = _refuse
    __rmul__ = __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = __mod__ = _refuse
    __rmod__ = __pow__ = __rpow__ = __and__ = __rand__ = __or__ = __ror__ = __xor__ = _refuse
    __rxor__ = __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse


def dense(tree: Any) -> Any:
    """`tree` with the array W + A Bᵀ in place of every LowRank."""

    def is_low_rank(x):
        return isinstance(x, LowRank)

    return jax.tree.map(
        lambda x: x.W + x.A @ x.B.mT if is_low_rank(x) else x, tree, is_leaf=is_low_rank
    )


# -------------------------------------------------------------------------------------------------
# Update: score the population, estimate the gradient, ascend (Eq. 8 and Algorithm 1 of [1])
# -------------------------------------------------------------------------------------------------


def standardize(fitness: jax.Array) -> jax.Array:
    """Fitness shifted and scaled to zero mean and unit variance over the population, in float32.

    A member whose fitness is not finite counts as the worst of the others. Where nothing can be
    told apart, because all are equal or none is finite, the result is zero.
    """
    f = jnp.asarray(fitness, jnp.float32)
    tiny = jnp.finfo(f.dtype).tiny
    finite = jnp.isfinite(f)
    worst = jnp.min(f, where=finite, initial=jnp.inf)
    f = jnp.where(finite, f - worst, 0)  # the worst is 0, the others are above
    f = f / jnp.maximum(jnp.max(f), tiny)  # best 1, so that no square overflows
    f = f - jnp.mean(f)
    return f / jnp.maximum(jnp.sqrt(jnp.mean(f**2)), tiny)


def paired(fitness: jax.Array) -> jax.Array:
    """fitness, if its shape is (pairs, 2); else ValueError."""
    f = jnp.asarray(fitness)
    if f.ndim != 2 or f.shape[1] != 2 or len(f) < 1:
        raise ValueError(f"fitness must have shape (pairs, 2), pairs ≥ 1, got {f.shape}")
    return f


def in_automatic_mode(f: Callable, x: jax.Array, specs: Any) -> Callable:
    """f, in automatic mode if x is on a mesh in explicit mode; its results are sharded by specs.

    In explicit mode, vmap wants all its inputs to be sharded alike, and a product over sharded axes
    wants to be told how its result is sharded. Automatic mode leaves both to the compiler.
    """
    on = jax.typeof(x).sharding
    if not on.mesh.explicit_axes:
        return f
    # a PartitionSpec is a tuple in some versions of JAX
    out = jax.tree.map(lambda s: on.update(spec=s), specs, is_leaf=lambda s: isinstance(s, P))
    return jax.sharding.auto_axes(f, out_sharding=out)


def check_count(name: str, value: int | None) -> None:
    """Raise ValueError unless value is None or an integer of at least 1."""
    if value is not None and not (isinstance(value, int | np.integer) and value >= 1):
        raise ValueError(f"{name} must be None or an integer of at least 1, got {value!r}")


@partial(
    jax.tree_util.register_dataclass, data_fields=["sigma"], meta_fields=["rank", "draw", "chunk"]
)
@dataclass(frozen=True)
class Eggroll:
    """Evolution strategies with low-rank noise and antithetic pairs.

    sigma   noise scale σ > 0, in units of the parameters; may be traced, as by a schedule
    rank    rank r ≥ 1 of the noise; None for full rank, which is ordinary ES [2], the baseline
    draw    entries of the noise, (key, shape, dtype) -> array: normal, uniform, signs or your own
    chunk   pairs to evaluate at a time, to bound memory; None for all at once. On several devices,
            a multiple of their number that divides the pairs: otherwise the data must travel.

    The methods have these arguments in common:

    params   θ, a pytree of floating-point arrays. One with two axes is a matrix and has low-rank
             noise, one with more is a stack of matrices; one with fewer has dense noise.
    key      a new one for every population. The noise depends on key, pair and position of the leaf
             alone: so `gradient` rebuilds what `evaluate` drew, in any chunks and on any number of
             machines, from key and scores (Algorithm 1 of [1]). Pair i has the key fold_in(key, i).
    fitness  (params, example) -> scalar, higher is better: any function that JAX can trace,
             differentiable or not. In `gradient`, though: the scores that it gave, (pairs, 2).
    data     a pytree of arrays with a first axis of N/2 pairs, which sets N. Both members of pair i
             see data[i]. If there is nothing to see: jnp.arange(pairs).

    Raises ValueError if sigma, rank, chunk, data or fitness is not as it says here, TypeError if a
    leaf of params is not a floating-point array.
    """

    sigma: float
    rank: int | None = 1
    draw: Callable = normal
    chunk: int | None = None

    def __post_init__(self):
        with contextlib.suppress(TypeError):  # a traced sigma has no value to check
            if not 0 < float(self.sigma) < math.inf:
                raise ValueError(f"sigma must be positive and finite, got {self.sigma}")
        check_count("rank", self.rank)
        check_count("chunk", self.chunk)

    def noise(self, key: jax.Array, params: Any) -> Any:
        """E of one pair: of a matrix (m, n) the factors (A/√r (m, r), B (n, r)), else an array."""
        kind = jnp.floating, "a floating-point array"
        noise = draw_noise(key, params, kind, self.draw, self.rank)

        def scaled(p, e):  # A Bᵀ has entries of unit variance
            return (e[0] / math.sqrt(self.rank), e[1]) if isinstance(e, tuple) else e

        return jax.tree.map(scaled, params, noise)

    def perturb(self, params: Any, noise: Any, sign: float = 1.0) -> Any:
        """The member θ + sign·σ·E, with a LowRank wherever E is given by its factors."""

        def leaf(p, e):
            scale = jnp.asarray(sign * self.sigma, jnp.result_type(p))
            return LowRank(p, scale * e[0], e[1]) if isinstance(e, tuple) else p + scale * e

        return jax.tree.map(leaf, params, noise)

    def evaluate(self, fitness: Callable, params: Any, key: jax.Array, data: Any) -> jax.Array:
        """Fitness of every member, (pairs, 2): of θ + σE and of θ - σE."""
        sizes = {x.shape[0] if jnp.ndim(x) else None for x in jax.tree.leaves(data)}
        if len(sizes) != 1 or not (pairs := sizes.pop()):
            shapes = jax.tree.map(jnp.shape, data)
            raise ValueError(f"arrays of data must share a first axis, pairs ≥ 1, got {shapes}")

        def scores(params, key, data):
            def member(sign, pair):
                i, example = pair
                noise = self.noise(jax.random.fold_in(key, i), params)
                score = fitness(self.perturb(params, noise, sign), example)
                if (shape := jax.tree.map(jnp.shape, score)) != ():
                    raise ValueError(f"fitness must return a scalar, got shape {shape}")
                return score

            # vmap batches only what differs between members. W does not, so `x @ W` is one product
            # for the whole population; noise does not depend on the sign: a pair shares one draw.
            def members(chunk):  # (chunk, 2)
                both = jnp.array([1, -1], jnp.int8)
                return jax.vmap(lambda s: jax.vmap(partial(member, s))(chunk), out_axes=1)(both)

            xs = jnp.arange(pairs), data
            if self.chunk is None or self.chunk >= pairs:
                return members(xs)
            xs = jax.tree.map(self._columns, xs)  # (chunk, chunks, ...)
            columns = jnp.arange(-(-pairs // self.chunk))
            # Slices, because mapping over a transpose of xs would copy all of the data.
            f = jax.lax.map(lambda j: members(jax.tree.map(lambda x: x[:, j], xs)), columns)
            return f.swapaxes(0, 1).reshape(-1, 2)[:pairs]  # undoes _columns

        leaves = jax.tree.leaves(data)
        x = next((x for x in leaves if jax.typeof(x).sharding.spec[0]), leaves[0])
        over_pairs = P(jax.typeof(x).sharding.spec[0])
        return in_automatic_mode(scores, x, over_pairs)(params, key, data)  # (pairs, 2)

    def _columns(self, x):
        """(pairs, ...) to (chunk, chunks, ...), filled up with the first pairs; columns are chunks.

        A chunk has a pair from every row. So if the pairs, in order, are sharded over devices, a
        chunk has its share of every device.
        """
        x = jnp.concatenate([x, x[: -len(x) % self.chunk]])
        return x.reshape(self.chunk, -1, *x.shape[1:])

    def gradient(self, params: Any, key: jax.Array, fitness: jax.Array) -> Any:
        """1/(Nσ) Σᵢ fᵢ Eᵢ over all members, like params: an estimate of ∇J, J(θ) = E[f(θ + σE)].

        Its mean is ∇J if E is normal and of full rank. At rank r it differs by O(1/r) if f is
        smooth, or bounded and the noise has a density, as signs have not (theory/3-convergence.md).

        `fitness` is that of `evaluate` with the same key, standardized or not. The sum over the
        members of a chunk is one matrix product, (A ⊙ f) Bᵀ, in at least float32.
        """
        f = paired(fitness)
        f = f.astype(jnp.promote_types(f.dtype, jnp.float32))
        weights = (f[:, 0] - f[:, 1]) / (f.size * self.sigma)  # (pairs,); the second member has -E
        g = self._sum(params, key, weights)
        return jax.tree.map(lambda p, g: g.astype(jnp.result_type(p)), params, g)

    def _sum(self, params, key, weights):
        """Σ weights[i] Eᵢ over the pairs, like params, but at least in float32 or int32."""

        def total(params, key, weights):
            def zeros(p):
                return jnp.zeros(
                    p.shape, jnp.int32 if p.dtype == jnp.int8 else jnp.result_type(p, weights)
                )

            def add(g, chunk):
                indices, w = chunk
                noise = jax.vmap(lambda i: self.noise(jax.random.fold_in(key, i), params))(indices)

                def leaf(g, e):
                    if isinstance(e, tuple):
                        fA = w.reshape(-1, *[1] * g.ndim) * e[0]  # (chunk, ..., m, r)
                        return g + jnp.einsum(
                            "p...mr,p...nr->...mn", fA, e[1], preferred_element_type=g.dtype
                        )
                    return g + jnp.tensordot(w, e, axes=1, preferred_element_type=g.dtype)

                return jax.tree.map(leaf, g, noise), None

            g = jax.tree.map(zeros, params)
            # One chunk takes no loop. Then, in one jit with `evaluate`, XLA sees that both draw the
            # same noise, and draws it once, which it does not see through a loop.
            if self.chunk is None or self.chunk >= len(weights):
                return add(g, (jnp.arange(len(weights)), weights))[0]
            weights = jnp.pad(weights, (0, -len(weights) % self.chunk))  # 0 for what fills up
            chunks = jnp.arange(len(weights)), weights
            return jax.lax.scan(add, g, jax.tree.map(lambda x: self._columns(x).T, chunks))[0]

        like_params = jax.tree.map(lambda p: jax.typeof(p).sharding.spec, params)
        return in_automatic_mode(total, weights, like_params)(params, key, weights)

    def step(self, fitness: Callable, params: Any, key: jax.Array, data: Any, lr: float) -> Any:
        """One generation, θ ← θ + lr·g with g from standardized fitness: (new params, fitness).

        Best in jax.jit, with fitness static. For another optimiser, call the three parts yourself.
        The noise in g moves every entry by about lr/(σ√N): with fewer members, take a lower lr.
        """
        scores = self.evaluate(fitness, params, key, data)
        g = self.gradient(params, key, standardize(scores))
        return jax.tree.map(lambda p, g: (p + lr * g).astype(jnp.result_type(p)), params, g), scores


# -------------------------------------------------------------------------------------------------
# Models: plain functions of plain pytrees, written for arrays and for LowRank alike
# -------------------------------------------------------------------------------------------------


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
    scale = 0.2  # of the embedding, so that the first logits are small
    return {
        "emb": scale * normal(key_emb, (vocab, hidden)),
        "W": normal(key_W, (hidden, 2 * hidden)) / (scale * math.sqrt(hidden)),
        "U": normal(key_U, (hidden, 2 * hidden)) / math.sqrt(hidden),
        "b": jnp.zeros(2 * hidden),
        "c": jnp.zeros(vocab),
    }


def rnn(params: dict[str, Any], h: jax.Array, token: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Read a token: (memory h (hidden,), token ()) to (new h, logits (vocab,) of the next token).

    A minimal gated unit [3]: a GRU whose update and reset gate are one, z. With the embedding at
    both ends, [x₁ x₂] = emb[token] W + b and [u₁ u₂] = h U,

        z = sigmoid(x₁ + u₁)    h ← (1 - z) h + z tanh(x₂ + z u₂)    logits = h embᵀ + c
    """
    x1, x2 = jnp.split(params["emb"][token] @ params["W"] + params["b"], 2)  # (hidden,) each
    u1, u2 = jnp.split(h @ params["U"], 2)  # (hidden,) each
    z = jax.nn.sigmoid(x1 + u1)
    h = (1 - z) * h + z * jnp.tanh(x2 + z * u2)
    return h, h @ params["emb"].T + params["c"]


def bits_per_char(params: dict[str, Any], text: jax.Array) -> jax.Array:
    """Mean -log₂ p(next token) over text (length + 1,), read from an empty memory."""

    def read(h, tokens):
        token, next_token = tokens
        h, logits = rnn(params, h, token)
        return h, jax.nn.logsumexp(logits) - logits[next_token]

    h = jnp.zeros(params["U"].shape[0], params["U"].dtype)
    return jnp.mean(jax.lax.scan(read, h, (text[:-1], text[1:]))[1]) / math.log(2)


def sample(params: dict[str, Any], key: jax.Array, token: jax.Array, length: int) -> jax.Array:
    """Let the model write `length` tokens after the given one: (length,)."""

    def write(carry, key):
        h, logits = rnn(params, *carry)
        token = jax.random.categorical(key, logits).astype(jnp.int32)
        return (h, token), token

    h = jnp.zeros(params["U"].shape[0], params["U"].dtype)
    carry = h, jnp.asarray(token, jnp.int32)
    return jax.lax.scan(write, carry, jax.random.split(key, length))[1]


# -------------------------------------------------------------------------------------------------
# Integers: the same three steps without a float (Sec. 6.1, Appendices C and D of [1])
# -------------------------------------------------------------------------------------------------

# Fixed point with 4 fractional bits: the int8 i, from -127 to 127, stands for the number i/16.


def saturate(x: jax.Array) -> jax.Array:
    """x (int32), clipped to -127 … 127, as int8: here in place of an activation function.

    What stays between goes through unchanged. Add int8 arrays in int32, or they wrap before.
    """
    return jnp.clip(x, -127, 127).astype(jnp.int8)


@partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["sigma", "chunk"])
@dataclass(frozen=True)
class IntEggroll:
    """`Eggroll` without a float: noise, forward, fitness and update are integers.

    sigma   noise scale, an integer of 1 to 127 sixteenths: 2 stands for σ = 1/8
    chunk   as in Eggroll

    The leaves of params are int8, the fitness is an integer, too. The entries of the noise, of rank
    1, are signs, so a member W ± σ a bᵀ is a matrix of integers, and `dot(x, member)` is exact.
    Models write dot, product and rows: x @ M, M[i] and dense(M) would wrap in int8.

    Raises ValueError or TypeError as Eggroll does.
    """

    sigma: int = 2
    chunk: int | None = None

    def __post_init__(self):
        if not (isinstance(self.sigma, int | np.integer) and 1 <= self.sigma <= 127):
            raise ValueError(f"sigma must be an integer of 1 to 127 sixteenths, got {self.sigma!r}")
        check_count("chunk", self.chunk)

    # As they are: to evaluate takes no arithmetic, and _sum adds int8 up in int32.
    evaluate, _columns, _sum = Eggroll.evaluate, Eggroll._columns, Eggroll._sum

    def noise(self, key: jax.Array, params: Any) -> Any:
        """E of one pair, signs in int8: of a matrix (m, n) a (m, 1) and b (n, 1), else an array."""
        return draw_noise(key, params, (jnp.int8, "int8"), signs, rank=1)

    def perturb(self, params: Any, noise: Any, sign: int = 1) -> Any:
        """The member θ + sign·σ·E: vectors saturated, matrices a LowRank, to be used unsaturated."""
        scale = jnp.int8(sign * self.sigma)

        def leaf(p, e):
            if isinstance(e, tuple):
                return LowRank(p, scale * e[0], e[1])
            return saturate(p.astype(jnp.int32) + scale * e)

        return jax.tree.map(leaf, params, noise)

    def gradient(self, params: Any, key: jax.Array, fitness: jax.Array) -> Any:
        """Votes Σ sign(f₊ - f₋) E over the pairs: int32, like params, one int8 product a matrix.

        They point uphill, as does `Eggroll.gradient`. By chance alone they have mean 0 and a
        variance of at most the number of pairs.
        """
        f = paired(fitness)
        better = (f[:, 0] > f[:, 1]).astype(jnp.int8)  # a difference could overflow
        worse = (f[:, 0] < f[:, 1]).astype(jnp.int8)
        return self._sum(params, key, better - worse)

    def step(
        self, fitness: Callable, params: Any, votes: Any, key: jax.Array, data: Any, threshold: int
    ) -> tuple[Any, Any, jax.Array]:
        """One generation: (new params, new votes, fitness).

        votes       zeros in int32, like params, at first; then what the last step returned
        threshold   int32, about √pairs at first; larger is slower and finer

        Where the votes collected so far reach the threshold, the weight moves by one, a sixteenth,
        in their direction, and the threshold is taken from the votes. With zeros for votes in every
        step this is the paper's update, which forgets what did not suffice.
        """
        scores = self.evaluate(fitness, params, key, data)
        votes = jax.tree.map(jnp.add, votes, self.gradient(params, key, scores))
        moves = jax.tree.map(lambda v: jnp.sign(v) * (jnp.abs(v) >= threshold), votes)
        params = jax.tree.map(lambda p, d: saturate(p.astype(jnp.int32) + d), params, moves)
        return params, jax.tree.map(lambda v, d: v - threshold * d, votes, moves), scores


def dot(x: jax.Array, M: jax.Array | LowRank) -> jax.Array:
    """x M in int32: x (..., m) and M (m, n) in int8, to (..., n). TypeError if x is not int8."""
    if x.dtype != jnp.int8:
        raise TypeError(f"x must be int8, got {x.dtype}")
    if isinstance(M, LowRank):
        return dot(x, M.W) + dot(x, M.A) @ M.B.mT.astype(jnp.int32)  # (..., n)
    return jnp.matmul(x, M, preferred_element_type=jnp.int32)


def product(x: jax.Array, M: jax.Array | LowRank) -> jax.Array:
    """x M/√m in fixed point: x (..., m) in int8, M (m, n) with m ≤ 1024, to (..., n) in int32."""
    if x.shape[-1] > 1024:
        raise ValueError(f"x must have at most 1024 entries, or int32 overflows, got {x.shape}")
    return (dot(x, M) * round(2**11 / math.sqrt(x.shape[-1]))) >> 15  # 15 = 11 + 4


def rows(M: jax.Array | LowRank, i: jax.Array) -> jax.Array:
    """M[i] in int8: of M (m, n), to (*i.shape, n)."""
    if isinstance(M, LowRank):
        return saturate(M.W[i].astype(jnp.int32) + M.A[i] @ M.B.mT)
    return M[i]


def l1_norm(x: jax.Array) -> jax.Array:
    """x scaled to a mean absolute value of 1, which is 16: (n,) int8 to (n,) int8."""
    x = x.astype(jnp.int32)
    scale = (len(x) << 12) // jnp.maximum(jnp.sum(jnp.abs(x)), 1)  # 16/mean in units of 2⁻⁸
    return saturate((x * scale) >> 8)


def residual(x: jax.Array, y: jax.Array) -> jax.Array:
    """x + y, saturated: (n,) each, in int8 or int32, to (n,) int8."""
    x = saturate(x + y.astype(jnp.int32))
    # On a CPU, XLA recomputes a sum wherever it is used, and so the whole network in every layer. A
    # product it computes once: this one with the identity makes two layers half as fast again.
    return dot(x, jnp.eye(len(x), dtype=jnp.int8)).astype(jnp.int8)


def exp2(x: jax.Array) -> jax.Array:
    """2^(x/16), of int8 x, in int32 and units of 2⁻¹⁶, within 0.31 %."""
    x = x.astype(jnp.int32)
    u = x & 15  # sixteenths: x/16 = (x >> 4) + u/16
    power = 256 + ((u * (174 + 5 * u)) >> 4)  # 2^(u/16) in units of 2⁻⁸, by a polynomial
    return power << ((x >> 4) + 8)


def spare_bits(vocab: int) -> int:
    """By how many bits to shift `vocab` results of `exp2` right, so that int32 holds their sum."""
    return max(0, (vocab - 1).bit_length() - 7)  # 2⁷ of them do, each being less than 2²⁴


LOG2 = np.round(256 * np.log2(1 + (np.arange(256) + 0.5) / 256)).astype(np.int32)  # (256,)


def log2(x: jax.Array) -> jax.Array:
    """log₂ x, of positive int32 x, in int32 and units of 2⁻⁸, within 0.005."""
    zeros = jax.lax.clz(x)
    fraction = jax.lax.shift_right_logical(x << zeros, 23) & 255  # 8 bits after the leading one
    return ((31 - zeros) << 8) + jnp.asarray(LOG2)[fraction]


def int_rnn_init(
    key: jax.Array, vocab: int, hidden: int, layers: int = 1, mlp: bool = False
) -> dict[str, Any]:
    """Parameters for `int_rnn` in int8: round(16 N(0, 1)), and zero for head and biases."""
    shapes = {name: (hidden, hidden) for name in ("Wf", "Uf", "Wh", "Uh")}
    if mlp:
        shapes |= {"W1": (hidden, 4 * hidden), "W2": (4 * hidden, hidden)}

    def draw(key, shape):
        return saturate(jnp.round(16 * normal(key, shape)))

    def layer(key):
        keys = jax.random.split(key, len(shapes))
        biases = {name: jnp.zeros(hidden, jnp.int8) for name in ("bf", "bh")}
        return {n: draw(k, shapes[n]) for n, k in zip(shapes, keys, strict=True)} | biases

    key_emb, *keys = jax.random.split(key, 1 + layers)
    return {
        "emb": draw(key_emb, (vocab, hidden)),
        "layers": [layer(key) for key in keys],
        "head": jnp.zeros((hidden, vocab), jnp.int8),
    }


def int_rnn(params: dict[str, Any], s: jax.Array, token: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Read a token: (memory s (layers, hidden), token ()) to (new s, logits (vocab,)), all int8.

    The paper's network: in every layer a gated unit, whose gate f may be from -127 to 127, the
    candidate c for the new memory, and, if there are W1 and W2, two products,

        f = sat(x Wf + s Uf + bf)    g = (f + 127)/256    c = sat(x Wh + (g s) Uh + bh)
        s ← s + g (c - s)            sat(x W1) W2

    Both read the normed x, and their results, s and the products, are added to x.
    """
    x = rows(params["emb"], token)  # (hidden,)
    new_s = []
    for old, p in zip(s, params["layers"], strict=True):
        y = l1_norm(x)  # (hidden,), like all that follows
        f = saturate(product(y, p["Wf"]) + product(old, p["Uf"]) + p["bf"])
        g = f + jnp.int32(127)  # in units of 2⁻⁸
        kept = saturate((g * old) >> 8)
        c = saturate(product(y, p["Wh"]) + product(kept, p["Uh"]) + p["bh"])
        new = saturate(old + ((g * (c - old.astype(jnp.int32))) >> 8))
        x = residual(x, new)
        if "W1" in p:
            y = saturate(product(l1_norm(x), p["W1"]))  # (4 hidden,)
            x = residual(x, product(y, p["W2"]))
        new_s.append(new)
    return jnp.stack(new_s), saturate(product(l1_norm(x), params["head"]))


def int_log_likelihood(params: dict[str, Any], text: jax.Array) -> jax.Array:
    """Sum of log₂ p(next token) over text (length + 1,), int32 in units of 2⁻⁸ bits.

    p is proportional to 2^(logit/16); the memory is empty at first. For up to 2¹⁵ different tokens,
    and texts of up to 250,000.
    """
    vocab, hidden = params["emb"].shape
    spare = spare_bits(vocab)

    def read(s, tokens):
        token, next_token = tokens
        s, logits = int_rnn(params, s, token)
        total = log2(jnp.sum(exp2(logits) >> spare)) + ((spare - 16) << 8)
        return s, (logits[next_token].astype(jnp.int32) << 4) - total

    s = jnp.zeros((len(params["layers"]), hidden), jnp.int8)
    return jnp.sum(jax.lax.scan(read, s, (text[:-1], text[1:]))[1])


def int_sample(params: dict[str, Any], key: jax.Array, token: jax.Array, length: int) -> jax.Array:
    """Let the model write `length` tokens after the given one: (length,)."""
    vocab, hidden = params["emb"].shape

    def write(carry, key):
        s, logits = int_rnn(params, *carry)
        heights = jnp.cumsum(exp2(logits) >> spare_bits(vocab))  # (vocab,)
        token = jnp.sum(heights <= jax.random.randint(key, (), 0, heights[-1]), dtype=jnp.int32)
        return (s, token), token

    s = jnp.zeros((len(params["layers"]), hidden), jnp.int8)
    carry = s, jnp.asarray(token, jnp.int32)
    return jax.lax.scan(write, carry, jax.random.split(key, length))[1]


# -------------------------------------------------------------------------------------------------
# Command line: train the RNN on text
# -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def refusing(task: str) -> Iterator[None]:
    """End the program with one line on stderr and exit status 2 if the task cannot be done."""
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, zipfile.BadZipFile) as error:
        print(f"eggroll.py: cannot {task}: {error}", file=sys.stderr)
        sys.exit(2)


def ngram_bits(train: np.ndarray, test: np.ndarray, vocab: int) -> tuple[float, float]:
    """Bits/char on test of the unigram and the bigram counts of train, 0.1 added to each count."""
    unigram = np.bincount(train, minlength=vocab) + 0.1  # (vocab,)
    bigram = np.full((vocab, vocab), 0.1)
    np.add.at(bigram, (train[:-1], train[1:]), 1)
    p_unigram = unigram[test[1:]] / unigram.sum()
    p_bigram = bigram[test[:-1], test[1:]] / bigram.sum(axis=1)[test[:-1]]
    return -np.mean(np.log2(p_unigram)), -np.mean(np.log2(p_bigram))


def main() -> None:
    """Train, with a line of progress every two seconds; then a sample and the held-out score."""
    parser = argparse.ArgumentParser(
        description="Train a character RNN with EGGROLL, without backpropagation.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    draws = {"signs": signs, "normal": normal, "uniform": uniform}
    for_integers = {"population": 4096, "sigma": 0.125, "lr": 1.0, "length": 32}
    instead = ", ".join(f"{name} {value}" for name, value in for_integers.items())
    add = parser.add_argument
    add("--text", metavar="FILE", type=os.path.abspath, help="UTF-8 text; None: pydoc_data.topics")
    add("--seconds", type=float, default=60, help="how long to train, from now on")
    add("--steps", type=int, help="how many steps to train instead, from now on")
    add("--population", type=int, default=8192, help="members, an even number")
    add("--rank", default="1", help="rank of the noise, a number or full")
    add("--noise", choices=draws, default="signs", help="distribution of its entries")
    add("--sigma", type=float, default=0.04, help="scale of the noise")
    add("--lr", type=float, default=0.5, help="learning rate for 8192 members, in the beginning")
    add("--hidden", type=int, default=32, help="units of memory of the RNN")
    add("--length", type=int, default=16, help="characters that a member predicts")
    add("--integer", action="store_true", help=f"integers only; {instead} unless given")
    add("--layers", type=int, default=1, help="layers of the integer RNN")
    add("--mlp", action="store_true", help="two more matrices in each of these layers")
    add("--seed", type=int, default=0, help="seed of everything random")
    add("--save", metavar="FILE", help="checkpoint to write every two seconds and at the end")
    add("--resume", metavar="FILE", help="checkpoint to continue, with its options unless given")
    args = parser.parse_args()
    if args.integer:
        parser.set_defaults(**for_integers)
        args = parser.parse_args()
    if args.resume:
        with refusing(f"resume {args.resume}"), open(args.resume, "rb") as file:
            if not zipfile.is_zipfile(file):
                raise ValueError("it is not a checkpoint")
            saved = dict(np.load(file))
            parser.set_defaults(**json.loads(str(saved["options"])))
        args = parser.parse_args()
    of_this_run = "seconds", "steps", "save", "resume"  # the other options go into checkpoints
    options = json.dumps({k: v for k, v in vars(args).items() if k not in of_this_run})

    with refusing("use these options"):
        if args.rank != "full" and not (args.rank.isdecimal() and int(args.rank)):
            raise ValueError(f"--rank must be full or a number of at least 1, got {args.rank}")
        if not args.integer:
            if args.layers != 1 or args.mlp:
                raise ValueError("--layers and --mlp are for --integer")
            rank = None if args.rank == "full" else int(args.rank)
            es = Eggroll(args.sigma, rank, draws[args.noise])
        elif (args.rank, args.noise) != ("1", "signs"):
            raise ValueError("--integer has --rank 1 and --noise signs")
        elif args.sigma * 16 not in range(1, 128):
            raise ValueError(f"--sigma must be 1 to 127 sixteenths, like 0.125, got {args.sigma}")
        else:
            es = IntEggroll(int(args.sigma * 16))
        if args.population < 2 or args.population % 2:
            raise ValueError(f"--population must be even and at least 2, got {args.population}")
        if args.integer and args.hidden * (4 if args.mlp else 1) > 1024:
            raise ValueError(
                f"--hidden may be 1024 with --integer, 256 with --mlp, got {args.hidden}"
            )
        if (least := min(args.hidden, args.length, args.layers)) < 1:
            raise ValueError(f"--hidden, --length and --layers must be at least 1, got {least}")
        if not math.isfinite(args.lr) or (args.integer and args.lr <= 0):
            raise ValueError(f"--lr must be finite, and with --integer positive, got {args.lr}")
    with refusing(f"learn {args.text}"):
        text = "\n\n".join(pydoc_data.topics.topics.values())
        if args.text:
            text = pathlib.Path(args.text).read_text(encoding="utf-8")
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)  # one for each character
        alphabet, tokens = np.unique(codes, return_inverse=True)  # (vocab,), (len(text),)
        train, test = np.split(tokens.astype(np.int32), [len(tokens) * 9 // 10])
        if args.integer and len(alphabet) > 2**15:
            raise ValueError(f"--integer can learn 2¹⁵ characters, it has {len(alphabet)}")
        if len(test) <= args.length:
            raise ValueError(f"its last tenth has {len(test)} characters, --length needs more")
    unigram, bigram = ngram_bits(train, test, len(alphabet))
    window = min(257, len(test))  # held-out text is read in windows, each from an empty memory
    windows = test[: len(test) // window * window].reshape(-1, window)

    key_init, key_train, key_sample = jax.random.split(jax.random.key(args.seed), 3)
    pairs, step, seconds = args.population // 2, 0, 0.0
    if args.integer:
        params = int_rnn_init(key_init, len(alphabet), args.hidden, args.layers, args.mlp)
        votes = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.int32), params)
        state, fitness, write = {"params": params, "votes": votes}, int_log_likelihood, int_sample
    else:
        state = {"params": rnn_init(key_init, len(alphabet), args.hidden)}
        write = sample

        def fitness(params, example):
            return -bits_per_char(params, example)

    def named(state):
        leaves, treedef = jax.tree.flatten_with_path(state)
        names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
        return dict(zip(names, [leaf for _, leaf in leaves], strict=True)), treedef

    if args.resume:
        with refusing(f"resume {args.resume}"):
            if not np.array_equal(saved["alphabet"], alphabet):
                raise ValueError("it knows other characters than the text")
            leaves, treedef = named(state)
            if others := leaves.keys() ^ {n for n in saved if n.startswith(("params.", "votes."))}:
                raise ValueError(f"it is of another network: {', '.join(sorted(others)[:3])} …")
            for name, p in leaves.items():
                if saved[name].shape != p.shape:
                    raise ValueError(f"{name} must have shape {p.shape}, got {saved[name].shape}")
            state = treedef.unflatten([jnp.asarray(saved[name]) for name in leaves])
            step, seconds = int(saved["step"]), float(saved["seconds"])

    def save():
        if args.save:
            run = {"step": step, "seconds": seconds, "alphabet": alphabet, "options": options}
            with refusing(f"save {args.save}"):
                with open(f"{args.save}.tmp", "wb") as file:
                    np.savez(file, **named(state)[0], **run)
                    os.fsync(file.fileno())
                os.replace(f"{args.save}.tmp", args.save)  # atomic: the old file or the new, whole

    def rate(step):
        if args.integer:  # the threshold: 1/lr standard deviations of a step's votes, then more
            return jnp.int32(min(math.ceil((1 + step / 600) * math.sqrt(pairs) / args.lr), 2**30))
        lr = args.lr * math.sqrt(args.population / 8192)  # noise moves a weight by lr/(σ√N)
        return jnp.float32(lr / (1 + step / 600))

    @jax.jit
    def train_step(state, step, rate, train):
        key_data, key_noise = jax.random.split(jax.random.fold_in(key_train, step))
        starts = jax.random.randint(key_data, (pairs, 1), 0, len(train) - args.length)
        examples = train[starts + jnp.arange(args.length + 1)[None]]  # (pairs, length + 1)
        *new, scores = es.step(fitness, *state.values(), key_noise, examples, rate)
        return dict(zip(state, new, strict=True)), scores

    @jax.jit
    def test_scores(params, windows):
        return jax.vmap(partial(fitness, params))(windows)

    def bits(scores, length):  # integers are sums, in units of 2⁻⁸ bits
        return -np.mean(scores) / (256 * length if args.integer else 1)

    def test_bits():
        return bits(test_scores(state["params"], windows), window - 1)

    interrupts = []

    def interrupt(number, frame):  # the first Ctrl-C ends training, a second one the program
        interrupts.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    signal.signal(signal.SIGINT, interrupt)
    save()  # already now, so that a bad --save is refused before the work
    size = sum(p.size for p in jax.tree.leaves(state["params"]))
    print(f"{len(train):,} characters to learn, {len(test):,} held out, {len(alphabet)} different")
    print(f"{size:,} parameters, population {args.population:,}, {jax.default_backend()}")
    clock = time.perf_counter()
    train_step = train_step.lower(state, jnp.int32(step), rate(step), train).compile()
    test_bits()
    print(f"compiled in {time.perf_counter() - clock:.1f} s", flush=True)

    done, elapsed, reported, earlier = 0, 0.0, 0.0, seconds
    clock = time.perf_counter()
    while not interrupts and (elapsed < args.seconds if args.steps is None else done < args.steps):
        state, scores = train_step(state, jnp.int32(step), rate(step), train)
        scores.block_until_ready()
        done, step, elapsed = done + 1, step + 1, time.perf_counter() - clock
        seconds = earlier + elapsed
        if elapsed - reported > 2:
            reported = elapsed
            save()
            left = args.seconds - elapsed
            if args.steps is not None:
                left = elapsed / done * (args.steps - done)
            speed = done * args.population * args.length / elapsed
            print(
                f"step {step:6,}   bits/char: members {bits(scores, args.length):.2f}, "
                f"held-out {test_bits():.2f}   "
                f"{speed / 1e6:.2f} million characters/s   {max(left, 0):.0f} s left",
                flush=True,
            )
    save()
    written = alphabet[write(state["params"], key_sample, train[0], 300)]  # (300,)
    sys.stdout.reconfigure(errors="replace")  # of characters that the terminal cannot show
    print("\n" + "".join(map(chr, written)) + "\n")
    print(
        f"held-out {test_bits():.2f} bits/char after {seconds:.0f} s "
        f"(unigram {unigram:.2f}, bigram {bigram:.2f})"
    )


if __name__ == "__main__":
    main()
