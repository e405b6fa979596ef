"""Record which rows of ComfyUI's tensors Diffusers has under which names, by Diffusers' own conversion functions.

    pip install diffusers==0.36.0 && python tests/golden/record_diffusers_names.py

Every tensor of a tiny model (tests/quantize/golden_keys) is filled with numbers that say which tensor and row they
are, and goes through the function that Diffusers converts original checkpoints with. Sizes that stand in those
functions as numbers are replaced by the tiny model's. Where Diffusers expects the names of the first release of a
model, those are put in before.
"""

import importlib.util
import inspect
import json
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROW = 100_000
MODELS = {  # golden_keys -> function, what to replace in its source
    "auraflow": ("convert_auraflow_transformer_checkpoint_to_diffusers", {}),
    "chroma": ("convert_chroma_transformer_checkpoint_to_diffusers", {"3072": ("img_in.weight", 0)}),
    "flux": ("convert_flux_transformer_checkpoint_to_diffusers", {"3072": ("img_in.weight", 0)}),
    "flux2": ("convert_flux2_transformer_checkpoint_to_diffusers", {}),
    "hunyuan_video": ("convert_hunyuan_video_transformer_to_diffusers", {"3072": ("img_in.proj.weight", 0)}),
    "ltxv": ("convert_ltx_transformer_checkpoint_to_diffusers", {}),
    "lumina2": (
        "convert_lumina2_to_diffusers",
        {"2304": ("layers.0.attention.out.weight", 1), "768": ("layers.0.attention.k_rows", 0)},
    ),
    "sd3": ("convert_sd3_transformer_checkpoint_to_diffusers", {}),
    "wan_i2v": ("convert_wan_transformer_to_diffusers", {}),
    "wan_t2v": ("convert_wan_transformer_to_diffusers", {}),
    "wan_vace": ("convert_wan_transformer_to_diffusers", {}),
    "z_image": ("convert_z_image_transformer_checkpoint_to_diffusers", {}),
}
FIRST_RELEASE = {
    "hunyuan_video": [
        *((f"{kind}_attn.{old}.", f"{kind}_attn_{old}.") for kind in ("img", "txt") for old in ("qkv", "proj")),
        *((f"{kind}_mlp.{i}.", f"{kind}_mlp.fc{i // 2 + 1}.") for kind in ("img", "txt") for i in (0, 2)),
        *(
            (f"{kind}_attn.norm.{w}_norm.scale", f"{kind}_attn_{w[0]}_norm.weight")
            for kind in ("img", "txt")
            for w in ("query", "key")
        ),
        *((f".norm.{w}_norm.scale", f".{w[0]}_norm.weight") for w in ("query", "key")),
        ("_mod.lin.", "_mod.linear."),
        ("modulation.lin.", "modulation.linear."),
        ("self_attn.qkv.", "self_attn_qkv."),
        ("self_attn.proj.", "self_attn_proj."),
        (".mlp.0.", ".mlp.fc1."),
        (".mlp.2.", ".mlp.fc2."),
        *(
            (f"{kind}.{old}_layer.", f"{kind}.mlp.{i}.")
            for kind in ("time_in", "guidance_in", "t_embedder")
            for old, i in (("in", 0), ("out", 2))
        ),
        *((f"c_embedder.{old}_layer.", f"c_embedder.linear_{i}.") for old, i in (("in", 1), ("out", 2))),
    ]
}


def load(name: str, path: Path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tagged(shape: tuple[int, ...], number: int) -> torch.Tensor:
    rows = torch.arange(shape[0], dtype=torch.float64) + number * ROW
    return rows.view(-1, *[1] * (len(shape) - 1)).expand(shape).contiguous()


def runs(tensor: torch.Tensor, names: list[str]) -> list[list]:
    """[[ComfyUI's tensor, first row, rows], ..] in the order they lie."""
    found = []
    for value in tensor.reshape(len(tensor), -1)[:, 0].long().tolist():
        name, row = names[value // ROW], value % ROW
        if found and found[-1][0] == name and found[-1][1] + found[-1][2] == row:
            found[-1][2] += 1
        else:
            found.append([name, row, 1])
    return found


def main() -> None:
    load("conftest", HERE.parent / "conftest.py")
    load("cpu_shims", HERE.parent / "host" / "cpu_shims.py").install()
    import diffusers
    from diffusers.loaders import single_file_utils

    from svdquant_pack.tests.quantize.test_families import keys

    for model, (function, sizes) in MODELS.items():
        shapes = keys(model)
        names = list(shapes)
        tensors = {}
        for number, (name, shape) in enumerate(shapes.items()):
            for new, old in FIRST_RELEASE.get(model, ()):
                name = name.replace(new, old)
            tensors[name] = tagged(shape, number)
        source = inspect.getsource(getattr(single_file_utils, function))
        if model == "lumina2":
            width = shapes["layers.0.attention.out.weight"][1]
            rest = (shapes["layers.0.attention.qkv.weight"][0] - width) // 2
            source = source.replace("2304", str(width)).replace("768", str(rest))
        else:
            for number, (name, axis) in sizes.items():
                source = source.replace(number, str(shapes[name][axis]))
        scope = dict(vars(single_file_utils))
        exec(source, scope)  # Diffusers' own function, for a tiny model
        converted = scope[function](tensors)
        record = {
            "made_by": f"diffusers {diffusers.__version__}, {function}",
            "tensors": {name: runs(tensor, names) for name, tensor in sorted(converted.items())},
        }
        (HERE / "diffusers_names" / f"{model}.json").write_text(
            json.dumps(record, indent=None).replace("]], ", "]],\n") + "\n"
        )
        print(model, len(record["tensors"]))


if __name__ == "__main__":
    sys.exit(main())
