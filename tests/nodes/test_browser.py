"""A person with a browser: drop the demo workflow on ComfyUI's page, press Run, see the pictures."""

import base64
import json
import os
import shutil
import urllib.request
from pathlib import Path

import pytest

from svdquant_pack.tests.host.server import Host, model_tree

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
playwright = pytest.importorskip("playwright.sync_api")
pytestmark = [
    pytest.mark.host,
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"]
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.VueNodes.Enabled": False, "Comfy.InstalledVersion": "1.32.9"}

DROP = """([name, text]) => {
    const data = new DataTransfer();
    data.items.add(new File([text], name, {type: "application/json"}));
    const canvas = document.querySelector("#graph-canvas");
    for (const kind of ["dragover", "drop"])
        canvas.dispatchEvent(new DragEvent(kind, {dataTransfer: data, bubbles: true, cancelable: true}));
}"""
LISTEN = """() => {
    const first = window.outcome === undefined;
    window.outcome = null; window.previews = 0;
    if (!first) return;
    app.api.addEventListener("executed", e => { window.previews += (e.detail.output.images || []).length; });
    app.api.addEventListener("execution_success", () => { window.outcome = "success"; });
    app.api.addEventListener("execution_error", e => { window.outcome = e.detail.exception_message; });
}"""


@pytest.fixture(scope="module")
def host():
    models = model_tree(ROOT / "workflows" / "models")
    with Host(os.environ["COMFYUI_PATH"], ROOT, models=models) as host:
        body = json.dumps(SETTINGS).encode()
        headers = {"Content-Type": "application/json"}
        urllib.request.urlopen(urllib.request.Request(f"{host.url}/settings", body, headers))
        yield host


@pytest.fixture(scope="module")
def page(host):
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1600, "height": 900})
        page.goto(host.url, wait_until="domcontentloaded", timeout=120_000)
        ready = "() => window.app?.graph && window.app.extensionManager && document.querySelector('#graph-canvas')"
        page.wait_for_function(ready, timeout=120_000)
        yield page
        browser.close()


# file -> pictures: ten for each of three samplers; ten 4-bit ones, and ten with their 16-bit ones beside them
RUN = {"svdquant_demo.json": 30, "svdquant_quantize_my_model.json": 20}
# file -> the same in API form
API_FORMS = {f"svdquant_{name}.json": f"{name}.json" for name in ("flux", "qwen_image", "sdxl", "z_image")} | {
    "svdquant_quantize_my_model.json": "demo_calibrate.json"
}


@pytest.mark.parametrize(("name", "pictures"), RUN.items())
def test_a_dropped_workflow_runs(page, host, name, pictures):
    text = (ROOT / "workflows" / name).read_text()
    wanted = len(json.loads(text)["nodes"])
    page.wait_for_timeout(1500)  # the page restores its own last graph first
    page.evaluate("() => app.graph.clear()")
    page.evaluate(DROP, [name, text])
    page.wait_for_function(f"() => app.graph._nodes.length === {wanted}", timeout=30_000)
    assert page.evaluate("() => app.graph._nodes.filter(n => n.has_errors || !n.type).length") == 0
    page.evaluate(LISTEN)
    page.get_by_test_id("queue-button").get_by_role("button").first.click(timeout=10_000)
    page.wait_for_function("() => window.outcome !== null", timeout=180_000)
    assert page.evaluate("window.outcome") == "success"
    assert page.evaluate("window.previews") == pictures


@pytest.mark.parametrize("path", sorted((ROOT / "workflows").glob("*.json")), ids=lambda path: path.stem)
def test_every_workflow_opens_without_a_missing_node(page, path):
    text = path.read_text()
    wanted = json.loads(text)
    page.evaluate("() => app.graph.clear()")
    page.evaluate(DROP, [path.name, text])
    page.wait_for_function(f"() => app.graph._nodes.length === {len(wanted['nodes'])}", timeout=30_000)
    types = page.evaluate("() => app.graph._nodes.map(n => n.type).filter(t => !LiteGraph.registered_node_types[t])")
    assert types == []
    assert page.evaluate("() => Object.keys(app.graph.links).length || app.graph.links.size") == len(wanted["links"])


@pytest.mark.parametrize(("name", "api"), API_FORMS.items())
def test_the_api_form_is_the_same_workflow(page, name, api):
    text = (ROOT / "workflows" / name).read_text()
    page.evaluate("() => app.graph.clear()")
    page.evaluate(DROP, [name, text])
    page.wait_for_function(f"() => app.graph._nodes.length === {len(json.loads(text)['nodes'])}", timeout=30_000)
    found = page.evaluate("async () => (await app.graphToPrompt()).output")
    expected = json.loads((ROOT / "workflows" / "api" / api).read_text())
    assert found.keys() == expected.keys()
    for number, node in expected.items():
        assert found[number]["class_type"] == node["class_type"]
        # the page also sends optional inputs at their defaults
        assert {key: found[number]["inputs"][key] for key in node["inputs"]} == node["inputs"], f"node {number}"


def test_the_template_has_a_thumbnail(host):
    info = json.loads(urllib.request.urlopen(f"{host.url}/workflow_templates").read())
    assert "svdquant_demo" in info["comfyui-svdquant"]
    picture = urllib.request.urlopen(f"{host.url}/api/workflow_templates/comfyui-svdquant/svdquant_demo.jpg").read()
    assert picture.startswith(base64.b64decode("/9j/")), "a JPEG"


def test_tooltips_reach_the_page(page):
    page.wait_for_function("() => LiteGraph.registered_node_types['SVDQuantQuantizeModel']")
    node = page.evaluate("() => LiteGraph.registered_node_types['SVDQuantQuantizeModel'].nodeData")
    assert "4-bit checkpoint" in node["description"]
