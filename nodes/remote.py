"""Calibrate from the command line: queue a workflow on a running ComfyUI, once per prompt.

The workflow (API form) holds SVDQuant Calibrate, whose statistics file grows with every run, so this needs nothing
from the server but its ordinary queue.
"""

import argparse
import copy
import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..kernels.bounded_json import USUAL, JsonError, Limits, read_object
from ..quantize.cli import show

PLACEHOLDER = "{prompt}"
PATIENCE = 3  # questions in a row to which a run is nowhere, before it is given up
SEEDS = ("seed", "noise_seed")
LARGEST_ANSWER = Limits(size=1 << 27, items=1 << 22, text=1 << 24)  # a history repeats the workflow, texts and all
PROMPTS = Path(__file__).resolve().parents[1] / "workflows" / "prompts" / "calibration.txt"

Workflow = Mapping[str, Mapping[str, Any]]


class CalibrateError(ValueError):
    """A workflow cannot be used or its run failed. The message says what the server said."""


def read_prompts(path: str | Path = PROMPTS) -> list[str]:
    """One prompt per line; empty lines and lines that start with # are left out."""
    lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise CalibrateError(f"{Path(path).name}: holds no prompt")
    return prompts


def read_workflow(path: str | Path) -> Workflow:
    """A workflow in API form: {node: {"class_type", "inputs"}}. Raises CalibrateError for anything else."""
    path = Path(path)
    with path.open("rb") as stream:
        text = stream.read(USUAL.size + 1)
    try:
        workflow = read_object(text, path.name)
    except JsonError as error:
        raise CalibrateError(str(error)) from error
    for name, node in workflow.items():
        if not (isinstance(node, dict) and isinstance(node.get("inputs"), dict)):
            raise CalibrateError(
                f"{path.name}: {name!r} is no node of the API form, which holds class_type and inputs: save the "
                "workflow by ComfyUI's Export (API)"
            )
    return workflow


def with_prompt(workflow: Workflow, prompt: str, seed: int) -> dict[str, Any]:
    """The workflow with this prompt in it: wherever it says {prompt}, else in the text that samplers call positive.

    raises  CalibrateError if there is neither
    """
    made = {name: {**node, "inputs": dict(node["inputs"])} for name, node in copy.deepcopy(dict(workflow)).items()}
    places = [
        (node["inputs"], key, value)
        for node in made.values()
        for key, value in node["inputs"].items()
        if isinstance(value, str) and PLACEHOLDER in value
    ]
    if not places:
        places = [(inputs, "text", PLACEHOLDER) for inputs in _positive_texts(made)]
    if not places:
        raise CalibrateError(f"the workflow has no place for a prompt: write {PLACEHOLDER} where it belongs")
    for inputs, key, text in places:
        inputs[key] = text.replace(PLACEHOLDER, prompt)
    for node in made.values():
        for key in SEEDS:
            if isinstance(node["inputs"].get(key), int):
                node["inputs"][key] = seed
    return made


def _positive_texts(workflow: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Inputs of the nodes with a `text` from which some node's `positive` comes, through any number of nodes."""
    texts: list[dict[str, Any]] = []
    links = [node["inputs"]["positive"] for node in workflow.values() if "positive" in node["inputs"]]
    seen: set[str] = set()
    while links:
        link = links.pop()
        name = str(link[0]) if isinstance(link, list) and link else ""
        if name in seen or name not in workflow:
            continue
        seen.add(name)
        inputs = workflow[name]["inputs"]
        if isinstance(inputs.get("text"), str):
            texts.append(inputs)
        links += [value for value in inputs.values() if isinstance(value, list)]
    return texts


def calibrate(
    server: str,
    workflow: Workflow,
    prompts: Sequence[str],
    progress: Callable[[int, int, str], None] | None = None,
    poll: float = 0.5,
) -> int:
    """Run the workflow for every prompt, one after another; returns how many the server ran.

    A server answers from its memory what it ran last: such a prompt is in the statistics already and not counted.

    raises  CalibrateError if the server refuses a run, a run fails, or the server is started again meanwhile and has
            forgotten it; ConnectionError if it cannot be reached or answers with something else
    """
    if not any(node.get("class_type") == "SVDQuantCalibrate" for node in workflow.values()):
        raise CalibrateError("the workflow holds no SVDQuant Calibrate node: put it between the model and the sampler")
    ran = 0
    for index, prompt in enumerate(prompts):
        if progress is not None:
            progress(index, len(prompts), prompt)
        answer = _request(f"{server}/prompt", {"prompt": with_prompt(workflow, prompt, index)})
        if "prompt_id" not in answer:
            raise CalibrateError(f"{server} answers without a prompt_id; is it a ComfyUI?")
        ran += bool(workflow.keys() - _wait(server, str(answer["prompt_id"]), poll))
    if progress is not None:
        progress(len(prompts), len(prompts), "")
    return ran


def _wait(server: str, prompt_id: str, poll: float) -> set[str]:
    """The nodes whose outputs the server still had, when the run is finished."""
    lost = 0
    while True:
        entry = _request(f"{server}/history/{prompt_id}").get(prompt_id)
        status = {} if entry is None else entry.get("status", {})
        if status.get("completed"):
            kept = [what.get("nodes", []) for kind, what in status.get("messages", []) if kind == "execution_cached"]
            return {node for nodes in kept for node in nodes}
        if status.get("status_str") == "error":
            said = [what.get("exception_message", "") for kind, what in status["messages"] if kind == "execution_error"]
            raise CalibrateError(f"the run failed: {'; '.join(said).strip() or 'the server gave no reason'}")
        if entry is None:  # it is waiting, running, or forgotten; between two questions it may pass from one to another
            lost = 0 if _is_queued(_request(f"{server}/queue"), prompt_id) else lost + 1
            if lost > PATIENCE:
                raise CalibrateError(
                    f"{server} knows nothing of the run {prompt_id} any more: it was started again or its queue was "
                    "cleared. Runs that were finished are in the statistics; start again for the prompts that are left"
                )
        time.sleep(poll)


def _is_queued(queue: Mapping[str, Any], prompt_id: str) -> bool:
    entries = [*queue.get("queue_running", []), *queue.get("queue_pending", [])]
    return any(isinstance(entry, list) and prompt_id in entry for entry in entries)


def _request(url: str, data: Mapping[str, Any] | None = None) -> dict[str, Any]:
    body = None if data is None else json.dumps(data).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return read_object(answer.read(LARGEST_ANSWER.size + 1), f"the answer of {url}", limits=LARGEST_ANSWER)
    except JsonError as error:
        raise CalibrateError(f"{error}; is {url} a ComfyUI?") from error
    except urllib.error.HTTPError as error:
        raise CalibrateError(
            f"the server refuses the workflow: {error.read().decode(errors='replace')[:500]}"
        ) from error
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionError(f"{url} cannot be reached or does not answer as a server does: {error}") from error


def add_commands(commands: Any) -> None:
    """Add the parser of `calibrate` to those of `python -m quantize`."""
    command = commands.add_parser("calibrate", help="run a workflow with SVDQuant Calibrate once per prompt")
    command.add_argument("workflow", help="API form, as ComfyUI's Export (API) writes it")
    command.add_argument("--server", default="http://127.0.0.1:8188", help="a running ComfyUI")
    command.add_argument("--prompts", default=str(PROMPTS), metavar="FILE", help="one prompt per line")
    command.add_argument("--count", type=int, help="use only the first so many")
    command.set_defaults(run=_calibrate)


def _calibrate(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    workflow = read_workflow(arguments.workflow)
    prompts = read_prompts(arguments.prompts)[: arguments.count]
    runs = calibrate(arguments.server.rstrip("/"), workflow, prompts, None if arguments.json else show)
    known = len(prompts) - runs
    counted = f"; {known} not repeated, the server had just run them" if known else ""
    return (
        {"runs": runs, "known": known},
        f"{runs} runs{counted}; the statistics are in the server's output/svdquant folder",
    )
