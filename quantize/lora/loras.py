"""A user's LoRAs on one 4-bit layer, and how they join the layer's output.

    W' = diag(rows) @ W @ diag(cols) + sum_i scale_i * delta_i

`rows` and `cols` exist only under DoRA and patches that scale the weight. The deltas are columns, which one kernel runs
together with those of the layer's low-rank branch, or Kronecker products where columns would be wider than the weight.
The 4-bit weight itself is never touched.
"""

from dataclasses import dataclass, field

import torch

from ...kernels.layer import RANK_TILE, Layer, LayerSpec, Lora
from ...kernels.stages import low_rank
from ..linear import LowRank, PackedLinear
from .deltas import Columns, Delta, Kron, placed, scaled


@dataclass(frozen=True, eq=False)
class LayerLoras:
    """Everything the active LoRAs do to one layer.

    deltas  at strength 1; shared between objects that differ in strength alone
    scales  one factor per delta
    rows    (N,) or None: factor of every output channel of W
    cols    (K,) or None: factor of every input channel of W
    shift   (N,) or None: what a layer with unsigned activations keeps in its bias for their shift; needed beside `rows`

        >>> change = Columns(down=torch.ones(64, 16), up=torch.ones(32, 16))  # 16 everywhere
        >>> loras = LayerLoras((change,), scales=(0.5,))
        >>> loras.rank, loras.dense_weight(torch.zeros(32, 64))[0, :3]
        (16, tensor([8., 8., 8.]))
    """

    deltas: tuple[Delta, ...]
    scales: tuple[float, ...]
    rows: torch.Tensor | None = None
    cols: torch.Tensor | None = None
    shift: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """Columns, padding included."""
        return sum(delta.rank for delta in self.deltas)

    @property
    def numel(self) -> int:
        """Numbers that lie on the layer's device while it runs."""
        numbers = sum([delta.numel for delta in self.deltas])
        if self.rows is not None or self.cols is not None:
            numbers += sum(vector.numel() for vector in (self.rows, self.cols, self.shift) if vector is not None)
        return numbers

    def columns(self, spec: LayerSpec) -> LowRank:
        """(lora_down, lora_up) of all deltas that are columns, strengths folded in, float32."""
        pairs = [(d, scale) for d, scale in zip(self.deltas, self.scales, strict=True) if isinstance(d, Columns)]
        if not pairs:
            return torch.zeros(spec.k, 0), torch.zeros(spec.n, 0)
        return torch.cat([d.down.float() for d, _ in pairs], 1), torch.cat([d.up.float() * s for d, s in pairs], 1)

    def dense_weight(self, base: torch.Tensor) -> torch.Tensor:
        """W' (N, K) float32 of the layer whose dense weight W is `base`."""
        weight = scaled(base.float(), self.rows, self.cols)
        n, k = base.shape
        for delta, scale in zip(self.deltas, self.scales, strict=True):
            weight = weight + scale * delta.dense(n, k).to(base.device)
        return weight

    def on(self, device: torch.device, dtype: torch.dtype) -> "LoadedLoras":
        """These LoRAs on a device."""
        wide = [delta for delta in self.deltas if isinstance(delta, Columns)]
        down = _cat([delta.down for delta in wide], device, dtype) if wide else None
        up = _cat([delta.up for delta in wide], device, dtype) if wide else None
        krons = tuple(delta.to(device, dtype) for delta in self.deltas if isinstance(delta, Kron))
        numbers = torch.empty(self.rank // RANK_TILE + len(krons), device=device, dtype=torch.float32)
        loaded = LoadedLoras(
            self, down, up, krons, numbers[: self.rank // RANK_TILE], numbers[self.rank // RANK_TILE :], dtype
        )
        loaded.follow(self)
        return loaded


def _cat(factors: list[torch.Tensor], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    moved = [placed(factor, device, dtype) for factor in factors]
    return moved[0] if len(moved) == 1 else torch.cat(moved, 1)


@dataclass(eq=False)
class LoadedLoras:
    """LayerLoras on the device and in the dtype of the activation.

    down, up  (K, R), (N, R): the factors of all columns, without their strengths; None where there are none
    krons     the Kronecker products, without their strengths
    strength  (R / RANK_TILE,) float32: a factor for each tile of columns. Also where all are 1: whoever compiles or
              captures a call finds the same tensor at every strength
    scales    (len(krons),) float32: a factor for each Kronecker product
    vectors   rows, cols and shift of `loras`, as far as there are any
    """

    loras: LayerLoras
    down: torch.Tensor | None
    up: torch.Tensor | None
    krons: tuple[Kron, ...]
    strength: torch.Tensor
    scales: torch.Tensor
    dtype: torch.dtype
    vectors: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.strength.device

    def follow(self, loras: LayerLoras) -> None:
        """Take over the strengths of LoRAs that `fit`: two small vectors change in place, no factor."""
        self.loras, self.vectors = loras, {}
        pairs = list(zip(loras.deltas, loras.scales, strict=True))
        _fill(self.strength, [scale for delta, scale in pairs for _ in range(delta.rank // RANK_TILE)])
        _fill(self.scales, [scale for delta, scale in pairs if isinstance(delta, Kron)])
        if loras.rows is None and loras.cols is None:
            return
        vectors = {"rows": loras.rows, "cols": loras.cols, "shift": loras.shift}
        self.vectors = {n: placed(v, self.device, self.dtype) for n, v in vectors.items() if v is not None}

    def beside(self, x: torch.Tensor) -> "LoadedLoras":
        """The same on the device and in the dtype of x, for one call. No strength becomes a constant of it."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return placed(tensor, x.device, x.dtype)

        down, up = (None if factor is None else move(factor) for factor in (self.down, self.up))
        krons = tuple(kron.to(x.device, x.dtype) for kron in self.krons)
        numbers = self.strength.to(x.device), self.scales.to(x.device)
        vectors = {name: move(vector) for name, vector in self.vectors.items()}
        return LoadedLoras(self.loras, down, up, krons, *numbers, x.dtype, vectors)

    def fits(self, loras: LayerLoras) -> bool:
        """Whether the factors here are those of `loras`. Made in inference mode they are of no use outside it."""
        if self.strength.is_inference() and not torch.is_inference_mode_enabled():
            return False
        mine, other = self.loras.deltas, loras.deltas
        return mine is other or (len(mine) == len(other) and all(a is b for a, b in zip(mine, other, strict=True)))

    def forward(
        self, packed: PackedLinear, x: torch.Tensor, blob: torch.Tensor | Layer, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """x @ W'.T + bias; the columns run inside the 4-bit kernel, everything else beside it."""
        vectors = self.vectors
        if "rows" in vectors or "cols" in vectors:
            y = packed.forward(x * vectors["cols"] if "cols" in vectors else x, blob, bias, None)
            if "rows" in vectors:
                y = y * vectors["rows"]
                if bias is not None:  # the factor is the weight's: the bias inside y must not have it
                    pure = bias + vectors["shift"] if "shift" in vectors else bias
                    y = y + (1 - vectors["rows"]) * pure
            if self.down is not None and self.up is not None:  # (x @ down * strength) @ up.T; `cols` are not theirs
                y = y + low_rank(x @ self.down, self.up, self.strength)
        else:
            lora = None if self.down is None or self.up is None else Lora(self.down, self.up, self.strength)
            y = packed.forward(x, blob, bias, lora)
        for i, kron in enumerate(self.krons):
            y = kron.add_to(y, x, self.scales[i : i + 1])
        return y


def _fill(vector: torch.Tensor, numbers: list[float]) -> None:
    if len(set(numbers)) == 1:
        vector.fill_(numbers[0])  # on the device, nothing is sent there
    elif numbers:
        vector.copy_(torch.tensor(numbers))
