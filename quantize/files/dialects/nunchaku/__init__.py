"""Nunchaku's checkpoints: specification, readers and writers of both generations, of the older folder and of Lite.

One `.safetensors` file under Diffusers-like names, or a folder with `transformer_blocks.safetensors`,
`unquantized_layers.safetensors` and two configurations, whose union is the same. X is a stored layer; N and K are
padded to multiples of 128, ranks to 16. Tiles are those of `quantize/files/tiles.py`.

    W4A4 (int8 qweight)                            second generation  first
    X.qweight        int8    (N, K/2)              tiles
    X.wscales        16-bit  (K/64, N)             int4: tiles, slowest first
                     e4m3    (K/16, N)             nvfp4: tiles
    X.wtscale        float   (1,) or ()            nvfp4, of layers that were one linear
    X.wcscales       16-bit  (N,)                  nvfp4, of layers merged of several linears
    X.bias           16-bit  (N,)                  padded with 1
    X.smooth_factor  16-bit  (K,)                  X.smooth       the activation is divided by it; padded with 1
    X.proj_down      16-bit  (K, R)                X.lora_down    sees the activation before the division
    X.proj_up        16-bit  (N, R)                X.lora_up
    X.smooth_factor_orig                           X.smooth_orig  a record, never read

    W4A16 (int32 qweight, modulation), natural order of the stored rows
    X.qweight  int32 (N/4, K/2) tiles; X.wscales, X.wzeros 16-bit (K/64 up to 16, N); X.bias 16-bit (N,)
    W[n, k] = code * wscales + wzeros, codes 0..15

Two facts stand in no file: the layers behind a GELU have unsigned activations in int4, with the shift taken off their
bias (`StoredName.unsigned` in the tables), and the rows of a modulation layer lie interleaved, with 1 added to the
bias of its scales (`LinearRow.chunks`). Nunchaku Lite has neither, and nothing merged; its names show it.

names/      the tables, one file per model family         layers.py   one stored layer <-> natural order
assign.py   stored names -> places in ComfyUI's model     joins.py    layers side by side
reader.py   file -> Checkpoint                            writer.py   Checkpoint -> file
Source: the packers and loaders of Nunchaku and DeepCompressor, checked bit by bit against their output.
"""

from ...tensor_file import TensorFile
from .. import Dialect
from .layers import NAME
from .reader import open_as_is, open_file
from .writer import save


def speaks(file: TensorFile) -> bool:
    return any(name.endswith(".qweight") for name in file)


DIALECT = Dialect(NAME, speaks, open_file, open_as_is, save)
