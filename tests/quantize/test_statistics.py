"""Statistics: streamed equals dense, every stratum is present, runs add up, files merge."""

from pathlib import Path

import pytest
import torch

from svdquant_pack.quantize.calibration.file import METADATA_ROOM, Statistics, StatisticsError
from svdquant_pack.quantize.calibration.several import describe, merge, tokens_for
from svdquant_pack.quantize.calibration.tokens import BUCKETS, ModelCall, bucket_of, survivors
from svdquant_pack.quantize.files.tensor_file import TensorFile

K = 32


def new(path, room=256, layers=("a", "b")):
    return Statistics.create(path, dict.fromkeys(layers, K), room, {"family": "flux", "shared": {"c": "a"}})


def feed(statistics, seed=0, steps=10, batch=4, length=20, layer="a"):
    """A run with guidance: the first half of the batch has the prompt. Returns every row that was seen."""
    generator, data, seen = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1), []
    for step in range(steps):
        x = torch.randn(batch, length, K, generator=data) * (1 + step)
        assert statistics.entries[layer].observe(x, ModelCall(step, steps, (0, 1), batch), generator)
        seen.append(x)
    statistics.add_run(id=f"run {seed}", steps=steps)
    return torch.stack(seen)


def test_maxima_and_second_moments_are_those_of_everything_seen(tmp_path):
    statistics = new(tmp_path / "s.safetensors")
    seen = feed(statistics)
    entry = Statistics.open(tmp_path / "s.safetensors").entry("c")  # c reads what a reads
    assert int(entry.count.sum()) == 10 * 4 * 20 and Statistics.open(tmp_path / "s.safetensors").entry("d") is None
    for bucket in range(BUCKETS):
        rows = seen[[step for step in range(10) if step * BUCKETS // 10 == bucket]].reshape(-1, K)
        assert torch.equal(entry.absmax[bucket], rows.abs().amax(0))
        torch.testing.assert_close(entry.square[bucket], rows.square().sum(0))
    assert torch.equal(entry.channel_absmax(), seen.abs().amax((0, 1, 2)))


def test_every_stratum_keeps_its_share_and_rows_are_rows_that_were_seen(tmp_path):
    statistics = new(tmp_path / "s.safetensors", room=256)
    seen = feed(statistics).reshape(-1, K).bfloat16()
    entry = statistics.entries["a"]
    assert entry.kept == 256
    counts = entry.stratum.long().bincount(minlength=64)
    assert counts.min() >= 3 and counts.max() <= 5  # 64 strata share 256 places
    kept, rows = {tuple(row.tolist()) for row in entry.tokens}, {tuple(row.tolist()) for row in seen}
    assert len(kept) == 256 and kept <= rows
    assert 0.02 < entry.hold.float().mean() < 0.25
    fit, buckets = entry.part(hold=False)
    held, _ = entry.part(hold=True)
    assert len(fit) + len(held) == 256 and set(buckets.tolist()) == set(range(BUCKETS))


def test_a_rare_stratum_is_kept_whole():
    keys = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    strata = torch.zeros(1000, dtype=torch.int64)
    strata[:7] = 5
    stay = survivors(keys, strata, 100)
    assert len(stay) == 100 and (strata[stay] == 5).sum() == 7
    largest = keys[7:].topk(93).values.min()
    assert keys[stay[strata[stay] == 0]].min() == largest


def test_where_there_is_room_for_all_they_stay_in_order():
    assert survivors(torch.tensor([0.2, 0.9, 0.5]), torch.tensor([3, 0, 0]), 3).tolist() == [0, 1, 2]
    assert survivors(torch.tensor([0.2, 0.9, 0.5]), torch.tensor([3, 0, 0]), 2).tolist() == [1, 0]


def test_the_file_is_laid_out_as_documented(tmp_path, monkeypatch):
    """Also where the system cannot take the disk beforehand."""
    from svdquant_pack.quantize.calibration import file

    monkeypatch.setattr(file, "reserve", lambda stream, size: None)
    path = new(tmp_path / "s.safetensors", 16, ("a",)).path
    found = {name: (info.shape, info.dtype) for name, info in TensorFile(path).infos.items()}
    assert found == {
        "a.tokens": ((16, K), torch.bfloat16),
        "a.key": ((16,), torch.float32),
        "a.stratum": ((16,), torch.int16),
        "a.hold": ((16,), torch.uint8),
        "a.absmax": ((BUCKETS, K), torch.float32),
        "a.square": ((BUCKETS, K), torch.float32),
        "a.count": ((BUCKETS,), torch.int64),
        "a.sensitivity": ((2,), torch.float32),
    }
    room = int.from_bytes(path.read_bytes()[:8], "little")
    assert 1 << 18 < room < 1 << 19, "for the records of some thousand runs"
    empty = Statistics.open(Statistics.create(tmp_path / "e.safetensors", {}, 16, {"family": "flux"}).path)
    assert empty.room == 0 and not empty.entries


def test_a_call_of_the_model_stays_what_it_was():
    with pytest.raises(AttributeError):
        ModelCall(0, 4).step = 1


def test_sampling_is_uniform_within_a_stratum():
    hits = torch.zeros(40)
    for seed in range(400):
        keys = torch.rand(40, generator=torch.Generator().manual_seed(seed))
        hits[survivors(keys, torch.zeros(40, dtype=torch.int64), 10)] += 1
    assert (hits / 400 - 0.25).abs().max() < 0.09  # four standard deviations


def test_two_files_merge_into_what_one_longer_run_gives(tmp_path):
    one, two, both = (new(tmp_path / f"{name}.safetensors", 128, ("a",)) for name in "123")
    for statistics, seeds in ((one, (0,)), (two, (5,)), (both, (0, 5))):
        for seed in seeds:
            statistics.entries["a"].sensitivity += torch.tensor([2.0 + seed, 1.0])
            feed(statistics, seed)
    merged = merge([one.path, two.path], tmp_path / "m.safetensors").entries["a"]
    single = both.entries["a"]
    for part in ("absmax", "count", "sensitivity"):
        assert torch.equal(getattr(merged, part), getattr(single, part))
    torch.testing.assert_close(merged.square, single.square)
    assert torch.equal(merged.key.sort().values, single.key.sort().values)
    order = merged.key.argsort(), single.key.argsort()
    assert torch.equal(merged.tokens[order[0]], single.tokens[order[1]])
    assert [run["id"] for run in Statistics.open(tmp_path / "m.safetensors").metadata["runs"]] == ["run 0", "run 5"]


def test_a_run_counts_once_and_models_do_not_mix(tmp_path):
    one, other = new(tmp_path / "1.safetensors"), new(tmp_path / "2.safetensors", layers=("z",))
    feed(one)
    with pytest.raises(StatisticsError, match="another file holds too"):
        merge([one.path, one.path], tmp_path / "m.safetensors")
    with pytest.raises(StatisticsError, match="different models"):
        merge([one.path, other.path], tmp_path / "m.safetensors")


def test_the_same_run_gives_the_same_bytes(tmp_path):
    files = [new(tmp_path / name) for name in ("1.safetensors", "2.safetensors")]
    for statistics in files:
        feed(statistics, 3)
    assert files[0].path.read_bytes() == files[1].path.read_bytes()


def test_a_run_survives_reopening_and_adds_up(tmp_path):
    feed(new(tmp_path / "s.safetensors"), 0)
    again = Statistics.open(tmp_path / "s.safetensors", writable=True)
    feed(again, 1)
    found = describe(tmp_path / "s.safetensors")
    assert len(found["runs"]) == 2 and found["layers"]["a"]["seen"] == 1600 and found["layers"]["a"]["tokens"] == 256
    assert found["layers"]["b"]["tokens"] == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_is_refused_and_leaves_no_trace(tmp_path, bad):
    statistics = new(tmp_path / "s.safetensors")
    x = torch.ones(1, 3, K)
    x[0, 1, 5] = bad
    assert not statistics.entries["a"].observe(x, ModelCall(0, 4), torch.Generator())
    assert not statistics.entries["a"].count.any() and not statistics.entries["a"].kept


def test_inputs_without_a_sequence_have_one_position():
    assert ModelCall(3, 4, (0, 1), 2).strata((6, K)).tolist() == [6 * 8] * 6
    strata = ModelCall(0, 4, (1, 0), 2).strata((2, 8, K))
    assert strata.tolist() == [4, 4, 5, 5, 6, 6, 7, 7, 0, 0, 1, 1, 2, 2, 3, 3]
    assert bucket_of(ModelCall(7, 8).strata((1, 5, K))).tolist() == [7] * 5


def test_disk_limits_the_tokens(tmp_path):
    assert tokens_for({"a": 1000, "b": 1000}, 8192, 4000 * 100) == 100
    assert tokens_for({"a": 1000}, 50, 10**9) == 64
    path = new(tmp_path / "s.safetensors", room=100_000).path
    assert path.stat().st_blocks * 512 >= path.stat().st_size  # a disk that fills up later does not touch it


def test_other_files_are_named(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(StatisticsError, match="is no statistics file"):
        Statistics.open(tmp_path / "x.safetensors")


def test_runs_of_few_steps_and_more_calls_than_steps_have_buckets():
    assert [ModelCall(step, 4).bucket for step in range(4)] == [0, 2, 4, 6]
    assert ModelCall(0, 1).bucket == 0 and ModelCall(1, 1).bucket == ModelCall(9, 8).bucket == BUCKETS - 1
    assert ModelCall(0, 0).bucket == 0
    assert ModelCall(7, 8).strata((1, 4, K)).tolist() == [56, 57, 58, 59], "all with the prompt unless said otherwise"


def test_free_room_belongs_to_no_stratum(tmp_path):
    """A run that is only watched late: rows that were never used must not compete for the room."""
    statistics = new(tmp_path / "s.safetensors", room=16)
    entry, seen = statistics.entries["a"], torch.Generator().manual_seed(0)
    for _ in range(3):
        assert entry.observe(torch.randn(1, 40, K, generator=seen), ModelCall(7, 8), seen)
    assert entry.kept == 16 and entry.stratum[entry.key > 0].min() >= 56
    few = statistics.entries["b"]
    assert few.observe(torch.randn(1, 5, K, generator=seen), ModelCall(7, 8), seen)
    assert few.kept == sum(len(few.part(hold)[0]) for hold in (False, True)) == 5


def test_the_mean_square_counts_every_part_of_the_run_alike(tmp_path):
    statistics = new(tmp_path / "s.safetensors")
    seen = feed(statistics, steps=10)  # two of the ten steps share a bucket, and late ones are larger
    buckets = [[step for step in range(10) if step * BUCKETS // 10 == bucket] for bucket in range(BUCKETS)]
    wanted = torch.stack([seen[steps].square().reshape(-1, K).mean(0) for steps in buckets]).mean(0)
    torch.testing.assert_close(statistics.entries["a"].channel_square(), wanted)
    assert not statistics.entries["b"].channel_square().any(), "nothing seen"
    assert statistics.entries["a"].observe(torch.zeros(0, K), ModelCall(0, 4), torch.Generator())


@pytest.mark.parametrize(("k", "room"), [(5, 3), (1, 1), (7, 64)])
def test_every_part_lies_where_its_numbers_can_be_read(tmp_path, k, room):
    path = tmp_path / "new" / "folder" / "s.safetensors"
    made = Statistics.create(path, {"a": k, "long": k + 2}, room, {"family": "f" * room})
    assert made.entries["a"].observe(torch.ones(1, 2, k), ModelCall(0, 4), torch.Generator())
    assert (8 + int.from_bytes(path.read_bytes()[:8], "little")) % 64 == 0
    assert torch.equal(Statistics.open(path).entry("a").absmax[0], torch.ones(k))


def test_a_disk_without_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    import shutil

    path = new(tmp_path / "s.safetensors").path
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**6, 10**6 - 9, 9))
    with pytest.raises(StatisticsError, match=r"n\.safetensors may grow by .* bytes and 9 are free"):
        new(tmp_path / "n.safetensors")
    assert sorted(tmp_path.iterdir()) == [path]
    Statistics.open(path, writable=True)  # its bytes are on the disk already


def test_a_sparse_file_needs_the_disk_that_it_does_not_take_yet(tmp_path, monkeypatch):
    import shutil

    path = new(tmp_path / "s.safetensors", room=4096).path
    whole, size = path.read_bytes(), path.stat().st_size
    with path.open("wb") as file:  # as a copy that leaves zeros out
        file.write(whole.rstrip(b"\0"))
        file.truncate(size)
    more = size - path.stat().st_blocks * 512
    if more <= 0:
        pytest.skip("this file system keeps zeros")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(size, size - more + 1, more - 1))
    assert Statistics.open(path).widths == {"a": K, "b": K}
    with pytest.raises(StatisticsError, match=f"may grow by {more:,} bytes and {more - 1:,} are free"):
        Statistics.open(path, writable=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(size, size - more, more))
    Statistics.open(path, writable=True)


def test_what_stopped_the_making_of_a_file_is_what_is_said(tmp_path, monkeypatch):
    """Also where the temporary file is gone by then, or never was."""
    from svdquant_pack.quantize.calibration import file as module

    def full(stream, size):
        if gone:
            Path(stream.name).unlink()
        raise OSError("no space")

    monkeypatch.setattr(module, "reserve", full)
    for gone in (False, True):  # noqa: B007
        with pytest.raises(OSError, match="no space"):
            new(tmp_path / "s.safetensors")
        assert not list(tmp_path.iterdir())


def test_no_more_runs_than_the_header_has_room_for(tmp_path):
    statistics = new(tmp_path / "s.safetensors")
    with pytest.raises(StatisticsError, match="no room for more runs"):
        statistics.add_run(id="x", note="y" * (METADATA_ROOM + 64))
    assert not Statistics.open(tmp_path / "s.safetensors").metadata.get("runs")


def test_a_group_has_the_statistics_of_whichever_layer_was_watched(tmp_path):
    statistics = new(tmp_path / "s.safetensors")
    assert statistics.of_group(["not", "b", "a"]) is statistics.entries["b"]
    assert statistics.of_group(["c"]) is statistics.entries["a"] and statistics.of_group(["not"]) is None


def test_rows_that_are_no_sequence_of_the_batch_are_one_stratum():
    for call, shape in ((ModelCall(0, 4, (0, 1), 6), (6, K)), (ModelCall(0, 4, (0, 1), 4), (2, 8, K))):
        assert not call.strata(shape).any()
