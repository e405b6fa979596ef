"""Which backend runs a call, and why the others do not."""

from dataclasses import dataclass

import torch

from .backends import Backend, Call, discover

COMPUTES = ("auto", "w4a4", "w16")
AUTO = ("w4a4", "w16")  # what `auto` tries, best first


@dataclass(frozen=True)
class Choice:
    """The backend that runs a layer, the compute mode, and one reason per backend that does not."""

    backend: Backend
    compute: str
    passed_over: dict[str, str]


def choose(format: str, device: torch.device, dtype: torch.dtype, compute: str = "auto") -> Choice:
    """The willing backend of the highest priority. Raises ValueError with every reason if there is none."""
    if compute not in COMPUTES:
        raise ValueError(f"compute is {compute!r}, known are {', '.join(COMPUTES)}")
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    backends, absent = discover()
    reasons = dict(absent)
    for mode in AUTO if compute == "auto" else (compute,):
        call = Call(format, device, dtype, mode, capability)
        for backend in sorted(backends.values(), key=lambda backend: -backend.priority):
            reason = backend.refuses(call)
            if reason is None:
                return Choice(backend, mode, reasons)
            reasons[backend.name] = reason
    lines = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise ValueError(f"no kernel backend runs {format} on {device} in {dtype} with compute={compute}: {lines}")
