"""Finished layers of a stopped run: what comes back is what was kept, or nothing."""

import torch

from svdquant_pack.quantize.maker.work_folder import WorkFolder

TENSORS = {"b.weight": torch.arange(64, dtype=torch.int8), "a.scale": torch.tensor(0.5, dtype=torch.bfloat16)}
RECORD = {"layer": {"shape": [8, 8], "error": 0.1, "by_bucket": [None, 0.25]}}


def test_what_was_kept_comes_back(tmp_path):
    work = WorkFolder.beside(tmp_path / "x.safetensors")
    assert work.find("key") is None
    work.keep("key", TENSORS, RECORD)
    tensors, record = work.find("key")
    assert record == RECORD and tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)


def test_every_flipped_byte_is_seen(tmp_path):
    """It went into the finished file."""
    work = WorkFolder.beside(tmp_path / "x.safetensors")
    work.keep("key", TENSORS, RECORD)
    (path,) = work.path.glob("*.safetensors")
    whole = path.read_bytes()
    data = len(whole) - sum(tensor.nbytes for tensor in TENSORS.values())
    header = [place for place in range(8, data, 7) if whole[place : place + 1] != b" "]
    for place in [*header, *range(data, len(whole))]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        found = work.find("key")
        assert found is None or (found[1] == RECORD and found[0].keys() == TENSORS.keys())
        assert found is None or place < data
    path.write_bytes(whole[:-1])
    assert work.find("key") is None
