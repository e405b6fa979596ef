"""Bridge: the LoRA file among the inputs of the node that ComfyUI runs at the moment."""

import sys
from typing import Any

import folder_paths
from comfy_execution.utils import get_executing_context


def executing_lora() -> str | None:
    """The name in models/loras that the running node has as an input; None outside a prompt, or where it has several.

    A loader hands the host tensors, not names, so the name is looked up in the prompt that is being executed.
    """
    inputs = _executing_inputs()
    strings = {value for value in inputs.values() if isinstance(value, str)}
    names = strings.intersection(folder_paths.get_filename_list("loras")) if strings else ()
    return next(iter(names)) if len(names) == 1 else None


def _executing_inputs() -> dict[str, Any]:
    """Inputs of the running node as the prompt has them; links are lists."""
    context = get_executing_context()
    host = getattr(sys.modules.get("server"), "PromptServer", None)  # a script has none, and importing starts one
    queue = getattr(getattr(host, "instance", None), "prompt_queue", None)
    if context is None or queue is None:
        return {}
    running, _ = queue.get_current_queue_volatile()
    prompts = [item[2] for item in running if item[1] == context.prompt_id]
    return prompts[0].get(context.node_id, {}).get("inputs", {}) if prompts else {}
