"""The configurations of the zoo: for every family at least one tiny model of ComfyUI's own class. Tables only."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

TOKENS = 8
FLUX_SIZES = {
    "hidden_size": 128,
    "num_heads": 2,
    "mlp_ratio": 4.0,
    "depth": 2,
    "depth_single_blocks": 2,
    "context_in_dim": 64,
    "qkv_bias": True,
}
UNET_SIZES = {  # the smallest UNet with SDXL's blocks that ComfyUI knows: Segmind Vega, with 320 channels everywhere
    "use_checkpoint": False,
    "image_size": 32,
    "use_spatial_transformer": True,
    "legacy": False,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 1, 1],
    "transformer_depth": [0, 0, 1, 1, 2, 2],
    "transformer_depth_output": [0, 0, 0, 1, 0, 0, 1, 0, 0],
    "transformer_depth_middle": 1,
    "use_linear_in_transformer": True,
    "context_dim": 2048,
    "use_temporal_resblock": False,
    "use_temporal_attention": False,
}
WAN_SIZES = {
    "image_model": "wan2.1",
    "dim": 128,
    "num_heads": 1,
    "ffn_dim": 256,
    "num_layers": 2,
    "out_dim": 16,
    "patch_size": [1, 2, 2],
    "freq_dim": 256,
    "text_dim": 64,
    "window_size": [-1, -1],
    "qk_norm": True,
    "cross_attn_norm": True,
    "eps": 1e-6,
}
COSMOS_SIZES = {
    "max_img_h": 64,
    "max_img_w": 64,
    "max_frames": 16,
    "in_channels": 16,
    "out_channels": 16,
    "patch_spatial": 2,
    "patch_temporal": 1,
    "model_channels": 128,
    "num_blocks": 2,
    "num_heads": 2,
    "crossattn_emb_channels": 64,
    "concat_padding_mask": True,
    "pos_emb_cls": "rope3d",
    "pos_emb_interpolation": "crop",
    "use_adaln_lora": True,
    "adaln_lora_dim": 64,
}
NEXT_DIT_SIZES = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "dim": 256,
    "cap_feat_dim": 64,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 4,
    "axes_dims": [16, 24, 24],
    "axes_lens": [64, 64, 64],
    "qk_norm": True,
}


@dataclass(frozen=True)
class Tiny:
    """One tiny model.

    family   name of its family in the pack
    config   ComfyUI's unet_config
    latent   shape of its input
    text     width of the text features, (1, TOKENS, text)
    extra    further inputs of the forward: name -> shape of a tensor, or ("value", anything)
    layers   how many layers become 4-bit: (w4a4, w4a16)
    """

    family: str
    config: Mapping[str, Any]
    latent: tuple[int, ...]
    text: int
    layers: tuple[int, int]
    extra: Mapping[str, Any] = field(default_factory=dict)


IMAGE, VIDEO = (1, 16, 8, 8), (1, 16, 2, 8, 8)
FLUX = {"image_model": "flux", **FLUX_SIZES, "in_channels": 16, "out_channels": 16, "patch_size": 2, "theta": 10000}
FLUX |= {"axes_dim": [16, 24, 24], "vec_in_dim": 64, "guidance_embed": True}
FLUX2 = {"image_model": "flux2", **FLUX_SIZES, "in_channels": 32, "out_channels": 32, "patch_size": 1, "theta": 2000}
FLUX2 |= {"axes_dim": [16, 16, 16, 16], "vec_in_dim": None, "guidance_embed": True, "mlp_ratio": 3.0}
FLUX2 |= {"global_modulation": True, "mlp_silu_act": True, "qkv_bias": False, "ops_bias": False}
CHROMA = {"image_model": "chroma", **FLUX_SIZES, "in_channels": 64, "out_channels": 64, "patch_size": 2}
CHROMA |= {"axes_dim": [16, 24, 24], "theta": 10000, "in_dim": 64, "out_dim": 128, "hidden_dim": 128, "n_layers": 2}
HUNYUAN = {"image_model": "hunyuan_video", **FLUX_SIZES, "in_channels": 16, "out_channels": 16, "theta": 256}
HUNYUAN |= {"patch_size": [1, 2, 2], "axes_dim": [16, 24, 24], "vec_in_dim": 64, "guidance_embed": True}
HUNYUAN |= {"byt5": False, "meanflow": False, "use_cond_type_embedding": False, "vision_in_dim": None}

ZOO: dict[str, Tiny] = {
    "flux": Tiny("flux", FLUX, IMAGE, 64, (20, 6), {"y": (1, 64), "guidance": (1,)}),
    "flux2": Tiny("flux2", FLUX2, (1, 32, 4, 4), 64, (20, 0), {"guidance": (1,)}),
    "chroma": Tiny("chroma", CHROMA, IMAGE, 64, (20, 0), {"guidance": (1,)}),
    "hunyuan_video": Tiny("hunyuan_video", HUNYUAN, VIDEO, 64, (20, 6), {"y": (1, 64), "guidance": (1,)}),
    "qwen_image": Tiny(
        "qwen_image",
        {
            "image_model": "qwen_image",
            "in_channels": 64,
            "num_layers": 2,
            "attention_head_dim": 64,
            "num_attention_heads": 2,
            "joint_attention_dim": 64,
            "axes_dims_rope": [16, 24, 24],
        },
        (1, 16, 1, 8, 8),
        64,
        (24, 4),
    ),
    "z_image": Tiny(
        "z_image",
        {
            **NEXT_DIT_SIZES,
            "n_kv_heads": 4,
            "rope_theta": 256.0,
            "ffn_dim_multiplier": 8 / 3,
            "z_image_modulation": True,
            "time_scale": 1000.0,
            "pad_tokens_multiple": 32,
        },
        IMAGE,
        64,
        (20, 0),
        {"num_tokens": ("value", TOKENS)},
    ),
    "lumina2": Tiny(
        "lumina2",
        {**NEXT_DIT_SIZES, "n_kv_heads": 2, "rope_theta": 10000.0, "ffn_dim_multiplier": 2.0},
        IMAGE,
        64,
        (20, 0),
        {"num_tokens": ("value", TOKENS)},
    ),
    "sdxl": Tiny("sdxl", UNET_SIZES, (1, 4, 8, 8), 2048, (72, 0), {"y": (1, 2816)}),
    "pixart": Tiny(
        "pixart",
        {
            "image_model": "pixart_sigma",
            "num_heads": 2,
            "patch_size": 2,
            "hidden_size": 128,
            "in_channels": 4,
            "depth": 2,
            "model_max_length": TOKENS,
            "input_size": 16,
            "pe_interpolation": 1,
            "micro_condition": False,
            "caption_channels": 64,
        },
        (1, 4, 40, 40),
        64,
        (12, 0),
    ),
    "sd3": Tiny(
        "sd3",
        {
            "in_channels": 16,
            "out_channels": 16,
            "patch_size": 2,
            "depth": 2,
            "input_size": None,
            "adm_in_channels": 64,
            "context_embedder_config": {
                "target": "torch.nn.Linear",
                "params": {"in_features": 64, "out_features": 128},
            },
            "num_patches": 64,
            "pos_embed_max_size": 8,
            "pos_embed_scaling_factor": None,
            "qk_norm": "rms",
            "x_block_self_attn_layers": [0],
        },
        IMAGE,
        64,
        (15, 4),
        {"y": (1, 64)},
    ),
    "wan_t2v": Tiny("wan", {**WAN_SIZES, "model_type": "t2v", "in_dim": 16}, VIDEO, 64, (20, 0)),
    "wan_i2v": Tiny(
        "wan",
        {**WAN_SIZES, "model_type": "i2v", "in_dim": 36},
        VIDEO,
        64,
        (24, 0),
        {"c_concat": (1, 20, 2, 8, 8), "clip_fea": (1, 257, 1280)},
    ),
    "wan_vace": Tiny(
        "wan",
        {**WAN_SIZES, "model_type": "vace", "in_dim": 16, "vace_layers": 1, "vace_in_dim": 96},
        VIDEO,
        64,
        (30, 0),
        {"vace_context": (1, 1, 96, 2, 8, 8), "vace_strength": ("value", [1.0])},
    ),
    "ltxv": Tiny(
        "ltxv",
        {
            "image_model": "ltxv",
            "in_channels": 128,
            "num_layers": 2,
            "attention_head_dim": 64,
            "num_attention_heads": 2,
            "cross_attention_dim": 128,
            "caption_channels": 64,
        },
        (1, 128, 2, 4, 4),
        64,
        (20, 0),
        {"attention_mask": ("value", None)},
    ),
    "hidream": Tiny(
        "hidream",
        {
            "image_model": "hidream",
            "attention_head_dim": 64,
            "num_attention_heads": 2,
            "axes_dims_rope": [32, 16, 16],
            "caption_channels": [64, 64],
            "max_resolution": [16, 16],
            "in_channels": 16,
            "out_channels": 16,
            "llama_layers": [0, 1, 1, 1],
            "num_layers": 2,
            "num_single_layers": 2,
            "num_routed_experts": 4,
            "num_activated_experts": 2,
            "patch_size": 2,
            "text_emb_dim": 64,
        },
        IMAGE,
        64,
        (90, 4),
        {"y": (1, 64), "encoder_hidden_states_llama3": (1, 2, TOKENS, 64)},
    ),
    "auraflow": Tiny(
        "auraflow",
        {"cond_seq_dim": 2048, "max_seq": 64, "dim": 128, "n_layers": 4, "n_double_layers": 2, "n_heads": 2}
        | {"global_conddim": 128},
        (1, 4, 8, 8),
        2048,
        (42, 6),
    ),
    "cosmos": Tiny(
        "cosmos",
        {
            **COSMOS_SIZES,
            "image_model": "cosmos",
            "block_config": "FA-CA-MLP",
            "block_x_format": "THWBD",
            "pos_emb_learnable": False,
            "affline_emb_norm": True,
            "extra_per_block_abs_pos_emb": True,
            "extra_per_block_abs_pos_emb_type": "learnable",
        },
        VIDEO,
        64,
        (20, 0),
        {"fps": ("value", None), "attention_mask": ("value", None)},
    ),
    "cosmos_predict2": Tiny(
        "cosmos_predict2",
        {**COSMOS_SIZES, "image_model": "cosmos_predict2", "min_fps": 1, "max_fps": 30, "pos_emb_learnable": True}
        | {"extra_per_block_abs_pos_emb": False, "rope_enable_fps_modulation": False},
        VIDEO,
        64,
        (20, 0),
        {"fps": ("value", None)},
    ),
    "mochi": Tiny(
        "mochi",
        {
            "image_model": "mochi_preview",
            "depth": 2,
            "patch_size": 2,
            "num_heads": 2,
            "hidden_size_x": 128,
            "hidden_size_y": 64,
            "mlp_ratio_x": 96.0,  # the class wants 12288 in the MLP
            "mlp_ratio_y": 4.0,
            "learn_sigma": False,
            "in_channels": 12,
            "qk_norm": True,
            "qkv_bias": False,
            "out_bias": True,
            "attn_drop": 0.0,
            "patch_embed_bias": True,
            "posenc_preserve_area": True,
            "timestep_mlp_bias": True,
            "attend_to_padding": False,
            "timestep_scale": 1000.0,
            "use_t5": True,
            "t5_feat_dim": 64,
            "t5_token_length": TOKENS,
            "rope_theta": 10000.0,
        },
        (1, 12, 2, 8, 8),
        64,
        (13, 4),
        {"attention_mask": ("value", torch.ones(1, TOKENS)), "num_tokens": ("value", TOKENS)},
    ),
    "hunyuan_dit": Tiny(
        "hunyuan_dit",
        {
            "image_model": "hydit",
            "depth": 4,
            "hidden_size": 128,
            "num_heads": 2,
            "text_states_dim": 64,
            "text_states_dim_t5": 64,
            "text_len": TOKENS,
            "text_len_t5": TOKENS,
        },
        (1, 4, 8, 8),
        64,
        (25, 0),
        {
            "encoder_hidden_states_t5": (1, TOKENS, 64),
            "text_embedding_mask": ("value", torch.ones(1, TOKENS)),
            "text_embedding_mask_t5": ("value", torch.ones(1, TOKENS)),
        },
    ),
    "kandinsky5": Tiny(
        "kandinsky5",
        {
            "image_model": "kandinsky5",
            "model_dim": 128,
            "ff_dim": 512,
            "time_dim": 128,
            "in_text_dim": 64,
            "in_text_dim2": 64,
            "visual_embed_dim": 64,
            "num_text_blocks": 1,
            "num_visual_blocks": 2,
            "axes_dims": [16, 24, 24],
            "rope_scale_factor": [1.0, 1.0, 1.0],
        },
        IMAGE,
        64,
        (20, 0),
        {"y": (1, 64)},
    ),
}
