"""Files written by the reference packers are read bit by bit, and written back as the same bytes."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from svdquant_pack.kernels import svdquant_linear
from svdquant_pack.kernels.formats import GELU_SHIFT
from svdquant_pack.kernels.packing import sign_extend, unpack
from svdquant_pack.quantize.files import tiles as layout
from svdquant_pack.quantize.files.checkpoint import Checkpoint
from svdquant_pack.quantize.files.convert import convert_file
from svdquant_pack.quantize.files.open import open_checkpoint
from svdquant_pack.tests.quantize.golden import (
    DIFFUSERS_DOUBLE,
    DIFFUSERS_SINGLE,
    SIDECARS,
    of_kind,
    path_of,
    sha256,
    tensors_of,
)
from svdquant_pack.tests.quantize.test_layout import same_bytes

LAYERS = of_kind("svdq_linear")
MODULATIONS = of_kind("awq_w4a16")
CHECKPOINTS = of_kind("flux_checkpoint")
FEWEST = {"svdq_linear": 5, "awq_w4a16": 3, "flux_checkpoint": 2, "lowrank": 1, "lora_merge": 1}


def test_the_golden_files_are_there():
    """Without them every other test here would have no case, and pass."""
    assert {kind: len(of_kind(kind)) for kind in FEWEST} == FEWEST


def codes_of(tensors, signed: bool) -> torch.Tensor:
    nibbles = unpack(tensors["qweight"])
    return sign_extend(nibbles) if signed else nibbles


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_in_natural_order_is_the_plain_one(name):
    """Rank and size padding of the file are kept by --as-is; what lies inside is compared bit by bit."""
    plain, sidecar = tensors_of(name, "plain."), SIDECARS[name]
    n, k, rank = sidecar["N"], sidecar["K"], sidecar["rank"]
    checkpoint = open_checkpoint(path_of(name), as_is=True)
    layer, bias = checkpoint.layer("packed"), checkpoint.tensor("packed.bias")
    assert layer.spec.format == sidecar["precision"]
    group = sidecar["group"]
    assert same_bytes(codes_of(layer.tensors, sidecar["precision"] == "int4")[:n, :k], plain["codes"])
    assert same_bytes(layer["wscales"].T[:n, : k // group], plain["wscales"])
    assert same_bytes(layer["smooth_factor"][:k], plain["smooth"])
    assert same_bytes(bias[:n], plain["bias"])
    if "wtscale" in plain:
        assert same_bytes(layer["wtscale"].reshape(1), plain["wtscale"])
    if "wcscales" in plain:
        assert same_bytes(layer["wcscales"][:n], plain["wcscales"])
    if rank:
        assert same_bytes(layer["proj_down"].T[:rank, :k], plain["lora_down"])
        assert same_bytes(layer["proj_up"][:n, :rank], plain["lora_up"])
    assert layer.spec.rank == 0 or not layer["proj_down"][:, rank:].any()
    assert sha256(layer.decode_weight()[:n, :k]) == sidecar["dequant"]["sha256"]


@pytest.mark.parametrize("name", MODULATIONS)
def test_a_modulation_layer_in_natural_order_is_the_plain_one(name):
    plain, sidecar = tensors_of(name, "plain."), SIDECARS[name]
    chunks = sidecar["adanorm_splits"]
    checkpoint = open_checkpoint(path_of(name), as_is=True)
    layer = checkpoint.layer("packed")
    rows = {"codes": unpack(layer["qweight"]), "wscales": layer["wscales"].T, "bias": checkpoint.tensor("packed.bias")}
    rows["wzeros"] = layer["wzeros"].T - 8 * layer["wscales"].T.float()
    if chunks > 1:
        rows = {key: layout.deinterleave_rows(tensor, chunks) for key, tensor in rows.items()}
    for key, tensor in rows.items():
        if key == "wzeros":
            assert torch.equal(tensor, plain["wzeros"].float())
        else:
            assert same_bytes(tensor, plain[key]), key
    weight = layer.decode_weight()
    natural = weight if chunks == 1 else layout.deinterleave_rows(weight, chunks)
    assert torch.allclose(natural[:8], plain["dequant_head"], rtol=0, atol=2e-6)  # code * s + z, added in another order


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_whole_checkpoint_matches_its_recorded_canonical_form(name):
    """The recorded form keeps stored names and the 1 in modulation biases, and has rows in the model's order."""
    recorded, checkpoint = SIDECARS[name]["canonical_sha256"], open_checkpoint(path_of(name), as_is=True)
    found = {}
    for layer_name in checkpoint.specs:
        layer, chunks = checkpoint.layer(layer_name), chunks_of(layer_name)
        ours = {"codes": layer["qweight"].view(torch.uint8), "wscales": layer["wscales"].T}
        ours["bias"] = checkpoint.tensor(f"{layer_name}.bias")
        if chunks:
            zeros = layer["wzeros"].T - 8 * layer["wscales"].T.float()
            ours["wzeros"] = zeros.to(layer["wscales"].dtype)
            ours = {key: layout.deinterleave_rows(tensor, chunks) for key, tensor in ours.items()}
        else:
            ours["smooth"] = layer["smooth_factor"]
            ours |= {"lora_down": layer["proj_down"].T, "lora_up": layer["proj_up"]}
            ours |= {key: layer[key] for key in ("wcscales",) if key in layer.tensors}
            ours |= {key: layer[key].reshape(1) for key in ("wtscale",) if key in layer.tensors}
        found |= {f"{layer_name}.{key}": tensor for key, tensor in ours.items()}
    assert found.keys() == recorded.keys()
    for key, tensor in found.items():
        assert list(tensor.shape) == recorded[key]["shape"] and str(tensor.dtype) == f"torch.{recorded[key]['dtype']}"
        assert sha256(tensor) == recorded[key]["sha256"], key


def chunks_of(layer: str) -> int:
    return 6 if layer.endswith(("norm1.linear", "norm1_context.linear")) else 3 if layer.endswith("norm.linear") else 0


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_model_s_layers_are_the_stored_ones_side_by_side(name):
    """linear1 and linear2 as matrices are the joined matrices of their parts; modulation rows are in order."""
    stored, model = open_checkpoint(path_of(name), as_is=True), open_checkpoint(path_of(name))
    assert model.provenance.family == "flux" and stored.provenance.family == "generic"
    block, single = "single_transformer_blocks.0", "single_blocks.0"

    def dense(checkpoint: Checkpoint, layer: str) -> torch.Tensor:
        return checkpoint.layer(layer).dense_weight()

    for joined, parts, dim in (
        ("linear1", ("qkv_proj", "mlp_fc1"), 0),
        ("linear2", ("out_proj", "mlp_fc2"), 1),
    ):
        wanted = torch.cat([dense(stored, f"{block}.{part}") for part in parts], dim)
        assert torch.allclose(dense(model, f"{single}.{joined}"), wanted, rtol=1e-6, atol=1e-7)
    biases = [stored.tensor(f"{block}.{part}.bias").float() for part in ("out_proj", "mlp_fc2")]
    assert torch.equal(model.tensor(f"{single}.linear2.bias").float(), biases[0] + biases[1])
    spec = model.specs[f"{single}.linear2"]
    assert spec.act_unsigned == ((spec.n, spec.k) if spec.format == "int4" else (0, 0))
    for layer, host, chunks in (
        ("transformer_blocks.0.norm1.linear", "double_blocks.0.img_mod.lin", 6),
        (f"{block}.norm.linear", f"{single}.modulation.lin", 3),
    ):
        natural = layout.deinterleave_rows(dense(stored, layer), chunks)
        assert torch.equal(dense(model, host), natural)
        bias = layout.deinterleave_rows(stored.tensor(f"{layer}.bias").float(), chunks).view(chunks, -1)
        bias[list({1, chunks - 2})] -= 1
        assert torch.equal(model.tensor(f"{host}.bias"), bias.flatten())


@pytest.mark.parametrize("name", [*LAYERS, *MODULATIONS, *CHECKPOINTS])
def test_there_and_back_gives_the_same_bytes(tmp_path, name):
    natural, back = tmp_path / "natural.safetensors", tmp_path / "back.safetensors"
    convert_file(path_of(name), natural, "native", as_is=True)
    convert_file(natural, back, "nunchaku", as_is=True)
    before, after = load_file(path_of(name)), load_file(back)
    fused = SIDECARS[name].get("smooth_fused")  # then smooth_orig is not smooth, and nothing reads it
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert same_bytes(tensor, after[key]) or (fused and key.endswith("smooth_orig")), key


THROUGH = [(name, via) for name in CHECKPOINTS for via in ("native", "nunchaku", "kitchen")]


# comfy-kitchen has no NVFP4 with a low-rank branch
@pytest.mark.parametrize(
    ("name", "via"), [pair for pair in THROUGH if pair[1] != "kitchen" or SIDECARS[pair[0]]["precision"] != "nvfp4"]
)
def test_there_and_back_under_the_model_s_names_gives_the_same_bytes(tmp_path, name, via):
    middle, back = tmp_path / "middle.safetensors", tmp_path / "back.safetensors"
    convert_file(path_of(name), middle, via)
    convert_file(middle, back, "nunchaku")
    before, after = load_file(path_of(name)), load_file(back)
    assert before.keys() == after.keys()
    for key in [key for key in before if f"{key.rpartition('.')[0]}.wzeros" in before and key.endswith("s")]:
        # the packer pads the groups of modulation layers to 16, and the class that loads them has no room for more
        groups = len(after[key])
        assert not before[key][groups:].any()
        before[key] = before[key][:groups]
    different = {key for key, tensor in before.items() if not same_bytes(tensor, after[key])}
    # comfy-kitchen's zeros have 16 bits, which code * scale + zero does not always fit
    assert different == set() or (via == "kitchen" and all(key.endswith("wzeros") for key in different))


@pytest.mark.parametrize("name", [name for name in LAYERS if SIDECARS[name]["shift"]])
def test_shifted_and_unshifted_forward_agree(name):
    plain, checkpoint = tensors_of(name, "plain."), open_checkpoint(path_of(name), as_is=True)
    layer, bias = checkpoint.layer("packed"), checkpoint.tensor("packed.bias")
    n, k = layer.spec.n, layer.spec.k
    unsigned = type(layer)(type(layer.spec)("int4", n, k, layer.spec.rank, (0, k)), layer.tensors)
    unshifted = unsigned.unshifted_bias(bias)
    assert torch.allclose(unshifted.double(), plain["bias_unshifted"], rtol=0, atol=1e-6)
    x = torch.nn.functional.gelu(torch.randn(5, k, dtype=torch.float64), approximate="tanh")
    shifted = svdquant_linear(x, unsigned, bias, compute="w16")
    signed = svdquant_linear(x, layer, unshifted, compute="w16")
    assert torch.allclose(shifted, signed, rtol=0, atol=1e-6)
    branch = x @ layer["proj_down"].double() @ layer["proj_up"].double().T
    weight, smooth = layer.decode_weight().double(), layer["smooth_factor"].double()
    assert torch.allclose(shifted, (x + GELU_SHIFT) / smooth @ weight.T + branch + bias.double(), atol=1e-6)


@pytest.mark.parametrize("name", of_kind("lowrank"))
def test_low_rank_factors_and_vectors(name):
    plain, packed = tensors_of(name, "plain."), tensors_of(name, "packed.")
    for case in SIDECARS[name]["cases"]:
        key, rank, channels = case["key"], case["rank"], case["channels"]
        down, up = layout.unpack_proj_down(packed[f"{key}.down"]), layout.unpack_proj_up(packed[f"{key}.up"])
        assert same_bytes(down[:channels, :rank].T, plain[f"{key}.down"])
        assert same_bytes(up[:channels, :rank], plain[f"{key}.up"])
        assert same_bytes(layout.pack_proj_down(down), packed[f"{key}.down"])
        assert same_bytes(layout.pack_proj_up(up), packed[f"{key}.up"])
    for key in (key for key in plain if key.startswith("vector")):
        assert same_bytes(layout.unpack_vector(packed[key])[: len(plain[key])], plain[key])


@pytest.mark.parametrize("name", of_kind("lora_merge"))
def test_a_merged_lora_is_base_columns_then_lora_columns(name):
    """Checks the order of rows, columns and ranks on the reference's own merge."""
    sidecar, merged, lora = SIDECARS[name], tensors_of(name, "packed."), tensors_of(name, "lora.transformer.")
    base = open_checkpoint(path_of(sidecar["base"]), as_is=True)
    hidden, strength = sidecar["hidden"], sidecar["strength"]
    for module in sidecar["modules"]:
        down, up = _lora_of(lora, module, hidden)
        down = down * strength
        rank = down.shape[1]
        chunks = chunks_of(module)
        found = merged[f"{module}.lora_down"], merged[f"{module}.lora_up"]
        if chunks:
            found_down, found_up = found[0].T[:, :rank], layout.deinterleave_rows(found[1], chunks)[:, :rank]
        else:
            layer = base.layer(module)
            start = layer.spec.rank
            natural = layout.unpack_proj_down(found[0]), layout.unpack_proj_up(found[1])
            assert same_bytes(natural[0][:, :start], layer["proj_down"])
            assert same_bytes(natural[1][:, :start], layer["proj_up"])
            found_down, found_up = (factor[:, start : start + rank] for factor in natural)
        assert torch.equal(found_down, down) and torch.equal(found_up, up)


def _lora_of(lora: dict[str, torch.Tensor], module: str, hidden: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(down (K, r), up (N, r)) of the LoRA on one stored layer."""
    block, local = ".".join(module.split(".")[:2]), ".".join(module.split(".")[2:])
    single = block.startswith("single")
    names = {"out_proj": "attn.to_out.0", "mlp_fc1": "ff.net.0.proj", "mlp_fc2": "ff.net.2"}
    if single:
        names = {"out_proj": "proj_out", "mlp_fc2": "proj_out", "mlp_fc1": "proj_mlp"}

    def pair(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return lora[f"{block}.{name}.lora_A.weight"].T, lora[f"{block}.{name}.lora_B.weight"]

    if local == "qkv_proj":
        downs, ups = zip(*(pair(f"attn.to_{letter}") for letter in "qkv"), strict=True)
        if all(torch.equal(down, downs[0]) for down in downs):
            return downs[0], torch.cat(ups)
        return torch.cat(downs, 1), torch.block_diag(*ups)
    down, up = pair(names.get(local, local))
    if single and local in ("out_proj", "mlp_fc2"):
        down = down[:hidden] if local == "out_proj" else down[hidden:]
    return down, up


DIFFUSERS = {  # module -> what files that keep Diffusers' attention call it
    "transformer_blocks.": DIFFUSERS_DOUBLE
    | {f"norm_{name}": f"attn.norm_{name}" for name in ("q", "k", "added_q", "added_k")},
    "single_transformer_blocks.": DIFFUSERS_SINGLE | {f"norm_{name}": f"attn.norm_{name}" for name in "qk"},
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_file_under_diffusers_attention_names_is_the_same_model(name, tmp_path):
    tensors, renamed = load_file(path_of(name)), {}
    for key, tensor in tensors.items():
        start = next((start for start in DIFFUSERS if key.startswith(start)), None)
        if start is not None:
            number, _, rest = key.removeprefix(start).partition(".")
            module, _, part = rest.rpartition(".")
            key = f"{start}{number}.{DIFFUSERS[start].get(module, module)}.{part}"
        renamed[key] = tensor
    assert len(renamed.keys() - tensors.keys()) > 50
    save_file(renamed, tmp_path / "x.safetensors")
    model, other = open_checkpoint(path_of(name)), open_checkpoint(tmp_path / "x.safetensors")
    assert other.specs == model.specs and other.rest == model.rest
    x = torch.randn(5, model.specs["single_blocks.0.linear2"].k, generator=torch.Generator().manual_seed(0))
    for layer, spec in model.specs.items():
        ours, theirs = (
            svdquant_linear(x[:, : spec.k], one.layer(layer), one.tensor(f"{layer}.bias"), compute="auto")
            for one in (model, other)
        )
        assert torch.equal(ours, theirs), layer
