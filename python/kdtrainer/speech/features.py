"""Log-mel features: 25 ms every 10 ms in 40 bands, normalised for each utterance, three neighbours in one frame."""

from functools import lru_cache

import torch
from torch import Tensor

WINDOW, HOP = 0.025, 0.010  # seconds
BANDS, LOWEST, HIGHEST = 40, 60.0, 7600.0  # Hz
STACKED = 3
FEATURES = BANDS * STACKED
SLOWEST = 2 * HIGHEST  # samples in a second
FLOOR = 1e-7  # of a band's power


def of_wave(wave: Tensor, rate: int) -> Tensor:
    """(samples,) -> (T, FEATURES): frames of 30 ms, each band of mean 0 and mean square 1 over the utterance."""
    frames = log_mel(wave, rate)
    frames = frames - frames.mean(0)
    frames = frames / frames.square().mean(0).sqrt().clamp_min(1e-5)
    whole = len(frames) // STACKED
    return frames[: whole * STACKED].reshape(whole, FEATURES)


def log_mel(wave: Tensor, rate: int) -> Tensor:
    """(samples,) -> (frames, BANDS), of at least STACKED frames."""
    window, hop = round(WINDOW * rate), round(HOP * rate)
    fft = 1 << (window - 1).bit_length()
    short = window + (STACKED - 1) * hop - len(wave)
    wave = torch.nn.functional.pad(wave, (fft // 2, fft // 2 + max(short, 0)))
    spectrum = torch.stft(wave, fft, hop, window, torch.hann_window(window), center=False, return_complex=True)
    power = spectrum.abs().square()  # (fft/2 + 1, frames)
    return (filters(rate, fft) @ power).clamp_min(FLOOR).log().T


@lru_cache(8)
def filters(rate: int, fft: int) -> Tensor:
    """(BANDS, fft/2 + 1): triangles, equidistant on the mel scale."""
    mels = torch.linspace(*(float(mel(torch.tensor(x))) for x in (LOWEST, HIGHEST)), BANDS + 2)  # type: ignore[call-overload]
    corners = 700 * (10 ** (mels / 2595) - 1)  # Hz
    frequencies = torch.arange(fft // 2 + 1) * rate / fft
    left, centre, right = (corners[k : BANDS + k, None] for k in range(3))
    rising, falling = (frequencies - left) / (centre - left), (right - frequencies) / (right - centre)
    return torch.minimum(rising, falling).clamp_min(0)


def mel(frequency: Tensor) -> Tensor:
    return 2595 * torch.log10(1 + frequency / 700)
