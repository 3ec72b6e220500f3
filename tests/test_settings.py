"""Constants, YAML and flags: what wins, what is refused, what is said, and that a refused start leaves nothing."""

import importlib.util
import os
import re
import shutil
import socket
import sys
import time

import pytest
import tiny
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file

import dpotrainer

BLOCK = tiny.PROGRAM.read_text(encoding="utf-8").split("end of edits")[0]
CONSTANTS = {
    name: dpotrainer.RENAMED.get(name, name.lower())
    for name in re.findall(r"^([A-Z]\w*) = ", BLOCK, flags=re.MULTILINE)
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return tiny.make_model(folder / "model"), tiny.make_pairs(folder / "pairs.jsonl", 30)


@pytest.fixture
def flags(inputs, tmp_path):
    """Good flags; what a test adds comes later and wins. output_dir is tmp_path/out."""
    return tiny.settings(*inputs, tmp_path / "out")


@pytest.fixture
def refuse(flags, capsys, monkeypatch, tmp_path):
    """refuse(*more flags) -> the message; status 2, nothing printed beside it, nothing written, no network touched."""

    def no_network(*args):
        raise AssertionError("reached for the network")

    def start(*more, program=dpotrainer, good=flags):
        before = tiny.tree(tmp_path)
        monkeypatch.setattr(socket.socket, "connect", no_network)
        capsys.readouterr()
        assert program.main([*good, *map(str, more)]) == 2
        out, err = capsys.readouterr()
        assert out == "" and "Traceback" not in err and err.startswith("dpotrainer: ")
        assert tiny.tree(tmp_path) == before and not (tmp_path / "out").exists()
        return err

    return start


@pytest.fixture
def plan(flags, capsys):
    """plan(*more flags) -> the lines of a dry run, which show the settings as they were resolved."""

    def start(*more, program=dpotrainer, good=flags):
        status = program.main([*good, "--dry_run", "true", *map(str, more)])
        out, err = capsys.readouterr()
        assert status == 0, err
        return out

    return start


def edit_constants(folder, **lines):
    """A copy of the program with other lines at its top, {constant: the whole new line}, as a module."""
    source = tiny.PROGRAM.read_text(encoding="utf-8")
    for name, line in lines.items():
        source, count = re.subn(rf"^{name} = .*$", line, source, count=1, flags=re.MULTILINE)
        assert count == 1
    path = folder / "dpotrainer.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"edited_{time.monotonic_ns()}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_yaml(path, **values):
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


# ----------------------------------------------------------------------------------------------- which layer wins
def test_flags_win_over_yaml_and_yaml_over_constants(tmp_path, plan):
    program, file = edit_constants(tmp_path, BETA="BETA = 0.31"), write_yaml(tmp_path / "my.yaml", beta=0.32)
    assert ", beta 0.1\n" in plan()
    assert ", beta 0.31\n" in plan(program=program)
    assert ", beta 0.32\n" in plan("--config", file, program=program)
    assert ", beta 0.32\n" in plan(f"--config={file}", program=program)
    assert ", beta 0.33\n" in plan("--config", file, "--beta", "0.33", program=program)
    assert ", beta 0.33\n" in plan("--beta=0.33", "--config", file, program=program)


def test_every_constant_reaches_its_setting(tmp_path):
    changed = {
        "MODEL_NAME": "m",
        "DATASET_NAME": "d",
        "OUTPUT_DIR": "o",
        "LOSS_TYPE": "ipo",
        "LR_SCHEDULER_TYPE": "linear",
        "DTYPE": "float32",
        "BF16": False,
        "GRADIENT_CHECKPOINTING": False,
        "LORA_DROPOUT": 0.25,
    }
    changed |= {name: 7 for name in CONSTANTS if name not in changed}
    lines = {name: f"{name} = {value!r}  # edited" for name, value in changed.items()}
    settings, problems = edit_constants(tmp_path, **lines).parse_settings([])
    assert problems == []
    resolved = {name: getattr(settings, setting) for name, setting in CONSTANTS.items()}
    assert resolved == changed | {"LOSS_TYPE": ["ipo"]}


def test_the_constants_as_shipped_are_good(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings, problems = dpotrainer.parse_settings([])
    assert problems == [] and dpotrainer.check_settings(settings) == []


def test_a_list_of_losses_in_each_layer(tmp_path, plan):
    program = edit_constants(tmp_path, LOSS_TYPE='LOSS_TYPE = ["sigmoid", "sft"]')
    assert "DPO" in plan(program=program) and "cross-entropy" in plan(program=program)
    file = write_yaml(tmp_path / "my.yaml", loss_type=["hinge", "sft"], loss_weights=[0.5, 0.25])
    out = plan("--config", file)
    assert "0.5 x hinge" in out and "0.25 x cross-entropy" in out


# --------------------------------------------------------------------------------------------- names and types
def test_a_misspelt_constant_is_refused(tmp_path, refuse):
    message = refuse(program=edit_constants(tmp_path, BETA="BETTA = 0.1"))
    assert "betta=0.1" in message and "did you mean beta?" in message


def test_without_a_global_batch_size_the_batch_is_as_in_trl(tmp_path, flags):
    at = flags.index("--global_batch_size")
    program = edit_constants(tmp_path, GLOBAL_BATCH_SIZE="# GLOBAL_BATCH_SIZE")
    more = ["--gradient_accumulation_steps", "3"]
    settings, problems = program.parse_settings([*flags[:at], *flags[at + 2 :], *more])
    assert problems == program.check_settings(settings) == [] and settings.global_batch_size == 12


def test_other_settings_may_stand_among_the_constants(tmp_path, refuse):
    lines = "BETA = 0.1\nWEIGHT_DECAY = 0.25\nPER_DEVICE_EVAL_BATCH_SIZE = 3"
    settings, problems = edit_constants(tmp_path, BETA=lines).parse_settings([])
    assert problems == [] and dpotrainer.check_settings(settings) == []
    assert (settings.weight_decay, settings.per_device_eval_batch_size) == (0.25, 3)
    program = edit_constants(tmp_path, BETA="BETA = 0.1\nGRADIENT_ACCUMULATION_STEPS = 3")
    assert "is not 4 per device x 3 accumulation x 1 processes" in refuse(program=program)


def test_the_home_folder_is_meant_by_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    settings, _ = dpotrainer.parse_settings(["--output_dir=~/out", "--model_name_or_path=~/model"])
    assert settings.output_dir == f"{tmp_path}/out" and settings.model_name_or_path == f"{tmp_path}/model"


def test_a_constant_too_many_is_refused(tmp_path, refuse):
    assert "max_lenght=3" in refuse(program=edit_constants(tmp_path, BETA="BETA = 0.1\nMAX_LENGHT = 3"))


@pytest.mark.parametrize("wrong, right", [("betta", "beta"), ("lora-alfa", "lora_alpha"), ("maxlength", "max_length")])
def test_a_misspelt_setting_is_refused_with_the_closest(wrong, right, tmp_path, refuse):
    assert f"did you mean {right}?" in refuse(f"--{wrong}", "8")
    message = refuse("--config", write_yaml(tmp_path / "my.yaml", **{wrong: 8}))
    assert wrong in message and f"did you mean {right}?" in message


@pytest.mark.parametrize("short", ["--bet", "--model_name", "--learning_rat", "--conf", "-b"])
def test_abbreviations_are_refused(short, refuse):
    assert repr(short) in refuse(short, "0.2")


@pytest.mark.parametrize("words", [["stray"], ["--beta", "0.1", "0.2"], ["--beta"], ["--=3"], ["--", "x"]])
def test_stray_words_are_refused(words, refuse):
    refuse(*words)


@pytest.mark.parametrize(
    "name, value",
    [
        ("beta", "a lot"),
        ("beta", True),
        ("beta", [0.1, 0.2]),
        ("max_length", 10.5),
        ("bf16", "perhaps"),
        ("dtype", "float8"),
        ("lr_scheduler_type", "cosinus"),
        ("reference", "none"),
        ("loss_type", []),
        ("lora_r", {"a": 1}),
    ],
)
def test_a_wrong_type_in_yaml_is_refused(name, value, tmp_path, refuse):
    assert name in refuse("--config", write_yaml(tmp_path / "my.yaml", **{name: value}))


def test_a_wrong_type_in_a_constant_is_refused(tmp_path, refuse):
    message = refuse(program=edit_constants(tmp_path, BETA='BETA = "a lot"'))
    assert "beta" in message and "a lot" in message


@pytest.mark.parametrize("text", ["beta: [0.1", "\tbeta: 1", "- beta\n- 0.1\n", "beta 0.1", "", "3"])
def test_yaml_that_is_no_mapping_is_refused(text, tmp_path, refuse):
    file = tmp_path / "my.yaml"
    file.write_text(text)
    assert "my.yaml" in refuse("--config", file)


def test_every_default_may_be_written_to_a_file(tmp_path):
    defaults = vars(dpotrainer.parse_settings([])[0])
    given = {name: value for name, value in defaults.items() if value != []}
    settings, problems = dpotrainer.parse_settings(["--config", str(write_yaml(tmp_path / "all.yaml", **given))])
    assert problems == dpotrainer.check_settings(settings) == [] and settings.lora_target_modules == "all-linear"
    derived = ("per_device_eval_batch_size", "gradient_accumulation_steps")
    assert all(vars(settings)[name] in (value, [value]) for name, value in given.items() if name not in derived)


def test_a_config_that_cannot_be_read_is_refused(tmp_path, refuse):
    assert "nowhere.yaml" in refuse("--config", tmp_path / "nowhere.yaml")
    assert str(tmp_path) in refuse("--config", tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00beta")
    assert "binary.yaml" in refuse("--config", tmp_path / "binary.yaml")


def all_settings() -> list[str]:
    return list(vars(dpotrainer.parse_settings([])[0]))


@pytest.mark.parametrize("value", ["@@", "-1", "", "[", "{", "{}", "nan", "None"])
def test_no_value_of_any_setting_ends_in_a_traceback(value):
    """All settings at once; parsing may list problems, or raise the error that main turns into a message."""
    words = [f"--{name}={value}" for name in all_settings()]
    try:
        dpotrainer.parse_settings(words)
    except dpotrainer.UserError as error:
        assert str(error)


def test_env_of_a_file_written_for_trl_is_set(tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_TEST", "before")
    file = write_yaml(tmp_path / "my.yaml", env={"DPO_TEST": 3}, beta=0.2)
    settings, problems = dpotrainer.parse_settings(["--config", str(file)])
    assert problems == [] and settings.beta == 0.2 and os.environ["DPO_TEST"] == "3" and not hasattr(settings, "env")


def test_null_for_any_setting_is_taken_or_refused(tmp_path):
    for name in all_settings():
        try:
            settings, problems = dpotrainer.parse_settings(
                ["--config", str(write_yaml(tmp_path / "n.yaml", **{name: None}))]
            )
            problems += dpotrainer.check_settings(settings)
            dpotrainer.find_broken(settings, dpotrainer.MACHINE_RULES)
        except dpotrainer.UserError as error:
            problems = [str(error)]
        except Exception as error:
            raise AssertionError(f"{name}: null gives {error!r}") from error
        assert all(name in problem for problem in problems)


# --------------------------------------------------------------------------------------------- values that are refused
OUT_OF_RANGE = {  # values: settings that refuse them
    ("0", "-0.1", "inf", "nan"): "beta learning_rate num_train_epochs logging_steps eval_steps save_steps",
    ("0", "-1"): "global_batch_size per_device_train_batch_size per_device_eval_batch_size "
    "gradient_accumulation_steps lora_r lora_alpha max_length",
    ("-1",): "eval_pairs sample_prompts seed data_seed",
    ("0",): "max_steps",
    ("-1", "inf", "nan"): "warmup_steps max_grad_norm",
    ("-0.1", "0.5", "nan"): "label_smoothing",
    ("-0.1", "1", "nan"): "lora_dropout",
    ("0", "1"): "save_total_limit",
}


@pytest.mark.parametrize(
    "name, value", [(name, v) for values, names in OUT_OF_RANGE.items() for name in names.split() for v in values]
)
def test_every_range_is_checked(name, value, refuse):
    message = refuse(f"--{name}={value}", "--loss_type", "robust", "--disable_dropout", "false")
    assert message.startswith(f"dpotrainer: {name}=") and (message.count("\n") == 1 or value == "-1")


@pytest.mark.parametrize(
    "flag",
    [
        "--beta=0",
        "--beta=-0.1",
        "--num_train_epochs=0",
        "--label_smoothing=0.5",
        "--lora_r=0",
        "--learning_rate=0",
        "--max_length=0",
        "--global_batch_size=0",
        "--eval_pairs=-1",
        "--logging_steps=0",
        "--seed=-1",
        "--lora_dropout=1",
    ],
)
def test_values_that_the_issue_names_are_refused(flag, refuse):
    more = ["--loss_type", "robust"] if "smoothing" in flag else []
    assert f"{flag.removeprefix('--').split('=')[0]}=" in refuse(flag, *more)


NOT_TAKEN = {  # value that is refused: settings
    "true": "auto_find_batch_size batch_eval_metrics dataloader_drop_last dataset_streaming enable_jit_checkpoint "
    "eval_use_gather_object ignore_data_skip load_best_model_at_end padding_free push_to_hub save_only_model "
    "sync_ref_model trust_remote_code use_liger_kernel",
    '{"split_batches": true}': "accelerator_config",
    "false": "use_peft eval_do_concat_batches",
    "hf_secret": "hub_token model_init_kwargs resume_from_checkpoint",
    "group_by_length": "train_sampling_strategy",
    "keep_end": "truncation_mode",
}


@pytest.mark.parametrize("name, value", [(name, v) for v, names in NOT_TAKEN.items() for name in names.split()])
def test_what_would_be_ignored_or_break_a_run_is_refused(name, value, refuse):
    message = refuse(f"--{name}={value}")
    assert f"{name}=" in message and "; leave it out" in message
    assert "hf_secret" not in message or name != "hub_token"


CLASHES = [  # setting, flags that make it clash, the environment that goes with them
    ("loss_type", ["--loss_type", "sigmoid", "typo"], {}),
    ("label_smoothing", ["--label_smoothing", "0.1"], {}),
    ("label_smoothing", ["--loss_type", "hinge", "ipo", "--label_smoothing", "0.1"], {}),
    ("label_smoothing", ["--loss_type", "exo_pair"], {}),
    ("loss_weights", ["--loss_type", "sigmoid", "sft", "--loss_weights", "1"], {}),
    ("loss_weights", ["--loss_type", "sigmoid", "sft", "--loss_weights", "1", "nan"], {}),
    ("save_strategy", ["--save_strategy", "no"], {}),
    ("torch_compile_backend", ["--torch_compile_backend", "inductor"], {}),
    ("torch_compile_mode", ["--torch_compile_mode", "default"], {}),
    ("discopop_tau", ["--discopop_tau", "0.1"], {}),
    ("lora_dropout", ["--lora_dropout", "0.1"], {}),
    ("ref_model_name_or_path", ["--ref_model_name_or_path", "some/model"], {}),
    ("reference", ["--reference", "adapter", "--fresh_adapter", "true"], {}),
    ("precompute_ref_log_probs", ["--precompute_ref_log_probs", "true"], {"ACCELERATE_USE_FSDP": "true"}),
    ("precompute_ref_log_probs", ["--precompute_ref_log_probs", "true"], {"ACCELERATE_USE_DEEPSPEED": "true"}),
    ("merge", ["--merge", "true"], {"ACCELERATE_USE_FSDP": "true"}),
    ("fresh_adapter", ["--fresh_adapter", "true"], {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}),
    ("merge", ["--merge", "true", "--load_in_4bit", "true"], {}),
    ("merge", ["--merge", "true", "--load_in_8bit", "true"], {}),
    ("model_name_or_path", ["--model_name_or_path="], {}),
    ("dataset_name", ["--dataset_name="], {}),
    ("output_dir", ["--output_dir="], {}),
    ("output_dir", ["--output_dir=/dev/null/out"], {}),
    ("model_name_or_path", ["--model_name_or_path", "./nowhere"], {}),
    ("dataset_name", ["--dataset_name", "./nowhere"], {}),
    ("ref_model_name_or_path", ["--ref_model_name_or_path", "./nowhere", "--reference", "copy"], {}),
]


@pytest.mark.parametrize("name, words, variables", CLASHES, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_settings_that_clash_are_refused(name, words, variables, refuse, monkeypatch):
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    message = refuse(*words)
    assert re.search(rf"^(dpotrainer: )?{name}[= ]", message, flags=re.MULTILINE)
    assert "; " in message, "the fix is missing"


def test_null_for_dtype_is_refused(tmp_path):
    settings, problems = dpotrainer.parse_settings(["--config", str(write_yaml(tmp_path / "n.yaml", dtype=None))])
    assert problems == [] and dpotrainer.check_settings(settings) == ["dtype=None: is empty; give a value"]


def test_every_rule_of_the_program_is_tried_here(flags, monkeypatch):
    tried = [(words, variables) for _, words, variables in CLASHES]
    tried += [
        ([f"--{name}={values[0]}"], {})
        for values, names in (*OUT_OF_RANGE.items(), *(([v], names) for v, names in NOT_TAKEN.items()))
        for name in names.split()
    ]
    fired = {("dtype", "is empty; give a value")}  # above: a flag cannot say null
    for words, variables in tried:
        with monkeypatch.context() as patch:
            for variable, value in variables.items():
                patch.setenv(variable, value)
            settings, _ = dpotrainer.parse_settings([*flags, *words])
            fired |= {
                (name, text)
                for names, is_wrong, text in dpotrainer.RULES
                for name in names.split()
                if is_wrong(getattr(settings, name), settings)
            }
    assert fired == {(name, text) for names, _, text in dpotrainer.RULES for name in names.split()}


def test_what_trl_itself_refuses_is_told_as_a_problem(refuse):
    assert "8 bit and 4 bit" in refuse("--load_in_4bit", "true", "--load_in_8bit", "true")


def test_losses_with_too_few_or_too_many_weights_are_refused(refuse):
    assert "must be one number for each loss_type" in refuse("--loss_weights", "1", "2")


@pytest.mark.parametrize("name", ["model_name_or_path", "dataset_name", "ref_model_name_or_path"])
@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "~/nowhere", "two/folders/deep"])
def test_paths_that_do_not_exist_are_refused(name, path, refuse, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert f"{name}={os.path.expanduser(path)}: " in refuse(f"--{name}={path}", "--reference", "copy")


def test_a_data_file_that_does_not_exist_is_refused(refuse):
    assert "dataset_name=pairs.jsonl: " in refuse("--dataset_name", "pairs.jsonl")


def test_an_output_dir_that_is_or_lies_under_a_file_is_refused(inputs, refuse):
    for path in (inputs[1], inputs[1] / "deeper" / "still"):
        message = refuse("--output_dir", path)
        assert f"output_dir={path}: " in message and "not a folder that can be written" in message


def test_an_output_dir_without_the_right_to_write_is_refused(refuse, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    assert f"output_dir={tmp_path / 'out'}: " in refuse()


# ------------------------------------------------------------------------------------------------------- the batch
@pytest.mark.parametrize("world, accumulation", [(1, 16), (2, 8), (8, 2)])
def test_accumulation_follows_from_the_global_batch(world, accumulation, flags, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    settings, _ = dpotrainer.parse_settings(
        [*flags, "--global_batch_size", "64", "--per_device_train_batch_size", "4"]
    )
    assert dpotrainer.check_settings(settings) == []
    assert settings.gradient_accumulation_steps == accumulation and settings.per_device_eval_batch_size == 4


@pytest.mark.parametrize("world, total", [(1, 24), (2, 48), (8, 192)])
def test_a_file_written_for_trl_keeps_its_batch(world, total, inputs, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    file = write_yaml(
        tmp_path / "trl.yaml",
        model_name_or_path=str(inputs[0]),
        dataset_name=str(inputs[1]),
        use_peft=True,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=8,
        learning_rate=5e-6,
    )
    settings, problems = dpotrainer.parse_settings(["--config", str(file)])
    assert problems == [] and dpotrainer.check_settings(settings) == []
    assert (settings.gradient_accumulation_steps, settings.global_batch_size) == (8, total)


def test_a_batch_that_does_not_divide_names_what_does(refuse, monkeypatch):
    message = refuse("--global_batch_size", "64", "--per_device_train_batch_size", "6")
    assert "global_batch_size=64" in message and "[1, 2, 4, 8, 16, 32, 64]" in message
    monkeypatch.setenv("WORLD_SIZE", "8")
    message = refuse("--global_batch_size", "64", "--per_device_train_batch_size", "3")
    assert "8 processes" in message and "[1, 2, 4, 8]" in message
    assert "a multiple of 8" in refuse("--global_batch_size", "4")


def test_a_batch_given_twice_must_agree(refuse, plan):
    words = ["--global_batch_size", "8", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps"]
    assert "global_batch_size=8: is not 2 per device x 3 accumulation" in refuse(*words, "3")
    assert "8 pairs = 2 per device x 4 accumulation x 1 process" in plan(*words, "4")


# --------------------------------------------------------------------------------------------------- the machine
def test_no_gpu_points_to_the_quickstart(refuse, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = refuse("--use_cpu", "false")
    assert "no CUDA GPU" in message and "--config configs/quickstart.yaml" in message and message.count("\n") == 1


def test_a_dry_run_shows_the_plan_without_a_gpu_and_says_so(flags, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert dpotrainer.main([*flags, "--use_cpu", "false", "--dry_run", "true"]) == 2
    out, err = capsys.readouterr()
    assert (
        "24 pairs to train" in out
        and "<|im_start|>" in out
        and "no CUDA GPU" in err
        and not (tmp_path / "out").exists()
    )


def pretend_cuda(monkeypatch, gpus=1, bf16=True):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16 or including_emulation)


def test_bf16_on_a_gpu_without_it_is_refused(refuse, monkeypatch):
    pretend_cuda(monkeypatch, bf16=False)
    message = refuse("--use_cpu", "false", "--bf16", "true")
    assert "bf16=True: needs an Ampere GPU" in message and "--fp16 true" in message


def test_several_gpus_but_one_process_is_refused(refuse, monkeypatch):
    pretend_cuda(monkeypatch, gpus=4)
    message = refuse("--use_cpu", "false")
    assert (
        "several GPUs but one process" in message
        and "accelerate launch --config_file configs/accelerate/ddp.yaml" in message
    )
    assert (tiny.ROOT / "configs/accelerate/ddp.yaml").exists()


@pytest.mark.parametrize(
    "words, package",
    [
        (["--report_to", "wandb"], "wandb"),
        (["--report_to", "trackio"], "trackio"),
        (["--report_to", "tensorboard", "wandb"], "tensorboard"),
        (["--report_to", "tensorbord"], "tensorboard"),
        (["--load_in_4bit", "true"], "bitsandbytes"),
        (["--load_in_8bit", "true"], "bitsandbytes"),
        (["--optim", "paged_adamw_8bit"], "bitsandbytes"),
        (["--optim", "lion_32bit"], "bitsandbytes"),
    ],
)
def test_a_missing_optional_package_is_named(words, package, refuse, monkeypatch):
    monkeypatch.setattr(dpotrainer, "find_spec", lambda name: None)
    assert f"pip install {package}" in refuse(*words)


def test_several_trackers_are_a_list_in_yaml_and_words_on_the_command_line(flags, tmp_path):
    file = write_yaml(tmp_path / "my.yaml", report_to=["tensorboard", "trackio"])
    at = flags.index("--report_to")
    rest = flags[:at] + flags[at + 2 :]
    for words in (["--config", file], ["--report_to", "tensorboard", "trackio"]):
        settings, problems = dpotrainer.parse_settings([*rest, *map(str, words)])
        assert not problems and settings.report_to == ["tensorboard", "trackio"]


# --------------------------------------------------------------------------------------- all at once, in a process
def test_all_problems_come_in_one_message(tmp_path, inputs):
    edit_constants(tmp_path, LORA_R="LORA_R = 0", SEED="SEEED = 1")
    shutil.copy(inputs[1], tmp_path / "pairs.jsonl")
    file = write_yaml(tmp_path / "my.yaml", learning_rte=1, max_length="long", label_smoothing=0.1)
    before = tiny.tree(tmp_path)
    ended = tiny.run_program(
        [
            "--config",
            file,
            "--bet",
            "0.2",
            "--dataset_name",
            "./none",
            "--trust_remote_code",
            "true",
            "--num_train_epochs=-1",
        ],
        program=tmp_path / "dpotrainer.py",
        cwd=tmp_path,
    )
    assert ended.returncode == 2 and ended.stdout == "" and "Traceback" not in ended.stderr
    for said in (
        "lora_r=0",
        "seeed=1",
        "learning_rte",
        "max_length",
        "label_smoothing=0.1",
        "--bet",
        "./none",
        "trust_remote_code",
        "num_train_epochs=-1",
    ):
        assert said in ended.stderr, said
    after = {name: text for name, text in tiny.tree(tmp_path).items() if "__pycache__" not in name}
    assert after == before


def test_help_is_quick_and_shows_the_constants_as_defaults():
    begun = os.times()
    ended = tiny.run_program(["--help"])
    used = os.times()
    assert sum(used[2:4]) - sum(begun[2:4]) < 15, "seconds of one core"
    assert ended.returncode == 0 and "Traceback" not in ended.stderr
    entries = re.split(r"\n  --(?=[a-z])", ended.stdout)  # a flag and its text, which is broken anywhere
    entries = {re.match(r"\w+", entry)[0]: re.sub(r"\s", "", entry) for entry in entries[1:]}
    for constant, name in CONSTANTS.items():
        assert f"(default:{getattr(dpotrainer, constant)})" in entries[name], name


# ------------------------------------------------------------------------------------------------------------ the hub
def test_a_hub_that_cannot_be_reached_is_one_clear_message(flags, capsys):
    for name in ("model_name_or_path", "dataset_name"):
        assert dpotrainer.main([*flags, f"--{name}", "nobody/nothing-here"]) == 2
        err = capsys.readouterr().err
        message = [line for line in err.splitlines() if "nobody/nothing-here" in line]
        assert len(message) == 1 and message[0].startswith("dpotrainer: ") and "network" in err
        assert "Traceback" not in err


@pytest.mark.parametrize(
    "error, fix",
    [
        ("OSError('You are trying to access a gated repo. 403 Client Error')", "hf auth login"),
        ("OSError('nobody/nothing is not a valid model identifier')", "spelling"),
        ("ConnectionError('connection timed out')", "network"),
    ],
)
def test_what_the_hub_answers_is_told_with_its_fix(error, fix, flags, capsys, monkeypatch):
    def fail(*args, **kwargs):
        raise eval(error)

    monkeypatch.setattr(dpotrainer.transformers.AutoConfig, "from_pretrained", fail)
    assert dpotrainer.main(flags) == 2
    err = capsys.readouterr().err
    assert fix in err and "Traceback" not in err


def test_weights_in_pickles_are_refused(inputs, flags, tmp_path, capsys):
    model = shutil.copytree(inputs[0], tmp_path / "pickled")
    (model / "model.safetensors").unlink()
    torch.save({}, model / "pytorch_model.bin")
    assert dpotrainer.main([*flags, "--model_name_or_path", str(model)]) == 2
    err = capsys.readouterr().err
    assert "pickled ones can run code" in err and "Traceback" not in err


# -------------------------------------------------------------------------------------------------- the files beside
YAMLS = sorted((tiny.ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.name)
def test_every_config_holds_valid_settings(path, monkeypatch):
    monkeypatch.chdir(tiny.ROOT)
    settings, problems = dpotrainer.parse_settings(["--config", str(path)])
    assert problems == [] and dpotrainer.check_settings(settings) == []


@pytest.mark.parametrize("path", sorted((tiny.ROOT / "configs/accelerate").glob("*.yaml")), ids=lambda path: path.name)
def test_every_accelerate_config_is_one(path):
    config = load_config_from_file(str(path))
    header = path.read_text(encoding="utf-8").split("\ncompute_environment")[0]
    assert config.num_processes >= 1 and config.mixed_precision in ("no", "bf16", "fp16")
    assert f"accelerate launch --config_file configs/accelerate/{path.name}" in header and "Tested" in header


def test_settings_of_our_own_are_documented():
    """Each field of Settings has a help text, and the design's defaults."""
    settings, _ = dpotrainer.parse_settings([])
    assert (settings.global_batch_size, settings.eval_pairs, settings.sample_prompts) == (64, 500, 8)
    assert settings.share_prefixes and settings.reference == "auto"
    assert not (settings.merge or settings.dry_run or settings.overwrite or settings.chat_strings)
    assert all(field.metadata["help"] for field in dpotrainer.fields(dpotrainer.Settings))


@pytest.mark.parametrize("rank, status, heard", [(0, 2, True), (1, 2, False), (0, 1, True), (1, 1, True)])
def test_a_fault_of_any_process_is_told_and_a_mistake_once(rank, status, heard, monkeypatch, capsys):
    def fail(argv):
        raise dpotrainer.UserError("the reason", status=status)

    monkeypatch.setattr(dpotrainer, "parse_settings", fail)
    monkeypatch.setenv("RANK", str(rank))
    assert dpotrainer.main([]) == status
    err = capsys.readouterr().err
    assert ("the reason" in err) == heard and ("process 1" in err) == (heard and rank == 1)
