"""Flags of diffusers' train_controlnet.py: each is mapped, explained or refused, and every recipe loads."""

import json
import re
import shlex
import subprocess
import sys
import tomllib

import pytest

from controlkit.training.config import ControlNetRecipe, DataRecipe, parse_recipe
from controlkit.training.data.sources import open_examples
from controlkit.training.flags import flag_table, from_diffusers_flags
from controlkit.training.flags_table import ELSEWHERE, FIXED, FLAGS, SDXL_ONLY

NEEDED = "--pretrained_model_name_or_path=some/base --train_data_dir=data"
SHORT = f"{NEEDED} --max_train_steps=1000"

# Flag and value, key and value: what each flag does alone, beside SHORT.
MAPPED = [
    ("--pretrained_model_name_or_path=other/base", "base", "other/base"),
    ("--controlnet_model_name_or_path=my/controlnet", "init", "my/controlnet"),
    ("--output_dir='my model'", "out", "my model"),
    ("--seed=7", "seed", 7),
    ("--resolution=768", "data.resolution", 768),
    ("--train_batch_size 16", "batch_size", 16),
    ("--max_train_steps 20000", "steps", 20000),
    ("--checkpointing_steps=200", "checkpoint_every", 200),
    ("--checkpoints_total_limit=5", "checkpoints_kept", 5),
    ("--checkpoints_total_limit=1", "checkpoints_kept", 2),
    ("--checkpoints_total_limit=0", "checkpoints_kept", 2),  # of which the script keeps one, too
    ("--gradient_accumulation_steps=4", "accumulation", 4),
    ("--gradient_checkpointing", "gradient_checkpointing", True),
    ("--learning_rate=1e-5", "learning_rate", 1e-5),
    ("--scale_lr --learning_rate=1e-6 --gradient_accumulation_steps=2", "learning_rate", 8e-6),
    ("--lr_scheduler=constant", "warmup", 0),
    ("--lr_scheduler=constant_with_warmup", "warmup", 500),
    ("--lr_scheduler=cosine_with_restarts", "schedule", "cosine"),
    ("--lr_scheduler=cosine --lr_num_cycles=3", "schedule", "cosine"),  # the script drops the number, too
    ("--lr_scheduler=polynomial --lr_power=1", "schedule", "linear"),
    ("--lr_scheduler=linear --lr_warmup_steps=100", "warmup", 100),
    ("--use_8bit_adam", "optimizer", "adamw8bit"),
    ("--dataloader_num_workers=8", "data.workers", 8),
    ("--adam_beta1=0.8", "betas", (0.8, 0.999)),
    ("--adam_beta2=0.95", "betas", (0.9, 0.95)),
    ("--adam_weight_decay=0", "weight_decay", 0.0),
    ("--max_grad_norm=0.5", "clip", 0.5),
    ("--push_to_hub", "push_to_hub", "controlnet-model"),
    ("--push_to_hub --output_dir=runs/circles", "push_to_hub", "circles"),
    ("--push_to_hub --hub_model_id=me/circles", "push_to_hub", "me/circles"),
    ("--report_to=wandb", "trackers", ("wandb",)),
    ("--report_to=none", "trackers", ()),
    ("--mixed_precision=bf16", "precision", "bf16"),
    ("--mixed_precision=no", "precision", "fp32"),
    ("--train_data_dir=elsewhere", "data.source", "elsewhere"),
    ("--image_column=target", "data.picture_column", "target"),
    ("--image_column=image", "data.picture_column", "image"),
    ("", "data.picture_column", "image"),
    ("", "data.map_column", ("conditioning_image",)),
    ("", "data.caption_column", "text"),
    ("--conditioning_image_column=edges", "data.map_column", ("edges",)),
    ("--caption_column=prompt", "data.caption_column", "prompt"),
    ("--max_train_samples=1000", "data.limit", 1000),
    ("--proportion_empty_prompts=0.5", "caption_dropout", 0.5),
    ("--validation_prompt 'a red circle' --validation_image a.png --validation_steps=50", "sample_every", 50),
    ("--validation_prompt one two --validation_image a.png b.png", "sample_every", 100),
    ("--tracker_project_name=circles", "project", "circles"),
    # argparse takes the beginning of a name that is no other's, too
    ("--learning 1e-5", "learning_rate", 1e-5),
    ("--gradient_a=4", "accumulation", 4),
]

# Flags that change no key, beside SHORT.
EXPLAINED = [
    "--revision=main",
    "--variant=fp16",
    "--tokenizer_name=some/base",
    "--cache_dir=/tmp/cache",
    "--resume_from_checkpoint=latest",
    "--hub_token=hf_secret",
    "--hub_model_id=me/circles",
    "--logging_dir=logs",
    "--allow_tf32",
    "--lr_num_cycles=2",
    "--lr_power=2.0",
    "--adam_epsilon=1e-8",
    "--enable_xformers_memory_efficient_attention",
    "--set_grads_to_none",
    "--dataset_config_name=default",
    "--num_validation_images=2",
    "--validation_steps=10",
    "--pretrained_vae_model_name_or_path=madebyollin/sdxl-vae-fp16-fix",
    "--crops_coords_top_left_h=0",
    "--crops_coords_top_left_w=0",
    "--enable_npu_flash_attention",
    "--image_interpolation_mode=bilinear",
]

REFUSED = [
    ("--learning_rte=1", "train_controlnet.py has no flag --learning_rte (did you mean '--learning_rate'?)"),
    ("--train-batch-size=1", "no flag --train-batch-size (did you mean '--train_batch_size'?)"),
    ("--lr 1e-5", "--lr may be --lr_scheduler or --lr_warmup_steps or --lr_num_cycles or --lr_power: write"),
    ("--snr_gamma=5.0", "has no flag --snr_gamma: leave it out, and give the recipe min_snr_gamma"),
    ("--alpha_mask", "has no flag --alpha_mask: leave it out, and give the recipe data.alpha_mask"),
    ("-- --seed=1", "train_controlnet.py has no flag --"),
    ("--seed", "--seed has no value"),
    ("--seed --allow_tf32", "--seed has no value"),
    ("--output_dir=", "--output_dir has no value"),
    ("--output_dir -x", "--output_dir has no value"),
    ("--seed -1", "--seed is not below 0, as in -1"),
    ("--adam_beta1=nan", "--adam_beta1 is a finite number, not nan"),
    (
        "--image_interpolation_mode=foo",
        "unknown --image_interpolation_mode 'foo'; choose from: bicubic",
    ),
    ("--seed=one", "--seed is a whole number, not 'one'"),
    ("--learning_rate=1e-5x", "--learning_rate is a number, not '1e-5x'"),
    ("--learning_rate=0", "--learning_rate or --scale_lr: input should be greater than 0, not 0"),
    ("--lr_warmup_steps=-1", "--lr_warmup_steps is not below 0, as in -1"),
    ("--gradient_checkpointing=true", "--gradient_checkpointing is a switch and takes no value"),
    ("--gradient_checkpointing true", "cannot read 'true': a flag begins with --"),
    ("--output_dir=$OUTPUT_DIR", "--output_dir=$OUTPUT_DIR names a variable of the shell: write its value"),
    ("--output_dir=runs/$NAME", "--output_dir=runs/$NAME names a variable of the shell: write its value"),
    ("--output_dir=`pwd`", "--output_dir=`pwd` names a variable of the shell: write its value"),
    ("--mixed_precision=fp8", "unknown --mixed_precision 'fp8'"),
    ("--lr_scheduler=cosin", "unknown --lr_scheduler 'cosin' (did you mean 'cosine'?)"),
    ("--lr_scheduler=linear --lr_warmup_steps=2000", "--lr_warmup_steps=2000 is longer than the training"),
    ("--lr_scheduler=cosine_with_restarts --lr_num_cycles=2", "--lr_num_cycles=2: the rate falls once"),
    ("--lr_scheduler=polynomial --lr_power=2", "--lr_power=2.0: the rate falls in a line"),
    ("--adam_epsilon=1e-6", "--adam_epsilon=1e-06: the optimizer's epsilon is 1e-8"),
    ("--adam_beta2=1.5", "--adam_beta1 or --adam_beta2: input should be less than 1, not 1.5"),
    ("--resolution=0", "--resolution is 16 or more, a multiple of 8, not 0"),  # which would be the base's
    ("--validation_prompt 'a red circle'", "--validation_prompt wants a --validation_image beside it"),
    ("--validation_image a.png", "--validation_image wants a --validation_prompt beside it"),
    (
        "--validation_prompt a b --validation_image a b c",
        "--validation_prompt has 2 and --validation_image 3",
    ),
    ("--resolution=500", "--resolution: input should be a multiple of 8, not 500"),
    ("--proportion_empty_prompts=2", "--proportion_empty_prompts: input should be less than or equal to 1"),
    ("--train_batch_size=0", "--train_batch_size: input should be greater than 0, not 0"),
    ("--max_train_samples=0", "--max_train_samples is 1 or more, not 0"),
    ("--revision=fp16", "--revision=fp16: download that revision"),
    ("--tokenizer_name=other", "--tokenizer_name=other: the tokenizer is the base's"),
    ("--dataset_name=owner/name", "--train_data_dir beside --dataset_name chooses a subfolder"),
    ("--dataset_config_name=faces", "--dataset_config_name=faces: fetch this part"),
    ("--resume_from_checkpoint=checkpoint-500", "start from its weights, --controlnet_model_name_or_path="),
    ("--report_to=all", "--report_to=all: name one"),
    ("--pretrained_vae_model_name_or_path=a/vae", "put this VAE into the base's folder"),
    ("--crops_coords_top_left_h=8", "--crops_coords_top_left_h=8: SDXL is told that pictures are whole"),
    ("--output_dir='unfinished", "cannot read the flags: no closing quotation"),
]


def recipe(text: str, **options: int) -> ControlNetRecipe:
    loaded = parse_recipe(tomllib.loads(from_diffusers_flags(text, **options)), where="test")
    assert isinstance(loaded, ControlNetRecipe)
    return loaded


def test_no_flag_is_forgotten():
    known = {word.split("=")[0] for flags in [*MAPPED, *EXPLAINED] for word in _words(flags)}
    known |= {"--dataset_name", "--num_train_epochs"}
    known -= {"--learning", "--gradient_a"}  # beginnings of names
    assert known == {f"--{name}" for name in FLAGS}
    assert (len(FLAGS), len(SDXL_ONLY)) == (52 + 5, 5)  # as the scripts have, in August 2026


def _words(flags: object) -> list[str]:
    text = flags if isinstance(flags, str) else flags[0]
    return [word for word in shlex.split(text) if word.startswith("--")]


@pytest.mark.parametrize(("flags", "key", "value"), MAPPED, ids=[flags for flags, _, _ in MAPPED])
def test_a_flag_sets_its_key(flags, key, value):
    found = recipe(f"{SHORT} {flags}")
    for part in key.split("."):
        found = getattr(found, part)
    assert found == pytest.approx(value, rel=1e-12) if isinstance(value, float) else found == value


@pytest.mark.parametrize("flags", EXPLAINED)
def test_a_flag_without_effect_is_named_with_the_reason(flags):
    text = from_diffusers_flags(f"{SHORT} {flags}")
    name = flags.partition("=")[0]
    (line,) = [line for line in text.splitlines() if line.startswith(f"# {name}: ")]
    assert FLAGS[name[2:]].note in line
    assert "hf_secret" not in text
    plain = recipe(f"{SHORT} --tracker_project_name=x")
    assert recipe(f"{SHORT} {flags} --tracker_project_name=x") == plain


@pytest.mark.parametrize(("flags", "message"), REFUSED, ids=[flags for flags, _ in REFUSED])
def test_what_nothing_stands_for_is_refused_in_a_line(flags, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        from_diffusers_flags(f"{SHORT} {flags}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no flags given"),
        ("train_controlnet.py", "no flags given"),
        ("hello", "cannot read 'hello'"),
        ("python train_controlnet_flux.py --seed=1", "train_controlnet_flux.py is another script"),
        (
            f"python train_controlnet.py {SHORT} --crops_coords_top_left_h=0",
            "no flag --crops_coords_top_left_h, which is one of train_controlnet_sdxl.py",
        ),
        ("--train_data_dir=data --max_train_steps=1", "--pretrained_model_name_or_path is missing"),
        (
            "--pretrained_model_name_or_path=a --max_train_steps=1",
            "--train_data_dir or --dataset_name is missing",
        ),
        (NEEDED, "--max_train_steps is missing"),
    ],
)
def test_a_command_that_is_not_whole_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        from_diffusers_flags(text)


def test_the_scripts_defaults_are_written_out():
    found = recipe(SHORT)
    assert (found.learning_rate, found.betas, found.weight_decay, found.clip) == (
        5e-6,
        (0.9, 0.999),
        0.01,
        1.0,
    )
    assert (found.schedule, found.warmup, found.batch_size, found.accumulation) == ("constant", 0, 4, 1)
    assert (found.precision, found.optimizer, found.ema, found.caption_dropout) == ("fp32", "adamw", 0.0, 0.0)
    assert (found.zero_convolution_rate, found.hint_encoder_rate, found.timesteps) == (1.0, 1.0, "uniform")
    assert (found.out, found.checkpoint_every, found.trackers) == ("controlnet-model", 500, ("tensorboard",))
    assert (found.data.resolution, found.data.crop, found.data.holdout) == (512, "centre", 0)
    assert found.hint_channels == (16, 32, 96, 256)
    assert recipe(f"{SHORT} --controlnet_model_name_or_path=a").hint_channels is None  # it has its own
    assert found.project == "train_controlnet"
    assert recipe(f"{SHORT} --crops_coords_top_left_h=0").project == "sd_xl_train_controlnet"
    written = tomllib.loads(from_diffusers_flags(SHORT))
    flat = {**written, **{f"data.{key}": value for key, value in written["data"].items()}}
    assert {key: flat[key] for key in FIXED} == FIXED


# Keys that a translated recipe leaves to their defaults, because they do not decide what is trained.
NEUTRAL = {
    *("adapter", "init_base", "map_dropout", "rank", "size_ratio"),  # what is trained: the copy, as there
    *(
        "attention",
        "channels_last",
        "checkpoints_kept",
        "compile",
        "cuda_graph",
        "device",
        "init",
        "log_every",
        "threads",
    ),
    *("bad_steps", "monitor_every", "push_to_hub", "sample_every", "scenes", "score_every", "score_scenes"),
    *("multires_noise_discount", "reward_below", "reward_from"),
}
NEUTRAL_DATA = {
    *("format", "split", "options", "caption", "limit"),
    *("bucket_step", "bucket_ratio", "crops", "streaming", "shuffle_window", "bad", "check", "cache"),
    *("resident", "workers"),
}


def test_flags_of_other_scripts_name_keys_that_there_are():
    keys = {*ControlNetRecipe.model_fields, *(f"data.{name}" for name in DataRecipe.model_fields)}
    assert set(ELSEWHERE.values()) <= keys


def test_a_new_key_of_the_recipe_is_noticed():
    written = tomllib.loads(from_diffusers_flags(SHORT))
    assert set(ControlNetRecipe.model_fields) - set(written) <= NEUTRAL
    assert set(DataRecipe.model_fields) - set(written["data"]) <= NEUTRAL_DATA


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        ("--max_train_steps=15000", 30),
        ("--max_train_steps=15001", 31),
        ("--max_train_steps=400", 2),
        ("--max_train_steps=15000 --checkpointing_steps=5000", 3),
        ("--max_train_steps=15000 --checkpoints_total_limit=3", 3),
    ],
)
def test_without_a_limit_every_checkpoint_stays_as_in_the_script(flags, kept):
    text = from_diffusers_flags(f"{NEEDED} {flags}")
    assert recipe(f"{NEEDED} {flags}").checkpoints_kept == kept
    told = "# without --checkpoints_total_limit the script keeps all: fewer take less of the disk"
    assert (told in text) == ("total_limit" not in flags)


@pytest.mark.parametrize("flags", ["", "--hub_model_id=circles", "--hub_model_id=me/circles"])
def test_a_name_for_the_hub_that_lacks_its_owner_is_said_to(flags):
    text = from_diffusers_flags(f"{SHORT} --output_dir=out/circles --push_to_hub {flags}")
    told = "write it as OWNER/NAME, else nothing starts; the script's owner is who is logged in"
    assert (told in text) == ("me/" not in flags)


def test_the_readme_command_of_the_script():
    text = r"""!accelerate launch --mixed_precision="fp16" --multi_gpu --num_processes 2 train_controlnet.py \
     --pretrained_model_name_or_path=stable-diffusion-v1-5/stable-diffusion-v1-5 \
     --output_dir="out" --dataset_name=fusing/fill50k --resolution=512 --learning_rate=1e-5 \
     --validation_image "./conditioning_image_1.png" "./conditioning_image_2.png" \
     --validation_prompt "red circle with blue background" "cyan circle with brown floral background" \
     --train_batch_size=4 --gradient_accumulation_steps=4 --max_train_steps=15000 --report_to=wandb \
     --tracker_project_name=controlnet --use_8bit_adam --push_to_hub"""
    printed = from_diffusers_flags(text)
    found = recipe(text)
    assert found.base == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert (found.precision, found.data.source, found.sample_every) == ("fp16", "fusing/fill50k", 100)
    start = "# Start it with: accelerate launch --mixed_precision=fp16 --multi_gpu --num_processes 2"
    assert f"{start} -m controlkit.training THIS_FILE.toml\n" in printed


def test_the_launcher_keeps_variables_to_itself():
    text = f"HF_TOKEN=hf_secret accelerate launch --num_processes=2 examples/train_controlnet.py {SHORT}"
    printed = from_diffusers_flags(text)
    assert "hf_secret" not in printed
    assert recipe(f"{text} --scale_lr").learning_rate == pytest.approx(5e-6 * 4 * 2)
    odd = from_diffusers_flags(f"accelerate launch --config_file 'a\nb' train_controlnet.py {SHORT}")
    assert tomllib.loads(odd)["steps"] == 1000


@pytest.mark.parametrize(
    ("launcher", "processes", "told"),
    [
        ("python", 1, False),
        ("accelerate launch --num_processes=2", 2, False),
        ("accelerate launch --multi_gpu", 1, True),  # how many stands in accelerate's configuration
        ("torchrun --nnodes 3 --nproc-per-node=2", 6, False),
        ("torchrun --nproc_per_node=2", 2, False),
    ],
)
def test_a_rate_for_all_processes_says_for_how_many_where_that_is_unknown(launcher, processes, told):
    text = f"{launcher} train_controlnet.py {SHORT}"
    assert recipe(f"{text} --scale_lr").learning_rate == pytest.approx(5e-6 * 4 * processes)
    words = "for one process: accelerate's configuration, which may start more, is not read here"
    assert (words in from_diffusers_flags(f"{text} --scale_lr")) == told
    epochs = f"{launcher} train_controlnet.py {NEEDED} --max_train_samples=8"
    assert (words in from_diffusers_flags(epochs)) == told
    assert words not in from_diffusers_flags(text)


def test_a_warmup_says_how_it_differs_from_the_scripts():
    words = "a step ahead of the script, whose first step has the rate 0"
    assert words in from_diffusers_flags(f"{SHORT} --lr_scheduler=linear")
    assert words not in from_diffusers_flags(f"{SHORT} --lr_scheduler=linear --lr_warmup_steps=0")
    assert words not in from_diffusers_flags(SHORT)


def test_epochs_become_steps_where_the_number_of_pairs_is_known():
    # 103 pairs: 26 batches of 4, 13 for each of two processes, 7 steps of two batches.
    text = f"accelerate launch --num_processes 2 train_controlnet.py {NEEDED} --num_train_epochs 3"
    text += " --gradient_accumulation_steps=2"
    assert recipe(f"{text} --max_train_samples=103").steps == 3 * 7
    assert recipe(text, pairs=103).steps == 3 * 7
    assert recipe(f"{text} --max_train_steps=5").steps == 5  # as in the script, it goes before the epochs
    with pytest.raises(ValueError, match="--num_train_epochs or --max_train_steps"):
        from_diffusers_flags(f"{NEEDED} --num_train_epochs=0 --max_train_samples=9")


@pytest.mark.parametrize("flag", ["train_data_dir", "dataset_name"])
def test_pairs_that_are_here_are_counted(flag, tmp_path):
    rows = [{"file_name": f"{k}.png", "text": "", "conditioning_image": f"maps/{k}.png"} for k in range(9)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    text = f"--pretrained_model_name_or_path=a --{flag}={shlex.quote(str(tmp_path))} --num_train_epochs=5"
    assert recipe(f"{text} --train_batch_size=2").steps == 5 * 5
    assert "over 9 pairs" in from_diffusers_flags(text)
    assert recipe(f"{text} --max_train_samples=4").steps == 5
    with pytest.raises(ValueError, match=r"^--max_train_samples=100: the data has 9 pairs"):
        from_diffusers_flags(f"{text} --max_train_samples=100")
    named = f"{text} --image_column=file_name --caption_column=text"
    assert recipe(f"{named} --conditioning_image_column=conditioning_image").steps == 5 * 3
    for wrong in ("--resolution=500", "--dataloader_num_workers=999"):
        with pytest.raises(ValueError, match=f"^{wrong.partition('=')[0]}: input should be [^\n]*$"):
            from_diffusers_flags(f"{text} {wrong}")
    (tmp_path / "metadata.jsonl").unlink()
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))} holds no data set"):
        from_diffusers_flags(text)


@pytest.mark.parametrize("picture", ["file_name", "image"])
def test_the_scripts_columns_are_taken_before_those_of_other_usual_names(picture, tmp_path):
    keys = {"photo", "canny", "conditioning_image_file_name", picture, "file_name"}
    row = {**{key: f"{key}.png" for key in keys}, "prompt": "another", "text": "a circle"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    found = recipe(f"{SHORT} --train_data_dir={shlex.quote(str(tmp_path))}")
    (example,) = open_examples(found.data, kind="canny")
    names = [piece.name.rpartition("/")[2] for piece in (example.picture, *example.maps)]
    assert names == [f"{picture}.png", "conditioning_image_file_name.png"]
    assert example.caption == "a circle"


def test_the_scripts_columns_of_a_table_are_taken(tmp_path):
    datasets = pytest.importorskip("datasets")
    columns = ("file_name", "image", "conditioning_image", "canny", "text")
    datasets.Dataset.from_dict({name: [f"{name}.png"] for name in columns}).save_to_disk(tmp_path / "table")
    found = recipe(f"{SHORT} --train_data_dir={shlex.quote(str(tmp_path / 'table'))}")
    (example,) = open_examples(found.data, kind="canny")
    shown = [piece.name.rpartition(" ")[2] for piece in (example.picture, *example.maps)]
    assert shown == ["image", "conditioning_image"]


def test_folders_without_columns_are_read_by_their_own_names(tmp_path):
    text = f"{SHORT} --image_column=image --train_data_dir={shlex.quote(str(tmp_path))}"
    row = {"source": "source/1.png", "target": "target/1.png", "prompt": "a circle"}
    (tmp_path / "prompt.json").write_text(json.dumps(row))
    (example,) = open_examples(recipe(text).data, kind="custom")
    assert (example.picture.name, example.caption) == (str(tmp_path / "target/1.png"), "a circle")
    (tmp_path / "prompt.json").unlink()
    (tmp_path / "canny").mkdir()
    for name in ("1.png", "canny/1.png"):
        (tmp_path / name).touch()
    assert recipe(text).data.map_column == ()
    assert len(open_examples(recipe(text).data, kind="canny")[0].maps) == 1
    assert "# --image_column: written out; left out for folders without columns" in from_diffusers_flags(text)


def test_a_default_column_that_the_data_lacks_is_told_by_its_flag(tmp_path):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "1.png", "conditioning_image": "m/1.png"}')
    text = f"--pretrained_model_name_or_path=a --train_data_dir={shlex.quote(str(tmp_path))}"
    with pytest.raises(ValueError, match=r"^--caption_column: [^\n]* has no column 'text'"):
        from_diffusers_flags(f"{text} --num_train_epochs=1")


def test_values_with_quotes_and_signs_survive():
    name = 'a "quoted" \\ name # not a comment\t= [x]\x7f'
    assert recipe(f"{SHORT} --output_dir {shlex.quote(name)}").out == name


def test_a_sentence_that_begins_with_a_dash_is_a_value():
    assert recipe(f"{SHORT} --output_dir '-5 degrees = cold'").out == "-5 degrees = cold"


def test_the_table_has_a_row_for_every_flag():
    rows = flag_table().splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == [f"--{name}" for name in FLAGS]
    assert all(row.count("|") == 4 for row in rows)
    keys = {flag.key for flag in FLAGS.values() if flag.key}
    data = {f"data.{key}" for key in ControlNetRecipe.model_fields["data"].annotation.model_fields}
    assert keys <= set(ControlNetRecipe.model_fields) | data


def test_reading_flags_imports_no_torch():
    code = "import sys; import controlkit.training.flags; print({'torch', 'diffusers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
