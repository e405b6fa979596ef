"""A name that is accepted stays in its folder on every system; what is refused says why."""

import os
from pathlib import Path, PurePosixPath, PureWindowsPath

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from svdquant_pack.quantize.files.names import FileNameError, inside, parts, refuse

SUFFIX = ".safetensors"
GOOD = [
    "model",
    "sub/model",
    "sub\\model",
    "model.safetensors",
    "模型",
    "a b.c",
    "COM",
    "console",
    ".hidden",
    "x" * 243,
]
BAD = {
    "\\Windows\\Temp\\evil": "root",
    "/Windows/evil": "root",
    "C:evil": "drive",
    "C:\\evil": "drive",
    "\\\\server\\share\\evil": "drive",
    "\\\\?\\C:\\evil": "drive",
    "//server/evil": "root",
    "/etc/evil": "root",
    "../evil": "leads elsewhere",
    "a/../../evil": "leads elsewhere",
    "a\\..\\..\\evil": "leads elsewhere",
    "..": "leads elsewhere",
    "a/./b": "leads elsewhere",
    "a//b": "leads elsewhere",
    "": "empty",
    " ": "empty",
    "a:b": r"':'|drive",
    "model:stream": "':'",
    "CON": "device",
    "aux": "device",
    "sub/NUL.x": "device",
    "com1": "device",
    "LPT\u00b2": "device",
    "nul .x": "device",
    "folder /x": "space",
    "folder./x": "dot",
    " x": "space",
    "x\0y": r"\\x00",
    "x\ny": r"\\n",
    "x?": r"'\?'",
    "x\ud800": "surrogate",
    "x" * 244: "255 bytes, at most|256 bytes|at most 255",
    "模" * 82: "at most 255",
    "a/" * 600 + "x": "at most 1000",
}


@pytest.mark.parametrize("name", GOOD)
def test_usual_names_are_names(tmp_path, name):
    assert refuse(name, SUFFIX) is None
    path = inside(tmp_path, name, SUFFIX)
    assert path.name.endswith(SUFFIX) and path.is_relative_to(tmp_path)


@pytest.mark.parametrize("name", BAD)
def test_other_names_are_refused_with_a_reason(tmp_path, name):
    with pytest.raises(FileNameError, match=f"needed a name inside .*{tmp_path.name}: .*({BAD[name]})"):
        inside(tmp_path, name, SUFFIX)


ODD = st.sampled_from([*"/\\.: ~C\0aX\ud800é", "..", "CON", "nul", "C:", "\\\\?\\", "x" * 250])
NAMES = st.one_of(st.text(max_size=300), st.lists(ODD, max_size=12).map("".join))


@given(NAMES)
@example("C:x")
@example("a\\..\\..\\x")
def test_what_is_accepted_stays_in_the_folder_on_every_system(name):
    if refuse(name, SUFFIX) is not None:
        return
    windows, posix = PureWindowsPath("D:\\models"), PurePosixPath("/models")
    for folder in (windows, posix):
        whole = folder.joinpath(*parts(name, SUFFIX))
        assert whole.is_relative_to(folder) and ".." not in whole.parts and len(whole.parts) > len(folder.parts)
        # nothing in it means something else: as many parts as were written
        assert len(whole.parts) - len(folder.parts) == len(parts(name, SUFFIX))
    assert not any(PureWindowsPath(part).is_reserved() for part in parts(name, SUFFIX))
    assert all(len(os.fsencode(part)) <= 255 and part == part.rstrip(" .") for part in parts(name, SUFFIX))
    assert not set(name) & set('<>:"|?*') and min(map(ord, name)) >= 32


@given(NAMES)
def test_what_is_accepted_can_be_written(tmp_path_factory, name):
    if refuse(name, SUFFIX) is None:
        path = inside(tmp_path_factory.mktemp("folder"), name, SUFFIX)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def test_a_link_out_of_the_folder_is_no_way(tmp_path):
    (tmp_path / "outside").mkdir()
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "out").symlink_to(tmp_path / "outside")
    (folder / "sub").mkdir()
    (folder / "in").symlink_to(folder / "sub")
    (folder / "ring").symlink_to(folder / "ring")
    for name in ("out/x", "out\\x", "out/deeper/x", "ring/x"):
        with pytest.raises(FileNameError, match="a link in it leads out of the folder"):
            inside(folder, name, SUFFIX)
    assert inside(folder, "in/x", SUFFIX) == folder / "in" / "x.safetensors"


def test_a_folder_that_is_itself_a_link_is_a_folder(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "models").symlink_to(tmp_path / "disk")
    assert inside(tmp_path / "models", "x", SUFFIX) == Path(tmp_path / "models" / "x.safetensors")
