"""How much of each input channel's range moves between activation and weight: the vector `smooth` of a layer.

It is called `smooth` in formulas and code, and `smooth_factor` among the tensors of a file.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import itemgetter

import torch

from ...kernels.formats import Format
from ...kernels.layer import LayerSpec
from . import lowrank
from .inputs import LayerInput

LIMITS = (1e-2, 1e2)  # beyond these, activations under- or overflow the 16-bit and E4M3 ranges
FP16 = (2.0**-14, 2.0**15)  # where numbers in float16 have all their bits
MOST_RAISED = 8  # that a common factor takes usual activations away from 1 for the sake of rare ones
EXPONENTS = (
    (0.0, 0.0),
    *((a, 0.0) for a in (0.3, 0.5, 0.7)),
    *((a, 1 - a) for a in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)),
)
ROWS = 2048  # rows of the weight that the search looks at
TOKENS = 384  # and rows of the activation
LEARNING_RATE = 0.04
WEIGHT_STEPS = 7.0  # from zero to the extreme of a weight group
GPTQ_GAIN = 0.5  # GPTQ halves the noise of weight rounding


def from_weight_spans(weight: torch.Tensor, power: float) -> torch.Tensor:
    """smooth[k] = (absmax_n |weight[n, k]|) ** -power, scaled to geometric mean 1

    The data-free rule: it levels the spans of the weight's input channels, so that one large channel does not set the
    scale of its whole group. weight (N, K); returns (K,) float32. Dead channels (all zero) get 1.
    """
    span = weight.abs().amax(0)
    alive = span > 0
    log = torch.where(alive, span, 1).log()
    if alive.any():
        log = torch.where(alive, log - log[alive].mean(), 0)
    return (-power * log).exp().clamp(*LIMITS)


def above_one(s: torch.Tensor, fmt: Format) -> torch.Tensor:
    """s times a power of two so that none is below 1, where activations have a range and nothing is known of them

    No activation is larger after such smoothing than before it, so none is cut that would not be cut without. Within
    the range a power of two changes nothing. Channels below 1 / 8 of the mean come up to it: others would sink too low.
    """
    if fmt.act_range is None:
        return s
    s = s.clamp_min(1 / MOST_RAISED)
    return s * torch.exp2(-s.amin().log2().floor()).clamp_min(1)


def from_spans(act: torch.Tensor, weight: torch.Tensor, a: float, b: float) -> torch.Tensor:
    """smooth[k] = act[k] ** a / weight[k] ** b for spans (K,) of both; 1 where either is zero, or this is no number"""
    smooth = act.pow(a) / weight.pow(b)
    return torch.where((act > 0) & (weight > 0) & smooth.isfinite(), smooth, 1)


@dataclass(frozen=True)
class Inputs:
    """What the search knows of the input: a few rows after the unsigned shift, and per channel over all tokens.

    rows    (T, K)
    absmax  (K,)
    square  (K,) mean square
    """

    rows: torch.Tensor
    absmax: torch.Tensor
    square: torch.Tensor

    @classmethod
    def of(cls, x: torch.Tensor, absmax: torch.Tensor | None = None) -> "Inputs":
        """From shifted activations x (M, K); `absmax` where it is known from more tokens."""
        stride = max(1, len(x) // TOKENS)
        return cls(x[::stride][:TOKENS], x.abs().amax(0) if absmax is None else absmax, x.square().mean(0))


@dataclass(frozen=True)
class NoiseModel:
    """J(s) = sum_tj noise(x_t / s)_j ||R_j s_j||^2 + gain sum_ij noise(R_i s)_j E[x_j^2] / s_j^2

    The output noise of rounding both factors of x / s and R s. j runs over channels, t over tokens, i over rows of
    R = W - L / s, the part that is rounded. A step of size d adds d^2 / 12; `Format.rounding_noise` knows the steps.

    steps        (K/group,) code steps from zero to the extreme of an activation group
    weight_gain  what GPTQ leaves of the weight's noise
    """

    fmt: Format
    steps: torch.Tensor
    weight_gain: float

    @classmethod
    def of(cls, spec: LayerSpec, device: torch.device, gptq: bool) -> "NoiseModel":
        fmt, group = spec.fmt, spec.fmt.group_size
        steps = torch.full((spec.k // group,), fmt.act_steps(spec.act_rule, unsigned=False), device=device)
        start, stop = spec.act_unsigned
        steps[start // group : stop // group] = fmt.act_steps(spec.act_rule, unsigned=True)
        return cls(fmt, steps, GPTQ_GAIN if gptq else 1.0)

    def cost(self, log_s: torch.Tensor, inputs: Inputs, residual: torch.Tensor) -> torch.Tensor:
        """J, differentiable in log_s (K,). residual (N, K)."""
        s = log_s.exp()
        of_act = self._noise(inputs.rows / s, self.steps) / len(inputs.rows)
        of_weight = self._noise(residual * s, torch.full_like(self.steps, WEIGHT_STEPS))
        act = of_act * self._by_group(residual.square().sum(0) * s.square())
        weight = of_weight * self._by_group(inputs.square / s.square())
        return act.sum() + self.weight_gain * weight.sum()

    def _noise(self, rows: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        return self.fmt.rounding_noise(self._by_group(rows.abs()), steps)

    def _by_group(self, channels: torch.Tensor) -> torch.Tensor:
        """(..., K) -> (..., K/group, group)"""
        return channels.unflatten(-1, (-1, self.fmt.group_size))


@dataclass(frozen=True)
class ExpectedNoise:
    """What the noise model expects of a layer without a branch: ||y - exact||^2 / ||exact||^2, scalars

    smooth      (K,) at which it was found: spans of both to the power of one half
    total       of rounding both factors
    activation  of rounding the activation alone
    """

    smooth: torch.Tensor
    total: torch.Tensor
    activation: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor, tokens: torch.Tensor, spec: LayerSpec, gptq: bool) -> "ExpectedNoise":
        """weight (N, K) float32; tokens (M, K), of which the first few are looked at"""
        inputs = Inputs.of(LayerInput.plain(tokens[: 4 * TOKENS], spec, weight.device).whole())
        smooth = from_spans(inputs.absmax, weight.abs().amax(0), 0.5, 0.5).clamp(*LIMITS)
        model = NoiseModel.of(spec, weight.device, gptq)
        power = (inputs.rows @ weight.T).square().sum(1).mean().clamp_min(1e-30)
        total, activation = (
            one.cost(smooth.log(), inputs, weight) / power for one in (model, replace(model, weight_gain=0.0))
        )
        return cls(smooth, total, activation)


def search(weights: Sequence[torch.Tensor], inputs: Inputs, spec: LayerSpec, seed: int, steps: int) -> torch.Tensor:
    """argmin of the noise model over s: the best of 33 span rules, then `steps` Adam steps on log s

    weights  (N_i, K) of every layer that reads this input; they share the result
    spec     of the layers: what they have in common, and the rank of the branch that is taken off
    returns  (K,) float32 within LIMITS of its centre
    """
    rows = torch.cat([weight.float() for weight in weights])
    rows = rows[:: -(-len(rows) // ROWS)]
    model = NoiseModel.of(spec, rows.device, gptq=True)
    root_x, root_w = inputs.square.sqrt(), rows.square().mean(0).sqrt()
    spans = ((inputs.absmax, rows.abs().amax(0)), (root_x, root_w), (inputs.absmax, root_w))

    def tried(s: torch.Tensor) -> tuple[float, torch.Tensor, torch.Tensor]:
        rest = _rest(rows, s, spec.rank, seed)
        return model.cost(s.log(), inputs, rest).item(), s, rest

    rules = (_centred(from_spans(act, weight, a, b)) for act, weight in spans for a, b in EXPONENTS)
    _, s, rest = min(map(tried, rules), key=itemgetter(0))
    for _ in range(2 if steps else 0):  # the branch is refreshed once, half way
        s = _descend(s, model, inputs, rest, steps // 2)
        rest = _rest(rows, s, spec.rank, seed)
    return _placed(s, inputs, spec)


def _rest(rows: torch.Tensor, s: torch.Tensor, rank: int, seed: int) -> torch.Tensor:
    """W - L / s"""
    if not rank:
        return rows
    down, up = lowrank.split(rows * s, rank, seed, power_steps=1)
    return rows - up @ (down / s[:, None]).T


def _descend(s: torch.Tensor, model: NoiseModel, inputs: Inputs, residual: torch.Tensor, steps: int) -> torch.Tensor:
    """Adam on log s with the branch held still. A host may run us in inference mode, which forbids gradients."""
    with torch.inference_mode(False), torch.enable_grad():
        own = Inputs(inputs.rows.clone(), inputs.absmax.clone(), inputs.square.clone())
        gains = replace(model, steps=model.steps.clone())
        rest = residual.clone()
        log_s = s.clone().log().requires_grad_(True)
        adam = torch.optim.Adam([log_s], lr=LEARNING_RATE)
        for _ in range(steps):
            adam.zero_grad()
            gains.cost(log_s, own, rest).clamp_min(1e-30).log().backward()
            adam.step()
        return _centred(log_s.detach().exp())


def _centred(s: torch.Tensor) -> torch.Tensor:
    """s within LIMITS of geometric mean 1; the noise model does not see a common factor."""
    log = s.log()
    return (log - log.mean()).exp().clamp(*LIMITS)


def _placed(s: torch.Tensor, inputs: Inputs, spec: LayerSpec) -> torch.Tensor:
    """Where activations have a range: s times a common factor, which the weight's own scales undo

    It puts the median channel near 1, or as much lower, up to a limit, as the largest activation needs to fit.
    """
    if spec.fmt.act_range is None:
        return s
    typical, largest = (inputs.square.sqrt() / s).median(), (inputs.absmax / s).amax()
    typical = torch.where(typical > 0, typical, 1)
    needed = largest / typical / spec.fmt.act_range[1]
    factor = typical * needed.clamp(1, MOST_RAISED)
    return s * factor.clamp(FP16[0] / s.amin(), FP16[1] / s.amax())


def out_of_range(s: torch.Tensor, inputs: Inputs, fmt: Format) -> str | None:
    """What to say of activations that leave the format's range after smoothing, or None."""
    if fmt.act_range is None:
        return None
    least, most = fmt.act_range
    largest = (inputs.absmax / s).amax().item()
    if largest > most:
        return f"activations reach {largest:.3g} after smoothing; {fmt.name} cuts them to {most:g}"
    usual = (inputs.rows / s).abs().reshape(len(inputs.rows), -1, fmt.group_size).amax(-1).median().item()
    if 0 < usual < least:
        return (
            f"half of the groups of activations are below {usual:.3g} after smoothing; {fmt.name} is exact from "
            f"{least:.3g}"
        )
    return None
