"""Train the demo model: FLUX in miniature, ten handwritten digits. Writes the model and its prompts.

    COMFYUI_PATH=<ComfyUI folder> python train_digits.py [--steps N] [--lr X] [--batch N] [--seed N]

The samples it judges are written to `digits.png` in the current folder.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import digits
import torch
from safetensors.torch import save_file
from torch.nn.functional import mse_loss

PUBLISHED = digits.Schedule(steps=3000, learning_rate=2e-3, batch_size=48, seed=0)
NOISE_BIAS = 0.4  # most of what can go wrong with a digit is decided while it is mostly noise
EMA_DECAY = 0.995  # averages over the last 200 steps, a fifteenth of the run


def initialise(model: torch.nn.Module) -> None:
    """Xavier matrices, unit norms; modulation and last layer at zero, so that every block starts as the identity."""
    for name, parameter in model.named_parameters():
        starts_closed = ".lin." in name or name.startswith("final_layer")
        if name.endswith("scale"):
            torch.nn.init.ones_(parameter)
        elif parameter.ndim == 2 and not starts_closed:
            torch.nn.init.xavier_uniform_(parameter)
        else:
            torch.nn.init.zeros_(parameter)


def train(model: torch.nn.Module, prompts: digits.Prompts, schedule: digits.Schedule) -> dict[str, torch.Tensor]:
    """Run the schedule and return the moving average of the weights, fp32."""
    latents, classes = digits.training_set()
    parameters = list(model.parameters())
    optimiser = torch.optim.AdamW(parameters, weight_decay=0.01, betas=(0.9, 0.99), fused=True)
    averages = [parameter.detach().clone() for parameter in parameters]
    start, total = time.monotonic(), 0.0
    for step in range(schedule.steps):
        optimiser.param_groups[0]["lr"] = schedule.rate(step)
        rows = torch.randint(len(latents), (schedule.batch_size,))
        x, sigma, velocity = digits.flow_batch(latents[rows], NOISE_BIAS)
        with torch.autograd.graph.allow_mutation_on_saved_tensors():  # the host's blocks add to their input in place
            guess = model(x, sigma, prompts.context[classes[rows]], prompts.pooled[classes[rows]], None)
            loss = mse_loss(guess, velocity)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        decay = min(EMA_DECAY, (1 + step) / (10 + step))  # short memory first, or the random start would linger
        torch._foreach_lerp_(averages, [parameter.detach() for parameter in parameters], 1 - decay)
        total += loss.item()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}  loss {total / 100:.4f}  {time.monotonic() - start:.0f} s", flush=True)
            total = 0.0
    return {name: average for (name, _), average in zip(model.named_parameters(), averages, strict=True)}


def new_prompts() -> digits.Prompts:
    """Ten random prompts; they are saved with the model, so inference does not depend on this generator."""
    return digits.Prompts(torch.randn(10, 2, 64), torch.randn(10, 64))


def main() -> None:
    """Train, save both files, then judge what was saved."""
    schedule = digits.schedule_from_command_line(__doc__, PUBLISHED)
    torch.set_num_threads(1)  # sums depend on how they are split, so one thread is part of the recipe
    torch.manual_seed(schedule.seed)
    prompts = new_prompts()
    model = digits.empty_flux()
    initialise(model)
    weights = train(model, prompts, schedule)
    metadata = {
        "config": json.dumps(digits.UNET_CONFIG),
        "steps": str(schedule.steps),
        "seed": str(schedule.seed),
    }
    for file in (digits.MODEL_FILE, digits.PROMPTS_FILE):
        file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.half() for name, tensor in weights.items()}, digits.MODEL_FILE, metadata=metadata)
    save_file({"context": prompts.context, "pooled": prompts.pooled}, digits.PROMPTS_FILE)
    images = digits.sample(digits.load_flux(digits.MODEL_FILE), digits.load_prompts(), count=8)
    right, ceiling = digits.judge(images)
    print(f"read as the digit asked for: {right:.3f} (unseen real digits: {ceiling:.3f})")
    digits.save_grid(images, Path("digits.png"))


if __name__ == "__main__":
    main()
