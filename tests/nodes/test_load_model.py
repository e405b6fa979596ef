"""Loading, quantizing and describing a model through the node classes, inside the host's process."""

import copy
import json
import logging
import pickle

import pytest
import torch

pytest.importorskip("comfy.sd", reason="no ComfyUI: set COMFYUI_PATH")

import comfy.sd
import comfy.utils
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from svdquant_pack.kernels import COMPUTES, Prepared
from svdquant_pack.kernels.backends import cpu
from svdquant_pack.nodes.host import describe, files
from svdquant_pack.nodes.host.describe import describe_model
from svdquant_pack.nodes.host.linear import SVDQuantLinear, operations
from svdquant_pack.nodes.host.model import load_model
from svdquant_pack.nodes.host.source import ModelSource
from svdquant_pack.nodes.model_info import SVDQuantModelInfo
from svdquant_pack.nodes.registry import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from svdquant_pack.quantize.files.checkpoint import CheckpointError
from svdquant_pack.quantize.files.convert import convert_file
from svdquant_pack.quantize.files.open import open_checkpoint
from svdquant_pack.quantize.maker.model import quantize_model
from svdquant_pack.quantize.recipe import Recipe
from svdquant_pack.tests.nodes.sampling import LORAS, forward, pictures, relative


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean over pictures, in dB, peak 1."""
    return (-10 * (a - b).square().flatten(1).mean(1).log10()).mean().item()


@pytest.mark.parametrize(("format", "floor"), [("int4", 28), ("nvfp4", 31)])  # 5 dB under what 80 pictures give
def test_a_quantized_model_paints_the_same_digits(demo_model, checkpoints, format, floor):
    assert psnr(pictures(load_model(str(checkpoints[format]))), pictures(demo_model)) > floor


def test_the_model_is_comfyuis_own_class(demo_model, checkpoints):
    four_bit = load_model(str(checkpoints["int4"]))
    assert type(four_bit.model) is type(demo_model.model)
    assert type(four_bit.model.diffusion_model) is type(demo_model.model.diffusion_model)
    assert isinstance(four_bit, type(demo_model))


def test_no_dense_weight_is_left(checkpoints):
    four_bit = load_model(str(checkpoints["int4"]))
    for module in four_bit.packed_layers().values():
        assert module.weight.dtype == torch.uint8 and module.weight.ndim == 1
        assert {name for name, _ in module.named_parameters()} == {"weight", "bias"}
        assert not list(module.buffers())


def test_what_the_host_saves_is_the_native_spelling(checkpoints):
    """`model.state_dict()` is what save nodes write: it must hold the layer under its file names, bit for bit."""
    checkpoint = open_checkpoint(checkpoints["nvfp4"])
    saved = load_model(str(checkpoints["nvfp4"])).model.diffusion_model.state_dict()
    for name in checkpoint.specs:
        stored = checkpoint.layer(name)
        assert torch.equal(saved[f"{name}.weight"], stored["qweight"])
        assert torch.equal(saved[f"{name}.weight_scale"].float(), stored["wscales"].float())
        assert json.loads(bytes(saved[f"{name}.comfy_quant"].tolist()))["orig_shape"] == [stored.spec.n, stored.spec.k]
        if stored.spec.rank:
            assert torch.equal(saved[f"{name}.proj_up"], stored["proj_up"])


def test_the_hosts_own_save_writes_nvfp4_scales_in_the_order_of_the_file(checkpoints, tmp_path):
    """They lie otherwise in memory, and safetensors writes no tensor with gaps."""
    path = tmp_path / "saved.safetensors"
    comfy.sd.save_checkpoint(str(path), load_model(str(checkpoints["nvfp4"])))
    saved, stored = load_file(path), load_file(checkpoints["nvfp4"])
    found = {name.removeprefix("model.diffusion_model."): tensor for name, tensor in saved.items()}
    scales = [name for name in stored if name.endswith(".weight_scale")]
    assert scales and all(torch.equal(found[name].float(), stored[name].float()) for name in scales)


def test_a_lora_that_is_on_is_baked_into_the_quantized_file(demo_model, demo_file, tmp_path):
    lora = comfy.utils.load_torch_file(str(LORAS / "svdquant_demo_inverted_kohya.safetensors"), safe_load=True)
    patched = comfy.sd.load_lora_for_models(demo_model, None, lora, 1.0, 0)[0]
    for loaded_first in (False, True):  # the host may have patched the weights in place by then
        if loaded_first:
            forward(patched)
        path = tmp_path / f"baked{loaded_first}.safetensors"
        quantize_model(ModelSource(patched), path, Recipe(rank=32))
        assert relative(forward(load_model(str(path))), forward(patched)) < 0.1
        assert relative(forward(load_model(str(path))), forward(demo_model)) > 0.3


def test_a_four_bit_model_is_not_quantized_again(checkpoints):
    with pytest.raises(ValueError, match="4-bit already"):
        ModelSource(load_model(str(checkpoints["int4"])))


def test_pinned_keys_are_those_the_host_cannot_find(demo_model, checkpoints):
    pinned = open_checkpoint(checkpoints["int4"]).provenance.pinned
    assert "num_heads" in pinned and "axes_dim" in pinned
    assert "hidden_size" not in pinned and "depth" not in pinned


def test_the_info_node_tells_backend_and_reason(checkpoints):
    patcher = load_model(str(checkpoints["int4"]))
    found = describe_model(patcher)
    layer = found["backends"]["single_blocks.0.linear2"]
    by_auto = ("cpu", "w8a8") if cpu.exact() is None else ("reference", "w4a4")
    assert (layer["backend"], layer["compute"]) == by_auto
    text = SVDQuantModelInfo().describe(patcher)["result"][0]
    for expected in ("flux", "20 int4", "6 awq_w4a16", "16 (20 layers)", " ".join(by_auto)):
        assert expected in text, text


def test_the_info_node_tells_what_stopped_runs_left(checkpoints, tmp_path, monkeypatch):
    patcher = load_model(str(checkpoints["int4"]))
    monkeypatch.setattr(files, "write_folder", lambda *kind: tmp_path)
    monkeypatch.setattr(files, "statistics_folder", lambda: tmp_path / "none")
    assert "leftover" not in SVDQuantModelInfo().describe(patcher)["result"][0]
    (tmp_path / ".x.safetensors.999999999.tmp").write_bytes(bytes(1234))
    text = SVDQuantModelInfo().describe(patcher)["result"][0]
    assert f"leftover  1 unfinished files of stopped runs, 1,234 bytes, in {tmp_path}: `python -m quantize" in text


MODES = [(format, compute) for format in ("int4", "nvfp4") for compute in COMPUTES[1:-1]]


@pytest.mark.parametrize(("format", "compute"), MODES)
def test_every_offered_mode_runs_or_is_refused_with_what_can(checkpoints, format, compute):
    assert compute in NODE_CLASS_MAPPINGS["SVDQuantLoadModel"].INPUT_TYPES()["required"]["compute"][0]
    if (format, compute) == ("nvfp4", "w4a8"):
        with pytest.raises(CheckpointError, match="nvfp4 layers have auto, w4a4, w8a8, w4a8-jit, fp8, w16"):
            load_model(str(checkpoints[format]), compute)
        return
    patcher, exact = (load_model(str(checkpoints[format]), mode) for mode in (compute, "w16"))
    text = SVDQuantModelInfo().describe(patcher)["result"][0]
    backend = "cpu" if compute in cpu.COMPUTES and cpu.exact() is None else "reference"
    assert f"compute   {compute}\n" in text and f"{backend} {compute} (" in text, text
    assert relative(forward(patcher), forward(exact)) < (0.12 if compute == "w4a4" else 0.05)


def test_nothing_made_from_a_streamed_weight_is_kept(checkpoints, monkeypatch):
    """A host that offloads hands every layer's bytes over in the same buffer."""
    import comfy.ops

    asked, run, cast = [], Prepared.__call__, comfy.ops.cast_bias_weight
    monkeypatch.setattr(Prepared, "__call__", lambda self, *a: (asked.append(self.compute), run(self, *a))[1])
    patcher = load_model(str(checkpoints["int4"]), "w8a8")
    resident = forward(patcher)
    assert set(asked) == {"w8a8"}
    asked.clear()
    monkeypatch.setattr(comfy.ops, "cast_bias_weight", lambda *a, **k: (lambda w, *r: (w.clone(), *r))(*cast(*a, **k)))
    assert torch.equal(forward(patcher), resident) and set(asked) == {"w4a8-jit"}


@pytest.mark.parametrize(("arch", "format", "other"), [("sm_120", "int4", "nvfp4"), ("sm_89", "nvfp4", "int4")])
def test_a_file_for_another_gpu_runs_and_says_which_one_would_be_faster(
    checkpoints, monkeypatch, caplog, arch, format, other
):
    caplog.set_level(logging.INFO, "svdquant")
    fitting = SVDQuantModelInfo().describe(load_model(str(checkpoints[format])))["result"][0]
    assert "faster" not in fitting + caplog.text
    monkeypatch.setattr(describe, "arch_of", lambda device: (arch, None))
    patcher = load_model(str(checkpoints[format]))
    said = f"runs, but a file of this model in {other} would be faster"
    assert caplog.text.count(said) == 1 and said in SVDQuantModelInfo().describe(patcher)["result"][0]
    assert forward(patcher).isfinite().all()


def test_the_info_node_says_when_a_model_is_not_four_bit(demo_model):
    assert "not 4-bit" in SVDQuantModelInfo().describe(demo_model)["result"][0]


def test_a_layer_of_another_size_than_the_model_is_named(checkpoints, tmp_path):
    """A file whose layer fits itself but not the model that ComfyUI builds."""
    from svdquant_pack.quantize.files.tensor_file import TensorFile, TensorInfo, TensorWriter

    stored = TensorFile(checkpoints["int4"])
    tensors = {key: stored.read(key) for key in stored}
    name = "double_blocks.1.txt_attn.proj"
    for part in ("weight", "weight_scale", "proj_down", "proj_up", "smooth_factor", "bias", "comfy_quant"):
        tensors[f"{name}.{part}"] = tensors[f"double_blocks.1.txt_mlp.2.{part}"]
    path = tmp_path / "odd.safetensors"
    with TensorWriter(path, {key: TensorInfo.of(tensor) for key, tensor in tensors.items()}) as writer:
        for key, tensor in tensors.items():
            writer.write(key, tensor)
        writer.metadata |= stored.metadata
    with pytest.raises(CheckpointError, match=r"odd\.safetensors: layer 'double_blocks\.1\.txt_attn\.proj'"):
        load_model(str(path))


def test_a_loaded_model_can_be_pickled_and_copied(checkpoints):
    """Processes hand models to each other so; nothing of the file that it was read from is left in it."""
    patcher = load_model(str(checkpoints["int4"]))
    model = patcher.model.diffusion_model
    assert {type(module) for module in model.modules() if isinstance(module, SVDQuantLinear)} == {SVDQuantLinear}
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    layer = next(layer for layer in patcher.packed_layers().values() if layer.in_features == 128)
    for other in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert torch.equal(other(x), layer(x))
    again = pickle.loads(pickle.dumps(model))
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


LOST = {  # what a stranger's file lacks -> who wrote it
    "double_blocks.1.img_attn.norm.query_norm.scale": "kitchen",
    "time_in.in_layer.weight": "kitchen",
    "img_in.bias": "kitchen",
    "final_layer.linear.weight": "kitchen",  # after every other tensor
    "double_blocks.0.img_attn.proj.bias": "kitchen",
    "time_text_embed.text_embedder.linear_1.weight": "nunchaku",
    "transformer_blocks.1.norm_q.weight": "nunchaku",
}


@pytest.mark.parametrize("lost", LOST)
def test_a_16_bit_weight_that_is_missing_is_named(checkpoints, tmp_path, lost):
    whole = tmp_path / "whole.safetensors"
    convert_file(checkpoints["int4"], whole, LOST[lost])
    assert load_model(str(whole)).packed_layers()
    with safe_open(whole, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(whole)
    del tensors[lost]
    save_file(tensors, tmp_path / "part.safetensors", metadata)
    layer = "" if LOST[lost] == "nunchaku" else lost.rpartition(".")[0]  # newer hosts call a norm's scale weight
    with pytest.raises(CheckpointError, match=rf"part\.safetensors: .*{layer}"):
        load_model(str(tmp_path / "part.safetensors"))


@pytest.mark.parametrize("name", NODE_CLASS_MAPPINGS)
def test_every_node_explains_itself(name):
    node = NODE_CLASS_MAPPINGS[name]
    assert name.startswith("SVDQuant") and NODE_DISPLAY_NAME_MAPPINGS[name].startswith("SVDQuant ")
    assert node.CATEGORY.startswith("SVDQuant") and len(node.DESCRIPTION) > 20
    assert len(node.OUTPUT_TOOLTIPS) == len(node.RETURN_TYPES)
    for group in node.INPUT_TYPES().values():
        for entry in group.values():
            assert entry[1]["tooltip"].endswith("."), f"{name}: every input has a tooltip"


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_that_is_not_four_bit_is_an_ordinary_linear(bias):
    assert SVDQuantLinear(8, 4).bias is not None, "torch's default"
    layer, stored = SVDQuantLinear(8, 4, bias, dtype=torch.bfloat16), {"weight": torch.randn(4, 8)}
    assert not layer.loras_stay and not any(part.requires_grad for part in layer.parameters())
    stored |= {"bias": torch.randn(4)} if bias else {}
    assert not layer.load_state_dict(stored).missing_keys
    held, x = {name: tensor.bfloat16() for name, tensor in stored.items()}, torch.randn(3, 8)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, *(tensor.float() for tensor in held.values())))
    saved, kept = layer.state_dict(), layer.state_dict(keep_vars=True)
    assert saved.keys() == kept.keys() == stored.keys()
    assert all(torch.equal(saved[name], held[name]) and kept[name] is getattr(layer, name) for name in stored)
    given = {name: tensor.clone() for name, tensor in held.items()}
    layer.load_state_dict(given)
    assert not any(part.requires_grad for part in layer.parameters())
    assert not any(getattr(layer, name).data_ptr() == tensor.data_ptr() for name, tensor in given.items())
    assert layer.load_state_dict({}, strict=False).missing_keys == list(stored)
    with pytest.raises(RuntimeError, match=r"weight has shape \(4, 9\), this model needs \(4, 8\)"):
        layer.load_state_dict(stored | {"weight": torch.zeros(4, 9)})
    layer.load_state_dict(stored, assign=True)
    assert layer.weight.dtype == torch.float32 and layer.weight.data_ptr() == stored["weight"].data_ptr()


def test_what_is_saved_of_a_four_bit_layer_is_no_parameter_unless_asked_for(checkpoints):
    module = next(iter(load_model(str(checkpoints["int4"])).packed_layers().values()))
    assert module.state_dict(keep_vars=True)["bias"] is module.bias
    assert not isinstance(module.state_dict()["bias"], torch.nn.Parameter)
    assert torch.equal(module.state_dict()["bias"], module.bias)


def test_only_a_layer_that_keeps_a_shift_in_its_bias_needs_one(checkpoints):
    checkpoint, refused = open_checkpoint(checkpoints["int4"]), set()
    for name, spec in checkpoint.specs.items():
        module = operations(checkpoint, "auto").Linear(spec.k, spec.n, bias=False)
        try:
            module._load_from_state_dict({}, f"{name}.", {}, True, [], [], [])
        except CheckpointError as error:
            assert f"layer {name!r} keeps the shift of its unsigned activations in its bias" in str(error)
            refused.add(name)
    assert refused == {name for name, spec in checkpoint.specs.items() if spec.act_unsigned != (0, 0)}
    assert 0 < len(refused) < len(checkpoint.specs)


def test_what_the_host_lends_for_a_layer_is_given_back(checkpoints, monkeypatch):
    """Hosts that stream wait for it before they put the next layer's bytes there; also where the layer failed."""
    import comfy.ops

    lent, back, cast, uncast = [], [], comfy.ops.cast_bias_weight, comfy.ops.uncast_bias_weight
    monkeypatch.setattr(comfy.ops, "cast_bias_weight", lambda *a, **k: (lent.append(cast(*a, **k)), lent[-1])[1])
    monkeypatch.setattr(comfy.ops, "uncast_bias_weight", lambda *a: (back.append(a[1:]), uncast(*a))[1])
    module = next(iter(load_model(str(checkpoints["int4"])).packed_layers().values()))
    module(torch.ones(2, module.in_features))
    with pytest.raises(ValueError, match="x has shape"):
        module(torch.ones(2, module.in_features + 1))
    assert len(lent) == 2 and all(
        one is other for a, b in zip(lent, back, strict=True) for one, other in zip(a, b, strict=True)
    )
