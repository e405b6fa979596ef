"""Backends and modes against each other: what may win, what never does, and what is measured at all."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from svdquant_pack.kernels import FORMATS, LayerSpec, backends, choose, dispatch, rivals
from svdquant_pack.kernels.backends import Backend, discover, each_call, reference
from svdquant_pack.kernels.measured import ROWS, Kind
from svdquant_pack.kernels.modes import FEW
from svdquant_pack.kernels.self_test import TOLERANCE
from svdquant_pack.quantize.files.lifecycle import write_whole

CPU = torch.device("cpu")
SPEC = LayerSpec("int4", 96, 256, 16)
FP32 = torch.float32


pytestmark = pytest.mark.usefixtures("as_in_a_new_process")


class Track:
    """Backends that note who ran last, and a clock that knows how long each takes."""

    def __init__(self, monkeypatch, seconds: dict[str, float]) -> None:
        self.seconds, self.last = seconds, ""
        self.found = {"table": self.backend("table", 99), "reference": reference.BACKEND}
        for module in (dispatch, rivals):
            monkeypatch.setattr(module, "discover", lambda: (self.found, {}))

    def backend(
        self, name: str, claim: int, wrong: Callable = lambda y: y, modes: tuple[str, ...] = ("w4a4",)
    ) -> Backend:
        def linear(*call):
            self.last = name
            return wrong(reference.linear(*call))

        def claims(call):
            return claim if call.compute in modes and (claim > 0 or call.measured) else "not this"

        return Backend(name, claims, each_call(linear))

    def add(self, name: str, **more) -> None:
        self.found[name] = self.backend(name, -1, **more)

    def clock(self, run: Callable[[], object], best: float) -> float | None:
        self.last = "reference"
        run()
        return self.seconds.get(self.last, 10.0)

    def winner(self) -> tuple[str, str]:
        found = rivals.compare(SPEC, CPU, FP32, FEW, self.clock)
        assert found.tabled.name == "table w4a4" == " ".join((found.tabled.backend, found.tabled.compute))
        assert found.kind == Kind("int4", False, 4, 96, 256, "float32", FEW)
        self.found_last = found
        return found.backend, found.compute


@pytest.fixture
def track(monkeypatch) -> Callable[..., Track]:
    monkeypatch.setattr(type(FORMATS["int4"]), "modes", tuple(m for m in FORMATS["int4"].modes if m.compute != "w8a8"))
    return lambda **seconds: Track(monkeypatch, seconds)


def test_the_faster_one_wins(track):
    race = track(table=1.0, rival=0.9)
    race.add("rival")
    assert race.winner() == ("rival", "w4a4") and race.found_last.chosen.seconds == 0.9
    assert {each.name for each in race.found_last.timed} >= {"table w4a4", "rival w4a4", "reference w16"}


@pytest.mark.parametrize("seconds", [0.98, 1.0, 1.1])
def test_what_gains_little_leaves_the_tables_choice(track, seconds):
    race = track(table=1.0, rival=seconds)
    race.add("rival")
    assert race.winner() == ("table", "w4a4")


def test_what_was_faster_once_and_not_the_second_time_loses(track):
    race = track(table=1.0)
    race.add("rival")
    times = iter([0.5, 1.2])
    clock = race.clock
    race.clock = lambda run, best: next(times) if clock(run, best) == 10.0 and race.last == "rival" else 1.0
    assert race.winner() == ("table", "w4a4")


WRONG = {
    "a wrong sign": lambda y: -y,
    "a lost row": lambda y: y * (torch.arange(y.shape[0]) != y.shape[0] - 1)[:, None],
    "one NaN": lambda y: torch.where(torch.arange(y.numel()).view_as(y) == y.numel() - 1, torch.nan, y),
    "a wrong scale": lambda y: y * 1.03,
    "a wrong shape": lambda y: y[:, :-1],
    "nothing": torch.zeros_like,
}


@pytest.mark.parametrize("fault", WRONG)
def test_what_is_wrong_never_wins(track, fault):
    race = track(table=1.0, liar=1e-9)
    race.add("liar", wrong=WRONG[fault])
    assert race.winner() == ("table", "w4a4")
    assert not [each for each in race.found_last.timed if each.backend == "liar"]
    assert "wrong by" in race.found_last.left_out["liar w4a4"] or "needed (128, 96)" in str(race.found_last.left_out)


def test_what_fails_is_left_out_with_its_reason(track):
    def broken(y):
        raise RuntimeError("no kernel image\nmore")

    race = track(table=1.0, broken=1e-9)
    race.add("broken", wrong=broken)
    assert race.winner() == ("table", "w4a4")
    assert race.found_last.left_out["broken w4a4"] == "RuntimeError: no kernel image"


def test_out_of_memory_is_the_hosts_business(track):
    def full(y):
        raise torch.cuda.OutOfMemoryError("full")

    race = track(table=1.0)
    race.add("full", wrong=full)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        race.winner()


def test_nothing_is_measured_where_the_tables_choice_is_wrong(track):
    race = track(table=1.0)
    race.found["table"] = race.backend("table", 99, wrong=WRONG["a wrong sign"])
    with pytest.raises(ValueError, match="wrong by 2"):
        race.winner()


def test_what_takes_much_longer_gets_no_second_look(track):
    race = track(table=1.0)
    race.clock = lambda run, best: 1.0 if best == float("inf") else None
    assert race.winner() == ("table", "w4a4")
    assert race.found_last.left_out["reference w16"] == "takes much longer than another way"


def test_a_rival_dropped_into_the_folder_is_compared_and_a_wrong_one_loses(tmp_path, monkeypatch):
    """Two files, as somebody would add them; the real clock, the real reference."""
    source = (
        "import torch\nfrom . import Backend, each_call\n"
        "BACKEND = Backend('NAME', lambda call: -1 if call.measured and call.compute == 'w4a4' else 'no', "
        "each_call(lambda x, layer, *rest: VALUE))\n"
    )
    folder = tmp_path / "more"
    folder.mkdir()
    (folder / "liar.py").write_text(source.replace("NAME", "liar").replace("VALUE", "x.new_ones(len(x), layer.spec.n)"))
    (folder / "failing.py").write_text(source.replace("NAME", "failing").replace("VALUE", "x.nothing"))
    monkeypatch.setattr(backends, "__path__", [*backends.__path__, str(folder)])
    found = discover.__wrapped__()
    assert {"liar", "failing"} <= found[0].keys()
    for module in (dispatch, rivals):
        monkeypatch.setattr(module, "discover", lambda: found)
    best = rivals.compare(SPEC, CPU, FP32, FEW)
    assert best.backend not in ("liar", "failing") and "wrong by" in best.left_out["liar w4a4"]
    assert "no attribute 'nothing'" in best.left_out["failing w4a4"]


@pytest.mark.parametrize("format", [name for name, fmt in FORMATS.items() if fmt.low_rank])
def test_for_real_on_this_cpu(format):
    found = rivals.compare(LayerSpec(format, 96, 256, 16), CPU, FP32, FEW)
    usual = choose(LayerSpec(format, 96, 256, 16), CPU, FP32, "auto", FEW)
    assert (found.tabled.backend, found.tabled.compute) == (usual.backend.name, usual.compute)
    assert all(each.seconds > 0 and each.error <= TOLERANCE for each in found.timed) and len(found.timed) >= 1
    assert found.chosen == found.tabled or found.chosen.seconds < rivals.BETTER * found.tabled.seconds
    names = {each.name for each in found.timed} | found.left_out.keys()
    assert {f"reference {mode}" for mode in FORMATS[format].computes if mode != "w8a8"} <= names
    assert not [name for name in names if name.startswith("cublas")], "fp8 on a CPU is for who asks for it"


def test_layers_for_8_bit_activations_get_no_4_bit():
    found = rivals.compare(LayerSpec("int4", 96, 256, 16, act_bits=8), CPU, FP32, FEW)
    assert not [name for name in {each.name for each in found.timed} | found.left_out.keys() if "w4a4" in name]


def test_no_way_takes_memory_beside_the_layer_unless_a_table_says_so(track):
    race = track(table=1.0, rival=0.1)
    race.add("rival", modes=("w8a8",))
    assert race.winner() == ("table", "w4a4")


def test_each_kind_is_measured_once():
    unsigned = LayerSpec("int4", 96, 256, 16, act_unsigned=(64, 256))
    specs = [SPEC, LayerSpec("int4", 96, 256, 32), unsigned, LayerSpec("int4", 96, 256, 16, act_unsigned=(64, 128))]
    specs.append(LayerSpec("awq_w4a16", 96, 256))
    wanted = rivals.missing(specs, CPU, FP32)
    assert len(wanted) == 2 * len(ROWS), "by size and kind; layers with 16-bit activations have no rival"
    said = []
    found = rivals.measure(
        [(spec, rows) for spec, rows in wanted if rows == FEW], CPU, FP32, write_whole, lambda *a: said.append(a)
    )
    assert [each.kind.partly_unsigned for each in found] == [False, True]
    assert [done for done, _, _ in said] == [0, 1, 2] and {total for _, total, _ in said} == {2}
    assert {rows for _, rows in rivals.missing(specs, CPU, FP32)} == set(ROWS) - {FEW}
    assert len(rivals.missing(specs, CPU, torch.bfloat16)) == len(wanted), "another dtype takes another time"


def test_what_was_measured_before_a_stop_is_kept():
    wanted = rivals.missing([SPEC], CPU, FP32)

    def stop(done: int, total: int, what: str) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rivals.measure(wanted, CPU, FP32, write_whole, stop)
    assert len(rivals.missing([SPEC], CPU, FP32)) == len(wanted) - 1


def test_a_disk_that_takes_nothing_is_said():
    def write(path: Path, data: bytes) -> None:
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        rivals.measure(rivals.missing([SPEC], CPU, FP32), CPU, FP32, write)
