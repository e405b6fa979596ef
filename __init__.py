"""ComfyUI entry point: the node classes when ComfyUI is the host, nothing otherwise."""

import sys

NODE_CLASS_MAPPINGS: dict[str, type] = {}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {}

if __package__ and "comfy" in sys.modules:  # `__package__` is "" when pytest imports this file alone
    from .nodes.registry import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
