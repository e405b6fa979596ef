"""A user's LoRAs on one 4-bit layer: the layer's branch, and how it joins the layer's output.

    W' = diag(rows) @ W @ diag(cols) + sum_i scale_i * delta_i

`rows` and `cols` exist only under DoRA and merges that scale the weight. The deltas are columns of the low-rank branch,
or Kronecker products where columns would be wider than the weight. The 4-bit weight itself is never touched.
"""

from dataclasses import dataclass, field

import torch

from ...kernels.layer import LayerSpec
from ...kernels.stages import branch as low_rank
from ..linear import LowRank, PackedLinear
from .terms import WIDTH, Columns, Kron, LoraError, scaled

__all__ = ["Branch", "LoadedBranch", "LoraError"]


@dataclass(frozen=True, eq=False)
class Branch:
    """Everything the active LoRAs do to one layer.

    parts   the deltas at strength 1; shared between branches that differ in strength alone
    scales  one factor per part
    rows    (N,) or None: factor of every output channel of W
    cols    (K,) or None: factor of every input channel of W
    shift   (N,) or None: what a layer with unsigned activations keeps in its bias for their shift; needed beside `rows`
    """

    parts: tuple[Columns | Kron, ...]
    scales: tuple[float, ...]
    rows: torch.Tensor | None = None
    cols: torch.Tensor | None = None
    shift: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """Columns, padding included."""
        return sum(part.rank for part in self.parts if isinstance(part, Columns))

    @property
    def numel(self) -> int:
        """Numbers that lie on the layer's device while it runs."""
        found = sum([part.numel for part in self.parts])
        if self.rows is not None or self.cols is not None:
            found += sum(vector.numel() for vector in (self.rows, self.cols, self.shift) if vector is not None)
        return found

    def columns(self, spec: LayerSpec) -> LowRank:
        """(lora_down, lora_up) of all column parts, strengths folded in, float32."""
        pairs = [(part, scale) for part, scale in zip(self.parts, self.scales, strict=True) if part.rank]
        if not pairs:
            return torch.zeros(spec.k, 0), torch.zeros(spec.n, 0)
        return torch.cat([p.down.float() for p, _ in pairs], 1), torch.cat([p.up.float() * s for p, s in pairs], 1)

    def dense_weight(self, base: torch.Tensor) -> torch.Tensor:
        """W' (N, K) float32 of the layer whose dense weight W is `base`."""
        weight = scaled(base.float(), self.rows, self.cols)
        for part, scale in zip(self.parts, self.scales, strict=True):
            weight = weight + scale * part.dense(*base.shape).to(base.device)
        return weight

    def on(self, device: torch.device, dtype: torch.dtype) -> "LoadedBranch":
        """This branch on a device."""
        wide = [part for part in self.parts if isinstance(part, Columns)]
        down, up = (
            _cat([getattr(part, name) for part in wide], device, dtype) if wide else None for name in ("down", "up")
        )
        krons = tuple(part.to(device, dtype) for part in self.parts if isinstance(part, Kron))
        return LoadedBranch(self, down, up, krons, device, dtype)


def _cat(factors: list[torch.Tensor], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    moved = [factor.to(device=device, dtype=dtype) for factor in factors]
    return moved[0] if len(moved) == 1 else torch.cat(moved, 1)


@dataclass(eq=False)
class LoadedBranch:
    """A Branch on the device and in the dtype of the activation.

    down, up  (K, R), (N, R): the factors of all column parts, without their strengths; None where there are none
    krons     the Kronecker parts, without their strengths
    strength  (R/16,) float32: a factor for each 16 columns; None where all are 1
    """

    branch: Branch
    down: torch.Tensor | None
    up: torch.Tensor | None
    krons: tuple[Kron, ...]
    device: torch.device
    dtype: torch.dtype
    strength: torch.Tensor | None = field(init=False)
    _blocks: torch.Tensor = field(init=False)
    _vectors: dict[str, torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        blocks = 0 if self.down is None else self.down.shape[1] // WIDTH
        self._blocks = torch.empty(blocks, device=self.device, dtype=torch.float32)
        self.follow(self.branch)

    def follow(self, branch: Branch) -> None:
        """Take over the strengths of a branch that `fits`: one small vector changes in place, no factor."""
        self.branch, self.strength, self._vectors = branch, None, {}
        scales = branch.scales
        if self.down is not None and len(set(scales)) == 1:  # filled on the device, nothing is sent there
            self.strength = None if scales[0] == 1 else self._blocks.fill_(scales[0])
        elif self.down is not None:
            vector = [s for p, s in zip(branch.parts, scales, strict=True) for _ in range(p.rank // WIDTH)]
            self.strength = None if set(vector) == {1} else self._blocks.copy_(torch.tensor(vector))
        if branch.rows is None and branch.cols is None:
            return
        vectors = {"rows": branch.rows, "cols": branch.cols, "shift": branch.shift}
        self._vectors = {n: v.to(device=self.device, dtype=self.dtype) for n, v in vectors.items() if v is not None}

    def fits(self, branch: Branch) -> bool:
        """Whether the factors here are those of `branch`."""
        mine, other = self.branch.parts, branch.parts
        return mine is other or (len(mine) == len(other) and all(a is b for a, b in zip(mine, other, strict=True)))

    def _beside(self, x: torch.Tensor) -> torch.Tensor:
        """(x @ down * strength) @ up.T, for a layer whose kernel cannot hold the columns"""
        return low_rank(x @ self.down, self.up, self.strength)

    def forward(
        self, packed: PackedLinear, x: torch.Tensor, blob: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """x @ W'.T + bias; the columns run inside the 4-bit kernel, everything else beside it."""
        vectors = self._vectors
        if "rows" in vectors or "cols" in vectors:
            y = packed.forward(x * vectors["cols"] if "cols" in vectors else x, blob, bias, None)
            if "rows" in vectors:
                y = y * vectors["rows"]
                if bias is not None:  # the factor is the weight's: the bias inside y must not have it
                    pure = bias + vectors["shift"] if "shift" in vectors else bias
                    y = y + (1 - vectors["rows"]) * pure
            if self.down is not None:
                y = y + self._beside(x)
        else:
            lora = None if self.down is None else (self.down, self.up)
            y = packed.forward(x, blob, bias, lora, self.strength)
        scales = [s for part, s in zip(self.branch.parts, self.branch.scales, strict=True) if isinstance(part, Kron)]
        for kron, scale in zip(self.krons, scales, strict=True):
            y = kron.add_to(y, x, scale)
        return y
