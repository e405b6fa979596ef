"""The E2M1 conversion of Blackwell GPUs, as PTX defines it, gives the codes and values of the format."""

import re
from fractions import Fraction

import pytest
import torch

from svdquant_pack.kernels.formats.nvfp4 import E2M1, from_e2m1, to_e2m1

codes = pytest.importorskip("svdquant_pack.kernels.backends.triton.codes")
PAIRS = 4  # to a 32-bit register


def converted(value: float) -> int:
    """cvt.rn.satfinite to e2m1 (PTX ISA, "cvt"): nearest, of two the one whose mantissa bit is even, at most 6."""
    sign = 8 if torch.tensor(value).signbit() else 0
    exact = [abs(Fraction(magnitude) - abs(Fraction(value))) for magnitude in E2M1]
    return sign | min(range(8), key=lambda code: (exact[code], code & 1))


def run(text: str, inputs: list[float]) -> dict[str, object]:
    """The registers after the PTX of one call, $9... holding the inputs; only what is used there is known here."""
    registers: dict[str, object] = {f"${9 + index}": value for index, value in enumerate(inputs)}
    for line in map(str.strip, text.strip("{}").split(";")):
        if not line or line.startswith(".reg"):
            continue
        operation, rest = line.split(" ", 1)
        target, *sources = re.findall(r"\{[^}]*\}|[^,\s]+", rest)
        if operation == "add.rn.f32":
            registers[target] = (torch.tensor(registers[sources[0]]) + torch.tensor(0.0)).item()
            assert sources[1] == "0f00000000"
        elif operation == "cvt.rn.satfinite.e2m1x2.f32":  # the first operand goes into the upper four bits
            high, low = (converted(registers[source]) for source in sources)
            registers[target] = high << 4 | low
        elif operation == "cvt.rn.f16x2.e2m1x2":  # the upper four bits into the upper half
            byte = registers[sources[0]]
            registers[target] = [from_e2m1(torch.tensor(nibble)).item() for nibble in (byte & 15, byte >> 4)]
        elif operation == "cvt.f32.f16":
            registers[target] = registers[sources[0]]
        elif target.startswith("{"):  # mov.b32: the first element is the lowest
            registers |= zip(re.findall(r"\w+", target), registers[sources[0]], strict=True)
        else:
            registers[target] = [registers[name] for name in re.findall(r"\w+", sources[0])]
    return registers


def numbers() -> torch.Tensor:
    """Codes, the middles between them, their neighbours, both zeros, the ends, and some of all magnitudes."""
    grid = torch.tensor(E2M1)
    points = torch.cat((grid, (grid[1:] + grid[:-1]) / 2, torch.tensor([2.0**-149, 7.0, 448.0, 3e38])))
    near = [torch.nextafter(points, torch.full_like(points, side)) for side in (-torch.inf, torch.inf)]
    spread = torch.randn(400, generator=torch.Generator().manual_seed(0)) * 3
    found = torch.cat((points, *near, spread))
    found = torch.cat((found, -found))
    return found[: len(found) // (2 * PAIRS) * (2 * PAIRS)]


def test_the_conversion_is_the_formats_rounding():
    """Rounding is monotone: with every middle and its neighbours right, all between them are."""
    values = numbers()
    assert values.signbit()[values == 0].any() and len(values) > 800
    expected = to_e2m1(values)
    text = codes.E2M1_PAIRS.value
    for start in range(0, len(values), 2 * PAIRS):
        even, odd = values[start : start + PAIRS], values[start + PAIRS : start + 2 * PAIRS]
        registers = run(text, [*even.tolist(), *odd.tolist()])
        low, high = expected[start : start + PAIRS], expected[start + PAIRS : start + 2 * PAIRS]
        assert registers["$0"] == (high << 4 | low).tolist()
        decoded = [registers[f"${1 + index}"] for index in range(2 * PAIRS)]
        assert decoded == from_e2m1(torch.cat((low, high))).tolist()
