"""torch.compile on ComfyUI's own blocks: as many graphs as the dense model has, and the same numbers.

Graphs are counted at the backend, where one arrives for every trace. Attention is torch's own, as on a GPU: the one
that ComfyUI takes on a CPU asks the system for its memory in the middle of a block.
"""

import json
import shutil
import sys

import pytest
import torch

pytest.importorskip("comfy.model_management")

import comfy.lora
import comfy.ops
from comfy.ldm.modules.attention import attention_pytorch

from svdquant_pack.kernels import weight_cache
from svdquant_pack.kernels.backends import cpu
from svdquant_pack.nodes.host.model import load_model, load_pinned_model
from svdquant_pack.quantize.files.open import open_checkpoint
from svdquant_pack.quantize.files.source import FileSource
from svdquant_pack.quantize.maker.model import quantize_model
from svdquant_pack.quantize.recipe import Recipe
from svdquant_pack.tests.nodes import zoo
from svdquant_pack.tests.nodes.lora_files import lora_of

BLOCKS = {
    "flux double": ("flux", "double_blocks.0"),
    "flux single": ("flux", "single_blocks.0"),
    "qwen_image": ("qwen_image", "transformer_blocks.0"),
    "sdxl": ("sdxl", "middle_block.1"),
}
KINDS = ("lora", "lokr", "loha", "dora_out", "dora_in", "diff")
STRENGTHS = (0.5, 0.8, 1.0, 0.0, -0.3, 1.0)
ROUNDING = 1e-3  # of a model whose float32 sums are in another order: some 4-bit activations are rounded the other way


class Graphs(list):
    """A backend that runs what it is given, and keeps it."""

    def __call__(self, graph, inputs):
        self.append(graph)
        return graph.forward

    @property
    def computes(self) -> list[str]:
        """The mode of each 4-bit layer in all graphs."""
        nodes = [node for graph in self for node in graph.graph.nodes if "packed_linear" in str(node.target)]
        return [json.loads(node.args[-1])["compute"] for node in nodes]


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    for name, module in list(sys.modules.items()):
        if name.startswith("comfy.ldm."):
            for attribute in ("optimized_attention", "optimized_attention_masked"):
                if hasattr(module, attribute):
                    monkeypatch.setattr(module, attribute, attention_pytorch)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # they count what other tests compile
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """name of the zoo -> (16-bit file, 4-bit file)"""
    made, folder = {}, tmp_path_factory.mktemp("compile")

    def get(name):
        if name not in made:
            source = zoo.save(name, folder / f"{name}.safetensors")
            made[name] = source, folder / f"{name}_int4.safetensors"
            quantize_model(FileSource(source), made[name][1], Recipe(rank=16, alternations=1))
        return made[name]

    return get


@pytest.fixture(scope="module")
def flux(files):
    return load_model(str(files("flux")[1]))


def dense_weights(path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(path)
    return {
        f"diffusion_model.{name}.weight": checkpoint.layer(name).dense_weight()
        for name, spec in checkpoint.specs.items()
        if spec.fmt.low_rank
    }


def patches_of(path, kinds=("lora",), seed: int = 0):
    weights = dense_weights(path)
    return comfy.lora.load_lora(
        lora_of(kinds, weights, seed), {key.removesuffix(".weight"): key for key in weights}, log_missing=False
    )


def at(patcher, *patches_and_strengths):
    """A clone with these patches."""
    patched = patcher.clone()
    for patches, strength in patches_and_strengths:
        patched.add_patches(patches, strength)
    return patched


def compiled(patcher, backend, **settings):
    """What the host's node TorchCompileModel makes, with another backend."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    clone = patcher.clone()
    set_torch_compile_wrapper(model=clone, backend=backend, **settings)
    return clone


def close(found, wanted, bound: float) -> bool:
    return ((found - wanted).norm() / wanted.norm()).item() <= bound


def call_of(patcher, name: str, block: str):
    """(module, args, kwargs) of one block in a call of its model"""
    module, seen = patcher.model.diffusion_model.get_submodule(block), []
    handle = module.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    try:
        zoo.forward(patcher, name)
    finally:
        handle.remove()
    return module, *seen[0]


def tensors_in(output) -> list[torch.Tensor]:
    return [output] if isinstance(output, torch.Tensor) else list(output)


@pytest.mark.parametrize("block", BLOCKS)
def test_a_real_block_is_one_graph(files, block):
    """Dense, in 4 bit, and with LoRAs of every kind"""
    name, place = BLOCKS[block]
    source, four_bit = files(name)
    patcher = load_model(str(four_bit))
    patched = at(patcher, (patches_of(four_bit, KINDS), 0.7))
    for each in (load_pinned_model(str(source)), patcher, patched):
        module, args, kwargs = call_of(each, name, place)
        graphs = Graphs()
        with torch.no_grad():
            wanted = module(*args, **kwargs)
            found = torch.compile(module, backend=graphs, fullgraph=True)(*args, **kwargs)
        assert len(graphs) == 1
        assert all(map(torch.equal, tensors_in(found), tensors_in(wanted)))


def test_a_whole_model_is_one_graph_with_the_guard_around_it(files, flux):
    dense, four_bit = Graphs(), Graphs()
    for patcher, graphs in ((load_pinned_model(str(files("flux")[0])), dense), (flux, four_bit)):
        output = zoo.forward_wrapped(compiled(patcher, graphs), "flux")
        assert torch.equal(output, zoo.forward_wrapped(patcher, "flux"))
    assert len(dense) == len(four_bit) == 1
    layers = len(flux.packed_layers())
    assert len(four_bit.computes) == layers
    nodes, more = (len(graphs[0].graph.nodes) for graphs in (dense, four_bit))
    assert more <= nodes + 2 * layers, "a 4-bit layer is one node, as a dense one is; newer hosts cast its bias"


def test_a_strength_makes_no_new_graph(files, flux):
    graphs, counts = Graphs(), []
    one, two = (patches_of(files("flux")[1], KINDS, seed) for seed in (0, 1))
    patcher = compiled(flux, graphs, fullgraph=True)

    def check(*loras):
        patched = at(patcher, *loras)
        found = zoo.forward_wrapped(patched, "flux")
        assert torch.equal(found, zoo.forward(patched, "flux")), loras
        counts.append(len(graphs))
        return found

    plain = check()
    outputs = [check((one, strength)) for strength in STRENGTHS]
    assert counts == [1, *[2] * len(STRENGTHS)], "a LoRA makes one, its strengths make none"
    assert torch.equal(outputs[3], plain) and torch.equal(outputs[2], outputs[5])
    assert all(not torch.equal(output, plain) for output in (*outputs[:3], outputs[4]))
    assert torch.equal(check(), plain) and counts[-1] == 2, "what was compiled without a LoRA serves again"
    for strengths in ((0.5, 0.5), (0.5, 1.0), (1.0, 1.0), (0.0, 0.9)):
        check((one, strengths[0]), (two, strengths[1]))
        assert counts[-1] == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_loras_that_wait_elsewhere_make_no_new_graph_either(files, flux, dtype):
    """Where the weight is off the device, or a layer's activations are of another dtype than the model's."""
    kinds = ("lora", "lokr", "dora_out")
    graphs, model = Graphs(), flux.model
    for index, (key, module) in enumerate(list(flux.packed_layers().items())[:3]):
        torch._dynamo.reset()
        graphs.clear()
        weights = {key: module.four_bit.layer(module.blob).dense_weight()}
        file = lora_of(kinds, weights, index)
        patches = comfy.lora.load_lora(file, {key.removesuffix(".weight"): key}, log_missing=False)
        layer = torch.compile(module, backend=graphs, fullgraph=True)
        x = torch.randn(3, module.in_features, generator=torch.Generator().manual_seed(0))
        for strength in (0.5, 0.0, 1.0, -0.7):
            zoo.forward(at(flux, (patches, strength)), "flux")
            module._loaded = module.loras.on(torch.device("cpu"), dtype)
            with torch.no_grad():
                found = layer(x)
                assert module._loaded.dtype == dtype, "a compiled call changes nothing"
                assert close(found, module(x), 1e-5 if dtype == torch.float32 else 1e-2)
        assert len(graphs) == 1
    assert model is flux.model


def test_streamed_weights_are_not_taken_for_each_other(files, monkeypatch):
    """Hosts stream offloaded weights through one buffer: the same address, another layer's bytes.

    What a GPU keeps for w8a8 it finds by address, as looking at the bytes would mean to wait: here as well.
    """
    kept, get = {}, weight_cache.ON_CPU.get

    def by_address(source, variant, compute, nbytes):
        if "int8" not in variant:
            return get(source, variant, compute, nbytes)
        key = source.data_ptr(), tuple(source.shape)
        if key not in kept:
            kept[key] = compute()
        return kept[key]

    monkeypatch.setattr(weight_cache.ON_CPU, "get", by_address)
    patcher = load_model(str(files("flux")[1]), "w8a8")
    wanted, graphs = zoo.forward_wrapped(patcher, "flux"), Graphs()
    assert torch.equal(zoo.forward_wrapped(compiled(patcher, graphs, fullgraph=True), "flux"), wanted)
    assert set(graphs.computes) == {"w8a8"} and bool(kept) == (cpu.exact() is None)
    cast = comfy.ops.cast_bias_weight
    buffer = torch.zeros(max(layer.blob.numel() for layer in patcher.packed_layers().values()), dtype=torch.uint8)

    def streamed(layer, *args, **kwargs):
        blob, *rest = cast(layer, *args, **kwargs)
        if getattr(layer, "packed", None) is None:
            return blob, *rest
        return buffer[: blob.numel()].copy_(blob), *rest

    monkeypatch.setattr(comfy.ops, "cast_bias_weight", streamed)
    torch._dynamo.reset()
    graphs.clear()
    again = compiled(patcher, graphs, fullgraph=True)
    for _ in range(2):  # what the first call kept, the second would take
        assert torch.equal(zoo.forward_wrapped(again, "flux"), wanted)
    assert len(graphs) == 1
    assert set(graphs.computes) == {"w4a8-jit"}


@pytest.mark.skipif(" " in torch.__file__, reason="inductor's linker stumbles over the space in torch's own path")
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler here")
def test_the_hosts_node_compiles_with_inductor(files, flux):
    """As a server runs it: in inference mode, and with strengths that change."""
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    lora = patches_of(files("flux")[1])
    with torch.inference_mode():
        (patcher,) = TorchCompileModel.execute(flux, "inductor").result
        for strength in (1.0, 0.4):
            patched = at(patcher, (lora, strength))
            assert close(zoo.forward_wrapped(patched, "flux"), zoo.forward(patched, "flux"), ROUNDING)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
