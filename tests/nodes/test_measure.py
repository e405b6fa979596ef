"""compute = measured on the host's own model: measured once, said by Model Info, and nobody else's pictures change."""

import json
import logging

import pytest
import torch

from svdquant_pack.kernels import dispatch, measured, rivals
from svdquant_pack.kernels.measured import Timed, known, path
from svdquant_pack.kernels.modes import FEW
from svdquant_pack.nodes.host.describe import describe_model
from svdquant_pack.nodes.host.model import load_model
from svdquant_pack.nodes.model_info import SVDQuantModelInfo
from svdquant_pack.quantize.files.lifecycle import write_whole
from svdquant_pack.tests.nodes.sampling import forward

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "cache"))
    monkeypatch.setattr(rivals, "ROWS", (FEW,))  # a part of the time
    known.cache_clear()
    dispatch.forget_choices()
    yield
    known.cache_clear()
    dispatch.forget_choices()


def info(patcher) -> str:
    return SVDQuantModelInfo().describe(patcher)["result"][0]


def store(patcher, rows: tuple[int, ...]) -> None:
    """As if w16 had been the fastest for every layer."""
    specs, found = [module.four_bit.spec for module in patcher.packed_layers().values()], []
    for spec, _ in rivals.kinds(specs):
        for each in rows:
            usual = dispatch.choose(spec, CPU, torch.float32, "auto", each)
            timed = Timed(usual.backend.name, usual.compute, 4.0, 0.0), Timed("reference", "w16", 1.0, 0.0)
            kind = measured.Kind.of(spec, torch.float32, each)
            found.append(measured.Measured(kind, "reference", "w16", "2026-01-31", timed))
    measured.save(found, CPU, write_whole)
    dispatch.forget_choices()


def test_a_model_is_measured_once_and_says_what_runs_it(checkpoints, caplog):
    caplog.set_level(logging.INFO, "svdquant")
    first = load_model(str(checkpoints["int4"]), "measured")
    assert "measuring which kernels are the fastest for" in caplog.text and "measured in" in caplog.text
    layers = json.loads(path().read_text())[measured.device_name(CPU)]["layers"]
    specs = {module.four_bit.spec for module in first.packed_layers().values()}
    assert len(layers) == len({(spec.kind, spec.n, spec.k) for spec in specs if spec.fmt.low_rank})
    known.cache_clear()
    caplog.clear()
    load_model(str(checkpoints["int4"]), "measured")
    assert "measur" not in caplog.text and forward(first).isfinite().all()


def test_what_was_measured_runs_and_is_said_with_its_reasons(checkpoints):
    plain = load_model(str(checkpoints["int4"]))
    before, said = forward(plain), info(plain)
    assert "by the tables" in said and "measured on" not in said and "\nmeasured " not in said
    assert "not used  cublas: runs where it was measured to be the fastest" in said
    exact = forward(load_model(str(checkpoints["int4"]), "w16"))
    store(plain, measured.ROWS)
    known.cache_clear()
    model = load_model(str(checkpoints["int4"]), "measured")
    assert torch.equal(forward(model), exact) and not torch.equal(before, exact)
    text = info(model)
    for expected in (
        "compute   measured\n",
        "reference w16, 0.25 of ",
        "'s time, measured on 2026-01-31 (",
        f"measured  with driver none, torch {torch.__version__}, triton ",
        "awq_w4a16: reference w16, by the tables (6 layers)",
        "partly unsigned, ",
    ):
        assert expected in text, text
    assert torch.equal(forward(plain), before), "a model that was loaded before runs as before"
    later = load_model(str(checkpoints["int4"]))
    assert torch.equal(forward(later), before) and info(later) == said, "and so does one that did not ask"


def test_what_is_of_another_driver_is_measured_again_and_said(checkpoints, monkeypatch):
    model = load_model(str(checkpoints["int4"]))
    store(model, (FEW,))
    whole = json.loads(path().read_text())
    whole[measured.device_name(CPU)]["driver"] = "570.86"
    path().write_text(json.dumps(whole))
    known.cache_clear()
    monkeypatch.setattr("svdquant_pack.nodes.host.model.measure_layers", lambda *model: None)
    text = info(load_model(str(checkpoints["int4"]), "measured"))
    assert "measured  is not used: they were measured with driver 570.86, now none" in text and "by the tables" in text


def test_a_disk_without_room_leaves_it_to_the_tables(checkpoints, monkeypatch, caplog):
    def full(*file):
        raise OSError("no space left on device")

    monkeypatch.setattr("svdquant_pack.nodes.host.measure.write_whole", full)
    model = load_model(str(checkpoints["int4"]), "measured")
    assert "kernels were not measured, the tables decide: no space left" in caplog.text
    assert torch.equal(forward(model), forward(load_model(str(checkpoints["int4"]))))


def test_stopping_the_prompt_stops_measuring(checkpoints):
    import comfy.model_management

    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        load_model(str(checkpoints["int4"]), "measured")
    assert not path().exists()


def test_describe_names_the_kind_of_every_layer(checkpoints):
    found = describe_model(load_model(str(checkpoints["int4"])))
    texts = {layer["decided"].split(":")[0] for layer in found["backends"].values()}
    assert texts == {"int4", "int4, partly unsigned", "awq_w4a16"}
