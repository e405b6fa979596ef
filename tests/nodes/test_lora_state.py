"""What a LoRA leaves behind: nothing. Clones, strengths, memory, interruption, 200 cycles."""

import gc
import logging

import pytest
import torch

pytest.importorskip("comfy.lora", reason="no ComfyUI: set COMFYUI_PATH")

import comfy.model_management

from svdquant_pack.nodes.host.lora_groups import layer_name
from svdquant_pack.nodes.host.model import load_model
from svdquant_pack.quantize.lora.deltas import LoraError
from svdquant_pack.tests.nodes.lora_files import KINDS, lora_of, with_file
from svdquant_pack.tests.nodes.sampling import forward, relative


@pytest.fixture
def plain(checkpoints):
    patcher = load_model(str(checkpoints["int4"]), compute="w16")
    yield patcher
    comfy.model_management.unload_all_models()


@pytest.fixture(scope="module")
def weights(checkpoints):
    """weight key -> dense weight, as a base for LoRAs."""
    patcher = load_model(str(checkpoints["int4"]))
    layers = patcher.packed_layers().items()
    return {key: module.packed.layer(module.weight.detach()).dense_weight() for key, module in layers}


def loaded(patcher):
    """4-bit layers that have LoRAs."""
    return [module for module in patcher.packed_layers().values() if module.loras is not None]


def test_on_off_on_is_bit_equal(plain, weights):
    strong = with_file(plain, lora_of(KINDS, weights), 0.7)
    outputs = [forward(patcher) for patcher in (plain, strong, plain, strong, plain)]
    assert not torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2]) and torch.equal(outputs[2], outputs[4])
    assert torch.equal(outputs[1], outputs[3])


def test_clones_share_weights_and_no_lora(plain, weights):
    first, second = (with_file(plain, lora_of(("lora",), weights, seed), 1.0) for seed in (0, 1))
    third = first.clone()
    assert third.model is plain.model
    alone = forward(second)
    assert not torch.equal(forward(first), alone)
    assert torch.equal(forward(second), alone)
    assert torch.equal(forward(third), forward(first))
    assert not plain.layer_loras()


def test_order_of_loras_does_not_matter(plain, weights):
    files = [lora_of(("lora", "lokr", "loha"), weights, seed) for seed in (0, 1)]
    there = forward(with_file(with_file(plain, files[0], 0.8), files[1], -0.5))
    back = forward(with_file(with_file(plain, files[1], -0.5), files[0], 0.8))
    assert relative(there, back) < 1e-5


def test_a_change_of_strength_touches_no_factor(plain, weights):
    file = lora_of(("lora", "lokr", "loha"), weights)
    weak, strong = (with_file(plain, file, strength) for strength in (0.3, 0.9))
    forward(weak)
    before = [(m.loras.deltas, m._loaded.down, m._loaded.up, m._loaded.krons) for m in loaded(weak)]
    places = [module.weight.data_ptr() for module in loaded(weak)]
    entries = len(plain.model.svdquant.store)
    output = forward(strong)
    assert len(plain.model.svdquant.store) == entries
    for (deltas, down, up, krons), module in zip(before, loaded(strong), strict=True):
        assert all(one is other for one, other in zip(deltas, module.loras.deltas, strict=True))
        assert module._loaded.down is down and module._loaded.up is up and module._loaded.krons is krons
    assert [module.weight.data_ptr() for module in loaded(strong)] == places, "no weight was moved"
    fresh = with_file(plain, {name: tensor.clone() for name, tensor in file.items()}, 0.9)
    assert torch.equal(forward(fresh), output)


def test_a_lora_on_16bit_layers_too_is_swapped_as_a_whole(plain, weights):
    """The host has to patch those: the short way is not for them."""
    other = {"diffusion_model.img_in.weight": torch.zeros(128, 64)}
    file = {**lora_of(("lora",), weights), **lora_of(("lora",), other, 5)}
    file["diffusion_model.img_in.lora_up.weight"] = torch.randn(128, 4)
    one, two = (with_file(plain, file, strength) for strength in (0.3, 0.9))
    first, second = forward(one), forward(two)
    changed = plain.model.diffusion_model.img_in.weight.clone()
    assert not torch.equal(first, second)
    assert torch.equal(forward(one), first)
    assert not torch.equal(plain.model.diffusion_model.img_in.weight, changed)


def test_memory_is_in_the_size_that_the_host_makes_room_for(plain, weights):
    strong = with_file(plain, lora_of(KINDS, weights), 1.0)
    numbers = sum(loras.numel for loras in strong.layer_loras().values())
    assert strong.model_size() == plain.model_size() + 4 * numbers  # float32 on a CPU
    assert strong.clone().model_size() == strong.model_size()
    assert with_file(strong, lora_of(("lora",), weights, 1), 1.0).model_size() > strong.model_size()
    for patcher in (strong, plain, strong, plain):  # loaded, and swapped in place from then on
        forward(patcher)
        assert patcher.loaded_size() == patcher.model_size()


def test_half_loaded_is_the_same_model_with_every_kind(plain, weights, caplog):
    strong = with_file(plain, lora_of(KINDS, weights), 0.7)
    whole = forward(strong)
    comfy.model_management.unload_all_models()
    with caplog.at_level(logging.WARNING):
        strong.patch_model(strong.load_device, lowvram_model_memory=strong.model_size() // 2)
        strong.partially_unload(strong.offload_device, 200_000)
    assert not any(module.weight_function for module in strong.packed_layers().values())
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert strong.lora_bytes() <= strong.loaded_size() < strong.model_size()
    assert torch.equal(forward(strong), whole)
    strong.detach()
    assert strong.loaded_size() == 0
    assert not loaded(strong)


def test_what_a_file_needs_is_freed_with_it(plain, weights):
    forward(plain)
    strong = with_file(plain, lora_of(KINDS, weights), 0.7)
    forward(strong)
    assert len(plain.model.svdquant.store) > 0
    forward(plain)
    del strong
    gc.collect()
    assert len(plain.model.svdquant.store) == 0
    assert not loaded(plain)


def test_200_cycles_leave_no_memory(plain, weights):
    """Counted in tensors that are alive, not in bytes of the process: those depend on the allocator."""

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    few = dict(list(weights.items())[:10])
    sizes = []
    for cycle in range(200):
        strong = with_file(plain, lora_of(KINDS[:6], few, cycle), 0.7)
        comfy.model_management.load_models_gpu([strong])
        next(iter(strong.packed_layers().values()))(torch.zeros(1, 128))
        comfy.model_management.load_models_gpu([plain])
        if cycle % 66 == 1:
            comfy.model_management.unload_all_models()
        if cycle in (9, 199):
            del strong
            sizes.append(alive())
    assert sizes[0] == sizes[1]
    assert len(plain.model.svdquant.store) == 0


class Stopped(Exception):
    pass


@pytest.mark.parametrize("where", ["factors", "host"])
def test_interrupted_loading_leaves_the_model_as_before(plain, weights, monkeypatch, where):
    first = with_file(plain, lora_of(("lora",), weights, 0), 1.0)
    before = forward(first)
    second = with_file(plain, lora_of(KINDS, weights, 1), 1.0)
    second.add_patches({"diffusion_model.img_in.bias": ("diff", (torch.ones(128),))})
    calls = []

    def stop(*args, **kwargs):
        calls.append(args)
        if len(calls) > (8 if where == "factors" else 0):
            raise Stopped
        return original(*args, **kwargs)

    if where == "factors":
        from svdquant_pack.quantize.lora import terms as place

        original = place.columns_of
        monkeypatch.setattr(place, "columns_of", stop)
    else:
        from comfy.model_patcher import ModelPatcher as place  # noqa: N813 - a place to break

        original = place.patch_weight_to_device
        monkeypatch.setattr(place, "patch_weight_to_device", stop)
    with pytest.raises(Stopped):
        forward(second)
    monkeypatch.undo()
    assert torch.equal(forward(first), before)
    forward(second)
    assert torch.equal(forward(first), before)


def test_a_wrapped_forward_adds_to_the_layer(plain, weights):
    """What the bypass loaders of newer hosts do: module.forward is replaced and adds h(x)."""
    key, weight = next(iter(weights.items()))
    module, x = plain.packed_layers()[key], torch.randn(2, 3, weight.shape[1])
    with_file(plain, lora_of(("lora",), weights), 1.0)
    comfy.model_management.load_models_gpu([plain])
    original, base = module.forward, module(x)
    down, up = torch.randn(weight.shape[1], 4), torch.randn(weight.shape[0], 4)
    module.forward = lambda x, *args, **kwargs: original(x, *args, **kwargs) + (x @ down) @ up.T
    try:
        assert torch.allclose(module(x), base + (x @ down) @ up.T, rtol=1e-5, atol=1e-4)
    finally:
        del module.forward
    assert torch.equal(module(x), base)


def test_merges_are_refused_by_name(plain, demo_model, checkpoints):
    from comfy_extras.nodes_model_merging import ModelAdd, ModelMergeBlocks, ModelMergeSimple, ModelSubtract

    four_bit, dense, other = plain, demo_model, load_model(str(checkpoints["int4"]))
    for merge in (
        lambda: ModelMergeSimple().merge(four_bit, other, 0.5),
        lambda: ModelMergeBlocks().merge(four_bit, dense, **{"double_blocks.": 0.5}),
        lambda: ModelMergeSimple().merge(four_bit, dense, 0.5),
        lambda: ModelAdd().merge(four_bit, dense),
        lambda: ModelSubtract().merge(four_bit, dense, 1.0),
        lambda: ModelMergeSimple().merge(dense, four_bit, 0.5),
    ):
        with pytest.raises(LoraError, match="4-bit model cannot be merged; merge the 16-bit models"):
            merge()
    assert not plain.layer_loras()


def test_a_partly_loaded_models_loras_are_counted_beside_its_weights(plain, weights):
    """The same room for weights with and without LoRAs: the host's own count of the weights, and the LoRAs on top."""
    small, large = (with_file(plain, lora_of(("lora",), weights, seed), 1.0) for seed in (0, 1))
    large = with_file(large, lora_of(KINDS, weights, 2), 1.0)
    room = plain.model_size() // 2
    plain.patch_model(plain.load_device, lowvram_model_memory=room)
    alone = plain.loaded_size()
    assert 0 < alone < room
    plain.detach()
    for _ in range(2):  # the second time on top of the first
        small.patch_model(small.load_device, lowvram_model_memory=room + small.lora_bytes())
        assert small.loaded_size() == alone + small.lora_bytes()
    loaded_before = small.loaded_size()
    assert large.partially_load(large.load_device, -1) == 0, "less room is given: LoRAs are swapped, weights leave"
    assert large.loaded_size() <= loaded_before + large.lora_bytes() - small.lora_bytes()
    assert len(loaded(large)) == len(weights)
    large.detach()
    assert plain.loaded_size() == 0


def test_unloading_ends_what_a_hook_has_put_on(plain, weights, monkeypatch):
    """Also where the host leaves its hooks alone, as the streaming patchers of newer hosts do."""
    import comfy.hooks
    from comfy.model_patcher import ModelPatcher

    comfy.model_management.load_models_gpu([plain])
    hooks = comfy.hooks.create_hook_lora(lora_of(("lora",), weights), 1.0, 0.0)
    target = comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model)
    hooked = plain.clone()
    hooked.register_all_hook_patches(hooks, target, {})
    hooked.patch_hooks(hooks)
    assert len(loaded(plain)) == len(weights) == len(plain.model.svdquant.unhooked)
    unpatch = ModelPatcher.unpatch_model
    monkeypatch.setattr(ModelPatcher, "unpatch_model", lambda self, *args, **kwargs: unpatch(self, None, False))
    hooked.unpatch_model(plain.offload_device)
    assert not loaded(plain) and not plain.model.svdquant.unhooked


@pytest.mark.parametrize("streamed", [False, True])
def test_a_layers_loras_leave_the_device_with_it_unless_the_host_streams(plain, weights, streamed):
    strong = with_file(plain, lora_of(("lora",), weights), 0.7)
    strong.is_dynamic = lambda: streamed  # what newer hosts ask
    output = forward(strong)
    module = loaded(strong)[0]
    assert module.loras_stay == streamed and module._loaded is not None
    home = module.weight
    module.weight = torch.nn.Parameter(home.to("meta"), requires_grad=False)
    module.leave_device()
    assert (module._loaded is not None) == streamed
    module.weight = home
    module.leave_device()
    module._loaded = module.loras.on(torch.device("meta"), torch.float32)
    strong.partially_unload(strong.offload_device, 0)
    assert (module._loaded is not None) == streamed, "when the host takes weights off the device"
    assert torch.equal(forward(strong), output)
    forward(plain)
    assert not module.loras_stay and module._loaded is None


@pytest.mark.parametrize("count", [1, 5, 7])
def test_every_layer_that_refuses_is_counted_and_five_are_named(plain, weights, count):
    from comfy.weight_adapter import LoRAAdapter

    keys = list(weights)[:count]
    wrong = {key: (torch.ones(weights[key].shape[0], 4), torch.ones(4, 3), 1.0, None, None, None) for key in keys}
    bad = plain.clone()
    bad.add_patches({key: LoRAAdapter(set(), factors) for key, factors in wrong.items()}, 1.0)
    with pytest.raises(LoraError, match=f"^{count} 4-bit layers have a patch that cannot be applied") as caught:
        bad.layer_loras()
    said = str(caught.value)
    assert [layer_name(key) in said for key in keys] == [place < 5 for place in range(count)]
    assert ("(and 2 more layers)" in said) == (count == 7) and ("more layers" in said) == (count == 7)
    assert not forward(plain).isnan().any()


def test_parts_of_a_four_bit_layer_are_not_patched(plain, weights):
    key = next(iter(weights))
    part = key.removesuffix("weight") + "proj_up"
    with pytest.raises(LoraError, match=f"^{layer_name(key)}.proj_up is a part of a 4-bit layer"):
        plain.clone().add_patches({part: ("diff", (torch.ones(2, 2),))})
    with pytest.raises(LoraError, match=f"^{layer_name(key)}: a 4-bit model cannot be merged"):
        plain.clone().add_patches({(key, (0, 0, 4)): [torch.ones(2, 2)]})


def test_a_lora_of_which_nothing_matches_warns_and_the_stack_goes_on(plain, weights, caplog):
    from svdquant_pack.nodes.host.lora_report import describe_loras

    stacked = plain.clone()
    with caplog.at_level("WARNING", logger="svdquant"):
        assert stacked.add_patches({}) == []
        assert stacked.add_patches({"clip_l.x.weight": ("diff", (torch.ones(2, 2),))}) == []
    assert caplog.text.count("changes nothing in the diffusion model") == 2
    key, weight = next(iter(weights.items()))
    assert stacked.add_patches({key: ("diff", (0.1 * torch.ones_like(weight),))}) == [key]
    assert [len(row["layers"]) for row in describe_loras(stacked)["rows"]] == [0, 0, 1]
    assert not torch.equal(forward(stacked), forward(plain))


def test_strengths_that_a_node_leaves_out_are_the_hosts(plain, demo_model):
    import comfy.hooks

    patches, hook = {"diffusion_model.img_in.bias": ("diff", (torch.ones(128),))}, comfy.hooks.WeightHook()
    entries = []
    for patcher in (plain.clone(), demo_model.clone()):
        patcher.add_patches(patches)
        patcher.add_hook_patches(hook, patches)
        entries += [patcher.patches, patcher.hook_patches[hook.hook_ref]]
    assert entries[0] == entries[2] and entries[1] == entries[3]


def test_patchers_of_all_models_are_of_one_class(plain, checkpoints):
    assert type(load_model(str(checkpoints["int4"]))) is type(plain) is type(plain.clone())


def test_a_hooks_keys_that_belong_nowhere_are_named(plain, caplog):
    import comfy.hooks

    patched = plain.clone()
    with caplog.at_level(logging.WARNING, logger="svdquant"):
        patched.add_hook_patches(
            comfy.hooks.WeightHook(), {"diffusion_model.nothing.weight": ("diff", (torch.ones(1),))}
        )
    assert "nothing.weight" in caplog.text and not patched.svdquant_groups


def test_loras_are_in_place_before_the_first_call(plain, weights):
    """A compiled layer looks for them and keeps none itself."""
    import comfy.hooks

    def in_place(patcher):
        return [module._loaded is not None for module in loaded(patcher)] == [True] * len(weights)

    for seed in (0, 1):  # loaded, and swapped for others
        strong = with_file(plain, lora_of(("lora",), weights, seed), 0.7)
        comfy.model_management.load_models_gpu([strong])
        assert in_place(strong)
    before = [module.loras for module in loaded(strong)]
    hooks = comfy.hooks.create_hook_lora(lora_of(("lora",), weights, 2), 1.0, 0.0)
    hooked = strong.clone()
    hooked.register_all_hook_patches(hooks, comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model), {})
    hooked.patch_hooks(hooks)
    assert in_place(hooked) and [module.loras for module in loaded(hooked)] != before
    hooked.unpatch_hooks()
    assert in_place(strong) and [module.loras for module in loaded(strong)] == before


def test_limits_of_what_is_approximated_are_those_that_were_set(plain, weights):
    from svdquant_pack.quantize.lora.fit import LoraLimits

    strict = with_file(plain, lora_of(("diff",), weights), 1.0)
    before = strict.patches_uuid
    assert strict.lora_limits() == LoraLimits() and strict.layer_loras()
    strict.set_lora_limits(LoraLimits(max_rank=16, max_lost=0.5))
    assert strict.patches_uuid != before, "what is loaded was made under other limits"
    assert strict.lora_limits() == strict.clone().lora_limits() == LoraLimits(max_rank=16, max_lost=0.5)
    assert plain.lora_limits() == LoraLimits()


def image_input(seed: int) -> dict[str, torch.Tensor]:
    """A LoRA of a 16-bit layer, which the host patches itself."""
    noise = torch.Generator().manual_seed(seed)
    factors = {"lora_up": torch.randn(128, 4, generator=noise), "lora_down": torch.randn(4, 64, generator=noise)}
    return {f"diffusion_model.img_in.{name}.weight": factor for name, factor in factors.items()}


def test_the_short_way_is_taken_where_the_16bit_layers_stay_as_they_are_and_only_there(plain, weights, monkeypatch):
    from comfy.model_patcher import ModelPatcher

    base = with_file(plain, image_input(1), 0.1)
    weak, strong = (with_file(base, lora_of(("lora",), weights), strength) for strength in (0.2, 0.9))
    twice = with_file(strong, image_input(2), 0.1)
    fresh = {}
    for name, patcher in (("weak", weak), ("strong", strong), ("twice", twice)):
        fresh[name] = forward(patcher)
        comfy.model_management.unload_all_models()
    loads, load = [], ModelPatcher.load
    monkeypatch.setattr(ModelPatcher, "load", lambda *args, **kwargs: (loads.append(args), load(*args, **kwargs))[1])
    for name, patcher, anew in (("weak", weak, 1), ("strong", strong, 0), ("twice", twice, 1), ("strong", strong, 1)):
        loads.clear()
        assert torch.equal(forward(patcher), fresh[name]), name
        assert len(loads) == anew, name


def test_an_unloaded_model_keeps_no_file_in_memory(plain, weights):
    import weakref

    file = image_input(3)
    alive = [weakref.ref(tensor) for tensor in file.values()]
    strong = with_file(plain, file, 0.1)
    forward(strong)
    comfy.model_management.unload_all_models()
    del strong, file
    gc.collect()
    assert not any(ref() is not None for ref in alive)


def test_loras_that_are_swapped_in_place_take_a_hooks_place(plain, weights):
    """A run that was stopped may leave its hook on."""
    import comfy.hooks

    strong = with_file(plain, lora_of(("lora",), weights), 0.7)
    wanted = forward(strong)
    forward(plain)
    hooks = comfy.hooks.create_hook_lora(lora_of(("lora",), weights, 4), 1.0, 0.0)
    hooked = plain.clone()
    hooked.register_all_hook_patches(hooks, comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model), {})
    hooked.patch_hooks(hooks)
    before = [module.loras for module in loaded(plain)]
    hooked.unpatch_hooks({"another.weight"})
    assert [module.loras for module in loaded(plain)] == before, "only others were to go"
    comfy.model_management.load_models_gpu([strong])
    assert not plain.model.svdquant.unhooked
    hooked.patch_hooks(None)
    assert torch.equal(forward(strong), wanted)
