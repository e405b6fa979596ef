"""SANA: known, so that its files are refused with the reason. ComfyUI has no class for it."""

from . import Family

FAMILY = Family(
    name="sana",
    title="SANA",
    models="SANA 0.6B and 1.6B, SANA-Sprint",
    refused="ComfyUI has no SANA model (linear attention and convolutions inside the MLP) that could run its layers. "
    "Use the software that the file was published for",
    markers=(
        # the original names, those of diffusers, those of published 4-bit files
        "{blocks,transformer_blocks}.#.{mlp.inverted_conv.conv,ff.conv_inverted,ff.inverted_conv}.{weight,qweight}",
        "{blocks,transformer_blocks}.#.{mlp.point_conv.conv,ff.conv_point,ff.point_conv}.{weight,qweight}",
    ),
    w4a4=(),
)
