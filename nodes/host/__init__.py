"""Bridge to ComfyUI: everything that depends on the host's own classes."""
