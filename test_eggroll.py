"""Every claim of eggroll.py, README.md and theory/, held against something independent.

    claim                                                   test_...
    entries, covariance and independence of the noise       noise_
    M multiplies and indexes like W + A Bᵀ, and no more     low_rank_, errors_
    evaluate, gradient, step = loops over dense members     evaluate_, gradient_, data_may
    any finite scores are standardized; the rest is worst   standardize_, what_is_not_finite
    bfloat16 is summed in float32; arguments are checked    bfloat16_, errors_
    one draw a pair, no N·m·n array, chunks bound memory    a_step_draws, no_program
    eight devices, two processes, sharded parameters        eight_, two_processes, parameters_may
    the formulas of theory/, all of integers                named at the end of each of its pages
    models                                                  mlp_is, bits_is, sample_follows
    command line: learns, resumes, Ctrl-C, kill, errors     it_learns, going_on, ctrl_c, a_save, bad_input
    examples, links and commands in the documents           the_method, the_example, the_documents
    recipes of README; the tutorial                         recipes_, ranks_, any_cell, the_tutorial, acrobot

Statistical tolerances are `SE` standard errors of the estimator, computed from theory or from the
sample itself: at 5 a correct program fails one comparison in a million, whatever the seed.
"""

import dis
import io
import itertools
import math
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
from collections import Counter
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import nbformat
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy import integrate, special, stats

import eggroll
from eggroll import Eggroll, IntEggroll, LowRank, dense, normal, signs, standardize, uniform

jax.config.update("jax_num_cpu_devices", 8)  # one at work but where data is sharded
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_disable_most_optimizations", True)  # compiling takes most of the time
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
    return jnp.sum(jnp.sin(3 * jax.lax.scan(layer, h, layers)[0])) * params["s"]


def many_noises(es, params, count):
    """E of pairs 0 … count - 1, formed outside the class: float64 (count, *shape)."""
    draw = jax.jit(jax.vmap(lambda i: es.noise(jax.random.fold_in(KEY, i), params)))

    def full(_, e):
        e = jax.tree.map(lambda x: np.asarray(x, float), e)
        return e[0] @ e[1].mT if isinstance(e, tuple) else e

    return jax.tree.map(full, params, draw(jnp.arange(count)))


def dense_members(es, params, pairs, see=lambda params: params):
    """(θ + σE, θ - σE) of each pair, formed outside the class in float64, θ = see(params)."""
    theta, E = see(params), many_noises(es, params, pairs)

    def member(i, scale):
        return jax.tree.map(lambda p, e: np.asarray(p, float) + scale * e[i], theta, E)

    return [(member(i, es.sigma), member(i, -es.sigma)) for i in range(pairs)]


def slow_scores(fitness, members, data):
    """(pairs, 2), one member at a time."""
    pairs = zip(members, data, strict=True)
    return np.array([[fitness(member, x) for member in pair] for pair, x in pairs], float)


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


def same(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


@pytest.fixture
def optimized(request):
    """For tests of what XLA makes of the code; as a parameter, yes or no."""
    jax.config.update("jax_disable_most_optimizations", not getattr(request, "param", True))
    yield
    jax.config.update("jax_disable_most_optimizations", True)


# Noise -------------------------------------------------------------------------------------------

# E a², E a⁴, E a⁶, E a⁸ of an entry a
MOMENTS = {"normal": (1, 3, 15, 105), "uniform": (1, 9 / 5, 27 / 7, 9), "signs": (1, 1, 1, 1)}
every_draw = pytest.mark.parametrize("name", DRAWS)


@every_draw
@pytest.mark.parametrize("rank, dtype", [(1, "float32"), (3, "bfloat16"), (None, "float32")])
def test_noise_has_mean_zero_and_identity_covariance_at_every_rank(name, rank, dtype):
    """Also the kurtosis; no bit is used twice: 70 entries are more than two words."""
    params = {"M": jnp.zeros((3, 4)), "S": jnp.zeros((2, 2, 3)), "v": jnp.zeros(70)}
    params = jax.tree.map(lambda p: p.astype(dtype), params)
    noise = many_noises(Eggroll(1.0, rank, DRAWS[name]), params, 20_000)
    k = MOMENTS[name][1]  # the fourth moment of an entry of the vector; in the matrix, of A Bᵀ/√r
    assert_mean(noise["M"] ** 4, k if rank is None else 3 + (k**2 - 3) / rank)
    for power, mean in (1, 0), (2, 1), (3, 0), (4, k):
        assert_mean((noise["v"] ** power).mean(axis=1) - mean, 0)
    e = np.concatenate([x.reshape(20_000, -1) for x in noise.values()], axis=1)  # (20000, 94)
    assert_mean(e, 0)
    covariance = e.T @ e / len(e)
    error = np.sqrt(((e**2).T @ e**2 / len(e) - covariance**2) / len(e))
    assert (np.abs(covariance - np.eye(94)) <= 6 * error + 1e-12).all()  # 4465 comparisons


@pytest.mark.parametrize("size", [1, 32, 33, 1000])
def test_signs_are_the_bits_of_the_random_words_in_order(size):
    words = np.asarray(jax.random.bits(KEY, (-(-size // 32),), jnp.uint32))
    bits = [int(w) >> k & 1 for w in words for k in range(32)][:size]
    np.testing.assert_array_equal(signs(KEY, (size,)), 2.0 * np.array(bits) - 1)


@pytest.mark.parametrize("es, dtype", [(Eggroll(1.0, 1, normal), float), (IntEggroll(), int)])
def test_noise_differs_between_leaves_layers_pairs_and_generations_alone(es, dtype):
    square = jnp.zeros((30, 30), dtype)
    params = {"a": square, "b": square, "stack": jnp.stack([square] * 2), "v": square[0]}

    def draw(key):
        return jax.vmap(lambda i: es.noise(jax.random.fold_in(key, i), params))(jnp.arange(50))

    now, later = draw(KEY), draw(jax.random.key(1))
    other_params = jax.tree.map(lambda p: p + 1, params)
    same(es.noise(jax.random.fold_in(KEY, 3), other_params), jax.tree.map(lambda e: e[3], now))
    leaves = [np.asarray(e, float).reshape(50, -1, 30) for e in jax.tree.leaves((now, later))]
    e = np.concatenate(leaves + [np.roll(e, 1, axis=0) for e in leaves], axis=1)  # of another pair
    assert e.shape == (50, 36, 30)  # four times A and B of a, b and two layers, and v
    assert dtype is float or set(np.unique(e)) == {-1, 1}
    i, j = np.triu_indices(36, 1)
    assert_mean((e[:, i] * e[:, j]).sum(axis=2), 0)  # one sum a pair, mean 0 if independent
    assert not np.isclose(e[:, i], e[:, j]).all(axis=2).any()


# Forward -----------------------------------------------------------------------------------------


def low_rank(shape, r, dtype=jnp.float32):
    *stack, m, n = shape
    keys, shapes = jax.random.split(KEY, 3), (shape, (*stack, m, r), (*stack, n, r))
    return LowRank(*map(partial(normal, dtype=dtype), keys, shapes))


@pytest.mark.parametrize("r, dtype", [(3, jnp.float32), (1, jnp.bfloat16)])
def test_low_rank_multiplies_and_indexes_like_the_dense_matrix(r, dtype):
    stack, ulps = low_rank((2, 5, 4), r, dtype), 8 * jnp.finfo(dtype).eps / 2**-23
    W, A, B = (np.asarray(x, float) for x in (stack.W, stack.A, stack.B))
    dense_stack = W + A @ B.mT
    M, D = stack[1], dense_stack[1]
    assert (M.shape, M.ndim, M.dtype, M.T.shape) == ((5, 4), 2, dtype, (4, 5)) and M[...] is M
    for size in (), (7,), (2, 7):
        x, y = (normal(jax.random.key(1), (*size, n), dtype) for n in M.shape)
        wide_x, wide_y = np.asarray(x, float), np.asarray(y, float)
        close((x @ M, np.asarray(x) @ M), [wide_x @ D] * 2, ulps)  # NumPy leaves it to M
        close(y @ M.T, wide_y @ D.T, ulps)
        close(x @ stack, wide_x @ dense_stack, ulps)
        if len(size) < 2:
            close((M @ y.T, stack @ y.T), (D @ wide_y.T, dense_stack @ wide_y.T), ulps)
    for i in -1, np.int64(3), jnp.array(1), jnp.array([0, 4, 4]), np.array([[1, 2], [3, 0]]):
        close(M[i], D[i], ulps)
    # stacks taken apart; dense touches nothing else
    apart = jax.vmap(lambda M: x @ M)(stack), jax.lax.scan(lambda _, M: (_, x @ M), 0, stack)[1]
    close(apart, [wide_x @ dense_stack[:, None]] * 2, ulps)
    out = dense({"stack": stack, "x": x, "none": None, "f": jnp.tanh})
    close(out.pop("stack"), dense_stack, ulps)
    assert out["x"] is x and out["none"] is None and out["f"] is jnp.tanh


# Update ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, rank, chunk, optimized",
    [("signs", 1, 2, False), ("normal", None, 3, False), ("uniform", 3, None, True)],
    indirect=["optimized"],
)
def test_evaluate_gradient_and_step_are_loops_over_dense_members(name, rank, chunk, optimized):
    """Whether σ and lr are numbers, or traced as by a schedule, or σ is batched."""
    make, x = partial(Eggroll, rank=rank, draw=DRAWS[name], chunk=chunk), normal(KEY, (6, 4))
    es, noise = make(0.3), make(0.3).noise(jax.random.fold_in(KEY, 0), PARAMS)
    members, E = dense_members(es, PARAMS, 6), many_noises(es, PARAMS, 6)
    matrices = {n for n, p in es.perturb(PARAMS, noise).items() if isinstance(p, LowRank)}
    assert matrices == (set() if rank is None else {"W", "stack", "biases"})
    close(dense((es.perturb(PARAMS, noise), es.perturb(PARAMS, noise, -1.0))), members[0])
    f = slow_scores(wavy, members, x)
    assert np.ptp(f) > 0.1  # the members differ

    def gradient(f):
        weights = (f[:, 0] - f[:, 1]) / (12 * 0.3)
        return jax.tree.map(lambda e: np.tensordot(weights, e, 1), E)

    step = jax.jit(lambda es, lr: es.step(wavy, PARAMS, KEY, x, lr))
    sweep = jax.jit(jax.vmap(lambda sigma: make(sigma).evaluate(wavy, PARAMS, KEY, x)))
    with jax.checking_leaks():
        swept, _, (new, scores) = sweep(jnp.array([0.1, 0.3])), step(make(0.1), 0.1), step(es, 0.5)
    assert step._cache_size() == 1
    close((scores, swept[1]), (f, f), ulps=300)
    g = gradient((f - f.mean()) / f.std())
    close(new, jax.tree.map(lambda p, g: p + 0.5 * g, PARAMS, g), ulps=1000)
    close(jax.jit(es.gradient)(PARAMS, KEY, f), gradient(f))


def test_data_may_be_any_pytree_and_fitness_may_be_of_any_kind():
    data = {"x": jnp.ones((4, 4)), "keys": jax.random.split(KEY, 4), "n": (np.arange(4.0), None)}

    def counts(params, example):
        assert example["x"].shape == (4,) and example["n"][0].shape == ()
        jax.random.normal(example["keys"])
        return jnp.sum(example["x"] @ params["W"] > 0)  # an integer, without a gradient

    for es in Eggroll(0.1), Eggroll(0.1, chunk=2):
        scores = es.evaluate(counts, PARAMS, KEY, data)
        assert scores.shape == (4, 2) and scores.dtype == jnp.int32
        assert es.gradient(PARAMS, KEY, scores)["W"].shape == (4, 3)
        assert es.evaluate(lambda p, x: 1.5, PARAMS, KEY, jnp.ones((4, 0))).shape == (4, 2)


@every_draw
@pytest.mark.parametrize("rank", [1, 2, None])
def test_gradient_of_a_linear_fitness_is_jax_grad_with_the_predicted_variance(name, rank):
    """The mean of g is C at every rank, and E|g - C|² = (E|E⟨C, E⟩|² - |C|²)/pairs."""
    m, n, pairs = 3, 4, 64
    C = jnp.linspace(-1, 2, m * n).reshape(m, n)
    W, fitness = jnp.ones((m, n)), lambda M: jnp.trace(M @ C.T)  # ⟨C, M⟩
    g = estimates(Eggroll(0.7, rank, DRAWS[name]), fitness, W, pairs, batches=500)
    assert_mean(g, jax.grad(fitness)(W).ravel())
    k, C2 = MOMENTS[name][1], float((C**2).sum())
    second = m * n + k - 1  # E|E⟨C, E⟩|² / |C|² at full rank
    if rank is not None:
        second = m * n + 2 + ((m + k - 1) * (n + k - 1) - m * n - 2) / rank
    assert_mean(((g - np.ravel(C)) ** 2).sum(axis=1), C2 * (second - 1) / pairs)


@pytest.mark.parametrize("rank, pairs", [(1, 2), (2, 2), (2, 5), (1, 20), (None, 1)])
def test_rank_of_the_update_is_pairs_times_r_up_to_full(rank, pairs):
    f = normal(jax.random.key(1), (pairs, 2))
    g = np.asarray(Eggroll(0.1, rank, normal).gradient(jnp.zeros((6, 8)), KEY, f), np.float64)
    expected = 6 if rank is None else min(pairs * rank, 6)
    singular = np.linalg.svd(g, compute_uv=False)
    assert (singular > 1e-5 * singular[0]).sum() == expected


@pytest.mark.parametrize("rank, impl, bits", [(2, "rbg", 32), (None, "rbg", 32), (2, None, 64)])
def test_gradient_uses_the_noise_of_evaluate_for_keys_and_floats_of_any_kind(rank, impl, bits):
    """With f = ⟨C, θ⟩: f± = f₀ ± σ⟨C, Eᵢ⟩, so ⟨C, g⟩ is known from the scores alone.

    Float64 arrays become float32 as everywhere in JAX, unless it is told to keep them.
    """
    es, C, W = Eggroll(0.2, rank, normal, 2), np.arange(-5.0, 15).reshape(5, 4), np.zeros((5, 4))
    with jax.enable_x64(bits == 64):
        key, fitness = jax.random.key(0, impl=impl), lambda M, _: jnp.trace(M @ C.T)
        f = es.evaluate(fitness, W, key, np.zeros(8))
        g, other = (es.gradient(W, k, f) for k in (key, jax.random.fold_in(key, 2)))
        new, _ = jax.jit(partial(es.step, fitness))(W, key, f, 0.1)
        assert f.dtype == g.dtype == new.dtype == f"float{bits}"
    expected = np.mean((np.asarray(f[:, 0] - f[:, 1], np.float64) / 0.4) ** 2)
    assert abs(np.vdot(C, g) / expected - 1) < {32: 64 * 2**-23, 64: 1e-13}[bits]
    assert abs(np.vdot(C, other) / expected - 1) > 0.01


def test_bfloat16_parameters_are_summed_in_float32():
    """In bfloat16, equal terms would stop counting at 256 of them; here there are 4096."""
    params, f = jax.tree.map(jnp.bfloat16, PARAMS), np.tile([1.0, 0], (4096, 1))
    for chunk in None, 8:
        ones = Eggroll(0.5, 1, lambda key, shape, dtype: jnp.ones(shape, dtype), chunk)
        for g in jax.tree.leaves(jax.jit(ones.gradient)(params, KEY, f)):
            assert g.dtype == jnp.bfloat16 and (g == 1.0).all()  # Σ 1 / (2 · 4096 · 0.5)


def test_float32_parameters_move_where_bfloat16_ones_would_not():
    """Cast the members inside the fitness: jax.tree.map reaches W, A and B."""

    def fitness(W, x):
        half = jax.tree.map(jnp.bfloat16, W)
        assert isinstance(half, LowRank) and half.dtype == jnp.bfloat16
        return jnp.sum(x @ half)

    W, x = jnp.ones((16, 16)), normal(jax.random.key(1), (32, 16), jnp.bfloat16)
    step = jax.jit(partial(Eggroll(0.1, draw=normal).step, fitness))
    (new, _), (stuck, _) = step(W, KEY, x, 1e-4), step(jnp.bfloat16(W), KEY, x, 1e-4)
    assert new.dtype == jnp.float32 and (new != 1).mean() > 0.9
    assert stuck.dtype == jnp.bfloat16 and (stuck == 1).all()


def test_standardize_is_the_z_score_at_any_scale():
    f = np.asarray(normal(KEY, (50, 2)), np.float64) * 3 + 7
    largest, whole = 3.4e38 * np.array([[1, -1], [0, 0.5]]), np.arange(6).reshape(3, 2)
    scaled = f, 1e30 * f, 1e37 * (f - 20), 1e-30 * f, 1e-37 * f, f + 1e6, 0 - f
    for f in *scaled, largest, -largest / 1.5, whole:
        f = f if f is whole else np.asarray(f, np.float32)
        z, f = standardize(f), f.astype(np.float64)
        assert z.dtype == jnp.float32
        np.testing.assert_allclose(z, (f - f.mean()) / f.std(), atol=1e-5)


def test_what_is_not_finite_counts_as_the_worst():
    f = np.arange(10.0).reshape(5, 2) - 3
    for bad in np.nan, np.inf, -np.inf:
        g, worst = f.copy(), f.copy()
        g[2, 1], worst[2, 1] = bad, -3
        close(standardize(g), standardize(worst))
        for equal in np.full((4, 2), 0.1), np.full((3, 2), bad), np.zeros((1, 2)), [[bad, 3.0]]:
            assert (standardize(equal) == 0).all()
    step = jax.jit(partial(Eggroll(1.0).step, lambda p, x: jnp.log(p["b"][0] * x)))
    params, scores = step(PARAMS, KEY, f[0], 0.1)
    assert 0 < np.isfinite(scores).sum() < scores.size
    assert all(np.isfinite(p).all() for p in jax.tree.leaves(params))


DATA, INT = jnp.ones((3, 4)), jnp.zeros((4, 3), jnp.int32)
OTHERWISE = """M * 2; 1 - M; -M; M < 0; np.ones((4, 4)) * M; len(M); iter(M); M.sum();
    M[1:]; M[None]; M[True]; M[1.0]; np.sum(M); jnp.sum(M); jnp.dot(ones, M);
    whole @ x; whole[0]; dense(whole)"""  # of a LowRank M, and one of integers
ERRORS = dict.fromkeys(re.split(r";\s+", OTHERWISE), "TypeError|AttributeError") | {
    **{f"{made_up}(M)": "TypeError: .*dense" for made_up in ("np.asarray", "bool", "M.__eq__")},
    "Eggroll(jnp.float32(-1))": "ValueError: sigma must be positive and finite, got -1",
    "Eggroll(0.1, 0)": "ValueError: rank must be None or .* got 0",
    "Eggroll(0.1, chunk=1.5)": "ValueError: chunk .* got 1.5",
    "scores(data=jnp.zeros((0, 4)))": r"ValueError: .* pairs ≥ 1.*\(0, 4\)",
    "scores(data=(DATA, jnp.ones(2)))": r"ValueError: .* share a first axis.*\(3, 4\).*\(2,\)",
    "scores(chunk=2)": "ValueError: chunk must divide the pairs, got chunk=2 and 3 pairs",
    "jax.jit(scores)(data=spread(DATA, 1, mode=AxisType.Explicit))": r"ValueError: .*AxisType.Auto,\)",
    "scores(lambda p, x: x)": r"ValueError: fitness must return a scalar, got shape \(4,\)",
    "scores(params={'n': [jnp.arange(3)]})": r"TypeError: params\['n'\]\[0\].* got int32; close over",
    "Eggroll(0.1).gradient(DATA, KEY, DATA[:, :3])": r"ValueError: .*pairs ≥ 1, got \(3, 3\)",
    "M[ones > 0]": r"TypeError: M\[i\] takes integers, got Array",
    "low_rank((4, 4, 4), 1).T": r"TypeError: a stack \(4, 4, 4\) has no .T",
    "x @ whole": r"TypeError: .*write product\(x, M\) for x @ M, rows\(M, i\) for M\[i\]",
    "IntEggroll(128)": "ValueError: sigma must be an integer of 1 to 127 sixteenths, got 128",
    "IntEggroll(0.5)": "ValueError: .* got 0.5",
    "IntEggroll(rank=2)": "ValueError: .* rank=1 and draw=signs, got 2 and signs",
    "IntEggroll(draw=normal)": "ValueError: .* rank=1 and draw=signs, got 1 and normal",
    "IntEggroll().noise(KEY, {'x': 1})": r"TypeError: params\['x'\] must be an array of int32, got 1",
    "IntEggroll().evaluate(lambda p, x: 1.0, INT, KEY, DATA)": r"TypeError: .*product\(x, M\)",
    "IntEggroll().step(lambda p, x: 1, INT, KEY, DATA, 0.1)": "TypeError: lr must be an integer",
    "eggroll.product(x, DATA)": "TypeError: .*takes int8, got int8 and float32",
    "eggroll.product(jnp.int8(jnp.ones(1025)), jnp.int8(INT))": r"ValueError: .*1024.*\(1025,\)",
}


def scores(fitness=lambda params, x: 0.0, params=PARAMS, data=DATA, chunk=None):
    return Eggroll(0.1, chunk=chunk).evaluate(fitness, params, KEY, data)


@pytest.mark.parametrize("call", ERRORS)
def test_errors_say_what_was_expected_and_what_came(call):
    M, names = low_rank((4, 4), 1), {"ones": jnp.ones((4, 4)), "x": jnp.ones(4, jnp.int8)}
    with pytest.raises((ValueError, TypeError, AttributeError)) as error:
        eval(call, globals() | names | {"M": M, "whole": jax.tree.map(jnp.int8, M)})
    assert re.match(ERRORS[call], f"{error.type.__name__}: {error.value}")


# What the compiler makes of it -------------------------------------------------------------------


def problem(method="step", pairs=256, **options):
    """A method of Eggroll, params and data, of which the numbers are to stay on the host."""

    def fitness(params, example):
        i, x = example
        return -jnp.mean((eggroll.mlp(params, x) - jnp.sin(i)) ** 2)

    es, params = Eggroll(0.1, **options), eggroll.mlp_init(KEY, (16, 64, 64))
    call = {"evaluate": es.evaluate, "step": partial(es.step, lr=0.1)}[method]
    data = np.arange(pairs), np.asarray(normal(KEY, (pairs, 16)))
    return jax.jit(partial(call, fitness)), params, *data


@cache
def compiled(method="step", **options):
    call, params, *data = problem(method, **options)
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
    step, chunks, full = (temporary(compiled(**c)) for c in ({}, {"chunk": 64}, {"rank": None}))
    assert max(step, chunks) < matrices / 4 and full >= matrices  # so the measure can tell
    eightfold = temporary(compiled(chunk=64, pairs=2048))
    assert eightfold < 2 * chunks  # so there is no copy of the data either
    assert eightfold < temporary(compiled(pairs=2048)) / 4


# Many devices ------------------------------------------------------------------------------------


def spread(data, *axes, mode=AxisType.Auto):
    """Data on a mesh of the given axes, its first axis over the first of them, "pairs"."""
    names = ("pairs", "model")[: len(axes)]
    mesh = jax.make_mesh(axes, names, axis_types=(mode,) * len(axes))
    return jax.device_put(data, NamedSharding(mesh, PartitionSpec("pairs")))


@cache
def on_one_device():
    _, params, *data = problem()
    return compiled()(params, KEY, data)


@pytest.mark.parametrize("chunk", [None, 64])
def test_eight_devices_give_the_answer_of_one(chunk, optimized):
    """All that travels is the update and scalars; each device needs an eighth of the memory."""
    step, params, i, x = problem(chunk=chunk)
    data = [i, spread(x, 8)]
    program = step.lower(params, KEY, data).compile()
    close(program(params, KEY, data), on_one_device(), ulps=300)
    assert temporary(program) < 1.3 / 8 * temporary(compiled())
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    found = re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", program.as_text())
    assert {kind for _, kind in found} == {"all-reduce"}
    shapes = [shape for what, _ in found for shape in re.findall(r"\w+\[([\d,]*)\]", what)]
    sizes = [math.prod(int(n) for n in shape.split(",") if n) for shape in shapes]
    parameters = sum(p.size for p in jax.tree.leaves(params))
    assert sum(n for n in sizes if n > 1) == parameters and sizes.count(1) <= 8


def test_parameters_may_be_sharded_too(optimized):
    step, params, i, x = problem()
    data = [i, spread(x, 4, 2)]
    over_columns = NamedSharding(data[1].sharding.mesh, PartitionSpec(None, "model"))
    params[1]["W"] = jax.device_put(params[1]["W"], over_columns)
    close(step(params, KEY, data), on_one_device(), ulps=300)


ONE_OF_TWO_PROCESSES = """
import sys, jax
from jax.experimental.multihost_utils import assert_equal
address = f"127.0.0.1:{sys.argv[2]}"
jax.distributed.initialize(address, num_processes=2, process_id=int(sys.argv[1]))
from test_eggroll import *  # with eight devices each

new, scores = on_one_device()
step, params, i, x = problem()
together, parts = step(params, KEY, [i, spread(x, 16)])
assert jax.process_count() == 2 and not parts.is_fully_addressable
close(together, new, ulps=300)
for part in parts.addressable_shards:
    close(part.data, scores[part.index], ulps=300)
assert_equal(jax.tree.map(np.asarray, together))  # bit for bit
assert len(parts.addressable_shards) == 8
"""


def test_two_processes_give_the_answer_of_one():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    both = [python("-c", ONE_OF_TWO_PROCESSES, i, port) for i in range(2)]  # wait for each other
    errors = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors


# The formulas of theory/: laws of the entries, exact means ----------------------------------------

equal = partial(np.testing.assert_allclose, rtol=1e-7, atol=1e-12)
NORMAL, UNIFORM = special.roots_hermitenorm(28), special.roots_legendre(28)
LAWS = {  # of one entry: values, probabilities; "three" is a law with the kurtosis of uniform
    "normal": (NORMAL[0], NORMAL[1] / NORMAL[1].sum()),
    "uniform": (math.sqrt(3) * UNIFORM[0], UNIFORM[1] / 2),
    "three": (math.sqrt(9 / 5) * np.array([-1, 0, 1]), np.array([5, 8, 5]) / 18),
    "signs": (np.array([-1, 1]), np.array([1, 1]) / 2),
    "skewed": (np.array([-1, 4]) / 2, np.array([4, 1]) / 5),
}
TWO_LAWS = ("signs", "signs"), ("three", "three"), ("skewed", "three")
KURTOSIS = {law: p @ x**4 for law, (x, p) in LAWS.items()}


def grid(law, size):
    """All values of independent entries, (points, size), and p: the mean of f (points, …) is p @ f."""
    values, p = (np.stack(np.meshgrid(*[x] * size), -1).reshape(-1, size) for x in law)
    return values, p.prod(1)


@pytest.fixture(scope="module", params=itertools.product(TWO_LAWS, (1, 2)), ids=str)
def noise(request):
    """E = A Bᵀ/√r of 2×3 matrices: all values, flat, and p; laws and kurtoses of A and B, and r."""
    laws, r = request.param
    (A, p), (B, q) = grid(LAWS[laws[0]], 2 * r), grid(LAWS[laws[1]], 3 * r)
    E = np.einsum("amr,bnr->abmn", A.reshape(-1, 2, r), B.reshape(-1, 3, r)) / math.sqrt(r)
    return E.reshape(-1, 6), np.outer(p, q).ravel(), laws, [KURTOSIS[law] for law in laws], r


def wave_of_norm(norm, *shape, seed=0):
    omega = np.random.default_rng(seed).normal(size=shape)
    return omega * norm / np.linalg.norm(omega)


def phi(omega, r, law_a="normal", law_b=None):
    """(φ_r(ω), ∇φ_r(ω)), flat: φ_r(ω) = φ_1(ω/√r)^r and φ_1(t) = E_b Πᵢ ψ(yᵢ), y = t b."""
    if r == math.inf:
        return math.exp(-np.sum(omega**2) / 2) * np.append(1, -omega)
    (a, q), (b, p) = LAWS[law_a], grid(LAWS[law_b or law_a], omega.shape[1])
    waves = np.exp(1j * (b @ omega.T)[..., None] * a / math.sqrt(r))  # (points, m, values)
    psi, slope = waves @ q, waves @ (1j * a * q)  # (points, m)
    p = p * psi.prod(1)
    gradient = (p[:, None] * slope / psi).T @ b
    return p.sum() ** (r - 1) * np.append(p.sum(), math.sqrt(r) * gradient)


def wave_error(omega, r, *laws, phase=1.0):
    """σ‖g_r - g_∞‖ for f(M) = Im(phase · exp(i⟨Ω, M⟩)) at M = 0, from members +E alone."""
    return np.linalg.norm((phase * (phi(omega, r, *laws) - phi(omega, math.inf))[1:]).real)


def fourth_cumulant(omega, law_a, law_b=None):
    """K₄ and ∇K₄ of page 3 for ω (..., m, n)."""
    a, b, axes = KURTOSIS[law_a] - 3, KURTOSIS[law_b or law_a] - 3, (-2, -1)
    G, rho, c = omega @ omega.mT, *(np.sum(omega**2, axis=i, keepdims=True) for i in (-1, -2))
    K = 6 * np.sum(G**2, axes) + 3 * a * np.sum(rho**2, axes) + 3 * b * np.sum(c**2, axes)
    gradient = 24 * G @ omega + 12 * (a * rho + b * c) * omega + 4 * a * b * omega**3
    return K + a * b * np.sum(omega**4, axes), gradient


def slopes(ranks, errors):
    return np.diff(np.log(np.abs(errors))) / np.diff(np.log(ranks))


def numerical_gradient(f, x, h=1e-5):
    steps = h * np.eye(x.size).reshape(-1, *x.shape)
    return np.array([(f(x + d) - f(x - d)) / (2 * h) for d in steps])


def estimates(es, fitness, params, pairs, batches=64, one_sided=False):
    """Independent gradients of the project's own code, flat: of pairs, or of members +E alone."""
    evaluate = partial(es.evaluate, lambda p, _: fitness(p), params, data=jnp.zeros(pairs))
    weights = jnp.array([[2, 0] if one_sided else [1, 1]])
    g = lambda key: ravel_pytree(es.gradient(params, key, weights * evaluate(key)))[0]
    return np.asarray(jax.jit(partial(jax.lax.map, g))(jax.random.split(KEY, batches)), np.float64)


def sine(Omega, delta=0.0):
    """The fitness sin(⟨Ω, M⟩ + δ), of an M that only multiplies."""
    return lambda M: jnp.sin(jnp.sum(Omega * (np.eye(len(Omega)) @ M)) + delta)


# theory/1-gradient.md ------------------------------------------------------------


def test_sign_of_the_score():
    """Page 1: ∇J = +E[E f(θ + σE)]/σ and ∇ log π = E/σ, against numerical derivatives."""
    (E, p), sigma, theta, c = grid(LAWS["normal"], 2), 0.6, np.array([0.3, -0.5]), [1, -2]
    x = theta + sigma * E
    J_slope = numerical_gradient(lambda t: p @ np.sin((t + sigma * E) @ c), theta)
    equal((p * np.sin(x @ c)) @ E / sigma, J_slope, atol=1e-8)
    score = numerical_gradient(lambda t: stats.norm(t, sigma).logpdf(x).sum(1), theta)
    equal(score.T, E / sigma, atol=1e-6)


def test_smoothing():
    """Page 1: J of a quadratic is f + σ² tr H/2, ∇J = ∇f = E∇f; J of a step is an erf."""
    (E, p), sigma, theta, scale = grid(LAWS["normal"], 2), 0.6, np.array([0.3, -0.5]), 0.6 * 2**0.5
    x, c, H = theta + sigma * E, np.array([1.0, -2.0]), np.array([[1.0, 0.4], [0.4, -3.0]])
    f, f_theta = (x @ c + ((x @ H) * x).sum(-1) / 2 for x in (x, theta))
    equal(p @ f, f_theta + sigma**2 / 2 * np.trace(H))
    equal([(p * f) @ E / sigma, p @ (c + x @ H)], [c + H @ theta] * 2)
    equal(special.erf(theta / scale), 1 - 2 * stats.norm.cdf(-theta / sigma))  # 1 - 2 P(x < 0)
    slope = numerical_gradient(lambda t: special.erf(t / scale).sum(), theta)
    equal(slope, 2 / sigma * stats.norm.pdf(theta / sigma))


def test_gradient_of_a_step():
    """Page 1: the code's gradient of sign(x) is (2/σ) φ(θ/σ), where f has derivative zero."""
    g = estimates(Eggroll(0.6, None, normal), lambda x: jnp.sign(x[0]), jnp.array([0.3]), 4096)
    assert_mean(g, 2 / 0.6 * stats.norm.pdf(0.3 / 0.6))


def test_pair_sees_the_odd_part():
    """Page 1: the even part of the fitness, so also any baseline, leaves the update as it is."""
    x, W = jnp.arange(1.0, 4.0), jnp.zeros((3, 2))
    odd = estimates(Eggroll(0.5), lambda M: jnp.sum(x @ M), W, 8)
    both = estimates(Eggroll(0.5), lambda M: jnp.sum(x @ M) + jnp.cos(jnp.sum(x @ M)) + 5, W, 8)
    equal(both, odd, rtol=1e-4, atol=1e-4)  # float32: f is below 20, σ is 0.5, E is 1


def test_variance_of_pairs():
    """Page 1: the variance of N = 2 members, independent and paired, by enumerating both."""
    (E, p), sigma = grid(LAWS["three"], 2), 0.7
    X, square = E @ [0.4, -1.0], (E**2).sum(1)
    for f_o, f_e in (np.sin(X), X**2), (np.sin(X), X**2 + 3), (X, 0 * X):
        S_o, S_e, g = p @ (square * f_o**2), p @ (square * f_e**2), (p * (f_o + f_e)) @ E / sigma
        one, pair = (f[:, None] * E / sigma - g for f in (f_o + f_e, f_o))  # errors, all outcomes
        independent = np.einsum("a,b,abi->", p, p, ((one[:, None] + one) / 2) ** 2)
        paired = np.einsum("a,ai->", p, pair**2)
        equal([independent, paired], [((S_o + S_e) / sigma**2 - g @ g) / 2, S_o / sigma**2 - g @ g])
        equal(2 * sigma**2 * (independent - paired), S_e - (S_o - sigma**2 * g @ g))
    equal(paired, 2 * independent)  # linear, f(θ) = 0
    more = p @ (square * ((X**2 + 3) ** 2 - X**4))  # of S_e, for 3 more of fitness
    equal(more, 3**2 * p @ square + 2 * 3 * p @ (square * X**2))


def test_best_baseline():
    """Page 1: E‖E‖²(f - β)² is least at β = E[‖E‖² f]/E‖E‖², which is E f if ‖E‖² is constant."""
    for law, constant in ("three", False), ("signs", True):
        E, p = grid(LAWS[law], 3)
        f, square = np.exp(E @ [0.3, -0.2, 0.5]), (E**2).sum(1)
        best = p @ (square * f) / (p @ square)
        below, least, above = (p @ (square * (f - best - d) ** 2) for d in (-1e-3, 0, 1e-3))
        assert least < min(below, above)
        assert (abs(best - p @ f) < 1e-12) == constant


def test_standardized_update():
    """Page 1: the update is ĝ/s, the same for f and λf + c; a single pair counts as +1 and -1."""
    update = jax.jit(partial(Eggroll(0.5).gradient, jnp.zeros((3, 2)), KEY))
    f = np.random.default_rng(0).normal(size=(16, 2))
    got = [update(standardize(f)), update(standardize(7 * f + 3))]
    equal(got, [update(f) / f.std()] * 2, rtol=1e-4, atol=1e-6)
    equal(standardize(jnp.array([[0.2, 0.9]])), [[-1, 1]], rtol=1e-6)


# theory/2-low-rank-noise.md ------------------------------------------------------------


def test_moments_of_the_noise(noise):
    """Page 2: covariance I, E Eᵢⱼ⁴ = 3 + (k² - 3)/r, rectangles of mean 1/r, at every rank."""
    E, p, _, k, r = noise
    equal(p @ E, np.zeros(6))
    equal(E.T @ (p[:, None] * E), np.eye(6))
    equal(p @ E**4, np.full(6, 3 + (math.prod(k) - 3) / r))
    equal(p @ E[:, [0, 2, 3, 5]].prod(1), 1 / r)


def density(z, r):
    """Page 2: the density of one entry of E for normal factors."""
    x, nu = math.sqrt(r) * np.abs(z), (r - 1) / 2
    return math.sqrt(r / math.pi) / special.gamma(r / 2) * (x / 2) ** nu * special.kv(nu, x)


@pytest.mark.parametrize("r", [1, 2, 10])
def test_marginal_density(r):
    """Page 2 (Theorem 6, Fig. 3): (1 + u²/r)^(-r/2), its density, and the entries of the code."""
    u, b, t = np.array([[0, 0.5, 1.5, 4]]), np.linspace(-9, 9, 2001), np.linspace(-40, 4, 9001)
    exact, z = (1 + u[0] ** 2 / r) ** (-r / 2), np.exp(t)  # as the density may be infinite at zero
    equal(2 * np.trapezoid(np.cos(u.T * z) * density(z, r) * z, t), exact, atol=1e-7)
    given_b = np.exp(-((u.T * b) ** 2) / (2 * r)) * stats.norm.pdf(b)
    equal(np.trapezoid(given_b, b) ** r, exact, atol=1e-7)
    known = {1: special.k0(z) / math.pi, 2: np.exp(-math.sqrt(2) * z) / math.sqrt(2)}
    equal(density(z, r), known.get(r, density(z, r)))
    draws = (Eggroll(1.0, r, draw) for draw in (normal, signs))
    of_normal, of_signs = (many_noises(es, jnp.zeros((1, 1)), 20_000)[:, 0] for es in draws)
    assert_mean(np.cos(of_normal * u), exact)
    hits = np.isclose(of_signs, np.arange(-r, r + 1, 2) / math.sqrt(r), atol=1e-5)
    equal(hits.sum(1), 1)
    assert_mean(hits, stats.binom.pmf(np.arange(r + 1), r, 0.5))


def test_no_gradient_of_its_own(noise):
    """Page 2: with the same low-rank E, J_r of sin⟨Ω, M⟩ has the gradient φ_r Ω at 0, not g_r."""
    (E, p, *_), sigma, Omega = noise, 0.8, wave_of_norm(1.5, 6)
    wave = sigma * E @ Omega
    own = numerical_gradient(lambda M: p @ np.sin(Omega @ M + wave), np.zeros(6))
    equal(own, p @ np.cos(wave) * Omega, atol=1e-8)
    assert np.linalg.norm((p * np.sin(wave)) @ E / sigma - own) > 0.05


def test_exact_to_degree_two(noise):
    """Page 2: for a polynomial of degree two g_r = ∇f at every rank; page 4: so for linear f."""
    (E, p, *_), sigma, C, H = noise, 0.7, wave_of_norm(1.0, 6), wave_of_norm(1.0, 6, 6)
    f = 3 + sigma * E @ C + sigma**2 * ((E @ H) * E).sum(1)
    equal((p * f) @ E / sigma, C)


# theory/3-convergence.md ------------------------------------------------------------


def assert_same_mean(samples, others, different):
    """The mean of samples is that of others, or others, within standard errors, and not `different`."""
    difference = samples - others
    assert_mean(difference, 0)
    error = np.linalg.norm(difference.std(axis=0)) / math.sqrt(len(difference))
    assert np.linalg.norm(samples.mean(axis=0) - different) > SE * error


@pytest.mark.parametrize("r", [1, 3])
def test_random_covariance(r):
    """Page 3: g_r = E h(S), S Wishart, for a fitness with two jumps and h(S) = S∇J_S exactly."""
    sigma, W, phi = 0.8, np.array([0.3, -0.5]), stats.norm

    def h(S):  # (..., 2, 2) of f = [M₁ > 0 and M₂ > 0], whose J_S is a bivariate normal probability
        scale = sigma * np.sqrt(np.diagonal(S, axis1=-2, axis2=-1))
        u, rho = W / scale, sigma**2 * S[..., 0, 1, None] / scale.prod(-1, keepdims=True)
        with np.errstate(divide="ignore"):  # at r = 1, ρ = ±1
            other = (u[..., ::-1] - rho * u) / np.sqrt(np.maximum(1 - rho**2, 0))
        return np.einsum("...ij,...j", S, phi.pdf(u) / scale * phi.cdf(other))

    A = np.random.default_rng(0).normal(size=(64, 8192, 2, r))
    g = estimates(
        Eggroll(sigma, r, normal),
        lambda M: jnp.all(np.eye(2) @ M > 0) - 0.3,
        jnp.float32(W[:, None]),
        8192,
    )
    assert_same_mean(g, h(A @ A.mT / r).mean(axis=1), h(np.eye(2)))


@pytest.mark.parametrize("r", [1, 2])
def test_random_sigma_in_every_layer(r):
    """Page 3: a net of hard steps, whose layers see full-rank noise, but of σ τₗ, independently."""
    rng, sigma, x = np.random.default_rng(0), 0.8, np.array([1.0, -0.5, 0.7])
    W, V = rng.normal(size=(3, 5)), rng.normal(size=(5, 2))

    def layer(x, W, tau):  # output, and the part of E along x
        z = tau * rng.normal(size=(*tau.shape[:-1], W.shape[1]))
        size = np.linalg.norm(x, axis=-1, keepdims=True)
        return x @ W + sigma * size * z, (x / size)[..., None] * z[..., None, :]

    def gradient(tau):  # (64, count, 2): independent samples of τ for both layers
        h, E = layer(np.broadcast_to(x, (*tau.shape[:-1], 3)), W, tau[..., :1])
        y, F = layer(np.sign(h), V, tau[..., 1:])
        f = ((y[..., 0] > y[..., 1]) - 0.5) / sigma
        parts = [np.einsum("kp,kpij->kij", f, e).reshape(64, -1) for e in (E, F)]
        return np.concatenate(parts, axis=1) / tau.shape[1]

    def score(params):
        y = jnp.sign(jnp.float32(x) @ params[0]) @ params[1]
        return (y[0] > y[1]) - 0.5

    g = estimates(Eggroll(sigma, r, normal), score, [jnp.float32(W), jnp.float32(V)], 8192)
    mixture = gradient(np.sqrt(rng.chisquare(r, (64, 16384, 2)) / r))
    assert_same_mean(g, mixture, gradient(np.ones((64, 16384, 2))).mean(axis=0))


def test_error_of_a_network():
    """Page 3: hard steps scored by accuracy: g_∞ as a sum, g_r as an integral, c = H''(1)."""
    rng, sigma, labels = np.random.default_rng(0), 0.7, np.array([0, 1])
    x, W, V = (rng.normal(size=shape) for shape in ((2, 3), (3, 3), (3, 2)))
    units = np.array(list(itertools.product((-1, 1), repeat=3)))
    right = np.argmax(units @ V, axis=1)[:, None] == labels  # (8, examples)

    def J(W, s):
        scale = sigma * math.sqrt(s) * np.linalg.norm(x, axis=1, keepdims=True)
        return np.sum(special.ndtr(units[:, None] * (x @ W / scale)).prod(2) * right) / len(x)

    def H(s):  # s g_∞(σ√s), by differences of J; the page's formula is the notebook's
        return s * numerical_gradient(lambda W: J(W, s), W, 1e-4)

    t = np.linspace(-12, 3.5, 400)
    H_t = np.array([H(s) for s in np.exp(t)])

    def g(r):
        density = stats.gamma.pdf(np.exp(t), r / 2, scale=2 / r) * np.exp(t)
        return density @ H_t * (t[1] - t[0])

    c = (H(1.03) - 2 * H(1) + H(0.97)) / 0.03**2
    equal(200 * (g(200) - H(1)), c, atol=0.02 * np.abs(c).max())
    scores = lambda M: jnp.mean(jnp.argmax(jnp.sign(x @ M) @ V, axis=1) == labels) - 0.5
    for r in 1, 2:
        code = estimates(Eggroll(sigma, r, normal), scores, jnp.float32(W), 8192)
        assert_same_mean(code, g(r), H(1))


def test_constant_of_several_layers():
    """Pages 3, 4: r(g_r - g_∞) → Σ ∂²H/∂s²; the layer's own bias grows by 1 + 2/r, the others' not."""

    def g(r, own, other):  # of sin⟨Ω, M⟩ with Ω of rank one in two layers, t = ‖ω‖² in each
        return (1 + own / r) ** (-r / 2 - 1) * (1 + other / r) ** (-r / 2)

    H = lambda s, q: s * math.exp(-(0.7 * s + 1.9 * q) / 2)
    second = sum(
        (H(1 + a, 1 + b) - 2 * H(1, 1) + H(1 - a, 1 - b)) * 1e6 for a, b in ((1e-3, 0), (0, 1e-3))
    )
    equal(1e5 * (g(1e5, 0.7, 1.9) - H(1, 1)), second, rtol=1e-4)
    omega = wave_of_norm(1.2, 3, 1) @ wave_of_norm(1.0, 1, 2)  # of rank one
    for r in 1, 2, 4:
        slope = phi(omega, r)[1:] / -omega.ravel()
        equal(slope, np.full(6, g(r, 1.44, 0)), rtol=1e-5)
        s, p = special.roots_genlaguerre(40, r / 2 - 1)  # τ² = 2s/r
        equal(p @ (2 * s / r * np.exp(-1.44 * s / r)) / p.sum(), g(r, 1.44, 0), rtol=1e-6)
        equal((1 - g(r, 1e-6, 0)) / (1 - math.exp(-5e-7)), 1 + 2 / r, rtol=1e-5)
        equal((1 - g(r, 0, 1e-6)) / (1 - math.exp(-5e-7)), 1, rtol=1e-5)
        equal([stats.chi2(r).moment(2) / r**2, stats.chi2(r).var() / r**2], [1 + 2 / r, 2 / r])


@pytest.mark.parametrize("r", [1, 2, 7])
def test_wave_closed_form(r):
    """Page 3: normal factors have φ_r = det(I + G/r)^(-r/2) and g_r = φ_r (I + G/r)⁻¹ Ω."""
    omega = wave_of_norm(1.5, 3, 2)
    matrix = np.eye(3) + omega @ omega.T / r
    exact = np.linalg.det(matrix) ** (-r / 2) * np.append(1, -np.linalg.solve(matrix, omega))
    equal(phi(omega, r), exact, atol=1e-7)


def test_characteristic_function_by_enumeration(noise):
    """Page 3: φ_r(ω) = φ_1(ω/√r)^r and φ_1 = E_b Πᵢ ψ(yᵢ), against E exp(i⟨ω, E⟩)."""
    (E, p, laws, _, r), omega = noise, wave_of_norm(1.8, 2, 3)
    wave = p * np.exp(1j * E @ omega.ravel())
    equal(phi(omega, r, *laws), np.append(wave.sum(), 1j * wave @ E))


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("r", [1, 2, 8])
def test_code_lands_on_the_wave(draw, r):
    """Page 3: the mean of Eggroll.gradient on sin⟨Ω, M⟩ is g_r = -∇φ_r/σ, and of no other rank."""
    sigma, omega = 0.5, wave_of_norm(1.5, 3, 2)
    g = estimates(Eggroll(sigma, r, DRAWS[draw]), sine(omega / sigma), jnp.zeros((3, 2)), 2048)
    exact = {q: -phi(omega, q, draw)[1:].real / sigma for q in (1, 2, 8, math.inf)}
    assert_mean(g, exact[r])
    error = np.linalg.norm(g.std(axis=0)) / math.sqrt(len(g))
    assert min(np.linalg.norm(exact[r] - exact[q]) for q in exact if q != r) > 5 * error


@pytest.mark.parametrize("laws", [("normal",), ("uniform",), ("signs",), ("skewed", "signs")])
def test_bound_for_every_draw(laws):
    """Page 3: ‖g_r - g_∞‖ ≤ (M₄ + 3)/(σr) (‖ω‖³/6 + ‖ω‖⁵/24), and its steps, at every rank."""
    M, shapes = max(3, *(KURTOSIS[law] for law in laws)) ** 2, ((1, 1), (3, 2))
    for norm, shape, r in itertools.product((0.1, 0.5, 1, 2, 4), shapes, (1, 2, 16, 256)):
        omega = wave_of_norm(norm, *shape, seed=int(10 * norm))
        error = np.abs(phi(omega, r, *laws) - phi(omega, math.inf)) * r / (M + 3)
        assert error[0] <= norm**4 / 24 + 1e-9
        assert np.linalg.norm(error[1:]) <= norm**3 / 6 + (r > 1) * norm**5 / 24 + 1e-9


def test_superposition_of_waves(noise):
    """Page 3: the bound for a bump exp(-‖M‖²/2), a mixture of waves with Ω normal, away from 0."""
    (E, p, _, k, r), theta, (x, q) = noise, np.linspace(-0.4, 0.9, 6), LAWS["normal"]
    third, fifth = (stats.chi(6).moment(s) for s in (3, 5))  # E‖Ω‖³, E‖Ω‖⁵
    for sigma in 0.01, 0.1, 0.4:
        g_r = (p * np.exp(-((theta + sigma * E) ** 2).sum(1) / 2)) @ E / sigma
        bumps = np.exp(-((theta[:, None] + sigma * x) ** 2) / 2)  # f is a product over entries
        g = bumps @ (q * x) / (bumps @ q) * (bumps @ q).prod() / sigma
        bound = (max(3, *k) ** 2 + 3) / r * (sigma**2 * third / 6 + sigma**4 * fifth / 24)
        assert 0 < np.linalg.norm(g_r - g) <= bound


def test_fourth_cumulant(noise):
    """Page 3: K₄, the cumulant of ⟨ω, abᵀ⟩, is r times that of ⟨ω, E⟩; E⟨ω, E⟩⁴ ≤ M₄‖ω‖⁴."""
    (E, p, laws, k, r), omega = noise, wave_of_norm(1.3, 2, 3)
    fourth = p @ (E @ omega.ravel()) ** 4
    equal(fourth - 3 * 1.3**4, fourth_cumulant(omega, *laws)[0] / r)
    assert fourth <= max(3, *k) ** 2 * 1.3**4


@pytest.mark.parametrize("law", DRAWS)
def test_constant_of_the_error(law):
    """Page 3: r(φ_r - φ_∞) → φ_∞K₄/24, r(g_r - g_∞) → φ_∞(K₄ω - ∇K₄)/(24σ); of the spread, too."""
    omega, r = wave_of_norm(1.8, 3, 2), 10**5
    limit, (K, gradient) = phi(omega, math.inf), fourth_cumulant(omega, law)
    leading = limit[0] / 24 * np.append(K, gradient - K * omega)  # σg = -∇φ
    equal(r * (phi(omega, r, law) - limit), leading, rtol=1e-4)
    equal(np.sum(omega * (K * omega - gradient)), (1.8**2 - 4) * K)
    spread = lambda q: math.sqrt(0.5 - phi(2 * omega, q, law)[0].real / 2)  # of the scores
    K = fourth_cumulant(2 * omega, law)[0] * phi(2 * omega, math.inf)[0].real
    equal(r * (spread(r) - spread(math.inf)), -K / (96 * spread(math.inf)), rtol=1e-3)


def test_cubic_fitness(noise):
    """Page 3: for ⟨ω, M⟩³, and so for any cubic, the error of g_r is D/r exactly; D is ∇K₄/4."""
    (E, p, laws, _, r), omega = noise, wave_of_norm(1.3, 2, 3)
    g_limit, D = 3 * 1.3**2 * omega, fourth_cumulant(omega, *laws)[1] / 4
    equal((p * (E @ omega.ravel()) ** 3) @ E, (g_limit + D / r).ravel())


def test_slope_from_both_sides():
    """Page 3: the exact slopes of a random 3×3 wave; -1 is their limit, from either side."""
    omega, ranks = wave_of_norm(math.sqrt(2), 3, 3), [1, 2, 4, 8, 512, 1024]
    errors = np.array([[wave_error(omega, r, law) for r in ranks] for law in ("normal", "signs")])
    stated = [[-0.57, -0.72, -0.84, -1], [-1.32, -1.14, -1.06, -1]]
    equal(slopes(ranks, errors)[:, [0, 1, 2, 4]], stated, atol=0.006)
    large = [wave_error(2 * math.sqrt(2) * omega, r) for r in (8, 16)]  # ‖ω‖² = 16
    equal(slopes([8, 16], large), [-1.28], atol=0.006)
    at_1, g = errors[:, 0], np.linalg.norm(phi(omega, math.inf)[1:])  # page 4
    equal([*at_1, g], [0.22, 0.29, 0.52], atol=0.005)
    assert errors[1, 1] < errors[0, 1]


def test_which_symmetry():
    """Page 3: slopes -1, -1/2, -1, -1 of the table, K₃, and the expansions of Im φ_r and Re φ_r."""
    omega, ranks, phases = wave_of_norm(1.0, 3, 3), [4096, 16384], [np.exp(0.25j * np.pi), 1]
    for laws in itertools.product(("signs", "skewed"), repeat=2):
        errors = [[wave_error(omega, r, *laws, phase=z) for r in ranks] for z in phases]
        one_sided = -0.5 if laws == ("skewed", "skewed") else -1
        equal(slopes(ranks, errors), [[one_sided], [-1]], atol=0.01)
    (a, p), (K4, _) = grid(LAWS["skewed"], 3), fourth_cumulant(omega, "skewed")
    K3 = 1.5**2 * np.sum(omega**3)
    equal(p @ (a @ omega @ a.T) ** 3 @ p, K3)
    r, limit = 10**5, phi(omega, math.inf)[0]
    error = phi(omega, r, "skewed")[0] / limit - 1
    equal(error.imag * math.sqrt(r), -K3 / 6, rtol=1e-4)
    equal(error.real * r, K4 / 24 - K3**2 / 72, rtol=1e-4)


def skewed(key, shape, dtype=jnp.float32):
    return jax.random.choice(key, jnp.array([2, -0.5], dtype), shape, p=jnp.array([0.2, 0.8]))


def test_code_without_symmetry():
    """Page 3: with skewed entries the code has the exact means stated, one-sided and in pairs."""
    sigma, omega, delta = 0.5, wave_of_norm(1.2, 2, 2), math.pi / 4
    code = Eggroll(sigma, 4, skewed), sine(omega / sigma, delta), jnp.zeros((2, 2)), 1024
    slope = phi(omega, 4, "skewed")[1:] / sigma
    odd, even = -math.cos(delta) * slope.real, math.sin(delta) * slope.imag
    assert_mean(estimates(*code), odd)
    assert_mean(estimates(*code, one_sided=True), odd + even)


def test_step_on_a_lattice():
    """Page 3: for the fitness [entry > σ] signs err by -φ(1)/√r at r = q², normal factors 1/r."""
    p_1, ranks, errors = stats.norm.pdf(1), [64**2, 512**2], []
    for r in ranks:
        z, p = np.arange(-r, r + 1, 2) / math.sqrt(r), stats.binom.pmf(np.arange(r + 1), r, 0.5)
        errors.append(p @ (z * (z > 1)) - p_1)
    equal(p[z == 1] * 512, [2 * p_1], rtol=2 / 512)
    equal(errors[1] * 512, -p_1, rtol=2e-3)
    equal(slopes(ranks, errors), [-0.5], atol=0.01)
    mean = partial(integrate.quad, lambda z, r: z * density(z, r), 1, 30, epsabs=1e-12)
    equal(slopes([32, 64], [mean(args=r)[0] - p_1 for r in (32, 64)]), [-1], atol=0.03)


def test_signs_of_full_rank():
    """Page 3: dense signs, as vectors have at every rank, have Πⱼ cos ωⱼ in place of φ_∞."""
    sigma, omega = 0.5, wave_of_norm(1.5, 3)
    g = estimates(Eggroll(sigma), sine(omega / sigma), jnp.zeros(3), 512)
    assert_mean(g, np.cos(omega).prod() * np.tan(omega) / sigma)


# theory/4-which-noise.md ------------------------------------------------------------


def test_cubic_in_every_dimension(noise):
    """Page 4: g_r of ⟨U, M⟩‖M‖² at every rank and draw, and what the code finds for 4×5."""
    (E, p, _, (k_a, k_b), r), U, sigma = noise, wave_of_norm(1.0, 6), 0.7
    excess = lambda m, n, r, a, b: m * n + 2 + ((m + a - 1) * (n + b - 1) - m * n - 2) / r
    g = (p * (E @ U) * (E**2).sum(1)) @ E * sigma**2
    equal(g, sigma**2 * excess(2, 3, r, k_a, k_b) * U)
    U = jnp.float32(wave_of_norm(1.0, 4, 5))
    for rank, draw, stated in (1, normal, 42), (2, normal, 32), (1, signs, 20), (None, normal, 22):
        if (rank or 1) == r:  # once each
            cubic = lambda M: jnp.sum(U * dense(M)) * jnp.sum(dense(M) ** 2)
            g = estimates(Eggroll(1.0, rank, draw), cubic, 0 * U, 4096)
            assert_mean(g @ U.ravel(), stated)
            assert rank is None or stated == excess(4, 5, rank, *[3 if draw is normal else 1] * 2)


def test_kink():
    """Page 4: for ½ Σ M|M| every entry of g is (σ/2) E|z|³, in closed form for normal factors."""

    def cube(r):
        gammas = special.gamma((r + 3) / 2) / special.gamma(r / 2)
        return 2 * math.sqrt(2 / math.pi) * (2 / r) ** 1.5 * gammas

    for r in 1, 2, 5:
        equal(2 * integrate.quad(lambda z, r=r: z**3 * density(z, r), 0, 60)[0], cube(r), rtol=1e-6)
    exact = {1.273: cube(1) / 2, 0.798: math.sqrt(2 / math.pi), 0.5: 0.5}
    for rank, draw, stated in (1, normal, 1.273), (None, normal, 0.798), (1, signs, 0.5):
        assert abs(stated - exact[stated]) < 6e-4
        kink = lambda M: jnp.sum(dense(M) * jnp.abs(dense(M))) / 2
        g = estimates(Eggroll(0.6, rank, draw), kink, jnp.zeros((2, 3)), 4096)
        assert_mean(g / 0.6, exact[stated])


def test_effective_rank():
    """Page 4: K₄ = 6‖ω‖⁴/R with 1 ≤ R ≤ min(m, n); relative errors ‖ω‖⁴/(4Rr), ‖Gω‖/(r‖ω‖)."""
    one, s, r = np.outer([1, 2, 3], [1, -1, 2]) / math.sqrt(84), 0.02, 10**4
    for omega, known in (np.eye(3) / math.sqrt(3), 3), (one, 1), (wave_of_norm(1.0, 3, 3), None):
        G = omega @ omega.T
        R = np.trace(G) ** 2 / np.trace(G @ G)
        equal(R, known or np.clip(R, 1, 3))
        equal(fourth_cumulant(s * omega, "normal")[0], 6 * s**4 / R)
        equal(phi(omega, r)[0] / phi(omega, math.inf)[0] - 1, 1 / (4 * R * r), rtol=1e-3)
        relative = wave_error(s * omega, 64) / np.linalg.norm(phi(s * omega, math.inf)[1:])
        equal(relative, s**2 / 64 * (1 if known == 1 else np.linalg.norm(G @ omega)), rtol=2e-3)


@pytest.mark.parametrize("m, n", [(2, 2), (2, 3)])
def test_random_waves(m, n):
    """Page 4: means of tr G², ‖Gω‖², K₄ and ‖∇K₄/24‖² and Var K₄ over normal ω, by quadrature."""
    s, (x, p) = 0.8, special.roots_hermitenorm(5)  # exact to degree 9
    omega, p = grid((s * x, p / p.sum()), m * n)
    omega = omega.reshape(-1, m, n)
    G, (K, gradient) = omega @ omega.mT, fourth_cumulant(omega, "signs")
    variance = (144 * m * (m - 1) * n * (n - 1) + 384 * m * n) * s**8
    equal([p @ K, p @ (K - p @ K) ** 2], [-6 * m * n * s**4, variance])
    got = [p @ np.sum(x**2, (1, 2)) / (m * n) for x in (G, G @ omega, gradient / 24)]
    equal(got[0], (m + n + 1) * s**4)
    equal(got[1], (m**2 + 3 * m * n + n**2 + 3 * m + 3 * n + 4) * s**6)
    equal(got[2], ((m - 1) * (n - 1) + 5 / 3) * s**6)


def test_large_random_waves():
    """Page 4: the errors of normal factors and the gain of signs for large m = n."""
    n, norm = 256, 0.3
    omega, s = wave_of_norm(norm, n, n), norm / n
    G = omega @ omega.T
    g = np.linalg.solve(np.eye(n) + G, omega) / math.sqrt(np.linalg.det(np.eye(n) + G))  # σ g_1
    error = np.linalg.norm(g * math.exp(norm**2 / 2) - omega) / norm
    equal(error, math.sqrt(5) * norm**2 / n, rtol=0.03)
    across = np.trace(G @ G @ G) - np.trace(G @ G) ** 2 / norm**2  # of normal factors
    equal([across, np.sum((fourth_cumulant(omega, "signs")[1] / 24) ** 2)], n**4 * s**6, rtol=0.06)
    for m in n, n // 4:
        waves = (fourth_cumulant(wave_of_norm(norm, m, n), law)[1] for law in ("normal", "signs"))
        equal(np.divide(*map(np.linalg.norm, waves)), math.sqrt(3 + m / n + n / m), rtol=0.03)
    signs_rms = math.sqrt(36 * n**4 + 144 * (n * (n - 1)) ** 2 + 384 * n**2)  # from the moments
    equal(6 * n**2 * (2 * n + 1) / signs_rms, 2 * n / math.sqrt(5), rtol=0.01)
    equal(((n + 2) ** 2 - 1) / (n**2 + 1), 1.016, atol=5e-4)


def test_signs_on_rectangles():
    """Page 4: for k = 1, K₄ = 6 Σ over rectangles - 2 Σω⁴."""
    omega = wave_of_norm(1.0, 3, 4)
    rectangles = np.einsum("ij,iq,pj,pq,ip,jq->", *[omega] * 4, 1 - np.eye(3), 1 - np.eye(4))
    equal(fourth_cumulant(omega, "signs")[0], 6 * rectangles - 2 * np.sum(omega**4))


def test_signs_without_gain():
    """Page 4: on ω = ±s of rank one K₄ is 6(tr G)²[(1 - 1/m)(1 - 1/n) - 1/(3mn)], near normal's."""
    m, n = 5, 7
    omega = 0.3 * np.outer((-1) ** np.arange(m), np.sign(np.arange(n) - 2.5))
    K = np.array([fourth_cumulant(omega, law)[0] for law in ("signs", "normal")])
    equal(K / (6 * np.sum(omega**2) ** 2), [(1 - 1 / m) * (1 - 1 / n) - 1 / (3 * m * n), 1])


def test_variance_formula(noise):
    """Page 4: E‖E⟨C,E⟩‖² = ‖C‖²(mn + 2 + [(m+k-1)(n+k-1) - mn - 2]/r), exactly; signs: mn."""
    (E, p, laws, (k_a, k_b), r), m, n = noise, 2, 3
    formula = m * n + 2 + ((m + k_a - 1) * (n + k_b - 1) - m * n - 2) / r
    equal(p @ ((E**2).sum(1) * (E @ wave_of_norm(1.3, 6)) ** 2), 1.3**2 * formula)
    assert formula == m * n or (*laws, r) != ("signs", "signs", 1)


# theory/5-cost.md ------------------------------------------------------------


def products(function, *args):
    """The matrix products in a function's jaxpr: multiply-adds, sizes of left and of right (3, …)."""

    def walk(jaxpr, times):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                left, right = (v.aval for v in equation.invars)
                depth = math.prod(left.shape[i] for i in equation.params["dimension_numbers"][0][0])
                yield times * equation.outvars[0].aval.size * depth, left.size, right.size
            for value in jax.tree.leaves(list(equation.params.values())):
                if hasattr(value, "eqns"):  # a jaxpr, as of a loop or a nested jit
                    yield from walk(value, times * equation.params.get("length", 1))

    return np.array([*walk(jax.make_jaxpr(function)(*args).jaxpr, 1)]).T


SIZES, PAIRS = (48, 40, 32), 8
LAYERS = [jnp.ones(shape) for shape in itertools.pairwise(SIZES)]


def network(params, x):
    return jnp.sum(jnp.tanh(x @ params[0]) @ params[1])


@pytest.mark.parametrize("r, T", [(1, 1), (2, 5), (None, 5)])
def test_multiply_adds(r, T):
    """Page 5: forward NT(mn + r(m+n)), half of NTmn in the first layer; update (N/2)r·mn."""
    es, (l, m, n), N = Eggroll(0.1, r), SIZES, 2 * PAIRS
    x, full = jnp.ones((N * T, l)), N * T * np.array([l * m, m * n])  # of either layer
    inference, back = (products(f, LAYERS, x)[0].sum() for f in (network, jax.grad(network)))
    assert (inference, back) == (full.sum(), full @ [2, 3])
    forward = products(partial(es.evaluate, network), LAYERS, KEY, jnp.ones((PAIRS, T, l)))
    update = products(es.gradient, LAYERS, KEY, jnp.ones((PAIRS, 2)))
    thin = N * T * (r or 0) * np.array([l + m, m + n])
    assert forward[0].sum() == (full * [0.5 if r else 1, 1] + thin).sum()
    assert update[0].sum() == PAIRS * (r or 1) * (l * m + m * n)
    step = full[1] + thin[1] + PAIRS * (r or 1) * m * n  # of a hidden layer
    equal(step / full[1], 1 + (r or 1) / (2 * T) + (r or 0) * (1 / m + 1 / n))


def test_arithmetic_intensity():
    """Page 5: operations over bytes, counted product by product, and the batches for 300 of them."""
    m, r, B = 8192, 1, np.arange(1.0, 1000)
    operations = 2 * B * m * m + 4 * B * r * m + B * m  # xW, xA and its product with Bᵀ, the sum
    moved = lambda factors: 2 * (m * m + 2 * B * m + factors + 2 * B * r)  # W, x and y, xA
    equal(2 * B * m * m / (2 * (m * m + 2 * B * m)), B * m / (2 * B + m))  # inference
    equal(operations / moved(2 * B * r * m), (m + 2 * r + 0.5) / (2 + r * (2 + 2 / m) + m / B))
    equal(2 * m * m / (2 * (m * m + 2 * m)), m / (m + 2))  # full rank: one member, one matrix
    first = lambda intensity: B[np.argmax(intensity >= 300)]
    shared = operations / moved(B * r * m)  # by the two members of a pair
    found = first(B * m / (2 * B + m)), first(operations / moved(2 * B * r * m)), first(shared)
    assert found == (324, 352, 337)


def test_weights_read_and_noise_drawn():
    """Page 5: weights read, mn or N·mn; noise entries drawn, (N/2)r(m+n) or (N/2)mn."""
    (l, m, n), N, drawn = SIZES, 2 * PAIRS, []

    def draw(key, shape, dtype):  # called once for all pairs, under vmap
        drawn.append(math.prod(shape))
        return normal(key, shape, dtype)

    for rank, copies, entries in (2, 1, 2 * (l + 2 * m + n)), (None, N, l * m + m * n):
        drawn.clear()
        evaluate = partial(Eggroll(0.1, rank, draw).evaluate, network)
        _, *sizes = products(evaluate, LAYERS, KEY, jnp.ones((PAIRS, 1, l)))
        assert sum(drawn) == entries  # for one pair
        assert {copies * l * m, copies * m * n} <= {*sizes[0], *sizes[1]}
        assert rank is None or np.max(sizes) < PAIRS * m * n  # nothing of the size N·mn


@pytest.mark.parametrize("r", [1, None])
def test_numbers_moved(r, optimized):
    """Page 5: bytes that the compiled programs access: inference exactly, ES to a factor of 2."""
    N = m = n = 256
    es, W, x, f = Eggroll(0.1, r), jnp.ones((m, n)), jnp.ones((N // 2, m)), jnp.ones(N // 2)

    def moved(program, *args):
        return jax.jit(program).lower(*args).compile().cost_analysis()["bytes accessed"] / 4

    equal(moved(jnp.matmul, jnp.ones((N, m)), W), m * n + N * (m + n), rtol=0.01)
    noise = jax.vmap(partial(es.noise, params=W))(jax.random.split(KEY, N // 2))
    members = jax.vmap(lambda W, e, sign, x: x @ es.perturb(W, e, sign), (None, 0, None, 0))
    both = jax.vmap(members, (None, None, 0, None))
    measured = sum(e.size for e in jax.tree.leaves(noise))  # written once
    measured += moved(both, W, noise, jnp.array([1.0, -1.0]), x)
    measured += moved(lambda W, e: W + eggroll.weighted_sum(f, e, W.dtype), W, noise)
    formula = 5 * m * n + (5 / 2 * N * (m + n) if r else 7 / 2 * N * m * n + N * (m + n))
    assert 0.8 * formula < measured < 2 * formula


def test_predictions():
    """Page 5: the table for 10⁶ members, from the shapes of the code's own noise and products."""
    N, W = 10**6, jax.ShapeDtypeStruct((10**4, 10**4), jnp.float32)
    scores = jax.ShapeDtypeStruct((N // 2, 2), jnp.float32)
    update = products(lambda W, f: Eggroll(0.1).gradient(W, KEY, f), W, scores)[0].sum()
    noises = [jax.eval_shape(Eggroll(0.1, rank).noise, KEY, W) for rank in (1, None)]
    factors, full = (N // 2 * sum(4 * e.size for e in jax.tree.leaves(noise)) for noise in noises)
    got = np.outer([N * W.size, update, factors, full, 4 * W.size], [10, 100, 1000])  # layers
    assert np.all(got == np.outer([1e15, 5e14, 4e11, 2e15, 4e9], [1, 10, 100]))
    assert 4 * scores.size == 4e6
    for s, beta, stated in (5e14, 5e10, 1.6e5), (5e14, 1e8, 8e7):  # rebuild or all-reduce
        equal([stated, update * stated / N / s], [16 * s / beta, 8 * W.size / beta])  # equal times


def test_scalars_are_all_that_is_shared():
    """Page 5: a worker with the key rebuilds the update from 4N bytes of scores."""
    W, es = jnp.ones((40, 50)), Eggroll(0.1)
    scores = es.evaluate(lambda M, x: jnp.sum(x @ M), W, KEY, jnp.ones((PAIRS, 40)))
    message = np.asarray(scores).tobytes()
    assert len(message) == 4 * 2 * PAIRS
    received = np.frombuffer(message, np.float32).reshape(PAIRS, 2)
    elsewhere = es.gradient(jnp.zeros_like(W), KEY, received)  # needs the shape of W, no values
    np.testing.assert_array_equal(elsewhere, es.gradient(W, KEY, scores))


# Models ------------------------------------------------------------------------------------------


def test_mlp_is_the_composition_of_its_layers():
    params = [p | {"b": p["b"] + 0.1} for p in eggroll.mlp_init(KEY, (3, 5, 2))]
    x = normal(KEY, (4, 7, 3))
    (V, c), (W, b) = ((np.asarray(p["W"], float), np.asarray(p["b"])) for p in params)
    with jax.numpy_rank_promotion("allow"):
        close(eggroll.mlp(params, x), np.tanh(np.asarray(x, float) @ V + c) @ W + b)
    W = eggroll.mlp_init(KEY, (400, 300))[0]["W"]  # entries of variance 1/400
    assert abs(400 * W.var() - 1) < SE * np.sqrt(2 / W.size)


def slow_logits(arithmetic, p, text):
    """A minimal gated unit as a loop, as the docstrings have it: (length, vocab) after each token."""
    product, sigmoid, tanh, times, clip, _ = arithmetic
    hidden = len(p["U"])
    h, logits = np.zeros(hidden), []
    for token in text:
        x, u = product(clip(p["emb"][token]), p["W"]) + p["b"], product(h, p["U"])
        z = sigmoid(x[:hidden] + u[:hidden])
        h = h + times(z, tanh(x[hidden:] + times(z, u[hidden:])) - h)
        logits.append(clip(product(h, p["head"])))
    return np.array(logits)


def slow_bits(arithmetic, p, text):
    *_, log2_p = arithmetic
    logits = slow_logits(arithmetic, p, text[:-1])
    return sum(log2_p(row)[token] for row, token in zip(logits, text[1:], strict=True))


sat = partial(np.clip, a_min=-127, a_max=127)


def whole_product(x, M):
    return np.floor(x @ M * round(2048 / math.sqrt(len(M))) / 2**15)


def whole_log2_p(logits):
    """In units of 2⁻⁸, with the powers of two in Python's whole numbers."""
    parts = (divmod(int(l), 16) for l in logits)
    total = sum((256 + u * (174 + 5 * u) // 16) * 2 ** (q + 8) for q, u in parts)
    leading = total.bit_length() - 1
    fraction = (total << 8 >> leading) - 256  # the 8 bits after the leading one
    log = round(256 * math.log2(1 + (fraction + 0.5) / 256))
    return 16 * logits - (256 * (leading - 16) + log)


FLOAT = (
    *(np.matmul, special.expit, np.tanh, np.multiply, np.asarray),
    lambda logits: special.log_softmax(logits) / math.log(2),
)
WHOLE = (  # numbers in float64, exact below 2⁵³
    *(whole_product, lambda x: sat(x) + 127, sat, lambda z, x: np.floor(z * x / 256), sat),
    whole_log2_p,
)


def rnn_params():
    params = eggroll.rnn_init(KEY, 7, 6)
    return jax.tree.map(lambda p: p + 0.3 * normal(jax.random.key(1), p.shape), params)


def int_params():
    """Random everywhere, also in the lower halves."""
    params, rng = eggroll.int_rnn_init(KEY, 7, 8), np.random.default_rng(1)
    return jax.tree.map(lambda p: jnp.int32(rng.integers(-40 << 16, 40 << 16, p.shape)), params)


def whole_weights(params):
    """The nearest multiple of 2¹⁶, halves up, in 2¹⁶."""
    return jax.tree.map(lambda p: np.floor(np.asarray(p) / 2**16 + 0.5), params)


def test_bits_is_the_loop_over_the_text_for_every_member_of_the_rnn():
    es, params, slow = Eggroll(0.2, 2, normal), rnn_params(), partial(slow_bits, FLOAT)
    texts, network = int_text(3, 9), jax.tree.map(np.float64, params)
    expected = slow_scores(slow, dense_members(es, params, 3), texts)
    close(es.evaluate(eggroll.bits, params, KEY, texts), expected, ulps=20)
    close(eggroll.bits(params, texts[0]), slow(network, texts[0]), ulps=20)
    close(eggroll.bits(eggroll.rnn_init(KEY, 7, 6), texts[0]), -8 * np.log2(7))


@pytest.mark.parametrize("arithmetic", [FLOAT, WHOLE], ids=["float", "integer"])
def test_sample_follows_the_distribution_of_the_model(arithmetic):
    """Of what it reads, that is of what it wrote: also a token for itself is as often as it says."""
    if arithmetic is FLOAT:
        params = rnn_params() | {"head": 2 * normal(jax.random.key(3), (6, 7))}
        slow, model, unit = jax.tree.map(np.float64, params), (), 1
    else:
        slow, params = whole_weights(int_params()), eggroll.weights(int_params())
        _, unit = model = eggroll.int_rnn, math.log(2) / 16
    tokens = np.asarray(eggroll.sample(params, KEY, 2, 400, *model))
    p = special.softmax(unit * slow_logits(arithmetic, slow, [2, *tokens[:-1]]), axis=1)
    assert tokens.dtype == np.int32 and set(tokens) <= set(range(7)) and p.std(axis=0).max() > 0.1
    assert_mean(-np.log(p[np.arange(400), tokens]) - special.entr(p).sum(axis=1), 0)
    assert_mean(np.eye(7)[tokens] - p, 0)


# Integers -----------------------------------------------------------------------------------------

likelihood = partial(eggroll.bits, cell=eggroll.int_rnn, log2_p=eggroll.int_log2_softmax)


def int_text(*shape, vocab=7, seed=0):
    return np.random.default_rng(seed).integers(0, vocab, shape).astype(np.int32)


def fast_and_slow(es, params):
    """The network of params and the two members of pair 0: what the code sees, and the reference."""
    noise = es.noise(jax.random.fold_in(KEY, 0), params)
    fast = eggroll.weights(params), es.perturb(params, noise), es.perturb(params, noise, -1)
    slow = whole_weights(params), *dense_members(es, params, 1, whole_weights)[0]
    return zip(fast, slow, strict=True)


def test_weights_are_the_upper_half_rounded():
    p = np.array([-127 << 16, -98304, -98305, -32768, -32769, 0, 32767, 32768, 127 << 16])
    expected = np.array([-127, -1, -2, 0, -1, 0, 0, 1, 127])
    got = eggroll.weights({"W": jnp.int32(p)[None], "b": jnp.int32(p)})
    assert got["W"].dtype == jnp.int8 and got["b"].dtype == jnp.int32
    same(got, {"W": expected[None], "b": expected})


@pytest.mark.parametrize("m, n", [(4, 3), (33, 2)])
def test_products_of_integers_are_those_of_dense_members(m, n):
    rng = np.random.default_rng(0)
    W = jnp.asarray(rng.integers(-127 << 16, 127 << 16, (m, n)), jnp.int32)
    x, i = rng.integers(-127, 128, (6, m)), np.array([[0, m - 1]])
    off = abs(round(2048 / math.sqrt(m)) / (2048 / math.sqrt(m)) - 1)
    assert off < 2**-7
    for M, slow in fast_and_slow(IntEggroll(sigma=5), W):
        got = eggroll.product(jnp.int8(x), M)
        assert got.dtype == jnp.int32
        same((got, eggroll.rows(M, i)), (whole_product(x, slow), sat(slow[i])))
        exact = x @ slow / (16 * math.sqrt(m))
        assert (np.abs(got - exact) <= 1 + off * np.abs(exact) + 1e-9).all()


def test_the_integer_network_is_the_slow_one_bit_for_bit():
    text = int_text(9)
    for fast, slow in fast_and_slow(IntEggroll(sigma=3), int_params()):
        _, logits = jax.lax.scan(partial(eggroll.int_rnn, fast), jnp.zeros(8, jnp.int8), text)
        assert logits.dtype == jnp.int8 and np.std(logits) > 10
        same(logits, slow_logits(WHOLE, slow, text))
        got = likelihood(fast, jnp.asarray(text))
        assert got.dtype == jnp.int32 and got == slow_bits(WHOLE, slow, text)


def test_powers_and_logarithms_within_their_errors():
    x = np.arange(-128, 128)
    got = np.asarray(eggroll.exp2(jnp.asarray(x, jnp.int8)), np.float64)
    assert np.abs(got / 2.0 ** (x / 16 + 16) - 1).max() < 0.0031
    assert 256 * int(eggroll.exp2(jnp.int8(127))) < 2**32
    rng = np.random.default_rng(0)
    z = np.concatenate([np.arange(1, 2**17), 2 ** np.arange(1, 33) - 1, 2 ** np.arange(32)])
    z = np.concatenate([z, rng.integers(1, 2**32, 10**5)]).astype(np.uint32)
    got = np.asarray(eggroll.log2(jnp.asarray(z)), np.float64) / 256
    assert np.abs(got - np.log2(z)).max() < 0.005
    logits = rng.integers(-127, 128, (1000, 256))  # so a softmax is within the sum of both errors
    token = np.arange(1000) % 256
    got = jax.vmap(eggroll.int_log2_softmax)(jnp.asarray(logits, jnp.int8), token)
    exact = logits[range(1000), token] / 16 - np.log2(np.sum(2.0 ** (logits / 16), axis=1))
    assert got.dtype == jnp.int32 and np.abs(got / 256 - exact).max() < math.log2(1.0031) + 0.005


@pytest.mark.parametrize("value", [127, -127])
def test_nothing_overflows_at_the_extremes(value):
    """The widest network allowed, all weights, noise, scores and steps as large as they can be."""
    init, text = eggroll.int_rnn_init(KEY, 256, 1024), int_text(3, vocab=256)
    params, es = jax.tree.map(lambda p: jnp.full_like(p, value << 16), init), IntEggroll(sigma=127)
    ones = jax.tree.map(jnp.ones_like, es.noise(KEY, params))
    for sign in 1, -1:  # E all 1, or all -1
        slow = jax.tree.map(lambda w, sign=sign: w + sign * 127, whole_weights(params))
        got = likelihood(es.perturb(params, ones, sign), jnp.asarray(text))
        assert got == slow_bits(WHOLE, slow, text)

    U, low, high = jnp.full((8, 16), value << 16), -(2**31), 2**31 - 1
    E = many_noises(es, U, 200)
    votes = E[:, 0, 0]  # which add up to 200 for this entry, beyond int8
    f = np.where(votes[:, None] > 0, [high, low], [low, high])
    same(es.gradient(U, KEY, f), np.tensordot(votes, E, 1))
    huge = lambda M, _: jnp.where(jnp.sum(eggroll.product(jnp.ones(8, jnp.int8), M)) > 0, high, low)
    for start in U, jnp.zeros_like(U):  # where all pairs tie, and where hardly any does
        new, larger = (
            es.step(huge, start, KEY, jnp.arange(64), lr)[0] for lr in (2**24, 2**31 - 1)
        )
        assert new.dtype == jnp.int32 and jnp.abs(new).max() == 127 << 16
        same(larger, new)  # 2²⁴ = 2³⁰/pairs


def test_an_integer_step_is_a_loop_over_dense_members():
    """Also in chunks, and on eight devices."""
    params, texts, lr = int_params(), int_text(16, 6), 30_000
    params["emb"] = jnp.full_like(params["emb"], 127 << 16)  # at the end of the scale
    members = dense_members(IntEggroll(4), params, 16, whole_weights)
    expected = slow_scores(partial(slow_bits, WHOLE), members, texts)
    f = np.sign(expected[:, 0] - expected[:, 1])
    assert set(f) >= {-1, 1}
    E, end = many_noises(IntEggroll(4), params, 16), 127 << 16
    votes = jax.tree.map(lambda e: np.tensordot(f, e, 1), E)
    moved = jax.tree.map(lambda p, v: np.clip(p + lr * v, -end, end), params, votes)
    for chunk, data in (None, texts), (4, texts), (8, spread(texts, 8)):
        es = IntEggroll(4, chunk=chunk)
        new, scores = jax.jit(partial(es.step, likelihood))(params, KEY, data, lr)
        assert len(scores.sharding.device_set) == (1 if data is texts else 8)
        assert all(p.dtype == jnp.int32 for p in new.values())
        same((scores, new, es.gradient(params, KEY, scores)), (expected, moved, votes))


def test_no_vote_is_lost():
    """Votes too few to move a weight move it later: parameters are start + lr · all votes."""
    es, lr, params = IntEggroll(), 2**16 // 7, int_params()
    step, gradient = jax.jit(partial(es.step, likelihood)), jax.jit(es.gradient)
    begin, total = params, jax.tree.map(jnp.zeros_like, params)
    for t in range(30):
        key, text = jax.random.fold_in(KEY, t), jnp.asarray(int_text(30, 6, seed=t))
        new, scores = step(params, key, text, lr)
        total = jax.tree.map(jnp.add, total, gradient(params, key, scores))
        params = new
    same(params, jax.tree.map(lambda p, v: p + lr * v, begin, total))
    for p, q in zip(*(whole_weights(t).values() for t in (params, begin)), strict=True):
        assert np.abs(p - q).max() > 2


def test_clipping_is_a_rectifier():
    u = jnp.arange(-1000, 255)
    same(eggroll.saturate(u - 127) + jnp.int32(127), np.maximum(0, u))


def votes_of(fitness, params, pairs, populations):
    """Votes and number of pairs without a tie of many populations, (populations, ...)."""

    def one(key):
        scores = IntEggroll().evaluate(fitness, params, key, jnp.arange(pairs))
        untied = jnp.sum(scores[:, 0] != scores[:, 1])
        return IntEggroll().gradient(params, key, scores), untied

    return jax.jit(jax.vmap(one))(jax.random.split(KEY, populations))


def test_votes_by_chance():
    """Rows, columns and vectors that do not matter: mean 0, variance the pairs without a tie."""
    params = {"W": jnp.zeros((6, 5), jnp.int32), "v": jnp.zeros(20, jnp.int32)}
    x = jnp.array([96, -64, 32, 127, 0, 0], jnp.int8)  # the last two rows do not matter

    def fitness(params, _):
        h = eggroll.product(x, params["W"])[:4]  # nor does the last column
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
        W = eggroll.rows(M, jnp.arange(2)).astype(jnp.int32)
        return W[0, 0] + W[0, 1] + W[1, 0]

    votes, _ = votes_of(fitness, jnp.zeros((2, 2), jnp.int32), 50, 400)
    assert_mean(votes[:, 1, 1] / 50, -1 / 2)
    assert_mean(votes[:, 0, 0] / 50, 1 / 2)


def test_forgetting_votes():
    """Mean and variance of the moves by both rules, and the table of the page."""
    page = (HERE / "theory" / "6-integers.md").read_text(encoding="utf-8")
    lines = re.findall(
        r"^\| (?:\$\\varepsilon\$|\$z\$|steps, .*?) \| (\$[\d.].*)", page, re.MULTILINE
    )
    table = np.array([re.findall(r"[\d.]+", line) for line in lines], float)
    assert table.shape == (3, 6)
    delta = 0.02
    V = np.random.default_rng(0).normal(delta, 1, (1000, 4000))  # weights, steps; in √P
    for alpha, *stated in table.T:
        z = stats.norm.ppf(1 - alpha / 2)
        np.testing.assert_allclose(stated, [z, alpha / (2 * stats.norm.pdf(z)) ** 2], rtol=0.006)
        drift = stats.norm.cdf(delta - z) - stats.norm.cdf(-delta - z)
        assert abs(drift / (2 * stats.norm.pdf(z) * delta) - 1) < 2e-3
        assert_mean(np.mean(np.sign(V) * (np.abs(V) >= z), axis=1), drift)
        assert_mean(np.mean(np.abs(V - delta) >= z, axis=1), alpha)
        if z > 1:  # kept: what has moved is all votes over z, but for what does not yet suffice
            moved = np.floor(V.sum(axis=1) / z + 0.5)
            assert_mean(moved / 4000, delta / z, tolerance=SE + 0.5)
            assert abs(moved.var() / 4000 * z**2 - 1) < SE * math.sqrt(2 / 1000) + z**2 / 4000


def test_no_float_in_an_integer_step():
    step, text = jax.jit(partial(IntEggroll(chunk=4).step, likelihood)), jnp.asarray(int_text(8, 6))
    jaxpr = str(jax.make_jaxpr(step)(int_params(), KEY, text, jnp.int32(9)))
    types = set(re.findall(r"[\w)]:([\w<>]+)\[", jaxpr))  # however deep, and of literals
    assert {"i8", "i32"} <= types <= {"i8", "i32", "u32", "bool", "key<fry>"}


def test_no_float_in_the_program_that_trains(inputs, monkeypatch):
    """In the compiled HLO of the whole step, as the command line runs it."""
    programs = []

    def learn(args, state, text, train_step, *_):
        programs.append(set(re.findall(r"\b((?:s|u|f|bf)\d+)\w*\[", train_step.as_text())))
        return state

    monkeypatch.setattr(eggroll, "learn", learn)
    for kind in "--integer", "":
        main(f"{kind} --text cat.txt {TINY}")
    assert {"s8", "s32"} <= programs[0] <= {"s8", "s32", "u8", "u32", "u64"}
    assert "f32" in programs[1]


# Command line ------------------------------------------------------------------------------------

TINY = "--population 64 --hidden 8 --length 8"
LAST_LINE = r"held-out (\d\.\d\d) bits/byte after \d+ s \(unigram (\d\.\d\d), bigram (\d\.\d\d)\)"


def main(options):
    eggroll.main(options.split())


def python(*arguments):
    """Python as a process of its own."""
    path = {"PYTHONPATH": str(HERE), "JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}
    command = [sys.executable, "-W", "error", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    return subprocess.Popen(command, env=os.environ | path, **pipes)


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    """The folder to work in."""
    monkeypatch.chdir(tmp_path)
    Path("cat.txt").write_text("the cat sat on the mat — " * 200, encoding="utf-8")
    Path("abc.txt").write_bytes(b"abc" * 100)
    Path("xyz.txt").write_bytes(b"xyz" * 100)
    Path("empty.txt").write_bytes(b"")
    progress = {"step": 1, "seconds": 2.0, "alphabet": np.frombuffer(b"abc", np.uint8)}
    eggroll.save("good.npz", eggroll.rnn_init(KEY, 3, 8), progress)
    Path("cut.npz").write_bytes(Path("good.npz").read_bytes()[:-100])
    return tmp_path


@pytest.mark.parametrize("kind, encoding", [("", None), ("--integer --lr 6000", "ascii")])
def test_it_learns_prints_a_sample_and_ends_with_the_score(kind, encoding, inputs, monkeypatch):
    """Also where a stream has no encoding, or one that lacks the dash."""
    stdout = io.TextIOWrapper(io.BytesIO(), encoding) if encoding else io.StringIO()
    monkeypatch.setattr(sys, "stdout", stdout)
    main(f"--text cat.txt --steps 150 --population 512 --hidden 16 --length 16 {kind}")
    stdout.seek(0)
    out = stdout.read()
    held_out, unigram, bigram = map(float, re.search(LAST_LINE + "$", out).groups())
    assert held_out < unigram - 0.5
    data, written = Path("cat.txt").read_bytes(), out.split("compiled in")[1].split("\n\n")[1]
    written = written.replace("?", "—")
    assert len(written.encode()) >= 300 and set(written) <= set(data.decode() + "\ufffd")
    alphabet, *parts = eggroll.load_text(HERE / "README.md")  # whose parts differ
    assert b"".join(bytes(alphabet[part]) for part in parts) == README.encode()
    assert len(parts[0]) == len(README.encode()) * 9 // 10
    # the baselines, counted in plain Python
    train, test = data[: len(data) * 9 // 10], data[len(data) * 9 // 10 :]
    ones, firsts, pairs = map(Counter, (train, train[:-1], itertools.pairwise(train)))
    more = 0.1 * len(set(data))
    p1 = [(ones[b] + 0.1) / (len(train) + more) for b in test[1:]]
    p2 = [(pairs[a, b] + 0.1) / (firsts[a] + more) for a, b in itertools.pairwise(test)]
    for stated, p in (unigram, p1), (bigram, p2):
        assert abs(stated + np.mean(np.log2(p))) < 0.006


def parameters(path):
    with np.load(path) as file:
        return {name: file[name] for name in file if name not in ("seconds", "alphabet")}


@pytest.mark.parametrize("kind", ["--lr 0.001", "--integer --lr 6000 --chunk 8"])
def test_going_on_continues_exactly_every_step_is_new_and_lr_falls(kind, inputs):
    def go_on(steps, path):
        main(f"--text cat.txt {TINY} {kind} --steps {steps} --checkpoint {path}")
        return parameters(path)

    go_on(1, "a.npz")
    with np.load("a.npz") as file:
        np.savez("a.npz", **{**file, "step": 300})
    shutil.copy("a.npz", "b.npz")
    states = parameters("a.npz"), go_on(1, "a.npz"), go_on(1, "a.npz")
    assert states[2]["step"] == 302
    same(states[2], go_on(2, "b.npz"))
    # new noise and new examples at every step: the same ones again would go the same way again
    first, second = (
        np.concatenate([(1.0 * new[name] - old[name]).ravel() for name in new if name != "step"])
        for old, new in itertools.pairwise(states)
    )
    assert 0 < abs(first @ second) < 0.8 * np.linalg.norm(first) * np.linalg.norm(second)
    if "--integer" in kind:  # votes are whole numbers, all even or not, of lr/(1 + step/600)
        assert np.gcd.reduce(first.astype(int)) in (4000, 8000)


def test_ctrl_c_ends_training_not_the_program_and_kill_leaves_a_whole_checkpoint(inputs):
    options = f"--text cat.txt {TINY} --seconds 600 --checkpoint".split()
    blows = signal.SIGINT, signal.SIGKILL
    here = signal.signal(signal.SIGINT, signal.default_int_handler)  # may be ignored, and inherited
    processes = [python(HERE / "eggroll.py", *options, f"{blow}.npz") for blow in blows]
    signal.signal(signal.SIGINT, here)
    for blow, process in zip(blows, processes, strict=True):
        line = next(line for line in process.stdout if line.startswith("step"))
        process.send_signal(blow)
        out, err = process.communicate(timeout=300)
        assert process.returncode == (0 if blow == signal.SIGINT else -blow), err
        if blow == signal.SIGINT:
            assert "interrupted" in out and re.fullmatch(LAST_LINE, out.splitlines()[-1])
        assert parameters(f"{blow}.npz")["step"] >= int(line.split()[1].replace(",", ""))


def test_a_save_cut_short_leaves_the_old_checkpoint(inputs, monkeypatch):
    def savez(file, **state):
        file.write(b"half of a checkpoint")
        raise KeyboardInterrupt  # killed here

    before = Path("good.npz").read_bytes()
    monkeypatch.setattr(np, "savez", savez)
    with pytest.raises(KeyboardInterrupt):
        eggroll.save("good.npz", {"W": np.zeros(3)}, {})
    assert Path("good.npz").read_bytes() == before


REFUSED = {
    "--text nowhere.txt": "nowhere.txt",
    "--text empty.txt": "--length 8 needs more than 0 bytes held out",
    "--population 7": "even",
    "--population 2000000000 --rank 500": "out of memory.*--chunk",  # a thousand terabytes
    "--chunk 3": "chunk must divide the pairs, got chunk=3 and 2048 pairs",
    "--rank half": "--rank must be full or a number of at least 1, got half",
    "--lr nan": "--lr must be positive and finite, got nan",
    "--checkpoint cut.npz": "cut.npz is not a checkpoint",
    "--checkpoint good.npz --hidden 9 --integer": (
        r"another network .*float32\(3, 8\).* expected .*int32\(3, 9\)"
    ),
    "--checkpoint good.npz --hidden 8 --text xyz.txt": "another text: it has other bytes",
    "--checkpoint nowhere/x.npz": "nowhere/x.npz",
    "--integer --sigma 0.1": "a multiple of 1/16 for --sigma",
    "--integer --lr 600000": "--lr of 1 to 2³¹/population",
}


@pytest.mark.parametrize("options", REFUSED)
def test_bad_input_is_refused_in_one_line(options, inputs, capsys):
    with pytest.raises(SystemExit) as exit:
        main(f"--length 8 --steps 1 --text abc.txt {options}")
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1
    assert re.search(REFUSED[options], error)


def test_chunks_run_where_the_whole_population_is_out_of_memory(inputs):
    """With 2 GB of address space, which 2²⁰ members exceed at once and 4096 of them do not."""
    code = """if True:
        import resource, eggroll
        eggroll.jax.devices()
        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + (2 << 30),) * 2)
        eggroll.main()
    """
    options = f"--text abc.txt --population {2**20} --rank 8 --length 8 --hidden 8 --steps 1"
    whole, parts = (python("-c", code, *options.split(), *more) for more in ([], ["--chunk", 2048]))
    errors = [process.communicate(timeout=300)[1] for process in (whole, parts)]
    assert re.fullmatch(r".*out of memory.*--chunk.*\n", errors[0])
    assert (whole.returncode, parts.returncode) == (2, 0) and "out of memory" not in errors[1]


# Documents ---------------------------------------------------------------------------------------

README = (HERE / "README.md").read_text(encoding="utf-8")


def run(code, names=None):
    """The names that code leaves, where these are known."""
    Path("code.py").write_text(code, encoding="utf-8")
    with jax.numpy_rank_promotion("allow"):
        return runpy.run_path("code.py", names)


def prints(code, capsys):
    run(code)
    return capsys.readouterr().out


def test_the_method_alone_trains_the_example_of_the_docstring(
    inputs, monkeypatch, optimized, capsys
):
    """What is between the two lines that say "copy", less the imports marked as of the rest."""
    source = (HERE / "eggroll.py").read_text(encoding="utf-8")
    method = source.split("copy from here")[1].split("\n", 1)[1].split("copy up to here")[0]
    first, rest = method.split("# isort: split", 1)
    method = first + "\n#" + rest.split("\n\n# Noise", 1)[1]
    allowed = {"math", "collections.abc", "dataclasses", "functools", "typing", "jax", "jax.numpy"}
    assert set(re.findall(r"^\s*(?:import|from) (\S+)", method, re.MULTILINE)) <= allowed
    Path("es.py").write_text(method, encoding="utf-8")
    monkeypatch.syspath_prepend(inputs)
    example = textwrap.dedent(eggroll.__doc__.split("pairs W ± σE:\n")[1].split("\n[1]")[0])
    for module in "eggroll", "es":
        assert -1 < float(prints(example.replace("from eggroll", f"from {module}"), capsys)) < 0


def blocks(markdown):
    return re.findall(r"```python\n(.*?)```", markdown, re.DOTALL)


EXAMPLE, *_ = blocks(README)
RECIPES = dict(re.findall(r"summary>(.*?)</summary>(.*?)</d", README, re.DOTALL))
LIBRARIES = {"eqx": "equinox", "nnx": "flax.nnx", "linen": "flax.linen"}
LIBRARIES |= {name: name for name in ("optax", "gymnasium")}
TRIED = {  # what is done with the names that a recipe defines: a step, if nothing else is said
    "The same batch": "batch_step(params, key, jax.tree.map(lambda x: x[1], data), 0.6)",
    "σ and": "scheduled_step(params, key, data, 7)",
    "Optax:": "optax_step(params, state, key, data)",
    "Integers": "int_step(ints, key, data, 2**11)",
    "Train only": "head_step(params[1], params[0], key, data, 0.6)",
    "Half": "es.step(half, params, key, data, 0.6)",
    "A fitness": "g, scores",
    "A transformer": """es.step(lambda p, x: jnp.sum(attention(p, x, 2)), {"scale": jnp.ones(8)}
        | {name: normal(KEY, (9, 8)) for name in ("emb", "pos")}
        | {name: normal(KEY, (8, 8)) for name in ("q", "k", "v", "out")},
        key, jnp.arange(20).reshape(4, 5) % 9, 0.1)""",
    "Deep": """es.step(lambda p, x: jnp.sum(deep(p, x)), {"W": jnp.ones((5, 3, 3)), "b": jnp.ones((5, 3))},
        key, jnp.ones((4, 3)), 0.1)""",
    "Convol": """es.step(lambda p, x: jnp.sum(convolve(p, x)), {"kernel": jnp.ones((3, 3, 2, 4))},
        key, jnp.ones((4, 1, 5, 5, 2)), 0.1)""",
}


def test_the_example_in_the_readme_prints_what_it_says(inputs, optimized, capsys):
    assert len(re.findall(r"^.", EXAMPLE, re.MULTILINE)) <= 15
    accuracy = float(prints(EXAMPLE, capsys).removeprefix("accuracy "))
    assert abs(accuracy - float(re.search(r"prints `accuracy (\S+)`", README)[1])) < 0.03


@cache
def example():
    """The names of README's example, after two steps."""
    return run(EXAMPLE.replace("range(200)", "range(2)"))


@pytest.mark.parametrize("title", [title for title, text in RECIPES.items() if blocks(text)])
@pytest.mark.filterwarnings("default")
def test_recipes_run_as_printed(title, inputs):
    recipe, names = blocks(RECIPES[title]), vars(eggroll) | globals() | example()
    assert all(len(re.findall(r"^.", block, re.MULTILINE)) <= 8 for block in recipe)
    for name, library in LIBRARIES.items():
        if f"{name}." in recipe[0]:
            names[name] = pytest.importorskip(library)
    with jax.numpy_rank_promotion("allow"):
        if title.startswith("A fitness"):
            names["pairs"] = 2
        for block in recipe:
            names |= run(block, names)
        (tried,) = [t for start, t in TRIED.items() if title.startswith(start)] or [
            "es.step(fitness, params, key, data, 0.6)"
        ]
        results = jax.tree.leaves(eval(tried, names))
        assert all(np.isfinite(x).all() for x in results) and any(np.ptp(x) > 0 for x in results)
        if "batch_step" in names:  # it sees the batch that it is given, and compiles once
            batches = [jax.tree.map(lambda x, i=i: x[i], names["data"]) for i in (2, 3)]
            first, other = (names["batch_step"](names["params"], KEY, b, 1.0)[1] for b in batches)
            assert (first != other).any() and names["batch_step"]._cache_size() == 1
        if "mesh" in names:  # as on one device and at once, where rounding turns no hard step over
            one, many = (
                jax.jit(partial(n["es"].step, n["fitness"]))(n["params"], KEY, n["data"], 0.6)
                for n in (example(), names)
            )
            assert (one[1] != many[1]).mean() < 0.01
            jax.tree.map(partial(np.testing.assert_allclose, atol=0.01), many[0], one[0])
            # all devices work if a member uses its number
            numbers = jax.device_put(jnp.arange(8), names["data"][1].sharding)
            for used, devices in (1, 8), (0, 1):
                fit = lambda params, i, used=used: jnp.sum(params["b"]) + (0 * i if used else 0)
                new, _ = jax.jit(partial(Eggroll(0.1).step, fit))(PARAMS, KEY, numbers, 1.0)
                assert len(new["b"].sharding.device_set) == devices


def test_ranks_withstand_outliers(inputs):
    """The numbers of README's recipe: one score in a hundred is -10⁶."""
    (recipe,) = [blocks(text)[0] for title, text in RECIPES.items() if title.startswith("Outliers")]
    ranks = run(recipe.split("\ng = ")[0], {"jnp": jnp})["ranks"]
    es, ends = Eggroll(0.1), []

    def fitness(params, example):
        x, bad = example
        return jnp.where(bad, -1e6, -jnp.sum((x @ params["W"] + params["b"] - x[:4]) ** 2))

    for shape, lr in (standardize, 0.05), (ranks, 0.05 * math.sqrt(12)):  # variance 1/12

        def step(params, t, shape=shape, lr=lr):
            k1, k2, k3 = jax.random.split(jax.random.fold_in(KEY, t), 3)
            data = normal(k1, (512, 8)), jax.random.bernoulli(k2, 0.01, (512,))
            g = es.gradient(params, k3, shape(es.evaluate(fitness, params, k3, data)))
            return jax.tree.map(lambda p, g: p + lr / (1 + t / 100) * g, params, g), None

        start = {"W": jnp.zeros((8, 4)), "b": jnp.zeros(4)}
        params, _ = jax.lax.scan(step, start, jnp.arange(300))
        x = normal(KEY, (1000, 8))
        ends.append(jnp.mean(jax.vmap(lambda x, p=params: fitness(p, (x, False)))(x)))
    assert ends[0] < -3.5 and ends[1] > -0.01


def test_the_documents_name_options_commands_tests_and_files_that_exist(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main("--help")
    help = capsys.readouterr().out
    assert max(map(len, help.splitlines())) <= 100 and help.count("\n") < 40
    assert set(re.findall(r"`(--[a-z]+)", README)) <= set(re.findall(r"--\w+", help))
    (command,) = re.findall(r"^.*-m pytest$", README, re.MULTILINE)
    assert command in (HERE / ".ci" / "run").read_text(encoding="utf-8")

    pages = {page: page.read_text(encoding="utf-8") for page in (HERE / "theory").glob("*.md")}
    numbered = {page: text for page, text in pages.items() if page.name[0].isdecimal()}
    for page, text in numbered.items():
        _, tests = text.split("## Which test shows it")
        assert set(re.findall(r"`(test_\w+)`", tests)) <= globals().keys(), page
    texts = [cell.source for cell in notebook().cells if cell.cell_type == "markdown"]
    pages[HERE / "README.md"], pages[HERE / "tutorial.ipynb"] = README, "\n".join(texts)
    links = {(page.parent, l) for page in pages for l in re.findall(r"\]\(([^)#\s]+)", pages[page])}
    assert numbered and links
    assert not [link for at, link in links if ":" not in link and not (at / link).exists()]


def notebook():
    return nbformat.read(HERE / "tutorial.ipynb", as_version=4)


def test_any_cell_of_the_tutorial_may_be_run_again_and_is_short():
    """What a cell reads, and has not bound itself, is bound in one cell alone, an earlier one."""

    def reads_and_binds(code):
        reads, binds = [], set()
        for i in dis.get_instructions(code):
            if i.opname == "STORE_NAME":
                binds.add(i.argval)
            elif i.opname in ("LOAD_NAME", "LOAD_GLOBAL") and i.argval not in binds:
                reads.append(i.argval)
        for inner in (c for c in code.co_consts if hasattr(c, "co_code")):  # functions
            reads += reads_and_binds(inner)[0]
        return set(reads) - binds, binds

    sources = [cell.source for cell in notebook().cells if cell.cell_type == "code"]
    cells = [reads_and_binds(compile(source, "cell", "exec")) for source in sources]
    times = Counter(name for _, binds in cells for name in binds)
    assert not [(i, n) for i, (reads, _) in enumerate(cells) for n in reads if times[n] > 1]
    lines = [len(source.splitlines()) for source in sources]
    assert max(lines) <= 30 and sum(lines) <= 950


def test_the_tutorial_is_kept_as_one_whole_run():
    assert (HERE / "tutorial.ipynb").stat().st_size < 1.5e6
    cells = [c for c in notebook().cells if c.cell_type == "code"]
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
    outputs = [output for c in cells for output in c.outputs]
    assert {output.get("name", "stdout") for output in outputs} == {"stdout"}  # no warnings
    assert all(output.output_type != "error" for output in outputs)
    texts = [output.get("text", "") or output.data.get("text/markdown", "") for output in outputs]
    assert not re.search(r"/(home|root|tmp|usr|work|Users)/", "".join(texts))  # of one machine


def test_acrobot_in_the_tutorial_is_that_of_gymnasium(inputs):
    # Recorded from Gymnasium 1.4.0, Acrobot-v1, in float64; the policy is argmax(observation @ W).
    W = [[1, 2, 1], [-1, 1, 1], [3, 3, 1], [-1, 3, 1], [1, 3, 1], [-3, 1, 3]]
    actions = (
        "1111111111111111111111100000001222111000000222221100000222221100000022222221000000022"
        "222221110000002222222222221100000000"
    )
    first = [0.025019092485, 0.079442761838, 0.055137138814, -0.054958563298]
    last = [1.917614148, 1.991045300, -1.868707085, -1.945553748]  # an angle was wrapped on the way
    steps = (  # the bounds on speed, and both angles wrapped
        ([3, -3, 12.5, -28], 0, [-0.1437386039, 2.6041071996, 4 * np.pi, -9 * np.pi], False),
        ([-3, 3, -12.5, 28], 2, [0.1437386039, -2.6041071996, -4 * np.pi, 9 * np.pi], False),
        ([2, 0.5, 3, 2], 2, [2.5539133162, 0.9160440863, 2.6472884605, 2.1187548838], True),
    )
    (code,) = (c.source for c in notebook().cells if "def acrobot(" in c.source)
    Path("acrobot.py").write_text(code, encoding="utf-8")
    names = {"jax": jax, "jnp": jnp, "partial": partial, "mlp": eggroll.mlp}
    names = runpy.run_path("acrobot.py", names)
    acrobot, act, swing_up = (jax.jit(names[name]) for name in ("acrobot", "act", "swing_up"))
    with jax.enable_x64(True):
        policy, state = [{"W": jnp.array(W, float), "b": jnp.zeros(3)}], jnp.array(first)
        for t, action in enumerate(actions, 1):
            assert act(policy, state) == int(action)
            state, up = acrobot(state, int(action))
            assert up == (t == len(actions))
        np.testing.assert_allclose(state, last, rtol=1e-6)
        assert swing_up(policy, jnp.array(first)) == -120  # rewards: 120 times -1, then 0
        idle = [{"W": jnp.zeros((6, 3)), "b": jnp.zeros(3)}]  # always action 0: truncated at 500
        assert swing_up(idle, jnp.array(first)) == -500
        for state, action, new, terminated in steps:
            state, up = acrobot(jnp.array(state, float), action)
            np.testing.assert_allclose(state, new, rtol=1e-7)
            assert up == terminated


@pytest.fixture(scope="session", autouse=True)
def tutorial(request, tmp_path_factory):
    """The process that runs the tutorial, if that is to be tested, beside all other tests."""
    if all(item.name != "test_the_tutorial_runs" for item in request.session.items):
        yield
        return
    folder = tmp_path_factory.mktemp("tutorial")  # where it may save its figure
    for name in "eggroll.py", "tutorial.ipynb":
        shutil.copy(HERE / name, folder)
    code = """if True:
        import nbclient, nbformat
        run = nbformat.read("tutorial.ipynb", as_version=4)
        nbclient.execute(run, timeout=1800)  # raises if a cell does
        nbformat.write(run, "run.ipynb")
    """
    process = subprocess.Popen([sys.executable, "-c", code], cwd=folder)
    yield process, folder
    process.kill()


def test_the_tutorial_runs(tutorial):
    process, folder = tutorial
    assert process.wait() == 0
    cells = nbformat.read(folder / "run.ipynb", as_version=4).cells
    outputs = [output for c in cells for output in c.get("outputs", [])]
    assert outputs and all(output.get("name") != "stderr" for output in outputs)
    assert (folder / "theory" / "figures" / "convergence.png").stat().st_size > 10_000
