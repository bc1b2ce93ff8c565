"""State-space models from their Markov parameters: the block-Hankel matrix, its leading singular values, and ERA.

    H_ij = h_{i+j+1},    h_k = C A^{k−1} B,    so that H = (observability) (controllability) has rank n

Products with H are correlations: by FFT they cost O(p m T log T), and H, of p m T²/4 numbers, is never formed unless it
is small. Its leading singular values come from subspace iteration on a random start (Halko, Martinsson and Tropp 2011).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kdkernels.backend import REAL_OR_COMPLEX, refuse_tangents
from kdkernels.contract import Contract, check_count, show
from kdkernels.library import watched
from kdkernels.ops.hankel.kernel import wide
from kdkernels.ops.hankel.once import never, once
from kdkernels.ops.svd import SVD

CONTRACT = Contract(REAL_OR_COMPLEX, markov="... T p m")
DENSE = 192  # the smaller side up to which the matrix is formed
OVERSAMPLE = 10
ITERATIONS = 60
SEEN = 1e-10  # of a direction of the states, by all block rows but the last
SETTLED = 1e-13  # relative to the largest: a change that ends the iteration
SEED = 0


class Realization(NamedTuple):
    """h⁺ = Ah + Bu, y = Ch."""

    A: Tensor
    B: Tensor
    C: Tensor


class BlockHankel:
    """H (N, pL, mK) of every h_1 … h_T (..., T, p, m), as an operator: L = ⌈T/2⌉ block rows, K = T − L + 1."""

    def __init__(self, markov: Tensor) -> None:
        self.markov = markov.reshape(-1, *markov.shape[-3:])
        N, self.T, self.p, self.m = self.markov.shape
        self.L = (self.T + 1) // 2
        self.K = self.T - self.L + 1
        self.shape = (N, self.p * self.L, self.m * self.K)
        self.length = fast_length(self.T)  # of the transforms

    def dense(self) -> Tensor:
        """H itself."""
        device = self.markov.device
        place = torch.arange(self.L, device=device)[:, None] + torch.arange(self.K, device=device)
        blocks = self.markov[:, place]  # (N, L, K, p, m)
        return blocks.permute(0, 1, 3, 2, 4).reshape(self.shape)

    def norm(self) -> Tensor:
        """‖H‖, the root of the sum of its squares: (N,)."""
        k = torch.arange(1, self.T + 1, device=self.markov.device)
        times = torch.minimum(k, self.T + 1 - k).clamp(max=min(self.L, self.K))  # that h_k stands in H
        size = self.markov.abs().flatten(1).amax(-1)
        shares = self.markov.abs() / torch.where(size > 0, size, 1)[:, None, None, None]  # their squares are in range
        return size * (shares.square().sum((-2, -1)) * times).sum(-1).sqrt()

    def times(self, x: Tensor) -> Tensor:
        """H x: (N, mK, q) -> (N, pL, q)."""
        x = x.reshape(len(x), self.K, self.m, -1)
        return self._correlate(self.markov, x, self.L).flatten(1, 2)

    def adjoint_times(self, x: Tensor) -> Tensor:
        """Hᴴ x: (N, pL, q) -> (N, mK, q)."""
        x = x.reshape(len(x), self.L, self.p, -1)
        return self._correlate(self.markov.mH, x, self.K).flatten(1, 2)

    def _correlate(self, h: Tensor, x: Tensor, count: int) -> Tensor:
        """y_i = Σ_j h_{i+j} x_j for i < count: (N, T, a, b), (N, J, b, q) -> (N, count, a, q)."""
        size, length = self.length, x.shape[1]
        if h.is_complex() or x.is_complex():
            product = torch.fft.fft(h, size, 1) @ torch.fft.fft(x.flip(1), size, 1)
            y = torch.fft.ifft(product, size, 1)
        else:
            y = torch.fft.irfft(torch.fft.rfft(h, size, 1) @ torch.fft.rfft(x.flip(1), size, 1), size, 1)
        return y[:, length - 1 : length - 1 + count]  # below those, and only there, the circle wraps


def fast_length(T: int) -> int:
    """The next product of small primes."""
    best = 1 << (T - 1).bit_length()
    for odd in (3, 5, 9, 15):
        power = odd
        while power < T:
            power *= 2
        best = min(best, power)
    return best


def hankel_svd(markov: Tensor, rank: int) -> SVD:
    """The leading singular values and vectors of the block-Hankel matrix of h_1 … h_T.

    H has L = ⌈T/2⌉ block rows and T − L + 1 block columns: for T = 2L − 1 it is pL × mL. It is formed only where it is
    small. Float64 throughout; the random start is always the same, and so are the results. The iteration ends when the
    values stand still at 1e-13 of the largest: vectors of values that are nearly equal may then still turn by 1e-7.

    Args:
        markov: (..., T, p, m), real or complex, float32 or float64: h_1 first.
        rank: r, at least 1 and at most the smaller side of H.

    Returns:
        U (..., pL, r), S (..., r) descending, Vh (..., r, mK), in the dtype of `markov`. NaN or an infinity in one
        sequence gives NaN there.

    Runs eagerly: it is not for torch.compile. Only S has a gradient, once; those of U and Vh, and second ones, are
    errors.

    Raises:
        TypeError: markov is no tensor of these dtypes.
        ValueError: its shape does not fit, or rank is out of range.
    """
    leading = check_sequence("hankel_svd", markov, rank)
    U, S, Vh = _leading(markov.detach(), rank)
    if torch.is_grad_enabled() and markov.requires_grad:
        image = BlockHankel(wide(markov)).times(Vh.mH)
        S = S + once((U.conj() * image).sum(-2).real - S, "hankel_svd cannot be differentiated twice")  # uᴴ H v
        U, Vh = (never(x, markov, "hankel_svd's U and Vh have no gradient, only S has") for x in (U, Vh))
    return SVD(
        U.reshape(*leading, *U.shape[1:]).to(markov.dtype),
        S.reshape(*leading, rank).to(markov.real.dtype),
        Vh.reshape(*leading, *Vh.shape[1:]).to(markov.dtype),
    )


def era(markov: Tensor, rank: int) -> Realization:
    """The eigensystem realisation algorithm (Juang and Pappa 1985; Kung 1978): (A, B, C) from h_k = C A^{k−1} B.

    From noiseless data of a system of order `rank` it is that system, up to a change of basis; of data with noise the
    leading singular values of the block-Hankel matrix are kept. It is balanced: both finite Gramians are diag(S).
    States that stand for noise alone may make it unstable.

    Args:
        markov: (..., T, p, m), real or complex, float32 or float64: h_1 first, T at least 3.
        rank: the order r; at most the smaller side of H without its last block row. States beyond the numerical rank of
            the data are 0.

    Returns:
        A (..., r, r), B (..., r, m), C (..., p, r), computed in float64, in the dtype of `markov`, without gradients.

    Raises:
        TypeError, ValueError: as `hankel_svd`.
    """
    leading = check_sequence("era", markov, rank)
    p, m = markov.shape[-2:]
    U, S, Vh = _leading(markov.detach(), rank)
    # what rounding the data may have done to H, and what computing did
    data, own = (torch.finfo(dtype).eps for dtype in (markov.dtype, torch.float64))
    noise = data * BlockHankel(wide(markov.detach())).norm().unsqueeze(-1)
    kept = torch.maximum(noise, own * max(U.shape[1], Vh.shape[2]) * S[:, :1]) < S
    root = torch.where(kept, S, 0).sqrt() + 0 * S
    inverse = torch.where(kept, S, torch.inf).rsqrt()
    U = torch.where(kept.unsqueeze(-2), U, 0)
    # the shift: U without its last block row times A' is U without its first; what only the last row sees has no next
    Q, R = torch.linalg.qr(U[:, :-p])
    A = torch.linalg.pinv(R, atol=SEEN, rtol=0) @ (Q.mH @ U[:, p:])
    A = inverse.unsqueeze(-1) * A * root.unsqueeze(-2)
    found = (A, root.unsqueeze(-1) * Vh[..., :m], U[:, :p] * root.unsqueeze(-2))
    guarded = (never(x, markov, "era has no gradient") for x in found)
    return Realization(*(x.reshape(*leading, *x.shape[1:]).to(markov.dtype) for x in guarded))


def check_sequence(op: str, markov: Tensor, rank: int) -> tuple[int, ...]:
    """The leading dimensions of a checked call of `op`."""
    sizes = CONTRACT.bind({"markov": markov})
    check_count("rank", rank)
    refuse_tangents(op, (markov,), remedy="")
    T, p, m = sizes["T"], sizes["p"], sizes["m"]
    if T < 1 or p < 1 or m < 1:
        raise ValueError(f"markov has shape {show(tuple(markov.shape))}, but must have a T, p and m of at least 1")
    L = (T + 1) // 2
    most = min(p * L, m * (T - L + 1))
    if rank > most:
        raise ValueError(f"rank is {rank}, but must be at most {most}, the smaller side of the block-Hankel matrix")
    if op == "era" and rank > p * (L - 1):
        raise ValueError(f"rank is {rank}, but must be at most {p * (L - 1)}: p times one less than the block rows")
    return sizes["..."]


def _leading(markov: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (N, pL, r), S (N, r) and Vh (N, r, mK) in float64."""
    h = wide(markov).reshape(-1, *markov.shape[-3:])
    finite = h.isfinite().flatten(1).all(-1)
    whole = h.device.type == "cpu" and not watched((h,)) and bool(finite.all())  # nobody waits for the answer
    H = BlockHankel(h if whole else torch.where(finite[:, None, None, None], h, 0))
    if not len(h):
        U, S, Vh = h.new_zeros(0, H.shape[1], rank), h.real.new_zeros(0, rank), h.new_zeros(0, rank, H.shape[2])
    elif is_small(H, rank):
        U, S, Vh = torch.linalg.svd(H.dense(), full_matrices=False)
    else:
        U, S, Vh = _iterate(H, rank)
    U, S, Vh = U[..., :rank], S[:, :rank], Vh[:, :rank]
    if whole:
        return U, S, Vh
    poison = torch.where(finite, 0.0, torch.nan)
    return U + poison[:, None, None], S + poison[:, None], Vh + poison[:, None, None]


def is_small(H: BlockHankel, rank: int) -> bool:
    """Whether the matrix is formed."""
    return min(H.shape[1:]) <= max(DENSE, 2 * (rank + OVERSAMPLE))


def _iterate(H: BlockHankel, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Subspace iteration until the wanted values stand still."""
    N, _, cols = H.shape
    draw = torch.Generator().manual_seed(SEED)
    start = torch.randn(1, cols, rank + OVERSAMPLE, dtype=torch.float64, generator=draw, device="cpu")
    Q = torch.linalg.qr(H.times(start.to(H.markov).expand(N, -1, -1)))[0]
    before = None
    for _ in range(ITERATIONS):
        V, R = torch.linalg.qr(H.adjoint_times(Q))  # Qᴴ H = Rᴴ Vᴴ
        U, S, Wh = torch.linalg.svd(R.mH)
        if before is not None and bool(((S - before)[:, :rank].abs() <= SETTLED * S[:, :1]).all()):
            break
        before = S
        Q = torch.linalg.qr(H.times(V))[0]
    return Q @ U, S, Wh @ V.mH
