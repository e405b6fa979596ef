"""Compare on the real host: the figures are those of the definition, and equal models are equal."""

import math
import sys

import pytest
import torch

pytest.importorskip("comfy.sd", reason="no ComfyUI: set COMFYUI_PATH")

from svdquant_pack.nodes.compare_models import SVDQuantCompare
from svdquant_pack.nodes.demo import DemoVae, SVDQuantDemoPrompt
from svdquant_pack.nodes.host.model import load_model
from svdquant_pack.nodes.host.side_by_side import Sampling, Trajectory, sample, velocity_errors
from svdquant_pack.quantize.measure import pictures as metrics
from svdquant_pack.tests.nodes.sampling import pictures


@pytest.fixture(scope="module")
def how():
    positive = SVDQuantDemoPrompt().encode("0123456789")[0]
    return Sampling(positive, positive, {"samples": torch.zeros(10, 16, 8, 8)}, 8, 8, 1.0, "euler", "simple")


@pytest.fixture(scope="module")
def four_bit(checkpoints):
    return load_model(str(checkpoints["int4"]), compute="w4a4")


def test_the_sampler_is_the_hosts_own(demo_model, how):
    decoded = DemoVae.decode(sample(demo_model, how))
    assert torch.equal(decoded, pictures(demo_model))


def test_a_model_follows_its_own_trajectory_exactly(demo_model, four_bit, how):
    trajectory = Trajectory()
    sample(demo_model, how, trajectory)
    assert len(trajectory.calls) == 8
    assert velocity_errors(demo_model, trajectory) == [0.0] * 8
    errors = velocity_errors(four_bit, trajectory)
    assert min(errors) > 0 and max(errors) < 0.3


def test_guidance_is_recorded_with_both_halves(demo_model, how):
    trajectory = Trajectory()
    guided = Sampling(how.positive, how.negative, how.latent, 8, 4, 3.0, "euler", "simple")
    sample(demo_model, guided, trajectory)
    assert all(sorted(kept["cond_or_uncond"]) == [0, 1] for _, _, kept in trajectory.calls)
    assert velocity_errors(demo_model, trajectory) == [0.0] * 4


def test_the_node_with_a_vae(demo_model, four_bit, how):
    with torch.inference_mode():
        made = SVDQuantCompare().compare(
            demo_model, four_bit, how.positive, how.negative, how.latent, 8, 8, 1.0, "euler", "simple", DemoVae
        )
    picture, text, exact, got = made["result"]
    assert picture.shape == (10, 32, 64, 3)
    expected = metrics.mean_db(metrics.psnr(DemoVae.decode(got["samples"]), DemoVae.decode(exact["samples"])))
    assert f"image PSNR        {expected:.2f} dB (mean of 10)" in text and text.count("identical") == 2
    assert "SSIM              0.9" in text and "\nLPIPS             " in text


def test_without_a_vae_latents_are_compared(demo_model, four_bit, how):
    made = SVDQuantCompare().compare(
        demo_model, four_bit, how.positive, how.negative, how.latent, 8, 4, 1.0, "euler", "simple"
    )
    assert "no VAE is connected" in made["result"][1] and made["result"][0].shape == (10, 8, 16, 3)


def test_psnr_and_ssim_of_known_pictures():
    flat = torch.full((2, 3, 32, 32), 0.5)
    assert metrics.psnr(flat + 0.1, flat) == pytest.approx([20, 20]) and metrics.psnr(flat, flat) == [math.inf] * 2
    assert metrics.mean_db([math.inf, 20.0]) == 20 and math.isinf(metrics.mean_db([math.inf]))
    noise = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert metrics.ssim(noise, noise) == pytest.approx(1) and metrics.ssim(1 - noise, noise) < 0
    # constant pictures: only the means differ, (2 m n + c) / (m^2 + n^2 + c)
    assert metrics.ssim(flat, flat + 0.2) == pytest.approx((0.7 + 1e-4) / (0.25 + 0.49 + 1e-4))
    assert metrics.relative_error(flat * 1.1, flat) == pytest.approx(0.1, rel=1e-4)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """torch's folder of downloaded weights, empty."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return tmp_path / "hub" / "checkpoints"


def test_lpips_is_measured_where_its_weights_are(hub):
    pytest.importorskip("torchmetrics")
    torchvision = pytest.importorskip("torchvision")
    noise = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    value, reason = metrics.lpips(noise, noise)
    assert value is None and "AlexNet's weights are not in checkpoints/alexnet-" in reason
    hub.mkdir(parents=True)
    made = torchvision.models.alexnet().state_dict()  # random: the distance is of another network, but a distance
    small = {key: torch.zeros(1).expand(part.shape) if "classifier" in key else part for key, part in made.items()}
    torch.save(small, hub / "alexnet-owt-7be5be79.pth")
    assert metrics.lpips(noise, noise) == (0.0, "")
    assert metrics.lpips(noise, 1 - noise)[0] > metrics.lpips(noise, noise + 0.01)[0] > 0
    assert "needed 31 each way" in metrics.lpips(noise[..., :30], noise[..., :30])[1]


@pytest.mark.parametrize("package", ["torchmetrics", "torchvision"])
def test_lpips_names_what_is_not_installed(hub, monkeypatch, package):
    pytest.importorskip("torchmetrics")
    for name in [name for name in sys.modules if name.partition(".")[0] in ("torchmetrics", package)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    noise = torch.rand(1, 3, 32, 32)
    value, reason = metrics.lpips(noise, noise)
    assert value is None and reason.startswith("not measured: ") and package in reason
