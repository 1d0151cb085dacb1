"""Write tutorial.ipynb from the cells below, in order: python build.py"""

import nbformat

cells = []


def md(text):
    cells.append(nbformat.v4.new_markdown_cell(text.strip("\n")))


def code(text):
    cells.append(nbformat.v4.new_code_cell(text.strip("\n")))


md(r"""
# EGGROLL by experiment

Evolution strategies (ES) train a model without backpropagation: they perturb its parameters at random,
score every perturbed copy, and move towards the perturbations that scored well. EGGROLL
([arXiv:2511.16652](https://arxiv.org/abs/2511.16652)) draws the perturbation of a weight matrix as a
product of two thin matrices, a matrix of low rank $r$, often $r = 1$. That makes a population of
thousands about as cheap as batched inference. It also changes the answer: the low-rank update is a
*biased* estimate of the full-rank one.

This notebook measures that bias. By the end of section 5 you will have seen, in five independent ways,
that it falls as $1/r$, with a constant that can be predicted; section 6 shows why $r = 1$ is nevertheless
enough; sections 7 and 8 train two networks with it.

Everything is computed with [`eggroll.py`](eggroll.py). Each claim is an `assert` beside the plot that
shows it, with a tolerance computed from **standard errors** (SE: the standard deviation of an average,
estimated from independent repetitions). Break the method, and the notebook stops. Change `SEED`, and it
should still run.
""")

code(r"""
import math
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Markdown
from jax.flatten_util import ravel_pytree
from matplotlib import cbook

import eggroll
from eggroll import Eggroll, bits_per_char, dense, mlp, mlp_init, normal, signs, uniform

SEED = 0
key = jax.random.key(SEED)

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"  # Okabe and Ito's colours
BLUE, RED, PURPLE = "#0072B2", "#D55E00", "#CC79A7"
plt.rcParams.update({"figure.dpi": 80, "font.size": 12, "axes.grid": True, "grid.alpha": 0.3})
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "lines.markersize": 7})

clock = [("start", time.perf_counter())]  # when each section ended
print(f"JAX {jax.__version__} on {jax.default_backend()}, seed {SEED}")
""")

# ------------------------------------------------------------------------------------------------
md(r"""
## 1. Evolution strategies in one picture

The *fitness* $f$ below is a function of two parameters: a gentle slope that leads down to the right, and
a round plateau with a vertical cliff. The gradient of $f$ is correct almost everywhere and useless: the
cliff has no width, so no derivative sees it.
""")

code(r"""
PLATEAU = jnp.array([1.5, 0.7])


def landscape(p, _=None):
    slope = -0.05 * jnp.sum((p - jnp.array([-1.5, -1.0])) ** 2)
    return slope + 2.0 * (jnp.sum((p - PLATEAU) ** 2) < 1)


start = jnp.array([0.4, 0.0])
to_plateau = (PLATEAU - start) / jnp.linalg.norm(PLATEAU - start)
print("slope of f at the start, towards the plateau:", jax.grad(landscape)(start) @ to_plateau)
""")

md(r"""
ES climb another function, the *smoothed* fitness

$$J(\theta) = \mathbb{E}_E\, f(\theta + \sigma E), \qquad \nabla J(\theta) = \frac{1}{\sigma}\, \mathbb{E}_E\big[f(\theta + \sigma E)\, E\big],$$

where the entries of the noise $E$ are independent standard normal numbers and $\sigma$ is its scale. The
second formula needs values of $f$ only. (It comes from differentiating the density of $\theta + \sigma E$
instead of $f$; for smooth $f$, expand $f(\theta + \sigma E)$ to first order and use
$\mathbb{E}\,E E^\top = I$ to see why it is a gradient.) An average over a *population* estimates it:

$$\hat g = \frac{1}{N\sigma} \sum_{i=1}^{N} f_i E_i .$$

The $N$ *members* come in $N/2$ *antithetic pairs* $\theta \pm \sigma E_i$: for each pair,
$f_+ E - f_- E = (f_+ - f_-) E$, so whatever is common to the two scores cancels.
`Eggroll.evaluate` returns the scores, of shape `(pairs, 2)`, and `Eggroll.gradient` returns $\hat g$. Noise
is a function of the key, so `gradient` redraws what `evaluate` drew.

The next function is the measuring instrument of the whole notebook: `n` independent estimates $\hat g$,
whose scatter tells how far their mean can be trusted.
""")

code(r"""
@partial(jax.jit, static_argnames=("fitness", "pairs", "one_sided"))
def estimates_of(es, fitness, params, keys, pairs, one_sided):  # one estimate for each key
    def one(key):
        scores = es.evaluate(fitness, params, key, jnp.zeros(pairs))  # (pairs, 2)
        if one_sided:  # leave out the members -E; used in section 5 (d) only
            scores = jnp.stack([2 * scores[:, 0], jnp.zeros(pairs)], axis=-1)
        g = es.gradient(params, key, scores)
        return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(g)])

    return jax.lax.map(one, keys)


def estimates(es, fitness, params, key, pairs=4096, n=64, one_sided=False):
    keys = jax.random.split(key, (n // 8, 8))
    g = [estimates_of(es, fitness, params, k, pairs, one_sided) for k in keys]
    return np.concatenate(g).astype(np.float64)  # (n, number of parameters)


def mean_se(x):
    return np.mean(x, axis=0), np.std(x, axis=0, ddof=1) / math.sqrt(len(x))
""")

md(r"""
In two dimensions the integral for $\nabla J$ can be done on a grid. ES must give the same vector, and it
must point the other way than $\nabla f$.
""")

code(r"""
es = Eggroll(sigma=0.5)
z = np.stack(np.meshgrid(*[np.linspace(-5, 5, 2001)] * 2), axis=-1).reshape(-1, 2)  # noise E
weight = np.exp(-np.sum(z**2, axis=1) / 2)
f = np.asarray(jax.vmap(landscape)(start + es.sigma * z))
exact = (weight * f) @ z / weight.sum() / es.sigma

g, se = mean_se(estimates(es, landscape, start, jax.random.fold_in(key, 10)))
print(f"∇J by quadrature {exact.round(3)}, by ES {g.round(3)} ± {se.round(3)}")
assert np.all(np.abs(g - exact) < 5 * se + 0.002)  # 0.002: the grid's error at the cliff
assert jax.grad(landscape)(start) @ to_plateau < 0 < (g - 5 * se) @ to_plateau
""")

md(r"""
`Eggroll.step` does one *generation*: evaluate, standardise the scores to zero mean and unit variance,
estimate the gradient, ascend. Sixty generations of 64 members against sixty steps of gradient ascent:
""")

code(r"""
path_es, path_gradient = [start], [start]
step = jax.jit(es.step, static_argnames="fitness")
for t in range(60):
    step_key = jax.random.fold_in(jax.random.fold_in(key, 11), t)
    p, _ = step(landscape, path_es[-1], step_key, data=jnp.zeros(32), lr=0.1)
    path_es.append(p)
    path_gradient.append(path_gradient[-1] + 0.5 * jax.grad(landscape)(path_gradient[-1]))

print(f"fitness reached: ES {landscape(p):.2f}, gradient {landscape(path_gradient[-1]):.2f}")
assert landscape(p) > 1 > landscape(path_gradient[-1])
""")

code(r"""
axis = np.linspace(-2.6, 2.9, 221)
grid = np.stack(np.meshgrid(axis, axis), axis=-1)
E = jax.vmap(lambda k: es.noise(k, start))(jax.random.split(jax.random.fold_in(key, 12), 64))
cloud = jnp.concatenate([start + es.sigma * E, start - es.sigma * E])

fig, ax = plt.subplots(figsize=(8, 6.2))
image = ax.pcolormesh(axis, axis, jax.vmap(jax.vmap(landscape))(grid), cmap="Greys_r", vmin=-3.2)
fig.colorbar(image, label="fitness f")
for up, colour, marker in ((True, BLUE, "^"), (False, ORANGE, "v")):
    p = cloud[(jax.vmap(landscape)(cloud) > 1) == up]
    label = "members on the plateau" if up else "members below the cliff"
    ax.scatter(*p.T, c=colour, marker=marker, s=36, edgecolor="white", lw=0.5, label=label)
ax.plot(*np.array(path_es).T, color=GREEN, marker=".", lw=2, label="ES: 60 steps")
ax.plot(*np.array(path_gradient).T, "--", color=RED, lw=2.5, label="gradient ascent: 60 steps")
arrow = {"width": 3, "headwidth": 11, "color": PURPLE}
ax.annotate("", start + 0.7 * g / np.linalg.norm(g), start, arrowprops=arrow, zorder=5)
ax.plot([], [], color=PURPLE, lw=4, label="direction of ∇J")
ax.set(xlabel="first parameter", ylabel="second parameter", title="The cloud sees the cliff", aspect="equal")
ax.legend(loc="upper left", fontsize=10, framealpha=1)
ax.grid(False)
plt.show()
clock.append(("1. one picture", time.perf_counter()))
""")

# ------------------------------------------------------------------------------------------------
md(r"""
## 2. Low-rank noise

For a weight matrix with $m$ inputs and $n$ outputs, EGGROLL draws

$$E = \frac{1}{\sqrt r} A B^\top, \qquad A \in \mathbb{R}^{m \times r},\; B \in \mathbb{R}^{n \times r},$$

with independent entries of mean 0 and variance 1. Each entry of $E$ is a sum of $r$ products of variance
1, divided by $\sqrt r$: it has variance 1 **at every rank**, and different entries are uncorrelated. As
`rank=None`, the same class draws the full-rank noise of ordinary ES, which is the limit $r = \infty$.
""")

code(r"""
W = jnp.zeros((48, 64))
fig, axes = plt.subplots(1, 4, figsize=(12, 2.9), layout="constrained")
for ax, rank in zip(axes, (1, 2, 8, None), strict=True):
    E = Eggroll(sigma=1.0, rank=rank).noise(jax.random.fold_in(key, 20), W)
    E = E[0] @ E[1].T if rank else E  # a matrix is given by its factors (A/√r, B)
    image = ax.imshow(E, cmap="RdBu", vmin=-3, vmax=3)
    ax.set(title=f"r = {rank or '∞'}", xticks=[], yticks=[])
    ax.grid(False)
    assert np.linalg.matrix_rank(E) == min(rank or 48, 48)
fig.colorbar(image, ax=axes, label="entry of E", shrink=0.9)
plt.show()
""")

md(r"""
At $r = 1$ the rows are copies of one another up to a factor: the entries are uncorrelated but far from
independent, and not normal. For standard normal factors, an entry $z$ has the characteristic function
$(1 + t^2/r)^{-r/2}$ and therefore the density

$$p_r(z) = \frac{\alpha^{\lambda + 1/2}\, |z|^{\lambda - 1/2}}{\sqrt\pi\; \Gamma(\lambda)\; 2^{\lambda - 1/2}}\, K_{\lambda - 1/2}(\alpha |z|),
\qquad \lambda = \tfrac r2,\; \alpha = \sqrt r,$$

with $K_\nu$ the modified Bessel function, $K_\nu(x) = \int_0^\infty e^{-x \cosh u} \cosh(\nu u)\, du$.
Below are the curves $z\,p_r(z)$ (Fig. 3 of the paper; this product decides the update) and what
`Eggroll.noise` draws.
""")

code(r"""
def density(z, r):
    x, nu = math.sqrt(r) * np.abs(z), (r - 1) / 2
    u = np.linspace(0, 12, 1201)
    K = 0.5 * sum(np.exp(-x[:, None] * np.cosh(u) + s * nu * u) for s in (-1, 1))
    K = np.trapezoid(K, u, axis=1)
    log_p = (nu + 1) * math.log(r) / 2 + nu * np.log(np.abs(z)) - nu * math.log(2)
    return np.exp(log_p - math.lgamma(r / 2)) / math.sqrt(math.pi) * K


def entries(r, n=100_000):  # one entry from each of n independent matrices
    keys = jax.random.split(jax.random.fold_in(key, 21 + r), n)
    A, B = jax.vmap(lambda k: Eggroll(1.0, r).noise(k, jnp.zeros((1, 1))))(keys)
    return np.asarray(jnp.sum(A * B, axis=-1)).ravel()


drawn = {r: entries(r) for r in (1, 2, 5, 100)}
for r, z in drawn.items():
    (variance, size), (se_variance, se_size) = mean_se(np.stack([z**2, np.abs(z)], axis=1))
    expected = 2 / math.sqrt(math.pi * r) * math.exp(math.lgamma((r + 1) / 2) - math.lgamma(r / 2))
    print(f"r = {r:3}   E z² = {variance:.3f} ± {se_variance:.3f}, expected 1", end="   ")
    print(f"E |z| = {size:.4f} ± {se_size:.4f}, expected {expected:.4f}")
    assert abs(variance - 1) < 5 * se_variance
    assert abs(size - expected) < 5 * se_size
""")

md(r"""
The entries of the factors come from `normal`, `uniform` or `signs` ($\pm 1$, one random bit each). Whatever
the law, they must have mean 0 and variance 1 at every position of an array, and no correlation between
positions:
""")

code(r"""
for i, draw in enumerate((normal, uniform, signs)):
    keys = jax.random.split(jax.random.fold_in(key, 15 + i), 20_000)
    a = np.asarray(jax.jit(jax.vmap(lambda k, draw=draw: draw(k, (64,))))(keys), np.float64)
    mean, second = a.mean(axis=0), a.T @ a / len(a)  # (64,), (64, 64)
    se = np.sqrt((a**2).T @ a**2 / len(a) - second**2) / math.sqrt(len(a))  # of the second moments
    print(f"{draw.__name__:8} largest mean {np.abs(mean).max():.3f}", end="   ")
    print(f"largest second moment off by {np.abs(second - np.eye(64)).max():.3f}")
    assert np.all(np.abs(mean) < 5 / math.sqrt(len(a)))
    assert np.all(np.abs(second - np.eye(64)) < 5.5 * se + 1e-9)  # 2,080 comparisons
""")

code(r"""
half = np.linspace(0.2, 4.2, 11)
edges = np.concatenate([-half[::-1], half])
middle = (edges[1:] + edges[:-1]) / 2
outside = np.abs(middle) > 0.1  # the bin around zero, where p₁ is infinite, is left out
z = np.linspace(0.01, 4.4, 200)
z = np.concatenate([-z[::-1], z])

fig, ax = plt.subplots(figsize=(8.5, 4.6))
styles = dict(zip((1, 2, 3, 5, 10, 50, 100), (RED, BLUE, PURPLE, GREEN, SKY, ORANGE, "0.6"), strict=True))
for r, colour in styles.items():
    ax.plot(z, z * density(z, r), color=colour, label=f"r = {r}")
ax.plot(z, z * np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi), "k--", label="r = ∞ (normal)")
for (r, sample), marker in zip(drawn.items(), "osD^", strict=True):
    count = np.histogram(sample, edges)[0][outside]
    inside = np.linspace(edges[:-1], edges[1:], 41)[:, outside]  # (41, bins)
    p = np.trapezoid(density(inside.ravel(), r).reshape(inside.shape), inside, axis=0)
    se = np.sqrt(len(sample) * p * (1 - p))
    assert np.all(np.abs(count - len(sample) * p) < 5 * se + 5)
    shown = middle[outside] * count / (len(sample) * np.diff(edges)[outside])
    ax.plot(middle[outside], shown, marker, ls="", mfc="none", color=styles[r])
ax.set(xlabel="z, an entry of E", ylabel="z p(z)", title="Curves: closed form. Markers: drawn noise")
ax.legend(fontsize=10, ncols=2)
plt.show()
clock.append(("2. low-rank noise", time.perf_counter()))
""")

# ------------------------------------------------------------------------------------------------
md(r"""
## 3. The batched forward

A member's matrix $M = W + \sigma A B^\top/\sqrt r$ is never formed. `Eggroll.perturb` returns a `LowRank`
object that multiplies like it, $x M = xW + (xA)B^\top$ (with the scales inside $A$):
""")

code(r"""
m = n = 512
k1, k2, k3 = jax.random.split(jax.random.fold_in(key, 30), 3)
W, x = normal(k1, (m, n)) / math.sqrt(m), normal(k2, (10, m))
es = Eggroll(sigma=0.1, rank=4)
M = es.perturb(W, es.noise(k3, W))
difference = jnp.max(jnp.abs(x @ M - x @ dense(M)))
print(type(M).__name__, M.shape, f"largest difference from the dense product: {difference:.1e}")
assert difference < 1e-4 * jnp.max(jnp.abs(x @ dense(M)))  # single precision
""")

md(r"""
`jax.vmap` over the members batches $A$, $B$ and $x$ but not $W$, so the compiler makes *one* product with
$W$ for the whole population. We ask the compiler what it counts, per member, for a population of 1024:
the multiply-adds should be $mn + r(m + n)$, the numbers stored $r(m + n)$ (or half as much again, where $\sigma A$ is kept
beside $A$). Full-rank noise has to store
$mn$ numbers twice, as $E$ and as $W + \sigma E$. (Nothing runs here; the programs are only compiled.)
""")

code(r"""
N = 1024


def compiled_cost(rank):
    es = Eggroll(sigma=0.1, rank=rank)
    noise = jax.eval_shape(jax.vmap(lambda k: es.noise(k, W)), jax.random.split(key, N))
    forward = jax.vmap(lambda e, x: x @ es.perturb(W, e))
    program = jax.jit(forward).lower(noise, jax.ShapeDtypeStruct((N, m), x.dtype)).compile()
    memory = program.memory_analysis()
    stored = sum(e.size for e in jax.tree.leaves(noise)) + memory.temp_size_in_bytes / 4
    return program.cost_analysis()["flops"] / 2 / N, stored / N


ranks = [1, 4, 16, 64]
multiply_adds, stored = np.array([compiled_cost(r) for r in ranks]).T
full_multiply_adds, full_stored = compiled_cost(None)
for r, a, b in zip(ranks, multiply_adds, stored, strict=True):
    print(f"r = {r:2}   multiply-adds {a:9,.0f} = {a / (m * n + r * (m + n)):.3f} × (mn + r(m + n))", end="   ")
    print(f"numbers {b:8,.0f} = {b / (r * (m + n)):.2f} × r(m + n)")
print(f"full     multiply-adds {full_multiply_adds:9,.0f}   numbers {full_stored:,.0f} = {full_stored / (m * n):.2f} × mn")
""")

code(r"""
expected = m * n + np.array(ranks) * (m + n)
extra = multiply_adds - expected  # scaling A by σ and adding to xW, at half a multiply-add each
assert np.all((0 <= extra) & (extra < np.array(ranks) * m + n))
assert stored[0] < 0.03 * m * n  # no member has an m × n array of its own
assert full_stored > m * n

fig, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
for ax, y, theory, full, what in (
    (axes[0], multiply_adds, lambda r: m * n + r * (m + n), full_multiply_adds, "multiply-adds"),
    (axes[1], stored, lambda r: r * (m + n), full_stored, "numbers stored"),
):
    r = np.geomspace(1, 64, 50)
    ax.plot(r, theory(r), color=BLUE, label="mn + r(m + n)" if ax is axes[0] else "r(m + n)")
    ax.plot(ranks, y, "o", color=BLUE, label="low rank, as compiled")
    ax.axhline(full, color=RED, ls="--", label="full rank, as compiled")
    ax.set(xlabel="rank r", ylabel=f"{what} per member", xscale="log", yscale="log")
    ax.set_xticks(ranks, ranks)
    ax.set_ylim(y.min() / 3, max(full, y.max()) * 3)
    ax.legend(fontsize=10)
plt.show()
""")

md(r"""
Multiply-adds alone would make full rank look good: it reads every number once and multiplies it once. Its
price is memory traffic, because no two members share a matrix. The clock tells:
""")

code(r"""
def seconds(f, *args):
    jax.block_until_ready(f(*args))
    times = []
    for _ in range(8):
        t = time.perf_counter()
        jax.block_until_ready(f(*args))
        times.append(time.perf_counter() - t)
    return min(times)


few = 128  # members; the full-rank noise of these alone takes 134 MB
keys, xs = jax.random.split(k3, few), normal(k2, (few, m))
inference = seconds(jax.jit(lambda x: x @ W), xs)
for rank in (1, 4, None):
    es = Eggroll(sigma=0.1, rank=rank)
    noise = jax.jit(jax.vmap(lambda k, es=es: es.noise(k, W)))(keys)
    forward = jax.jit(jax.vmap(lambda e, x, es=es: x @ es.perturb(W, e)))
    ratio = seconds(forward, noise, xs) / inference
    print(f"rank {rank or 'full'}: {ratio:.1f} × the time of batched inference, noise given")
clock.append(("3. batched forward", time.perf_counter()))
""")

# ------------------------------------------------------------------------------------------------
md(r"""
## 4. The update

Each member of a rank-one population explores one rank-one direction, but the update is a sum of many:
with $P = N/2$ pairs its rank is $\min(Pr, m, n)$ (the two members of a pair share their $E$). For the
linear fitness $f(M) = \langle C, M\rangle = \sum_{ij} C_{ij} M_{ij}$ the gradient is $C$, and a short
calculation gives both the mean and the error of the estimate, for normal factors:

$$\mathbb{E}\,\hat g = C \text{ at every rank}, \qquad
\mathbb{E}\,\|\hat g - C\|^2 = \frac{\|C\|^2}{P} \Big( mn + 1 + \frac{2(m + n + 1)}{r} \Big).$$
""")

code(r"""
C = np.asarray(normal(jax.random.fold_in(key, 40), (24, 32)))
m, n = C.shape


def linear(M, _):
    return jnp.trace(C.T @ M)  # ⟨C, M⟩, for an array and for a LowRank


es = Eggroll(sigma=0.1, rank=1)
fig, ax = plt.subplots(figsize=(8, 4.4))
for P, colour, ls in zip((1, 4, 16, 64, 1024, 16384), (RED, ORANGE, PURPLE, SKY, BLUE, GREEN), ("-", "--", "-.", ":", "-", "--"), strict=True):
    g = estimates(es, linear, 0 * C, jax.random.fold_in(key, 41), P, n=max(8192 // P, 8))
    singular = np.linalg.svd(g[0].reshape(m, n))[1]
    rank = np.sum(singular > 1e-5 * singular[0])
    assert rank == min(P, m, n)
    error, se = mean_se(np.sum((g - C.ravel()) ** 2, axis=1) / np.sum(C**2))
    predicted = (m * n + 1 + 2 * (m + n + 1)) / P
    print(f"{P:6} pairs: rank {rank:2}, relative error² {error:8.3f} ± {se:.3f}, predicted {predicted:8.3f}")
    assert abs(error - predicted) < 5 * se
    ax.semilogy(np.arange(1, rank + 1), singular[:rank], color=colour, ls=ls, marker=".", label=f"{P:,}")
ax.semilogy(np.arange(1, m + 1), np.linalg.svd(C)[1], "k", lw=3, alpha=0.4, label="C itself")
ax.set(xlabel="index", ylabel="singular value of the update", title="Rank-one members, full-rank step")
ax.legend(title="pairs", fontsize=10, ncols=2)
plt.show()
""")

md(r"""
That $\hat g$ is unbiased for a linear fitness *at every rank* is used below, so it deserves a test of its
own; it is also the plainest test that the noise has the right scale, since $\mathbb{E}\,\hat g$ would
otherwise be a multiple of $C$.
""")

code(r"""
for rank in (1, 4, None):
    g = estimates(Eggroll(0.1, rank), linear, 0 * C, jax.random.fold_in(key, 42), 256)
    scale, se = mean_se(g @ C.ravel() / np.sum(C**2))
    print(f"rank {rank or 'full'}: component along C: {scale:.4f} ± {se:.4f}")
    assert abs(scale - 1) < 5 * se < 0.1
clock.append(("4. the update", time.perf_counter()))
""")

# ------------------------------------------------------------------------------------------------
md(r"""
## 5. O(1/r), five ways

For a fitness that is not linear, the low-rank estimate has another mean $g_r$ than the full-rank one,
$g_\infty = \nabla J$. How far apart are they? Rank-$r$ noise is a sum of $r$ independent terms, so by the
central limit theorem its distribution approaches the normal one, in general at a rate $1/\sqrt r$. The
paper's Theorem 2 says that here the rate is

$$\|g_r - g_\infty\| = O(1/r) .$$

The term in $1/\sqrt r$ comes from third moments, and those vanish if the noise is symmetric ($E$ and $-E$
equally likely). So there are two hypotheses that can be told apart: on a log-log plot against $r$, the
error falls at slope $-1$ or at slope $-1/2$.

### (a) A fitness that can be solved exactly

Take $f(M) = \sin\langle\Omega, M\rangle$, a plane wave with a fixed matrix $\Omega$ of wave numbers, at
$\theta = 0$. (Well-behaved fitness functions are superpositions of waves, so this is not a special case so much
as a building block.) Write $\omega = \sigma\Omega$ and $\varphi_r(\omega) = \mathbb{E}\,e^{i\langle\omega, E\rangle}$, the
characteristic function of rank-$r$ noise. Then

$$g_r = \frac1\sigma\, \mathbb{E}\big[\sin\langle\omega, E\rangle\, E\big] = -\frac1\sigma \nabla\varphi_r(\omega) .$$

The $r$ terms of $E$ are independent, so $\varphi_r(\omega) = \chi(\omega/\sqrt r)^r$, where $\chi$ is that of a
single product $ab^\top$. Given $b$, the entries of $a$ are independent, so $\chi$ is an average over $b$
of a product over the entries of $\omega b$. For a $3 \times 3$ matrix this is a small sum: exact for factors with a few
values, by Gaussian quadrature for normal and uniform ones.
""")

code(r"""
def average(values, weights, f):
    return sum(w * f(v) for v, w in zip(values, weights, strict=True))


def phi(omega, r, law):  # characteristic function of rank-r noise whose factors have this law
    values, weights = law
    b = np.stack(np.meshgrid(*[values] * 3), axis=-1).reshape(-1, 3)
    weight_b = np.prod(np.stack(np.meshgrid(*[weights] * 3), axis=-1).reshape(-1, 3), axis=1)
    t = b @ omega.T / math.sqrt(r)  # the entries of ωb/√r, one row for each b
    return (weight_b @ np.prod(average(*law, lambda a: np.exp(1j * a * t)), axis=1)) ** r


def grad_phi(omega, r, law, h=1e-4):  # by central differences, good to eight digits
    g = np.zeros(omega.shape, complex)
    for ij in np.ndindex(omega.shape):
        d = np.zeros(omega.shape)
        d[ij] = h
        g[ij] = (phi(omega + d, r, law) - phi(omega - d, r, law)) / (2 * h)
    return g


points, weights = np.polynomial.hermite_e.hermegauss(24)
NORMAL = points, weights / weights.sum()
points, weights = np.polynomial.legendre.leggauss(16)
UNIFORM = math.sqrt(3) * points, weights / 2
SIGNS = np.array([-1.0, 1.0]), np.array([0.5, 0.5])
""")

md(r"""
For normal factors there is also a closed form,
$g_r = \varphi_r (I + \omega\omega^\top/r)^{-1}\,\Omega$ with $\varphi_r = \det(I + \omega\omega^\top/r)^{-r/2}$, and at
full rank $g_\infty = e^{-\|\omega\|^2/2}\,\Omega$. The two computations share nothing, so they check each
other.
""")

code(r"""
SIGMA = 0.5
omega = np.array([[0.9, 0.2, -0.3], [0.1, 0.7, 0.5], [-0.4, 0.3, 0.8]])
omega /= np.linalg.norm(omega)
Omega, G = omega / SIGMA, omega @ omega.T
phi_full = math.exp(-0.5)  # e^(-‖ω‖²/2)
g_full = phi_full * Omega


def closed_form(r):
    I = np.eye(3)
    return np.linalg.det(I + G / r) ** (-r / 2) * np.linalg.solve(I + G / r, Omega)


def wave_gradient(r, law):
    return -grad_phi(omega, r, law).real / SIGMA


def relative(g, target=g_full):
    return np.linalg.norm(g - target) / np.linalg.norm(target)


for r in (1, 3, 20):
    assert relative(wave_gradient(r, NORMAL), closed_form(r)) < 1e-6
all_ranks = 2 ** np.arange(11)
exact = {name: np.array([relative(wave_gradient(r, law)) for r in all_ranks])
         for name, law in (("normal", NORMAL), ("uniform", UNIFORM), ("signs", SIGNS))}
slopes = np.diff(np.log2(exact["normal"]))  # local slope between r and 2r
print("relative error, r = 1, 2, 4 … 1024:", *exact["normal"].round(4))
print("local slopes:                      ", *slopes.round(3))
""")

code(r"""
assert np.all(np.diff(slopes) < 0)  # steeper and steeper …
assert np.all(slopes > -1) and slopes[-1] < -0.999  # … towards -1, from above

fig, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
axes[0].loglog(all_ranks, exact["normal"], "o-", color=BLUE, label="exact")
axes[0].loglog(all_ranks, exact["normal"][-1] * 1024 / all_ranks, "k:", label="slope −1")
axes[0].loglog(all_ranks, exact["normal"][0] / np.sqrt(all_ranks), "--", color=RED, label="slope −1/2")
axes[0].set(xlabel="rank r", ylabel=r"$\|g_r - g_\infty\| \;/\; \|g_\infty\|$")
axes[1].semilogx(np.sqrt(2) * all_ranks[:-1], slopes, "o-", color=BLUE, label="between r and 2r")
axes[1].axhline(-1, color="k", ls=":")
axes[1].axhline(-0.5, color=RED, ls="--")
axes[1].set(xlabel="rank r", ylabel="local slope", ylim=(-1.05, -0.45))
for ax in axes:
    ax.legend(fontsize=11)
plt.show()
""")

md(r"""
No sampling is involved, so there is nothing to blame on luck: the slope is not $-1$ at $r = 1$, where it
is about $-3/4$; $-1$ is its limit.

### (b) The code lands on the exact curve

Now `evaluate` and `gradient` have to reproduce these numbers. Three small tools make the measurement
sharp and honest.

*An unbiased squared error.* The squared norm $\|\hat g - g_\infty\|^2$ of a noisy estimate is inflated by
its own variance. With independent estimates $D_k = \hat g_k - g_\infty$, products of *different* ones,
$\langle D_k, D_l\rangle$ with $k \ne l$, have mean $\|g_r - g_\infty\|^2$ exactly. We average them over all
$k \neq l$; the SE comes from leaving out one $k$ at a time (the jackknife).

*A control variate.* For a linear fitness the estimate is unbiased at every rank (section 4). So subtract a
linear function $\langle C, M\rangle$ from the fitness and add its gradient, $C$, back: the mean stays, and
most of the variance goes. Any constant $C$ is allowed; one near the gradient is good.

*A fit.* The model $c/(r + d)^p$ falls at slope $-p$ in the end and allows for a different start; for $p = 1$
it is $c/r - cd/r^2 + \dots$ The exponent $p$ is left free, so that the data can say $1/2$.
""")

code(r"""
def bias(D):  # independent estimates (n, dim) -> the norm of their mean: squared, its SE, and plain
    def squared(total, squares, n):
        return (np.sum(total**2, axis=-1) - squares) / (n * (n - 1))

    n, total, squares = len(D), D.sum(axis=0), np.sum(D**2)
    left_out = squared(total - D, squares - np.sum(D**2, axis=1), n - 1)  # (n,)
    value = squared(total, squares, n)
    return value, math.sqrt((n - 1) / n * np.sum((left_out - left_out.mean()) ** 2))


def root(squared):  # error and its SE, from those of its square
    error = np.sqrt(np.maximum(squared[:, 0], squared[:, 1] / 100))
    return error, squared[:, 1] / (2 * error)


def fit(r, error, se, p=None):  # least squares for (c, d, p); with p given, for (c, d)
    c, d, power = error[0], 0.1, 1.0 if p is None else p
    for _ in range(100):  # Gauss–Newton
        model = c * (r + d) ** -power
        columns = [model / c, -power * model / (r + d), -model * np.log(r + d)]
        J = (np.stack(columns[: 3 if p is None else 2], axis=1).T / se).T
        change = np.linalg.lstsq(J, (error - model) / se)[0]
        c, d = c * math.exp(np.clip(change[0] / c, -0.5, 0.5)), max(d + np.clip(change[1], -0.3, 0.3), -0.8)
        power += np.clip(change[2], -0.2, 0.2) if p is None else 0
    chi2 = np.sum(((error - c * (r + d) ** -power) / se) ** 2)
    return np.array([c, d, power][: J.shape[1]]), np.sqrt(np.diag(np.linalg.inv(J.T @ J))), chi2
""")

code(r"""
def inner(Cs, Ms):  # Σ ⟨C, M⟩ over a list of matrices, for arrays and for LowRank
    return sum(jnp.trace(C.T @ M) for C, M in zip(Cs, Ms, strict=True))


def wave_errors(draw, ranks, name, n=64):
    def fitness(M, _):
        return jnp.sin(inner([jnp.float32(Omega)], [M])) - inner([jnp.float32(g_full)], [M])

    squared = []
    for r in ranks:
        run_key = jax.random.fold_in(jax.random.fold_in(key, 50 + len(name)), r)
        g = estimates(Eggroll(SIGMA, int(r), draw), fitness, jnp.zeros((3, 3)), run_key, n=n)
        # the mean of g is g_r - C, and C is g_∞
        squared.append(bias(g / np.linalg.norm(g_full)))
    return np.array(squared)


ranks = 2 ** np.arange(7)
squared = {"normal": wave_errors(normal, ranks, "normal")}
measured, se = root(squared["normal"])
for row in zip(ranks, measured, se, exact["normal"], strict=False):
    print("r = {:2}   measured {:.4f} ± {:.4f}   exact {:.4f}".format(*row))
assert np.all(np.abs(squared["normal"][:, 0] - exact["normal"][:7] ** 2) < 5 * squared["normal"][:, 1])
""")

code(r"""
(c, d, p), (_, _, se_p), chi2 = fit(ranks, measured, se)
print(f"fitted exponent p = {p:.3f} ± {se_p:.3f}, χ² = {chi2:.1f} for {len(ranks) - 3} degrees of freedom")
assert abs(p - 1) < 5 * se_p < 0.4 and chi2 < 4 + 5 * math.sqrt(2 * 4)
table = [("(b) wave, sampled", -1, -p, se_p)]

fig, ax = plt.subplots(figsize=(7, 4.4))
ax.loglog(all_ranks[:8], exact["normal"][:8], color=BLUE, label="exact curve")
ax.errorbar(ranks, measured, 2 * se, fmt="o", color=BLACK, capsize=4, mfc="white", label="evaluate + gradient (±2 SE)")
ax.set(xlabel="rank r", ylabel="relative error of the gradient", title="The code lands on the curve")
ax.set_xticks(ranks, ranks)
ax.minorticks_off()
ax.legend()
plt.show()
""")

md(r"""
### (c) A network, where no formula exists

The fitness of a small network, tanh units, $4 \to 6 \to 1$, on 8 examples: $f = \exp(-2\,\text{MSE})$, bounded by 1
as Theorem 2 asks. The noise is large, $\sigma = 0.3$, so that the curvature of $f$ matters. Now $g_\infty$
is not known either: we estimate it from an independent, four times larger sample of full-rank noise. The control variate
uses a pilot estimate of the gradient.
""")

code(r"""
k1, k2, k3, k4 = jax.random.split(jax.random.fold_in(key, 60), 4)
layers = mlp_init(k1, (4, 6, 1))
theta = [layer["W"] for layer in layers]  # the biases are not trained: vectors have dense noise
X = normal(k2, (8, 4))
Y = mlp(mlp_init(k3, (4, 6, 1)), X)


def bounded(weights, _):
    params = [{"W": W, "b": layer["b"]} for W, layer in zip(weights, layers, strict=True)]
    return jnp.exp(-2 * jnp.mean((mlp(params, X) - Y) ** 2))


full = Eggroll(0.3, None)
pilot = estimates(full, bounded, theta, k4, n=32).mean(axis=0)
control = ravel_pytree(theta)[1](jnp.float32(pilot))


def residual(weights, _):
    return bounded(weights, _) - inner(control, weights)


plain, reduced = [
    estimates(full, f, theta, jax.random.fold_in(k4, 2), n=32).var(axis=0).sum()
    for f in (bounded, residual)
]
print(f"variance with the control variate: {reduced / plain:.2f} of that without")
""")

code(r"""
target = estimates(full, residual, theta, jax.random.fold_in(k4, 1), n=512)
target = target.reshape(128, 4, -1).mean(axis=1)  # 128 estimates of 4 × 4096 pairs each
size = np.linalg.norm(target.mean(axis=0) + pilot)


def mlp_errors(draw, ranks, salt):
    squared, mean = [], []
    for r in ranks:
        run_key = jax.random.fold_in(k4, 100 * salt + r)
        g = estimates(Eggroll(0.3, int(r), draw), residual, theta, run_key, n=128)
        squared.append(bias((g - target) / size))
        mean.append(g.mean(axis=0) + pilot)
    return np.array(squared), np.array(mean)


mlp_ranks = 2 ** np.arange(5)
mlp_squared, mlp_mean = mlp_errors(normal, mlp_ranks, 1)
mlp_measured, mlp_se = root(mlp_squared)
g_mlp = target.mean(axis=0) + pilot
for r, error, e, g in zip(mlp_ranks, mlp_measured, mlp_se, mlp_mean, strict=True):
    cosine = g @ g_mlp / np.linalg.norm(g) / size
    print(f"r = {r:2}   relative error {error:.4f} ± {e:.4f}   cosine of the angle {cosine:.3f}")
""")

code(r"""
(c_mlp, d_mlp, p), (_, _, se_p), chi2 = fit(mlp_ranks, mlp_measured, mlp_se)
print(f"fitted exponent p = {p:.3f} ± {se_p:.3f}, χ² = {chi2:.1f} for {len(mlp_ranks) - 3} degrees of freedom")
table.append(("(c) network, sampled", -1, -p, se_p))
p_mlp = p
assert abs(p - 1) < 5 * se_p and p - 5 * se_p > 0.5  # compatible with 1/r, not with 1/√r
assert chi2 < 2 + 5 * math.sqrt(2 * 2)

signs_squared, _ = mlp_errors(signs, (1, 4), 2)
signs_measured, signs_se = root(signs_squared)
print("random signs at r = 1, 4:", *[f"{a:.3f} ± {b:.3f}" for a, b in zip(signs_measured, signs_se, strict=True)])
""")

md(r"""
The exponent of the network is compatible with 1 and not with 1/2. Notice the last column of the numbers above:
even at $r = 1$ the low-rank gradient points nearly in the direction of the full-rank one. Part of the error
is only one of length, which a learning rate absorbs.

Random signs, $\pm 1$, in place of normal factors come closer at equal rank. Part (e) predicts by how much.

### (d) The negative control: break the symmetry

A measurement that cannot come out otherwise shows nothing. What if the noise is not symmetric? Take
*skewed* two-point factors,

$$a = \sqrt{\tfrac{1-q}{q}} \text{ with probability } q, \qquad a = -\sqrt{\tfrac{q}{1-q}} \text{ otherwise},\qquad q = 0.2,$$

of mean 0, variance 1 and skewness $\kappa = (1 - 2q)/\sqrt{q(1-q)} = 1.5$, and
$f(M) = \sin(\langle\Omega, M\rangle + c)$ with $c = \pi/4$ so that $f$ is neither odd nor even. Now $\varphi_r$ is
complex, and so

$$g_r = \frac1\sigma\big({-\cos c}\;\nabla\,\mathrm{Re}\,\varphi_r + \sin c\;\nabla\,\mathrm{Im}\,\varphi_r\big),
\qquad \mathrm{Im}\,\varphi_r = -\varphi_\infty \frac{K_3}{6\sqrt r} + \dots,\quad K_3 = \kappa^2 \sum_{ij} \omega_{ij}^3 .$$

- *One-sided* estimates (members $+E$ only) see $\mathrm{Im}\,\varphi_r$: slope $-1/2$.
- *Antithetic pairs*, with the same skewed factors: $E$ and $-E$ are equally likely, whatever the entries are; only
  $\mathrm{Re}\,\varphi_r$ is left: slope $-1$ again.
""")

code(r"""
Q, PHASE = 0.2, math.pi / 4
SKEWED = np.array([math.sqrt((1 - Q) / Q), -math.sqrt(Q / (1 - Q))]), np.array([Q, 1 - Q])
g_phase = math.cos(PHASE) * g_full


def skewed(key, shape, dtype=jnp.float32):
    return jnp.where(jax.random.bernoulli(key, Q, shape), *SKEWED[0]).astype(dtype)


def phase_wave(M, _):  # less its linear part, as before, and less a constant
    s = inner([jnp.float32(Omega)], [M])
    return jnp.sin(s + PHASE) - phi_full * (math.sin(PHASE) + math.cos(PHASE) * s)


def phase_exact(r, one_sided):
    g = grad_phi(omega, r, SKEWED) / SIGMA
    return -math.cos(PHASE) * g.real + one_sided * math.sin(PHASE) * g.imag


def phase_measured(r, one_sided):
    run_key = jax.random.fold_in(jax.random.fold_in(key, 70 + one_sided), r)
    es = Eggroll(SIGMA, int(r), skewed)
    g = estimates(es, phase_wave, jnp.zeros((3, 3)), run_key, one_sided=one_sided)
    return bias(g / np.linalg.norm(g_phase))  # estimates of g - g_∞


control_ranks = np.array([2, 4, 8, 16, 32])
control_exact, control_measured = {}, {}
for one_sided in (True, False):
    errors = [relative(phase_exact(r, one_sided), g_phase) for r in all_ranks]
    control_exact[one_sided] = np.array(errors)
    squares = np.array([phase_measured(r, one_sided) for r in control_ranks])
    control_measured[one_sided] = root(squares)
    assert np.all(np.abs(squares[:, 0] - control_exact[one_sided][1:6] ** 2) < 5 * squares[:, 1])
    print("one-sided" if one_sided else "pairs    ", "measured", *control_measured[one_sided][0].round(4))
    print("          exact   ", *control_exact[one_sided][1:6].round(4))
""")

code(r"""
def line(r, error, se):  # weighted straight line through the log-log points: slope and its SE
    w, x = (error / se) ** 2, np.log(r)
    x = x - np.average(x, weights=w)
    return np.sum(w * x * np.log(error)) / np.sum(w * x**2), 1 / math.sqrt(np.sum(w * x**2))


for one_sided, name, limit in ((True, "one-sided, skewed", -0.5), (False, "pairs, skewed", -1)):
    error, e = control_measured[one_sided]
    slope, slope_se = line(control_ranks, error, e)
    curve = line(control_ranks, control_exact[one_sided][1:6], e)[0]
    tail = np.diff(np.log2(control_exact[one_sided]))[-1]
    print(f"{name}: slope {slope:.3f} ± {slope_se:.3f}; exact curve {curve:.3f}, at r = 1024 {tail:.3f}")
    table.append((f"(d) {name}", curve, slope, slope_se))
    assert abs(slope - curve) < 5 * slope_se
    assert abs(slope - (-1.5 - limit)) > 5 * slope_se  # excludes the other hypothesis
    assert abs(tail - limit) < 0.02
""")

md(r"""
The measurement can tell $-1/2$ from $-1$, and it is the symmetry of the *pair* that makes the difference.
The paper asks for symmetric entries and its code uses pairs; either is enough.

### (e) The constant

How large is the error, not just how fast does it fall? Expand $\log\varphi_r$ one order further. With
kurtosis $k = \mathbb{E}\,a^4$ of the factors (3 for normal, 9/5 for uniform, 1 for signs), $G = \omega\omega^\top$, and $\rho_i$, $c_j$ the squared norms of the rows and columns of $\omega$, the fourth cumulant of
$\langle\omega, ab^\top\rangle$ is

$$K_4 = 6\,\mathrm{tr}\,G^2 + 3(k-3)\Big(\sum_i \rho_i^2 + \sum_j c_j^2\Big) + (k-3)^2 \sum_{ij} \omega_{ij}^4,$$

$$\varphi_r - \varphi_\infty \approx \frac{\varphi_\infty K_4}{24\, r}, \qquad
g_r - g_\infty \approx \frac{\varphi_\infty}{24\, r\, \sigma}\big(K_4\,\omega - \nabla K_4\big).$$

So $r \times$ error should be flat for large $r$, at a height that is known beforehand.
""")

code(r"""
def K4(omega, k):
    rows, columns = jnp.sum(omega**2, axis=1), jnp.sum(omega**2, axis=0)
    lengths = 3 * (k - 3) * (jnp.sum(rows**2) + jnp.sum(columns**2))
    return 6 * jnp.sum((omega @ omega.T) ** 2) + lengths + (k - 3) ** 2 * jnp.sum(omega**4)


def constant(k):  # the limit of r × relative error
    w = jnp.float32(omega)
    direction = K4(w, k) * w - jax.grad(K4)(w, k)
    return float(phi_full / 24 / SIGMA * jnp.linalg.norm(direction) / np.linalg.norm(g_full))


predicted = {"normal": constant(3.0), "uniform": constant(9 / 5), "signs": constant(1.0)}
for name, law, k in (("normal", NORMAL, 3.0), ("uniform", UNIFORM, 9 / 5), ("signs", SIGNS, 1.0)):
    of_phi = 1024 * (phi(omega, 1024, law).real - phi_full), phi_full * float(K4(jnp.float32(omega), k)) / 24
    print(f"{name:8} r(φ_r − φ_∞) at r = 1024: {of_phi[0]:+.4f}, predicted {of_phi[1]:+.4f}", end="   ")
    print(f"r × relative error: {1024 * exact[name][-1]:.4f}, predicted {predicted[name]:.4f}")
    assert abs(1024 * exact[name][-1] / predicted[name] - 1) < 0.005  # what is left is O(1/r)
""")

code(r"""
e_ranks = ranks[:5]  # 1 … 16
squared["normal"] = squared["normal"][:5]
squared["uniform"] = wave_errors(uniform, e_ranks, "uniform")
squared["signs"] = wave_errors(signs, e_ranks, "signs", n=128)
constants = []
for name, s in squared.items():
    assert np.all(np.abs(s[:, 0] - exact[name][:5] ** 2) < 5 * s[:, 1])  # on the exact curve
    (c, d), (c_se, _), _ = fit(e_ranks, *root(s), p=1)
    print(f"{name:8} constant {c:.4f} ± {c_se:.4f}, predicted {predicted[name]:.4f}")
    assert abs(c - predicted[name]) < 5 * c_se < 0.5 * predicted[name]
    constants.append((f"(e) {name} factors", predicted[name], c, c_se))
(_, normal_c, a, a_se), _, (_, signs_c, b, b_se) = constants
assert a - b > 5 * math.hypot(a_se, b_se)  # signs are closer than normal factors at equal rank
""")

md(r"""
### All of it in one figure and one table
""")

code(r"""
with plt.rc_context({"font.size": 15, "lines.linewidth": 2, "lines.markersize": 8}):
    fig, (ax, right) = plt.subplots(1, 2, figsize=(14, 7), layout="constrained", width_ratios=(1.35, 1))
    r = np.geomspace(1, 100, 60)
    bar = {"capsize": 3, "mfc": "white", "ls": "", "mew": 2}
    few = all_ranks[:8]
    ax.plot(few, control_exact[True][:8], "--", color=RED)
    ax.errorbar(control_ranks, *control_measured[True], fmt="s", color=RED, **bar, label="one-sided, skewed factors")
    ax.plot(few, control_exact[False][:8], color=ORANGE)
    ax.errorbar(control_ranks, *control_measured[False], fmt="D", color=ORANGE, **bar, label="pairs, skewed factors")
    ax.plot(r, c_mlp * (r + d_mlp) ** -p_mlp, ":", color=GREEN)
    ax.errorbar(mlp_ranks, mlp_measured, mlp_se, fmt="^", color=GREEN, **bar, label="pairs, a network (fitted curve)")
    ax.plot(few, exact["normal"][:8], color=BLUE)
    ax.errorbar(ranks, measured, se, fmt="o", color=BLUE, **bar, label="pairs, normal factors")
    ax.annotate("slope −1/2", (40, 0.095), color=RED, rotation=-19, ha="center")
    ax.annotate("slope −1", (34, 0.0048), color=BLUE, rotation=-36, ha="center")
    ax.set(xscale="log", yscale="log", ylim=(0.002, 1), xlabel="rank r", ylabel="relative error of the mean update")
    ax.set_xticks(few, few)
    ax.minorticks_off()
    ax.set_title("Low rank tends to full rank at 1/r …")
    ax.legend(loc="lower left", fontsize=13)

    styles = {"normal": (BLUE, "o", "-"), "uniform": (PURPLE, "v", "-."), "signs": (BLACK, "P", "--")}
    for name, (colour, marker, ls) in styles.items():
        e, s = root(squared[name])
        right.plot(few, few * exact[name][:8], ls, color=colour)
        right.errorbar(e_ranks, e_ranks * e, e_ranks * s, fmt=marker, color=colour, **bar, label=name)
        right.plot([64, 220], [predicted[name]] * 2, color=colour, lw=6, alpha=0.35, solid_capstyle="butt")
        right.annotate(f"{predicted[name]:.3f}", (110, predicted[name] + 0.009), color=colour)
    right.set(xscale="log", ylim=(0, 0.5), xlabel="rank r", ylabel="r × relative error", xlim=(0.85, 230))
    right.set_xticks(few, few)
    right.minorticks_off()
    right.set_title("… with the predicted constant")
    right.legend(title="factors", loc="upper left", ncols=3, fontsize=13, columnspacing=1, handletextpad=0.3)
    Path("theory/figures").mkdir(parents=True, exist_ok=True)
    fig.savefig("theory/figures/convergence.png", dpi=86)
plt.show()
""")

md(r"""
Lines are exact (that of the network is the fit $c/(r+d)^p$), open markers are measured with the code, ±1 SE; the
thick bars on the right are the predicted constants.
""")

code(r"""
rows = ["| | slope expected | slope measured | 95 % interval |", "|---|---|---|---|"]
rows.append(f"| (a) wave, exact, at r = 1024 | −1 | {slopes[-1]:.4f} | exact |")
for name, want, value, s in table:
    rows.append(f"| {name} | {want:.3f} | {value:.3f} | {value - 1.96 * s:.3f} … {value + 1.96 * s:.3f} |")
rows += ["", "| | constant predicted | constant measured | 95 % interval |", "|---|---|---|---|"]
for name, want, value, s in constants:
    rows.append(f"| {name} | {want:.4f} | {value:.4f} | {value - 1.96 * s:.4f} … {value + 1.96 * s:.4f} |")
clock.append(("5. O(1/r), five ways", time.perf_counter()))
Markdown("\n".join(rows).replace("| -", "| −").replace("… -", "… −"))
""")

md(r"""
(The slopes of (b) and (c) are the fitted exponents $-p$. Those of (d) are straight lines through $r = 2 \dots 32$, beside
that of the exact curve at the same ranks; their limits are $-1/2$ and $-1$.)

## 6. Why r = 1 is enough

$O(1/r)$ is a statement about large $r$, and in practice $r = 1$. Three reasons.

**The bias is small if the fitness depends on many directions of the matrix at once.** For normal factors
$K_4 = 6\,\mathrm{tr}\,G^2$, which is $6\|\omega\|^4$ divided by the *effective rank*
$(\mathrm{tr}\,G)^2/\mathrm{tr}\,G^2$ of $\omega$: 1 for a rank-one $\omega$, $k$ for one with $k$ equal singular
values, about $mn/(m + n)$ for one with independent random entries. So at equal $\|\omega\|$ the bias at
$r = 1$ falls as one over the effective rank:
""")

code(r"""
def equal_singular_values(k):
    return np.diag([1 / math.sqrt(k)] * k + [0] * (16 - k))  # 16 × 16, ‖ω‖ = 1


effective = np.array([1, 2, 4, 8, 16])
rank1_exact = 1 - (1 + 1 / effective) ** (-effective / 2 - 1) / phi_full  # closed form of (a), r = 1
squares = []
for k in effective:
    wave = jnp.float32(equal_singular_values(k) / SIGMA)

    def fitness(M, _, wave=wave):
        s = inner([wave], [M])
        return jnp.sin(s) - phi_full * s

    g = estimates(Eggroll(SIGMA, 1), fitness, 0 * wave, jax.random.fold_in(key, 80 + k), n=32)
    squares.append(bias(g * SIGMA / phi_full))
squares = np.array(squares)
error, e = root(squares)
print("exact   ", *rank1_exact.round(4))
print("measured", *error.round(4))
assert np.all(np.abs(squares[:, 0] - rank1_exact**2) < 5 * squares[:, 1])
assert np.all(rank1_exact < 0.75 / effective)  # K₄ = 6/k makes the first-order bias 3/(4k)
""")

md(r"""
**The variance is hardly larger.** What ES fight is noise, not bias. For the linear fitness of section 4,
one pair contributes $\langle C, E\rangle E$, and with kurtosis $k$

$$\mathbb{E}\,\|\langle C, E\rangle E\|^2 = \|C\|^2 \Big( mn + 2 + \frac{(m + k - 1)(n + k - 1) - mn - 2}{r} \Big),$$

so that $r = 1$ with normal factors costs a factor of about $1 + 2/m + 2/n$ over full rank, and $r = 1$
with signs costs *less* than full rank: $mn$ against $mn + 2$.
""")

code(r"""
def squared_norm(es, m, key, n=40_000):  # E‖⟨C, E⟩E‖²/‖C‖²: a population of one pair, n times
    C = jnp.eye(m) / math.sqrt(m)
    keys = jax.random.split(key, n).reshape(100, -1)

    def one(key):
        scores = es.evaluate(lambda M, _: jnp.trace(C.T @ M), 0 * C, key, jnp.zeros(1))
        return jnp.sum(es.gradient(0 * C, key, scores) ** 2)

    return mean_se(np.asarray(jax.jit(lambda k: jax.lax.map(jax.vmap(one), k))(keys)).ravel())


sizes, ratios = np.array([4, 8, 16, 32]), {}
for name, draw, k in (("normal", normal, 3), ("signs", signs, 1)):
    for m in sizes:
        value, s = squared_norm(Eggroll(1.0, 1, draw), m, jax.random.fold_in(key, 90 + k + m))
        formula = (m + k - 1) ** 2
        assert abs(value - formula) < 5 * s + 1e-3 * formula
        ratios[name, m] = value / (m * m + 2), s / (m * m + 2), formula / (m * m + 2)
full_value, s = squared_norm(Eggroll(1.0, None), 8, jax.random.fold_in(key, 99))
assert abs(full_value - 66) < 5 * s

fig, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
axes[0].loglog(effective, 0.75 / effective, "k:", label="first order, 3/(4k)")
axes[0].loglog(effective, rank1_exact, color=BLUE, label="exact")
axes[0].errorbar(effective, error, 2 * e, fmt="o", color=BLUE, capsize=4, mfc="white", label="measured")
axes[0].set(xlabel="effective rank k of ω", ylabel="relative bias at r = 1")
axes[0].set_xticks(effective, effective)
axes[0].set_yticks([0.05, 0.1, 0.2, 0.4], [0.05, 0.1, 0.2, 0.4])
for name, colour, marker, ls in (("normal", BLUE, "o", "-"), ("signs", BLACK, "P", "--")):
    value, s, formula = np.array([ratios[name, m] for m in sizes]).T
    axes[1].plot(sizes, formula, ls, color=colour)
    axes[1].errorbar(sizes, value, 2 * s, fmt=marker, color=colour, capsize=4, mfc="white", label=f"{name}, r = 1")
axes[1].axhline(1, color=RED, ls=":", label="full rank, normal")
axes[1].set(xlabel="m = n", ylabel="variance over that of full rank", xscale="log")
axes[1].set_xticks(sizes, sizes)
for ax in axes:
    ax.minorticks_off()
    ax.legend(fontsize=11)
plt.show()
""")

md(r"""
**Training hardly notices.** A network, $16 \to 48 \to 48 \to 4$, learns to copy another one from random
inputs, with 256 members; six students from six initial parameters, the same ones, on the same examples, at
every rank.
""")

code(r"""
SIZES = (16, 48, 48, 4)


teacher, *students = [mlp_init(jax.random.fold_in(key, 100 + i), SIZES) for i in range(7)]
inputs = normal(jax.random.fold_in(key, 107), (50, 128, 8, 16))  # (generation, pair, example, 16)


def copying_fitness(params, x):
    return -jnp.mean((mlp(params, x) - mlp(teacher, x)) ** 2)


log_loss = jax.jit(lambda params: jnp.log(-copying_fitness(params, inputs.reshape(-1, 16))))


def copying(rank, draw):
    step = jax.jit(Eggroll(0.02, rank, draw).step, static_argnames="fitness")
    losses, spent = [], 0.0
    for i, params in enumerate(students):
        losses.append([log_loss(params)])
        for t, x in enumerate(inputs):
            begin = time.perf_counter()
            step_key = jax.random.fold_in(jax.random.fold_in(key, 108 + i), t)
            params, _ = step(copying_fitness, params, step_key, x, lr=0.008 / (1 + t / 15))
            jax.block_until_ready(params)
            spent += (i + t > 0) * (time.perf_counter() - begin)  # the first call compiles
            losses[-1].append(log_loss(params))
    return np.array(losses).T, spent  # (generations, students)


curves = {
    "r = 1, signs": copying(1, signs),
    "r = 1, normal": copying(1, normal),
    "r = 4, normal": copying(4, normal),
    "full rank, normal": copying(None, normal),
}
""")

code(r"""
final = {name: losses[-15:].mean(axis=0) for name, (losses, _) in curves.items()}  # (students,)
full_losses, full_time = curves["full rank, normal"]
fall = np.mean(full_losses[0] - final["full rank, normal"])
for name in list(curves)[:3]:
    gap, s = mean_se(final[name] - final["full rank, normal"])  # paired: same start, same examples
    print(f"{name}: log loss {gap:+.3f} ± {s:.3f} from full rank's, of a fall by {fall:.2f}")
    assert abs(gap) + 5 * s < 0.25 * fall  # equal to within a quarter of the progress

fig, ax = plt.subplots(figsize=(8, 4.4))
styles = ((BLACK, "-."), (BLUE, "-"), (ORANGE, "--"), (RED, ":"))
for (name, (losses, t)), (colour, ls) in zip(curves.items(), styles, strict=True):
    mean, s = losses.mean(axis=1), losses.std(axis=1, ddof=1) / math.sqrt(6)
    label = f"{name}: {t / full_time:.2f} × the time"
    ax.semilogy(np.exp(mean), color=colour, ls=ls, lw=2.5, label=label)
    ax.fill_between(range(51), np.exp(mean - 2 * s), np.exp(mean + 2 * s), color=colour, alpha=0.12)
ax.set(xlabel="generation", ylabel="mean squared error", title="Same curves, other costs (bands: ±2 SE of 6 students)")
ax.set_yticks([0.05, 0.1, 0.2, 0.4], ["0.05", "0.1", "0.2", "0.4"])
ax.minorticks_off()
ax.legend()
plt.show()
clock.append(("6. why r = 1", time.perf_counter()))
""")

md(r"""
What is proved, what checked, what only observed: the rate and the constant are theorems for smooth
bounded fitness, checked here to within sampling error; that the effective rank of real networks' fitness is high,
and that $r = 1$ trains as well as full rank, is observed, here and in the paper.

## 7. Train on something that has no gradient

Matplotlib ships a small elevation map of the Strait of Georgia and its surroundings, around Vancouver. Which points are land? The
network below answers through **hard steps** (its hidden units are $\mathrm{sign}(\cdot)$), and it is
scored by its **accuracy**, the fraction of right answers. Both are piecewise constant: the gradient that backpropagation would
follow is exactly zero.
""")

code(r"""
map_data = cbook.get_sample_data("topobathy.npz")
land = map_data["topo"] > 0  # (91, 120)
extent = [*(map_data["longitude"][[0, -1]] - 360), *map_data["latitude"][[0, -1]]]
height, width = land.shape
points = np.stack(np.meshgrid(np.linspace(-1.3, 1.3, width), np.linspace(-1, 1, height)), axis=-1)
k1, k2, k3, k4 = jax.random.split(jax.random.fold_in(key, 110), 4)
waves = points.reshape(-1, 2) @ (3 * normal(k1, (2, 32)))  # coordinates as waves of 32 random directions
features = jnp.concatenate([jnp.sin(waves), jnp.cos(waves)], axis=1)  # (points, 64)
answers = jnp.asarray(land.ravel())


def is_land(params, x):
    hidden, last = params
    h = jnp.sign(x @ hidden["W"] + hidden["b"])  # hard steps
    return (h @ last["W"] + last["b"])[..., 0] > 0


def accuracy(params, points):
    return jnp.mean(is_land(params, features[points]) == answers[points])


everywhere = jnp.arange(len(answers))
before = params = mlp_init(k2, (64, 64, 1))
gradient = jax.grad(accuracy)(params, everywhere)
assert all(jnp.all(g == 0) for g in jax.tree.leaves(gradient))
print(f"largest entry of jax.grad: {max(jnp.max(jnp.abs(g)) for g in jax.tree.leaves(gradient))}")
print(f"accuracy {accuracy(params, everywhere):.3f}; answering the commoner class: {max(land.mean(), 1 - land.mean()):.3f}")
""")

md(r"""
ES need no gradient of $f$. Each pair of members sees its own 64 points; the noise is rank-one, of random
signs.
""")

code(r"""
es = Eggroll(sigma=0.1, rank=1, draw=signs)


@jax.jit
def generation(params, t):
    k_points, k_noise = jax.random.split(jax.random.fold_in(k3, t))
    batch = jax.random.randint(k_points, (512, 64), 0, len(answers))  # (pairs, points)
    return es.step(accuracy, params, k_noise, batch, lr=0.5 / (1 + t / 100))[0]


history = []
for t in range(201):
    if t % 20 == 0:
        history.append((t, float(accuracy(params, everywhere))))
    params = generation(params, t)
print(*[f"generation {t}: {a:.3f}" for t, a in history[::2]], sep="\n")
""")

code(r"""
final_accuracy = float(accuracy(params, everywhere))
chance_se = math.sqrt(0.25 / len(answers))
assert final_accuracy > max(land.mean(), 1 - land.mean()) + 5 * chance_se

fig, axes = plt.subplots(1, 3, figsize=(12, 3.9), layout="constrained", sharey=True)
pictures = ((land, "the map"), (is_land(before, features), f"before: {history[0][1]:.1%} right"),
            (is_land(params, features), f"after: {final_accuracy:.1%} right"))
for ax, (picture, title) in zip(axes, pictures, strict=True):
    picture = np.asarray(picture).reshape(height, width)
    ax.imshow(picture, origin="lower", extent=extent, aspect=1.5, cmap="cividis", interpolation="nearest")
    ax.set(title=title, xlabel="longitude (degrees)")
    ax.grid(False)
axes[0].set_ylabel("latitude (degrees)")
plt.show()
clock.append(("7. no gradient", time.perf_counter()))
""")

# ------------------------------------------------------------------------------------------------
md(r"""
## 8. Train the character RNN

The text is the help that ships with Python, about 460,000 characters; the last tenth is held out. The model is
the small recurrent network of `eggroll.py`, and the fitness of a member is minus its bits per character on 16
characters, the binary logarithm of how many choices it hesitates between. Two yardsticks: a table of the
frequencies of single characters (*unigram*) and one of those of pairs (*bigram*).
""")

code(r"""
text = np.frombuffer("\n\n".join(topics.values()).encode("utf-32-le"), np.uint32)
alphabet, text = np.unique(text, return_inverse=True)
train, test = np.split(text.astype(np.int32), [len(text) * 9 // 10])
windows = jnp.asarray(test[: len(test) // 257 * 257].reshape(-1, 257))
unigram, bigram = eggroll.ngram_bits(train, test, len(alphabet))
print(f"{len(train):,} characters to learn, {len(test):,} held out, {len(alphabet)} different")
print(f"bits/char on held-out text: unigram {unigram:.2f}, bigram {bigram:.2f}")
""")

code(r"""
k1, k2, k3 = jax.random.split(jax.random.fold_in(key, 120), 3)
held_out = jax.jit(lambda p: jnp.mean(jax.vmap(partial(bits_per_char, p))(windows)))


def write(params, length=200):
    tokens = eggroll.sample(params, k3, train[0], length)
    return "".join(map(chr, alphabet[tokens]))


def learn(rank, generations, every, members=8192, length=16):
    es = Eggroll(sigma=0.04, rank=rank, draw=signs)

    @jax.jit
    def generation(params, t, train):
        k_text, k_noise = jax.random.split(jax.random.fold_in(k2, t))
        starts = jax.random.randint(k_text, (members // 2, 1), 0, len(train) - length)
        examples = train[starts + jnp.arange(length + 1)[None]]  # (pairs, length + 1)
        lr = 0.5 / (1 + t / 600)
        return es.step(lambda p, x: -bits_per_char(p, x), params, k_noise, examples, lr)[0]

    params, seconds = eggroll.rnn_init(k1, len(alphabet), 32), 0.0
    program = generation.lower(params, jnp.int32(0), train).compile()
    log, early = [(0, 0.0, float(held_out(params)))], None
    for t in range(generations):
        begin = time.perf_counter()
        params = jax.block_until_ready(program(params, jnp.int32(t), train))
        seconds += time.perf_counter() - begin
        if (t + 1) % every == 0:
            log.append((t + 1, seconds, float(held_out(params))))
        if t + 1 == 20:
            early = params
        if (t + 1) % 50 == 0:
            print(f"generation {t + 1:3}   {seconds:4.0f} s   held-out {log[-1][2]:.2f} bits/char", flush=True)
    return params, early, np.array(log)


params, early, log1 = learn(rank=1, generations=450, every=5)
""")

code(r"""
assert log1[-1, 2] < bigram < unigram  # it uses more than one character of context
print(f"after 20 generations:\n{write(early)!r}\n\nafter 450 generations, {log1[-1, 2]:.2f} bits/char:\n")
print(write(params, 400))
""")

md(r"""
Now full rank, with the same parameters to start from, examples, signs and learning rate: 20 generations only,
since each takes so long.
""")

code(r"""
_, _, log_full = learn(rank=None, generations=20, every=5)
t20 = log_full[-1, 1]
same_time = log1[np.searchsorted(log1[:, 1], t20, side="right") - 1]  # the last before that time
same_step = log1[log1[:, 0] == 20][0]
print(f"full rank, 20 generations, {t20:.1f} s:   {log_full[-1, 2]:.2f} bits/char")
print(f"r = 1, 20 generations, {same_step[1]:.1f} s:       {same_step[2]:.2f} bits/char")
print(f"r = 1, the same time, {same_time[0]:.0f} generations: {same_time[2]:.2f} bits/char")
fall = log1[0, 2] - log_full[-1, 2]
assert abs(same_step[2] - log_full[-1, 2]) < 0.15 * fall  # equal steps: alike, to 15 % of the progress
""")

code(r"""
fig, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
for ax, column, label in ((axes[0], 0, "generation"), (axes[1], 1, "seconds of training")):
    ax.plot(log1[:, column], log1[:, 2], color=BLUE, lw=2, label="r = 1")
    ax.plot(log_full[:, column], log_full[:, 2], "s--", color=RED, mfc="white", label="full rank")
    ax.axhline(unigram, color="0.5", ls=":")
    ax.axhline(bigram, color="0.5", ls="-.")
    ax.set(xlabel=label)
    ax.legend()
axes[0].set(xlim=(0, 60), title="Equal steps: alike", ylabel="held-out bits/char")
axes[1].set(title="Equal time: many more steps")
axes[1].annotate("unigram", (log1[-1, 1], unigram + 0.06), ha="right", color="0.3")
axes[1].annotate("bigram", (log1[-1, 1], bigram + 0.06), ha="right", color="0.3")
plt.show()
clock.append(("8. character RNN", time.perf_counter()))
""")

code(r"""
for (_, a), (name, b) in pairwise(clock):
    print(f"{name:22} {b - a:6.1f} s")
print(f"{'all':22} {clock[-1][1] - clock[0][1]:6.1f} s")
""")

notebook = nbformat.v4.new_notebook(cells=cells)
for i, cell in enumerate(notebook.cells):
    cell["id"] = f"cell-{i:02}"
notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
notebook.metadata["language_info"] = {"name": "python"}
nbformat.write(notebook, "tutorial.ipynb")
