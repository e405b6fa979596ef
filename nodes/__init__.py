"""LAYER 3: ComfyUI. `registry.py` lists the nodes, `host/` is all that depends on ComfyUI's own classes."""
