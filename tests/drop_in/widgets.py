"""What ComfyUI's nodes offer of the four files: test_drop_in.py runs this in a copy of the pack, beside a ComfyUI."""

from svdquant_pack.nodes.convert_model import SVDQuantConvertModel
from svdquant_pack.nodes.quantize_model import SVDQuantQuantizeModel


def test_the_nodes_offer_the_format_and_the_dialect():
    formats, options = SVDQuantQuantizeModel.INPUT_TYPES()["required"]["format"]
    assert "dummy" in formats and options["default"] == "int4"
    dialects = SVDQuantConvertModel.INPUT_TYPES()["required"]["to"][0]
    assert "dummy" in dialects and dialects[0] == "native"  # ComfyUI takes the first unless it is told
