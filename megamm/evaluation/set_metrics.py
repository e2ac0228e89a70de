"""Metrics of a set of generated images against a set of real ones, from features or class probabilities in float64.

fid: Frechet distance of two Gaussians (Heusel et al. 2017). The trace of the square root of the product of covariances
is the sum of the roots of the eigenvalues of S1^(1/2) S2 S1^(1/2), which is symmetric: neither complex nor NaN.
kid: the unbiased squared MMD with the kernel (x.y / d + 1)^3 (Binkowski et al. 2018), over all samples.
inception_score: exp of the mean divergence of p(y|x) from p(y) (Salimans et al. 2016), over all samples.
"""

import numpy as np
import numpy.typing as npt

from megamm.evaluation.statistics import Unmeasurable

Features = npt.NDArray[np.float64]


def fid(made: Features, real: Features) -> float:
    """Return the distance of features `[n, d]`; at least two samples of each."""
    _check(made, real)
    difference = made.mean(0) - real.mean(0)
    a, b = (np.atleast_2d(np.cov(features, rowvar=False)) for features in (made, real))
    values, vectors = np.linalg.eigh(a)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    product = np.linalg.eigvalsh(root @ b @ root).clip(min=0)
    return float(difference @ difference + np.trace(a) + np.trace(b) - 2 * np.sqrt(product).sum())


def kid(made: Features, real: Features) -> float:
    """Return the squared distance of features `[n, d]`, which may be negative; at least two samples of each."""
    _check(made, real)
    d = made.shape[1]
    within = [((x @ x.T) / d + 1) ** 3 for x in (made, real)]
    means = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in within]
    return float(means[0] + means[1] - 2 * ((made @ real.T / d + 1) ** 3).mean())


def inception_score(logits: Features) -> float:
    """Return the score of logits `[n, classes]`."""
    if len(logits) < 2:
        raise Unmeasurable("needs at least 2 samples")
    if not np.isfinite(logits).all():
        raise Unmeasurable("features that are not finite")
    shifted = logits - logits.max(1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    p = np.exp(log_p)
    marginal = p.mean(0)
    # p log p is 0 where p is 0.
    log_marginal = np.log(np.where(marginal > 0, marginal, 1.0))
    return float(np.exp((p * (log_p - log_marginal)).sum(1).mean()))


def _check(made: Features, real: Features) -> None:
    if min(len(made), len(real)) < 2:
        raise Unmeasurable("needs at least 2 samples")
    if not (np.isfinite(made).all() and np.isfinite(real).all()):
        raise Unmeasurable("features that are not finite")
