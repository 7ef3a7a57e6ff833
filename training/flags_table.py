"""Every flag of diffusers' train_controlnet.py and train_controlnet_sdxl.py, and what stands for it here."""

from __future__ import annotations

from typing import Any, NamedTuple


class Flag(NamedTuple):
    """One flag: the key that stands for it, and the script's default.

    ``key`` is "" where no key does; ``note`` then says why, and stands in the printed recipe. ``values`` is
    "text", "texts" (one or more), "number", "whole number" or "switch".
    """

    key: str
    values: str = "text"
    default: Any = None
    note: str = ""


# In the order of the script's --help; the last five are the SDXL script's own.
FLAGS: dict[str, Flag] = {
    "pretrained_model_name_or_path": Flag("base"),
    "controlnet_model_name_or_path": Flag("init"),
    "revision": Flag("", note="download that revision and give its folder as base; main is the default"),
    "variant": Flag("", note="weights are read in whichever variant the folder has"),
    "tokenizer_name": Flag("", note="the tokenizer is the base's; another one is refused"),
    "output_dir": Flag("out", default="controlnet-model", note="the result lies in OUT/controlnet"),
    "cache_dir": Flag("", note="downloads lie where the environment variable HF_HOME says"),
    "seed": Flag("seed", "whole number", note="never left to chance"),
    "resolution": Flag(
        "data.resolution",
        "whole number",
        512,
        "scaled by averages and cubically, there bilinearly; what is transparent is white, in maps black",
    ),
    "train_batch_size": Flag(
        "batch_size",
        "whole number",
        4,
        "for each process, as in the script; an epoch's last batch is filled from the next epoch",
    ),
    "num_train_epochs": Flag(
        "steps", "whole number", 1, "a recipe counts steps: pairs that are here are counted"
    ),
    "max_train_steps": Flag("steps", "whole number"),
    "checkpointing_steps": Flag("checkpoint_every", "whole number", 500),
    "checkpoints_total_limit": Flag(
        "checkpoints_kept",
        "whole number",
        note="2 at least, so one is whole; all without it, as in the script",
    ),
    "resume_from_checkpoint": Flag("", note="the same command goes on with a run that stopped"),
    "gradient_accumulation_steps": Flag(
        "accumulation", "whole number", 1, "an epoch's last step is as large as the others"
    ),
    "gradient_checkpointing": Flag("gradient_checkpointing", "switch", False),
    "learning_rate": Flag("learning_rate", "number", 5e-6),
    "scale_lr": Flag("learning_rate", "switch", False, "worked out: times accumulation, batch and processes"),
    "lr_scheduler": Flag(
        "schedule",
        default="constant",
        note="constant, linear and cosine, with warmup; down to a fiftieth, in the script to 0",
    ),
    "lr_warmup_steps": Flag(
        "warmup",
        "whole number",
        500,
        "0 with constant, as in the script; its warmup begins at a rate of 0, here at the first share",
    ),
    "lr_num_cycles": Flag("", "whole number", 1, "the rate falls once; more cycles are refused"),
    "lr_power": Flag("", "number", 1.0, "polynomial of power 1 is linear; other powers are refused"),
    "use_8bit_adam": Flag("optimizer", "switch", False, '"adamw8bit"; else "adamw"'),
    "dataloader_num_workers": Flag("data.workers", "whole number", note="changes no result"),
    "adam_beta1": Flag("betas", "number", 0.9, "the first of the two"),
    "adam_beta2": Flag("betas", "number", 0.999, "the second of the two"),
    "adam_weight_decay": Flag("weight_decay", "number", 1e-2),
    "adam_epsilon": Flag("", "number", 1e-8, "is 1e-8; another value is refused"),
    "max_grad_norm": Flag("clip", "number", 1.0),
    "push_to_hub": Flag(
        "push_to_hub",
        "switch",
        False,
        "the name: hub_model_id, or output_dir's last part, which lacks an owner",
    ),
    "hub_token": Flag("", note="a secret does not belong in a recipe: log in with `hf auth login`"),
    "hub_model_id": Flag("push_to_hub", note="has no effect without push_to_hub, as in the script"),
    "logging_dir": Flag("", note="trackers write into the run's folder"),
    "allow_tf32": Flag("", "switch", False, 'changes speed alone; precision = "bf16" is faster still'),
    "report_to": Flag("trackers", default="tensorboard", note='"none" for none'),
    "mixed_precision": Flag("precision", note='"no" is "fp32"; also read from `accelerate launch`'),
    "enable_xformers_memory_efficient_attention": Flag(
        "", "switch", False, "torch's fused attention does it"
    ),
    "set_grads_to_none": Flag("", "switch", False, "always so"),
    "dataset_name": Flag("data.source"),
    "dataset_config_name": Flag("", note="refused, unless it is default: fetch that part into a folder"),
    "train_data_dir": Flag("data.source", note="has no effect beside dataset_name but to choose a subfolder"),
    "image_column": Flag(
        "data.picture_column", default="image", note="written out; left out for folders without columns"
    ),
    "conditioning_image_column": Flag(
        "data.map_column", default="conditioning_image", note="as --image_column"
    ),
    "caption_column": Flag("data.caption_column", default="text", note="as --image_column"),
    "max_train_samples": Flag("data.limit", "whole number", note="the first N; the script takes any N"),
    "proportion_empty_prompts": Flag(
        "caption_dropout", "number", 0.0, "drawn anew at each visit; the SDXL script draws once"
    ),
    "validation_prompt": Flag(
        "",
        "texts",
        note="samples are made for pairs that data.holdout keeps back, else for some that are trained on",
    ),
    "validation_image": Flag(
        "",
        "texts",
        note="samples are made for pairs that data.holdout keeps back, else for some that are trained on",
    ),
    "num_validation_images": Flag("", "whole number", 4, "every grid shows the same number of samples"),
    "validation_steps": Flag("sample_every", "whole number", 100, "has no effect without validation_prompt"),
    "tracker_project_name": Flag("project", default="train_controlnet"),
    "pretrained_vae_model_name_or_path": Flag("", note="the base's VAE is used, SDXL's in fp32 where needed"),
    "crops_coords_top_left_h": Flag("", "whole number", 0, "0; another value is refused"),
    "crops_coords_top_left_w": Flag("", "whole number", 0, "0; another value is refused"),
    "enable_npu_flash_attention": Flag("", "switch", False, "torch chooses the attention of the device"),
    "image_interpolation_mode": Flag(
        "", note="pictures and maps are resized in one way each, whatever the base"
    ),
}

SDXL_ONLY = tuple(FLAGS)[-5:]

# Flags of diffusers' other scripts and of kohya's, which people give to these, and the keys for them.
ELSEWHERE = {
    "snr_gamma": "min_snr_gamma",
    "min_snr_gamma": "min_snr_gamma",
    "debiased_estimation_loss": "debiased",
    "noise_offset": "noise_offset",
    "input_perturbation": "input_perturbation",
    "ip_noise_gamma": "input_perturbation",
    "multires_noise_iterations": "multires_noise_iterations",
    "multires_noise_discount": "multires_noise_discount",
    "zero_terminal_snr": "zero_terminal_snr",
    "alpha_mask": "data.alpha_mask",
    "use_ema": "ema",
    "prediction_type": "objective",
}

# What the scripts do without having a flag for it, so that better defaults here do not change their recipe.
FIXED: dict[str, Any] = {
    "hint_start": "standard",
    "zero_convolution_rate": 1.0,
    "export_dtype": "fp32",
    "hint_encoder_rate": 1.0,
    "objective": "base",
    "min_snr_gamma": 0.0,
    "min_snr_soft": False,
    "debiased": False,
    "reward": 0.0,
    "noise_offset": 0.0,
    "multires_noise_iterations": 0,
    "input_perturbation": 0.0,
    "timesteps": "uniform",
    "stratified": False,
    "layout_steps": 0,
    "zero_terminal_snr": False,
    "size_conditioning": "seen",
    "sd_locked": True,
    "only_mid_control": False,
    "ema": 0.0,
    "data.maps": "files",
    "data.map_mode": "rgb",
    "data.map_blur": 0.0,
    "data.pose_drop": 0.0,
    "data.pose_jitter": 0.0,
    "data.alpha_mask": False,
    "data.buckets": False,
    "data.crop": "centre",
    "data.flip": 0.0,
    "data.holdout": 0,
}


def flag_table() -> str:
    """The flags as a Markdown table: flag, key, note."""
    lines = ["| Flag | Key | Note |", "|---|---|---|"]
    for name, flag in FLAGS.items():
        note = f"SDXL: {flag.note}" if name in SDXL_ONLY else flag.note
        lines.append(f"| `--{name}` | {f'`{flag.key}`' if flag.key else '–'} | {note} |")
    return "\n".join(lines)
