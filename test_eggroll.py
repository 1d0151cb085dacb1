"""Every claim of eggroll.py and README.md, held against something independent.

    claim                                                   test_...
    entries, covariance and independence of the noise       noise_, signs_, normal_
    M multiplies and indexes like W + A Bᵀ, and no more     low_rank_, dense_
    evaluate, gradient, step = loops over dense members     a_generation, gradient_, rank_of
    any finite scores are standardized; the rest is worst   standardize_, what_is_not_finite
    an Eggroll is a pytree; data and params of any kind     an_eggroll, data_may, numpy_
    bfloat16 is summed in float32; x64 changes nothing      bfloat16_, float32_, x64_
    wrong arguments are refused                             wrong_
    one draw a pair, no N·m·n array, chunks bound memory    a_step_draws, no_program
    eight devices, two processes                            eight_, parameters_may, two_
    shard_map, explicit meshes                              shard_map_, parameters_and
    models                                                  mlp_, bits_, sample_
    integers: exact, no overflow, no float, no vote lost    products_, the_integer, no_, nothing_
    the program learns, scores, goes on, ends, refuses      the_program, going_on, ctrl_c, options_
    files: large ones, pieces, cut short, two at once       a_large_file, texts_are, a_save
    examples, metadata, links, commands in the documents    the_method, the_metadata, documents_
    README: recipes; mistakes in keys; the rule for lr      recipes_, ranks_, mistakes_, the_rule
    the tutorial                                            the_tutorial, acrobot_, any_cell

The formulas of theory/ are in theory/test_theory.py. Statistical tolerances are `SE` standard
errors of the estimator, computed from theory or from the sample itself: at 5 a correct program
fails one comparison in a million, whatever the seed.
"""

import inspect
import itertools
import math
import operator
import os
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
import tomllib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import nbformat
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, auto_axes
from scipy import special

import eggroll
from eggroll import Eggroll, IntEggroll, LowRank, dense, normal, signs, standardize, uniform

jax.config.update("jax_num_cpu_devices", 8)  # one at work but where data is sharded
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_disable_most_optimizations", True)  # compiling takes most of the time
# Where SIGINT is ignored, children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
pytestmark = pytest.mark.filterwarnings("error")

HERE = Path(__file__).parent
DRAWS = {"normal": normal, "uniform": uniform, "signs": signs}
SE = 5.0
KEY = jax.random.key(0)
PARAMS = {  # a matrix, a stack of them, a stack of vectors, a vector, a scalar
    "W": jnp.linspace(-1, 1, 12).reshape(4, 3),
    "stack": jnp.linspace(1, -1, 18).reshape(2, 3, 3),
    "biases": jnp.linspace(-0.5, 0.5, 6).reshape(2, 3),
    "b": jnp.array([0.1, -0.2, 0.3]),
    "s": jnp.array(0.5),
}


@jax.jit
def wavy(params, x):
    """A fitness that uses every leaf, nonlinear in all, for arrays and for LowRank: x (4,)."""

    def layer(h, p):
        return jnp.tanh(h @ p["stack"] + p["stack"] @ h + p["biases"]), None

    h = x @ params["W"] + params["b"]  # (3,)
    layers = {"stack": params["stack"], "biases": dense(params["biases"])}
    h, _ = jax.lax.scan(layer, h, layers)
    return jnp.sum(jnp.sin(3 * h)) * params["s"]


def in_float64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def many_noises(es, params, count):
    """E of pairs 0 … count - 1, formed outside the class: float64 (count, *shape)."""
    keys = jax.vmap(partial(jax.random.fold_in, KEY))(jnp.arange(count))
    noises = jax.jit(jax.vmap(es.noise, in_axes=(0, None)))(keys, params)

    def form(_, e):
        if not isinstance(e, tuple):
            return e
        A, B = e
        return A @ B.mT

    return jax.tree.map(form, params, in_float64(noises))


def dense_members(es, params, pairs, see=lambda params: params):
    """(θ + σE, θ - σE) of every pair, formed outside the class, of θ = see(params)."""
    theta = in_float64(see(params))
    noises = many_noises(es, params, pairs)

    def member(i, scale):
        return jax.tree.map(lambda p, e: p + scale * e[i], theta, noises)

    return [(member(i, es.sigma), member(i, -es.sigma)) for i in range(pairs)]


def slow_sum(coefficients, noise):
    """Σ cᵢ Eᵢ, of one coefficient for every pair."""
    return jax.tree.map(lambda e: np.tensordot(coefficients, e, 1), noise)


def slow_scores(fitness, members, data):
    """(pairs, 2), one member after the other."""
    pairs = zip(members, data, strict=True)
    return np.array([(fitness(plus, x), fitness(minus, x)) for (plus, minus), x in pairs], float)


def assert_mean(samples, expected, tolerance=SE):
    """The mean of independent samples (K, ...) is the expected one within standard errors."""
    samples = np.asarray(samples, np.float64)
    error = samples.std(axis=0, ddof=1) / np.sqrt(len(samples))
    np.testing.assert_array_less(np.abs(samples.mean(axis=0) - expected), tolerance * error + 1e-12)


def assert_close(actual, expected, ulps=64):
    """Trees equal to rounding in float32, relative to the largest entry of a leaf."""

    def compare(a, e):
        assert a.shape == e.shape
        largest = np.abs(e).max(initial=1e-30)
        np.testing.assert_allclose(a, e, rtol=0, atol=ulps * 2**-23 * largest)

    jax.tree.map(compare, in_float64(actual), in_float64(expected))


def assert_equal(actual, expected):
    """Trees equal bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.fixture
def optimized(request):
    """For tests of what XLA makes of the code; as a parameter, yes or no."""
    jax.config.update("jax_disable_most_optimizations", not getattr(request, "param", True))
    yield
    jax.config.update("jax_disable_most_optimizations", True)


# Noise -------------------------------------------------------------------------------------------

FOURTH_MOMENT = {normal: 3, uniform: 9 / 5, signs: 1}  # of an entry
EVERY_NOISE = [
    Eggroll(1.0, rank, draw) for rank, draw in itertools.product([1, 3, None], DRAWS.values())
]


@pytest.mark.parametrize("es", [*EVERY_NOISE, IntEggroll()])
def test_noise_has_mean_zero_and_identity_covariance_at_every_rank(es):
    """Also between leaves, layers and pairs; 70 entries are more than two words of bits."""
    shapes = {"matrix": (3, 3), "twin": (3, 3), "stack": (2, 3, 3), "vector": (70,)}
    params = {leaf: jnp.zeros(shape, type(es.sigma)) for leaf, shape in shapes.items()}
    noise = many_noises(es, params, 5000)
    entries = np.concatenate([e.reshape(5000, -1) for e in noise.values()], axis=1)  # (5000, 106)
    assert_mean(entries, 0)
    assert_mean(entries[1:] * entries[:-1], 0)
    i, j = np.triu_indices(106)
    assert_mean(entries[:, i] * entries[:, j], i == j, tolerance=6)  # 5671 comparisons
    fourth = FOURTH_MOMENT[es.draw]
    assert_mean(np.mean(noise["vector"] ** 3, axis=1), 0)
    assert_mean(np.mean(noise["vector"] ** 4, axis=1), fourth)
    if es.rank is not None:
        fourth = 3 + (fourth**2 - 3) / es.rank
    assert_mean(noise["matrix"] ** 4, fourth)


@pytest.mark.parametrize("es, dtype", [(Eggroll(0.1, 2, normal), float), (IntEggroll(), int)])
def test_noise_is_a_function_of_key_and_leaf_alone(es, dtype):
    noise = es.noise(KEY, jnp.zeros((4, 3), dtype))
    assert_equal(es.noise(KEY, jnp.ones((4, 3), dtype)), noise)


@pytest.mark.parametrize("size", [1, 32, 33, 1000])
def test_signs_are_the_bits_of_the_random_words_in_order(size):
    words = jax.random.bits(KEY, (math.ceil(size / 32),), jnp.uint32)
    bits = np.unpackbits(np.asarray(words, "<u4").view(np.uint8), bitorder="little")
    assert_equal(signs(KEY, (size,)), 2.0 * bits[:size] - 1)


@pytest.mark.parametrize("shape", [(), (3,), (0, 4), (5, 2, 7)])
def test_normal_entries_are_those_of_jax_and_every_draw_has_any_shape(shape):
    assert_close(normal(KEY, shape), jax.random.normal(KEY, shape), ulps=4)
    for draw in DRAWS.values():
        noise = draw(KEY, shape, jnp.bfloat16)
        assert (noise.shape, noise.dtype) == (shape, jnp.bfloat16)


# Forward -----------------------------------------------------------------------------------------


def low_rank(*shape, r=1, dtype=jnp.float32):
    *stack, m, n = shape
    key_W, key_A, key_B, key_scale = jax.random.split(KEY, 4)
    W = normal(key_W, shape, dtype)
    A = normal(key_A, (*stack, m, r), dtype)
    B = normal(key_B, (*stack, n, r), dtype)
    return LowRank(W, A, B, normal(key_scale, stack, dtype))


def written_out(M):
    """W + scale · A Bᵀ in float64."""
    M = in_float64(M)
    return M.W + M.scale[..., None, None] * (M.A @ M.B.mT)


every_type = pytest.mark.parametrize("r, dtype", [(3, "float32"), (1, "bfloat16")])
ROUNDING = {"float32": 8, "bfloat16": 8 * 2**16}  # in units of the last place of float32


@every_type
@pytest.mark.parametrize("size", [(), (7,), (2, 7)])
def test_low_rank_multiplies_like_the_dense_matrix(r, dtype, size):
    M = low_rank(5, 4, r=r, dtype=dtype)
    x = normal(jax.random.key(1), (*size, 5), dtype)
    y = normal(jax.random.key(2), (*size, 4), dtype)
    x_M = in_float64(x) @ written_out(M)
    y_MT = in_float64(y) @ written_out(M).T
    assert_close((x @ M, np.asarray(x) @ M), (x_M, x_M), ROUNDING[dtype])  # NumPy leaves it to M
    assert_close(y @ M.T, y_MT, ROUNDING[dtype])
    if len(size) < 2:
        assert_close(M @ y.T, y_MT.T, ROUNDING[dtype])


@every_type
def test_low_rank_indexes_and_looks_like_the_dense_matrix(r, dtype):
    M = low_rank(5, 4, r=r, dtype=dtype)
    for i in -1, np.int64(3), jnp.array(1), np.array([[1, 2], [3, 0]]):
        assert_close(M[i], written_out(M)[i], ROUNDING[dtype])
    assert M[...] is M
    assert (M.shape, M.ndim, M.dtype, M.T.shape) == ((5, 4), 2, dtype, (4, 5))


@pytest.mark.parametrize("size", [(), (7,)])
def test_low_rank_stacks_multiply_and_are_taken_apart(size):
    stack = low_rank(2, 5, 4, r=3)
    x = normal(jax.random.key(1), (*size, 5))
    y = normal(jax.random.key(2), (*size, 4)).T
    expected = in_float64(x) @ written_out(stack)
    assert_close(x @ stack, expected)
    assert_close(stack @ y, written_out(stack) @ in_float64(y))
    assert_close(x @ stack[1], expected[1])
    assert_close(jax.vmap(lambda M: x @ M)(stack), expected)
    assert_close(jax.lax.map(lambda M: x @ M, stack), expected)


def test_dense_forms_every_low_rank_and_touches_nothing_else():
    stack = low_rank(2, 5, 4)
    *formed, none, function = dense([stack[1], stack, None, jnp.tanh])
    assert_close(formed, [written_out(stack)[1], written_out(stack)])
    assert none is None
    assert function is jnp.tanh


NOT_FOR_LOW_RANK = {
    "len": len,
    "iter": iter,
    "negative": operator.neg,
    "np.sum": np.sum,
    "jnp.sum": jnp.sum,
    "one entry": lambda M: M[1, 2],
    "times": lambda M: M * 2,
    "minus": lambda M: 1 - M,
    "less": lambda M: M < 0,
    "of NumPy": lambda M: np.ones((4, 4)) * M,
    "method": lambda M: M.sum(),
    "slice": lambda M: M[1:],
    "new axis": lambda M: M[None],
    "float": lambda M: M[1.0],
    "jnp.dot": lambda M: jnp.dot(jnp.ones((4, 4)), M),
}
WITHOUT_US_SILENT = {
    "np.asarray": np.asarray,
    "bool": bool,
    "equal": lambda M: M == 1,
    "mask": lambda M: M[jnp.ones(4, bool)],
    "T of a stack": lambda M: low_rank(4, 4, 4).T,
    "integers": lambda M: jnp.ones(4, jnp.int8) @ jax.tree.map(jnp.int8, M),
    "rows of integers": lambda M: jax.tree.map(jnp.int8, M)[0],
    "dense of integers": lambda M: dense(jax.tree.map(jnp.int8, M)),
}


@pytest.mark.parametrize("use", NOT_FOR_LOW_RANK.values(), ids=NOT_FOR_LOW_RANK)
def test_low_rank_does_nothing_else(use):
    with pytest.raises((TypeError, AttributeError)):
        use(low_rank(4, 4))


@pytest.mark.parametrize("use", WITHOUT_US_SILENT.values(), ids=WITHOUT_US_SILENT)
def test_low_rank_says_what_works_where_a_wrong_answer_would_come(use):
    with pytest.raises(TypeError, match=r"x @ M, M @ x.*dense\(M\).*product\(x, M\).*rows\(M, i\)"):
        use(low_rank(4, 4))


# Update ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, rank, chunk, optimized",
    [("signs", 1, 2, False), ("normal", None, 3, False), ("uniform", 3, None, True)],
    indirect=["optimized"],
)
def test_a_generation_is_a_loop_over_dense_members(name, rank, chunk, optimized):
    es = Eggroll(0.3, rank, DRAWS[name], chunk)
    x = normal(KEY, (6, 4))
    noise = many_noises(es, PARAMS, 6)
    scores = slow_scores(wavy, dense_members(es, PARAMS, 6), x)
    assert np.ptp(scores) > 0.1  # the members differ

    def gradient(scores):
        return slow_sum((scores[:, 0] - scores[:, 1]) / (12 * 0.3), noise)

    g = gradient((scores - scores.mean()) / scores.std())
    with jax.checking_leaks():
        new, found = jax.jit(partial(es.step, wavy))(PARAMS, KEY, x, 0.5)
    assert_close(found, scores, ulps=300)
    assert_close(new, jax.tree.map(lambda p, g: p + 0.5 * g, PARAMS, g), ulps=1000)
    assert_close(jax.jit(es.gradient)(PARAMS, KEY, scores), gradient(scores))


@pytest.mark.parametrize("rank, low", [(2, {"W", "stack", "biases"}), (None, set())])
def test_perturb_makes_the_two_members_of_a_pair_with_a_low_rank_for_every_matrix(rank, low):
    es = Eggroll(0.3, rank)
    noise = es.noise(jax.random.fold_in(KEY, 0), PARAMS)
    plus = es.perturb(PARAMS, noise)
    assert {name for name, p in plus.items() if isinstance(p, LowRank)} == low
    members = plus, es.perturb(PARAMS, noise, -1)
    assert_close(dense(members), dense_members(es, PARAMS, 1)[0])


def test_an_eggroll_is_a_pytree_and_sigma_may_be_traced_batched_and_differentiated():
    W = jnp.zeros((3, 4))

    @jax.jit
    def total(es):
        """With signs of rank one, each of ten members scores -12 σ²."""
        return jnp.sum(es.evaluate(lambda M, _: -jnp.sum(dense(M) ** 2), W, KEY, jnp.arange(5)))

    sigmas = np.array([0.3, 0.7], np.float32)
    for sigma in sigmas:
        assert_close(total(Eggroll(sigma)), -120 * sigma**2)
    assert total._cache_size() == 1
    assert_close(jax.vmap(total, in_axes=(Eggroll(0),))(Eggroll(sigmas)), -120 * sigmas**2)
    assert_close(jax.grad(total)(Eggroll(0.3)).sigma, -240 * 0.3)
    assert jax.tree.map(jnp.zeros_like, Eggroll(0.3, 2)) == Eggroll(0, 2)
    outside_of_jit = total.__wrapped__
    assert_close(outside_of_jit(Eggroll(jnp.float32(0.3))), -120 * 0.3**2)


@pytest.mark.parametrize("chunk", [None, 2])
def test_data_may_be_any_pytree_and_fitness_may_be_of_any_kind(chunk):
    es = Eggroll(0.1, chunk=chunk)
    data = {"x": jnp.ones((4, 4)), "keys": jax.random.split(KEY, 4), "n": (np.arange(4.0), None)}

    def count(params, example):
        jax.random.normal(example["keys"], example["n"][0].shape)
        return jnp.sum(example["x"] @ params["W"] > 0)  # an integer, without a gradient

    scores = es.evaluate(count, PARAMS, KEY, data)
    assert (scores.shape, scores.dtype) == ((4, 2), jnp.int32)
    assert es.gradient(PARAMS, KEY, scores)["W"].shape == (4, 3)
    assert es.evaluate(lambda p, x: 1.5, PARAMS, KEY, jnp.ones((4, 0))).shape == (4, 2)


def test_numpy_params_work_outside_jit():
    emb = np.ones((5, 3), np.float32)
    step = partial(Eggroll(0.1).step, lambda emb, token: jnp.sum(emb[token]))
    assert_equal(step(emb, KEY, np.arange(4), 0.1), step(jnp.array(emb), KEY, np.arange(4), 0.1))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_x64_results_have_the_type_of_params(dtype):
    with jax.enable_x64(True):
        params = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
        x = jnp.ones((4, 4), dtype)
        new, scores = jax.jit(partial(Eggroll(0.1).step, wavy))(params, KEY, x, jnp.float64(0.1))
        network = jax.tree.map(lambda p: p.astype(dtype), rnn_params())
        text = jnp.arange(7)
        found = new, scores, eggroll.bits(network, text), eggroll.mlp([{"W": x, "b": x[0]}], x[0])
        assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype(dtype)}
        assert eggroll.sample(network, KEY, 0, 3).dtype == jnp.int32


def test_x64_leaves_integers_as_they_are():
    texts = random_text(4, 6)
    step = jax.jit(partial(IntEggroll().step, likelihood))
    expected = step(int_params(), KEY, texts, 9)
    with jax.enable_x64(True):
        found = step(int_params(), KEY, jnp.asarray(texts, jnp.int64), jnp.int64(9))
        assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype("int32")}
        tokens = eggroll.sample(eggroll.weights(int_params()), KEY, 0, 3, eggroll.int_rnn, 2**8)
        assert tokens.dtype == jnp.int32
    assert_equal(found, expected)


@pytest.mark.parametrize("rank, pairs", [(1, 2), (2, 2), (2, 5), (1, 20), (None, 1)])
def test_rank_of_the_update_is_pairs_times_r_up_to_full(rank, pairs):
    scores = normal(jax.random.key(1), (pairs, 2))
    g = in_float64(Eggroll(0.1, rank, normal).gradient(jnp.zeros((6, 8)), KEY, scores))
    assert np.linalg.matrix_rank(g, rtol=1e-5) == min(pairs * (rank or 6), 6)


@pytest.mark.parametrize("rank, impl, bits", [(2, "rbg", 32), (None, "rbg", 32), (2, None, 64)])
def test_gradient_uses_the_noise_of_evaluate_for_keys_and_floats_of_any_kind(rank, impl, bits):
    """Of f = ⟨C, θ⟩ the scores are f₀ ± σ⟨C, Eᵢ⟩, and ⟨C, g⟩ is known from them alone."""
    es = Eggroll(0.2, rank, normal, chunk=2)
    C = np.arange(-5.0, 15).reshape(5, 4)
    W = np.zeros((5, 4))  # float64, which is float32 in JAX unless it is told otherwise
    with jax.enable_x64(bits == 64):
        key = jax.random.key(0, impl=impl)
        scores = es.evaluate(lambda M, _: jnp.trace(M @ C.T), W, key, np.zeros(8))
        same_noise = np.vdot(C, es.gradient(W, key, scores))
        other_noise = np.vdot(C, es.gradient(W, jax.random.key(1, impl=impl), scores))
    plus, minus = in_float64(scores).T
    expected = np.mean((plus - minus) ** 2) / 0.4**2
    assert abs(same_noise / expected - 1) < {32: 64 * 2**-23, 64: 2**-24}[bits]
    assert abs(other_noise / expected - 1) > 0.01


def test_bfloat16_parameters_are_summed_in_float32():
    """In bfloat16, equal terms would stop counting at 256 of them; here there are 4096."""
    params = jax.tree.map(jnp.bfloat16, PARAMS)
    scores = np.tile([1.0, 0], (4096, 1))
    for chunk in None, 8:
        es = Eggroll(0.5, 1, lambda key, shape, dtype: jnp.ones(shape, dtype), chunk)
        ones = jax.tree.map(jnp.ones_like, params)  # Σ 1 / (2 · 4096 · 0.5)
        g = jax.jit(es.gradient)(params, KEY, scores)
        assert_equal(g, ones)
        assert all(leaf.dtype == jnp.bfloat16 for leaf in g.values())


def test_float32_parameters_move_where_bfloat16_ones_would_not():
    """Cast the members inside the fitness: jax.tree.map reaches W, A and B."""

    def fitness(W, x):
        half = jax.tree.map(jnp.bfloat16, W)
        assert half.dtype == jnp.bfloat16
        return jnp.sum(x @ half)

    def step(W):
        x = normal(jax.random.key(1), (32, 16), jnp.bfloat16)
        return jax.jit(partial(Eggroll(0.1, draw=normal).step, fitness))(W, KEY, x, 1e-4)[0]

    ones = jnp.ones((16, 16))
    assert np.mean(step(ones) != 1) > 0.9
    assert_equal(step(jnp.bfloat16(ones)), jnp.bfloat16(ones))


Z = 7 + 3 * np.asarray(normal(KEY, (50, 2)), np.float64)
LARGEST = 3.4e38 * np.array([[1, -1], [0, 0.5]])
OF_ANY_SCALE = [
    *(Z, 1e30 * Z, 1e37 * (Z - 20), 1e-30 * Z, 1e-37 * Z, Z + 1e6, -Z),
    *(LARGEST, LARGEST / -1.5, np.arange(6).reshape(3, 2)),
]


@pytest.mark.parametrize("scores", OF_ANY_SCALE)
def test_standardize_is_the_z_score_at_any_scale(scores):
    scores = np.asarray(scores, np.float32)
    z = standardize(scores)
    assert z.dtype == jnp.float32
    scores = in_float64(scores)
    deviation = scores.std()
    rounding = 2**-22 * np.abs(scores).max() / deviation
    np.testing.assert_allclose(z, (scores - scores.mean()) / deviation, atol=1e-5 + rounding)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_counts_as_the_worst(bad):
    scores = np.arange(10.0).reshape(5, 2) - 3
    worst = scores.copy()
    scores[2, 1] = bad
    worst[2, 1] = -3
    assert_close(standardize(scores), standardize(worst))


def test_standardize_makes_zeros_of_equal_scores_or_of_none_that_is_finite():
    make = jax.jit(standardize)
    for score in [0, 0.1, -7.3, np.nan, np.inf, *np.random.default_rng(0).normal(size=50)]:
        assert_equal(make(jnp.full((49, 2), score)), jnp.zeros((49, 2)))
    assert_equal(standardize(jnp.array([[np.inf, 3.0]])), jnp.zeros((1, 2)))


def test_a_step_with_scores_that_are_not_finite_is_finite():
    step = jax.jit(partial(Eggroll(1.0).step, lambda p, x: jnp.log(p["b"][0] * x)))
    params, scores = step(PARAMS, KEY, jnp.arange(-2.0, 3), 0.1)
    assert 0 < np.isfinite(scores).sum() < scores.size
    assert all(np.isfinite(p).all() for p in params.values())


ONES = jnp.ones((4, 3))
INTEGERS = jnp.zeros((4, 3), jnp.int32)


def evaluate(fitness=lambda params, x: 0.0, params=ONES, data=ONES, **options):
    return Eggroll(**{"sigma": 0.1} | options).evaluate(fitness, params, KEY, data)


def evaluate_integers(**options):
    return IntEggroll(**options).evaluate(lambda params, x: 0, INTEGERS, KEY, ONES)


WRONG = {
    "sigma must be positive and finite, got -1": lambda: evaluate(sigma=-1),
    "sigma must be positive and finite, got 0": lambda: evaluate(sigma=0),
    "sigma must be positive and finite, got nan": lambda: evaluate(sigma=math.nan),
    "divide the pairs, got chunk=3 and pairs=4": lambda: evaluate(chunk=3),
    "divide the pairs, got chunk=0 and pairs=4": lambda: evaluate(chunk=0),
    "divide the pairs, got chunk=0 and pairs=0": lambda: evaluate(data=jnp.zeros((0, 4))),
    r"share a first axis.* \[\]": lambda: evaluate(data=None),
    r"share a first axis.* \[\(\), \(\)\]": lambda: evaluate(data=[1, 2]),
    r"share a first axis.* \[\(4, 3\), \(2,\)\]": lambda: evaluate(data=(ONES, jnp.ones(2))),
    r"must return a scalar, got shape \(3,\)": lambda: evaluate(lambda p, x: x),
    r"must return a scalar, got shape \(2,\)": lambda: evaluate(lambda p, x: (1.0, 2.0)),
    r"params\['n'\].*got int32. Close over": lambda: evaluate(params={"n": jnp.arange(3)}),
    "got complex64.*real and imaginary parts as two leaves": lambda: evaluate(params=ONES + 1j),
    r"\(pairs, 2\), got \(4, 3\)": lambda: Eggroll(0.1).gradient(ONES, KEY, ONES),
    "sigma = 1 … 127.*sigma=0.5": lambda: evaluate_integers(sigma=0.5),
    "sigma = 1 … 127.*sigma=128": lambda: evaluate_integers(sigma=128),
    "rank=1.*rank=2": lambda: evaluate_integers(rank=2),
    "draw=signs.*got sigma=2": lambda: evaluate_integers(draw=normal),
    "lr must be an integer, got 0.1": lambda: IntEggroll().step(None, INTEGERS, KEY, ONES, 0.1),
    "int8 and at most 1024.*float32": lambda: eggroll.product(jnp.int8(ONES), ONES.T),
    "at most 1024 inputs.*1025": lambda: eggroll.product(
        jnp.zeros(1025, jnp.int8), jnp.int8(INTEGERS)
    ),
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_arguments_are_refused_with_what_was_expected_and_what_came(words):
    with pytest.raises((ValueError, TypeError), match=words):
        WRONG[words]()


# What the compiler makes of it -------------------------------------------------------------------


def problem(method="step", pairs=256, **options):
    """A method of Eggroll, params and data, of which the numbers are to stay on the host."""

    def fitness(params, example):
        i, x = example
        return -jnp.mean((eggroll.mlp(params, x) - jnp.sin(i)) ** 2)

    es = Eggroll(0.1, **options)
    call = {"evaluate": es.evaluate, "step": partial(es.step, lr=0.1)}[method]
    params = eggroll.mlp_init(KEY, (16, 64, 64))
    data = [np.arange(pairs), np.asarray(normal(KEY, (pairs, 16)))]
    return jax.jit(partial(call, fitness)), params, data


@cache
def compiled(method="step", **options):
    call, params, data = problem(method, **options)
    return call.lower(params, KEY, data).compile()


def temporary(program):
    return program.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("draw", [normal, signs])
def test_a_step_draws_its_noise_once(draw, optimized):
    """Random bits come from loops of threefry; a second draw would add to them, as in chunks."""
    programs = compiled("evaluate", draw=draw), compiled(draw=draw), compiled(draw=draw, chunk=64)
    once, step, chunks = (program.as_text().count(" while(") for program in programs)
    assert 0 < once == step < chunks


def test_no_program_has_an_array_of_all_perturbed_matrices_and_chunks_bound_memory(optimized):
    matrices = 4 * 256 * 64**2  # bytes
    chunks = temporary(compiled(chunk=64))
    assert max(chunks, temporary(compiled())) < matrices / 4
    assert temporary(compiled(rank=None)) >= matrices  # so the measure can tell
    eightfold = temporary(compiled(chunk=64, pairs=2048))
    assert eightfold < 2 * chunks  # so there is no copy of the data either
    assert eightfold < temporary(compiled(pairs=2048)) / 4


# Many devices ------------------------------------------------------------------------------------


def spread(data, *axes, mode=AxisType.Auto):
    """Data on a mesh of the given axes, else of (8,), its first axis over the first, "pairs"."""
    axes = axes or (8,)
    names = ("pairs", "model")[: len(axes)]
    mesh = jax.make_mesh(axes, names, axis_types=(mode,) * len(axes))
    return jax.device_put(data, NamedSharding(mesh, PartitionSpec("pairs")))


@cache
def on_one_device():
    _, params, data = problem()
    return compiled()(params, KEY, data)


@pytest.mark.parametrize("chunk", [None, 64])
def test_eight_devices_give_the_answer_of_one(chunk, optimized):
    """All that travels is the update and scalars; each device needs an eighth of the memory."""
    step, params, [i, x] = problem(chunk=chunk)
    data = [i, spread(x)]
    program = step.lower(params, KEY, data).compile()
    assert_close(program(params, KEY, data), on_one_device(), ulps=300)
    assert temporary(program) < 1.3 / 8 * temporary(compiled())
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    found = re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", program.as_text())
    assert {kind for _, kind in found} == {"all-reduce"}
    shapes = re.findall(r"\w+\[([\d,]*)\]", " ".join(shape for shape, _ in found))
    sizes = [math.prod(map(int, shape.split(","))) for shape in shapes if shape]
    assert sum(sizes) == sum(p.size for p in jax.tree.leaves(params))
    assert shapes.count("") <= 8


def test_parameters_may_be_sharded_too(optimized):
    step, params, [i, x] = problem()
    data = [i, spread(x, 4, 2)]
    over_columns = NamedSharding(data[1].sharding.mesh, PartitionSpec(None, "model"))
    params[1]["W"] = jax.device_put(params[1]["W"], over_columns)
    assert_close(step(params, KEY, data), on_one_device(), ulps=300)


ONE_OF_TWO_PROCESSES = """
import sys, jax
from jax.experimental.multihost_utils import assert_equal as assert_equal_on_both
address = f"127.0.0.1:{sys.argv[2]}"
jax.distributed.initialize(address, num_processes=2, process_id=int(sys.argv[1]))
from test_eggroll import *  # with eight devices each

new, scores = on_one_device()
step, params, [i, x] = problem()
together, parts = step(params, KEY, [i, spread(x, 16)])
assert jax.process_count() == 2 and not parts.is_fully_addressable
assert_close(together, new, ulps=300)
for part in parts.addressable_shards:
    assert_close(part.data, scores[part.index], ulps=300)
assert_equal_on_both(jax.tree.map(np.asarray, together))  # bit for bit
assert len(parts.addressable_shards) == 8
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def assert_both_succeed(processes):
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors


def test_two_processes_give_the_answer_of_one():
    port = free_port()
    both = [python("-c", ONE_OF_TWO_PROCESSES, i, port) for i in range(2)]  # wait for each other
    assert_both_succeed(both)


@pytest.mark.parametrize("spec", [PartitionSpec("pairs"), PartitionSpec()], ids=["own", "same"])
def test_shard_map_gives_the_mean_over_devices_with_a_key_for_each(spec):
    """Of scores that are standardized over all, on texts of their own or on the same."""
    es = Eggroll(0.2)
    params = rnn_params()
    texts = random_text(4, 2, 6)  # (devices, pairs, length + 1)
    if spec == PartitionSpec():
        texts[:] = texts[0]

    def evaluate(device, texts):
        return es.evaluate(eggroll.bits, params, jax.random.fold_in(KEY, device), texts)

    def gradient(device, scores):  # (devices, pairs, 2)
        return es.gradient(params, jax.random.fold_in(KEY, device), standardize(scores)[device])

    def on_device(mine):
        device = jax.lax.axis_index("pairs")
        scores = jax.lax.all_gather(evaluate(device, mine[0]), "pairs")
        return jax.lax.pmean(gradient(device, scores), "pairs")

    mesh = jax.make_mesh((4,), ("pairs",), axis_types=(AxisType.Auto,))
    together = jax.shard_map(on_device, mesh=mesh, in_specs=spec, out_specs=PartitionSpec())
    scores = jax.jit(jax.vmap(evaluate))(jnp.arange(4), texts)
    gradients = jax.jit(jax.vmap(gradient, (0, None)))(jnp.arange(4), scores)
    mean = jax.tree.map(lambda g: g.mean(axis=0), gradients)
    assert_close(jax.jit(together)(texts), mean, ulps=300)


def test_parameters_and_data_on_an_explicit_mesh_need_nothing_and_sharded_data_auto_axes():
    step = partial(Eggroll(0.1).step, wavy, lr=0.1)
    x = normal(KEY, (8, 4))
    expected = jax.jit(step)(PARAMS, KEY, x)
    sharded = spread(x, mode=AxisType.Explicit)
    everywhere = NamedSharding(sharded.sharding.mesh, PartitionSpec())
    params, replicated = jax.device_put((PARAMS, x), everywhere)
    for data in x, replicated:
        assert_close(jax.jit(step)(params, KEY, data), expected)
    with pytest.raises(ValueError, match=r"axis_types=\(AxisType.Auto,\).*auto_axes"):
        jax.jit(step)(PARAMS, KEY, sharded)
    with_auto_axes = auto_axes(step, out_sharding=everywhere)
    assert_close(jax.jit(with_auto_axes)(PARAMS, KEY, sharded), expected)


# Models ------------------------------------------------------------------------------------------


def test_mlp_is_the_composition_of_its_layers():
    params = jax.tree.map(lambda p: p + 0.1, eggroll.mlp_init(KEY, (3, 5, 2)))
    first, last = in_float64(params)
    x = normal(KEY, (4, 7, 3))
    h = np.tanh(in_float64(x) @ first["W"] + first["b"])
    with jax.numpy_rank_promotion("allow"):
        assert_close(eggroll.mlp(params, x), h @ last["W"] + last["b"])


def test_mlp_init_keeps_the_variance():
    [layer] = eggroll.mlp_init(KEY, (400, 300))
    assert_mean(layer["W"].ravel() ** 2, 1 / 400)


def clip(x):
    return np.clip(x, -127, 127)


def whole_product(x, M):
    return np.floor(x @ M * round(2048 / math.sqrt(len(M))) / 2**15)


def whole_log2_p(logits):
    """In units of 2⁻⁸, with the powers of two in Python's whole numbers."""
    parts = [divmod(int(l), 16) for l in logits]
    total = sum((256 + u * (174 + 5 * u) // 16) * 2 ** (q + 8) for q, u in parts)
    leading = total.bit_length() - 1
    fraction = (total << 8 >> leading) - 256  # the 8 bits after the leading one
    log2 = round(256 * math.log2(1 + (fraction + 0.5) / 256))
    return 16 * logits - (256 * (leading - 16) + log2)


def whole_weights(params):
    """The nearest multiple of 2¹⁶, halves up, in 2¹⁶."""
    return jax.tree.map(lambda p: np.floor(np.asarray(p) / 2**16 + 0.5), params)


def rnn_params(vocab=7):
    params = eggroll.rnn_init(KEY, vocab, 6)
    return jax.tree.map(lambda p: p + 0.3 * normal(jax.random.key(1), p.shape), params)


def int_params(vocab=7):
    """Random everywhere, also in the lower halves."""
    random = np.random.default_rng(1)
    params = eggroll.int_rnn_init(KEY, vocab, 8)
    return jax.tree.map(lambda p: jnp.int32(random.integers(-40 << 16, 40 << 16, p.shape)), params)


FLOATS = SimpleNamespace(
    params=rnn_params,
    see=lambda params: params,
    cell=eggroll.rnn,
    bit=1,
    weights=in_float64,
    product=np.matmul,
    times=np.multiply,
    sigmoid=special.expit,
    tanh=np.tanh,
    clip=np.asarray,
    log2_p=lambda logits: special.log_softmax(logits) / math.log(2),
)
WHOLE = SimpleNamespace(  # numbers in float64, exact below 2⁵³
    params=int_params,
    see=eggroll.weights,
    cell=eggroll.int_rnn,
    bit=2**8,
    weights=whole_weights,
    product=whole_product,
    times=lambda z, x: np.floor(z * x / 256),
    sigmoid=lambda x: clip(x) + 127,
    tanh=clip,
    clip=clip,
    log2_p=whole_log2_p,
)
both_networks = pytest.mark.parametrize("slow", [FLOATS, WHOLE], ids=["floats", "integers"])


def slow_rnn(slow, params, text):
    """A minimal gated unit as a loop, as the docstrings have it: log₂ p (length, vocab)."""
    h = np.zeros(len(params["U"]))
    log2_p = []
    for token in text:
        emb = slow.clip(params["emb"][token])
        x1, x2 = np.split(slow.product(emb, params["W"]) + params["b"], 2)
        u1, u2 = np.split(slow.product(h, params["U"]), 2)
        z = slow.sigmoid(x1 + u1)
        h = h + slow.times(z, slow.tanh(x2 + slow.times(z, u2)) - h)
        log2_p.append(slow.log2_p(slow.clip(slow.product(h, params["head"]))))
    return np.array(log2_p)


def slow_bits(slow, params, text):
    log2_p = slow_rnn(slow, params, text[:-1])
    return sum(log2_p[np.arange(len(text) - 1), text[1:]])


def random_text(*shape, vocab=7, seed=0):
    return np.random.default_rng(seed).integers(0, vocab, shape).astype(np.int32)


def test_bits_is_the_loop_over_the_text_for_every_member_of_the_rnn():
    es = Eggroll(0.2, 2, normal)
    params = rnn_params()
    texts = random_text(3, 9)
    expected = slow_scores(partial(slow_bits, FLOATS), dense_members(es, params, 3), texts)
    assert_close(es.evaluate(eggroll.bits, params, KEY, texts), expected, ulps=20)
    assert_close(eggroll.bits(eggroll.rnn_init(KEY, 7, 6), texts[0]), -8 * np.log2(7))


@both_networks
def test_sample_follows_the_distribution_of_the_model(slow):
    """Of what it reads, that is of what it wrote."""
    params = slow.params(7)
    tokens = np.asarray(eggroll.sample(slow.see(params), KEY, 2, 400, slow.cell, slow.bit))
    assert tokens.dtype == np.int32
    p = 2 ** (slow_rnn(slow, slow.weights(params), [2, *tokens[:-1]]) / slow.bit)
    p = p / p.sum(axis=1, keepdims=True)
    assert p.std(axis=0).max() > 0.02  # it depends on what it read
    surprise = -np.log(p[np.arange(400), tokens])
    assert_mean(surprise - special.entr(p).sum(axis=1), 0)
    assert_mean(np.eye(7)[tokens] - p, 0)


# Integers -----------------------------------------------------------------------------------------

likelihood = partial(eggroll.bits, cell=eggroll.int_rnn)
END = 127 << 16  # of the scale of a parameter


def fast_and_slow(es, params):
    """The network of params and the members of pair 0: what the code sees, and the reference."""
    noise = es.noise(jax.random.fold_in(KEY, 0), params)
    fast = eggroll.weights(params), es.perturb(params, noise), es.perturb(params, noise, -1)
    [members] = dense_members(es, params, 1, whole_weights)
    return zip(fast, [whole_weights(params), *members], strict=True)


def test_weights_are_the_upper_half_rounded():
    p = np.arange(-END, END + 1, 2**12)
    found = eggroll.weights({"W": jnp.int32(p)[None], "b": jnp.int32(p)})
    assert (found["W"].dtype, found["b"].dtype) == (jnp.int8, jnp.int32)
    assert_equal(found, whole_weights({"W": p[None], "b": p}))


@pytest.mark.parametrize("m, n", [(4, 3), (33, 2)])
def test_products_of_integers_are_those_of_dense_members(m, n):
    random = np.random.default_rng(0)
    W = jnp.asarray(random.integers(-127 << 16, 127 << 16, (m, n)), jnp.int32)
    x = random.integers(-127, 128, (6, m))
    i = np.array([[0, m - 1]])
    relative_error = 2**-7  # of the factor 2048/√m, a whole number
    for M, slow in fast_and_slow(IntEggroll(sigma=5), W):
        with jax.numpy_rank_promotion("allow"):
            y = eggroll.product(jnp.int8(x), M)
            rows = eggroll.rows(M, i)
        assert y.dtype == jnp.int32
        assert_equal(y, whole_product(x, slow))
        exact = x @ slow / (16 * math.sqrt(m))
        assert (np.abs(y - exact) <= 1 + relative_error * np.abs(exact)).all()
        assert_equal(rows, clip(slow[i]))


def test_the_integer_network_is_the_slow_one_bit_for_bit():
    text = random_text(9)
    for fast, slow in fast_and_slow(IntEggroll(sigma=3), int_params()):
        h = jnp.zeros(8, jnp.int8)
        expected = slow_rnn(WHOLE, slow, text)
        for token, next_token, log2_p in zip(text, text[1:], expected, strict=False):
            h, found = eggroll.int_rnn(fast, h, token, next_token)
            assert (h.dtype, found.dtype) == (jnp.int8, jnp.int32)
            assert found == log2_p[next_token]
        assert np.std(expected) > 100
        assert likelihood(fast, jnp.asarray(text)) == slow_bits(WHOLE, slow, text)


def test_powers_and_logarithms_within_their_errors():
    x = np.arange(-128, 128)
    powers = in_float64(eggroll.exp2(jnp.asarray(x, jnp.int8)))
    np.testing.assert_allclose(powers, 2.0 ** (x / 16 + 16), rtol=0.0031)
    assert 256 * powers.max() < 2**32
    ends = 2 ** np.arange(1, 33)
    large = np.random.default_rng(0).integers(1, 2**32, 10**5)
    x = np.concatenate([np.arange(1, 2**17), ends - 1, ends // 2, large])
    logarithms = in_float64(eggroll.log2(jnp.asarray(x, jnp.uint32))) / 256
    np.testing.assert_allclose(logarithms, np.log2(x), rtol=0, atol=0.005)


def test_a_softmax_of_integers_is_within_both_errors():
    for logits in np.random.default_rng(0).integers(-127, 128, (100, 256)):
        exact = logits / 16 - np.log2(np.sum(2.0 ** (logits / 16)))
        error = math.log2(1.0031) + 0.005
        np.testing.assert_allclose(whole_log2_p(logits) / 256, exact, rtol=0, atol=error)


@pytest.mark.parametrize("value", [127, -127])
def test_nothing_overflows_at_the_extremes(value):
    """The widest network, and all weights and all noise as large as they can be."""
    init = eggroll.int_rnn_init(KEY, 256, 1024)
    params = jax.tree.map(lambda p: jnp.full_like(p, value << 16), init)
    text = random_text(3, vocab=256)
    es = IntEggroll(sigma=127)
    ones = jax.tree.map(jnp.ones_like, es.noise(KEY, params))
    for sign in 1, -1:
        slow = jax.tree.map(lambda w: w + sign * 127, whole_weights(params))  # noqa: B023
        found = likelihood(es.perturb(params, ones, sign), jnp.asarray(text))
        assert found == slow_bits(WHOLE, slow, text)


HIGH = 2**31 - 1
LOW = -(2**31)


def test_votes_of_the_largest_scores_and_of_many_pairs_do_not_overflow():
    U = jnp.zeros((8, 16), jnp.int32)
    E = many_noises(IntEggroll(), U, 200)
    votes = E[:, 0, 0]  # which add up to 200 for this entry, beyond int8
    scores = np.where(votes[:, None] > 0, [HIGH, LOW], [LOW, HIGH])
    assert_equal(IntEggroll().gradient(U, KEY, scores), slow_sum(votes, E))


@pytest.mark.parametrize("start", [127, 0, -127])
def test_a_step_of_the_largest_learning_rate_ends_at_the_end_of_the_scale(start):
    """At 0 hardly any pair ties, and otherwise all do."""
    U = jnp.full((8, 16), start << 16)

    def huge(M, _):
        h = eggroll.product(jnp.ones(8, jnp.int8), M)
        return jnp.where(jnp.sum(h) > 0, HIGH, LOW)

    def step(lr):
        return IntEggroll(sigma=127).step(huge, U, KEY, jnp.arange(64), lr)[0]

    new = step(2**24)  # 2³⁰/pairs
    assert new.dtype == jnp.int32
    assert jnp.abs(new).max() == END
    assert_equal(step(2**31 - 1), new)


@pytest.mark.parametrize("chunk, place", [(None, np.asarray), (4, np.asarray), (8, spread)])
def test_an_integer_step_is_a_loop_over_dense_members(chunk, place):
    """Also in chunks, and on eight devices."""
    params = int_params()
    params["emb"] = jnp.full_like(params["emb"], END)
    texts = random_text(16, 6)
    es = IntEggroll(4, chunk=chunk)
    members = dense_members(es, params, 16, whole_weights)
    scores = slow_scores(partial(slow_bits, WHOLE), members, texts)
    better = np.sign(scores[:, 0] - scores[:, 1])
    assert set(better) >= {-1, 1}
    votes = slow_sum(better, many_noises(es, params, 16))
    moved = jax.tree.map(lambda p, v: np.clip(p + 30_000 * v, -END, END), params, votes)
    data = place(texts)
    new, found = jax.jit(partial(es.step, likelihood))(params, KEY, data, 30_000)
    assert_equal((found, new), (scores, moved))
    assert_equal(es.gradient(params, KEY, found), votes)
    assert {p.dtype for p in new.values()} == {np.dtype("int32")}


def test_no_vote_is_lost():
    """Votes too few to move a weight move it later: parameters are start + lr · all votes."""
    lr = 2**16 // 7
    step = jax.jit(partial(IntEggroll().step, likelihood))
    gradient = jax.jit(IntEggroll().gradient)
    start = params = int_params()
    votes = jax.tree.map(jnp.zeros_like, params)
    for t in range(30):
        key = jax.random.fold_in(KEY, t)
        new, scores = step(params, key, jnp.asarray(random_text(30, 6, seed=t)), lr)
        votes = jax.tree.map(jnp.add, votes, gradient(params, key, scores))
        params = new
    assert_equal(params, jax.tree.map(lambda p, v: p + lr * v, start, votes))
    for name, weights in whole_weights(params).items():
        assert np.abs(weights - whole_weights(start)[name]).max() > 2


def test_clipping_is_a_rectifier():
    u = jnp.arange(-1000, 255)
    assert_equal(eggroll.saturate(u - 127) + jnp.int32(127), np.maximum(0, u))


def test_no_float_in_an_integer_step():
    """Of all types in its jaxpr, however deep."""
    step = jax.jit(partial(IntEggroll(chunk=4).step, likelihood))
    jaxpr = jax.make_jaxpr(step)(int_params(), KEY, jnp.asarray(random_text(8, 6)), jnp.int32(9))
    types = set(re.findall(r"[\w)]:([\w<>]+)\[", str(jaxpr)))
    assert {"i8", "i32"} <= types <= {"i8", "i32", "u32", "bool", "key<fry>"}


# Command line ------------------------------------------------------------------------------------

TINY = "--population 64 --hidden 8 --length 8"
LAST_LINE = (
    r"held-out (\d\.\d\d) bits/byte after ([\d,]+) steps "
    r"\(unigram (\d\.\d\d), bigram (\d\.\d\d); (\d+) windows\)"
)


def main(options):
    eggroll.main(shlex.split(options))


def python(*arguments, cwd=None, **environment):
    """Python as a process of its own, with warnings as errors."""
    usual = {
        "PYTHONPATH": HERE,
        "PYTHONWARNINGS": "error",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
    }
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=os.environ | usual | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """To work in, with texts and a checkpoint."""
    monkeypatch.chdir(tmp_path)
    Path("cat.txt").write_text("the cat sat on the mat — " * 200, encoding="utf-8")
    Path("abc.txt").write_bytes(b"abc" * 100)
    Path("xyz.txt").write_bytes(b"xyz" * 100)
    Path("empty.txt").write_bytes(b"")
    save_checkpoint("good.npz", b"abc", eggroll.rnn_init(KEY, 3, 8))
    Path("cut.npz").write_bytes(Path("good.npz").read_bytes()[:-100])
    return tmp_path


def save_checkpoint(path, alphabet, params, cell=eggroll.rnn, step=300):
    kind = f"{cell.__name__}, hidden {len(params['U'])}, bytes {alphabet}"
    eggroll.save(path, kind, params, step)


def arrays(path):
    with np.load(path) as file:
        return dict(file)


@pytest.mark.parametrize("kind, encoding", [("", "utf-8"), ("--integer --lr 6000", "ascii")])
def test_the_program_learns_prints_a_sample_and_ends_with_the_score(kind, encoding, folder):
    """Also on a stream that lacks the dash."""
    options = "--text cat.txt --steps 150 --population 512 --hidden 16 --length 16"
    program = [HERE / "eggroll.py", *options.split(), *kind.split()]
    out, err = python(*program, PYTHONIOENCODING=encoding).communicate(timeout=300)
    assert not err
    held_out, steps, unigram, *_ = re.search(LAST_LINE + "\n$", out).groups()
    assert float(held_out) < float(unigram) - 0.5
    assert steps == "150"
    written = out.split("compiled")[1].split("\n\n")[1].replace("?", "—")
    assert len(written.encode()) >= 300
    assert set(written.encode()) <= set("the cat sat on the mat — \ufffd".encode())


@pytest.mark.parametrize("slow, kind", [(FLOATS, ""), (WHOLE, "--integer")], ids=["float", "int"])
def test_the_program_scores_a_checkpoint_on_text_that_is_not_learned(slow, kind, folder, capsys):
    """Network, unigram and bigram on the same windows; --seconds 0 only scores."""
    random = np.random.default_rng(0)
    letters = np.frombuffer(b"abcd", np.uint8)
    learned = random.choice(letters, 9 * 1028, p=[0.4, 0.3, 0.2, 0.1]).tobytes()
    held_out = random.choice(letters, 1028, p=[0.1, 0.2, 0.3, 0.4]).tobytes()
    Path("drift.txt").write_bytes(learned + held_out)
    params = slow.params(4)
    save_checkpoint("c.npz", b"abcd", params, slow.cell)
    before = arrays("c.npz")
    hidden = len(params["U"])
    main(f"--text drift.txt --seconds 0 --checkpoint c.npz --hidden {hidden} {kind}")
    out = capsys.readouterr().out
    assert "goes on from step 300" in out
    assert_equal(arrays("c.npz"), before)

    windows = [held_out[start : start + 257] for start in range(0, 1028, 257)]
    ones = Counter(learned)
    twos = Counter(itertools.pairwise(learned))
    firsts = Counter(learned[:-1])
    network = slow.weights(params)
    bits = [-slow_bits(slow, network, np.frombuffer(w, np.uint8) - 97) for w in windows]
    pairs = [*itertools.chain(*map(itertools.pairwise, windows))]
    unigram = [(ones[b] + 0.4) / (len(learned) + 1.6) for _, b in pairs]
    bigram = [(twos[a, b] + 0.1) / (firsts[a] + 0.4) for a, b in pairs]
    stated = [float(x) for x in re.search(LAST_LINE, out).group(1, 3, 4, 5)]
    scores = sum(bits) / slow.bit / len(pairs), -np.log2(unigram).mean(), -np.log2(bigram).mean()
    np.testing.assert_allclose(stated, [*scores, 4], atol=0.006)


@pytest.mark.parametrize(
    "slow, kind", [(FLOATS, "--hidden 6 --lr 0.001"), (WHOLE, "--hidden 8 --integer --lr 6000")]
)
def test_going_on_continues_exactly_every_step_is_new_and_lr_falls(slow, kind, folder, capsys):
    save_checkpoint("a.npz", b"abc", slow.params(3), slow.cell)
    shutil.copy("a.npz", "b.npz")

    def go_on(steps, path):
        options = f"--text abc.txt --population 64 --length 8 --steps {steps} --checkpoint {path}"
        main(f"{options} {kind}")
        return arrays(path)

    states = [go_on(0, "a.npz"), go_on(1, "a.npz"), go_on(1, "a.npz")]
    assert states[2]["step"] == 302
    assert "goes on from step 301\n" in capsys.readouterr().out
    assert_equal(go_on(2, "b.npz"), states[2])
    # new noise and new examples at every step: the same ones again would go the same way again
    start, middle, end = [state["U"].ravel().astype(float) for state in states]
    cosine = (middle - start) @ (end - middle) / math.dist(middle, start) / math.dist(end, middle)
    assert 0 < abs(cosine) < 0.8
    if slow is WHOLE:  # votes are whole numbers, all even or not, of lr/(1 + step/600)
        assert np.gcd.reduce((middle - start).astype(int)) in (4000, 8000)


@pytest.mark.parametrize("kind", ["", "--integer"])
def test_x64_changes_nothing_of_what_the_program_prints(kind, folder, capsys):
    last_lines = set()
    for x64 in False, True:
        with jax.enable_x64(x64):
            main(f"--text cat.txt {TINY} --steps 20 {kind}")
        last_lines.add(capsys.readouterr().out.splitlines()[-1])
    assert len(last_lines) == 1


@pytest.mark.parametrize("options, sigma", [("", 2), ("--sigma 2", 2), ("--sigma 9", 9)])
def test_sigma_of_integers_is_in_sixteenths(options, sigma, folder, monkeypatch):
    sigmas = []

    def caught(sigma, rank, chunk):
        sigmas.append(sigma)
        return IntEggroll(sigma, rank, chunk=chunk)

    monkeypatch.setattr(eggroll, "IntEggroll", caught)
    main(f"--text abc.txt {TINY} --integer --steps 1 {options}")
    assert sigmas == [sigma]


def compiled_step(options, monkeypatch):
    """The step of the program, compiled, its text, and what was printed."""
    caught = {}

    def learn(options, kind, params, train_step, held_out_bits):
        caught.update(inspect.getclosurevars(train_step).nonlocals, params=params)
        return params, 0

    monkeypatch.setattr(eggroll, "learn", learn)
    main(options)
    lr = caught["as_lr"](caught["lr"])
    return caught["generation"].lower(caught["params"], 0, lr, caught["text"]).compile()


def types_of(program):
    return set(re.findall(r"\b((?:s|u|f|bf)\d+)\w*\[", program.as_text()))


def test_no_float_in_the_program_that_trains(folder, monkeypatch):
    """In the compiled HLO of the whole step, as the command line runs it."""
    whole = types_of(compiled_step(f"--text cat.txt {TINY} --integer", monkeypatch))
    assert {"s8", "s32"} <= whole <= {"s8", "s32", "u8", "u32", "u64"}
    assert "f32" in types_of(compiled_step(f"--text cat.txt {TINY}", monkeypatch))


def test_texts_are_pieces_of_the_text_from_its_first_byte_to_its_last():
    texts = np.asarray(eggroll.draw_texts(KEY, jnp.arange(10), 1000, length=3))
    starts = texts[:, :1]
    assert_equal(texts, starts + np.arange(4))
    assert_equal(np.unique(starts), np.arange(7))


def test_the_program_has_the_learning_rate_that_its_help_names(folder, capsys):
    d = sum(p.size for p in eggroll.rnn_init(KEY, 3, 8).values())  # abc.txt has three bytes

    def last_line(options=""):
        main(f"--text abc.txt --population 64 --hidden 8 --length 8 --steps 3 {options}")
        return capsys.readouterr().out.splitlines()[-1]

    lr = 14.35 * 0.04 * math.sqrt(64 / d)
    assert last_line() == last_line(f"--lr {lr}") != last_line(f"--lr {lr / 2}")
    assert last_line("--sigma 0.08") == last_line(f"--sigma 0.08 --lr {2 * lr}")


def test_a_step_of_a_large_file_is_given_the_text_as_bytes_once(folder, monkeypatch, capsys):
    Path("large.txt").write_bytes(b"0123456789" * 10**5)
    program = compiled_step(f"--text large.txt {TINY}", monkeypatch)
    assert program.memory_analysis().argument_size_in_bytes < 900_000 + 10_000
    assert program.memory_analysis().temp_size_in_bytes < 900_000
    assert re.findall(r"(\w+)\[900000\]", program.as_text().partition("\n")[0]) == ["u8"]
    assert int(re.search(LAST_LINE, capsys.readouterr().out)[5]) == 256


def test_a_large_file_is_loaded_in_seconds_and_at_most_five_times_its_size(folder):
    code = """if True:
        import re, sys, time, eggroll
        start = time.process_time()
        alphabet, text, windows = eggroll.load_text(sys.argv[1], 32)
        eggroll.ngram_bits(text, windows, len(alphabet))
        peak = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]
        print(1024 * int(peak), time.process_time() - start, *windows.shape)
    """
    size = 40_000_000
    Path("large.txt").write_bytes(np.random.default_rng(0).bytes(size))
    printed = []
    for path in "abc.txt", "large.txt":
        out, _ = python("-c", code, path, PYTHONWARNINGS="").communicate(timeout=300)
        printed.append([float(x) for x in out.split()])
    (empty, *_), (peak, seconds, count, length) = printed
    assert peak - empty < 5 * size
    assert seconds < 10
    assert (count, length) == (256, 257)


def test_bigrams_are_counted_across_the_pieces_of_a_large_file():
    """The pair (0, 1) is there once, at the end of the first piece."""
    text = np.repeat([0, 1], 2**20).astype(np.uint8)
    _, bigram = eggroll.ngram_bits(text, np.array([[0, 1]]), 2)
    assert_close(bigram, -math.log2(1.1 / (2**20 + 0.2)))


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_ctrl_c_ends_training_not_the_program_and_kill_leaves_a_whole_checkpoint(end, folder):
    options = f"--text cat.txt {TINY} --seconds 600 --checkpoint c.npz"
    process = python(HERE / "eggroll.py", *options.split())
    lines = [next(process.stdout) for _ in range(4)]  # the last two after two and four seconds
    process.send_signal(end)
    out, err = process.communicate(timeout=300)
    saved = arrays("c.npz")["step"]
    assert saved >= int(lines[2].split()[1].replace(",", "")) > 0
    if end == signal.SIGINT:
        assert process.returncode == 0, err
        assert "interrupted" in out
        assert f"after {saved:,} steps" in re.fullmatch(LAST_LINE, out.splitlines()[-1])[0]


def press_ctrl_c(process):
    """Until it ends: an interrupt in one of JAX's own callbacks is lost, and one presses again."""
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        time.sleep(1)


@pytest.mark.parametrize("text", ["pipe", "cat.txt"], ids=["loads", "compiles"])
def test_ctrl_c_while_it_loads_or_compiles_is_one_line(text, folder):
    os.mkfifo("pipe")
    process = python(HERE / "eggroll.py", "--text", text, PYTHONWARNINGS="")
    if text == "cat.txt":
        process.stdout.readline()  # how many bytes there are to learn
        press_ctrl_c(process)
    else:
        with open("pipe", "wb"):  # once the program opens it, too
            press_ctrl_c(process)
    _, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (130, "interrupted\n")


def test_importing_changes_no_signal_handler():
    code = """if True:
        import signal
        before = [signal.getsignal(s) for s in signal.valid_signals()]
        import eggroll
        assert before == [signal.getsignal(s) for s in signal.valid_signals()]
    """
    _, err = python("-c", code).communicate(timeout=300)
    assert not err


def test_a_save_cut_short_leaves_the_old_checkpoint_and_no_other_file(folder, monkeypatch):
    def savez(file, **arrays):
        file.write(b"half of a checkpoint")
        raise KeyboardInterrupt

    files = set(os.listdir())
    before = Path("good.npz").read_bytes()
    monkeypatch.setattr(np, "savez", savez)
    with pytest.raises(KeyboardInterrupt):
        eggroll.save("good.npz", "kind", {"W": np.zeros(3)}, 0)
    assert Path("good.npz").read_bytes() == before
    assert set(os.listdir()) == files


def test_two_saves_at_once_each_leave_a_whole_file(folder):
    def save_and_load(i):
        eggroll.save("both.npz", "kind", {"W": np.full(10**5, i)}, 0)
        return len(set(arrays("both.npz")["W"]))

    files = set(os.listdir())
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(save_and_load, range(100))) == {1}
    assert set(os.listdir()) == files | {"both.npz"}


REFUSED = {
    "--text nowhere.txt": "nowhere.txt",
    "--text empty.txt": "20 bytes.* got 0",
    "--text ''": "No such file",
    "--checkpoint ''": "No such file",
    "--checkpoint nowhere/x.npz": "nowhere/x.npz",
    "--checkpoint cut.npz": "cut.npz is not a checkpoint",
    "--checkpoint abc.txt": "abc.txt is not a checkpoint",
    "--checkpoint good.npz --hidden 9 --integer": "good.npz is not .*--integer, --hidden",
    "--checkpoint good.npz --text xyz.txt": "good.npz is not .* bytes of --text",
    "--population 7": "--population: .*'7'",
    "--population 2000000000 --rank 500": "out of memory.*--chunk",  # a thousand terabytes
    "--chunk 0": "--chunk: .*'0'",
    "--chunk 3": "chunk=3 and pairs=2048",
    "--rank half": "--rank: .*'half'",
    "--sigma -1": "--sigma: .*'-1'",
    "--sigma inf": "--sigma: .*'inf'",
    "--lr nan": "--lr: .*'nan'",
    "--hidden 0": "--hidden: .*'0'",
    "--length 0": "--length: .*'0'",
    "--length 300": "--length",
    "--steps x": "--steps: .*'x'",
    "--seconds x": "--seconds: .*'x'",
    "--seed x": "--seed: .*'x'",
    "--nonsense 1": "--nonsense",
    "--integer --sigma 0.1": "sigma = 1 … 127.*sigma=0.1",
    "--integer --rank 2": "rank=1.*rank=2",
}


@pytest.mark.parametrize("options", REFUSED)
def test_options_that_are_wrong_are_refused_in_one_line(options, folder, capsys):
    with pytest.raises(SystemExit) as exit:
        main(f"--length 8 --hidden 8 --steps 1 --text abc.txt {options}")
    error = capsys.readouterr().err
    assert exit.value.code == 2
    assert error.count("\n") == 1
    assert re.search(REFUSED[options], error)


def test_options_are_not_taken_from_a_program_that_calls_main(monkeypatch):
    called_with = []
    monkeypatch.setattr(sys, "argv", ["kernel", "-f", "kernel.json"])
    monkeypatch.setattr(eggroll, "train", called_with.append)
    eggroll.main()
    assert called_with[0].population == 4096


def test_an_error_that_is_not_out_of_memory_does_not_speak_of_chunks(monkeypatch, capsys):
    def train(options):
        raise jax.errors.JaxRuntimeError("INTERNAL: a fault")

    monkeypatch.setattr(eggroll, "train", train)
    with pytest.raises(SystemExit):
        main("")
    error = capsys.readouterr().err
    assert "INTERNAL: a fault" in error
    assert "--chunk" not in error


def test_a_text_of_ones_own_is_learned_where_python_has_no_help(folder):
    code = """if True:
        import sys
        sys.modules["pydoc_data"] = sys.modules["pydoc_data.topics"] = None
        import eggroll
        eggroll.main(["--text", "abc.txt", "--steps", "1", "--population", "2"])
    """
    out, err = python("-c", code).communicate(timeout=300)
    assert re.fullmatch(LAST_LINE, out.splitlines()[-1]), err


def test_chunks_run_where_the_whole_population_is_out_of_memory(folder):
    """With 2 GB of address space, which 2²⁰ members exceed at once and 4096 of them do not."""
    code = """if True:
        import resource, sys, eggroll
        eggroll.jax.devices()
        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + (2 << 30),) * 2)
        eggroll.main(sys.argv[1:])
    """
    options = (
        f"--text abc.txt --population {2**20} --rank 8 --length 8 --hidden 8 --steps 1".split()
    )
    whole = python("-c", code, *options)
    in_chunks = python("-c", code, *options, "--chunk", 2048)
    assert re.fullmatch(r".*out of memory.*--chunk.*\n", whole.communicate(timeout=300)[1])
    assert whole.returncode == 2
    in_chunks.communicate(timeout=300)
    assert in_chunks.returncode == 0


# Documents ---------------------------------------------------------------------------------------

README = (HERE / "README.md").read_text(encoding="utf-8")
SOURCE = (HERE / "eggroll.py").read_text(encoding="utf-8")


def run(code, names=None):
    """The names that code leaves, where these are known."""
    Path("code.py").write_text(code, encoding="utf-8")
    with jax.numpy_rank_promotion("allow"):
        return runpy.run_path("code.py", names)


@pytest.mark.parametrize("module", ["eggroll", "es"])
def test_the_method_alone_trains_the_example_of_the_docstring(
    module, folder, monkeypatch, optimized, capsys
):
    """The file down to the line "copy up to here", as es.py; and the whole file."""
    Path("es.py").write_text(SOURCE.split("# … copy up to here")[0], encoding="utf-8")
    monkeypatch.syspath_prepend(folder)
    example = eggroll.__doc__[eggroll.__doc__.index("    import jax") :].split("\n[1]")[0]
    run(textwrap.dedent(example).replace("from eggroll", f"from {module}"))
    printed = [float(x) for x in capsys.readouterr().out.split()]
    stated = [float(x) for x in re.findall("# about (.*)", example)]
    np.testing.assert_allclose(printed, stated, rtol=0, atol=0.5)


def test_the_metadata_name_what_is_imported():
    [block] = re.findall(r"^# /// script\n(.*?)^# ///\n", SOURCE, re.MULTILINE | re.DOTALL)
    metadata = tomllib.loads(block.replace("# ", ""))
    imports = re.findall(r"^\s*(?:import|from) (\w+)", SOURCE.split('"""', 2)[2], re.MULTILINE)
    needed = set(imports) - sys.stdlib_module_names
    assert {re.match(r"\w+", name)[0] for name in metadata["dependencies"]} == needed
    assert metadata["requires-python"] == ">=3.11"
    requirements = (HERE / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert set(metadata["dependencies"]) <= set(requirements)


def blocks(markdown):
    return re.findall(r"```python\n(.*?)```", markdown, re.DOTALL)


EXAMPLE, *_ = blocks(README)
RECIPES = dict(re.findall(r"summary>(.*?)</summary>(.*?)</d", README, re.DOTALL))
MESSAGES = RECIPES["Messages, and what they mean"]
LIBRARIES = ("optax", "equinox", "flax", "gymnasium")
STEP = "es.step(fitness, params, key, data, 4)"
TRIED = {  # what is done with the names that a recipe defines: a step, if nothing else is said
    "One batch": "trained, scores",
    "Held-out": "best_params, best, es.step(fitness, params, key, data, 4)",
    "Many devices": "g, params, scores",
    "A fitness": "policy",
    "Gradients": "es.step(adapted, params, key, data, 4)",
    "A transformer": """es.step(lambda p, x: jnp.sum(attention(p, x, 2)), {"scale": jnp.ones(8)}
        | {name: jax.random.normal(key, (9, 8)) for name in ("emb", "pos")}
        | {name: jax.random.normal(key, (8, 8)) for name in ("q", "k", "v", "out")},
        key, jnp.arange(20).reshape(4, 5) % 9, 0.1)""",
    "Deep": """es.step(lambda p, x: jnp.sum(deep(p, x)),
        {"W": jnp.ones((5, 3, 3)), "b": jnp.ones((5, 3))}, key, jnp.ones((4, 3)), 0.1)""",
    "Half": "es.step(half, params, key, data, 4)",
    "Integers": "ints, scores",
}


def test_the_example_in_the_readme_prints_what_it_says(folder, optimized, capsys):
    assert len(re.findall(r"^.", EXAMPLE, re.MULTILINE)) <= 25
    run(EXAMPLE)
    line = r"^step +(\d+): accuracy (\S+)$"
    printed = re.findall(line, capsys.readouterr().out, re.MULTILINE)
    stated = re.findall(line, README, re.MULTILINE)
    np.testing.assert_allclose(np.float64(printed), np.float64(stated), rtol=0, atol=0.03)


def test_mistakes_in_keys_are_as_the_readme_says():
    """The same key moves params in P directions; split(key, P) are the keys of the noise."""
    pairs = 4
    step = jax.jit(partial(Eggroll(0.1).step, lambda W, x: jnp.sum(jnp.sin(x @ W))))
    start = normal(KEY, (5, 3))
    data = normal(jax.random.key(1), (pairs, 5))

    def directions(keys):  # how many the params have moved in
        params = start
        path = []
        for key in keys:
            params, _ = step(params, key, data, 0.1)
            path.append(np.ravel(params - start))
        return np.linalg.matrix_rank(path, rtol=1e-3)

    new_keys = jax.random.split(KEY, 12)
    assert directions([KEY] * 12) <= pairs < directions(new_keys)
    for i, key in enumerate(new_keys):
        assert key == jax.random.fold_in(KEY, i)


@cache
def example():
    """The names of README's example, after two steps."""
    return run(EXAMPLE.replace("range(201)", "range(2)"))


def recipe(start):
    """The blocks of README's recipe whose title starts like that."""
    [text] = [text for title, text in RECIPES.items() if title.startswith(start)]
    return blocks(text)


def run_recipe(start, names=None, then=""):
    """The names that README's recipe leaves after the example."""
    code = recipe(start)
    if start.startswith("Many devices"):  # it goes on after another
        code = [block for block in recipe("Out of memory") + code if "distributed" not in block]
    for library in LIBRARIES:
        if re.search(rf"^(from|import) {library}", code[0], re.MULTILINE):
            pytest.importorskip(library)
    return run("\n".join([*code, then]), example() | (names or {}))


@pytest.mark.parametrize("title", [title for title, text in RECIPES.items() if blocks(text)])
@pytest.mark.parametrize("x64", [False, True], ids=["", "x64"])
@pytest.mark.filterwarnings("default")
def test_recipes_run_as_printed(title, x64, folder):
    lines = [re.findall(r"^(?!import|from).", block, re.MULTILINE) for block in recipe(title)]
    assert max(map(len, lines)) <= 12
    [tried] = [tried for start, tried in TRIED.items() if title.startswith(start)] or [STEP]
    with jax.enable_x64(x64):
        result = jax.tree.leaves(run_recipe(title, then=f"result = {tried}")["result"])
    assert all(np.isfinite(x).all() for x in result)
    assert any(np.ptp(x) > 0 for x in result)


def test_recipes_with_one_batch_see_the_batch_that_they_are_given_and_compile_once(folder):
    names = run_recipe("One batch")
    step, trained, frozen = (names[name] for name in ("tune_step", "trained", "frozen"))
    x, inside = names["batch"]
    with jax.numpy_rank_promotion("allow"):
        _, first = step(trained, frozen, KEY, (x, inside), 0)
        _, other = step(trained, frozen, KEY, (x, ~inside), 0)
    assert np.any(first != other)
    assert step._cache_size() == 1


def copies_of_the_previous(tokens, vocab=9):
    """What a transformer is to answer: the previous token; later, of the last three, another."""
    before = jnp.roll(tokens, 1, axis=-1).at[..., 0].set(tokens[..., 0])
    return before, jnp.where(before < vocab - 3, before, 2 * vocab - 4 - before)


@cache
def pretrained():
    """A transformer of README's recipe, trained by backpropagation: params, log-likelihood."""
    attention = run_recipe("A transformer")["attention"]

    def log_likelihood(params, tokens, task):
        h = jax.vmap(lambda tokens: attention(params[0] | params[1], tokens, 2))(tokens)
        log_p = jax.nn.log_softmax(h @ params[1]["head"])
        right = jax.nn.one_hot(copies_of_the_previous(tokens)[task], 9)
        return jnp.mean(jnp.sum(log_p * right, axis=-1))

    def descend(state, key):
        params, speed = state
        tokens = jax.random.randint(key, (64, 8), 0, 9)
        g = jax.grad(log_likelihood)(params, tokens, 0)
        speed = jax.tree.map(lambda v, g: 0.9 * v + g, speed, g)
        return (jax.tree.map(lambda p, v: p + 0.05 * v, params, speed), speed), None

    sizes = {"q": 16, "k": 16, "v": 16, "out": 16, "head": 9}
    matrices = {name: normal(jax.random.key(n), (16, n)) / 4 for name, n in sizes.items()}
    fixed = {"emb": normal(KEY, (9, 16)), "pos": normal(KEY, (8, 16)) / 2}
    params = [fixed, matrices | {"scale": jnp.ones(16)}]
    start = params, jax.tree.map(jnp.zeros_like, params)
    (params, _), _ = jax.jit(partial(jax.lax.scan, descend))(start, jax.random.split(KEY, 150))
    return params, log_likelihood


@pytest.mark.parametrize("times", [1, 10])
def test_recipes_for_fine_tuning_improve_a_transformer_and_ten_times_the_lr_ruins_it(times, folder):
    """The numbers of README: log-likelihoods before and after, and with ten times the lr."""
    numbers = r"rose from (\S+) to (\S+)\. With ten times this `lr` it fell below (\S+)\. "
    [stated] = re.findall(numbers, " ".join(README.split()))
    before, after, ruined = map(float, stated)
    with jax.numpy_rank_promotion("allow"):
        params, log_likelihood = pretrained()
        fitness = jax.jit(partial(log_likelihood, task=1))
        tokens = jax.random.randint(KEY, (200, 16, 8), 0, 9)
        held_out = tokens[100:].reshape(-1, 8)
        names = {"params": params, "fitness": fitness, "pairs": 128, "data": tokens}
        code = recipe("One batch")[0].replace("lr = es.sigma", f"lr = {times} * es.sigma")
        step = run(code, example() | names)["tune_step"]
        frozen, trained = params[:1], params[1]
        scores = [fitness(params, held_out)]
        for t in range(100):
            trained, _ = step(trained, frozen, jax.random.fold_in(KEY, t), tokens[t], t)
            scores.append(fitness([*frozen, trained], held_out))
    if times == 1:
        np.testing.assert_allclose([scores[0], scores[-1]], [before, after], atol=0.15)
        assert min(scores) > scores[0] - 0.1
    else:
        assert scores[-1] < ruined


@cache
def on_many_devices():
    return run_recipe("Many devices: shard_map")


def test_recipes_for_many_devices_give_the_answer_of_one(folder):
    names = on_many_devices()
    es, fitness, params, key = (names[name] for name in ("es", "fitness", "params", "key"))
    step = jax.jit(partial(es.step, fitness))
    data_key, noise_key = jax.random.split(key)
    x = jax.random.normal(data_key, (1024, 16, 2))
    fresh = x, jnp.sum(x**2, axis=-1) < 1.4
    with jax.numpy_rank_promotion("allow"):
        expected = [step(params, key, names["data"], 2.0), step(params, noise_key, fresh, 2.0)]
        found = [
            names["sharded_step"](params, key, names["sharded_data"], 2.0),
            names["fresh_step"](params, key, 2.0),
        ]
        with jax.set_mesh(names["explicit_mesh"]):
            params = jax.device_put(params, PartitionSpec())
            found.append(names["explicit_step"](params, key, names["explicit_data"]))
    assert_close(found, [*expected, expected[0]], ulps=300)
    assert all(len(scores.sharding.device_set) == 8 for _, scores in found)


def test_recipes_for_many_devices_need_a_fitness_that_uses_its_example():
    def devices(fitness):
        step = jax.jit(partial(Eggroll(0.1).step, fitness))
        _, scores = step(jnp.ones(3), KEY, spread(jnp.arange(8)), 1.0)
        return len(scores.sharding.device_set)

    assert devices(lambda v, i: jnp.sum(v)) == 1
    assert devices(lambda v, i: jnp.sum(v) + 0 * i) == 8


def test_recipes_for_many_devices_need_data_that_is_spread(folder):
    names = on_many_devices()
    spread_data = "jax.lax.with_sharding_constraint(x, over_pairs)"
    code = recipe("Out of memory")[1]
    assert spread_data in code
    names = run(code.replace(spread_data, "x"), example() | {"over_pairs": names["over_pairs"]})
    assert len(names["scores"].sharding.device_set) == 1


def test_recipes_for_shard_map_give_the_mean_over_devices(folder):
    names = on_many_devices()
    es, fitness, params, key = (names[name] for name in ("es", "fitness", "params", "key"))
    keys = [jax.random.fold_in(key, device) for device in range(8)]
    with jax.numpy_rank_promotion("allow"):
        g, scores = names["mapped"](params, key, names["data"])
        x, inside = (np.split(x, 8) for x in names["data"])
        evaluate = jax.jit(partial(es.evaluate, fitness, params))
        own = jnp.stack([evaluate(*part) for part in zip(keys, zip(x, inside), strict=True)])
        shaped = standardize(own)
        gradient = jax.jit(partial(es.gradient, params))
        gradients = [gradient(key, s) for key, s in zip(keys, shaped, strict=True)]
    assert_close(scores, own.reshape(1024, 2))
    assert_close(g, jax.tree.map(lambda *g: sum(g) / 8, *gradients), ulps=300)


def test_recipes_for_several_processes_give_the_answer_of_one(folder):
    """The program is: the first block, the example, a mesh, the second block."""
    *_, first, second = recipe("Many devices: shard_map")
    assert "127.0.0.1:8476" in first
    short = EXAMPLE.replace("range(201)", "range(2)")
    mesh = recipe("Out of memory")[0]
    save = "jnp.save(sys.argv[1], scores.addressable_shards[0].data)"
    code = [first.replace("8476", str(free_port())), short, mesh, second, save]
    Path("train.py").write_text("\n".join(code), encoding="utf-8")
    assert_both_succeed([python("train.py", i, PYTHONPATH=HERE) for i in range(2)])
    found = np.concatenate([np.load("0.npy"), np.load("1.npy")])
    es, fitness = example()["es"], example()["fitness"]
    state = [example()[name] for name in ("params", "key", "data")]
    with jax.numpy_rank_promotion("allow"):
        # in both programs the mesh's recipe makes a step first, on other devices
        new, _ = jax.jit(partial(es.step, fitness))(*state, 2.0)
        _, expected = jax.jit(partial(es.step, fitness))(new, *state[1:], 2.0)
    assert_close(found, expected)


@pytest.mark.parametrize("start", ["Flax NNX", "Flax Linen"])
@pytest.mark.filterwarnings("default")
def test_recipes_for_flax_train_the_params_and_leave_statistics(start, folder):
    names = run_recipe(start)
    fitness, params, data = (names[name] for name in ("fitness", "params", "data"))
    statistics = jax.tree.map(np.array, names["rest"])
    assert sorted(map(np.mean, jax.tree.leaves(statistics))) == [0, 1]  # mean and variance
    assert len(jax.tree.leaves(params)) == 6
    step = jax.jit(partial(names["es"].step, fitness))
    mean = jax.jit(lambda params: jnp.mean(jax.vmap(fitness, (None, 0))(params, data)))
    with jax.numpy_rank_promotion("allow"):
        for t in range(40):
            params, _ = step(params, jax.random.fold_in(KEY, t), data, 4 / (1 + t / 50))
        assert mean(params) > 0.8 > mean(names["params"])
    assert_equal(names["rest"], statistics)


def test_recipes_for_gradients_need_dense(folder):
    names = run_recipe("Gradients")
    es, params = names["es"], names["params"]
    member = es.perturb(params, es.noise(KEY, params))
    example = jax.tree.map(lambda x: x[0], names["data"])
    without = run(recipe("Gradients")[0].replace("dense(params)", "params"), names)
    with jax.numpy_rank_promotion("allow"):
        right = names["adapted"](dense(member), example)
        assert_close(names["adapted"](member, example), right)
        assert abs(without["adapted"](member, example) - right) > 0.001


def test_recipes_for_convolutions_need_dense():
    es = Eggroll(0.1)
    kernel, images = jnp.ones((4, 2, 3, 3)), normal(KEY, (4, 1, 2, 5, 5))

    def convolve(kernel, image):
        return jnp.sum(jax.lax.conv(image, jnp.float32(kernel), (1, 1), "SAME") ** 2)

    def with_dense(kernel, image):
        return convolve(dense(kernel), image)

    scores = jax.jit(partial(es.evaluate, with_dense))(kernel, KEY, images)
    assert_close(scores, slow_scores(convolve, dense_members(es, kernel, 4), images), ulps=300)
    with pytest.raises(TypeError, match="LowRank"):
        es.evaluate(convolve, kernel, KEY, images)


def test_recipes_for_simulators_let_each_member_act(folder):
    names = run_recipe("A fitness")
    es, policy = names["es"], names["policy"]
    seen = normal(KEY, (64, 2, 4))

    @jax.jit
    def act(i, j, sign):
        noise = es.noise(jax.random.fold_in(KEY, i), policy)
        member = dense(es.perturb(policy, noise, sign))
        return jnp.argmax(eggroll.mlp(member, seen[i, j]))

    with jax.numpy_rank_promotion("allow"):
        expected = [[act(i, 0, 1), act(i, 1, -1)] for i in range(64)]
        np.testing.assert_array_equal(names["act"](policy, KEY, seen), expected)


def test_recipes_for_simulators_learn(folder):
    names = run_recipe("A fitness")
    policy, returns = names["policy"], []
    gradient = jax.jit(names["es"].gradient)
    with jax.numpy_rank_promotion("allow"):
        for t in range(20):
            key = jax.random.fold_in(KEY, t)
            scores = names["play"](policy, key, t)
            returns.append(scores.mean())
            g = gradient(policy, key, standardize(scores))
            policy = jax.tree.map(lambda p, g: p + g, policy, g)
    assert returns[0] < 100
    assert np.mean(returns[-5:]) > 300


def test_recipes_for_early_stopping_stop_and_keep_the_best(folder):
    names = run_recipe("Held-out")
    assert 20 < names["t"] < 999
    assert names["t"] - names["best_t"] == 20
    with jax.numpy_rank_promotion("allow"):
        score = names["held_out_score"](names["best_params"], names["held_out"])
    assert score == names["best"]
    assert names["best"] > 0.9


def rows():
    """The code in the three cells of every line of README's table of messages."""
    lines = re.findall(r"^\| (`.*)\|(.*)\|(.*)\|$", MESSAGES, re.MULTILINE)
    return [[re.findall("`(.*?)`", cell) for cell in line] for line in lines]


@pytest.mark.parametrize("wrong, messages, right", rows())
def test_recipes_for_messages_say_what_to_write(wrong, messages, right, folder):
    """Every line of README's table, as printed: on LowRank an error, which the remedy mends."""
    names = {"x": normal(KEY, (3, 4)), "M": low_rank(4, 4), "i": 2, "dense": dense, "jnp": jnp}
    array = names | {"M": dense(names["M"])}
    for code in wrong:
        with pytest.raises((TypeError, AttributeError)) as error:
            run(code, names)
        assert any(message in str(error.value) for message in messages)
        expected = run(f"result = {code}", array)["result"]
        if right != ["dense(M)"]:
            [found] = [run(f"result = {code}", names)["result"] for code in right]
            np.testing.assert_allclose(dense(found), expected, rtol=1e-5)


def scan_stacked_biases(p, _):
    h, _ = jax.lax.scan(lambda h, b: (h + b, None), jnp.ones(3), p["b"])
    return h.sum()


def map_stacked_biases(p, _):
    return jax.vmap(jnp.sum)(p["b"]).sum()


BIASES = {"b": jnp.ones((5, 3))}
OTHER_MESSAGES = {
    "tuple index out of range": lambda: evaluate(scan_stacked_biases, BIASES),
    "rank should be at least 1": lambda: evaluate(map_stacked_biases, BIASES),
    "must be floating-point": lambda: evaluate(params=jnp.ones((2, 2), jnp.complex64)),
    "Cannot convert_element_type": lambda: evaluate(params=KEY),
    "fitness must return a scalar": lambda: evaluate(lambda p, x: jnp.ones(2)),
    "data must be arrays that share a first axis, of pairs": lambda: evaluate(
        data=[ONES, jnp.ones(3)]
    ),
}


@pytest.mark.parametrize("message, provoke", OTHER_MESSAGES.items(), ids=OTHER_MESSAGES)
def test_recipes_for_messages_quote_them(message, provoke):
    assert message in MESSAGES
    with pytest.raises((TypeError, ValueError, IndexError), match=message):
        provoke()


@pytest.mark.parametrize("kind", ["scores", "ranks"])
def test_ranks_withstand_outliers(kind, folder):
    """The numbers of README's recipe: one score in a hundred is -10⁶."""
    shape = {"scores": standardize, "ranks": run_recipe("Outliers")["ranks"]}[kind]
    lr = {"scores": 0.05, "ranks": 0.05 * math.sqrt(12)}[kind]  # ranks have a variance of 1/12
    es = Eggroll(0.1)

    def clean(params, x):
        return -jnp.sum((x @ params["W"] + params["b"] - x[:4]) ** 2)

    def fitness(params, example):
        x, bad = example
        return jnp.where(bad, -1e6, clean(params, x))

    def step(params, t):
        key = jax.random.fold_in(KEY, t)
        data = normal(key, (512, 8)), jax.random.uniform(jax.random.fold_in(key, 0), 512) < 0.01
        scores = es.evaluate(fitness, params, key, data)
        g = es.gradient(params, key, shape(scores))
        return jax.tree.map(lambda p, g: p + lr / (1 + t / 100) * g, params, g), None

    start = {"W": jnp.zeros((8, 4)), "b": jnp.zeros(4)}
    params, _ = jax.lax.scan(step, start, jnp.arange(300))
    end = jnp.mean(jax.vmap(partial(clean, params))(normal(KEY, (1000, 8))))
    worst, best = {"scores": (-5, -3.5), "ranks": (-0.01, 0)}[kind]
    assert worst < end < best


# README's rule for lr, on three problems. Each has params, the score of one example, examples for
# `PAIRS` pairs, and what the rule takes for the length of a step.

PAIRS = 64


def fresh_hard_steps(key):
    """README's example: is a point inside of a circle?"""

    def draw(key):
        x = normal(key, (PAIRS, 16, 2))
        return x, jnp.sum(x**2, axis=-1) < 1.4

    return eggroll.mlp_init(key, (2, 32, 2)), example()["fitness"], draw, 2


def fresh_wide(key):
    """To answer four inputs as another wide network does."""
    teacher = eggroll.mlp_init(jax.random.fold_in(key, 99), (32, 256, 8))

    def fitness(params, x):
        return -jnp.mean((eggroll.mlp(params, x) - eggroll.mlp(teacher, x)) ** 2)

    params = eggroll.mlp_init(key, (32, 256, 8))
    return params, fitness, partial(normal, shape=(PAIRS, 4, 32)), 2


def pretrained_transformer(key):
    """jax.grad has taught it to name the first of four letters. Now two letters change names."""
    attention = run_recipe("A transformer")["attention"]

    def log_p(params, text, name):
        logits = attention(params, text, 2)[-1] @ params["emb"].T
        return jax.nn.log_softmax(logits)[name]

    def draw(key):
        return jax.random.randint(key, (PAIRS, 4), 0, 8)

    def climb(params, key):
        taught = lambda params: jnp.mean(jax.vmap(lambda x: log_p(params, x, x[0]))(draw(key)))
        g = jax.grad(taught)(params)
        return jax.tree.map(lambda p, g: p + 0.3 * g, params, g), None

    shapes = {name: (16, 16) for name in ("q", "k", "v", "out")} | {"emb": (8, 16), "pos": (4, 16)}
    start = {name: normal(key, shape) / 4 for name, shape in shapes.items()}
    start["scale"] = jnp.ones(16)
    params, _ = jax.lax.scan(climb, start, jax.random.split(key, 200))
    return params, lambda params, x: log_p(params, x, x[0] ^ (x[0] < 2)), draw, 1


def loss_after_training(start, fitness, draw, key, sigma, lr):
    """After 150 generations, with README's falling lr."""

    def generation(params, t):
        key_data, key_noise = jax.random.split(jax.random.fold_in(key, t))
        falling = lr / (1 + t / 50)
        return Eggroll(sigma).step(fitness, params, key_noise, draw(key_data), falling)[0], None

    end, _ = jax.lax.scan(generation, start, jnp.arange(150))
    examples = jax.lax.map(draw, jax.random.split(jax.random.fold_in(key, 150), 8))
    return -jnp.mean(jax.vmap(jax.vmap(partial(fitness, end)))(examples))


@pytest.mark.parametrize("problem", [fresh_hard_steps, fresh_wide, pretrained_transformer])
def test_the_rule_for_lr_gains_most_of_what_three_times_more_or_less_would(problem, folder):
    """With perturbations of length 1 and 4. Where lr is 0, the loss is that of the start."""
    with jax.numpy_rank_promotion("allow"):
        start, fitness, draw, length = problem(KEY)
        d = sum(p.size for p in jax.tree.leaves(start))
        sigma = jnp.array([1, 4]) / math.sqrt(d)
        rule = length * sigma * math.sqrt(min(1, 2 * PAIRS / d))
        lr = jnp.outer(rule, jnp.array([0, 1 / 3, 1, 3]))  # (σ, multiples of the rule)
        train = partial(loss_after_training, start, fitness, draw, KEY)
        train_all = jax.vmap(jax.vmap(train, (None, 0)))  # every lr of every σ
        losses = jax.jit(train_all)(sigma, lr)
    before, _, after, _ = losses.T
    assert np.all(before - after > 0.5 * (before - losses.min(axis=1)))


@pytest.mark.parametrize("spread", [0.0, 3.0])  # of the examples; 0: one batch for all
def test_the_share_of_noise_in_the_scores_gives_the_length_of_a_step(spread, folder):
    """README's ν, and lr √(2νd/N)/σ. Noise makes scores of variance σ² ‖C‖² = 1."""
    C = normal(KEY, (100, 100))
    offsets = spread * normal(jax.random.key(1), 64)
    es = Eggroll(0.01)

    def fitness(M, offset):
        return jnp.sum(C * dense(M)) + offset

    new, scores = jax.jit(partial(es.step, fitness))(jnp.zeros((100, 100)), KEY, offsets, lr=0.1)
    [look] = [block for block in blocks(README) if "noise_share" in block]
    v = run(look, {"jnp": jnp, "scores": scores})["noise_share"]
    np.testing.assert_allclose(v, 1 / (1 + jnp.var(offsets)), rtol=SE * math.sqrt(2 / 64))
    length = 0.1 * math.sqrt(2 * v * 10_000 / 128) / 0.01
    np.testing.assert_allclose(jnp.linalg.norm(new), length, rtol=SE / 100)


def test_documents_name_options_and_commands_that_exist(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main("--help")
    help = capsys.readouterr().out
    assert max(map(len, help.splitlines())) <= 100
    assert help.count("\n") < 40
    assert set(re.findall(r"`(--[a-z]+)", README)) <= set(re.findall(r"--\w+", help))
    [command] = re.findall(r"^.*-m pytest$", README, re.MULTILINE)
    assert command in (HERE / ".ci" / "run").read_text(encoding="utf-8")


def test_documents_name_tests_that_exist():
    files = [HERE / "test_eggroll.py", *HERE.glob("theory/test_*.py")]
    sources = "".join(file.read_text(encoding="utf-8") for file in files)
    tests = set(re.findall(r"^def (test_\w+)", sources, re.MULTILINE))
    for page in HERE.glob("theory/[0-9]*.md"):
        _, named = page.read_text(encoding="utf-8").split("## Which test shows it")
        assert set(re.findall(r"`(test_\w+)`", named)) <= tests, page


def test_documents_have_no_broken_links():
    pages = {page: page.read_text(encoding="utf-8") for page in HERE.glob("theory/*.md")}
    cells = [cell.source for cell in notebook().cells if cell.cell_type == "markdown"]
    pages |= {HERE / "README.md": README, HERE / "tutorial.ipynb": "\n".join(cells)}
    for page, text in pages.items():
        links = re.findall(r"\]\(([^)#\s]+)", text)
        local = [link for link in links if ":" not in link]
        assert [link for link in local if not (page.parent / link).exists()] == [], page


def notebook():
    return nbformat.read(HERE / "tutorial.ipynb", as_version=4)


def code_cells():
    return [cell for cell in notebook().cells if cell.cell_type == "code"]


def test_any_cell_of_the_tutorial_is_short():
    lines = [len(cell.source.splitlines()) for cell in code_cells()]
    assert max(lines) <= 30


def test_the_tutorial_is_kept_as_one_whole_run():
    assert (HERE / "tutorial.ipynb").stat().st_size < 1.5e6
    counts = [cell.execution_count for cell in code_cells()]
    assert counts == list(range(1, len(counts) + 1))
    outputs = [*itertools.chain(*(cell.outputs for cell in code_cells()))]
    assert {output.get("name", "stdout") for output in outputs} == {"stdout"}  # no warnings
    assert all(output.output_type != "error" for output in outputs)
    texts = [output.get("text", "") or output.data.get("text/markdown", "") for output in outputs]
    assert not re.search(r"/(home|root|tmp|usr|work|Users)/", "".join(texts))  # of one machine


# Recorded from Gymnasium 1.4.0, Acrobot-v1, in float64; the policy is argmax(observation @ W).
ACROBOT_W = "1 2 1  -1 1 1  3 3 1  -1 3 1  1 3 1  -3 1 3"
ACROBOT_FIRST = "0.025019092485 0.079442761838 0.055137138814 -0.054958563298"
ACROBOT_LAST = "1.917614148 1.991045300 -1.868707085 -1.945553748"  # an angle was wrapped
ACROBOT_ACTIONS = (
    "1111111111111111111111100000001222111000000222221100000222221100000022222221000000022"
    "222221110000002222222222221100000000"
)
ACROBOT_STEPS = [  # state, action, new state, up: the bounds on speed, and both angles wrapped
    ("3 -3 12.5 -28", 0, "-0.1437386039 2.6041071996 12.5663706144 -28.2743338823", False),
    ("-3 3 -12.5 28", 2, "0.1437386039 -2.6041071996 -12.5663706144 28.2743338823", False),
    ("2 0.5 3 2", 2, "2.5539133162 0.9160440863 2.6472884605 2.1187548838", True),
]


def numbers(text):
    return jnp.array(text.split(), dtype=float)


def test_acrobot_in_the_tutorial_is_that_of_gymnasium(folder):
    defines = re.compile(r"^def (acrobot|swing_up)\(", re.MULTILINE)
    cells = [cell.source for cell in code_cells() if defines.search(cell.source)]
    names = run("\n".join(cells), {"jax": jax, "jnp": jnp, "partial": partial, "mlp": eggroll.mlp})
    acrobot, act, swing_up = [jax.jit(names[f]) for f in ("acrobot", "act", "swing_up")]
    with jax.enable_x64(True):
        policy = [{"W": numbers(ACROBOT_W).reshape(6, 3), "b": jnp.zeros(3)}]
        first = state = numbers(ACROBOT_FIRST)
        for action in ACROBOT_ACTIONS:
            assert act(policy, state) == int(action)
            state, up = acrobot(state, int(action))
        assert up
        np.testing.assert_allclose(state, numbers(ACROBOT_LAST), rtol=1e-6)
        assert swing_up(policy, first) == -120  # -1 for every action but the last
        idle = jax.tree.map(jnp.zeros_like, policy)  # always action 0: truncated at 500
        assert swing_up(idle, first) == -500
        for state, action, new, terminated in ACROBOT_STEPS:
            state, up = acrobot(numbers(state), action)
            np.testing.assert_allclose(state, numbers(new), rtol=1e-7)
            assert up == terminated


RUN_THE_TUTORIAL = """
import nbclient, nbformat
notebook = nbformat.read("tutorial.ipynb", as_version=4)
nbclient.execute(notebook, timeout=1800)  # raises if a cell does
nbformat.write(notebook, "run.ipynb")
"""


@pytest.fixture(scope="session", autouse=True)
def tutorial(request, tmp_path_factory):
    """The process that runs the tutorial, if that is to be tested, beside all other tests."""
    if all(item.name != "test_the_tutorial_runs" for item in request.session.items):
        yield
        return
    folder = tmp_path_factory.mktemp("tutorial")  # where it may save its figure
    for name in "eggroll.py", "tutorial.ipynb":
        shutil.copy(HERE / name, folder)
    options = {"PYTHONWARNINGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "false"}
    with python("-c", RUN_THE_TUTORIAL, cwd=folder, **options) as process:
        yield process, folder
        process.kill()


def test_the_tutorial_runs(tutorial):
    process, folder = tutorial
    _, err = process.communicate()
    assert process.returncode == 0, err
    run = (folder / "run.ipynb").read_text(encoding="utf-8")
    assert '"name": "stdout"' in run
    assert '"name": "stderr"' not in run
    assert (folder / "theory" / "figures" / "convergence.png").stat().st_size > 10_000
