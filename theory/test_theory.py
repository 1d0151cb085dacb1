"""Every formula of theory/*.md, held against numerics and against the project's own code.

    page  claim                                                 test_...
    1     ES finds the gradient of J; smoothing                 sign_of, gradient_of_a_step
          pairs, standardized scores                            pair_, variance_of, standardized_,
                                                                few_pairs
    2     moments, the law of one entry, degree two             moments_, marginal_, exact_
    3     Theorem 1 (A normal, B anything), its constant        random_covariance, constant_of
          corollaries: signs, normal; own and cross bias        every_output, random_sigma, own_and
          networks of hard steps                                several_layers, hard_steps
          Theorem 2 (signs), Theorem 3 (smooth fitness)         signs_in_both, step_on, bound_for
          waves, symmetry, vectors                              wave_, fourth_, which_, code_
    4     variance, least for rank-one signs; a cubic           variance_formula, gradient_of_a_
          rank one at equal cost, tied weights, a step          rank_one_is, tied_, length_
    5     multiply-adds, intensity, traffic, what is shared     multiply_, arithmetic_, numbers_,
                                                                scalars_
    6     votes                                                 votes_, forgetting_, keeping_

Expected values are sums over all values of the noise, quadratures or formulas of the pages, never
another sample. What the code finds may differ from them by `SE` standard errors.
"""

import itertools
import math
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from numpy.testing import assert_allclose
from scipy import special, stats

import eggroll
from eggroll import Eggroll, IntEggroll, dense, normal, signs, standardize
from test_eggroll import DRAWS, KEY, SE, assert_mean, many_noises

pytestmark = pytest.mark.filterwarnings("error")

# Tools -------------------------------------------------------------------------------------------

HERMITE = special.roots_hermitenorm(28)
LEGENDRE = special.roots_legendre(28)
LAWS = {  # of one entry: its values, and their probabilities
    "normal": (HERMITE[0], HERMITE[1] / math.sqrt(2 * math.pi)),
    "uniform": (math.sqrt(3) * LEGENDRE[0], LEGENDRE[1] / 2),
    "signs": (np.array([-1, 1]), np.array([0.5, 0.5])),
    "kurtosis 3": (math.sqrt(3) * np.array([-1, 0, 1]), np.array([1, 4, 1]) / 6),
    "kurtosis 2": (math.sqrt(2) * np.array([-1, 0, 1]), np.array([1, 2, 1]) / 4),
    "skewed": (np.array([-0.5, 2]), np.array([0.8, 0.2])),
}
every_draw = pytest.mark.parametrize("name", DRAWS)
KURTOSIS = {law: p @ values**4 for law, (values, p) in LAWS.items()}


def grid(law, size):
    """All values of `size` independent entries, (points, size), and their probabilities."""
    values, p = LAWS[law]
    all_values = np.array(list(itertools.product(values, repeat=size)))
    all_p = np.array(list(itertools.product(p, repeat=size)))
    return all_values, all_p.prod(axis=1)


LAWS_OF_FACTORS = [("signs", "signs"), ("kurtosis 2", "kurtosis 2")]
LAWS_OF_FACTORS += [("skewed", "kurtosis 2"), ("kurtosis 3", "signs")]


@pytest.fixture(scope="module", params=itertools.product(LAWS_OF_FACTORS, [1, 2]), ids=str)
def noise(request):
    """All values E of the noise of 2×3 matrices, flat (points, 6), and their probabilities p."""
    (law_A, law_B), r = request.param
    A, p = grid(law_A, 2 * r)
    B, q = grid(law_B, 3 * r)
    A = A.reshape(-1, 2, r) / math.sqrt(r)
    B = B.reshape(-1, 3, r)
    E = np.einsum("amr,bnr->abmn", A, B).reshape(-1, 6)
    p = np.outer(p, q).ravel()
    return SimpleNamespace(E=E, p=p, r=r, k_A=KURTOSIS[law_A], k_B=KURTOSIS[law_B])


def array_of_norm(norm, *shape):
    x = np.random.default_rng(0).normal(size=shape)
    return x * norm / np.linalg.norm(x)


def numerical_gradient(f, x, h=1e-4):
    """∂f/∂x for every entry of an array x, (x.size, …)."""
    slopes = []
    for step in h * np.eye(x.size):
        step = step.reshape(x.shape)
        slopes.append((f(x + step) - f(x - step)) / (2 * h))
    return np.array(slopes)


def second_derivative(f, x, h=1e-2):
    return (f(x + h) - 2 * f(x) + f(x - h)) / h**2


def draw_of(law):
    """A draw for Eggroll: independent entries of a discrete law."""
    values, p = LAWS[law]

    def draw(key, shape, dtype=jnp.float32):
        return jax.random.choice(key, jnp.array(values, dtype), shape, p=jnp.array(p))

    return draw


def normal_beside(law):
    """A draw for Eggroll and matrices of one row: A is normal, B of a discrete law."""

    def draw(key, shape, dtype=jnp.float32):
        A = normal(key, (1, shape[-1]), dtype)
        B = draw_of(law)(jax.random.fold_in(key, 1), (shape[-2] - 1, shape[-1]), dtype)
        return jnp.concatenate([A, B])

    return draw


def estimates(es, fitness, params, pairs=4096, batches=64, treat=jnp.asarray):
    """Independent gradients by the project's own code, flat (batches, size).

    Of scores that are treated somehow; each pair has a random key of its own for data.
    """

    def gradient(key):
        data = jax.random.split(jax.random.fold_in(key, pairs), pairs)
        scores = es.evaluate(fitness, params, key, data)
        return ravel_pytree(es.gradient(params, key, treat(scores)))[0]

    keys = jax.random.split(KEY, batches)
    return np.asarray(jax.jit(partial(jax.lax.map, gradient))(keys), float)


def linear(C, M, _):
    """The fitness ⟨C, M⟩."""
    return jnp.sum(C * dense(M))


def assert_mean_is_not(samples, value):
    """A negative control: the samples (K, size) are precise enough to tell."""
    error = np.linalg.norm(samples.std(axis=0)) / math.sqrt(len(samples))
    assert np.linalg.norm(samples.mean(axis=0) - value) > SE * error


# 1-gradient.md -----------------------------------------------------------------------------------


def test_sign_of_the_score():
    """Of f = 2θ - θ², J = f - σ² and ∇J = E[E f(θ + σE)]/σ = ∇f: J = f + σ² tr H/2."""
    E, p = LAWS["normal"]
    sigma = 0.6
    theta = 0.3

    def f(x):
        return 2 * x - x**2

    scores = f(theta + sigma * E)
    assert_allclose(p @ scores, f(theta) - sigma**2)
    assert_allclose((p * scores) @ E / sigma, 2 - 2 * theta)


def test_gradient_of_a_step():
    """For sign(x), where f has derivative zero, J = erf(θ/(σ√2)) and the code finds J'."""
    sigma = 0.6
    theta = np.array([0.3])
    slope = numerical_gradient(lambda x: special.erf(x[0] / (sigma * math.sqrt(2))), theta)
    assert_allclose(slope, 2 / sigma * stats.norm.pdf(theta / sigma), rtol=1e-6)
    g = estimates(Eggroll(sigma, None, normal), lambda x, _: jnp.sign(x[0]), jnp.float32(theta))
    assert_mean(g, slope)


def test_pair_sees_the_odd_part():
    """The even part of the fitness, so any baseline, leaves the update as it is."""

    def odd(M, _):
        return jnp.sum(jnp.arange(1.0, 4.0) @ M)

    def odd_and_even(M, _):
        return odd(M, _) + jnp.cos(odd(M, _)) + 5

    g = partial(estimates, Eggroll(0.5), params=jnp.zeros((3, 2)), pairs=8)
    assert_allclose(g(odd_and_even), g(odd), rtol=1e-4, atol=1e-4)


def test_variance_of_pairs():
    """One member has the variance (S_o + S_e)/σ² - ‖g‖², a pair S_o/σ² - ‖g‖²; σ = 1."""
    E, p = grid("kurtosis 2", 2)
    square = np.sum(E**2, axis=1)
    odd = E @ [0.4, -1.0]
    even = 3 + odd**2
    S_o = p @ (square * odd**2)
    S_e = p @ (square * even**2)
    g = (p * odd) @ E
    error_of_member = (odd + even)[:, None] * E - g
    error_of_pair = odd[:, None] * E - g
    variance_of_member = p @ np.sum(error_of_member**2, axis=1)
    variance_of_pair = p @ np.sum(error_of_pair**2, axis=1)
    assert_allclose(variance_of_member, S_o + S_e - g @ g)
    assert_allclose(variance_of_pair, S_o - g @ g)


def test_standardized_update():
    """The update is ĝ/s, the same for f and λf + c."""
    update = partial(Eggroll(0.5).gradient, jnp.zeros((3, 2)), KEY)
    f = np.random.default_rng(0).normal(size=(16, 2))
    expected = update(f) / f.std()
    assert_allclose(update(standardize(f)), expected, rtol=1e-4, atol=1e-6)
    assert_allclose(update(standardize(7 * f + 3)), expected, rtol=1e-4, atol=1e-6)


def test_few_pairs():
    """For f = M₁₁ + M₁₂ + M₂₁, with signs, a standardized step moves M₂₂, too, but ever less."""
    C = jnp.array([[1.0, 1.0], [1.0, 0.0]])
    for pairs, *stated in (1, 0.5, -0.5), (2, 0.53, -0.33), (8, 0.56, -0.09), (64, 0.58, -0.01):
        large = np.arange(pairs)  # so many other pairs have |f| = 3σ, the rest has σ
        p = stats.binom.pmf(large, pairs - 1, 1 / 4)
        if_large = p @ np.sqrt(pairs / (8 + 8 * large + pairs))  # mean of σ/s
        if_small = p @ np.sqrt(pairs / (8 * large + pairs))
        own = (3 * if_large + if_small) / 4
        leaked = 3 * (if_large - if_small) / 4
        assert_allclose([own, leaked], stated, atol=0.006)
        fitness = partial(linear, C)
        g = estimates(Eggroll(1.0), fitness, 0 * C, pairs, 3000, standardize)
        assert_mean(g[:, [0, 3]], [own, leaked])


# 2-low-rank-noise.md -----------------------------------------------------------------------------


def test_moments_of_the_noise(noise):
    """Covariance I, E Eᵢⱼ⁴ = 3 + (k² - 3)/r, rectangles of mean 1/r, at every rank."""
    mean = noise.p @ noise.E
    covariance = (noise.p * noise.E.T) @ noise.E
    fourth = noise.p @ noise.E**4
    rectangle = noise.p @ noise.E[:, [0, 2, 3, 5]].prod(axis=1)
    assert_allclose(mean, 0, atol=1e-12)
    assert_allclose(covariance, np.eye(6), atol=1e-12)
    assert_allclose(fourth, 3 + (noise.k_A * noise.k_B - 3) / noise.r)
    assert_allclose(rectangle, 1 / noise.r)


def density(z, r):
    """Of one entry of E, for normal factors."""
    x = math.sqrt(r) * np.abs(z)
    order = (r - 1) / 2
    scale = math.sqrt(r / math.pi) / special.gamma(r / 2)
    return scale * (x / 2) ** order * special.kv(order, x)


@pytest.mark.parametrize("r", [1, 2, 10])
def test_marginal_law(r):
    """Normal: (1 + u²/r)^(-r/2) is the transform of the density; signs: a binomial variable."""
    u = np.array([[0.0], [0.5], [1.5], [4.0]])
    transform = (1 + u[:, 0] ** 2 / r) ** (-r / 2)
    log_z = np.linspace(-40, 4, 9001)  # as the density may be infinite at 0
    z = np.exp(log_z)
    integral = np.trapezoid(2 * np.cos(u * z) * density(z, r) * z, log_z)
    assert_allclose(integral, transform, atol=1e-7)
    W = jnp.zeros((1, 1))
    entry = many_noises(Eggroll(1.0, r, normal), W, 20_000)[:, 0]
    assert_mean(np.cos(entry * u.T), transform)
    entry = many_noises(Eggroll(1.0, r, signs), W, 20_000)[:, 0]
    j = np.arange(r + 1)
    points = (2 * j - r) / math.sqrt(r)
    hits = np.isclose(entry, points, atol=1e-5)
    assert_mean(hits, stats.binom.pmf(j, r, 0.5))


def test_exact_to_degree_two(noise):
    """For a polynomial of degree two g_r = ∇f at every rank."""
    C = array_of_norm(1.0, 6)
    H = array_of_norm(1.0, 6, 6)
    quadratic = np.sum((noise.E @ H) * noise.E, axis=1)
    f = 3 + noise.E @ C + quadratic
    assert_allclose((noise.p * f) @ noise.E, C)


# 3-convergence.md: Theorem 1 and its corollaries -------------------------------------------------


def jumps_in_both(T, W):
    """h(T) = T∇J_T for f = 1 where both entries of M (1, 2) are positive, else 0; σ = 1."""
    scale = np.sqrt(np.diagonal(T))
    u = W / scale
    correlation = T[0, 1] / scale.prod()
    rest = math.sqrt(max(1 - correlation**2, 1e-30))
    p_other = special.ndtr((u[::-1] - correlation * u) / rest)  # that the other is positive
    return T @ (stats.norm.pdf(u) / scale * p_other)


@pytest.mark.parametrize("law", ["signs", "skewed"])
@pytest.mark.parametrize("r", [1, 3])
def test_random_covariance(law, r):
    """A normal, B anything, a fitness with jumps: g_r = E h(T), T = BBᵀ/r."""
    W = np.array([0.4, -0.6])
    B, p = grid(law, 2 * r)
    exact = p @ [jumps_in_both(b @ b.T / r, W) for b in B.reshape(-1, 2, r)]

    def fitness(M, _):
        return jnp.all(dense(M) > 0)

    g = estimates(Eggroll(1.0, r, normal_beside(law)), fitness, jnp.float32(W[None]))
    assert_mean(g, exact)
    assert_mean_is_not(g, jumps_in_both(np.eye(2), W))


def test_constant_of_one_output():
    """r(g_r - g_∞) tends to ½(k - 1) ∂²h/∂T₁₁², for f = 1 where M > σ, B of kurtosis 2."""

    def h(T):
        return np.sqrt(T) * stats.norm.pdf(1 / np.sqrt(T))

    r = 1024
    nonzero = np.arange(1, r + 1)  # entries of B: they are 0 or ±√2
    g = stats.binom.pmf(nonzero, r, 1 / 2) @ h(2 * nonzero / r)
    assert_allclose(r * (g - h(1)), second_derivative(h, 1) / 2, rtol=0.01)


def test_constant_of_two_outputs():
    """… and to ½ ∂²h/∂T₁₂², for f = 1 where M₁ > σ and M₂ > σ, B of signs; T₁₂ = t."""

    def h(t):  # both entries alike
        p_other = special.ndtr(-np.sqrt((1 - t) / (1 + t)))
        return (1 + t) * stats.norm.pdf(1) * p_other

    for r, stated in (16, 0.0854), (1024, 0.0828):
        equal = np.arange(1, r + 1)  # columns in which B has the same sign twice
        g = stats.binom.pmf(equal, r, 1 / 2) @ h(2 * equal / r - 1)
        norm = math.sqrt(2) * (g - h(0))
        assert_allclose(r * norm, stated, atol=6e-5)
    constant = second_derivative(h, 0) / 2
    assert_allclose(math.sqrt(2) * constant, 0.0828, atol=6e-5)


def test_every_output_of_signs():
    """A normal, B signs: a sum of jumps of single outputs has no error, even at r = 1."""
    W = jnp.array([[0.5, -0.8]])

    def fitness(M, _):
        return jnp.sum(jnp.sign(dense(M)))

    full_rank = 2 * stats.norm.pdf(W.ravel())
    signs_in_B = estimates(Eggroll(1.0, 1, normal_beside("signs")), fitness, W)
    all_normal = estimates(Eggroll(1.0, 1, normal), fitness, W)
    assert_mean(signs_in_B, full_rank)
    assert_mean_is_not(all_normal, full_rank)


def own_and_cross(r, k_A, k_B, chi):
    """By how much the two parts of the leading bias of one vector exceed those of full rank."""
    own = 1 + (k_B * (1 + (k_A - 3) * chi / 3) - 1) / r
    cross = 1 + (2 + (k_A - 3) * chi) / r
    return own, cross


def test_own_and_cross_part(noise):
    """E δⱼ⁴/3 and E δⱼ²δ_q² of the outputs δ = xE, ‖x‖ = 1."""
    x = np.array([0.8, 0.6])
    own, cross = own_and_cross(noise.r, noise.k_A, noise.k_B, np.sum(x**4))
    delta = x @ noise.E.reshape(-1, 2, 3)  # (points, 3)
    product = delta[:, 0] * delta[:, 1]
    assert_allclose(noise.p @ delta**4 / 3, own)
    assert_allclose(noise.p @ product**2, cross)


@every_draw
@pytest.mark.parametrize("r", [1, 4])
def test_own_and_cross_part_with_the_code(name, r):
    m = 16
    x = jnp.full(m, 1 / math.sqrt(m))

    def fitness(M, _):
        y = x @ M
        return y[0] ** 3 / 3 + y[1] * y[2] ** 2

    g = estimates(Eggroll(1.0, r, DRAWS[name]), fitness, jnp.zeros((m, 3)), 1024)
    own, cross = own_and_cross(r, KURTOSIS[name], KURTOSIS[name], 1 / m)
    assert_mean(x @ g.reshape(-1, m, 3), [own, cross, 0])


def chi_squared(r):
    """Values of s = τ² ~ χ²_r/r and their probabilities, for quadrature."""
    first, last = stats.chi2.ppf([1e-7, 1 - 1e-9], r) / r
    s = np.geomspace(first, last, 100)
    p = stats.chi2.pdf(r * s, r) * s
    return s, p / p.sum()


STEPS = np.array([0.4, -0.3, 0.7, 0.8, 0.5, -0.6])  # v = xW of three hard steps; V of one output


def network_J(theta, s_1, s_2):
    """P(uV > 0.3), u = sign(xW), ‖x‖ = 1, under full-rank noise of scale √s in each layer."""
    units, _ = grid("signs", 3)
    v, V = np.split(theta, 2)
    scale_1 = np.sqrt(s_1)[..., None, None]
    scale_2 = np.sqrt(3 * s_2)[..., None]  # ‖u‖² = 3
    p_units = special.ndtr(units * v / scale_1).prod(axis=-1)
    p_output = special.ndtr((units @ V - 0.3) / scale_2)
    return np.sum(p_units * p_output, axis=-1)


def network_H(s_1, s_2):
    """s_l g_∞ of layer l, σ = 1: (6, …)."""
    s_1, s_2 = np.broadcast_arrays(s_1, s_2)
    slope = numerical_gradient(lambda theta: network_J(theta, s_1, s_2), STEPS)
    return np.concatenate([s_1 * slope[:3], s_2 * slope[3:]])


def network_gradient(r):
    s, p = chi_squared(r)
    return network_H(s[:, None], s) @ p @ p


def test_random_sigma_in_every_layer():
    """Normal factors: rank r is full rank with σ τ in place of σ, τ of each layer its own."""
    v, V = jnp.split(jnp.float32(STEPS)[:, None], 2)
    x = jnp.array([0.6, -0.8])
    W = x[:, None] @ v.T

    def fitness(params, _):
        u = jnp.sign(x @ params[0])
        return jnp.sum(u @ params[1] > 0.3)

    def gradient(rank):  # by v and V
        g = estimates(Eggroll(1.0, rank, normal), fitness, [W, V])
        return np.concatenate([x @ g[:, :6].reshape(-1, 2, 3), g[:, 6:]], axis=1)

    rank_one = gradient(1)
    assert_mean(rank_one, network_gradient(1))
    assert_mean_is_not(rank_one, network_H(1, 1))
    assert_mean(gradient(None), network_H(1, 1))


def test_constant_of_several_layers():
    """r(g_r - g_∞) tends to the sum of H's second derivatives by the s of each layer."""
    r = 500
    error = r * (network_gradient(r) - network_H(1, 1))
    first = second_derivative(lambda s: network_H(s, 1), 1)
    second = second_derivative(lambda s: network_H(1, s), 1)
    assert_allclose(error, first + second, atol=0.02 * np.abs(error).max())


def test_hard_steps():
    """∂J/∂vⱼ = Φ'(vⱼ/η)/η (J given uⱼ = 1, less J given uⱼ = -1); η = 1."""
    one = np.ones(())
    given_up = network_J(np.append(np.inf, STEPS[1:]), one, one)
    given_down = network_J(np.append(-np.inf, STEPS[1:]), one, one)
    slope = stats.norm.pdf(STEPS[0]) * (given_up - given_down)
    assert_allclose(network_H(1, 1)[0], slope, rtol=1e-6)


# 3-convergence.md: Theorems 2 and 3 --------------------------------------------------------------


def test_signs_in_both_factors():
    """Theorem 2 for three hard steps that must not agree, r = 1 and η = ‖x‖ = 1."""
    v = np.array([0.2, -0.3, 0.4])
    x = np.arange(1.0, 11) / math.sqrt(385)
    b, _ = grid("signs", 3)

    def F(t):  # on the line v + t b, (…, 8)
        steps = v + t[..., None] * b > 0
        return steps.any(axis=-1) & ~steps.all(axis=-1)

    y = grid("signs", 10)[0] @ x[:, None]  # (1024, 1)
    mean_of_yF = np.mean(y * F(y + np.zeros(8)), axis=0)
    t = (-v / b).T  # where each unit jumps, (3, 8)
    jump = 1.0 * F(t + 1e-9) - F(t - 1e-9)
    mean_of_zF = np.sum(jump * stats.norm.pdf(t), axis=0)  # of a normal z
    error = np.abs((mean_of_yF - mean_of_zF) @ b / 8).max()
    Q = np.abs(jump).sum(axis=0).mean()
    assert Q <= 3
    assert 1e-6 < error <= (2.2 * Q + 1) * np.sum(x**3)


def test_step_on_a_lattice():
    """One output, f = 1 where it exceeds σ: signs err by -Φ'(1)/√(mr) if mr is a square."""
    limit = stats.norm.pdf(1)
    for root, tolerance in (64, 0.03), (512, 0.003):  # root of mr
        j = np.arange(root**2 + 1)
        p = stats.binom.pmf(j, root**2, 0.5)
        z = (2 * j - root**2) / root
        error = p @ (z * (z > 1)) - limit
        assert_allclose(root * error, -limit, rtol=tolerance)
        assert abs(error) <= (2.2 + 1) / root  # Theorem 2


def test_bound_for_smooth_fitness():
    """Theorem 3 for f = sin⟨ω, M⟩, whose derivatives are bounded by powers of ‖ω‖; σ = 1."""
    omega = array_of_norm(1.5, 3, 2)
    L_3 = 1.5**3
    L_4 = 1.5**4
    fourth = 6**2 + stats.chi(6).moment(4)  # of abᵀ, with signs, and of Z
    fifth = 6**2.5 + stats.chi(6).moment(5)
    for r in 1, 2, 16, 256:
        error = wave_gradient(omega, r, "signs") - phi_limit(omega) * omega.ravel()
        bound = (4 * L_3 + L_4) * fourth + L_4 * fifth / math.sqrt(r)
        assert 0.01 / r < np.linalg.norm(error) < bound / (24 * r)


# 3-convergence.md: waves, symmetry, vectors ------------------------------------------------------


def phi(omega, r, law_A="normal", law_B=None):
    """φ_r(ω) = φ_1(ω/√r)^r, and φ_1(t) is the mean over b of Πᵢ ψ(yᵢ), y = t b."""
    a, q = LAWS[law_A]
    b, p = grid(law_B or law_A, omega.shape[1])
    y = b @ omega.T / math.sqrt(r)  # (points, m)
    psi = np.exp(1j * y[..., None] * a) @ q
    return (p @ psi.prod(axis=1)) ** r


def phi_limit(omega):
    return np.exp(-np.sum(omega**2) / 2)


def wave_gradient(omega, r, *laws):
    """σ g_r of sin⟨Ω, M⟩ at M = 0, ω = σΩ; the imaginary part is what only members +E see."""
    return -numerical_gradient(lambda w: phi(w, r, *laws), omega)


def sine(omega, M, phase=0.0):
    """sin(⟨ω, M⟩ + phase) of an M that only multiplies."""
    return jnp.sin(jnp.sum(omega * (np.eye(len(omega)) @ M)) + phase)


def test_wave_closed_form():
    """Normal factors have φ_r = det(I + G/r)^(-r/2) and g_r = φ_r (I + G/r)⁻¹ Ω."""
    omega = array_of_norm(1.5, 3, 2)
    r = 2
    matrix = np.eye(3) + omega @ omega.T / r
    exact = np.linalg.det(matrix) ** (-r / 2)
    g = exact * np.linalg.solve(matrix, omega)
    assert_allclose(phi(omega, r), exact, atol=1e-7)
    assert_allclose(wave_gradient(omega, r), g.ravel(), atol=1e-6)


def fourth_cumulant(omega, k):
    """K of ⟨ω, a bᵀ⟩."""
    G = omega @ omega.T
    rho = np.sum(omega**2, axis=1)
    gamma = np.sum(omega**2, axis=0)
    rows_and_columns = 3 * (k - 3) * (rho @ rho + gamma @ gamma)
    entries = (k - 3) ** 2 * np.sum(omega**4)
    return 6 * np.sum(G**2) + rows_and_columns + entries


@every_draw
def test_fourth_cumulant_is_the_constant_of_a_wave(name):
    """r(φ_r - φ_∞) tends to φ_∞ K/24, so r σ(g_r - g_∞) to minus the gradient of this."""
    omega = array_of_norm(1.8, 3, 2)
    r = 1000

    def constant(omega):
        return phi_limit(omega) * fourth_cumulant(omega, KURTOSIS[name]) / 24

    error = phi(omega, r, name) - phi_limit(omega)
    assert_allclose(r * error, constant(omega), rtol=0.01)
    error = wave_gradient(omega, r, name) - phi_limit(omega) * omega.ravel()
    slope = -numerical_gradient(constant, omega)
    assert_allclose(r * error, slope, atol=0.01 * np.abs(slope).max())


@pytest.mark.parametrize("law_B, one_sided_slope", [("signs", -1), ("skewed", -1 / 2)])
def test_which_symmetry(law_B, one_sided_slope):
    """A skewed: slope -1 in pairs; one-sided too, but for -1/2 if B is skewed as well."""
    omega = array_of_norm(1.0, 3, 3)

    def errors(r):  # of sin(⟨Ω, M⟩ + π/4), in pairs and one-sided
        error = wave_gradient(omega, r, "skewed", law_B) - phi_limit(omega) * omega.ravel()
        return np.linalg.norm([error.real, error.real - error.imag], axis=1)

    slopes = np.log2(errors(4096) / errors(1024)) / 2
    assert_allclose(slopes, [-1, one_sided_slope], atol=0.02)


def test_code_without_symmetry():
    """With skewed entries the code has the exact means stated, one-sided and in pairs."""
    omega = array_of_norm(1.2, 2, 2)
    phase = math.pi / 4

    def fitness(M, _):
        return sine(omega, M, phase)

    def one_sided(scores):
        return scores * jnp.array([[2, 0]])

    slope = wave_gradient(omega, 4, "skewed")
    odd = math.cos(phase) * slope.real
    even = -math.sin(phase) * slope.imag
    g = partial(estimates, Eggroll(1.0, 4, draw_of("skewed")), fitness, jnp.zeros((2, 2)), 1024)
    assert_mean(g(), odd)
    assert_mean(g(treat=one_sided), odd + even)


@every_draw
@pytest.mark.parametrize("r", [1, 4])
def test_code_lands_on_the_wave(name, r):
    """sin(⟨Ω, W⟩ + ⟨q, w⟩), σ = 1: the characteristic function is φ_r(Ω) Πⱼ ψ(qⱼ)."""
    entry, p = LAWS[name]
    waves = array_of_norm(1.7, 6)  # Ω, 2×2, and q
    Omega = jnp.float32(waves[:4].reshape(2, 2))
    q = jnp.float32(waves[4:])

    def characteristic(waves, r):
        psi = np.cos(np.outer(waves[4:], entry)) @ p
        return phi(waves[:4].reshape(2, 2), r, name).real * psi.prod()

    def fitness(params, _):
        return sine(Omega, params["W"], jnp.sum(q * params["w"]))

    g = estimates(Eggroll(1.0, r, DRAWS[name]), fitness, {"W": 0 * Omega, "w": 0 * q})
    g_r = -numerical_gradient(partial(characteristic, r=r), waves)
    g_other = -numerical_gradient(partial(characteristic, r=5 - r), waves)
    assert_mean(g, g_r)
    assert_mean_is_not(g, g_other)


# 4-which-noise.md --------------------------------------------------------------------------------


def fourth_moment(m, n, r, k_A, k_B):
    """E‖E‖²⟨C, E⟩² for ‖C‖ = 1."""
    return m * n + 2 + ((m + k_A - 1) * (n + k_B - 1) - m * n - 2) / r


def test_variance_formula(noise):
    """E⟨C, E⟩‖E‖²E = formula · C, so the variance; over all C its mean is E‖E‖⁴/mn ≥ mn."""
    C = array_of_norm(1.0, 6)
    square = np.sum(noise.E**2, axis=1)
    cubic = (noise.E @ C) * square  # the fitness of page 4, at M = σE, σ = 1
    formula = fourth_moment(2, 3, noise.r, noise.k_A, noise.k_B)
    over_basis = noise.p @ (square[:, None] * noise.E**2)
    constant = np.ptp(square) < 1e-9
    assert_allclose((noise.p * cubic) @ noise.E, formula * C)
    assert_allclose(over_basis.mean(), noise.p @ square**2 / 6)
    assert constant == (formula < 6 + 1e-9)


@every_draw
@pytest.mark.parametrize("rank", [1, 2, None])
def test_gradient_of_a_linear_fitness_is_jax_grad_with_the_predicted_variance(name, rank):
    """The mean of g is C at every rank, and E‖g - C‖² = (E‖E⟨C, E⟩‖² - ‖C‖²)/pairs."""
    m = 3
    n = 4
    pairs = 64
    C = jnp.linspace(-1, 2, m * n).reshape(m, n)
    k = KURTOSIS[name]

    def fitness(M, _):
        return jnp.trace(M @ C.T)  # ⟨C, M⟩

    g = estimates(Eggroll(0.7, rank, DRAWS[name]), fitness, 0 * C, pairs, 500)
    expected = np.ravel(jax.grad(fitness)(0 * C, None))
    error = np.sum((g - expected) ** 2, axis=1)
    second_moment = fourth_moment(m, n, rank, k, k) if rank else m * n + k - 1
    assert_mean(g, expected)
    assert_mean(error, np.sum(C**2) * (second_moment - 1) / pairs)


@pytest.mark.parametrize("m, n", [(1, 1), (4, 5), (32, 512)])
def test_rank_one_is_best_at_equal_cost(m, n):
    """Variance times multiply-adds is least at r = 1, for T = mn/2 vectors and normal entries."""
    r = np.arange(1, 50)
    T = m * n / 2
    cost = T * m * n + r * T * (m + n) + r * m * n / 2
    product = cost * (fourth_moment(m, n, r, 3, 3) - 1)
    assert product[0] <= product.min() * (1 + 1e-9)


def test_tied_weights():
    """f = xM³v at M = 0, r = 1: ½∇Δf + D of the page, both in closed form, and with signs."""
    x = jnp.array([0.6, -0.3, 0.5])
    v = jnp.array([0.5, 0.8, -0.2])
    xv = np.outer(x, v)

    def f(M, _=None):
        return x @ (M @ (M @ (M @ v)))

    W = jnp.zeros((3, 3))
    third = jax.jit(jax.hessian(jax.grad(f)))(W)  # of M_ij, M_pq and M_kl
    full_rank = np.einsum("ijpqpq->ij", third) / 2
    D = np.einsum("iqpjpq->ij", third)
    trace = np.trace(xv) * np.eye(3)
    with_signs = 3 * xv + 2 * xv.T + 2 * trace - 4 * np.diag(np.diag(xv))
    assert_allclose(full_rank, 2 * xv + xv.T, rtol=1e-5)
    assert_allclose(D, 5 * xv + xv.T + 2 * trace, rtol=1e-5)
    assert_mean(estimates(Eggroll(1.0, 1, normal), f, W), np.ravel(full_rank + D))
    assert_mean(estimates(Eggroll(1.0, 1, signs), f, W), np.ravel(with_signs))


def test_length_and_angle_of_a_step():
    """Linear fitness, each pair with an example of its own, tr Σ = ‖C‖² = 1, and an offset."""
    sigma = 0.1
    pairs = 100
    d = 400
    C = jnp.float32(array_of_norm(1.0, 20, 20))

    def fitness(M, key):
        own_C = C + normal(key, C.shape) / math.sqrt(d)
        offset = 0.2 * normal(jax.random.fold_in(key, 1), ())
        return linear(own_C, M, key) + offset

    g = estimates(Eggroll(sigma), fitness, 0 * C, pairs, 100)
    error = np.sum((g - np.ravel(C)) ** 2, axis=1)
    assert_mean(error, (2 * d - 1) / pairs)
    step = estimates(Eggroll(sigma), fitness, 0 * C, pairs, 100, standardize)  # at lr = 1
    share = 2 * sigma**2 / (2 * sigma**2 + 0.2**2)  # of the scores' variance, by the noise
    length = math.sqrt(share / 2) / sigma
    entry = math.sqrt(2 * share) / (sigma * math.sqrt(2 * pairs))
    along = step @ np.ravel(C)
    noise = np.sum(step**2, axis=1) - along**2
    for samples, expected in (along, length), (noise, d * entry**2):
        tolerance = SE * stats.sem(samples) + 2 / pairs * expected  # of few pairs
        assert abs(samples.mean() - expected) < tolerance


# 5-cost.md ---------------------------------------------------------------------------------------


def multiply_adds(function, *args):
    """Of all matrix products that a function makes."""
    found = []

    def walk(jaxpr, times):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                (summed, _), _ = equation.params["dimension_numbers"]
                shape = equation.invars[0].aval.shape
                depth = math.prod(shape[axis] for axis in summed)
                found.append(times * depth * equation.outvars[0].aval.size)
            for value in jax.tree.leaves(list(equation.params.values())):
                if hasattr(value, "eqns"):  # a jaxpr, as of a loop or a nested jit
                    walk(value, times * equation.params.get("length", 1))

    walk(jax.make_jaxpr(function)(*args).jaxpr, 1)
    return sum(found)


l = 48
m = 40
n = 32
LAYERS = [jnp.ones((l, m)), jnp.ones((m, n))]
PAIRS = 8


def network(params, x):
    return jnp.sum(jnp.tanh(x @ params[0]) @ params[1])


@pytest.mark.parametrize("r, T", [(1, 1), (2, 5)])
def test_multiply_adds(r, T):
    """Forward NT(mn + r(m + n)), xW and xA by halves in the first layer; update (N/2)r·mn."""
    N = 2 * PAIRS
    first = N * T * l * m
    second = N * T * m * n
    thin = N * T * r * (l / 2 + m + m + n)
    x = jnp.ones((N * T, l))
    data = jnp.ones((PAIRS, T, l))
    scores = jnp.ones((PAIRS, 2))
    es = Eggroll(1.0, r)
    forward = multiply_adds(partial(es.evaluate, network), LAYERS, KEY, data)
    assert forward == first / 2 + second + thin
    assert multiply_adds(es.gradient, LAYERS, KEY, scores) == N / 2 * r * (l * m + m * n)
    assert multiply_adds(network, LAYERS, x) == first + second
    assert multiply_adds(jax.grad(network), LAYERS, x) == 2 * first + 3 * second


def test_arithmetic_intensity():
    """Operations over bytes, counted product by product, and the batches for 300 of them."""
    m = 8192
    r = 1
    K = np.arange(1.0, 1000)
    multiply_adds = K * m * m + 2 * K * r * m  # xW; xA and its product with Bᵀ
    operations = 2 * multiply_adds + K * m  # the sum of the two
    numbers = m * m + 2 * K * m + 2 * K * r  # W, x and y, xA
    own_factors = operations / (2 * (numbers + 2 * K * r * m))
    shared_factors = operations / (2 * (numbers + K * r * m))  # by the two members of a pair
    inference = K * m / (2 * K + m)
    assert_allclose(own_factors, (m + 2 * r + 1 / 2) / (2 + r * (2 + 2 / m) + m / K))
    enough = [K[np.argmax(x >= 300)] for x in (inference, own_factors, shared_factors)]
    assert enough == [324, 352, 337]


@pytest.fixture
def optimized():
    """For a test of what XLA makes of the code."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.mark.parametrize("rank, formula", [(1, 10), (None, 7 + 7 / 2 * 256)])
def test_numbers_moved(rank, formula, optimized):
    """Numbers that a compiled step accesses, in units of mn for m = n = N, to a factor of 1.6."""
    W = jnp.ones((256, 256))
    x = jnp.ones((128, 256))

    def step(W, x):
        return Eggroll(0.1, rank).step(lambda M, x: jnp.sum(x @ M), W, KEY, x, 0.1)

    compiled = jax.jit(step).lower(W, x).compile()
    numbers = compiled.cost_analysis()["bytes accessed"] / 4
    assert formula / 1.6 < numbers / W.size < 1.6 * formula


def test_scalars_are_all_that_is_shared():
    """A worker with the key rebuilds the update from 4N bytes of scores."""
    W = jnp.ones((40, 50))
    es = Eggroll(0.1)
    scores = es.evaluate(lambda M, x: jnp.sum(x @ M), W, KEY, jnp.ones((PAIRS, 40)))
    assert scores.nbytes == 4 * 2 * PAIRS
    elsewhere = es.gradient(0 * W, KEY, np.array(scores))  # needs the shape of W, no values
    np.testing.assert_array_equal(elsewhere, es.gradient(W, KEY, scores))


# 6-integers.md -----------------------------------------------------------------------------------


def votes_of(fitness, params, pairs, populations):
    """Votes and number of pairs without a tie of many populations, (populations, …)."""

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
        h = eggroll.product(x, params["W"])  # nor does the last column
        return (h[0] * h[1] + h[2] + h[3]) >> 4

    votes, untied = votes_of(fitness, params, 40, 3000)
    assert untied.min() < 40  # there are ties
    W = np.float64(votes["W"])
    v = np.float64(votes["v"])
    dead = np.concatenate([W[:, 4], W[:, 5], W[:, :4, 4], v], axis=1)
    alive = W[:, :4, :4]
    assert_mean(dead, 0)
    assert_mean(dead**2 - np.array(untied)[:, None], 0)
    assert np.abs(alive.mean(axis=0)).max() > 5


def test_votes_leak():
    """f = W₁₁ + W₁₂ + W₂₁: the entry that does not matter is voted down, by -1/2 a pair."""
    matters = jnp.array([[1, 1], [1, 0]])

    def fitness(M, _):
        W = eggroll.rows(M, jnp.arange(2))
        return jnp.sum(matters * W)

    votes, _ = votes_of(fitness, jnp.zeros((2, 2), jnp.int32), 50, 400)
    assert_mean(votes / 50, matters - 1 / 2)


FORGETTING = [(1, 0, 1.57), (0.54, 0.61, 1.23), (0.3, 1.04, 1.38)]
FORGETTING += [(0.1, 1.64, 2.35), (0.02, 2.33, 7.04), (0.005, 2.81, 20.8)]


@pytest.mark.parametrize("epsilon, stated_z, stated_ratio", FORGETTING)
def test_forgetting_votes(epsilon, stated_z, stated_ratio):
    """The table of the page; moves by forgetting have the mean 2Φ'(z)δ and the variance ε."""
    z = stats.norm.ppf(1 - epsilon / 2)
    drift = 2 * stats.norm.pdf(z)  # for δ = 1, to first order
    assert_allclose(z, stated_z, atol=0.006)
    assert_allclose(epsilon / drift**2, stated_ratio, rtol=0.006)
    delta = 0.02
    up = stats.norm.sf(z - delta)  # P(V/√P ≥ z)
    down = stats.norm.cdf(-z - delta)
    assert_allclose(up - down, drift * delta, rtol=2e-3)
    assert_allclose(up + down, epsilon, rtol=2e-3)


def test_keeping_votes():
    """In the long run the moves have the mean δ/z and the variance 1/z²."""
    delta = 0.02
    z = 1.64
    steps = 4000
    votes = np.random.default_rng(0).normal(delta, 1, (1000, steps)).sum(axis=1)  # in √P
    moved = np.floor(votes / z + 0.5)  # what does not yet suffice is kept
    assert_mean(moved / steps, delta / z)
    assert_allclose(moved.var() / steps, 1 / z**2, rtol=SE * math.sqrt(2 / 1000))
