"""Damaged LoRA files on a real 4-bit model: finite pictures, the host's own refusal or a LoraError; and no trace."""

import traceback
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("comfy.lora", reason="no ComfyUI: set COMFYUI_PATH")

from svdquant_pack.nodes.host.model import load_model, load_pinned_model
from svdquant_pack.quantize.files.checkpoint import CheckpointError
from svdquant_pack.quantize.files.tensor_file import TensorFileError
from svdquant_pack.quantize.lora.deltas import LoraError
from svdquant_pack.tests.nodes.lora_files import KINDS as LORA_KINDS
from svdquant_pack.tests.nodes.lora_files import lora_of, with_file
from svdquant_pack.tests.nodes.sampling import forward
from svdquant_pack.tests.quantize.fuzzing import fuzz, nothing_left
from svdquant_pack.tests.quantize.mutations import KINDS, File, damage, hostile

ROOT = Path(__file__).resolve().parents[2]
STRENGTHS = (1.0, 1.0, 0.5, -0.25, 0.0, 2.0, float("nan"), float("inf"))


def is_of_the_pack(error: BaseException) -> bool:
    """Whether an exception came out of our code, not of the host that we were called by or that we call."""
    file = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    # in a clone, `make test` keeps the host and the packages in hidden folders of the pack's own
    return file.is_relative_to(ROOT) and not file.relative_to(ROOT).parts[0].startswith(".")


def test_a_damaged_lora_is_applied_whole_or_refused(checkpoints, tmp_path, record_property):
    import comfy.utils

    plain = load_model(str(checkpoints["int4"]), compute="w16")
    layers = plain.packed_layers()
    weights = {key: module.packed.layer(module.weight.detach()).dense_weight() for key, module in layers.items()}
    some = dict(list(weights.items())[:6])
    path, target = tmp_path / "lora.safetensors", tmp_path / "damaged.safetensors"
    save_file(lora_of(LORA_KINDS, some), path)
    before = forward(plain)

    def check(rng: Random) -> tuple[str, list[str]]:
        file = File(path)
        done = damage(file, rng, list(file.header), list(KINDS))
        file.write(target)
        strength = rng.choice(STRENGTHS)
        try:
            lora = comfy.utils.load_torch_file(str(target), safe_load=True)
            patched = with_file(plain, lora, strength)
            patched.layer_loras()
            if not rng.randrange(4):
                y = forward(patched)
                assert y.isfinite().all(), f"the picture is not finite ({done}, {strength})"
        except LoraError:
            return "refused", done
        except AssertionError:
            raise
        except Exception as error:
            assert not is_of_the_pack(error), f"{''.join(traceback.format_exception(error))[-1500:]} ({done})"
            return "refused by the host", done
        return "applied", done

    with nothing_left(tmp_path):
        record_property("figures", fuzz("LoRA", 120, check, path.stat().st_size))
        target.unlink()
    assert torch.equal(forward(plain), before)


def test_a_damaged_configuration_of_a_model_is_refused_or_builds_it(checkpoints, demo_file, tmp_path, record_property):
    """What a file pins of the host's model: header and `config`, of 4-bit and of 16-bit files."""
    target = tmp_path / "damaged.safetensors"
    sources = {checkpoints["int4"]: ("svdquant", "unet_config"), Path(demo_file): ("config",)}

    def check(rng: Random) -> tuple[str, list[str]]:
        path = rng.choice(list(sources))
        key = rng.choice(sources[path])
        file = File(path)
        file.metadata[key] = hostile(file.metadata[key], rng)
        file.write(target)
        try:
            (load_model if path == checkpoints["int4"] else load_pinned_model)(str(target))
        except (CheckpointError, TensorFileError) as error:
            assert target.name in str(error), error
            return "refused", [key]
        return "built", [key]

    with nothing_left(tmp_path):
        record_property("figures", fuzz("model configuration", 40, check, 4 * checkpoints["int4"].stat().st_size))
        target.unlink()
