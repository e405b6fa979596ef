"""Bridge: while a model loads, what is not known of its layers' rivals on this device is measured, once."""

import logging
import time

import comfy.model_management
import comfy.utils
import torch

from ...kernels.rivals import ROOM, measure, missing
from ...quantize.files.lifecycle import write_whole
from .patcher import SVDQuantPatcher

log = logging.getLogger("svdquant")


def measure_layers(patcher: SVDQuantPatcher, dtype: torch.dtype) -> None:
    """Compare all ways to compute the layers of a model, where that is not on disk yet. Nothing else runs meanwhile."""
    device = patcher.load_device
    specs = [module.four_bit.spec for module in patcher.packed_layers().values()]
    wanted = missing(specs, device, dtype)
    if not wanted:
        return
    log.info("measuring which kernels are the fastest for %d kinds of layers, once", len(wanted))
    comfy.model_management.free_memory(ROOM, device)
    bar, start = comfy.utils.ProgressBar(len(wanted)), time.perf_counter()

    def say(done: int, total: int, what: str) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done)

    try:
        found = measure(wanted, device, dtype, write_whole, say)
    except (RuntimeError, ValueError, OSError) as error:  # out of memory is one, a full disk another
        log.warning("kernels were not measured, the tables decide: %s", error)
    else:
        rivals = sum(each.chosen != each.tabled for each in found)
        seconds = time.perf_counter() - start
        log.info("measured in %.1f s: for %d of %d kinds other kernels than usual", seconds, rivals, len(found))
