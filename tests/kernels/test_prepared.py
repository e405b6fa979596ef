"""A layer that is called again and again gives what the operator gives, whatever changes between the calls."""

import gc
import logging
import threading
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from svdquant_pack.kernels import FORMATS, Layer, Lora, Prepared, dispatch, ops, svdquant_linear
from svdquant_pack.kernels.backends import Backend, each_call, reference
from svdquant_pack.kernels.layer import from_blob, to_blob
from svdquant_pack.tests.kernels.layers import random_layer


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No memory of earlier tests, none left behind; and as a host samples."""
    monkeypatch.setattr(dispatch, "_chosen", {})
    monkeypatch.setattr(dispatch, "_tested", {})
    with torch.no_grad():
        yield


def lora_of(rank: int = 20, strength: bool = True) -> Lora:
    vector = torch.tensor([0.5, 2.0]) if strength else None
    return Lora(torch.randn(256, rank), torch.randn(96, rank), vector)


@pytest.fixture
def made(monkeypatch) -> list:
    """What was prepared, in order."""
    made, prepare = [], dispatch.prepare
    monkeypatch.setattr(dispatch, "prepare", lambda *call: (made.append(call[0].shape[0]), prepare(*call))[1])
    return made


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("compute", ["auto", "w4a4", "w4a8-jit", "w8a8", "w16"])
def test_every_call_gives_what_the_operator_gives(format, compute):
    if compute not in ("auto", *FORMATS[format].computes):
        pytest.skip(f"{format} has no {compute}")
    layer, prepared = random_layer(format, centred=FORMATS[format].low_rank), Prepared(compute)
    bias, lora = torch.randn(96), lora_of() if FORMATS[format].low_rank else None
    for call in range(3):
        for dtype in (torch.float32, torch.bfloat16):
            for shape in ((4, 256), (2, 3, 256), (130, 256), (0, 256), (1, 256)):
                for beside in ((None, None), (bias, None), (bias.to(dtype), lora)):
                    x = torch.randn(shape).to(dtype)
                    wanted = svdquant_linear(x, layer, *beside, compute)
                    assert torch.equal(prepared(x, layer, *beside), wanted), (call, dtype, shape)


def test_a_kind_of_call_is_prepared_once(made):
    layer, prepared = random_layer("int4"), Prepared("w4a4")
    for rows in (4, 3, 4, 5, 16, 16, 300, 300, 4):
        prepared(torch.randn(rows, 256), layer, None, None)
    assert made == [4, 5, 16, 300], "rows up to a power of two are one kind"
    prepared(torch.randn(4, 256), layer, torch.randn(96), None)
    for strength in (0.5, 2.0):
        lora = lora_of()
        lora.strength.fill_(strength)
        prepared(torch.randn(4, 256), layer, None, lora)
    prepared(torch.randn(4, 256), layer, None, lora_of(strength=False))
    assert len(made) == 7, "a bias, a LoRA and a strength are other kinds; another value is not"


@pytest.mark.parametrize("format", ["int4", "nvfp4"])
def test_bytes_may_be_other_ones_each_time(format):
    """As a host streams them: two layers through one buffer."""
    layers = [random_layer(format, seed=seed) for seed in (0, 1)]
    (blob, views), (other, _) = (to_blob(layer.tensors) for layer in layers)
    buffer, prepared, x = torch.empty_like(blob), Prepared("w4a4"), torch.randn(4, 256)
    for _ in range(3):
        for layer, source in zip(layers, (blob, other), strict=True):
            found = prepared(x, Layer.known(layer.spec, from_blob(buffer.copy_(source), views)), None, None)
            assert torch.equal(found, svdquant_linear(x, layer, compute="w4a4"))


def test_nothing_is_kept(made):
    layer, prepared = random_layer("nvfp4"), Prepared("w4a4")
    x, bias, lora = torch.randn(4, 256), torch.randn(96), lora_of()
    for _ in range(3):
        prepared(x, layer, bias, lora)
    alive = [weakref.ref(tensor) for tensor in (x, bias, *lora, *layer.tensors.values())]
    del x, bias, lora, layer
    gc.collect()
    assert len(made) == 1 and not [each for each in alive if each() is not None]


class Faulty:
    """A backend that does what the reference does, until it is told to fail."""

    def __init__(self, monkeypatch, prepares: bool) -> None:
        self.error, self.calls = None, 0
        prepare = (lambda *call: lambda *again: self.linear(*again, *call[4:])) if prepares else each_call(self.linear)
        backend = Backend("faulty", lambda call: 99, prepare)
        found = {"faulty": backend, "reference": reference.BACKEND}
        monkeypatch.setattr(dispatch, "discover", lambda: (found, {}))

    def linear(self, *call):
        self.calls += 1
        if self.error is not None:
            raise self.error
        return reference.linear(*call)


@pytest.mark.parametrize("prepares", [False, True])
def test_a_backend_that_fails_later_is_turned_off_and_the_next_takes_over(monkeypatch, caplog, prepares):
    faulty, layer, x = Faulty(monkeypatch, prepares), random_layer("int4"), torch.randn(3, 256)
    prepared, another = Prepared("w4a4"), Prepared("w4a4")
    (wanted, *_) = [each(x, layer, None, None) for each in (prepared, another) for _ in range(2)]
    faulty.error = RuntimeError("an illegal address")
    with caplog.at_level(logging.WARNING, "svdquant"):
        assert torch.equal(prepared(x, layer, None, None), wanted)
        calls = faulty.calls
        for each in (prepared, another, prepared, another):
            assert torch.equal(each(x, layer, None, None), wanted)
    assert faulty.calls == calls, "whoever prepared for it before does not ask it again"
    assert len(caplog.records) == 1 and "an illegal address" in caplog.text


def test_out_of_memory_is_the_hosts_business(monkeypatch):
    faulty, layer, x = Faulty(monkeypatch, True), random_layer("int4"), torch.randn(3, 256)
    prepared = Prepared("w4a4")
    first = prepared(x, layer, None, None)
    faulty.error = torch.cuda.OutOfMemoryError("full")
    with pytest.raises(torch.cuda.OutOfMemoryError):
        prepared(x, layer, None, None)
    faulty.error = None
    assert torch.equal(prepared(x, layer, None, None), first)
    assert dispatch.choose(layer.spec, x.device, x.dtype, "w4a4").backend.name == "faulty"


def test_inside_by_reference_the_reference_runs(monkeypatch):
    faulty, layer, x = Faulty(monkeypatch, True), random_layer("int4"), torch.randn(3, 256)
    prepared = Prepared("w4a4")
    for _ in range(2):
        prepared(x, layer, None, None)
    calls = faulty.calls
    with dispatch.by_reference():
        prepared(x, layer, None, None)
    assert faulty.calls == calls
    prepared(x, layer, None, None)
    assert faulty.calls == calls + 1


WRONG = {
    "x has shape": lambda x, layer, bias, lora: (x[:, :-1], layer, bias, lora),
    "x has dtype": lambda x, layer, bias, lora: (x.long(), layer, bias, lora),
    "bias has shape": lambda x, layer, bias, lora: (x, layer, bias[:-1], lora),
    "bias has dtype": lambda x, layer, bias, lora: (x, layer, bias.long(), lora),
    "LoRA factors": lambda x, layer, bias, lora: (x, layer, bias, lora._replace(up=lora.up[:-1])),
    "the LoRA's strength has shape": lambda x, layer, bias, lora: (x, layer, bias, lora._replace(strength=bias)),
    "meta": lambda x, layer, bias, lora: (x, layer.to("meta"), bias, lora),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_is_refused_after_calls_that_did(message):
    call = torch.randn(3, 256), random_layer("int4"), torch.randn(96), lora_of()
    prepared = Prepared("w4a4")
    for _ in range(2):
        prepared(*call)
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            prepared(*WRONG[message](*call))


def test_factors_that_are_no_contiguous_memory(made):
    layer, prepared, x = random_layer("int4"), Prepared("w4a4"), torch.randn(3, 256)
    lora = Lora(torch.randn(20, 256).T, torch.randn(20, 96).T)
    wanted = svdquant_linear(x, layer, None, lora, "w4a4")
    for _ in range(3):
        assert torch.equal(prepared(x, layer, None, lora), wanted)
    assert not made


class Seen(TorchDispatchMode):
    """Names of the operators that come by."""

    def __init__(self) -> None:
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("call", ["prepared", "function"])
def test_who_looks_at_operators_sees_this_one(call):
    layer, x = random_layer("int4"), torch.randn(3, 256)
    prepared, name = Prepared("w4a4"), ops.plain_operator.default.name()

    def run(x):
        return prepared(x, layer, None, None) if call == "prepared" else svdquant_linear(x, layer, compute="w4a4")

    (wanted, *_) = [run(x) for _ in range(2)]
    with Seen() as seen:
        assert torch.equal(run(x), wanted)
    assert seen.names.count(name) == 1
    with torch.profiler.profile() as profiler:
        run(x)
    assert name in {event.key for event in profiler.key_averages()}
    traced = torch.fx.experimental.proxy_tensor.make_fx(run)(x)
    assert any(name.split("::")[1] in str(node.target) for node in traced.graph.nodes)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = run(mode.from_tensor(x))
    assert fake.shape == wanted.shape and type(fake) is not torch.Tensor
    without_data = torch.randn(3, 256, device="meta"), layer.to("meta")
    assert prepared(*without_data, None, None).is_meta and svdquant_linear(*without_data).is_meta
    torch._dynamo.reset()
    assert torch.equal(torch.compile(run, backend="eager", fullgraph=True)(x), wanted)
    with pytest.raises(RuntimeError, match="Tensor"):  # a list of tensors that may be absent is nothing it can hold
        torch.jit.trace(run, x, check_trace=False)


def test_nobody_looks_at_operators_in_a_plain_call(monkeypatch):
    monkeypatch.setattr(ops, "plain_operator", None)
    monkeypatch.setattr(ops, "operator", None)
    layer, prepared, x = random_layer("int4"), Prepared("w4a4"), torch.randn(3, 256)
    assert torch.equal(svdquant_linear(x, layer, compute="w4a4"), prepared(x, layer, None, None))
    monkeypatch.setattr(ops, "QUESTIONS", (lambda: True,))
    with pytest.raises(TypeError):
        svdquant_linear(x, layer, compute="w4a4")


def test_gradients_are_those_of_the_operator():
    layer, prepared, x = random_layer("int4"), Prepared("w16"), torch.randn(3, 256)
    for _ in range(2):
        prepared(x, layer, None, None)
    with torch.enable_grad():
        x.requires_grad_(True)
        dx, wanted = (
            torch.autograd.grad(y.sum(), x)[0]
            for y in (prepared(x, layer, None, None), svdquant_linear(x, layer, compute="w16"))
        )
    assert torch.equal(dx, wanted)


def test_two_threads():
    layers = [random_layer("int4", seed=seed) for seed in (0, 1)]
    prepared, wrong = Prepared("w4a4"), []

    def work(layer: Layer) -> None:
        with torch.no_grad():
            for rows in (3, 40, 3, 200) * 5:
                x = torch.randn(rows, 256)
                if not torch.equal(prepared(x, layer, None, None), svdquant_linear(x, layer, compute="w4a4")):
                    wrong.append(rows)

    threads = [threading.Thread(target=work, args=(layer,)) for layer in layers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_is_made_of_tensors_is_made_anew_when_they_change():
    layer, source = random_layer("int4"), torch.ones(2)
    made = [layer.once("sum", (source,), source.sum) for _ in range(2)]
    assert made[0] is made[1]
    source.add_(1)
    assert layer.once("sum", (source,), source.sum) == 4
    other = torch.ones(3)
    assert layer.once("sum", (other,), other.sum) == 3
    other.data = torch.full((3,), 5.0)
    assert layer.once("sum", (other,), other.sum) == 15


def test_of_a_layer_for_one_call_nothing_is_kept():
    layer, source = random_layer("int4"), torch.ones(2)
    passing = Layer.known(layer.spec, layer.tensors, passing=True)
    first, second = (passing.once("sum", (source,), source.sum) for _ in range(2))
    assert first == second == 2 and first is not second
    alive = weakref.ref(first)
    del first
    assert alive() is None


def test_a_centred_bias_follows_its_bias():
    layer, bias = random_layer("int4", centred=True), torch.randn(96)
    first = layer.centred_bias(bias)
    assert layer.centred_bias(bias) is first
    bias.add_(1)
    assert torch.equal(layer.centred_bias(bias), bias + layer["out_mean"])


def test_a_centred_bias_of_a_server_follows_its_bias():
    """A hook of the host's writes into the parameter; in inference mode torch does not count it."""
    layer = random_layer("int4", centred=True)
    with torch.inference_mode():
        bias = torch.nn.Parameter(torch.randn(96), requires_grad=False)
        for _ in range(2):
            bias.data.copy_(torch.randn(96))
            assert torch.equal(layer.centred_bias(bias), bias + layer["out_mean"])
