"""Every claim of eggroll.py, README.md and theory/, held against something independent.

Statistical tolerances are `SE` standard errors of the estimator, computed from theory or from the
sample itself: at 5 a correct program fails one comparison in a million, whatever the seed.
"""

import itertools
import json
import math
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import nbclient
import nbformat
import numpy as np
import pytest
from scipy import integrate, special, stats

import eggroll
from eggroll import Eggroll, LowRank, dense, normal, signs, standardize, uniform

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_disable_most_optimizations", True)  # compiling takes most of the time
pytestmark = pytest.mark.filterwarnings("error")

HERE = pathlib.Path(__file__).parent
DRAWS = {"normal": normal, "uniform": uniform, "signs": signs}
SE = 5.0
KEY = jax.random.key(0)
PARAMS = {  # a matrix, a stack of matrices, a vector, a scalar
    "W": jnp.linspace(-1, 1, 12).reshape(4, 3),
    "stack": jnp.linspace(1, -1, 18).reshape(2, 3, 3),
    "b": jnp.array([0.1, -0.2, 0.3]),
    "s": jnp.array(0.5),
}


@jax.jit
def wavy(params, x):
    """A fitness that uses every leaf, nonlinear in all: params as arrays, x (4,)."""
    h = x @ params["W"] + params["b"]  # (3,)
    h, _ = jax.lax.scan(lambda h, M: (jnp.tanh(h @ M + M @ h), None), h, params["stack"])
    return jnp.sum(jnp.sin(3 * h)) * params["s"]


def pair_noise(es, key, params, pairs):
    """E of every pair as float64 NumPy arrays (pairs, *shape), formed outside the class."""
    draw = jax.jit(es.noise)
    noise = [draw(jax.random.fold_in(key, i), params) for i in range(pairs)]

    def full(p, *members):
        f64 = [jax.tree.map(lambda x: np.asarray(x, np.float64), e) for e in members]
        return np.stack([e[0] @ e[1].swapaxes(-1, -2) if isinstance(e, tuple) else e for e in f64])

    return jax.tree.map(full, params, *noise)


def many_noises(es, params, count, key=KEY):
    """E of `count` pairs at once, (count, *shape), for the statistics."""
    draw = jax.jit(jax.vmap(lambda i: es.noise(jax.random.fold_in(key, i), params)))
    noise = draw(jnp.arange(count))
    full = [
        np.asarray(e[0] @ e[1].mT if isinstance(e, tuple) else e, np.float64)
        for e in jax.tree.leaves(noise, is_leaf=lambda e: isinstance(e, tuple))
    ]
    return jax.tree.unflatten(jax.tree.structure(params), full)


def assert_mean(samples, expected, tolerance=SE):
    """The mean of independent samples (K, ...) is the expected one within standard errors."""
    samples = np.asarray(samples, np.float64)
    error = samples.std(axis=0, ddof=1) / np.sqrt(len(samples))
    np.testing.assert_array_less(np.abs(samples.mean(axis=0) - expected), tolerance * error + 1e-12)


def close(actual, expected, ulps=64):
    """Equal to rounding, relative to the largest entry."""
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        assert a.shape == e.shape
        np.testing.assert_allclose(a, e, rtol=0, atol=ulps * 1.2e-7 * max(1e-30, np.abs(e).max()))


@pytest.fixture
def optimized():
    """For tests of what XLA makes of the code."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


# Noise -------------------------------------------------------------------------------------------


# E a², E a⁴, E a⁶, E a⁸ of an entry a
MOMENTS = {"normal": (1, 3, 15, 105), "uniform": (1, 9 / 5, 27 / 7, 9), "signs": (1, 1, 1, 1)}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", DRAWS)
def test_entries_have_mean_zero_unit_variance_and_their_kurtosis(name, dtype):
    a = DRAWS[name](KEY, (1024, 1000), dtype)
    assert a.dtype == dtype and a.shape == (1024, 1000)
    a = np.asarray(a, np.float64)
    m2, m4, m6, m8 = MOMENTS[name]
    rounding = 2**-16 if dtype == jnp.bfloat16 else 0  # of a⁴, on average over many values
    for power, expected, variance in (
        (1, 0, m2),
        (2, m2, m4 - m2**2),
        (3, 0, m6),
        (4, m4, m8 - m4**2),
    ):
        assert abs((a**power).mean() - expected) <= SE * np.sqrt(variance / a.size) + rounding


@pytest.mark.parametrize("size", [1, 31, 32, 33, 64, 1000])
def test_signs_are_the_bits_of_the_random_words_in_order(size):
    words = np.asarray(jax.random.bits(KEY, (-(-size // 32),), jnp.uint32))
    bits = [int(w) >> k & 1 for w in words for k in range(32)][:size]
    np.testing.assert_array_equal(signs(KEY, (size,)), 2.0 * np.array(bits) - 1)


def test_signs_are_the_same_under_jit_and_vmap_and_in_any_shape():
    keys = jax.random.split(KEY, 5)
    each = np.stack([signs(k, (7, 11)) for k in keys])
    np.testing.assert_array_equal(jax.vmap(lambda k: signs(k, (7, 11)))(keys), each)
    np.testing.assert_array_equal(
        jax.jit(jax.vmap(lambda k: signs(k, (77,))))(keys), each.reshape(5, 77)
    )
    np.testing.assert_array_equal(
        jax.lax.map(lambda k: signs(k, (7, 11)), keys, batch_size=2), each
    )


@pytest.mark.parametrize("name", DRAWS)
def test_neighbouring_entries_are_uncorrelated(name):
    """Catches a bit used twice: 70 entries are more than two words."""
    a = np.asarray(jax.vmap(lambda k: DRAWS[name](k, (70,)))(jax.random.split(KEY, 20_000)))
    covariance = a.T @ a / len(a)
    variance = np.where(np.eye(70), MOMENTS[name][1] - 1, 1)
    assert (np.abs(covariance - np.eye(70)) <= 6 * np.sqrt(variance / len(a)) + 1e-6).all()


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("rank", [1, 2, 8, None])
def test_noise_has_mean_zero_and_identity_covariance_at_every_rank(name, rank):
    es = Eggroll(1.0, rank, DRAWS[name])
    noise = many_noises(
        es, {"M": jnp.zeros((3, 4)), "S": jnp.zeros((2, 2, 3)), "b": jnp.zeros(2)}, 20_000
    )
    e = np.concatenate([x.reshape(20_000, -1) for x in noise.values()], axis=1)  # (20000, 26)
    assert_mean(e, 0)
    assert_mean(e[:, :, None] * e[:, None, :], np.eye(26), tolerance=6)  # 351 comparisons
    # and the fourth moment of an entry of A Bᵀ/√r is 3 + (k² - 3)/r, k that of the factors
    k = MOMENTS[name][1]
    assert_mean(noise["M"] ** 4, k if rank is None else 3 + (k**2 - 3) / rank)


def test_noise_differs_between_pairs_leaves_layers_and_generations():
    es = Eggroll(1.0, 1, normal)
    params = {"A": jnp.zeros((30, 30)), "B": jnp.zeros((30, 30)), "S": jnp.zeros((2, 30, 30))}
    e = many_noises(es, params, 50)
    other = many_noises(es, params, 50, key=jax.random.key(1))
    draws = [e["A"], e["B"], e["S"][:, 0], e["S"][:, 1], other["A"], np.roll(e["A"], 1, axis=0)]
    for i, x in enumerate(draws):
        for y in draws[:i]:
            products = (x * y).sum(axis=(1, 2))  # one for each pair, mean 0 if independent
            assert_mean(products, 0)
            assert not np.any(np.all(np.isclose(x, y), axis=(1, 2)))


def test_noise_depends_on_nothing_but_key_pair_and_leaf():
    es = Eggroll(1.0, 2, signs)
    alone = es.noise(jax.random.fold_in(KEY, 3), PARAMS)
    vmapped = jax.vmap(lambda i: es.noise(jax.random.fold_in(KEY, i), PARAMS))(jnp.arange(7))
    jax.tree.map(np.testing.assert_array_equal, alone, jax.tree.map(lambda x: x[3], vmapped))
    moved = es.noise(jax.random.fold_in(KEY, 3), jax.tree.map(lambda p: p + 1, PARAMS))
    jax.tree.map(np.testing.assert_array_equal, alone, moved)


# Forward -----------------------------------------------------------------------------------------


def low_rank(shape, r, dtype=jnp.float32):
    *stack, m, n = shape
    W, A, B = jax.random.split(KEY, 3)
    return LowRank(
        normal(W, shape, dtype), normal(A, (*stack, m, r), dtype), normal(B, (*stack, n, r), dtype)
    )


def check(actual, expected, bound):
    """Within the rounding of sums and products whose absolute values add up to `bound`."""
    assert actual.shape == expected.shape
    eps = float(jnp.finfo(actual.dtype).eps)
    assert (np.abs(np.asarray(actual, np.float64) - expected) <= 16 * eps * bound).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("r", [1, 3])
def test_low_rank_multiplies_and_indexes_like_the_dense_matrix(r, dtype):
    M = low_rank((5, 4), r, dtype)
    assert M.shape == (5, 4) and M.ndim == 2 and M.dtype == dtype and M.T.shape == (4, 5)
    W, A, B = (np.asarray(x, np.float64) for x in (M.W, M.A, M.B))
    D, bound = W + A @ B.T, np.abs(W) + np.abs(A) @ np.abs(B).T
    check(jax.jit(dense)(M), D, bound)
    for lead in (), (7,), (2, 7):
        x = normal(jax.random.key(1), (*lead, 5), dtype)
        y = np.asarray(x, np.float64)
        check(jax.jit(lambda x, M: x @ M)(x, M), y @ D, np.abs(y) @ bound)
        x = normal(jax.random.key(1), (*lead, 4), dtype)
        y = np.asarray(x, np.float64)
        check(jax.jit(lambda x, M: x @ M.T)(x, M), y @ D.T, np.abs(y) @ bound.T)
    for tail in (), (7,):
        x = normal(jax.random.key(1), (4, *tail), dtype)
        y = np.asarray(x, np.float64)
        check(jax.jit(lambda x, M: M @ x)(x, M), D @ y, bound @ np.abs(y))
    for i in 2, -1, np.int64(3), jnp.array(1), jnp.array([0, 4, 4]), np.array([[1, 2], [3, 0]]):
        check(jax.jit(lambda i, M: M[i])(i, M), D[np.asarray(i)], bound[np.asarray(i)])


def test_numpy_arrays_multiply_a_low_rank_too():
    M, x = low_rank((5, 4), 2), np.arange(10, dtype=np.float32).reshape(2, 5)
    close(x @ M, x @ np.asarray(dense(M)))
    close(M @ x[:, :4].T, np.asarray(dense(M)) @ x[:, :4].T)


def test_a_stack_is_taken_apart_by_scan_vmap_and_index():
    S, x = low_rank((3, 4, 4), 2), normal(jax.random.key(1), (4,))
    D = np.asarray(dense(S), np.float64)
    assert S.shape == D.shape == (3, 4, 4)
    close(jax.lax.scan(lambda h, M: (h @ M, M @ h), x, S)[0], x @ D[0] @ D[1] @ D[2])
    close(jax.vmap(lambda M: x @ M)(S), np.stack([x @ d for d in D]))
    close(x @ S[1], x @ D[1])
    close(jnp.tile(x, (3, 2, 1)) @ S, np.tile(x, (3, 2, 1)) @ D)


def test_members_share_one_product_with_W():
    """In a population of LowRank, the only product with all of W has no member axis on W."""
    M, x = low_rank((5, 4), 1), jnp.ones((7, 5))
    members = LowRank(M.W, jnp.stack([M.A] * 7), jnp.stack([M.B] * 7))
    population = jax.vmap(lambda x, M: x @ M, in_axes=(0, LowRank(None, 0, 0)))
    close(population(x, members), x @ dense(M))
    jaxpr = jax.make_jaxpr(population)(x, members)
    products = [e for e in jaxpr.eqns if e.primitive.name == "dot_general"]
    assert [[v.aval.shape for v in e.invars] for e in products].count([(7, 5), (5, 4)]) == 1
    assert len(products) == 3 and not any(
        v.aval.shape == (7, 5, 4) for e in jaxpr.eqns for v in e.outvars
    )


OTHERWISE = {
    "M * 2": lambda M, x: M * 2,
    "2 * M": lambda M, x: 2 * M,
    "x * M": lambda M, x: jnp.ones((4, 4)) * M,
    "numpy * M": lambda M, x: np.ones((4, 4)) * M,
    "M + M": lambda M, x: M + M,
    "1 - M": lambda M, x: 1 - M,
    "M / 2": lambda M, x: M / 2,
    "M ** 2": lambda M, x: M**2,
    "-M": lambda M, x: -M,
    "abs": lambda M, x: abs(M),
    "==": lambda M, x: M == x,
    "x !=": lambda M, x: x != M,
    "<": lambda M, x: M < 0,
    "M // 2": lambda M, x: M // 2,
    "2 % M": lambda M, x: 2 % M,
    "2 ** M": lambda M, x: 2**M,
    "M & M": lambda M, x: M & M,
    "int": lambda M, x: int(M),
    "x in M": lambda M, x: 1.0 in M,
    "if M": lambda M, x: bool(M),
    "float": lambda M, x: float(M),
    "len": lambda M, x: len(M),
    "for row in M": lambda M, x: list(M),
    "M[slice]": lambda M, x: M[1:],
    "M[i, j]": lambda M, x: M[0, 1],
    "M[mask]": lambda M, x: M[jnp.array([True, False, True, False])],
    "M[None]": lambda M, x: M[None],
    "M[True]": lambda M, x: M[True],
    "M[1.0]": lambda M, x: M[1.0],
    "M.sum()": lambda M, x: M.sum(),
    "M.reshape": lambda M, x: M.reshape(-1),
    "M.astype": lambda M, x: M.astype(jnp.bfloat16),
    "M.at": lambda M, x: M.at[0].set(0),
    "M.mT": lambda M, x: M.mT,
    "stack.T": lambda M, x: low_rank((2, 3, 4), 1).T,
    "np.asarray": lambda M, x: np.asarray(M),
}
OTHERWISE_IN_JAX = {  # refused by JAX or NumPy, in their own words
    "jnp.sum": lambda M, x: jnp.sum(M),
    "jnp.asarray": lambda M, x: jnp.asarray(M),
    "jnp.tanh": lambda M, x: jnp.tanh(M),
    "jnp.dot": lambda M, x: jnp.dot(x, M),
    "jnp.einsum": lambda M, x: jnp.einsum("i,ij->j", x, M),
    "jnp.where": lambda M, x: jnp.where(True, M, 0),
    "jnp.concatenate": lambda M, x: jnp.concatenate([M, M]),
    "np.sum": lambda M, x: np.sum(M),
    "np.add": lambda M, x: np.add(M, 1),
    "np.dot": lambda M, x: np.dot(np.ones(4), M),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_anything_else_done_to_a_low_rank_is_an_error_that_says_what_to_write(name):
    with pytest.raises(TypeError, match=r"dense\(M\)"):
        OTHERWISE[name](low_rank((4, 4), 1), jnp.ones(4))


@pytest.mark.parametrize("name", OTHERWISE_IN_JAX)
def test_functions_of_jax_and_numpy_refuse_a_low_rank_too(name):
    with pytest.raises(TypeError):
        OTHERWISE_IN_JAX[name](low_rank((4, 4), 1), jnp.ones(4))


def test_low_rank_has_no_made_up_attributes():
    assert not hasattr(low_rank((4, 4), 1), "weight")


def test_dense_leaves_everything_else_untouched():
    tree = {"M": low_rank((3, 2), 1), "b": jnp.ones(2), "none": None, "f": jnp.tanh}
    out = dense(tree)
    assert out["b"] is tree["b"] and out["f"] is jnp.tanh and out["none"] is None
    assert isinstance(out["M"], jax.Array)


# Update: evaluate --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("rank", [1, 3, None])
def test_evaluate_is_a_loop_over_dense_members(name, rank):
    es, pairs = Eggroll(0.3, rank, DRAWS[name]), 7
    x = normal(jax.random.key(1), (pairs, 4))
    E = pair_noise(es, KEY, PARAMS, pairs)

    def member(i, scale):
        return jax.tree.map(lambda p, e: p + scale * e[i], PARAMS, E)

    expected = np.array([[wavy(member(i, s), x[i]) for s in (0.3, -0.3)] for i in range(pairs)])
    assert np.ptp(expected) > 0.1  # the members differ
    close(jax.jit(es.evaluate, static_argnums=0)(wavy, PARAMS, KEY, x), expected, ulps=300)


def test_perturb_is_the_member_at_sigma_and_sign():
    es = Eggroll(0.25, 2, normal)
    E, noise = pair_noise(es, KEY, PARAMS, 1), es.noise(jax.random.fold_in(KEY, 0), PARAMS)
    plus, minus = es.perturb(PARAMS, noise), es.perturb(PARAMS, noise, -1.0)
    assert isinstance(plus["W"], LowRank) and isinstance(plus["stack"], LowRank)
    close(dense(plus), jax.tree.map(lambda p, e: p + 0.25 * e[0], PARAMS, E))
    close(dense(minus), jax.tree.map(lambda p, e: p - 0.25 * e[0], PARAMS, E))


def test_data_may_be_any_pytree_and_fitness_may_be_of_any_kind():
    es = Eggroll(0.1, 1, signs)
    data = {"x": jnp.ones((3, 4)), "seeds": jax.random.split(KEY, 3), "n": (np.arange(3),)}

    def counts(params, example):
        assert example["x"].shape == (4,) and example["n"][0].shape == ()
        jax.random.normal(example["seeds"])
        return jnp.sum(example["x"] @ params["W"] > 0)  # an integer, without a gradient

    scores = es.evaluate(counts, PARAMS, KEY, data)
    assert scores.shape == (3, 2) and scores.dtype == jnp.int32
    assert es.gradient(PARAMS, KEY, scores)["W"].shape == (4, 3)
    assert es.evaluate(lambda p, i: 1.5, PARAMS, KEY, jnp.arange(3)).shape == (3, 2)


def test_a_module_with_static_parts_runs_unchanged():
    """As with Equinox: arrays apart from the rest, then put back where the rest has None."""

    @jax.tree_util.register_dataclass
    @dataclass
    class Linear:
        weight: object
        bias: object
        activation: object

        def __call__(self, x):
            return self.activation(self.weight @ x + self.bias)

    model = Linear(PARAMS["W"], jnp.ones(4), jnp.tanh)
    params = Linear(model.weight, model.bias, None)
    static = Linear(None, None, jnp.tanh)

    def fitness(params, x):
        whole = jax.tree.map(
            lambda s, p: p if s is None else s, static, params, is_leaf=lambda s: s is None
        )
        return jnp.sum(whole(x))

    es, x = Eggroll(0.2, 2, normal), normal(jax.random.key(1), (3, 3))
    E = pair_noise(es, KEY, params, 3)
    expected = [
        [np.tanh((W + s * 0.2 * eW) @ xi + 1 + s * 0.2 * eb).sum() for s in (1, -1)]
        for W, eW, eb, xi in zip([np.asarray(model.weight)] * 3, E.weight, E.bias, np.asarray(x))
    ]
    close(es.evaluate(fitness, params, KEY, x), np.array(expected))
    assert es.gradient(params, KEY, np.array(expected)).weight.shape == (4, 3)


# Update: gradient --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("rank", [1, 3, None])
def test_gradient_is_the_weighted_sum_of_dense_noise(name, rank):
    es, pairs = Eggroll(0.3, rank, DRAWS[name]), 9
    f = np.asarray(normal(jax.random.key(1), (pairs, 2)), np.float64)
    E = pair_noise(es, KEY, PARAMS, pairs)
    expected = jax.tree.map(
        lambda e: (np.tensordot(f[:, 0], e, 1) - np.tensordot(f[:, 1], e, 1)) / (2 * pairs * 0.3), E
    )
    close(jax.jit(es.gradient)(PARAMS, KEY, f), expected)


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("rank", [1, 2, None])
def test_gradient_of_a_linear_fitness_is_jax_grad_with_the_predicted_variance(name, rank):
    """The mean of g is C at every rank, and E|g - C|² = (E|E⟨C, E⟩|² - |C|²)/pairs."""
    m, n, pairs = 3, 4, 64
    C = jnp.linspace(-1, 2, m * n).reshape(m, n)
    es, params = Eggroll(0.7, rank, DRAWS[name]), {"W": jnp.ones((m, n))}

    def fitness(params, _):
        return jnp.trace(params["W"] @ C.T)  # ⟨C, W⟩

    @jax.jit
    @jax.vmap
    def estimate(key):
        return es.gradient(params, key, es.evaluate(fitness, params, key, jnp.zeros(pairs)))["W"]

    g = np.asarray(estimate(jax.random.split(jax.random.key(1), 500)))
    assert_mean(g, jax.grad(fitness)(params, None)["W"])
    k, C2 = MOMENTS[name][1], float((C**2).sum())
    second = m * n + k - 1  # E|E⟨C, E⟩|² / |C|² at full rank
    if rank is not None:
        second = m * n + 2 + ((m + k - 1) * (n + k - 1) - m * n - 2) / rank
    assert_mean(((g - np.asarray(C)) ** 2).sum(axis=(1, 2)), C2 * (second - 1) / pairs)


@pytest.mark.parametrize("rank, pairs", [(1, 2), (1, 5), (2, 2), (2, 5), (1, 20), (None, 1)])
def test_rank_of_the_update_is_pairs_times_r_up_to_full(rank, pairs):
    es = Eggroll(0.1, rank, normal)
    f = normal(jax.random.key(1), (pairs, 2))
    g = np.asarray(es.gradient(jnp.zeros((6, 8)), KEY, f), np.float64)
    expected = 6 if rank is None else min(pairs * rank, 6)
    singular = np.linalg.svd(g, compute_uv=False)
    assert (singular > 1e-5 * singular[0]).sum() == expected


@pytest.mark.parametrize("rank", [1, 2, None])
@pytest.mark.parametrize("chunk", [None, 2])
def test_gradient_uses_the_noise_of_evaluate(rank, chunk):
    """With f = ⟨C, θ⟩: f± = f₀ ± σ⟨C, Eᵢ⟩, so ⟨C, g⟩ is known from the scores alone."""
    es, C = Eggroll(0.2, rank, normal, chunk), normal(jax.random.key(1), (5, 4))
    f = es.evaluate(lambda M, _: jnp.trace(M @ C.T), jnp.zeros((5, 4)), KEY, jnp.zeros(7))
    CE = np.asarray(f[:, 0] - f[:, 1], np.float64) / (2 * 0.2)
    g = es.gradient(jnp.zeros((5, 4)), KEY, f)
    close(jnp.vdot(C, g), np.mean(CE**2))
    other = es.gradient(jnp.zeros((5, 4)), jax.random.key(2), f)
    assert abs(jnp.vdot(C, other) - np.mean(CE**2)) > 0.01 * np.mean(CE**2)


@pytest.mark.parametrize("rank", [2, None])
def test_every_chunk_gives_the_same_answer(rank):
    x, f = normal(jax.random.key(1), (7, 4)), normal(jax.random.key(2), (7, 2))
    evaluate, gradient = jax.jit(Eggroll.evaluate, static_argnums=1), jax.jit(Eggroll.gradient)
    step = jax.jit(Eggroll.step, static_argnums=1)
    whole = Eggroll(0.3, rank, signs)
    for chunk in (1, 3, 100) if rank else (3,):
        parts = Eggroll(0.3, rank, signs, chunk)
        a, b = (evaluate(es, wavy, PARAMS, KEY, x) for es in (parts, whole))
        close(a, b, ulps=300)
        close(gradient(parts, PARAMS, KEY, f), gradient(whole, PARAMS, KEY, f))
    parts = Eggroll(0.3, rank, signs, 2)
    (a, _), (b, _) = (step(es, wavy, PARAMS, KEY, x, 0.1) for es in (parts, whole))
    close(a, b, ulps=1000)


def test_bfloat16_parameters_with_an_update_in_float32():
    """Summed in bfloat16, equal terms would stop counting at 256 of them; here there are 4096."""
    pairs = 4096
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    for chunk in None, 512:
        es = Eggroll(0.5, 1, signs, chunk)
        f = jnp.stack([jnp.ones(pairs), jnp.zeros(pairs)], axis=-1)
        g = jax.jit(es.gradient)(params, KEY, f)
        assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(g))
        E = many_noises(es, params, pairs)
        expected = jax.tree.map(lambda e: e.sum(axis=0) / (2 * pairs * 0.5), E)
        jax.tree.map(
            lambda a, e: np.testing.assert_allclose(np.float64(a), e, rtol=2**-8, atol=1e-6),
            g,
            expected,
        )
        constant = Eggroll(0.5, 1, lambda key, shape, dtype: jnp.ones(shape, dtype), chunk)
        g = jax.jit(constant.gradient)(params, KEY, f)
        assert all((x == 1.0).all() for x in jax.tree.leaves(g))  # Σ 1 / (2 · 4096 · 0.5)
    new, scores = jax.jit(es.step, static_argnums=0)(
        wavy, params, KEY, jnp.ones((8, 4), jnp.bfloat16), 0.1
    )
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(new)) and scores.shape == (8, 2)
    assert new["W"].shape == (4, 3) and not jnp.array_equal(new["W"], params["W"])


def test_numpy_parameters_are_taken_in_the_precision_of_jax():
    """Float64 arrays become float32 without a warning, as everywhere in JAX."""
    params = {"W": np.ones((4, 3)), "b": np.zeros(3)}
    step = jax.jit(Eggroll(0.1, 1, signs).step, static_argnames="fitness")
    for f in step, Eggroll(0.1, 1, signs).step:
        new, _ = f(lambda p, x: jnp.sum(x @ p["W"] + p["b"]), params, KEY, jnp.ones((3, 4)), 0.1)
        assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(new))


def test_float64_parameters_are_handled_in_float64():
    script = """
        import jax, jax.numpy as jnp, numpy as np
        jax.config.update("jax_enable_x64", True)
        from eggroll import Eggroll, signs
        es, C, W = Eggroll(0.1, 2, signs), np.arange(12.0).reshape(4, 3), jnp.zeros((4, 3))
        key = jax.random.key(0)
        f = es.evaluate(lambda M, _: jnp.trace(M @ C.T), W, key, jnp.zeros(50))
        g = es.gradient(W, key, f)
        assert f.dtype == g.dtype == jnp.float64
        d = (f[:, 0] - f[:, 1]) / 0.2
        np.testing.assert_allclose(jnp.vdot(C, g), jnp.mean(d**2), rtol=1e-13)
    """
    subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script)], cwd=HERE, check=True
    )


# Update: standardize, step, errors ---------------------------------------------------------------


def test_standardize_is_the_z_score():
    f = np.asarray(normal(KEY, (50, 2)), np.float64) * 3 + 7
    close(standardize(f), (f - f.mean()) / f.std())
    assert standardize(jnp.arange(6).reshape(3, 2)).dtype == jnp.float32
    for scale, offset in (1e30, 0), (1e-30, 0), (1.0, 1e6):
        z = np.asarray(standardize(jnp.float32(scale * f + offset)), np.float64)
        assert abs(z.mean()) < 1e-5 and abs(z.std() - 1) < 1e-5


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_member_that_is_not_finite_counts_as_the_worst(bad):
    f = np.arange(10.0).reshape(5, 2)
    f[2, 1], g = bad, f.copy()
    g[2, 1] = 0.0
    close(standardize(f), standardize(g))


def test_where_nothing_can_be_told_apart_nothing_is_learnt():
    for f in (
        np.full((4, 2), 0.1),
        np.full((4, 2), np.nan),
        np.zeros((1, 2)),
        np.full((3, 2), np.inf),
    ):
        assert (standardize(f) == 0).all()
    f = np.full((4, 2), np.nan)
    f[0, 0] = 3.0
    assert (standardize(f) == 0).all()


def test_step_survives_members_that_are_not_finite():
    es = Eggroll(1.0, 1, normal)
    step = jax.jit(es.step, static_argnums=0)
    params, scores = step(lambda p, x: jnp.log(p["b"][0] * x), PARAMS, KEY, jnp.ones(64), 0.1)
    assert 0 < np.isfinite(scores).sum() < scores.size
    assert all(np.isfinite(p).all() for p in jax.tree.leaves(params))


def test_step_is_evaluate_standardize_gradient_and_plain_ascent(optimized):
    es, x = Eggroll(0.3, 2, uniform), normal(jax.random.key(1), (9, 4))
    params, scores = jax.jit(es.step, static_argnames="fitness")(wavy, PARAMS, KEY, x, lr=0.5)
    f = np.asarray(jax.jit(es.evaluate, static_argnums=0)(wavy, PARAMS, KEY, x), np.float64)
    close(scores, f, ulps=300)
    g = jax.jit(es.gradient)(PARAMS, KEY, (f - f.mean()) / f.std())
    close(params, jax.tree.map(lambda p, g: p + 0.5 * g, PARAMS, g), ulps=1000)


def test_sigma_may_be_traced_scheduled_and_batched():
    x = normal(jax.random.key(1), (5, 4))
    evaluate = jax.jit(lambda es, x: es.evaluate(wavy, PARAMS, KEY, x))
    sweep = jax.jit(jax.vmap(lambda sigma: Eggroll(sigma, 2).evaluate(wavy, PARAMS, KEY, x)))
    for sigma, row in zip((0.1, 0.4), sweep(jnp.array([0.1, 0.4])), strict=True):
        close(evaluate(Eggroll(sigma, 2), x), row, ulps=300)
        close(evaluate(Eggroll(jnp.float32(sigma), 2), x), row, ulps=300)
    assert evaluate._cache_size() == 2  # a weak and a strong float32: not one for each value


def test_no_tracer_leaks():
    with jax.checking_leaks():
        for chunk in None, 2:
            step = jax.jit(Eggroll(0.1, 1, signs, chunk).step, static_argnames="fitness")
            step(wavy, PARAMS, KEY, jnp.ones((4, 4)), 0.1)


ERRORS = {
    "rank 0": (lambda: Eggroll(0.1, 0), ValueError, "rank .* got 0"),
    "rank 1.5": (lambda: Eggroll(0.1, 1.5), ValueError, "rank .* got 1.5"),
    "chunk 0": (lambda: Eggroll(0.1, chunk=0), ValueError, "chunk .* got 0"),
    "sigma 0": (lambda: Eggroll(0), ValueError, "sigma must be positive and finite, got 0"),
    "sigma -1": (lambda: Eggroll(jnp.float32(-1)), ValueError, "got -1"),
    "sigma nan": (lambda: Eggroll(float("nan")), ValueError, "got nan"),
    "empty": (lambda: scores(data=jnp.zeros((0, 4))), ValueError, r"pairs ≥ 1.*\(0, 4\)"),
    "no data": (lambda: scores(data=None), ValueError, "share a first axis"),
    "scalar data": (lambda: scores(data=jnp.ones(())), ValueError, "pairs ≥ 1"),
    "two lengths": (
        lambda: scores(data=(jnp.ones((3, 4)), jnp.ones(2))),
        ValueError,
        r"\(3, 4\).*\(2,\)",
    ),
    "vector fitness": (lambda: scores(lambda p, x: x), ValueError, r"a scalar, got shape \(4,\)"),
    "tuple fitness": (lambda: scores(lambda p, x: (x[0], x[1])), ValueError, "a scalar, got"),
    "no fitness": (lambda: scores(lambda p, x: None), ValueError, "a scalar, got"),
    "N scores": (
        lambda: Eggroll(0.1).gradient(PARAMS, KEY, jnp.ones(6)),
        ValueError,
        r"got \(6,\)",
    ),
    "three signs": (
        lambda: Eggroll(0.1).gradient(PARAMS, KEY, jnp.ones((2, 3))),
        ValueError,
        "pairs, 2",
    ),
    "no scores": (
        lambda: Eggroll(0.1).gradient(PARAMS, KEY, jnp.ones((0, 2))),
        ValueError,
        r"\(0, 2\)",
    ),
    "int leaf": (
        lambda: scores(params={"n": [jnp.arange(3)]}),
        TypeError,
        r"\['n'\]\[0\].*close over",
    ),
    "function leaf": (lambda: scores(params={"f": jnp.tanh}), TypeError, r"\['f'\].*close over"),
    "float leaf": (lambda: scores(params={"x": 1.0}), TypeError, r"\['x'\].*got 1.0"),
}


DATA = jnp.ones((3, 4))


def scores(fitness=lambda params, x: 0.0, params=PARAMS, data=DATA):
    return Eggroll(0.1).evaluate(fitness, params, KEY, data)


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_was_expected_and_what_came(name):
    call, kind, message = ERRORS[name]
    with pytest.raises(kind, match=message):
        call()


# What the compiler makes of it -------------------------------------------------------------------


def compiled_step(chunk=None, draw=signs, pairs=128, width=64):
    """The step of a two-layer net, its parameters `width` square."""
    params = [jnp.zeros((width, width))] * 2

    def fitness(params, x):
        return jnp.sum(jnp.tanh(jnp.tanh(x @ params[0]) @ params[1]))

    step = jax.jit(Eggroll(0.1, 1, draw, chunk).step, static_argnums=0)
    return step.lower(fitness, params, KEY, jnp.ones((pairs, width)), 0.1).compile()


def largest_array(compiled):
    shapes = re.findall(r"\w\d+\[([\d,]+)\]", compiled.as_text())
    return max(np.prod([int(n) for n in shape.split(",")]) for shape in shapes)


def test_nothing_of_the_size_of_a_perturbed_matrix_per_member_exists(optimized):
    pairs, width = 128, 64
    compiled = compiled_step(None, signs, pairs, width)
    assert largest_array(compiled) <= 4 * pairs * width  # far below pairs · width²
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * pairs * width**2 / 4
    full_rank = jax.jit(Eggroll(0.1, None).gradient)  # and the two measures can tell
    full_rank = full_rank.lower([jnp.zeros((width, width))], KEY, jnp.ones((pairs, 2))).compile()
    assert largest_array(full_rank) >= pairs * width**2


@pytest.mark.parametrize("draw", [signs, normal, uniform])
def test_a_step_draws_its_noise_once(draw, optimized):
    """Random bits come from loops of threefry; a second draw would add to them, as in chunks."""

    def loops(compiled):
        return compiled.as_text().count(" while(")

    params, x = [jnp.zeros((64, 64))] * 2, jnp.ones((128, 64))
    evaluate = jax.jit(Eggroll(0.1, 1, draw).evaluate, static_argnums=0)
    alone = evaluate.lower(lambda p, x: jnp.sum(x @ p[0] @ p[1]), params, KEY, x).compile()
    assert loops(alone) > 0
    assert loops(compiled_step(None, draw)) == loops(alone)
    assert loops(compiled_step(64, draw)) > loops(alone)


def test_chunks_bound_memory(optimized):
    """Four times the population in chunks of the same size needs hardly more memory."""
    small, large = compiled_step(64, pairs=256), compiled_step(64, pairs=1024)
    whole = compiled_step(None, pairs=1024)
    memory = [c.memory_analysis().temp_size_in_bytes for c in (small, large, whole)]
    assert memory[1] < 1.5 * memory[0] and memory[1] < memory[2] / 4


# Many devices ------------------------------------------------------------------------------------

SHARDED = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from eggroll import Eggroll, mlp, mlp_init, signs

if len(sys.argv) == 3:  # the number of this process, and a port
    address = f"127.0.0.1:{sys.argv[2]}"
    jax.distributed.initialize(address, num_processes=2, process_id=int(sys.argv[1]))
key = jax.random.key(0)
params = mlp_init(key, (32, 64, 64, 8))
x = np.asarray(jax.random.normal(key, (256, 4, 32)))  # 256 pairs
numbers_of_pairs = np.arange(256)  # which stay on the host

def fitness(params, example):
    i, x = example
    return -jnp.mean((mlp(params, x) - jnp.sin(x[:, :8] + i)) ** 2)

def step(chunk):
    return jax.jit(Eggroll(0.1, 2, signs, chunk).step, static_argnames="fitness")

def numbers(params, scores):
    return [np.asarray(a).tolist() for a in jax.tree.leaves((params, scores))]

def print_step(chunk, params, data):
    compiled = step(chunk).lower(fitness, params, key, data, 0.1).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    results = numbers(*compiled(params, key, data, 0.1))
    print(json.dumps({"numbers": results, "temporary": temporary, "hlo": compiled.as_text()}))
"""

ON_8_DEVICES = """
mode, chunk, sharded_params, context = json.loads(sys.argv[1])
types = (getattr(AxisType, mode),) * 2
mesh = jax.make_mesh((4, 2) if sharded_params else (8, 1), ("pairs", "model"), axis_types=types)
data = numbers_of_pairs, jax.device_put(x, NamedSharding(mesh, P("pairs")))
if sharded_params:  # the middle layer, over the axis called model
    W = NamedSharding(mesh, P(None, "model"))
    params[1] = {"W": jax.device_put(params[1]["W"], W), "b": params[1]["b"]}
if context:
    jax.set_mesh(mesh)
    step(chunk)(fitness, params, key, (numbers_of_pairs, x), 0.1)  # data that is on no mesh
print_step(chunk, params, data)
"""

ONE_OF_TWO_PROCESSES = """
mesh = jax.make_mesh((2,), ("pairs",))
over_pairs = NamedSharding(mesh, P("pairs"))
data = jax.device_put((numbers_of_pairs, x), over_pairs)
new, scores = step(None)(fitness, params, key, data=data, lr=0.1)
assert jax.process_count() == 2 and not scores.is_fully_addressable
print(json.dumps(numbers(new, scores.addressable_shards[0].data)))
"""


def start(script, *args, devices=1):
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    command = [sys.executable, "-W", "error", "-c", script, *map(str, args)]
    return subprocess.Popen(
        command, cwd=HERE, env=os.environ | flags, stdout=subprocess.PIPE, text=True
    )


def result(process):
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return json.loads(out.splitlines()[-1])


def arrays(lists):
    return [np.array(x) for x in lists]


@pytest.fixture(scope="module")
def single():
    """One step on one device."""
    return result(start(SHARDED + "print_step(None, params, (numbers_of_pairs, x))"))


@pytest.mark.parametrize(
    "mode, context, chunk",
    [
        ("Auto", False, None),
        ("Auto", False, 64),
        ("Explicit", False, 64),
        ("Explicit", True, None),
    ],
)
def test_eight_devices_give_the_answer_of_one(mode, context, chunk, single):
    """All that travels is the update and scalars; each device needs an eighth of the memory."""
    options = json.dumps((mode, chunk, False, context))
    got = result(start(SHARDED + ON_8_DEVICES, options, devices=8))
    close(arrays(got["numbers"]), arrays(single["numbers"]), ulps=300)
    assert got["temporary"] < 1.3 / 8 * single["temporary"]
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    found = re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", got["hlo"])
    assert {kind for _, kind in found} == {"all-reduce"}
    shapes = [shape for what, _ in found for shape in re.findall(r"\w+\[([\d,]*)\]", what)]
    sizes = [math.prod(int(n) for n in shape.split(",") if n) for shape in shapes]
    parameters = 32 * 64 + 64 + 64 * 64 + 64 + 64 * 8 + 8
    assert sum(n for n in sizes if n > 1) == parameters and sizes.count(1) <= 8


@pytest.mark.parametrize("mode", ["Auto", "Explicit"])
def test_parameters_may_be_sharded_too(mode, single):
    options = json.dumps((mode, None, True, False))
    got = result(start(SHARDED + ON_8_DEVICES, options, devices=8))
    close(arrays(got["numbers"]), arrays(single["numbers"]), ulps=300)


def test_two_processes_give_the_answer_of_one(single):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = [start(SHARDED + ONE_OF_TWO_PROCESSES, i, port) for i in range(2)]
    with ThreadPoolExecutor() as pool:  # both at once, since they wait for each other
        first, second = map(arrays, pool.map(result, processes))
    close(first[:-1], second[:-1], ulps=0)
    *params, scores = arrays(single["numbers"])
    close(first[:-1], params, ulps=300)
    close(np.concatenate([first[-1], second[-1]]), scores, ulps=300)


# The formulas of theory/: laws of the entries, exact means ----------------------------------------

# A law of the entries is (values, probabilities): exact for two points, else a Gauss rule.


def gauss(rule, points, scale=1.0):
    x, w = rule(points)
    return scale * x, w / w.sum()


def two_points(p):
    """Zero mean, unit variance, skewness (1 - 2p)/√(p(1 - p))."""
    return np.array([math.sqrt((1 - p) / p), -math.sqrt(p / (1 - p))]), np.array([p, 1 - p])


NORMAL = gauss(np.polynomial.hermite_e.hermegauss, 28)
UNIFORM = gauss(np.polynomial.legendre.leggauss, 24, math.sqrt(3))
SIGNS, SKEWED = two_points(0.5), two_points(0.2)
LAWS = {"normal": NORMAL, "uniform": UNIFORM, "signs": SIGNS}
# Three points make a Gauss rule exact for moments up to the fifth, seven up to the thirteenth.
NORMAL3 = gauss(np.polynomial.hermite_e.hermegauss, 3)
UNIFORM3 = gauss(np.polynomial.legendre.leggauss, 3, math.sqrt(3))
LAWS3 = {"normal": NORMAL3, "uniform": UNIFORM3, "signs": SIGNS}
every_law = pytest.mark.parametrize("law", LAWS)


def moment(law, s):
    return law[1] @ law[0] ** s


def grid(law, size):
    """All values of `size` independent entries, (points, size), and their probabilities."""
    values = np.array(list(itertools.product(law[0], repeat=size)))
    return values, np.array(list(itertools.product(law[1], repeat=size))).prod(1)


def enumerate_noise(m, n, r, law_a, law_b):
    """All values of E = A Bᵀ/√r, (points, m, n), and their probabilities."""
    A, p = grid(law_a, m * r)
    B, q = grid(law_b, n * r)
    E = np.einsum("amr,bnr->abmn", A.reshape(-1, m, r), B.reshape(-1, n, r)) / math.sqrt(r)
    return E.reshape(-1, m, n), np.outer(p, q).ravel()


def phi(omega, r, law_a, law_b=None):
    """φ_r(ω) and ∇φ_r(ω); for normal factors in closed form, see test_wave_closed_form."""
    if law_a is NORMAL:
        matrix = np.eye(len(omega)) + omega @ omega.T / r
        value = np.linalg.det(matrix) ** (-r / 2) + 0j
        return value, -value * np.linalg.solve(matrix, omega)
    return phi_sum(omega, r, law_a, law_b)


def phi_sum(omega, r, law_a, law_b=None):
    """φ_r(ω) and ∇φ_r(ω): φ_r(ω) = φ_1(ω/√r)^r and φ_1(t) = E_b Πᵢ ψ(yᵢ), y = t b."""
    t = omega / math.sqrt(r)
    b, q = grid(law_b or law_a, omega.shape[1])  # (points, n)
    waves = np.exp(1j * (b @ t.T)[..., None] * law_a[0])  # (points, m, values)
    psi, dpsi = waves @ law_a[1], waves @ (1j * law_a[0] * law_a[1])  # (points, m)
    phi_1 = q @ psi.prod(1)
    rows = [(q * dpsi[:, i] * np.delete(psi, i, 1).prod(1)) @ b for i in range(len(t))]
    return phi_1**r, math.sqrt(r) * phi_1 ** (r - 1) * np.array(rows)


def fourth_cumulant(omega, k_a, k_b=None):
    """K₄ and ∇K₄ of page 3, with a kurtosis for either factor."""
    k_b = k_a if k_b is None else k_b
    G = omega @ omega.T
    rho, c = (omega**2).sum(1), (omega**2).sum(0)
    K = 6 * np.sum(G**2) + 3 * (k_a - 3) * np.sum(rho**2) + 3 * (k_b - 3) * np.sum(c**2)
    K += (k_a - 3) * (k_b - 3) * np.sum(omega**4)
    gradient = 24 * G @ omega + 4 * (k_a - 3) * (k_b - 3) * omega**3
    gradient += 12 * ((k_a - 3) * rho[:, None] + (k_b - 3) * c[None]) * omega
    return K, gradient


def wave_of_norm(norm, shape=(3, 3), seed=0):
    omega = np.random.default_rng(seed).normal(size=shape)
    return omega * norm / np.linalg.norm(omega)


def normal_limit(omega):
    """φ_∞ and ∇φ_∞."""
    value = math.exp(-np.sum(omega**2) / 2)
    return value, -value * omega


def slopes(ranks, errors):
    return np.diff(np.log(errors)) / np.diff(np.log(ranks))


def numerical_gradient(f, x, h=1e-5):
    steps = h * np.eye(x.size).reshape(-1, *x.shape)
    return np.array([(f(x + d) - f(x - d)) / (2 * h) for d in steps]).reshape(x.shape)


def estimates(es, fitness, params, pairs, batches=64, one_sided=False):
    """Independent gradients of the project's own code, (batches, *params.shape).

    one_sided makes it (batches, 2, *params.shape): from pairs, and from the members +E alone.
    """

    def one(key):
        f = es.evaluate(lambda p, _: fitness(p), params, key, jnp.zeros(pairs))
        if not one_sided:
            return es.gradient(params, key, f)
        alone = jnp.stack([2 * f[:, 0], jnp.zeros(pairs)], -1)
        return jax.vmap(lambda f: es.gradient(params, key, f))(jnp.stack([f, alone]))

    keys = jax.random.split(KEY, batches)
    return np.asarray(jax.jit(lambda keys: jax.lax.map(one, keys))(keys), np.float64)


# theory/1-gradient.md ------------------------------------------------------------


def test_sign_of_the_score():
    """Page 1: ∇J = +E[E f(θ + σE)]/σ, against a numerical derivative of J, for a fitness."""
    E, p = grid(gauss(np.polynomial.hermite_e.hermegauss, 24), 2)
    sigma, theta = 0.6, np.array([0.3, -0.5])

    def f(x):
        return np.sin(x[..., 0] - 2 * x[..., 1]) + x[..., 0] ** 3

    g = (p * f(theta + sigma * E)) @ E / sigma
    np.testing.assert_allclose(
        g, numerical_gradient(lambda t: p @ f(t + sigma * E), theta), atol=1e-8
    )
    x = 0.3 + sigma * E  # the derivative of log π at θ is (x - θ)/σ²
    log_pi = stats.norm(loc=0.3 + np.array([-1e-5, 1e-5])[:, None, None], scale=sigma).logpdf(x)
    np.testing.assert_allclose((log_pi[1] - log_pi[0]) / 2e-5, E / sigma, atol=1e-6)


def test_smoothing():
    """Page 1: J of a quadratic is f + σ² tr H/2, ∇J = ∇f = E∇f; J of a step is an erf."""
    E, p = grid(NORMAL3, 2)
    sigma, theta, c = 0.6, np.array([0.3, -0.5]), np.array([1.0, -2.0])
    H = np.array([[1.0, 0.4], [0.4, -3.0]])

    def f(x):
        return x @ c + np.einsum("...i,ij,...j", x, H, x) / 2

    assert p @ f(theta + sigma * E) == pytest.approx(f(theta) + sigma**2 / 2 * np.trace(H))
    np.testing.assert_allclose((p * f(theta + sigma * E)) @ E / sigma, c + H @ theta)
    np.testing.assert_allclose(p @ (c + (theta + sigma * E) @ H), c + H @ theta)
    for x in -0.7, 0.1:
        J = 1 - 2 * stats.norm.cdf(-x / sigma)  # P(x + σE > 0) - P(x + σE < 0)
        assert J == pytest.approx(special.erf(x / (sigma * math.sqrt(2))))
        slope = special.erf((x + 1e-5) / sigma / 2**0.5) - special.erf((x - 1e-5) / sigma / 2**0.5)
        assert slope / 2e-5 == pytest.approx(2 / sigma * stats.norm.pdf(x / sigma))


def test_gradient_of_a_step():
    """Page 1: the code's gradient of sign(x) is (2/σ) φ(θ/σ), where f has derivative zero."""
    theta, sigma = jnp.array([0.3]), 0.6
    g = estimates(Eggroll(sigma, None), lambda x: jnp.sign(x[0]), theta, pairs=256)
    assert_mean(g, 2 / sigma * stats.norm.pdf(0.3 / sigma))


def test_pair_sees_the_odd_part():
    """Page 1: the even part of the fitness, so also any baseline, leaves the update as it is."""
    es, W, key = Eggroll(0.5), jnp.zeros((3, 2)), KEY

    def fitness(M, weight):
        odd = jnp.sum(jnp.arange(1.0, 4.0) @ M)
        return odd + weight * (jnp.cos(jnp.sum(jnp.ones(3) @ M)) + 5)

    @jax.jit
    def g(weight):
        return es.gradient(W, key, es.evaluate(fitness, W, key, jnp.full(8, weight)))

    # float32 rounding of fitnesses below 20 over σ = 0.5 and |E| below 10
    np.testing.assert_allclose(g(1.0), g(0.0), rtol=1e-4, atol=1e-4)


def test_variance_of_pairs():
    """Page 1: the variance of N = 2 members, independent and paired, by enumerating both.

    For a linear fitness with f(θ) = 0 pairs have twice the variance.
    """
    E, p = enumerate_noise(2, 2, 1, SIGNS, SIGNS)
    E, sigma = E.reshape(-1, 4), 0.7
    C = np.array([0.4, -1.0, 0.3, 0.8])
    for offset, linear in (0.0, False), (3.0, False), (-0.2 * C.sum(), True):

        def f(x, offset=offset, linear=linear):
            return offset + (x @ C if linear else np.sin(x @ C) + 0.5 * (x @ C) ** 2)

        up, down = f(0.2 + sigma * E), f(0.2 - sigma * E)
        g = (p * up) @ E / sigma
        S_o = p @ ((E**2).sum(1) * ((up - down) / 2) ** 2)
        S_e = p @ ((E**2).sum(1) * ((up + down) / 2) ** 2)
        one, pair = up[:, None] * E / sigma, (up - down)[:, None] * E / (2 * sigma)
        two = (one[:, None] + one[None]) / 2  # two independent members, all their outcomes
        independent = np.einsum("a,b,abi->", p, p, (two - g) ** 2)
        paired = np.einsum("a,ai->", p, (pair - g) ** 2)
        assert independent == pytest.approx(((S_o + S_e) / sigma**2 - g @ g) / 2)
        assert paired == pytest.approx(S_o / sigma**2 - g @ g)
        assert (paired < independent) == (S_e > S_o - sigma**2 * g @ g)
        assert (abs(paired - 2 * independent) < 1e-9) == linear
        f_e = (up + down) / 2
        more = p @ ((E**2).sum(1) * (f_e + 2) ** 2) - S_e
        assert more == pytest.approx(p @ ((E**2).sum(1) * (4 + 4 * f_e)))


def test_best_baseline():
    """Page 1: E‖E‖²(f - β)² is least at β = E[‖E‖² f]/E‖E‖², which is E f if ‖E‖² is constant."""
    for law, constant in (NORMAL3, False), (SIGNS, True):
        E, p = grid(law, 3)
        f, square = np.exp(E @ np.array([0.3, -0.2, 0.5])), (E**2).sum(1)
        best = p @ (square * f) / (p @ square)
        cost = [p @ (square * (f - best - d) ** 2) for d in (-1e-3, 0, 1e-3)]
        assert cost[1] < min(cost[0], cost[2])
        assert (abs(best - p @ f) < 1e-12) == constant


def test_standardized_update():
    """Page 1: the update is ĝ/s, the same for f and λf + c; a single pair counts as +1 and -1."""
    key = KEY
    update = jax.jit(lambda f: Eggroll(0.5).gradient(jnp.zeros((3, 2)), key, f))
    f = np.random.default_rng(0).normal(size=(16, 2))
    g = update(standardize(f))
    np.testing.assert_allclose(g, update(f) / f.std(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(g, update(standardize(7 * f + 3)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(standardize(jnp.array([[0.2, 0.9]])), [[-1, 1]], rtol=1e-6)


# theory/2-low-rank-noise.md ------------------------------------------------------------


@every_law
@pytest.mark.parametrize("r", [1, 2])
def test_moments_of_the_noise(law, r):
    """Page 2: covariance I, E Eᵢⱼ⁴ = 3 + (k² - 3)/r, rectangles of mean 1/r, at every rank."""
    law = LAWS3[law]
    E, p = enumerate_noise(2, 2, r, law, law)
    flat, k = E.reshape(-1, 4), moment(law, 4)
    np.testing.assert_allclose(p @ flat, 0, atol=1e-12)
    np.testing.assert_allclose(flat.T @ (p[:, None] * flat), np.eye(4), atol=1e-12)
    np.testing.assert_allclose(p @ flat**4, 3 + (k**2 - 3) / r)
    assert p @ flat.prod(1) == pytest.approx(1 / r)


def density(z, r):
    """Page 2: the density of one entry of E for normal factors."""
    x, nu = math.sqrt(r) * np.abs(z), (r - 1) / 2
    return math.sqrt(r / math.pi) / special.gamma(r / 2) * (x / 2) ** nu * special.kv(nu, x)


@pytest.mark.parametrize("r", [1, 2, 10])
def test_marginal_density(r):
    """Page 2 (Theorem 4, Fig. 3): (1 + ω²/r)^(-r/2), its density, and the entries of the code."""

    def mean(f):  # over z > 0, substituting z = u² for the logarithm at zero
        return 2 * integrate.quad(lambda u: f(u * u) * density(u * u, r) * 2 * u, 0, 7)[0]

    assert mean(lambda z: 1) == pytest.approx(1, abs=1e-7)
    z = np.array([0.1, 1.0, 3.0])
    if r == 1:
        np.testing.assert_allclose(density(z, r), special.k0(z) / math.pi)
    if r == 2:
        np.testing.assert_allclose(density(z, r), np.exp(-math.sqrt(2) * z) / math.sqrt(2))
    keys = jax.random.split(KEY, 20_000)

    def entries(draw):
        noise = jax.vmap(lambda key: Eggroll(1.0, r, draw).noise(key, jnp.zeros((1, 1))))
        A, B = (np.asarray(x, float) for x in jax.jit(noise)(keys))
        return (A @ B.mT).ravel()

    drawn = entries(normal)
    for omega in 0.5, 1.5, 4.0:
        exact = (1 + omega**2 / r) ** (-r / 2)
        given_b = integrate.quad(
            lambda b, w=omega: math.exp(-((w * b) ** 2) / (2 * r)) * stats.norm.pdf(b), -9, 9
        )
        assert given_b[0] ** r == pytest.approx(exact, abs=1e-6)
        assert mean(lambda z, omega=omega: math.cos(omega * z)) == pytest.approx(exact, abs=1e-6)
        assert_mean(np.cos(omega * drawn), exact)
    points = (2 * np.arange(r + 1) - r) / math.sqrt(r)  # with signs: binomial on these points
    hits = np.isclose(entries(signs)[:, None], points, atol=1e-5)
    assert np.all(hits.sum(1) == 1)
    assert_mean(hits.astype(float), stats.binom.pmf(np.arange(r + 1), r, 0.5))


@every_law
def test_no_gradient_of_its_own(law):
    """Page 2: at finite rank E[E f]/σ is not the gradient φ_r Ω of E f(θ + σE) with the same E."""
    law, sigma, r = LAWS[law], 0.8, 2
    Omega = wave_of_norm(1.5, (2, 2))
    value, slope = phi(sigma * Omega, r, law)
    if law is SIGNS:  # small enough to enumerate: both gradients from their definitions
        E, p = enumerate_noise(2, 2, 2, law, law)
        wave = np.tensordot(E, sigma * Omega, 2)
        np.testing.assert_allclose(p @ np.cos(wave), value.real)
        np.testing.assert_allclose(np.tensordot(p * np.sin(wave), E, 1), -slope.real, atol=1e-12)
        own = numerical_gradient(lambda t: p @ np.sin(np.sum(Omega * t) + wave), np.zeros((2, 2)))
        np.testing.assert_allclose(own, value.real * Omega, atol=1e-8)
    if law is NORMAL:
        g = np.linalg.solve(np.eye(2) + sigma**2 * Omega @ Omega.T / r, value.real * Omega)
        np.testing.assert_allclose(-slope.real / sigma, g, atol=1e-6)
    assert np.linalg.norm(-slope.real / sigma - value.real * Omega) > 0.05


@every_law
@pytest.mark.parametrize("r", [1, 2])
def test_exact_to_degree_two(law, r):
    """Page 2: for a polynomial of degree two g_r = ∇f at every rank; page 4: so for linear f."""
    E, p = enumerate_noise(2, 2, r, LAWS3[law], LAWS3[law])
    C, H, sigma = wave_of_norm(1.0, (2, 2)), wave_of_norm(1.0, (4, 4), 1), 0.7
    flat = sigma * E.reshape(-1, 4)
    f = 3 + flat @ C.ravel() + np.einsum("si,ij,sj->s", flat, H, flat)
    np.testing.assert_allclose(np.tensordot(p * f, E, 1) / sigma, C, atol=1e-12)


# theory/3-convergence.md ------------------------------------------------------------


@pytest.mark.parametrize("r", [1, 2, 7])
def test_wave_closed_form(r):
    """Page 3: normal factors have φ_r = det(I + G/r)^(-r/2) and g_r = φ_r (I + G/r)⁻¹ Ω."""
    omega = wave_of_norm(1.8)
    value, slope = phi_sum(omega, r, NORMAL)
    matrix = np.eye(3) + omega @ omega.T / r
    exact = np.linalg.det(matrix) ** (-r / 2)
    assert value == pytest.approx(exact, abs=1e-7)
    np.testing.assert_allclose(-slope, exact * np.linalg.solve(matrix, omega), atol=1e-6)
    for law in LAWS.values():
        value, slope = phi(omega, r, law)
        numeric = numerical_gradient(lambda w, law=law: phi(w, r, law)[0].real, omega)
        np.testing.assert_allclose(slope, numeric, atol=1e-8)


def test_characteristic_function_by_enumeration():
    """Page 3: φ_r(ω) = φ_1(ω/√r)^r and φ_1 = E_b Πᵢ ψ(yᵢ), against E cos⟨ω, E⟩ for signs."""
    omega = wave_of_norm(1.8, (2, 3))
    for r in 1, 2:
        E, p = enumerate_noise(2, 3, r, SIGNS, SIGNS)
        wave = np.tensordot(E, omega, 2)
        value, slope = phi(omega, r, SIGNS)
        assert value == pytest.approx(p @ np.exp(1j * wave))
        np.testing.assert_allclose(-slope, np.tensordot(p * np.sin(wave), E, 1), atol=1e-12)


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("r", [1, 2, 8])
def test_code_lands_on_the_wave(draw, r):
    """Page 3: the mean of Eggroll.gradient on sin⟨Ω, M⟩ is g_r = -∇φ_r/σ."""
    sigma, omega = 0.5, wave_of_norm(1.5)
    Omega = jnp.asarray(omega / sigma, jnp.float32)

    def wave(M):  # Σᵢ Ωᵢ·(eᵢ M), a function of M that only multiplies
        return jnp.sin(jnp.sum(Omega * (jnp.eye(3) @ M)))

    def exact(r):
        return -phi(omega, r, LAWS[draw])[1].real / sigma

    g = estimates(Eggroll(sigma, r, DRAWS[draw]), wave, jnp.zeros((3, 3)), 4096)
    assert_mean(g, exact(r))
    # and this can tell ranks 1, 2 and 8 from each other and from full rank
    error = np.linalg.norm(g.std(axis=0)) / math.sqrt(len(g))
    others = [exact(q) for q in (1, 2, 8) if q != r] + [-normal_limit(omega)[1] / sigma]
    assert min(np.linalg.norm(exact(r) - other) for other in others) > 5 * error


@pytest.mark.parametrize("law", [*LAWS, "skewed a"])
def test_bound_for_every_draw(law):
    """Page 3: ‖g_r - g_∞‖ ≤ (M₄ + 3)/(σr) (‖ω‖³/6 + ‖ω‖⁵/24), and its steps, at every rank."""
    law_a, law_b = (SKEWED, SIGNS) if law == "skewed a" else (LAWS[law],) * 2
    M = max(3, moment(law_a, 4), moment(law_b, 4)) ** 2
    for norm, shape in itertools.product((0.1, 0.5, 1, 2, 4), ((1, 1), (3, 2), (2, 3))):
        omega = wave_of_norm(norm, shape, seed=int(10 * norm))
        limit, limit_slope = normal_limit(omega)
        for r in 1, 2, 16, 256:
            value, slope = phi(omega, r, law_a, law_b)
            assert abs(value - limit) <= (M + 3) / r * norm**4 / 24 + 1e-9
            error = np.linalg.norm(slope - limit_slope)
            assert error <= (M + 3) / r * (norm**3 / 6 + norm**5 / 24) + 1e-9


@every_law
@pytest.mark.parametrize("r", [1, 2])
def test_superposition_of_waves(law, r):
    """Page 3: the bound for a bump exp(-‖M‖²/2), a mixture of waves with Ω normal, away from 0."""
    rule = {
        "normal": gauss(np.polynomial.hermite_e.hermegauss, 5),
        "uniform": gauss(np.polynomial.legendre.leggauss, 5, math.sqrt(3)),
        "signs": SIGNS,
    }[law]
    d = 4 if r == 1 else 1  # 2×2 at rank one, 1×1 at rank two: small enough for a grid
    side = math.isqrt(d)
    E, p = enumerate_noise(side, side, r, rule, rule)
    theta = np.linspace(-0.4, 0.9, d)
    for sigma in 0.1, 0.4:
        f = np.exp(-((theta + sigma * E.reshape(-1, d)) ** 2).sum(1) / 2)
        g_r = (p * f) @ E.reshape(-1, d) / sigma
        width = 1 + sigma**2  # the bump smoothed by a Gaussian is a wider, lower bump
        g = -theta / width * width ** (-d / 2) * math.exp(-theta @ theta / (2 * width))
        third, fifth = (
            2 ** (s / 2) * special.gamma((d + s) / 2) / special.gamma(d / 2) for s in (3, 5)
        )  # E‖Ω‖³, E‖Ω‖⁵
        bound = 12 / r * (sigma**2 * third / 6 + sigma**4 * fifth / 24)
        assert 0 < np.linalg.norm(g_r - g) <= bound


@pytest.mark.parametrize(
    "laws", [(NORMAL3,) * 2, (UNIFORM3,) * 2, (SIGNS,) * 2, (SKEWED, UNIFORM3)]
)
def test_fourth_cumulant(laws):
    """Page 3: K₄, ∇K₄, K₃ = κ_A κ_B Σω³ and E X⁴ ≤ M₄‖ω‖⁴, for X = ⟨ω, abᵀ⟩, exactly."""
    omega = wave_of_norm(1.3, (2, 3))
    E, p = enumerate_noise(2, 3, 1, *laws)
    k = [moment(law, 4) for law in laws]

    def cumulant(w):
        X = np.tensordot(E, w, 2)
        return p @ X**4 - 3 * (p @ X**2) ** 2

    K, gradient = fourth_cumulant(omega, *k)
    assert cumulant(omega) == pytest.approx(K)
    np.testing.assert_allclose(numerical_gradient(cumulant, omega), gradient, atol=1e-7)
    X = np.tensordot(E, omega, 2)
    assert p @ X**4 <= max(3, *k) ** 2 * 1.3**4
    for first, second in itertools.product((SKEWED, SIGNS), repeat=2):
        E, p = enumerate_noise(2, 3, 1, first, second)
        K3 = moment(first, 3) * moment(second, 3) * np.sum(omega**3)
        assert p @ np.tensordot(E, omega, 2) ** 3 == pytest.approx(K3, abs=1e-12)


def extrapolated(f, r):
    """The limit of f(r) = limit + O(1/r) up to O(1/r²)."""
    return 2 * f(2 * r) - f(r)


@every_law
def test_constant_of_the_error(law):
    """Page 3: r(φ_r - φ_∞) → φ_∞K₄/24 and r(g_r - g_∞) → φ_∞(K₄ω - ∇K₄)/(24σ)."""
    for norm in 1.0, 1.8:
        omega = wave_of_norm(norm)
        limit, limit_slope = normal_limit(omega)
        K, gradient = fourth_cumulant(omega, moment(LAWS[law], 4))

        def error(r, i, omega=omega, limits=(limit, limit_slope)):
            return r * (phi(omega, r, LAWS[law])[i].real - limits[i])

        assert extrapolated(lambda r: error(r, 0), 512) == pytest.approx(limit * K / 24, rel=1e-4)
        leading = limit / 24 * (K * omega - gradient)  # σ(g_r - g_∞) = -(∇φ_r - ∇φ_∞)
        got = -extrapolated(lambda r: error(r, 1), 512)
        assert np.linalg.norm(got - leading) < 1e-4 * np.linalg.norm(leading)
        along = np.sum(omega * (K * omega - gradient))
        assert along == pytest.approx((norm**2 - 4) * K)


@every_law
def test_cubic_fitness(law):
    """Page 3: for a cubic fitness the error of g_r is D/r exactly, at r = 1 already."""
    T, errors = np.random.default_rng(1).normal(size=(4, 4, 4)), []
    for r in 1, 2:
        E, p = enumerate_noise(2, 2, r, LAWS3[law], LAWS3[law])
        x = E.reshape(-1, 4)
        errors.append((p * np.einsum("ijk,si,sj,sk->s", T, x, x, x)) @ x)
    dense = sum(np.einsum(s, T) for s in ("ijj->i", "jij->i", "jji->i"))  # g_∞, by Wick's theorem
    np.testing.assert_allclose(errors[0] - dense, 2 * (errors[1] - dense), atol=1e-10)
    assert np.linalg.norm(errors[0] - dense) > 0.1


def wave_error(omega, r, law_a, law_b=None, c=0.0, paired=True):
    """σ‖g_r - g_∞‖ for sin(⟨Ω, M⟩ + c), from pairs or from members +E alone."""
    slope = phi(omega, r, law_a, law_b)[1]
    g = -math.cos(c) * slope.real + (0 if paired else math.sin(c)) * slope.imag
    return np.linalg.norm(g + math.cos(c) * normal_limit(omega)[1])


def test_slope_from_both_sides():
    """Page 3: the exact slopes of a random 3×3 wave; -1 is their limit, from either side."""
    omega, ranks = wave_of_norm(math.sqrt(2)), [1, 2, 4, 8]
    stated = {"normal": [-0.57, -0.72, -0.84], "signs": [-1.32, -1.14, -1.06]}
    for law, expected in stated.items():
        got = slopes(ranks, [wave_error(omega, r, LAWS[law]) for r in ranks])
        np.testing.assert_allclose(got, expected, atol=0.006)
        last = slopes([512, 1024], [wave_error(omega, r, LAWS[law]) for r in (512, 1024)])
        np.testing.assert_allclose(last, -1, atol=0.01)
    np.testing.assert_allclose(
        [wave_error(omega, 1, LAWS[law]) for law in ("signs", "normal")], [0.29, 0.22], atol=0.005
    )
    assert wave_error(omega, 2, SIGNS) < wave_error(omega, 2, NORMAL)
    large = [wave_error(2 * math.sqrt(2) * omega, r, NORMAL) for r in (8, 16)]
    np.testing.assert_allclose(slopes([8, 16], large), -1.28, atol=0.006)  # ‖ω‖² = 16


def test_which_symmetry():
    """Page 3: slopes -1, -1/2, -1, -1 of the table, and the expansions of Im φ_r and Re φ_r."""
    omega, c, ranks = wave_of_norm(1.0), math.pi / 4, [4096, 16384]
    cases = [
        (SIGNS, SIGNS, False, -1),
        (SKEWED, SKEWED, False, -0.5),
        (SKEWED, SIGNS, False, -1),
        (SIGNS, SKEWED, False, -1),
        (SKEWED, SKEWED, True, -1),
        (SKEWED, SIGNS, True, -1),
    ]
    for law_a, law_b, paired, slope in cases:
        errors = [wave_error(omega, r, law_a, law_b, c, paired) for r in ranks]
        assert slopes(ranks, errors)[0] == pytest.approx(slope, abs=0.01)
    K3 = moment(SKEWED, 3) ** 2 * np.sum(omega**3)
    K4 = fourth_cumulant(omega, moment(SKEWED, 4))[0]
    limit = normal_limit(omega)[0]
    imaginary = extrapolated(lambda r: math.sqrt(r) * phi(omega, r, SKEWED)[0].imag, 4096)
    assert imaginary == pytest.approx(-limit * K3 / 6, rel=1e-4)
    real = extrapolated(lambda r: r * (phi(omega, r, SKEWED)[0].real - limit), 4096)
    assert real == pytest.approx(limit * (K4 / 24 - K3**2 / 72), rel=1e-4)
    assert abs(phi(omega, 3, SKEWED, SIGNS)[0].imag) < 1e-12


def skewed(key, shape, dtype=jnp.float32):
    values = jnp.asarray(SKEWED[0], dtype)
    return jnp.where(jax.random.bernoulli(key, SKEWED[1][0], shape), values[0], values[1])


def test_code_without_symmetry():
    """Page 3: with skewed entries the code has the exact means stated, one-sided and in pairs."""
    sigma, omega, c, r = 0.5, wave_of_norm(1.2, (2, 2)), math.pi / 4, 4
    Omega = jnp.asarray(omega / sigma, jnp.float32)

    def wave(M):
        return jnp.sin(jnp.sum(Omega * (jnp.eye(2) @ M)) + c)

    g = estimates(Eggroll(sigma, r, skewed), wave, jnp.zeros((2, 2)), 1024, one_sided=True)
    slope = phi(omega, r, SKEWED)[1]
    odd, even = -math.cos(c) * slope.real / sigma, math.sin(c) * slope.imag / sigma
    assert_mean(g[:, 1], odd + even)
    assert_mean(g[:, 0], odd)
    limit = -math.cos(c) * normal_limit(omega)[1] / sigma
    assert np.linalg.norm(odd + even - limit) > 2 * np.linalg.norm(odd - limit)


def test_step_on_a_lattice():
    """Page 3: for the fitness [entry > σ] signs err by -φ(1)/√r at r = q², normal factors 1/r."""
    sizes = np.array([32, 64, 128])
    errors = []
    for q in sizes:
        j = np.arange(q * q + 1)
        z, p = (2 * j - q * q) / q, stats.binom.pmf(j, q * q, 0.5)
        errors.append((z * p)[2 * j > q * q + q].sum() - stats.norm.pdf(1))
        assert stats.binom.pmf((q * q + q) // 2, q * q, 0.5) * q == pytest.approx(
            2 * stats.norm.pdf(1), rel=2 / q
        )
    assert extrapolated({32: sizes[0] * errors[0], 64: sizes[1] * errors[1]}.get, 32) == (
        pytest.approx(-stats.norm.pdf(1), rel=2e-3)
    )
    np.testing.assert_allclose(slopes(sizes**2, np.abs(errors)), -0.5, atol=0.01)
    ranks = [32, 64]
    errors = [
        integrate.quad(lambda z, r=r: z * density(z, r), 1, 30, epsabs=1e-12)[0] - stats.norm.pdf(1)
        for r in ranks
    ]
    np.testing.assert_allclose(slopes(ranks, np.abs(errors)), -1, atol=0.03)


def test_signs_of_full_rank():
    """Page 3: dense signs, as vectors have at every rank, have Πⱼ cos ωⱼ in place of φ_∞."""
    sigma, omega = 0.5, wave_of_norm(1.5, (3,))
    Omega = jnp.asarray(omega / sigma, jnp.float32)
    g = estimates(Eggroll(sigma, 1, signs), lambda v: jnp.sin(Omega @ v), jnp.zeros(3), 512)
    assert_mean(g, np.cos(omega).prod() * np.tan(omega) / sigma)


# theory/4-which-noise.md ------------------------------------------------------------


def test_effective_rank():
    """Page 4: K₄ = 6‖ω‖⁴/R with 1 ≤ R ≤ min(m, n); relative errors ‖ω‖⁴/(4Rr), ‖Gω‖/(r‖ω‖)."""
    thin = np.outer([1.0, 2, 3], [1.0, -1, 2])
    for omega, R in (np.eye(3), 3), (thin, 1), (wave_of_norm(1.0), None):
        omega = 0.02 * omega / np.linalg.norm(omega)
        G, r = omega @ omega.T, 64
        R = R or np.trace(G) ** 2 / np.trace(G @ G)
        assert 1 <= R <= 3
        assert fourth_cumulant(omega, 3)[0] == pytest.approx(6 * 0.02**4 / R)
        big = 50 * omega  # ‖ω‖ = 1
        relative = np.linalg.det(np.eye(3) + big @ big.T / 1e6) ** (-1e6 / 2) * math.exp(0.5) - 1
        assert relative == pytest.approx(1 / (4 * R * 1e6), rel=1e-3)
        error = wave_error(omega, r, NORMAL) / np.linalg.norm(normal_limit(omega)[1])
        expected = np.linalg.norm(G @ omega) / (r * 0.02)
        assert error == pytest.approx(expected, rel=2e-3)
        if R == 1:
            assert expected == pytest.approx(0.02**2 / r)


@pytest.mark.parametrize("m, n", [(2, 2), (2, 3)])
def test_random_waves(m, n):
    """Page 4: means of tr G², ‖Gω‖², K₄ and ‖∇K₄/24‖² and Var K₄ over normal ω, by quadrature."""
    s = 0.8
    omegas, p = grid(gauss(np.polynomial.hermite_e.hermegauss, 5, s), m * n)  # exact to degree 9
    omegas = omegas.reshape(-1, m, n)
    G = omegas @ omegas.mT
    assert p @ (G**2).sum((1, 2)) == pytest.approx(m * n * (m + n + 1) * s**4)
    formula = m * n * (m**2 + 3 * m * n + n**2 + 3 * m + 3 * n + 4) * s**6
    assert p @ ((G @ omegas) ** 2).sum((1, 2)) == pytest.approx(formula)
    K, gradient = map(np.array, zip(*(fourth_cumulant(w, 1) for w in omegas), strict=True))
    assert p @ K == pytest.approx(-6 * m * n * s**4)
    variance = (144 * m * (m - 1) * n * (n - 1) + 384 * m * n) * s**8
    assert p @ (K + 6 * m * n * s**4) ** 2 == pytest.approx(variance)
    formula = m * n * ((m - 1) * (n - 1) + 5 / 3) * s**6
    assert p @ ((gradient / 24) ** 2).sum((1, 2)) == pytest.approx(formula)
    along = (gradient * omegas).sum((1, 2))
    np.testing.assert_allclose(along, 4 * K, atol=1e-9)


def test_large_random_waves():
    """Page 4: the errors and the gain of signs for large m = n; N where bias equals noise."""
    n, r, norm = 256, 1, 0.3
    omega = wave_of_norm(norm, (n, n))
    G, s = omega @ omega.T, norm / n
    error = wave_error(omega, r, NORMAL) / np.linalg.norm(normal_limit(omega)[1])
    assert error == pytest.approx(math.sqrt(5) * norm**2 / (n * r), rel=0.03)
    assert 2 * n**2 / error**2 == pytest.approx(2 * n**4 * r**2 / (5 * norm**4), rel=0.06)
    assert 2 * n**2 / error**2 == pytest.approx(2e11, rel=0.1)
    gradient = fourth_cumulant(omega, 1)[1] / 24  # with signs; with normal factors it is Gω
    gain = np.linalg.norm(G @ omega) / np.linalg.norm(gradient)
    assert gain == pytest.approx(math.sqrt(5), rel=0.03)
    across = np.trace(G @ G @ G) - np.trace(G @ G) ** 2 / norm**2  # of normal factors
    assert across == pytest.approx(n**4 * s**6, rel=0.06)
    assert np.sum(gradient**2) == pytest.approx(n**4 * s**6, rel=0.06)
    signs_rms = math.sqrt(36 * n**4 + 144 * (n * (n - 1)) ** 2 + 384 * n**2)  # from the moments
    assert 6 * n**2 * (2 * n + 1) / signs_rms == pytest.approx(2 * n / math.sqrt(5), rel=0.01)
    assert ((n + 2) ** 2 - 1) / (n**2 + 1) == pytest.approx(1.016, abs=5e-4)


def test_signs_on_rectangles():
    """Page 4: for k = 1, K₄ = 6 Σ over rectangles - 2 Σω⁴."""
    omega = wave_of_norm(1.0, (3, 4))
    rectangles = np.einsum("ij,iq,pj,pq,ip,jq->", *[omega] * 4, 1 - np.eye(3), 1 - np.eye(4))
    formula = 6 * rectangles - 2 * np.sum(omega**4)
    assert fourth_cumulant(omega, 1)[0] == pytest.approx(formula)


def test_signs_without_gain():
    """Page 4: on ω = ±s of rank one K₄ is 6(tr G)²[(1 - 1/m)(1 - 1/n) - 1/(3mn)], near normal's."""
    rng, m, n = np.random.default_rng(0), 5, 7
    omega = 0.3 * np.outer(rng.choice([-1, 1], m), rng.choice([-1, 1], n))
    square = np.sum(omega**2) ** 2
    formula = 6 * square * ((1 - 1 / m) * (1 - 1 / n) - 1 / (3 * m * n))
    assert fourth_cumulant(omega, 1)[0] == pytest.approx(formula)
    assert fourth_cumulant(omega, 3)[0] == pytest.approx(6 * square)


@every_law
@pytest.mark.parametrize("m, n, r", [(2, 2, 1), (2, 3, 1), (2, 2, 2)])
def test_variance_formula(law, m, n, r):
    """Page 4: E‖E⟨C,E⟩‖² = ‖C‖²(mn + 2 + [(m+k-1)(n+k-1) - mn - 2]/r), exactly."""
    law = LAWS3[law]
    E, p = enumerate_noise(m, n, r, law, law)
    C, k = wave_of_norm(1.3, (m, n)), moment(law, 4)
    got = p @ ((E**2).sum((1, 2)) * np.tensordot(E, C, 2) ** 2)
    formula = m * n + 2 + ((m + k - 1) * (n + k - 1) - m * n - 2) / r
    assert got == pytest.approx(1.3**2 * formula)
    if r == 1 and law is SIGNS:
        assert formula == pytest.approx(m * n)


# theory/5-cost.md ------------------------------------------------------------


def products(function, *args):
    """The matrix products in a function's jaxpr: (multiply-adds, size of left, size of right)."""
    found = []

    def walk(jaxpr, times):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                (contracted, _), _ = equation.params["dimension_numbers"]
                left, right = (v.aval for v in equation.invars)
                depth = math.prod(left.shape[i] for i in contracted)
                count = times * equation.outvars[0].aval.size * depth
                found.append((count, left.size, right.size))
            inner = times * equation.params.get("length", 1)
            for value in jax.tree.leaves(list(equation.params.values())):
                if hasattr(value, "eqns"):  # a jaxpr, as of a loop or a nested jit
                    walk(value, inner)

    walk(jax.make_jaxpr(function)(*args).jaxpr, 1)
    return found


def total(found):
    return sum(count for count, *_ in found)


SIZES, PAIRS = (48, 40, 32), 8


def network(T):
    """Two layers without biases and data of T vectors a pair."""

    def forward(params, x):
        return jnp.sum(jnp.tanh(x @ params[0]) @ params[1])

    params = [jnp.ones(s) for s in itertools.pairwise(SIZES)]
    return params, jnp.ones((PAIRS, T, SIZES[0])), forward


@pytest.mark.parametrize("r, T", [(1, 1), (2, 1), (1, 5)])
def test_multiply_adds(r, T):
    """Page 5: forward NT(mn + r(m+n)), half of NTmn in the first layer; update (N/2)r·mn."""
    (l, m, n), N, key = SIZES, 2 * PAIRS, KEY
    params, data, fitness = network(T)
    es = Eggroll(0.1, r)
    forward = total(products(lambda k: es.evaluate(fitness, params, k, data), key))
    assert forward == N * T * (l * m // 2 + m * n + r * (l + m) + r * (m + n))
    scores = jnp.ones((PAIRS, 2))
    update = total(products(lambda k: es.gradient(params, k, scores), key))
    assert update == PAIRS * r * (l * m + m * n)
    x = jnp.ones((N * T, l))
    inference = total(products(lambda p: fitness(p, x), params))
    assert inference == N * T * (l * m + m * n)
    # A hidden layer: (mn + r(m+n) + rmn/(2T))/mn, so 1 + r/(2T) for wide ones.
    step = N * T * (m * n + r * (m + n)) + PAIRS * r * m * n
    assert step / (N * T * m * n) == pytest.approx(1 + r / (2 * T) + r / m + r / n)
    back = total(products(jax.grad(lambda p: fitness(p, x)), params))
    assert back == N * T * (2 * l * m + 3 * m * n)
    full = Eggroll(0.1, None)
    dense = total(products(lambda k: full.evaluate(fitness, params, k, data), key))
    assert dense == N * T * (l * m + m * n)
    dense = total(products(lambda k: full.gradient(params, k, scores), key))
    assert dense == PAIRS * (l * m + m * n)


def test_weights_read_and_noise_drawn():
    """Page 5: weights read, mn or N·mn; noise entries drawn, (N/2)r(m+n) or (N/2)mn."""
    (l, m, n), key = SIZES, KEY
    params, data, fitness = network(1)
    for rank, weights, entries in (
        (2, {l * m, m * n}, 2 * (l + 2 * m + n)),
        (None, {2 * PAIRS * l * m, 2 * PAIRS * m * n}, l * m + m * n),
    ):
        drawn = []

        def draw(key, shape, dtype, drawn=drawn):  # called once for all pairs, under vmap
            drawn.append(math.prod(shape))
            return normal(key, shape, dtype)

        es = Eggroll(0.1, rank, draw)
        found = products(lambda k, es=es: es.evaluate(fitness, params, k, data), key)
        assert sum(drawn) == entries  # for one pair
        assert weights <= {size for _, *sizes in found for size in sizes}
        if rank:  # nothing of the size N·mn is multiplied
            assert max(size for _, *sizes in found for size in sizes) < PAIRS * m * n


def test_numbers_moved(optimized):
    """Page 5: bytes that the compiled programs access: inference exactly, ES to a factor of 2."""
    N = m = n = 256
    W, x = jnp.ones((m, n)), jnp.ones((N // 2, m))

    def moved(f, *args):
        return jax.jit(f).lower(*args).compile().cost_analysis()["bytes accessed"] / 4

    inference = moved(lambda W, x: x @ W, W, jnp.ones((N, m)))
    assert inference == pytest.approx(m * n + N * (m + n), rel=0.01)
    for r in 1, None:
        es = Eggroll(0.1, r)
        noise = jax.vmap(lambda key, es=es: es.noise(key, W))(jax.random.split(KEY, N // 2))

        def forward(W, noise, x, es=es):
            def members(sign):
                return jax.vmap(lambda e, x: x @ es.perturb(W, e, sign))(noise, x)

            return jax.vmap(members)(jnp.array([1.0, -1.0]))

        def update(W, noise, f):
            if isinstance(noise, tuple):
                return W + jnp.einsum("pmr,pnr->mn", f[:, None, None] * noise[0], noise[1])
            return W + jnp.tensordot(f, noise, 1)

        drawn = N // 2 * (m + n if r else m * n)  # written once
        measured = drawn + moved(forward, W, noise, x) + moved(update, W, noise, jnp.ones(N // 2))
        formula = 5 * m * n + N * (m + n) * 5 / 2
        if r is None:
            formula = 5 * m * n + 7 / 2 * N * m * n + N * (m + n)
        assert 0.8 * formula < measured < 2 * formula


def test_predictions():
    """Page 5: the table for 10⁶ members, from the shapes of the code's own noise and products."""
    N, W = 10**6, jax.ShapeDtypeStruct((10**4, 10**4), jnp.float32)

    def bytes_of_noise(rank):
        noise = jax.eval_shape(Eggroll(0.1, rank).noise, KEY, W)
        return N // 2 * sum(4 * e.size for e in jax.tree.leaves(noise))

    scores = jax.ShapeDtypeStruct((N // 2, 2), jnp.float32)
    update = total(products(lambda W, f: Eggroll(0.1).gradient(W, KEY, f), W, scores))
    for layers in 10, 100, 1000:
        assert layers * W.size * N == 10**14 * layers  # forward, for T = 1
        assert layers * update == 5 * 10**13 * layers
        assert layers * bytes_of_noise(1) == 4 * 10**10 * layers
        assert layers * bytes_of_noise(None) == 2 * 10**14 * layers
        assert scores.size * 4 == 4 * 10**6 and layers * W.size * 4 == 4 * 10**8 * layers
    for s, beta, stated in (5e14, 5e10, 1.6e5), (5e14, 1e8, 8e7):  # rebuild or all-reduce
        assert stated == pytest.approx(16 * s / beta)
        assert update * stated / N / s == pytest.approx(8 * W.size / beta)  # equal times


def test_scalars_are_all_that_is_shared():
    """Page 5: a worker with the key rebuilds the update from 4N bytes of scores."""
    W, key, es = jnp.ones((40, 50)), KEY, Eggroll(0.1)
    rebuild = jax.jit(es.gradient)
    scores = jax.jit(partial(es.evaluate, lambda M, x: jnp.sum(x @ M)))(
        W, key, jnp.ones((PAIRS, 40))
    )
    assert scores.nbytes == 4 * 2 * PAIRS
    message = np.asarray(scores).tobytes()
    received = jnp.asarray(np.frombuffer(message, np.float32).reshape(PAIRS, 2))
    elsewhere = rebuild(jnp.zeros_like(W), key, received)  # needs the shape of W, no values
    np.testing.assert_array_equal(elsewhere, rebuild(W, key, scores))


# Models ------------------------------------------------------------------------------------------


def test_mlp_is_the_composition_of_its_layers():
    params = eggroll.mlp_init(KEY, (3, 5, 2))
    assert [jax.tree.map(jnp.shape, p) for p in params] == [
        {"W": (3, 5), "b": (5,)},
        {"W": (5, 2), "b": (2,)},
    ]
    params = jax.tree.map(lambda p: p + 0.1, params)
    x = np.asarray(normal(KEY, (7, 3)), np.float64)
    (V, c), (W, b) = ((np.asarray(p["W"], np.float64), np.asarray(p["b"])) for p in params)
    close(jax.vmap(lambda x: eggroll.mlp(params, x))(jnp.float32(x)), np.tanh(x @ V + c) @ W + b)
    with jax.numpy_rank_promotion("allow"):
        assert eggroll.mlp(params, jnp.ones((4, 7, 3))).shape == (4, 7, 2)
    W = eggroll.mlp_init(KEY, (400, 300))[0]["W"]  # entries of variance 1/400
    assert abs(400 * W.var() - 1) < SE * np.sqrt(2 / W.size)


def numpy_logits(params, text):
    """A minimal gated unit as a loop, float64: (length, vocab) logits after each token."""
    p = {name: np.asarray(x, np.float64) for name, x in params.items()}
    hidden = len(p["U"])
    h, logits = np.zeros(hidden), []
    for token in text:
        x, u = p["emb"][token] @ p["W"] + p["b"], h @ p["U"]
        gate = 1 / (1 + np.exp(-x[:hidden] - u[:hidden]))
        candidate = np.tanh(x[hidden:] + gate * u[hidden:])
        h = h + gate * (candidate - h)
        logits.append(p["emb"] @ h + p["c"])
    return np.array(logits)


def rnn_params(vocab=5, hidden=6):
    params = eggroll.rnn_init(KEY, vocab, hidden)
    return jax.tree.map(lambda p: p + 0.3 * normal(jax.random.key(1), p.shape), params)


def test_bits_per_char_is_the_loop_over_the_text():
    params, text = rnn_params(), np.array([0, 3, 1, 4, 4, 2, 0, 1])
    p = np.exp(numpy_logits(params, text[:-1]))
    p /= p.sum(axis=1, keepdims=True)
    expected = -np.log2(p[np.arange(7), text[1:]]).mean()
    close(eggroll.bits_per_char(params, jnp.array(text)), expected, ulps=20)
    nothing_known = jax.tree.map(jnp.zeros_like, params)
    close(eggroll.bits_per_char(nothing_known, jnp.array(text)), np.log2(5))


def test_the_rnn_remembers():
    """Its next character depends on one read long before, through U and h alone."""
    params = rnn_params()
    a, b = (jnp.array([first, 1, 2, 3, 4]) for first in (0, 3))
    assert abs(eggroll.bits_per_char(params, a) - eggroll.bits_per_char(params, b)) > 1e-3
    assert abs(numpy_logits(params, a)[-1] - numpy_logits(params, b)[-1]).max() > 1e-4


def test_members_of_the_rnn_are_those_with_dense_weights():
    es, params = Eggroll(0.2, 2, normal), rnn_params()
    text = jax.random.randint(jax.random.key(2), (3, 9), 0, 5)
    bits = jax.jit(eggroll.bits_per_char)
    scores = jax.jit(es.evaluate, static_argnums=0)(bits, params, KEY, text)
    E = pair_noise(es, KEY, params, 3)
    for i in range(3):
        for column, scale in enumerate((0.2, -0.2)):
            member = {name: params[name] + scale * E[name][i] for name in params}
            close(scores[i, column], bits(member, text[i]), ulps=100)


def test_sample_follows_the_distribution_of_the_model():
    """A model that ignores what it reads writes independent characters of known frequencies."""
    params = jax.tree.map(jnp.zeros_like, rnn_params())
    p = np.array([0.4, 0.3, 0.15, 0.1, 0.05])
    tokens = np.asarray(eggroll.sample(params | {"c": jnp.log(p)}, KEY, 0, 20_000))
    assert_mean(tokens[:, None] == np.arange(5), p)
    # and it reads what it wrote: with a strong model, most pairs are the likely ones
    params = rnn_params() | {"emb": 3 * normal(jax.random.key(3), (5, 6))}
    tokens = np.asarray(eggroll.sample(params, KEY, 2, 200))
    logits = numpy_logits(params, np.concatenate([[2], tokens[:-1]]))
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    entropy = -(p * np.log(p + 1e-300)).sum(axis=1)
    surprise = -np.log(p[np.arange(200), tokens])
    assert_mean(surprise - entropy, 0)


# Integers -----------------------------------------------------------------------------------------


def sat(x):
    return np.clip(x, -127, 127)


def whole(tree):
    """Dense members or parameters, as int64."""
    return jax.tree.map(lambda x: np.asarray(x).astype(np.int64), tree)


def whole_member(params, noise, sign, sigma):
    """θ + sign·σ·E in int64, formed outside the class; vectors saturate, matrices need not."""

    def leaf(p, e):
        p = np.asarray(p).astype(np.int64)
        if isinstance(e, tuple):
            a, b = whole(e)
            return p + sign * sigma * a @ b.swapaxes(-1, -2)
        return sat(p + sign * sigma * whole(e))

    return jax.tree.map(leaf, params, noise)


def whole_product(x, M):
    return [
        math.floor(int(sum(x * M[:, j])) * round(2048 / math.sqrt(len(x))) / 2**15)
        for j in range(M.shape[1])
    ]


def whole_norm(x):
    scale = 4096 * len(x) // max(int(np.abs(x).sum()), 1)
    return sat(np.array([math.floor(int(v) * scale / 256) for v in x]))


def whole_gate(f, s):
    """(f + 127)/256 of s, rounded down."""
    return np.array([math.floor((int(a) + 127) * int(b) / 256) for a, b in zip(f, s, strict=True)])


def whole_logits(params, text):
    """Logits (len(text), vocab) of the network as int_rnn's docstring has it, in slow integers."""
    memory = [np.zeros(params["emb"].shape[1], np.int64) for _ in params["layers"]]
    logits = []
    for token in text:
        x = sat(params["emb"][token])
        for i, p in enumerate(params["layers"]):
            s, y = memory[i], whole_norm(x)
            f = sat(np.add(whole_product(y, p["Wf"]), whole_product(s, p["Uf"])) + p["bf"])
            kept = whole_gate(f, s)
            c = sat(np.add(whole_product(y, p["Wh"]), whole_product(kept, p["Uh"])) + p["bh"])
            memory[i] = sat(s + whole_gate(f, c - s))
            x = sat(x + memory[i])
            if "W1" in p:
                y = sat(whole_product(whole_norm(x), p["W1"]))
                x = sat(x + whole_product(y, p["W2"]))
        logits.append(sat(whole_product(whole_norm(x), params["head"])))
    return np.array(logits)


def whole_log_likelihood(params, text):
    """Sum of log₂ p(next) in units of 2⁻⁸, with the powers of two in Python's whole numbers."""
    total, vocab = 0, len(params["emb"])
    spare = max(0, math.ceil(math.log2(vocab)) - 7)
    for logits, next_token in zip(whole_logits(params, text[:-1]), text[1:], strict=True):
        powers = [
            (256 + (l % 16) * (174 + 5 * (l % 16)) // 16) * 2 ** (l // 16 + 8) // 2**spare
            for l in map(int, logits)
        ]
        z = sum(powers)
        bits = z.bit_length() - 1
        fraction = (z << 8 >> bits) - 256  # the 8 bits after the leading one
        log = round(256 * math.log2(1 + (fraction + 0.5) / 256))
        total += 16 * int(logits[next_token]) - (256 * (bits + spare - 16) + log)
    return total


NETWORKS = {  # vocab, hidden, layers, mlp
    "one layer": (7, 8, 1, False),
    "two layers": (5, 6, 2, False),
    "with an MLP": (5, 4, 2, True),
    "large alphabet": (300, 4, 1, False),
}


def int_params(name="one layer", key=KEY):
    """Random everywhere, so that no leaf is without effect."""
    params = eggroll.int_rnn_init(key, *NETWORKS[name])
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    return treedef.unflatten(
        [
            jax.random.randint(k, p.shape, -40, 41).astype(jnp.int8)
            for k, p in zip(keys, leaves, strict=True)
        ]
    )


def int_text(vocab, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, vocab, shape).astype(np.int32)


@pytest.mark.parametrize("m, n", [(4, 3), (32, 5), (33, 2)])
def test_products_of_integers_are_those_of_dense_members(m, n):
    rng = np.random.default_rng(0)
    W = jnp.asarray(rng.integers(-127, 128, (m, n)), jnp.int8)
    x = jnp.asarray(rng.integers(-127, 128, (6, m)), jnp.int8)
    es = eggroll.IntEggroll(sigma=5)
    noise = es.noise(KEY, W)
    for sign in 1, -1:
        M, dense_M = es.perturb(W, noise, sign), whole_member(W, noise, sign, 5)
        np.testing.assert_array_equal(eggroll.dot(x, M), whole(x) @ dense_M)
        expected = [whole_product(row, dense_M) for row in whole(x)]
        np.testing.assert_array_equal(eggroll.product(x, M), expected)
        close = np.abs(expected - whole(x) @ dense_M / (16 * math.sqrt(m)))
        scale = round(2048 / math.sqrt(m)) / (2048 / math.sqrt(m))
        bound = 1 + abs(scale - 1) * np.abs(whole(x) @ dense_M / (16 * math.sqrt(m)))
        assert (close <= bound + 1e-9).all() and abs(scale - 1) < 2**-7
        i = jnp.array([[0, m - 1]])
        ends = jnp.array([127, -127] * 16, jnp.int8)  # of the scale
        e = es.noise(KEY, ends)
        np.testing.assert_array_equal(es.perturb(ends, e, sign), whole_member(ends, e, sign, 5))
        np.testing.assert_array_equal(eggroll.rows(M, i), sat(dense_M[np.array(i)]))
    np.testing.assert_array_equal(eggroll.rows(W, i), W[i])
    np.testing.assert_array_equal(eggroll.dot(x, W), whole(x) @ whole(W))


def test_the_norm_divides_by_the_mean_absolute_value():
    rng = np.random.default_rng(0)
    for scale in 1, 10, 127:
        x = rng.integers(-scale, scale + 1, 24)
        got = eggroll.l1_norm(jnp.asarray(x, jnp.int8))
        np.testing.assert_array_equal(got, whole_norm(x))
        # the quotient in it is rounded down to a multiple of 2⁻⁸, and the result to a whole number
        exact = 16 * x / np.abs(x).mean()
        assert (np.abs(sat(exact) - got) <= 1 + np.abs(x) / 256).all()
    np.testing.assert_array_equal(eggroll.l1_norm(jnp.zeros(5, jnp.int8)), np.zeros(5))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("sign", [0, 1, -1])
def test_the_integer_network_is_the_slow_one_bit_for_bit(name, sign):
    params, es = int_params(name), eggroll.IntEggroll(sigma=3)
    text = int_text(NETWORKS[name][0], 9)
    noise = es.noise(KEY, params)
    member = es.perturb(params, noise, sign) if sign else params
    slow = whole_member(params, noise, sign, 3)
    s = jnp.zeros((NETWORKS[name][2], NETWORKS[name][1]), jnp.int8)
    _, logits = jax.lax.scan(partial(eggroll.int_rnn, member), s, jnp.asarray(text))
    assert logits.dtype == jnp.int8
    np.testing.assert_array_equal(logits, whole_logits(slow, text))
    got = eggroll.int_log_likelihood(member, jnp.asarray(text))
    assert got.dtype == jnp.int32 and got == whole_log_likelihood(slow, text)


def test_powers_and_logarithms_within_their_errors():
    x = np.arange(-128, 128)
    got = np.asarray(eggroll.exp2(jnp.asarray(x, jnp.int8)), np.float64)
    assert np.abs(got / 2.0 ** (x / 16 + 16) - 1).max() < 0.0031
    z = np.concatenate([np.arange(1, 2**17), 2 ** np.arange(31) - 1, 2 ** np.arange(31)])
    z = np.concatenate([z, np.random.default_rng(0).integers(1, 2**31, 10**5)])
    z = z[z > 0].astype(np.int32)
    got = np.asarray(eggroll.log2(jnp.asarray(z)), np.float64) / 256
    assert np.abs(got - np.log2(z)).max() < 0.005
    assert 2**7 * int(eggroll.exp2(jnp.int8(127))) < 2**31
    for vocab in 1, 128, 129, 300, 100_000:
        assert vocab * (int(eggroll.exp2(jnp.int8(127))) >> eggroll.spare_bits(vocab)) < 2**31


@pytest.mark.parametrize("name", NETWORKS)
def test_the_likelihood_is_that_of_a_softmax(name):
    """Within 0.31 % of the powers, 0.005 of the logarithm, and what the spare bits cut off."""
    params = int_params(name)
    vocab = NETWORKS[name][0]
    text = int_text(vocab, 30)
    logits = whole_logits(whole(params), text[:-1]) / 16
    exact = logits[np.arange(29), text[1:]] - np.log2(np.sum(2.0**logits, axis=1))
    got = float(eggroll.int_log_likelihood(params, jnp.asarray(text))) / 256
    smallest = 2.0 ** (logits.min() + 16)
    cut = (2 ** eggroll.spare_bits(vocab) - 1) / smallest
    assert abs(got - exact.sum()) < 29 * (math.log2(1 + 0.0031 + cut) + 0.005)


@pytest.mark.parametrize("value", [127, -127])
@pytest.mark.parametrize("shape", [(3, 1024, 1, False), (3, 256, 1, True), (130, 8, 2, True)])
def test_nothing_overflows_at_the_extremes(value, shape):
    """The widest networks allowed, all weights and all noise as large as they can be."""
    params = jax.tree.map(lambda p: jnp.full_like(p, value), eggroll.int_rnn_init(KEY, *shape))
    es = eggroll.IntEggroll(sigma=127)
    text = int_text(shape[0], 4)
    for same in 1, -1:  # E all 1, or all -1
        noise = jax.tree.map(jnp.ones_like, es.noise(KEY, params))
        member = es.perturb(params, noise, same)
        slow = whole_member(params, noise, same, 127)
        got = eggroll.int_log_likelihood(member, jnp.asarray(text))
        assert got == whole_log_likelihood(slow, text)
    with pytest.raises(ValueError, match="at most 1024 entries"):
        eggroll.product(jnp.zeros(1025, jnp.int8), jnp.zeros((1025, 2), jnp.int8))


def test_integer_noise_is_of_signs_and_differs_between_leaves_pairs_and_keys():
    params = {"a": jnp.zeros((64, 64), jnp.int8), "b": jnp.zeros((64, 64), jnp.int8)}
    params |= {"v": jnp.zeros(64, jnp.int8), "stack": jnp.zeros((2, 64, 64), jnp.int8)}
    es = eggroll.IntEggroll()
    factors = [
        np.asarray(leaf, np.int64).ravel()
        for key in [jax.random.fold_in(KEY, 0), jax.random.fold_in(KEY, 1), jax.random.key(1)]
        for leaf in jax.tree.leaves(es.noise(key, params))
    ]
    assert {f.size for f in factors} == {64, 128} and all(set(f) == {-1, 1} for f in factors)
    for x, y in itertools.combinations(factors, 2):
        size = min(x.size, y.size)
        assert abs(x[:size] @ y[:size]) < SE * math.sqrt(size)


def test_integer_evaluate_and_gradient_are_a_loop_over_dense_members():
    params, es = int_params(), eggroll.IntEggroll(sigma=4)
    text = int_text(7, 12, 6)
    scores = es.evaluate(eggroll.int_log_likelihood, params, KEY, jnp.asarray(text))
    noises = [es.noise(jax.random.fold_in(KEY, i), params) for i in range(12)]
    expected = [
        [whole_log_likelihood(whole_member(params, e, sign, 4), t) for sign in (1, -1)]
        for e, t in zip(noises, text, strict=True)
    ]
    np.testing.assert_array_equal(scores, expected)
    votes = es.gradient(params, KEY, scores)
    f = np.sign(np.subtract(*np.transpose(expected)))
    assert set(f) >= {-1, 1}
    full = [whole_member(jax.tree.map(jnp.zeros_like, params), e, 1, 1) for e in noises]
    sums = jax.tree.map(lambda *e: sum(w * x for w, x in zip(f, e, strict=True)), *full)
    for got, sum_ in zip(jax.tree.leaves(votes), jax.tree.leaves(sums), strict=True):
        assert got.dtype == jnp.int32
        np.testing.assert_array_equal(got, sum_)
    for chunk in 4, 5, 12, 100:  # in any chunks
        chunked = eggroll.IntEggroll(4, chunk)
        again = chunked.evaluate(eggroll.int_log_likelihood, params, KEY, jnp.asarray(text))
        np.testing.assert_array_equal(again, scores)
        same(chunked.gradient(params, KEY, scores), votes)


def same(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def test_swapping_the_signs_of_a_pair_swaps_its_scores():
    """So what it votes for is the same: neither member is the favoured one."""
    params, es, text = int_params(), eggroll.IntEggroll(sigma=4), jnp.asarray(int_text(7, 20))
    noise = es.noise(KEY, params)
    turned = jax.tree.map(
        lambda e: (-e[0], e[1]) if isinstance(e, tuple) else -e,
        noise,
        is_leaf=lambda e: isinstance(e, tuple),
    )
    first = [eggroll.int_log_likelihood(es.perturb(params, noise, s), text) for s in (1, -1)]
    second = [eggroll.int_log_likelihood(es.perturb(params, turned, s), text) for s in (1, -1)]
    assert first == second[::-1] and first[0] != first[1]


INTEGERS_ON_8_DEVICES = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from eggroll import IntEggroll, int_log_likelihood, int_rnn_init

params = int_rnn_init(jax.random.key(0), 7, 8)
votes = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.int32), params)
text = np.asarray(jax.random.randint(jax.random.key(1), (32, 6), 0, 7))
results = []
for chunk, types in ((None, None), (None, AxisType.Auto), (16, AxisType.Explicit)):
    data = text
    if types is not None:
        mesh = jax.make_mesh((8,), ("pairs",), axis_types=(types,))
        data = jax.device_put(text, NamedSharding(mesh, PartitionSpec("pairs")))
    step = jax.jit(IntEggroll(2, chunk).step, static_argnums=0)
    results.append(step(int_log_likelihood, params, votes, jax.random.key(2), data, 5))
assert len(results[1][2].sharding.device_set) == 8
for result in results[1:]:
    jax.tree.map(np.testing.assert_array_equal, results[0], result)
print(np.unique(results[0][2]).size)
"""


def test_integers_on_eight_devices_give_the_answer_of_one():
    assert result(start(INTEGERS_ON_8_DEVICES, devices=8)) > 32  # of 64 scores


def test_an_integer_step_moves_what_has_enough_votes():
    params, es, text = int_params(), eggroll.IntEggroll(sigma=4), jnp.asarray(int_text(7, 40, 6))
    params["emb"] = jnp.full_like(params["emb"], 127)  # at the end of the scale
    votes = jax.tree.map(lambda p: jax.random.randint(KEY, p.shape, -6, 7, jnp.int32), params)
    threshold = 9
    args = eggroll.int_log_likelihood, params, votes, KEY, text, threshold
    new, left, scores = es.step(*args)
    same(scores, es.evaluate(eggroll.int_log_likelihood, params, KEY, text))
    total = jax.tree.map(np.add, votes, es.gradient(params, KEY, scores))
    moved = 0
    for p, q, v, rest in zip(*map(jax.tree.leaves, (params, new, total, left)), strict=True):
        for index in np.ndindex(p.shape):
            move = int(v[index] >= threshold) - int(v[index] <= -threshold)
            moved += abs(move)
            assert int(q[index]) == sat(int(p[index]) + move)
            assert int(rest[index]) == int(v[index]) - move * threshold
        assert q.dtype == jnp.int8 and rest.dtype == jnp.int32
    assert 0 < moved < sum(p.size for p in jax.tree.leaves(params))
    same(jax.jit(es.step, static_argnums=0)(*args), (new, left, scores))


def test_clipping_is_a_rectifier():
    u = jnp.arange(-1000, 255)
    np.testing.assert_array_equal(eggroll.saturate(u - 127) + jnp.int32(127), np.maximum(0, u))


def votes_of(fitness, params, pairs, populations, es=None):
    """Votes and number of pairs without a tie of many populations, (populations, ...)."""
    es = es or eggroll.IntEggroll()

    def one(key):
        scores = es.evaluate(fitness, params, key, jnp.arange(pairs))
        untied = jnp.sum(scores[:, 0] != scores[:, 1])
        return es.gradient(params, key, scores), untied

    return jax.jit(jax.vmap(one))(jax.random.split(KEY, populations))


def test_votes_by_chance():
    """Rows, columns and vectors that do not matter: mean 0, variance the pairs without a tie."""
    params = {"W": jnp.zeros((6, 5), jnp.int8), "v": jnp.zeros(20, jnp.int8)}
    x = jnp.array([3, -2, 1, 5, 0, 0], jnp.int8)  # the last two rows do not matter

    def fitness(params, _):
        h = eggroll.dot(x, params["W"])[:4]  # nor does the last column
        return (h[0] * h[1] + h[2] + h[3]) >> 4

    votes, untied = votes_of(fitness, params, 40, 3000)
    assert 0 < np.mean(untied < 40)  # there are ties
    W = np.asarray(votes["W"], np.float64)
    for dead in W[:, 4:], W[:, :, 4:], np.asarray(votes["v"], np.float64):
        dead = dead.reshape(3000, -1)
        assert_mean(dead, 0)
        assert_mean(dead**2 - np.asarray(untied)[:, None], 0)
    assert np.abs(W[:, :4, :4].mean(axis=0)).max() > 5  # the others get more


def test_votes_leak():
    """f = W11 + W12 + W21: the entry that does not matter is voted down, by -1/2 a pair."""

    def fitness(M, _):
        W = eggroll.dot(jnp.eye(2, dtype=jnp.int8), M)
        return W[0, 0] + W[0, 1] + W[1, 0]

    votes, _ = votes_of(fitness, jnp.zeros((2, 2), jnp.int8), 50, 400)
    assert_mean(votes[:, 1, 1] / 50, -1 / 2)
    assert_mean(votes[:, 0, 0] / 50, 1 / 2)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.int8, jnp.uint8, bool, jnp.float32])
def test_votes_of_scores_whose_difference_would_overflow(dtype):
    params, es = {"v": jnp.zeros(3, jnp.int8)}, eggroll.IntEggroll()
    top = 1 if dtype in (bool, jnp.float32) else jnp.iinfo(dtype).max
    low = 0 if dtype in (bool, jnp.float32) else jnp.iinfo(dtype).min
    scores = jnp.array([[top, low], [low, top], [top, top]], dtype)
    first, second = (es.noise(jax.random.fold_in(KEY, i), params)["v"] for i in range(2))
    same(es.gradient(params, KEY, scores)["v"], whole(first) - whole(second))


def test_no_vote_is_lost():
    params, es, threshold = int_params(), eggroll.IntEggroll(), 7
    votes = zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.int32), params)
    step, start, total = jax.jit(partial(es.step, eggroll.int_log_likelihood)), params, zeros
    for t in range(30):
        key, text = jax.random.fold_in(KEY, t), jnp.asarray(int_text(7, 30, 6, seed=t))
        before = params
        params, votes, scores = step(params, votes, key, text, threshold)
        total = jax.tree.map(jnp.add, total, es.gradient(before, key, scores))
    moves = jax.tree.map(lambda p, q: p.astype(jnp.int32) - q, params, start)
    assert all(jnp.abs(m).max() > 2 for m in jax.tree.leaves(moves))
    assert all(jnp.abs(p).max() < 127 for p in jax.tree.leaves(params))
    same(jax.tree.map(lambda m, v: threshold * m + v, moves, votes), total)


@pytest.mark.parametrize("alpha", [1, 0.54, 0.3, 0.1, 0.02, 0.005])
def test_forgetting_votes(alpha):
    """Mean and variance of the moves by both rules, and the table of the page."""
    rng, z = np.random.default_rng(0), stats.norm.ppf(1 - alpha / 2)
    delta = 0.02
    drift = stats.norm.cdf(delta - z) - stats.norm.cdf(-delta - z)
    assert abs(drift / (2 * stats.norm.pdf(z) * delta) - 1) < 2e-3
    V = rng.normal(delta, 1, (1000, 4000))  # votes of 1000 weights in 4000 steps
    assert_mean(np.mean(np.sign(V) * (np.abs(V) >= z), axis=1), drift)
    assert_mean(np.mean(np.abs(V - delta) >= z, axis=1), alpha)
    if z > 1:  # at a lower threshold a step has votes for more than one move
        left, moved = np.zeros(1000), np.zeros(1000)
        for v in V.T:
            left += v
            move = np.sign(left) * (np.abs(left) >= z)
            moved, left = moved + move, left - z * move
        slack = 2 * np.abs(left).max() / z
        assert_mean(moved / 4000, delta / z, tolerance=SE + slack)
        assert abs(moved.var() / 4000 * z**2 - 1) < SE * math.sqrt(2 / 1000) + slack**2 / 4000
    page = (HERE / "theory" / "6-integers.md").read_text(encoding="utf-8")
    rows = [line.split("|")[2:-1] for line in page.splitlines() if line.startswith("|")]
    alphas = next(row for row in rows if row[0].strip() == "$1$" and len(row) == 6)
    table = rows[rows.index(alphas) + 2 : rows.index(alphas) + 4]
    column = [float(x.strip(" $")) for x in alphas].index(alpha)
    stated = [float(row[column].strip(" $")) for row in table]
    np.testing.assert_allclose(stated, [z, alpha / (2 * stats.norm.pdf(z)) ** 2], rtol=0.006)


INT_ERRORS = {
    "sigma 0": (lambda: eggroll.IntEggroll(0), ValueError, "1 to 127 sixteenths, got 0"),
    "sigma 128": (lambda: eggroll.IntEggroll(128), ValueError, "got 128"),
    "sigma 0.1": (
        lambda: eggroll.IntEggroll(0.1),
        ValueError,
        "integer of 1 to 127 sixteenths, got 0.1",
    ),
    "chunk 0": (lambda: eggroll.IntEggroll(2, 0), ValueError, "chunk must be None or"),
    "float leaf": (
        lambda: eggroll.IntEggroll().noise(KEY, {"W": jnp.zeros(3)}),
        TypeError,
        r"params\['W'\] must be int8",
    ),
    "float input": (
        lambda: eggroll.dot(jnp.ones(3), jnp.zeros((3, 2), jnp.int8)),
        TypeError,
        "x must be int8, got float32",
    ),
    "scores": (
        lambda: eggroll.IntEggroll().gradient({"W": jnp.zeros(3, jnp.int8)}, KEY, jnp.zeros(4)),
        ValueError,
        r"shape \(pairs, 2\), pairs ≥ 1, got \(4,\)",
    ),
}


@pytest.mark.parametrize("name", INT_ERRORS)
def test_integer_errors_say_what_was_expected_and_what_came(name):
    call, error, message = INT_ERRORS[name]
    with pytest.raises(error, match=message):
        call()


def types(jaxpr):
    """Names of the types of all values in a jaxpr and in every one nested in it."""
    found = {str(v.aval.dtype) for v in [*jaxpr.invars, *jaxpr.constvars]}
    for eqn in jaxpr.eqns:
        found |= {str(v.aval.dtype) for v in [*eqn.invars, *eqn.outvars]}
        for param in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            if hasattr(param, "eqns") or hasattr(param, "jaxpr"):
                found |= types(getattr(param, "jaxpr", param))
    return found


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("chunk", [None, 3])
def test_no_float_in_an_integer_step(name, chunk):
    params, es = int_params(name), eggroll.IntEggroll(2, chunk)
    votes = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.int32), params)
    text = jnp.asarray(int_text(NETWORKS[name][0], 8, 6))
    step = jax.jit(partial(es.step, eggroll.int_log_likelihood))
    args = params, votes, KEY, text, jnp.int32(9)
    found = types(jax.make_jaxpr(step)(*args).jaxpr)
    assert {"int8", "int32"} <= found <= {"int8", "int32", "uint32", "bool", "key<fry>"}
    # the walk does find a float, however deep
    deep = jax.make_jaxpr(lambda x: jax.lax.scan(jax.jit(lambda c, _: (c * 1.5, None)), x, None, 3))
    assert "float32" in types(deep(jnp.float32(1)).jaxpr)


def test_no_float_in_the_program_that_trains(text, tmp_path):
    """In the compiled HLO of the whole step, as the command line runs it."""
    options = ["--integer", "--text", text, *TINY, "--steps", 1, "--layers", 2, "--mlp"]
    flags = {"XLA_FLAGS": f"--xla_dump_to={tmp_path} --xla_dump_hlo_as_text"}
    command = [sys.executable, HERE / "eggroll.py", *map(str, options)]
    subprocess.run(command, env=os.environ | flags, check=True, stdout=subprocess.DEVNULL)
    floats = r"\b(f16|bf16|f32|f64|f8\w+)\["
    (step,) = tmp_path.glob("*jit_train_step.*after_optimizations.txt")
    hlo = step.read_text()
    assert "s8[" in hlo and not re.search(floats, hlo)
    init = [re.search(floats, f.read_text()) for f in tmp_path.glob("*after_optimizations.txt")]
    assert any(init)  # drawing the first weights takes floats, and would be found


def test_integer_sample_follows_the_distribution_of_the_model():
    params = int_params()
    tokens = np.asarray(eggroll.int_sample(params, KEY, 2, 300))
    assert tokens.dtype == np.int32 and set(tokens) <= set(range(7))
    logits = whole_logits(whole(params), np.concatenate([[2], tokens[:-1]])) / 16
    p = 2.0**logits
    p /= p.sum(axis=1, keepdims=True)
    entropy = -(p * np.log(p)).sum(axis=1)
    assert_mean(-np.log(p[np.arange(300), tokens]) - entropy, 0)
    for token in range(7):  # and each token as often as it should be
        assert_mean((tokens == token) - p[:, token], 0)


# Command line ------------------------------------------------------------------------------------

TINY = ["--population", "64", "--hidden", "8", "--length", "8"]
LAST_LINE = (
    r"held-out (\d+\.\d\d) bits/char after \d+ s \(unigram (\d+\.\d\d), bigram (\d+\.\d\d)\)"
)


ENVIRONMENT = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}


def run(*arguments, cwd=None):
    command = [sys.executable, "-W", "error", HERE / "eggroll.py", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, check=False, **pipes)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat — " * 200, encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", [[], ["--integer", "--length", 16, "--lr", 2]])
def test_it_learns_prints_a_sample_and_ends_with_the_score(kind, text):
    done = run("--text", text, "--steps", 150, "--population", 512, "--hidden", 16, *kind)
    assert done.returncode == 0 and done.stderr == ""
    *_, last = done.stdout.splitlines()
    held_out, unigram, bigram = map(float, re.fullmatch(LAST_LINE, last).groups())
    assert held_out < unigram - 0.5
    written = done.stdout.split("compiled in")[1].split("\n\n")[1]
    assert len(written) == 300 and set(written) <= set(text.read_text(encoding="utf-8"))
    # the baselines, counted in plain Python
    characters = text.read_text(encoding="utf-8")
    cut = len(characters) * 9 // 10
    train, test = characters[:cut], characters[cut:]
    alphabet = sorted(set(characters))
    pairs = list(itertools.pairwise(train))
    p = {c: (train.count(c) + 0.1) / (len(train) + 0.1 * len(alphabet)) for c in alphabet}
    firsts = {c: sum(a == c for a, _ in pairs) for c in alphabet}
    bits = [
        -np.log2((pairs.count((a, b)) + 0.1) / (firsts[a] + 0.1 * len(alphabet)))
        for a, b in itertools.pairwise(test)
    ]
    assert abs(unigram + np.mean([np.log2(p[c]) for c in test[1:]])) < 0.006
    assert abs(bigram - np.mean(bits)) < 0.006


def parameters(path):
    with np.load(path) as file:
        return {name: file[name] for name in file if name.startswith(("params.", "votes.", "step"))}


@pytest.mark.parametrize("kind", [["--lr", 0.001], ["--integer", "--mlp", "--lr", 6]])
def test_resuming_continues_exactly_and_every_step_is_new(kind, text, tmp_path):
    a, b = tmp_path / "a.npz", tmp_path / "b.npz"
    options = "--text", text, *TINY, *kind
    assert run(*options, "--steps", 6, "--save", a).returncode == 0
    assert run(*options, "--steps", 3, "--save", b).returncode == 0
    halfway = parameters(b)
    assert run("--steps", 3, "--resume", b, "--save", b).returncode == 0  # options are in the file
    assert parameters(a)["step"] == parameters(b)["step"] == 6
    for name, value in parameters(a).items():
        np.testing.assert_array_equal(value, parameters(b)[name])
        assert not np.array_equal(value, halfway[name])
    # new noise and new examples at every step: the same ones again would go the same way again
    assert run(*options, "--steps", 0, "--save", b).returncode == 0
    start = parameters(b)
    names = [name for name in start if name.startswith("params.")]
    assert len(names) == (10 if "--integer" in kind else 5)

    def way(after, before):
        return np.concatenate([(1.0 * after[name] - before[name]).ravel() for name in names])

    first, second = way(halfway, start), way(parameters(a), halfway)
    assert abs(first @ second) < 0.8 * np.linalg.norm(first) * np.linalg.norm(second)


def test_ctrl_c_ends_training_not_the_program_and_kill_leaves_a_whole_checkpoint(text, tmp_path):
    path = tmp_path / "c.npz"
    arguments = ["--text", text, *TINY, "--seconds", "600", "--save", path]
    for blow in signal.SIGINT, signal.SIGKILL:
        process = subprocess.Popen(
            [sys.executable, HERE / "eggroll.py", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            env=ENVIRONMENT,
        )
        for line in process.stdout:
            if line.startswith("step"):
                break
        process.send_signal(blow)
        out, err = process.communicate(timeout=60)
        if blow == signal.SIGINT:
            assert process.returncode == 0 and err == ""
            assert re.fullmatch(LAST_LINE, out.splitlines()[-1])
            saved = parameters(path)["step"]
            assert saved > 0
        else:
            assert process.returncode == -signal.SIGKILL
    assert run("--steps", 1, "--resume", path, "--save", path).returncode == 0
    assert parameters(path)["step"] > 1


def test_a_save_cut_short_leaves_the_old_checkpoint(text, tmp_path, monkeypatch):
    path = tmp_path / "d.npz"
    assert run("--text", text, *TINY, "--steps", 1, "--save", path).returncode == 0
    before = path.read_bytes()

    def savez(file, **state):
        file.write(b"half of a checkpoint")
        raise KeyboardInterrupt  # killed here

    monkeypatch.setattr(np, "savez", savez)
    arguments = ["eggroll.py", "--steps", "1", "--resume", str(path), "--save", str(path)]
    monkeypatch.setattr(sys, "argv", arguments)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        eggroll.main()
    signal.signal(signal.SIGINT, handler)
    assert path.read_bytes() == before


REFUSED = {
    "missing text": (["--text", "nowhere.txt"], "nowhere.txt"),
    "empty text": (["--text", "empty.txt"], "empty.txt"),
    "short text": (["--text", "short.txt"], "short.txt"),
    "not UTF-8": (["--text", "latin1.txt"], "utf-8"),
    "odd population": (["--population", "7"], "even and at least 2, got 7"),
    "no population": (["--population", "0"], "even and at least 2, got 0"),
    "rank 0": (["--rank", "0"], "full or a number of at least 1, got 0"),
    "rank word": (["--rank", "half"], "half"),
    "sigma 0": (["--sigma", "0"], "sigma must be positive"),
    "lr nan": (["--lr", "nan"], "finite, .* got nan"),
    "no hidden units": (["--hidden", "0"], "at least 1"),
    "no length": (["--length", "0"], "at least 1"),
    "missing checkpoint": (["--resume", "nowhere.npz"], "nowhere.npz"),
    "not a checkpoint": (["--resume", "short.txt"], "short.txt"),
    "empty checkpoint": (["--resume", "empty.txt"], "empty.txt"),
    "cut checkpoint": (["--resume", "cut.npz"], "cut.npz"),
    "an array": (["--resume", "array.npy"], "not a checkpoint"),
    "other arrays": (["--resume", "other.npz"], "other.npz"),
    "other shape": (["--resume", "good.npz", "--hidden", "9"], r"\(9, 18\), got \(8, 16\)"),
    "float checkpoint": (
        ["--resume", "good.npz", "--integer", "--sigma", "0.125"],
        "another network",
    ),
    "other layers": (["--resume", "two.npz", "--layers", "1"], "another network: .*layers.1"),
    "integer rank": (["--integer", "--rank", "2"], "--rank 1 and --noise signs"),
    "integer noise": (["--integer", "--noise", "normal"], "--rank 1 and --noise signs"),
    "integer sigma": (["--integer", "--sigma", "0.1"], "sixteenths, like 0.125, got 0.1"),
    "integer lr 0": (["--integer", "--lr", "0"], "positive, got 0.0"),
    "integer width": (["--integer", "--mlp", "--hidden", "257"], "256 with --mlp, got 257"),
    "no layers": (["--integer", "--layers", "0"], "at least 1, got 0"),
    "layers of floats": (["--layers", "2"], "are for --integer"),
    "other text": (["--resume", "good.npz", "--text", "long.txt"], "other characters"),
    "no such folder": (["--save", "nowhere/x.npz"], "nowhere/x.npz"),
}


@pytest.fixture(scope="module")
def bad_inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "empty.txt").write_bytes(b"")
    (folder / "short.txt").write_bytes(b"too short a text for this" * 4)
    (folder / "long.txt").write_bytes(b"0123456789" * 100)
    (folder / "latin1.txt").write_bytes("é".encode("latin-1") * 1000)
    (folder / "abc.txt").write_bytes(b"abc" * 100)
    good = run("--text", "abc.txt", *TINY, "--steps", 0, "--save", "good.npz", cwd=folder)
    assert good.returncode == 0, good.stderr
    two = "--integer", "--layers", 2, "--steps", 0, "--save", "two.npz"
    assert run("--text", "abc.txt", *TINY, *two, cwd=folder).returncode == 0
    np.save(folder / "array.npy", np.ones(3))
    np.savez(folder / "other.npz", W=np.ones(3))
    (folder / "cut.npz").write_bytes((folder / "good.npz").read_bytes()[:-100])
    return folder


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_in_one_line(name, bad_inputs, monkeypatch, capsys):
    arguments, message = REFUSED[name]
    monkeypatch.chdir(bad_inputs)
    monkeypatch.setattr(sys, "argv", ["eggroll.py", *arguments])
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as exit:
        eggroll.main()
    signal.signal(signal.SIGINT, handler)
    output = capsys.readouterr()
    assert exit.value.code == 2 and output.err.count("\n") == 1
    assert re.search(message, output.err)


# Documents ---------------------------------------------------------------------------------------


def prints(code):
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, cwd=HERE, stdout=subprocess.PIPE, text=True, check=True).stdout


def test_the_example_in_the_docstring_learns():
    code = eggroll.__doc__.split("here a linear model:\n")[1].split("`python eggroll.py`")[0]
    assert -1 < float(prints(textwrap.dedent(code))) < 0


def test_the_example_in_the_readme_prints_what_it_says():
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    code, devices = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert len(code.strip().splitlines()) < 22
    accuracy = float(prints(code).removeprefix("accuracy "))
    stated = float(re.search(r"prints `accuracy (\S+)`", readme)[1])
    assert abs(accuracy - stated) < 0.03
    *setup, last = devices.strip().splitlines()  # the four lines for many devices
    sharded = last.split(" = ")[1].split("  #")[0]
    on_mesh = "\n".join(setup) + "\n" + code.replace("data=(x, inside)", f"data={sharded}")
    assert abs(float(prints("import jax\n" + on_mesh).removeprefix("accuracy ")) - accuracy) < 0.02


def test_the_readme_names_every_option_with_its_default():
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    help = " ".join(run("--help").stdout.split("options:")[1].split())
    documented = dict(re.findall(r"\| `(--\w+)[^`]*` \| `?([^`|]*?)`? ?\|", readme))
    actual = dict(re.findall(r"(--\w+)(?:(?! --).)*\(default: (.*?)\)", help))
    assert {option: default or "None" for option, default in documented.items()} == actual
    for field in Eggroll.__dataclass_fields__:
        assert f"| `{field}` |" in readme


def test_every_test_that_the_theory_names_is_here():
    pages = sorted((HERE / "theory").glob("[0-9]*.md"))
    assert pages
    for page in pages:
        _, tests = page.read_text(encoding="utf-8").split("## Which test shows it")
        assert set(re.findall(r"`(test_\w+)`", tests)) <= globals().keys(), page


def test_every_link_leads_to_a_file():
    notebook = nbformat.read(HERE / "tutorial.ipynb", as_version=4)
    texts = [(HERE, cell.source) for cell in notebook.cells if cell.cell_type == "markdown"]
    for page in HERE / "README.md", *(HERE / "theory").glob("*.md"):
        texts.append((page.parent, page.read_text(encoding="utf-8")))
    links = [(at, link) for at, text in texts for link in re.findall(r"\]\(([^)#\s]+)", text)]
    missing = [link for at, link in links if ":" not in link and not (at / link).exists()]
    assert links and not missing


def test_the_tutorial_is_kept_as_one_whole_run():
    path = HERE / "tutorial.ipynb"
    assert path.stat().st_size < 2e6
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
    outputs = [output for c in cells for output in c.outputs]
    assert {output.get("name", "stdout") for output in outputs} == {"stdout"}  # no warnings
    assert all(output.output_type != "error" for output in outputs)
    texts = [output.get("text", "") or output.data.get("text/markdown", "") for output in outputs]
    assert not re.search(r"/(home|root|tmp|usr|work|Users)/", "".join(texts))  # of one machine


def test_acrobot_in_the_tutorial_is_that_of_gymnasium():
    # Recorded from Gymnasium 1.4.0, Acrobot-v1, in float64; the policy is argmax(observation @ W).
    cells = nbformat.read(HERE / "tutorial.ipynb", as_version=4).cells
    (code,) = (c.source for c in cells if "def acrobot(" in c.source)
    script = """
        import jax, jax.numpy as jnp, numpy as np
        from functools import partial
        from eggroll import mlp
        jax.config.update("jax_enable_x64", True)
        jax.config.update("jax_numpy_rank_promotion", "raise")
        CODE

        W = [[1, 2, 1], [-1, 1, 1], [3, 3, 1], [-1, 3, 1], [1, 3, 1], [-3, 1, 3]]
        actions = (
            "1111111111111111111111100000001222111000000222221100000222221100000022222221000000022"
            "222221110000002222222222221100000000"
        )
        states = {
            0: [0.025019092485, 0.079442761838, 0.055137138814, -0.054958563298],
            1: [0.033936508, 0.063323449, 0.031751189, -0.102098021],
            25: [0.037237520, -0.231159153, 0.210725529, -0.618312800],
            50: [-0.117403153, 0.671218322, 1.857124366, -1.958694170],
            75: [-1.395450053, 2.363746039, 1.142462099, -0.685141729],
            100: [0.112319501, -0.455604291, -4.867597001, 4.045511416],
            120: [2.242190883, 2.449129589, -1.403297608, -2.669903063],
            121: [1.917614148, 1.991045300, -1.868707085, -1.945553748],
        }  # an angle was wrapped on the way; terminated is false but after the last step
        policy = [{"W": jnp.array(W, float), "b": jnp.zeros(3)}]
        step, act, state = jax.jit(acrobot), jax.jit(act), jnp.array(states[0])
        for t, action in enumerate(actions, 1):
            assert act(policy, state) == int(action)
            state, up = step(state, int(action))
            assert up == (t == 121)
            if t in states:
                np.testing.assert_allclose(state, states[t], rtol=1e-6)

        swing_up = jax.jit(swing_up)
        assert swing_up(policy, jnp.array(states[0])) == -120  # rewards: 120 times -1, then 0
        idle = [{"W": jnp.zeros((6, 3)), "b": jnp.zeros(3)}]  # always action 0: truncated at 500
        assert swing_up(idle, jnp.array(states[0])) == -500

        steps = (  # the bounds on speed, and both angles wrapped
            ([3, -3, 12.5, -28], 0, [-0.1437386039, 2.6041071996, 4 * np.pi, -9 * np.pi], False),
            ([-3, 3, -12.5, 28], 2, [0.1437386039, -2.6041071996, -4 * np.pi, 9 * np.pi], False),
            ([0.5, 1, -5, 20], 1, [0.0358773497, -1.9322191231, -2.7066738738, 17.5891193], False),
            ([2, 0.5, 3, 2], 2, [2.5539133162, 0.9160440863, 2.6472884605, 2.1187548838], True),
        )
        for state, action, new, terminated in steps:
            state, up = step(jnp.array(state, float), action)
            np.testing.assert_allclose(state, new, rtol=1e-7)
            assert up == terminated
        """
    script = textwrap.dedent(script).replace("CODE", code)
    subprocess.run([sys.executable, "-W", "error", "-c", script], cwd=HERE, check=True)


def test_the_tutorial_runs(tmp_path):
    shutil.copy(HERE / "eggroll.py", tmp_path)  # where it may save its figure
    notebook = nbformat.read(HERE / "tutorial.ipynb", as_version=4)
    options = {"timeout": 1800, "resources": {"metadata": {"path": tmp_path}}}
    nbclient.NotebookClient(notebook, **options).execute()  # raises if a cell does
    outputs = [output for c in notebook.cells for output in c.get("outputs", [])]
    assert all(output.get("name") != "stderr" for output in outputs)
    assert (tmp_path / "theory" / "figures" / "convergence.png").stat().st_size > 10_000


def test_ci_runs_the_test_command_of_the_readme():
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^.*-m pytest$", readme, re.MULTILINE)
    assert command in (HERE / ".ci" / "run").read_text(encoding="utf-8")
