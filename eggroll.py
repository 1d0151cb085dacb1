# /// script
# requires-python = ">=3.11"
# dependencies = ["jax>=0.8", "numpy>=2.0"]
# ///
"""EGGROLL in one file: evolution strategies with low-rank noise, in JAX.

Evolution strategies (ES) train without backpropagation: perturb the parameters with noise, score
every perturbed copy, and step towards the perturbations that scored well. EGGROLL [1] makes the
noise E of a weight matrix W (m, n) the product of two thin random matrices, A (m, r) and B (n, r).
Scoring thousands of copies then costs little more than inference. Each E has rank r, but the update
sums thousands of them and can have full rank. With σ the scale of the noise:

    noise      E = A Bᵀ/√r                          r = 1 is usually enough
    forward    x (W + σE) = x W + σ (x A) Bᵀ/√r     no perturbed matrix is ever formed
    update     W ← W + lr · g,  g = Σᵢ fᵢ Eᵢ/(Nσ)   fᵢ is the score of member i, one of N

Members come in pairs, W + σE and W - σE. The fitness that scores them may be any JAX function,
differentiable or not; g approximates the gradient of the fitness averaged over the noise:

    import jax, jax.numpy as jnp
    from eggroll import Eggroll

    es = Eggroll(sigma=0.1)

    def fitness(params, x):  # the score of one member on one example; higher is better
        return -jnp.sum((x @ params["W"] + params["b"] - x[:4]) ** 2)

    @jax.jit
    def train_step(params, key, data, lr):
        return es.step(fitness, params, key, data, lr)

    params = {"W": jnp.zeros((8, 4)), "b": jnp.zeros(4)}  # a linear model
    data = jax.random.normal(jax.random.key(0), (512, 8))  # an example for each of 512 pairs
    print(fitness(params, data[0]))  # about -7
    for t in range(300):
        params, scores = train_step(params, jax.random.key(t), data, 1 / (1 + t / 50))
    print(fitness(params, data[0]))  # about 0

[1] Sarkar et al., Evolution Strategies at the Hyperscale, 2026, arXiv:2511.16652v2.
[2] Zhou et al., Minimal Gated Unit for Recurrent Neural Networks, 2016, arXiv:1603.09420.
"""

import argparse
import itertools
import math
import os
import sys
import time
import uuid
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

# The method ends at the line "copy up to here". To use it alone in a project of your own, copy the
# file down to there. Of the imports it needs math, Callable, dataclass, partial, jax, jnp and np.

# Noise: iid entries, symmetric about zero, of variance 1 (Sec. 4.1 of [1]) -----------------------


def normal(key, shape, dtype=jnp.float32):
    """Standard normal entries, the paper's choice: those of jax.random.normal in float32."""
    above_minus_1 = np.nextafter(np.float32(-1), np.float32(0))  # as erf_inv(-1) is -∞
    u = jax.random.uniform(key, shape, jnp.float32, above_minus_1, 1)

    # XLA would compute erf_inv anew wherever the noise is used, but it stores what a loop returns.
    # So this is a loop, of which the second step does nothing. It can halve the time of a step.
    def erf_inv_at_first(t, u):
        return jnp.where(t == 0, jax.lax.erf_inv(u), u)

    z = math.sqrt(2) * jax.lax.fori_loop(0, 2, erf_inv_at_first, u)
    return z.astype(dtype)


def uniform(key, shape, dtype=jnp.float32):
    """Entries uniform on (-√3, √3)."""
    end = math.sqrt(3)
    return jax.random.uniform(key, shape, jnp.float32, -end, end).astype(dtype)


def signs(key, shape, dtype=jnp.float32):
    """Entries -1 and 1. Each takes one random bit, where `normal` takes 32: the fastest to draw."""
    size = math.prod(shape)
    words = jax.random.bits(key, (math.ceil(size / 32), 1), jnp.uint32)
    masks = 1 << jnp.arange(32, dtype=jnp.uint32)[None]  # (1, 32): one for each bit of a word
    bit_is_set = (words & masks) > 0  # (words, 32)
    bit_is_set = bit_is_set.ravel()[:size].reshape(shape)
    return jnp.where(bit_is_set, 1, -1).astype(dtype)


# Forward: x (W + σE) without forming W + σE (Sec. 4.2 of [1]) ------------------------------------


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class LowRank:
    """Stands for the matrix M = W + scale · A Bᵀ without forming it.

    W is (m, n), A (m, r), B (n, r) and scale (). A model may write x @ M, M @ x, M.T and, as for an
    embedding, M[i]: rows, for integers i of any shape. Anything else is an error, and needs the
    array dense(M). There is one trap: functions of pytrees, such as jax.tree.map or jax.grad, raise
    no error but see the four fields. Use them for casts alone.

    With more axes in front of all four fields it is a stack of matrices, as of layers under a scan.
    Take it apart by scan, by M[i], or by vmap over its first axis.
    """

    W: jax.Array
    A: jax.Array
    B: jax.Array
    scale: jax.Array

    def __rmatmul__(self, x):  # x @ M
        if jnp.ndim(x) == 1 and self.ndim > 2:
            return (x[None] @ self)[..., 0, :]  # a vector times a stack: (..., n)
        return x @ self.W + self._scaled(x @ self.A) @ self.B.mT  # (..., n)

    def __matmul__(self, x):  # M @ x
        if jnp.ndim(x) == 1 and self.ndim > 2:
            return (self @ x[:, None])[..., 0]  # a stack times a vector: (..., m)
        return self.W @ x + self.A @ self._scaled(self.B.mT @ x)  # (m,) or (..., m, k)

    def __getitem__(self, i):
        if i is ...:  # Flax NNX reads a parameter as p[...]
            return self
        dtype = getattr(i, "dtype", type(i))
        if not jnp.issubdtype(dtype, jnp.integer):
            self._refuse()
        if self.ndim > 2:
            return jax.tree.map(lambda x: x[i], self)  # a matrix of the stack
        return self.W[i] + self._scaled(self.A[i]) @ self.B.mT  # rows: (*i.shape, n)

    @property
    def T(self):
        if self.ndim > 2:
            self._refuse()
        return LowRank(self.W.T, self.B, self.A, self.scale)

    shape = property(lambda self: self.W.shape)
    ndim = property(lambda self: self.W.ndim)
    dtype = property(lambda self: self.W.dtype)

    def _scaled(self, y):  # scale · y, where y is x @ A, say
        if jnp.issubdtype(self.dtype, jnp.integer):  # sums of int8 would overflow
            self._refuse()
        return y * (self.scale if self.ndim == 2 else self.scale[..., None, None])

    def _refuse(self, *_, **__):
        raise TypeError(
            f"LowRank of {self.dtype}{self.shape}: only x @ M, M @ x, rows M[i] and .T of a matrix "
            "work; else use dense(M). Of integers, only product(x, M) and rows(M, i) work."
        )

    __array__ = __bool__ = __eq__ = _refuse  # Python and NumPy would silently give a wrong answer
    __array_ufunc__ = None  # so that array @ M, of a NumPy array, is left to __rmatmul__
    __iter__ = None  # or a for loop would take rows for ever


def dense(tree):
    """`tree` with the array W + scale · A Bᵀ, (..., m, n), in place of every LowRank."""

    def form(M):
        return M.W + M._scaled(M.A @ M.B.mT) if isinstance(M, LowRank) else M

    return jax.tree.map(form, tree, is_leaf=lambda x: isinstance(x, LowRank))


def add_noise(p, e, scale):
    """p + scale · E: a LowRank if e are the factors of E, an array if e is E itself."""
    if not isinstance(e, tuple):
        return p + jnp.asarray(scale, e.dtype) * e
    A, B = e
    stack_shape = p.shape[:-2]  # () of a matrix; in a stack, each matrix has a scale
    return LowRank(jnp.asarray(p), A, B, jnp.full(stack_shape, scale, A.dtype))


# Update: score the population, estimate the gradient, ascend (Eq. 6, Algorithm 1 of [1]) ---------


def standardize(scores):
    """Scores shifted and scaled to mean 0 and variance 1 over the population, in float32.

    NaN, ∞ and -∞ count as the worst finite score. If all scores are equal, all become 0.
    """
    scores = jnp.asarray(scores, jnp.float32)
    finite = jnp.isfinite(scores)
    scores = jnp.where(finite, scores, 0)
    _, exponent = jnp.frexp(jnp.max(jnp.abs(scores)))
    scores = jnp.ldexp(scores, -exponent)  # all are below 1 now, so that no square overflows
    worst = jnp.min(scores, where=finite, initial=1)
    scores = jnp.where(finite, scores, worst) - worst  # exactly 0 if all are equal
    scores = scores - jnp.mean(scores)
    deviation = jnp.sqrt(jnp.mean(scores**2))
    return scores / jnp.maximum(deviation, jnp.finfo(jnp.float32).tiny)


def weighted_sum(c, e, dtype):
    """Σᵢ cᵢ Eᵢ of c (P,), and e the arrays (P, ...) or factors ((P, ..., m, r), (P, ..., n, r))."""
    if not isinstance(e, tuple):
        return jnp.tensordot(c, e, axes=1, preferred_element_type=dtype)
    A, B = e
    cA = jax.vmap(jnp.multiply)(c, A)  # (P, ..., m, r)
    return jnp.einsum("i...mr,i...nr->...mn", cA, B, preferred_element_type=dtype)


as_pytree = partial(  # jit traces sigma, and compiles for the rest
    jax.tree_util.register_dataclass, data_fields=["sigma"], meta_fields=["rank", "draw", "chunk"]
)


@as_pytree
@dataclass(frozen=True)
class Eggroll:
    """Evolution strategies with low-rank noise and antithetic pairs.

    sigma    scale σ > 0 of the noise; may be a traced scalar, so as to follow a schedule
    rank     rank r of the noise; None for full rank: ordinary ES, the baseline
    draw     gives entries of the noise, iid, symmetric, of variance 1: signs, normal, uniform or a
             function of your own, (key, shape, dtype) -> array
    chunk    how many pairs to evaluate at a time, to save memory; None for all at once

    Arguments of the methods:

    params   θ, a pytree of floating-point arrays. With two axes, an array is a matrix, with more a
             stack of matrices, with fewer a vector, whose noise is dense. So biases (layers, n),
             stacked for a scan, are taken for a matrix: use dense(biases) inside the fitness.
    key      a new one for every population. The noise is a function of the key and of the indices
             of pair and leaf alone, so `gradient` draws again what `evaluate` drew.
    fitness  (params, example) -> scalar, higher is better
    data     a pytree of arrays that share a first axis of N/2 pairs; both members of pair i see
             data[i]. If the fitness needs no data, pass jnp.arange(pairs). For many devices, shard
             this axis over a mesh made with axis_types=(AxisType.Auto,).
    """

    sigma: float
    rank: int | None = 1
    draw: Callable = signs
    chunk: int | None = None

    def noise(self, key, params):
        """E of one pair: of a matrix (m, n) its factors (A/√r (m, r), B (n, r)), else an array."""

        def draw_leaf(i, p):
            leaf_key = jax.random.fold_in(key, i)
            if self.rank is None or p.ndim < 2:
                return self.draw(leaf_key, p.shape, p.dtype)
            *stack, m, n = p.shape
            factors = self.draw(leaf_key, (*stack, m + n, self.rank), p.dtype)  # both in one draw
            A = factors[..., :m, :]  # (..., m, r)
            B = factors[..., m:, :]  # (..., n, r)
            return A * jnp.asarray(1 / math.sqrt(self.rank), p.dtype), B

        params = jax.tree.map(jnp.asarray, params)
        leaves, treedef = jax.tree.flatten(params)
        return treedef.unflatten([draw_leaf(i, p) for i, p in enumerate(leaves)])

    def perturb(self, params, noise, sign=1):
        """The member θ + sign · σ · E, with a LowRank for every matrix."""
        sigma_has_value = not isinstance(self.sigma, jax.Array)  # it has none if traced
        if sigma_has_value and not 0 < self.sigma < math.inf:
            raise ValueError(f"sigma must be positive and finite, got {self.sigma}")
        for path, p in jax.tree.leaves_with_path(params):
            dtype = jnp.result_type(p)
            if not jnp.issubdtype(dtype, jnp.floating):
                raise TypeError(
                    f"params{jax.tree_util.keystr(path)} must be floating-point, got {dtype}. "
                    "Close over what is not trained; train real and imaginary parts as two leaves."
                )
        # For a matrix in params, noise has a tuple (A, B), which tree.map passes on whole.
        return jax.tree.map(partial(add_noise, scale=sign * self.sigma), params, noise)

    def evaluate(self, fitness, params, key, data):
        """Scores of all members, (pairs, 2): of θ + σE and of θ - σE."""

        def score_pair(i, example):  # (2,)
            noise = self.noise(jax.random.fold_in(key, i), params)  # one draw for both members

            def score(sign):
                value = fitness(self.perturb(params, noise, sign), example)
                shape = jnp.asarray(value).shape
                if shape != ():
                    raise ValueError(f"fitness must return a scalar, got shape {shape}")
                return value

            return jax.vmap(score)(jnp.array([1, -1]))

        # W is the same for all members, so vmap does not batch it: x @ W stays one large product.
        def score_chunk(_, numbers, examples):
            return None, jax.vmap(score_pair)(numbers, examples)  # (chunk, 2)

        _, scores = self._scan_chunks(score_chunk, None, data)  # (pairs/chunk, chunk, 2)
        return scores.swapaxes(0, 1).reshape(-1, 2)  # in the order of the pairs

    def gradient(self, params, key, scores):
        """g = 1/(Nσ) Σᵢ fᵢ Eᵢ over all N members, like params, from their scores (pairs, 2).

        With normal noise of full rank, its mean is the gradient of the mean of f(θ + σE). Low rank
        changes the mean by O(1/r), if f is bounded and one factor, A or B, is normal. With signs
        in both, the default, there is a further error, which falls with the number of a layer's
        inputs (theory/ has proofs).
        """
        if jnp.shape(scores)[1:] != (2,):
            raise ValueError(f"scores must have shape (pairs, 2), got {jnp.shape(scores)}")
        dtype = jnp.promote_types(jnp.result_type(scores), jnp.float32)
        scores = jnp.asarray(scores, dtype)
        shares = scores / (scores.size * self.sigma)  # fᵢ/(Nσ), (pairs, 2)
        coefficients = shares[:, 0] - shares[:, 1]  # the second member of a pair has -E
        return self.sum_noise(params, key, coefficients)

    def sum_noise(self, params, key, coefficients):
        """Σᵢ cᵢ Eᵢ over the pairs, with coefficients cᵢ (pairs,). It is like params."""
        coefficients = jnp.asarray(coefficients)

        def add_chunk(total, numbers, c):  # (chunk,) both
            noise = jax.vmap(lambda i: self.noise(jax.random.fold_in(key, i), params))(numbers)
            return jax.tree.map(lambda t, e: t + weighted_sum(c, e, t.dtype), total, noise), None

        def zeros(p):  # like the coefficients: under jax.shard_map, they too vary over devices
            dtype = jnp.promote_types(jnp.result_type(p), coefficients.dtype)
            return jnp.zeros_like(coefficients, dtype, jnp.shape(p))

        total, _ = self._scan_chunks(add_chunk, jax.tree.map(zeros, params), coefficients)
        return jax.tree.map(lambda p, t: t.astype(jnp.result_type(p)), params, total)

    def _scan_chunks(self, f, carry, data):
        """jax.lax.scan over chunks of pairs, by a function of carry, indices of pairs, and data.

        XLA unrolls a scan of one step. So with one chunk, in one jit with `evaluate` and
        `gradient`, it sees that both draw the same noise, and draws it once.
        """
        data = jax.tree.map(jnp.asarray, data)
        shapes = [x.shape for x in jax.tree.leaves(data)]
        lengths = {shape[:1] for shape in shapes}
        if len(lengths) != 1 or () in lengths:
            raise ValueError(
                f"data must be arrays that share a first axis, of pairs; got shapes {shapes}"
            )
        pairs = shapes[0][0]
        chunk = pairs if self.chunk is None else self.chunk
        if chunk < 1 or pairs % chunk:
            raise ValueError(f"chunk must divide the pairs, got {chunk=} and {pairs=}")
        if any(axis for x in jax.tree.leaves(data) for axis in jax.typeof(x).sharding.spec):
            raise ValueError(
                "data is sharded over an explicit mesh: make it with axis_types=(AxisType.Auto,), "
                "or put jax.sharding.auto_axes around the step"
            )

        # Arranged as (chunk, pairs/chunk), a chunk is a column. It takes pairs from all over the
        # data, so that each of many devices has an equal share of it.
        shape = (chunk, pairs // chunk)
        columns = jax.tree.map(lambda x: x.reshape(shape + x.shape[1:]), (jnp.arange(pairs), data))

        def body(carry, j):
            numbers, examples = jax.tree.map(lambda x: x[:, j], columns)
            return f(carry, numbers, examples)

        return jax.lax.scan(body, carry, jnp.arange(pairs // chunk))

    def step(self, fitness, params, key, data, lr):
        """One step, θ ← θ + lr · g with g of standardized scores: (new params, scores).

        Call it inside jit: outside, every call compiles anew. For a first try, with d parameters in
        all, let lr = 2σ√(N/d), but at most 2σ, and let it fall. (Chance alone moves an entry with a
        standard deviation of at most √2 · lr/(σ√N).) For Adam and the like, call `evaluate`,
        `standardize` and `gradient` yourself.
        """
        scores = self.evaluate(fitness, params, key, data)
        g = self.gradient(params, key, standardize(scores))
        new = jax.tree.map(lambda p, g: (p + lr * g).astype(jnp.result_type(p)), params, g)
        return new, scores


# … copy up to here: this is the whole method -----------------------------------------------------

# Models: plain functions of plain pytrees, written for arrays and for LowRank alike ---------------


def mlp_init(key, sizes):
    """A layer {W (m, n), b (n,)} for every two consecutive sizes m, n."""
    layers = []
    for i, (m, n) in enumerate(itertools.pairwise(sizes)):
        W = normal(jax.random.fold_in(key, i), (m, n)) / math.sqrt(m)
        layers.append({"W": W, "b": jnp.zeros(n, jnp.float32)})
    return layers


def mlp(params, x):
    """Multilayer perceptron, tanh between its layers: x (..., sizes[0]) to (..., sizes[-1])."""
    *hidden, last = params
    for layer in hidden:
        x = jnp.tanh(x @ layer["W"] + layer["b"])  # (..., n)
    return x @ last["W"] + last["b"]


def rnn_init(key, vocab, hidden):
    """Parameters for `rnn`: `vocab` different tokens and `hidden` units of memory."""
    key_emb, key_W, key_U = jax.random.split(key, 3)
    return {
        "emb": normal(key_emb, (vocab, hidden)),
        "W": normal(key_W, (hidden, 2 * hidden)) / math.sqrt(hidden),
        "U": normal(key_U, (hidden, 2 * hidden)) / math.sqrt(hidden),
        "b": jnp.zeros(2 * hidden, jnp.float32),
        "head": jnp.zeros((hidden, vocab), jnp.float32),
    }


def rnn(params, h, token, next_token):
    """Read a token with memory h (hidden,): the new h, and log₂ p(next_token), ().

    A variant of the minimal gated unit [2], a GRU whose update and reset gate are one, z. With
    [x₁ x₂] = emb[token] W + b and [u₁ u₂] = h U,

        z = sigmoid(x₁ + u₁)    h ← h + z (tanh(x₂ + z u₂) - h)    p ~ exp(h head)
    """
    x1, x2 = jnp.split(params["emb"][token] @ params["W"] + params["b"], 2)  # (hidden,) each
    u1, u2 = jnp.split(h @ params["U"], 2)  # (hidden,) each
    z = jax.nn.sigmoid(x1 + u1)
    h = h + z * (jnp.tanh(x2 + z * u2) - h)
    logits = h @ params["head"]  # (vocab,)
    return h, (logits[next_token] - jax.nn.logsumexp(logits)) / math.log(2)


def bits(params, text, cell=rnn):
    """Σ log₂ p(next token) over text (length + 1,), read from an empty memory: ().

    Minus this is the number of bits that the text takes if the model compresses it. An integer cell
    counts in units of 2⁻⁸ bits.
    """

    def read(h, tokens):
        return cell(params, h, *tokens)

    h = jnp.zeros(params["U"].shape[0], params["U"].dtype)
    h = jnp.zeros_like(cell(params, h, *text[:2])[0])  # shard_map wants the type of later ones
    _, log2_p = jax.lax.scan(read, h, (text[:-1], text[1:]))
    return jnp.sum(log2_p, dtype=log2_p.dtype)


def sample(params, key, token, length, cell=rnn, bit=1):
    """Let the model write: tokens (length,) after the given one.

    `bit` is what one bit is in the cell's log₂ p: 1, and 2⁸ for `int_rnn`.
    """
    vocab = jnp.arange(params["head"].shape[1])
    cell_for_all = jax.vmap(cell, (None, None, None, 0), (None, 0))  # log₂ p of every next token

    def write(carry, key):
        h, token = carry
        h, log2_p = cell_for_all(params, h, token, vocab)  # (hidden,), (vocab,)
        token = jax.random.categorical(key, math.log(2) / bit * log2_p).astype(jnp.int32)
        return (h, token), token

    h = jnp.zeros(params["U"].shape[0], params["U"].dtype)
    _, tokens = jax.lax.scan(write, (h, jnp.int32(token)), jax.random.split(key, length))
    return tokens


# Integers: the same method and network without a float (Sec. 6.1, App. G and H of [1]) ------------

# Fixed point: an int8 i, from -127 to 127, stands for i/16. A parameter is an int32 with 16 more
# bits of fraction. There, updates that are too small to change the int8 add up until they do.


def weights(params):
    """What the network sees of int32 params: matrices in int8, vectors in int32."""

    def round_off(p):
        upper = (p + 2**15) >> 16
        return upper.astype(jnp.int8 if upper.ndim > 1 else jnp.int32)

    return jax.tree.map(round_off, params)


@as_pytree
@dataclass(frozen=True)
class IntEggroll(Eggroll):
    """`Eggroll` without a float: noise, members, scores, update and params are integers.

    sigma   scale of the noise in sixteenths, an integer from 1 to 127: 2 stands for σ = 1/8
    params  int32, from -127 · 2¹⁶ to 127 · 2¹⁶; members have what `weights` makes of them
    lr      an integer: what a pair's vote for its noise adds to a parameter

    The noise has rank 1 and signs for entries, so a member W ± σ a bᵀ is a matrix of integers.
    Models write product(x, M) for x @ M and rows(M, i) for M[i].
    """

    sigma: int = 2

    def noise(self, key, params):
        """E of one pair: of a matrix (m, n) its factors (A (m, 1), B (n, 1)), else an array."""
        return super().noise(key, weights(params))  # of their shapes and dtypes

    def perturb(self, params, noise, sign=1):
        """The member θ + sign · σ · E, of what the network sees."""
        sigma_fits = isinstance(self.sigma, jax.Array) or self.sigma in range(1, 128)
        if not sigma_fits or self.rank != 1 or self.draw != signs:
            raise ValueError(
                "integers take draw=signs, sigma = 1 … 127 (sixteenths) and rank=1, got "
                f"sigma={self.sigma} and rank={self.rank}"
            )
        scale = sign * jnp.int32(self.sigma)
        return jax.tree.map(partial(add_noise, scale=scale), weights(params), noise)

    def gradient(self, params, key, scores):
        """The votes of the pairs, Σ sign(f₊ - f₋) E, like params, of scores (pairs, 2)."""
        plus, minus = jnp.transpose(scores)  # compared, as their difference might overflow
        votes = jnp.int8(plus > minus) - jnp.int8(plus < minus)
        return self.sum_noise(params, key, votes)

    def step(self, fitness, params, key, data, lr):
        """One step, θ ← θ + lr · votes, clipped to ±127 · 2¹⁶: (new params, scores).

        The votes for a weight that does not matter have mean 0 and variance ≤ the number of pairs,
        so that chance moves it by about lr √pairs.
        """
        if not jnp.issubdtype(jnp.result_type(lr), jnp.integer):
            raise ValueError(f"lr must be an integer, got {lr}")
        scores = self.evaluate(fitness, params, key, data)
        votes = self.gradient(params, key, scores)
        lr = jnp.int32(jnp.minimum(lr, 2**30 // len(scores)))  # so that lr · votes cannot overflow
        end = 127 << 16
        new = jax.tree.map(lambda p, v: jnp.clip(p + lr * v, -end, end), params, votes)
        return new, scores


def saturate(x):
    """x (int32), clipped to -127 … 127, as int8."""
    return jnp.clip(x, -127, 127).astype(jnp.int8)


def product(x, M):
    """x M/√m in fixed point, rounded down: x (..., m), M (m, n) in int8 to (..., n) in int32."""
    m = x.shape[-1]
    if x.dtype != jnp.int8 or M.dtype != jnp.int8 or m > 1024:  # beyond 1024, int32 overflows
        raise ValueError(
            f"product takes int8 and at most 1024 inputs, got {x.dtype}, {M.dtype} and {m} inputs"
        )
    dot = partial(jnp.matmul, preferred_element_type=jnp.int32)
    if isinstance(M, LowRank):
        y = dot(x, M.W) + dot(x, M.scale * M.A) @ M.B.mT.astype(jnp.int32)
    else:
        y = dot(x, M)
    y = y * round(2**11 / math.sqrt(m))  # in units of 2⁻⁸ before, of 2⁻¹⁹ now
    return y >> 15  # in sixteenths


def rows(M, i):
    """M[i] in int8: of M (m, n), to (*i.shape, n)."""
    if not isinstance(M, LowRank):
        return M[i]
    return saturate(M.W[i] + jnp.int32((M.scale * M.A[i]) @ M.B.mT))


def exp2(x):
    """2^(x/16) of int8 x, in uint32 and units of 2⁻¹⁶, within 0.31 %; 256 of them can be added."""
    x = jnp.int32(x)
    rest = x & 15  # x = 16 · (x >> 4) + rest
    power = 256 + ((rest * (174 + 5 * rest)) >> 4)  # 2^(rest/16) in units of 2⁻⁸, by a polynomial
    return jnp.uint32(power << ((x >> 4) + 8))


FRACTIONS = (np.arange(256) + 0.5) / 256
LOG2_TABLE = np.int32(np.round(256 * np.log2(1 + FRACTIONS)))  # (256,), in units of 2⁻⁸


def log2(x):
    """log₂ of positive uint32 x, in int32 and units of 2⁻⁸, within 0.005."""
    zeros = jax.lax.clz(x)
    fraction = ((x << zeros) >> 23) & 255  # 8 bits after the leading one
    return (jnp.int32(31 - zeros) << 8) + jnp.asarray(LOG2_TABLE)[fraction]


def int_rnn_init(key, vocab, hidden):
    """Parameters for `int_rnn`: those of `rnn` in int32, without the 1/√m of `product`."""
    params = rnn_init(key, vocab, hidden)
    params["W"] *= math.sqrt(hidden)
    params["U"] *= math.sqrt(hidden)
    return jax.tree.map(lambda p: jnp.int32(saturate(jnp.round(16 * p))) << 16, params)


def int_rnn(params, h, token, next_token):
    """`rnn` in integers, for at most 256 different tokens: h in int8, log₂ p in int32, in 2⁻⁸ bits.

    `saturate` takes the place of tanh, (saturate + 127)/256 that of sigmoid, and p ~ 2^(logit/16).
    """
    x1, x2 = jnp.split(product(rows(params["emb"], token), params["W"]) + params["b"], 2)
    u1, u2 = jnp.split(product(h, params["U"]), 2)  # (hidden,) each
    z = saturate(x1 + u1) + jnp.int32(127)  # in units of 2⁻⁸
    candidate = saturate(x2 + ((z * u2) >> 8))
    h = (h + ((z * (candidate - jnp.int32(h))) >> 8)).astype(jnp.int8)  # int8 - int8 would wrap
    logits = saturate(product(h, params["head"]))  # (vocab,)
    total = jnp.sum(exp2(logits), dtype=jnp.uint32)  # in units of 2⁻¹⁶
    return h, (jnp.int32(logits[next_token]) << 4) - (log2(total) - (16 << 8))


# Command line: train the RNN on text, or on any other file, byte by byte --------------------------


def load_text(path, length):
    """A file, byte by byte, as numbers in uint8: (alphabet, text, windows).

    alphabet  the different bytes of the file, (vocab,); a number is a place in it
    text      the first nine tenths of the file, more than `length` bytes, to learn
    windows   at most 256 windows of 257 bytes from the last tenth, evenly spaced: (count, 257)

    If path is None, the file is Python's own help.
    """
    if path is None:
        from pydoc_data.topics import topics

        data = "\n\n".join(topics.values()).encode()
    else:
        with open(path, "rb") as file:
            data = file.read()
    alphabet = np.unique(np.frombuffer(data, np.uint8))
    byte_to_token = np.searchsorted(alphabet, np.arange(256)).astype(np.uint8)  # (256,)
    tokens = np.frombuffer(data.translate(byte_to_token), np.uint8)
    text, held_out = np.split(tokens, [len(tokens) * 9 // 10])
    if len(text) <= length or len(held_out) < 2:
        raise ValueError(f"--text must have 20 bytes, and more than --length; got {len(data)}")
    window = min(257, len(held_out))
    count = len(held_out) // window
    windows = held_out[: count * window].reshape(count, window)
    chosen = np.linspace(0, count - 1, min(count, 256)).astype(int)
    return alphabet, text, windows[chosen]


def ngram_bits(text, windows, vocab):
    """Bits/byte on windows by the unigrams and bigrams of text, with 0.1 added to every bigram."""
    counts = np.full(vocab**2, 0.1)
    for start in range(0, len(text), 2**20):  # a piece at a time, to save memory
        piece = text[start : start + 2**20 + 1].astype(int)
        counts += np.bincount(piece[:-1] * vocab + piece[1:], minlength=vocab**2)
    counts = counts.reshape(vocab, vocab)
    unigram = counts.sum(axis=0) / counts.sum()  # (vocab,)
    bigram = counts / counts.sum(axis=1, keepdims=True)  # (vocab, vocab)
    token = windows[:, :-1]
    next_token = windows[:, 1:]
    return -np.log2(unigram[next_token]).mean(), -np.log2(bigram[token, next_token]).mean()


def draw_texts(key, text, count, length):
    """Random pieces of text, overlapping or not: (count, length + 1)."""
    starts = jax.random.randint(key, (count, 1), 0, len(text) - length, jnp.int32)
    return text[starts + jnp.arange(length + 1)[None]]


def save(path, kind, params, step):
    """Write a checkpoint to path, where the old one stays until the new one is complete."""
    if path is None:
        return
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"  # of this process alone
    try:
        with open(temporary, "wb") as file:
            np.savez(file, kind=kind, step=step, **params)
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def load(path, kind, params):
    """(params, step) as `save` wrote them to path; without such a file, the given params and 0.

    `kind` describes network and text. ValueError if the file is not a checkpoint of that kind.
    """
    if path is None or not os.path.exists(path):
        return params, 0
    saved = dict(np.load(path)) if zipfile.is_zipfile(path) else {}
    if saved.pop("kind", None) != kind:
        raise ValueError(
            f"{path} is not a checkpoint of this network: --integer, --hidden and the different "
            "bytes of --text must be as they were"
        )
    step = int(saved.pop("step"))
    print(f"goes on from step {step:,}")
    return jax.tree.map(jnp.asarray, saved), step


def number(kind, condition, name):
    """A type for argparse: an argument as an int or float that fulfills the condition."""

    def parse(argument):
        value = kind(argument)
        if not condition(value):
            raise ValueError
        return value

    parse.__name__ = name  # "invalid NAME value", says argparse
    return parse


def make_parser():
    """The command line's options."""
    positive = number(float, lambda x: 0 < x < math.inf, "positive number")
    count = number(int, lambda n: n > 0, "positive whole number")
    even = number(int, lambda n: n > 0 and n % 2 == 0, "positive even number")
    seconds = number(float, lambda x: x >= 0, "number of seconds")
    steps = number(int, lambda n: n >= 0, "number of steps")

    def rank(argument):
        return None if argument == "full" else count(argument)

    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,
        description="Usage: python eggroll.py [OPTION VALUE ...]. Train a recurrent network on "
        "text, without backpropagation. When training goes on from a checkpoint, --integer, "
        "--hidden and the different bytes of --text must stay; other options may change.",
    )
    add = parser.add_argument
    add("--text", help="any file, learned byte by byte (default: Python's own help)")
    add("--integer", action="store_true", help="train the network of integers")
    add("--seconds", type=seconds, default=60, help="how long to train in this run (default 60)")
    add("--steps", type=steps, help="how many steps to train, in place of --seconds")
    add("--population", type=even, default=4096, help="members, an even number (default 4096)")
    add("--chunk", type=count, help="pairs to evaluate at a time, to save memory (default: all)")
    add("--rank", type=rank, default=1, help="rank of the noise (default 1), or full")
    add("--sigma", type=positive, help="scale of the noise (default 0.04; integers: 2 sixteenths)")
    add(
        "--lr",
        type=positive,
        help="learning rate at first; it falls (default 14.35 sigma sqrt(population / parameters), "
        "which is 0.35 without other options; integers: 2^16 / sqrt(population / 2), 1449)",
    )
    add("--hidden", type=count, default=32, help="units of memory (default 32)")
    add("--length", type=count, default=32, help="bytes that a member predicts (default 32)")
    add("--seed", type=int, default=0, help="seed of everything random (default 0)")
    add("--checkpoint", help="file to save to, every two seconds, and to go on from")
    return parser


def learn(options, kind, params, train_step, held_out_bits):
    """Train until time is up or Ctrl-C, from the checkpoint if there is one: (params, step)."""
    goal = options.seconds if options.steps is None else options.steps
    params, first = load(options.checkpoint, kind, params)
    if first == 0 and goal == 0:
        raise ValueError("without training, --checkpoint must name a file that exists")
    save(options.checkpoint, kind, params, first)  # finds out now whether it can be written
    jax.block_until_ready((train_step(params, 0), held_out_bits(params)))  # before the clock starts
    print("compiled", flush=True)

    step = first
    done = reported = 0
    start = time.perf_counter()
    try:
        while done < goal:
            # One statement: Ctrl-C comes before or after both change.
            params, step = jax.block_until_ready(train_step(params, step)), step + 1
            seconds = time.perf_counter() - start
            done = seconds if options.steps is None else step - first
            if seconds > reported + 2:
                reported = seconds
                left = max(0, seconds * (goal / done - 1))
                print(
                    f"step {step:6,}   held-out {held_out_bits(params):.2f} bits/byte   "
                    f"{(step - first) / seconds:.1f} steps/s   {left:.0f} s left",
                    flush=True,
                )
                save(options.checkpoint, kind, params, step)
    except KeyboardInterrupt:
        print("interrupted")
    save(options.checkpoint, kind, params, step)
    return params, step


def train(options):
    """Train, with a line of progress every two seconds; then print a sample and the bits/byte."""
    alphabet, text, windows = load_text(options.text, options.length)
    unigram, bigram = ngram_bits(text, windows, len(alphabet))
    text = jnp.asarray(text)  # on the device, once
    print(f"{len(text):,} bytes to learn, {len(alphabet)} of them different", flush=True)
    key_init, key_train, key_sample = jax.random.split(jax.random.key(options.seed), 3)

    pairs = options.population // 2
    if options.integer:
        es = IntEggroll(options.sigma or 2, options.rank, chunk=options.chunk)
        params = int_rnn_init(key_init, len(alphabet), options.hidden)
        lr = options.lr or 2**16 / math.sqrt(pairs)
        as_lr = math.ceil  # so that it never falls to 0
        cell = int_rnn
        weights_of = weights
        bit = 2**8
    else:
        es = Eggroll(options.sigma or 0.04, options.rank, chunk=options.chunk)
        params = rnn_init(key_init, len(alphabet), options.hidden)
        size = sum(p.size for p in params.values())
        lr = options.lr or 14.35 * es.sigma * math.sqrt(options.population / size)
        as_lr = float
        cell = rnn
        weights_of = lambda params: params
        bit = 1
    fitness = partial(bits, cell=cell)

    @jax.jit
    def generation(params, step, lr, text):
        key_data, key_noise = jax.random.split(jax.random.fold_in(key_train, step))
        texts = draw_texts(key_data, text, pairs, options.length)
        return es.step(fitness, params, key_noise, texts, lr)[0]

    def train_step(params, step):
        return generation(params, step, as_lr(lr / (1 + step / 600)), text)

    @jax.jit
    def held_out_bits(params):
        log2_p = jax.vmap(partial(fitness, weights_of(params)))(windows)
        return -jnp.mean(log2_p) / bit / (windows.shape[1] - 1)

    kind = f"{cell.__name__}, hidden {options.hidden}, bytes {bytes(alphabet)}"
    params, step = learn(options, kind, params, train_step, held_out_bits)
    written = alphabet[sample(weights_of(params), key_sample, text[0], 300, cell, bit)]
    print(
        f"\n{bytes(written).decode(errors='replace')}\n\n"
        f"held-out {held_out_bits(params):.2f} bits/byte after {step:,} steps "
        f"(unigram {unigram:.2f}, bigram {bigram:.2f}; {len(windows)} windows)"
    )


def main(argv=()):
    """Train as the options say; an error in them ends the program with one line."""
    parser = make_parser()
    options = parser.parse_args(argv)
    try:
        train(options)
    except (OSError, ImportError, ValueError, OverflowError, jax.errors.JaxRuntimeError) as error:
        out_of_memory = "out of memory" in str(error).lower()
        parser.error("out of memory: try --chunk" if out_of_memory else str(error))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # the terminal may lack characters of the sample
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(130)  # at once, as XLA may still be compiling in other threads
