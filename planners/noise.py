"""Gaussian noise, white and coloured: sequences whose power falls with frequency as f^-β."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor


def white_noise(shape: tuple[int, ...], like: Tensor, *, generator: Generator) -> Tensor:
    """Independent standard Gaussian numbers of `shape`, of the dtype and on the device of `like`."""
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)


def colored_noise(shape: tuple[int, ...], beta: float, like: Tensor, *, generator: Generator) -> Tensor:
    """Gaussian noise (..., T, nu), correlated along T: white for β = 0, pink for 1, red for 2.

    The zero frequency gets the power of 1/T, so the mean over T varies: that is what makes coloured
    action sequences push in one direction. The nominal variance is 1 without that mean (so a little
    more with it), and the sequence is circular.

    Args:
        shape: (..., T, nu).
        beta: exponent; β ≤ 0 gives white noise.
        like: a tensor of the wanted dtype and device.

    Reference: Timmer & König 1995; as used by Pinneri et al. 2020 (iCEM), whose package
        `colorednoise` this equals in distribution.
    """
    T = shape[-2]
    if beta <= 0 or T == 1:
        return white_noise(shape, like, generator=generator)
    f = torch.fft.rfftfreq(T, dtype=like.dtype, device=like.device)
    f[0] = 1.0 / T
    scale = f ** (-beta / 2)
    w = scale[1:].clone()
    w[-1] *= (1 + T % 2) / 2
    sigma = 2 * torch.sqrt((w**2).sum()) / T

    spectrum = (*shape[:-2], shape[-1], len(f))
    real = white_noise(spectrum, like, generator=generator) * scale
    imag = white_noise(spectrum, like, generator=generator) * scale
    imag[..., 0] = 0.0
    real[..., 0] *= math.sqrt(2)
    if T % 2 == 0:  # the Nyquist component is real
        imag[..., -1] = 0.0
        real[..., -1] *= math.sqrt(2)
    noise: Tensor = torch.fft.irfft(torch.complex(real, imag), n=T) / sigma
    return noise.transpose(-1, -2)
