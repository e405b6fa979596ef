"""Train the demo LoRA, dark digits on light ground, and write it in the two spellings that LoRA files come in.

    COMFYUI_PATH=<ComfyUI folder> python train_lora.py [--steps N] [--lr X] [--batch N] [--seed N]

Needs the files of `train_digits.py`. Samples with the LoRA are written to `inverted.png` in the current folder.
Only linears inside the blocks are adapted: if a loader applies part of the file, the picture shows it.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from pathlib import Path

import digits
import torch
from safetensors.torch import save_file
from torch.func import functional_call
from torch.nn.functional import mse_loss

PUBLISHED = digits.Schedule(steps=900, learning_rate=1.6e-2, batch_size=48, seed=1)
NOISE_BIAS = 0.6  # ground against stroke is the coarsest feature, settled nearer to pure noise than a digit's shape
RANK = 4
ALPHA = 4.0  # equal to the rank: the product up @ down is added as it is
KOHYA_FILE = digits.MODELS / "loras" / "svdquant_demo_inverted_kohya.safetensors"
DIFFUSERS_FILE = digits.MODELS / "loras" / "svdquant_demo_inverted_diffusers.safetensors"
HIDDEN = digits.UNET_CONFIG["hidden_size"]
MLP = int(HIDDEN * digits.UNET_CONFIG["mlp_ratio"])


@dataclass
class Adapter:
    """weight[start : start + rows] += up @ down, for the linear `module`; `peft` is the same rows' name in diffusers.

    down  (RANK, columns)
    up    (rows, RANK)
    """

    module: str
    start: int
    peft: str
    down: torch.Tensor
    up: torch.Tensor


def targets() -> list[tuple[str, int, int, int, str]]:
    """(module, first row, rows, columns, diffusers name) of every adapter; fused linears are split as in diffusers."""
    table = []
    for block in range(digits.UNET_CONFIG["depth"]):
        ours, theirs = f"double_blocks.{block}", f"transformer_blocks.{block}"
        for stream, qkv, out, mlp in (
            ("img", ("to_q", "to_k", "to_v"), "to_out.0", "ff"),
            ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "ff_context"),
        ):
            for part, name in enumerate(qkv):
                table.append((f"{ours}.{stream}_attn.qkv", part * HIDDEN, HIDDEN, HIDDEN, f"{theirs}.attn.{name}"))
            table.append((f"{ours}.{stream}_attn.proj", 0, HIDDEN, HIDDEN, f"{theirs}.attn.{out}"))
            table.append((f"{ours}.{stream}_mlp.0", 0, MLP, HIDDEN, f"{theirs}.{mlp}.net.0.proj"))
            table.append((f"{ours}.{stream}_mlp.2", 0, HIDDEN, MLP, f"{theirs}.{mlp}.net.2"))
    for block in range(digits.UNET_CONFIG["depth_single_blocks"]):
        ours, theirs = f"single_blocks.{block}", f"single_transformer_blocks.{block}"
        for part, name in enumerate(("to_q", "to_k", "to_v")):
            table.append((f"{ours}.linear1", part * HIDDEN, HIDDEN, HIDDEN, f"{theirs}.attn.{name}"))
        table.append((f"{ours}.linear1", 3 * HIDDEN, MLP, HIDDEN, f"{theirs}.proj_mlp"))
        table.append((f"{ours}.linear2", 0, HIDDEN, HIDDEN + MLP, f"{theirs}.proj_out"))
    return table


def new_adapters() -> list[Adapter]:
    """Adapters that change nothing yet: `down` random, `up` zero."""
    return [
        Adapter(
            module,
            start,
            peft,
            (torch.randn(RANK, columns) / columns**0.5).requires_grad_(),
            torch.zeros(rows, RANK, requires_grad=True),
        )
        for module, start, rows, columns, peft in targets()
    ]


def merged(model: torch.nn.Module, adapters: list[Adapter]) -> dict[str, torch.Tensor]:
    """The adapted weights under their names in the model, differentiable with respect to the adapters."""
    weights = {}
    for module, slices in itertools.groupby(adapters, key=lambda adapter: adapter.module):  # slices of a module adjoin
        rows = torch.cat([adapter.up @ adapter.down for adapter in slices]) * (ALPHA / RANK)
        weights[f"{module}.weight"] = model.get_submodule(module).weight + rows
    return weights


def train(model: torch.nn.Module, prompts: digits.Prompts, schedule: digits.Schedule) -> list[Adapter]:
    """Teach the adapters the training digits with the sign of every pixel flipped."""
    latents, classes = digits.training_set()
    latents = -latents
    adapters = new_adapters()
    parameters = [tensor for adapter in adapters for tensor in (adapter.down, adapter.up)]
    optimiser = torch.optim.AdamW(parameters, weight_decay=0.0, betas=(0.9, 0.99), fused=True)
    start, total = time.monotonic(), 0.0
    for step in range(schedule.steps):
        optimiser.param_groups[0]["lr"] = schedule.rate(step)
        rows = torch.randint(len(latents), (schedule.batch_size,))
        x, sigma, velocity = digits.flow_batch(latents[rows], NOISE_BIAS)
        inputs = (x, sigma, prompts.context[classes[rows]], prompts.pooled[classes[rows]], None)
        with torch.autograd.graph.allow_mutation_on_saved_tensors():  # the host's blocks add to their input in place
            loss = mse_loss(functional_call(model, merged(model, adapters), inputs), velocity)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        total += loss.item()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}  loss {total / 100:.4f}  {time.monotonic() - start:.0f} s", flush=True)
            total = 0.0
    for adapter in adapters:
        adapter.down, adapter.up = adapter.down.detach().half(), adapter.up.detach().half()
    return adapters


def diffusers_spelling(adapters: list[Adapter]) -> dict[str, torch.Tensor]:
    """One pair per slice under its diffusers name; no alpha, which readers take as alpha = rank."""
    tensors = {}
    for adapter in adapters:
        tensors[f"transformer.{adapter.peft}.lora_A.weight"] = adapter.down
        tensors[f"transformer.{adapter.peft}.lora_B.weight"] = adapter.up
    return tensors


def kohya_spelling(adapters: list[Adapter]) -> dict[str, torch.Tensor]:
    """One pair per fused linear: downs stacked, ups on the diagonal; alpha grows with the rank, so the scale stays."""
    tensors = {}
    for module, group in itertools.groupby(adapters, key=lambda adapter: adapter.module):
        slices = list(group)
        key = f"lora_unet_{module.replace('.', '_')}"
        tensors[f"{key}.lora_down.weight"] = torch.cat([adapter.down for adapter in slices])
        tensors[f"{key}.lora_up.weight"] = torch.block_diag(*[adapter.up for adapter in slices])
        tensors[f"{key}.alpha"] = torch.tensor(ALPHA * len(slices), dtype=torch.float16)
    return tensors


def main() -> None:
    """Train, save both spellings, then measure the saved numbers at strength 1."""
    schedule = digits.schedule_from_command_line(__doc__, PUBLISHED)
    torch.set_num_threads(1)  # sums depend on how they are split, so one thread is part of the recipe
    torch.manual_seed(schedule.seed)
    model, prompts = digits.load_flux(digits.MODEL_FILE), digits.load_prompts()
    adapters = train(model, prompts, schedule)
    metadata = {"steps": str(schedule.steps), "seed": str(schedule.seed)}
    KOHYA_FILE.parent.mkdir(parents=True, exist_ok=True)
    save_file(kohya_spelling(adapters), KOHYA_FILE, metadata=metadata)
    save_file(diffusers_spelling(adapters), DIFFUSERS_FILE, metadata=metadata)

    plain = digits.sample(model, prompts, count=8)
    for adapter in adapters:
        adapter.down, adapter.up = adapter.down.float(), adapter.up.float()
    weights = merged(model, adapters)
    styled = digits.sample(lambda *inputs: functional_call(model, weights, inputs), prompts, count=8)
    right, ceiling = digits.judge(1 - styled)
    print(f"inverted back, read as the digit asked for: {right:.3f} (unseen real digits: {ceiling:.3f})")
    print(f"PSNR with against without: {digits.psnr(styled, plain).mean():.1f} dB")
    print(f"PSNR with against the plain image inverted: {digits.psnr(styled, 1 - plain).mean():.1f} dB")
    digits.save_grid(styled, Path("inverted.png"))


if __name__ == "__main__":
    main()
