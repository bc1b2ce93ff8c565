"""The moments that an optimiser keeps of an LRU's parameters, moved to the basis of the reduced system.

With the new states h = lift h′, h′ = projection h, the system's B̂ = γ B and C are B̂ = lift B̂′, C = C′ projection, so
gradients (torch's, g_re + i g_im of the two parts) become, and first moments with them,

    B′: γ′ liftᴴ (g_B / γ)        C′: g_C projectionᴴ        γ_log′: Re⟨g_B′, B′⟩ of each row

The gradient of the full state matrix is not known, only its diagonal, that of Λ. With 0 for the rest

    g_λ′_i = Σ_j (lift_ji projection_ij)* g_λ_j,    log λ = −exp(ν_log) + i exp(θ_log)

Second moments v do not move linearly. Where all numbers fluctuate independently, the variances v − m² of a linear map M
become |M|² (v − m²), and so v′ = |M|² (v − m²) + m′². It is positive and at least m′²: what was moved asks Adam for no
step above its learning rate. For Λ the rest of the state matrix counts too. Its gradient is a sum over time of adjoints
a times states h, var_jk = α_j s_k, with s the states' sizes for white input and α = var_λ / s, so that

    var_λ′_i = (Σ_j |lift_ji|² α_j)(Σ_k |projection_ik|² s_k),    half of it radial and half angular
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kdkernels.nn.replacing import State, States, is_counter

FIRST = ("exp_avg", "grad_avg", "momentum_buffer")  # Adam's, RMSprop's, SGD's: means of gradients
SECOND = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")  # Adam's, RMSprop's, Adagrad's: of their squares
Parts = dict[str, Tensor]  # by the names of an LRU's parameters, float64
TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class Basis:
    """An LRU's parameters, all in float64, and what is made of them."""

    parameters: Parts

    @property
    def nu(self) -> Tensor:
        """−log |λ| (n)."""
        return self.parameters["nu_log"].exp()

    @property
    def theta(self) -> Tensor:
        """arg λ (n)."""
        return self.parameters["theta_log"].exp()

    @property
    def gamma(self) -> Tensor:
        """(n)."""
        return self.parameters["gamma_log"].exp()

    @property
    def B(self) -> Tensor:
        """Without γ: (n, H)."""
        return torch.complex(self.parameters["B_re"], self.parameters["B_im"])

    @property
    def C(self) -> Tensor:
        """(H, n)."""
        return torch.complex(self.parameters["C_re"], self.parameters["C_im"])

    def system(self) -> tuple[Tensor, Tensor, Tensor]:
        """Λ, γ B and C."""
        return torch.exp(torch.complex(-self.nu, self.theta)), self.gamma.unsqueeze(-1) * self.B, self.C

    def decay(self) -> Tensor:
        """1 − |λ|² without cancelling: (n)."""
        return -torch.expm1(-2 * self.nu)


@dataclass(frozen=True)
class Transport:
    """From one basis to another."""

    old: Basis
    new: Basis
    lift: Tensor  # (n, r), complex
    projection: Tensor  # (r, n), complex

    def rows(self) -> Tensor:
        """Of the gradient of B: (r, n)."""
        return self.new.gamma.unsqueeze(-1) * self.lift.mH / self.old.gamma.clamp_min(TINY)

    def first(self, m: Parts) -> Parts:
        """First moments."""
        B = self.rows() @ torch.complex(m["B_re"], m["B_im"])
        C = torch.complex(m["C_re"], m["C_im"]) @ self.projection.mH
        old, new = self.old.system()[0], self.new.system()[0]
        of_log = torch.complex(-m["nu_log"] / self.old.nu, m["theta_log"] / self.old.theta)
        # a state that forgets all at once, λ = 0, has no gradient
        of_lambda = torch.where(old == 0, 0, of_log / old.conj())
        of_log = new.conj() * ((self.projection * self.lift.mT).conj() @ of_lambda)
        return {
            "nu_log": -self.new.nu * of_log.real,
            "theta_log": self.new.theta * of_log.imag,
            "gamma_log": (B.conj() * self.new.B).real.sum(-1),
            "B_re": B.real,
            "B_im": B.imag,
            "C_re": C.real,
            "C_im": C.imag,
        }

    def variances(self, v: Parts) -> Parts:
        """Those of independent numbers."""
        B_re, B_im = _spread(self.rows(), v["B_re"], v["B_im"])
        C_re, C_im = (x.mT for x in _spread(self.projection.conj(), v["C_re"].mT, v["C_im"].mT))
        old, new = (basis.system()[0].abs().square() for basis in (self.old, self.new))
        of_log = v["nu_log"] / self.old.nu.square() + v["theta_log"] / self.old.theta.square()
        of_lambda = torch.where(old == 0, 0, of_log / old)
        size = self.old.system()[1].abs().square().sum(-1) / self.old.decay()
        adjoint = torch.where(size == 0, 0, of_lambda / size)
        half = 0.5 * new * (_squared(self.lift.mT) @ adjoint) * (_squared(self.projection) @ size)
        return {
            "nu_log": self.new.nu.square() * half,
            "theta_log": self.new.theta.square() * half,
            "gamma_log": (B_re * self.new.B.real.square() + B_im * self.new.B.imag.square()).sum(-1),
            "B_re": B_re,
            "B_im": B_im,
            "C_re": C_re,
            "C_im": C_im,
        }


def transported(transport: Transport, states: States, options: dict[str, dict]) -> States:
    """An optimiser's states in the new basis; `options` are those of each parameter's group.

    A state with tensors of other names or shapes is left out: nothing is known of how it moves. RMSprop's momentum,
    which is of steps and not of gradients, begins again at 0.
    """
    shapes = {name: x.shape for name, x in transport.old.parameters.items()}
    moving = {name: state for name, state in states.items() if _is_known(state, shapes[name])}

    def has(key: str) -> bool:
        return any(isinstance(state.get(key), Tensor) for state in moving.values())

    def gather(key: str) -> Parts:
        """Entries of the states, 0 for parameters without one."""
        zero = {name: torch.zeros_like(x) for name, x in transport.old.parameters.items()}
        return zero | {name: state[key].to(zero[name]) for name, state in moving.items() if state.get(key) is not None}

    means = {key: gather(key) for key in FIRST if has(key)}
    new_means = {key: transport.first(m) for key, m in means.items()}
    found: dict[str, Parts] = dict(new_means)
    for key in SECOND:
        if has(key):
            v = gather(key)
            mean = next((k for k in ("exp_avg", "grad_avg") if k in means), None)
            if mean is None:
                found[key] = transport.variances(v)
                continue
            share = {name: _bias(moving[name], options[name]) if name in moving else 1.0 for name in v}
            spread = {name: (v[name] - share[name] * means[mean][name].square()).clamp_min(0) for name in v}
            moved = transport.variances(spread)
            found[key] = {name: moved[name] + share[name] * new_means[mean][name].square() for name in v}
    result: States = {}
    for name, state in moving.items():
        result[name] = {}
        for key, value in state.items():
            if is_counter(value):
                result[name][key] = value
            elif _is_of_steps(key, state):
                result[name][key] = torch.zeros_like(found[key][name], dtype=value.dtype, device=value.device)
            else:
                result[name][key] = found[key][name].to(device=value.device, dtype=value.dtype).contiguous()
    return result


def _bias(state: State, options: dict) -> float:
    """What E[g]² times this is of the stored m² and v, which are short of the means by 1 − β₁ᵗ and 1 − β₂ᵗ in Adam."""
    betas, step = options.get("betas"), state.get("step")
    if betas is None or not step:
        return 1.0
    first, second = (1 - float(beta) ** float(step) for beta in betas[:2])
    return second / first**2


def _is_known(state: State, shape: torch.Size) -> bool:
    tensors = {key: x for key, x in state.items() if not is_counter(x)}
    return all(key in FIRST + SECOND and x.shape == shape for key, x in tensors.items())


def _is_of_steps(key: str, state: State) -> bool:
    return key == "momentum_buffer" and "square_avg" in state


def _squared(x: Tensor) -> Tensor:
    return x.real.square() + x.imag.square()


def _spread(M: Tensor, real: Tensor, imag: Tensor) -> tuple[Tensor, Tensor]:
    """The variances of the parts of M x from those of x's."""
    a, b = M.real.square(), M.imag.square()
    return a @ real + b @ imag, b @ real + a @ imag
