"""What bench_linear.py measures: layer shapes of real models, ways to compute them, and the check each has to pass."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)

from svdquant_pack.kernels import FORMATS, Layer, LayerSpec
from svdquant_pack.kernels.backends import Backend, KernelCall, discover, kitchen
from svdquant_pack.kernels.backends.reference import linear as reference
from svdquant_pack.kernels.dispatch import arch_of, fault_of
from svdquant_pack.kernels.stages import Coding
from svdquant_pack.quantize.cli.tune import MODULATION_SHAPES, SHAPES

ROWS = (1, 16, 64, 256, 1024, 4608, 9216)
RANK = 32
MODES = ("w4a4", "w4a8", "w8a8", "w4a8-jit", "fp8", "w16", "w4a16")
EMULATED = ("w4a8", "w8a8", "w4a8-jit", "fp8", "w4a16")  # the reference computes these in float32, as a definition
CHECKED_ROWS = 32  # at the start and at the end
TOLERANCE = 0.02  # relative; see kernels/self_test.py

QUICK = {"flux": {"attn.proj": (3072, 3072)}, "sdxl": {"to_q": (1280, 1280), "ff.2": (1280, 5120)}}
QUICK_ROWS = (1, 256, 1024)


@dataclass(frozen=True)
class Case:
    """One layer at one number of rows."""

    model: str
    name: str
    format: str
    m: int
    n: int
    k: int


def cases(quick: bool, models: list[str], rows: list[int], formats: list[str]) -> Iterator[Case]:
    """Most informative first: the largest row counts of the first model."""
    shapes = QUICK if quick else SHAPES
    for m in sorted(rows, key=lambda m: (m != 4608, -m)):
        for model in models or shapes:
            for name, (n, k) in shapes.get(model, {}).items():
                for format in formats:
                    yield Case(model, name, format, m, n, k)
    for model in models or MODULATION_SHAPES:
        for name, (n, k) in ({} if quick else MODULATION_SHAPES).get(model, {}).items():
            for m in (1, 2):
                yield Case(model, name, "awq_w4a16", m, n, k)


@dataclass(frozen=True)
class Data:
    """Tensors of a case on one device. `dense` is the 16-bit weight that the layer stands for"""

    x: torch.Tensor
    layer: Layer
    bias: torch.Tensor
    dense: torch.Tensor
    exact: torch.Tensor  # x @ dense.T + bias of the checked rows, float32

    @property
    def checked(self) -> torch.Tensor:
        """The rows that are compared."""
        return checked_rows(self.x)


def checked_rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.shape[0] <= 2 * CHECKED_ROWS else torch.cat((x[:CHECKED_ROWS], x[-CHECKED_ROWS:]))


def make_data(case: Case, device: torch.device, dtype: torch.dtype) -> Data:
    """A layer with outlier channels, as activations of transformers have them; the same numbers each run."""
    generator = torch.Generator(device).manual_seed(case.n + case.k)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    fmt = FORMATS[case.format]
    spread = (0.5 * normal(case.k)).exp()
    x = (normal(case.m, case.k) * spread).to(dtype)
    tensors = dict(fmt.encode_weight(normal(case.n, case.k) / case.k**0.5, torch.bfloat16))
    rank = RANK if fmt.low_rank else 0
    if fmt.low_rank:
        tensors["smooth_factor"] = spread.sqrt().to(torch.bfloat16)
        tensors["proj_down"] = (normal(case.k, rank) / case.k**0.5).to(torch.bfloat16)
        tensors["proj_up"] = (normal(case.n, rank) / rank**0.5).to(torch.bfloat16)
    layer = Layer(LayerSpec(case.format, case.n, case.k, rank), tensors)
    bias = normal(case.n).to(dtype)
    dense = layer.dense_weight()
    exact = checked_rows(x).float() @ dense.T + bias.float()
    return Data(x, layer, bias, dense.to(dtype), exact)


def error_of(y: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((y.float() - wanted.float()).norm() / wanted.float().norm()).item()


@dataclass(frozen=True)
class Way:
    """A way to compute a layer. `wanted` gives what its checked rows must be, within TOLERANCE"""

    backend: str
    mode: str
    run: Callable[[], torch.Tensor]
    wanted: Callable[[], torch.Tensor]
    stage: str = "layer"


def ways(case: Case, data: Data) -> Iterator[Way]:
    """The 16-bit model first, then every mode of every backend that does not refuse, then single steps."""
    x, bias = data.x, data.bias
    yield Way("torch", "16bit", lambda: F.linear(x, data.dense, bias), lambda: data.exact)
    wide = [tensor.float() for tensor in (x, data.dense, bias)]
    yield Way("torch", "32bit", lambda: F.linear(*wide), lambda: data.exact)
    arch, capability = arch_of(x.device)
    for backend in discover()[0].values():
        for mode in MODES:
            call = KernelCall(case.format, x.device, x.dtype, mode, capability, arch, case.m)
            if backend.name == "reference" and (mode in EMULATED or x.device.type != "cpu"):
                continue
            if not isinstance(backend.claims(call), str) and fault_of(backend, call) is None:
                yield _layer_way(backend, mode, data)
    if x.device.type == "cuda":
        if capability is not None and capability > kitchen.LAST and case.format == "int4" and kitchen.missing() is None:
            yield _layer_way(kitchen.BACKEND, "w4a4", data)  # it runs there, though nobody would choose it
        yield from _guarded(_vendor_ways(data))
        yield from _guarded(_steps(data))


def _guarded(found: Iterator[Way]) -> Iterator[Way]:
    """What cannot even be prepared on this GPU is left out, with its reason."""
    try:
        yield from found
    except Exception as failure:  # a compiler or driver fault has any type
        print(f"   left out: {type(failure).__name__}: {str(failure)[:200]}", flush=True)


def _layer_way(backend: Backend, mode: str, data: Data) -> Way:
    def run() -> torch.Tensor:
        return backend.linear(data.x, data.layer, data.bias, None, mode)

    def wanted() -> torch.Tensor:
        return reference(data.checked, data.layer, data.bias, None, mode)

    return Way(backend.name, mode, run, wanted)


def _vendor_ways(data: Data) -> Iterator[Way]:
    """torch's own 8-bit products on weights that were expanded beforehand, without branch: the fastest they can be."""
    from svdquant_pack.kernels.backends.triton import launch, layers

    x, layer = data.x, data.layer
    if not layer.spec.fmt.low_rank or x.shape[0] <= 16:
        return
    for name, codes, dtype in (("_int_mm", "int8_row", torch.int8), ("_scaled_mm", "fp8_row", torch.float8_e4m3fn)):
        if dtype != torch.int8 and (x.device.type != "cuda" or torch.cuda.get_device_capability(x.device) < (8, 9)):
            continue
        weight, scales = layers.expander(layer, dtype)(layer)
        act, act_scales, _ = launch.quantize(x, None, None, Coding(codes))
        # of the codes: rounding an activation that is not smoothed is no fault of the product
        exact = (checked_rows(act).float() * checked_rows(act_scales)[:, None]) @ (weight.float() * scales[:, None]).T

        def run(name=name, act=act, act_scales=act_scales, weight=weight, scales=scales) -> torch.Tensor:
            if name == "_int_mm":
                return torch._int_mm(act, weight.t()).float() * act_scales[:, None] * scales
            return torch._scaled_mm(
                act, weight.t(), scale_a=act_scales[:, None], scale_b=scales[None], out_dtype=torch.bfloat16
            )

        yield Way("torch", name, run, lambda exact=exact: exact, "product")


def _steps(data: Data) -> Iterator[Way]:
    """Quantization with the down-projection, expansion, and the product alone, by Triton's kernels."""
    from svdquant_pack.kernels.backends.triton import launch, layers

    x, layer, spec = data.x, data.layer, data.layer.spec
    if not spec.fmt.low_rank:
        return
    down, up = layer["proj_down"], layer["proj_up"]
    for codes in ("int8_row", "int8_group"):

        def quantize(codes=codes) -> torch.Tensor:
            return layers.quantizer(x, layer, codes)(x, layer, None)[1]

        yield Way("triton", codes, quantize, lambda: data.checked.float() @ down.float(), "quantize+down")
    weight, scales = layers.expander(layer, torch.int8)(layer)
    coded, branch_act = layers.quantizer(x, layer, "int8_row")(x, layer, None)
    act, act_scales = coded
    epilogue = launch.Epilogue(branch_act, up, bias=data.bias)

    def expand() -> torch.Tensor:
        return layers.expander(layer, torch.int8)(layer)[0]

    def product() -> torch.Tensor:
        return launch.multiply_w8(coded, weight, scales, epilogue, x.dtype)

    def exact() -> torch.Tensor:
        rows, row_scales, columns = (checked_rows(side).double() for side in (act, act_scales, branch_act))
        y = (rows @ weight.double().T) * row_scales[:, None] * scales.double()
        return (y + columns @ up.double().T + data.bias.double()).float()

    wanted = spec.fmt.expand_rows(layer.tensors)[0]
    yield Way("triton", "int8", expand, lambda: checked_rows(wanted), "expand")
    yield Way("triton", "w8a8", product, exact, "product")
