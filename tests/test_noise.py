"""Coloured noise: published statistics, and the spectrum of the package `colorednoise`."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mbrl.planners.noise import colored_noise
from tests.problems import seeded

LIKE = torch.zeros((), dtype=torch.float64)


def spectrum(T: int, beta: float) -> np.ndarray:
    """Expected |rfft|² of Timmer & König noise of length T, normalised as `colorednoise` does."""
    f = np.fft.rfftfreq(T)
    f[0] = 1 / T
    scale = f ** (-beta / 2)
    w = scale[1:].copy()
    w[-1] *= (1 + T % 2) / 2
    sigma = 2 * math.sqrt(float(np.sum(w**2))) / T
    # Two Gaussian parts each, or one of twice the variance where the component is real.
    return np.asarray(2 * scale**2 / sigma**2)


# For H = 30, as measured on `colorednoise` 2.2.
@pytest.mark.parametrize(
    ("beta", "mean_std", "lag"),
    [(0.25, 0.233, 0.14), (2.0, 0.564, 0.88), (2.5, 0.614, 0.94), (3.0, 0.647, 0.96), (3.5, 0.668, 0.97)],
)
def test_published_statistics(beta: float, mean_std: float, lag: float) -> None:
    x = colored_noise((200_000, 30, 1), beta, LIKE, generator=seeded())[..., 0]
    assert float(x.mean(-1).std()) == pytest.approx(mean_std, abs=0.005)
    ahead, behind = x[:, 1:].flatten(), x[:, :-1].flatten()
    assert float(torch.corrcoef(torch.stack([ahead, behind]))[0, 1]) == pytest.approx(lag, abs=0.006)


@pytest.mark.parametrize("T", [2, 3, 12, 29, 30])
@pytest.mark.parametrize("beta", [0.5, 1.0, 2.5])
def test_spectrum(T: int, beta: float) -> None:
    """Gaussian with independent components: the second moments are the whole distribution."""
    n = 100_000
    x = colored_noise((n, T, 2), beta, LIKE, generator=seeded(3))[..., 1]
    parts = torch.view_as_real(torch.fft.rfft(x))
    power = parts.square().sum(-1).mean(0)
    torch.testing.assert_close(power, torch.from_numpy(spectrum(T, beta)), rtol=0.03, atol=0.0)
    flat = parts.reshape(n, -1)
    flat = flat[:, flat.std(0) > 0]
    correlation = torch.corrcoef(flat.T).reshape(flat.shape[1], -1) - torch.eye(flat.shape[1], dtype=x.dtype)
    assert correlation.abs().max() < 0.02
    kurtosis = ((flat / flat.std(0)) ** 4).mean(0)
    assert (kurtosis - 3).abs().max() < 0.15


def test_action_dimensions_and_rows_are_independent() -> None:
    x = colored_noise((5_000, 3, 12, 2), 2.0, LIKE, generator=seeded())
    means = x.mean(-2).reshape(5_000, 6)
    off = torch.corrcoef(means.T) - torch.eye(6, dtype=x.dtype)
    assert off.abs().max() < 0.06


@pytest.mark.parametrize(
    ("shape", "beta"), [((50_000, 8, 1), 0.0), ((50_000, 8, 1), -1.0), ((50_000, 1, 1), 2.0)]
)
def test_white_where_there_is_no_colour(shape: tuple[int, int, int], beta: float) -> None:
    x = colored_noise(shape, beta, LIKE, generator=seeded())[..., 0]
    torch.testing.assert_close(
        x.T.cov().reshape(shape[1], shape[1]), torch.eye(shape[1], dtype=x.dtype), rtol=0, atol=0.03
    )


def test_dtype_and_seed() -> None:
    like = torch.zeros((), dtype=torch.float32)
    a, b = (colored_noise((2, 6, 3), 1.0, like, generator=seeded(5)) for _ in range(2))
    assert a.dtype == torch.float32 and a.shape == (2, 6, 3) and torch.equal(a, b)
