"""Constants, YAML and flags: what wins, what is refused, and what is said."""

import dataclasses
import importlib.util
import inspect
import os
import re
import shutil
import socket
import sys
import time

import huggingface_hub
import pytest
import tiny
import torch
import trl
import yaml
from accelerate.commands.config.config_args import load_config_from_file

import dpotrainer

NAMES = {  # constants that are not the setting of the same name in lower case
    "MODEL_NAME": "model_name_or_path",
    "PER_DEVICE_BATCH_SIZE": "per_device_train_batch_size",
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return tiny.make_model(folder / "model"), tiny.make_pairs(folder / "pairs.jsonl", 30)


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    """No launcher, no network; what a test leaves in the environment is taken back."""
    for name in ("WORLD_SIZE", "RANK", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name in ("ACCELERATE_MIXED_PRECISION", "HF_TOKEN"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    def no_network(*args):
        raise AssertionError("reached for the network")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(huggingface_hub.HfApi, "whoami", lambda self: {"name": "me"})


@pytest.fixture
def flags(inputs, tmp_path):
    """Good flags; what a test adds comes later and wins. output_dir is tmp_path/out."""
    return tiny.settings(*inputs, tmp_path / "out")


@pytest.fixture
def read(flags):
    """read(*more flags) -> the job."""

    def start(*more, program=dpotrainer, good=flags):
        return program.read_settings([*good, *map(str, more)])

    return start


@pytest.fixture
def refuse(flags, tmp_path):
    """refuse(*more flags) -> the lines of the message; nothing is written."""

    def start(*more, program=dpotrainer, good=flags):
        before = tiny.tree(tmp_path)
        with pytest.raises(program.UserError) as caught:
            program.read_settings([*good, *map(str, more)])
        assert caught.value.status == 2
        assert tiny.tree(tmp_path) == before and not (tmp_path / "out").exists()
        return str(caught.value).splitlines()

    return start


def edit_constants(folder, **lines):
    """A copy of the program, as a module, with other lines, {constant: the whole new line}."""
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


def only(lines, *words):
    """The message is this one line, and has these words."""
    assert len(lines) == 1, lines
    for word in words:
        assert word in lines[0], lines[0]


def all_fields():
    parts = (
        dpotrainer.Settings,
        trl.ScriptArguments,
        trl.ModelConfig,
        trl.DPOConfig,
        trl.DatasetMixtureConfig,
    )
    return [field for part in parts for field in dataclasses.fields(part) if field.init]


# -------------------------------------------------------------------------------- which layer wins
def test_flags_win_over_yaml_and_yaml_over_constants(tmp_path, read):
    program = edit_constants(tmp_path, BETA="BETA = 0.31")
    file = write_yaml(tmp_path / "my.yaml", beta=0.32)
    assert read().training_args.beta == 0.1
    assert read(program=program).training_args.beta == 0.31
    assert read("--config", file, program=program).training_args.beta == 0.32
    assert read(f"--config={file}", program=program).training_args.beta == 0.32
    assert read("--config", file, "--beta", "0.33", program=program).training_args.beta == 0.33
    assert read("--beta=0.33", "--config", file, program=program).training_args.beta == 0.33


def test_every_constant_reaches_its_setting(tmp_path):
    changed = {
        "MODEL_NAME": "m",
        "DATASET_NAME": "d",
        "OUTPUT_DIR": str(tmp_path / "o"),
        "LOSS_TYPE": "ipo",
        "LR_SCHEDULER_TYPE": "linear",
        "DTYPE": "float32",
        "BF16": False,
        "GRADIENT_CHECKPOINTING": False,
        "LORA_DROPOUT": 0.25,
        "GLOBAL_BATCH_SIZE": 14,
    }
    changed |= {name: 7 for name in dpotrainer.CONSTANTS if name not in changed}
    lines = {name: f"{name} = {value!r}  # edited" for name, value in changed.items()}
    job = edit_constants(tmp_path, **lines).read_settings(
        ["--use_cpu", "--disable_dropout", "false"]
    )
    flat = dpotrainer.flat_settings(job)
    reached = {name: flat[NAMES.get(name, name.lower())] for name in changed}
    assert reached == changed | {"LOSS_TYPE": ["ipo"]}
    assert job.training_args.gradient_accumulation_steps == 2


def test_the_constants_as_shipped_are_good(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = dpotrainer.read_settings(["--use_cpu"])
    args = job.training_args
    assert isinstance(args, trl.DPOConfig) and args.device.type == "cpu"
    assert (args.beta, args.learning_rate, args.gradient_accumulation_steps) == (0.1, 5e-6, 16)
    assert (job.model_args.lora_r, job.model_args.lora_target_modules) == (32, "all-linear")
    assert (job.settings.global_batch_size, job.settings.eval_pairs) == (64, 500)
    assert args.per_device_eval_batch_size == args.per_device_train_batch_size == 4


def test_a_problem_names_the_layer_that_it_comes_from(tmp_path, refuse, flags):
    program = edit_constants(tmp_path, SEED="SEED = -1")
    file = write_yaml(tmp_path / "my.yaml", weight_decay=-0.5)
    lines = refuse("--config", file, "--beta", "-1", program=program)
    assert lines == [
        "flag --beta, beta=-1.0: must be above 0",
        "constant SEED, seed=-1: must be 0 or more",
        f"file {file}, weight_decay=-0.5: must be 0 or more",
    ]


# ------------------------------------------------------------------------------------------- names
def test_a_constant_that_was_deleted_or_misspelt_is_named(tmp_path, refuse):
    only(
        refuse(program=edit_constants(tmp_path, LEARNING_RATE="")),
        "constant LEARNING_RATE",
        "missing",
    )
    lines = refuse(program=edit_constants(tmp_path, BETA="BETTA = 0.1"))
    assert len(lines) == 2 and "constant BETA: is missing" in lines[0]
    assert "constant BETTA" in lines[1] and "did you mean beta?" in lines[1]


def test_other_settings_may_stand_among_the_constants(tmp_path, read, refuse):
    lines = "BETA = 0.1\nWEIGHT_DECAY = 0.25\nPER_DEVICE_EVAL_BATCH_SIZE = 3"
    job = read(program=edit_constants(tmp_path, BETA=lines))
    assert (job.training_args.weight_decay, job.training_args.per_device_eval_batch_size) == (
        0.25,
        3,
    )
    assert job.origins["weight_decay"] == "constant WEIGHT_DECAY"
    only(refuse(program=edit_constants(tmp_path, BETA="BETA = 0.1\nMAX_LENGHT = 3")), "MAX_LENGHT")


@pytest.mark.parametrize(
    "wrong, right", [("betta", "beta"), ("lora-alfa", "lora_alpha"), ("maxlength", "max_length")]
)
def test_a_misspelt_setting_is_refused_with_the_closest(wrong, right, tmp_path, refuse):
    only(refuse(f"--{wrong}", "8"), f"--{wrong}", f"did you mean {right}?")
    only(
        refuse("--config", write_yaml(tmp_path / "my.yaml", **{wrong: 8})), "my.yaml", wrong, right
    )


@pytest.mark.parametrize("name", ["constants.yaml", "flags.yaml", "constant x.yaml"])
def test_a_file_is_a_file_whatever_its_name(name, read, refuse, tmp_path):
    file = write_yaml(tmp_path / name, gradient_accumulation_steps=4)
    job = read("--config", file, good=["--use_cpu"])
    assert job.training_args.gradient_accumulation_steps == 4
    file = write_yaml(tmp_path / name, betaa=4)
    only(refuse("--config", file), f"file {file}, betaa: ", "did you mean beta?")


def test_a_name_that_a_file_has_twice_is_refused(refuse, tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text("beta: 0.2\nmax_steps: 3\nbeta: 0.3\n")
    only(refuse("--config", file), f"file {file}, beta: is there 2 times; leave one")


def test_true_and_false_may_be_numbers(read, refuse):
    assert read("--share_prefixes", "0", "--merge=1").settings.share_prefixes is False
    assert read("--merge", "1").settings.merge is True
    only(refuse("--merge", "2"), "merge=2: must be true or false")


def test_a_flag_that_says_no_takes_no_value(read, refuse):
    assert read("--no_share_prefixes").settings.share_prefixes is False
    only(refuse("--no_share_prefixes", "false"), "takes no value", "`--share_prefixes false`")


@pytest.mark.parametrize("name", ["merge", "precompute_ref_log_probs"])
def test_what_needs_a_whole_model_is_refused_where_it_is_sharded(name, read, refuse, monkeypatch):
    assert read(f"--{name}", "true")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    only(refuse(f"--{name}", "true"), f"{name}=True", "in one piece")


@pytest.mark.parametrize("name", ["flavour", "xyzzy", "push_pull_amplifier"])
def test_nothing_is_suggested_for_a_name_that_is_close_to_none(name, refuse):
    only(refuse(f"--{name}", "8"), "is not a setting; `--help all` lists them")


@pytest.mark.parametrize(
    "theirs, ours",
    [
        ("lr", "learning_rate"),
        ("lora_rank", "lora_r"),
        ("lora_dim", "lora_r"),
        ("cutoff_len", "max_length"),
        ("max_prompt_length", "max_length"),
        ("torch_dtype", "dtype"),
        ("no_cuda", "use_cpu"),
        ("base_model", "model_name_or_path"),
        ("model", "model_name_or_path"),
        ("warmup_ratio", "warmup_steps"),
        ("overwrite_output_dir", "overwrite"),
        ("rpo_alpha", "loss_type: [sigmoid, sft]"),
        ("template", "chat template"),
        ("pref_beta", "beta"),
        ("pref_loss", "loss_type"),
        ("evaluation_strategy", "eval_strategy"),
        ("micro_batch_size", "per_device_train_batch_size"),
    ],
)
def test_names_of_other_trainers_are_known(theirs, ours, tmp_path, refuse):
    only(
        refuse(f"--{theirs}", "8"),
        f"flag --{theirs}: ",
        f"use {ours}" if ours != "chat template" else ours,
    )
    only(refuse("--config", write_yaml(tmp_path / "my.yaml", **{theirs: 8})), theirs, ours)


def test_no_name_of_another_trainer_is_a_setting():
    for advice, theirs in dpotrainer.INSTEAD.items():
        assert not set(theirs.split()) & dpotrainer.HINTS.keys()
        name = re.match(r"\w+", advice)[0]
        assert name in {*dpotrainer.HINTS, "nothing", "env"}, advice


@pytest.mark.parametrize(
    "short", ["--bet", "--model_name_or_pat", "--learning_rat", "--conf", "-b", "--use_cp"]
)
def test_abbreviations_are_refused(short, refuse):
    only(refuse(short, "0.2"), f"flag {short}: ", "is not a setting")


@pytest.mark.parametrize(
    "words", [["stray"], ["--beta", "0.1", "0.2"], ["--beta"], ["--=3"], ["--", "x"], ["--no_beta"]]
)
def test_stray_words_are_refused(words, flags, refuse):
    only(refuse(*words))
    only(refuse(*flags, good=words)) if words == ["stray"] else None


def test_a_switch_is_set_by_its_name_alone_and_unset_by_no(read):
    assert read("--merge").settings.merge
    assert not read("--no_share_prefixes").settings.share_prefixes
    assert not read("--share-prefixes", "false").settings.share_prefixes


# ------------------------------------------------------------------------------------------- types
WRONG_TYPES = [
    ("beta", "a lot"),
    ("beta", True),
    ("beta", [0.1, 0.2]),
    ("beta", None),
    ("max_length", 10.5),
    ("max_length", "ten"),
    ("num_train_epochs", False),
    ("bf16", "perhaps"),
    ("bf16", 1),
    ("dtype", "float8"),
    ("dtype", None),
    ("reference", "none"),
    ("lora_r", {"a": 1}),
    ("lora_r", None),
    ("loss_type", 3),
    ("loss_type", None),
    ("loss_weights", ["a"]),
    ("run_name", 3),
    ("output_dir", False),
    ("output_dir", None),
    ("columns", "question"),
    ("columns", ["question"]),
    ("lr_scheduler_kwargs", "fast"),
    ("datasets", [{"name": "no path"}]),
    ("datasets", "one"),
    ("eval_strategy", True),
]


@pytest.mark.parametrize("name, value", WRONG_TYPES)
def test_a_wrong_type_in_yaml_is_refused(name, value, tmp_path, refuse):
    only(
        refuse("--config", write_yaml(tmp_path / "my.yaml", **{name: value}), good=NO_FLAGS),
        f"{name}=",
        "my.yaml",
    )


NO_FLAGS = ["--use_cpu"]


@pytest.mark.parametrize(
    "name, value, becomes",
    [
        ("learning_rate", "5e-6", 5e-6),
        ("beta", 1, 1.0),
        ("max_length", "512", 512),
        ("max_length", 512.0, 512),
        ("max_length", None, None),
        ("loss_type", "ipo", ["ipo"]),
        ("lora_modules_to_save", "embed_tokens", ["embed_tokens"]),
        ("lora_target_modules", ["q_proj", "v_proj"], ["q_proj", "v_proj"]),
        ("eval_strategy", False, "no"),
        ("report_to", None, []),
        ("report_to", [], []),
        ("report_to", "", []),
        ("report_to", "none", []),
        ("lr_scheduler_kwargs", {"min_lr": 1e-7}, {"min_lr": 1e-7}),
        ("columns", {"prompt": "question"}, {"prompt": "question"}),
        ("lr_scheduler_type", "linear", "linear"),
        ("optim", "adamw_torch", "adamw_torch"),
    ],
)
def test_what_yaml_makes_of_a_value_is_understood(name, value, becomes, tmp_path):
    job = dpotrainer.read_settings(
        ["--use_cpu", "--config", str(write_yaml(tmp_path / "my.yaml", **{name: value}))]
    )
    assert dpotrainer.flat_settings(job)[name] == becomes


def test_mappings_as_flags(read):
    job = read(
        "--columns",
        "{prompt: question, chosen: response_j}",
        "--lr_scheduler_kwargs",
        '{"num_cycles": 2}',
    )
    assert job.settings.columns == {"prompt": "question", "chosen": "response_j"}
    assert job.training_args.lr_scheduler_kwargs == {"num_cycles": 2}


def test_a_wrong_type_in_a_constant_is_refused(tmp_path, refuse):
    only(
        refuse(program=edit_constants(tmp_path, BETA='BETA = "a lot"')),
        "constant BETA, beta=a lot: ",
    )


@pytest.mark.parametrize(
    "text", ["beta: [0.1", "\tbeta: 1", "- beta\n- 0.1\n", "beta 0.1", "", "3"]
)
def test_yaml_that_is_no_mapping_is_refused(text, tmp_path, refuse):
    file = tmp_path / "my.yaml"
    file.write_text(text)
    only(refuse("--config", file), "my.yaml")


def test_a_config_that_cannot_be_read_is_refused(tmp_path, refuse):
    only(refuse("--config", tmp_path / "nowhere.yaml"), "nowhere.yaml")
    only(refuse("--config", tmp_path), str(tmp_path))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00beta")
    only(refuse("--config", tmp_path / "binary.yaml"), "binary.yaml")
    only(refuse("--config"), "--config", "configs/qwen3_8b_lora.yaml")


@pytest.mark.parametrize(
    "value", ["@@", "-1", "", "[", "{", "{}", "nan", "None", "null", "false", "1e400"]
)
def test_no_value_of_any_setting_ends_in_a_traceback(value, monkeypatch):
    monkeypatch.setattr(
        dpotrainer, "make_job", lambda *_: None
    )  # some values would change this process
    words = [f"--{field.name}={value}" for field in all_fields()]
    try:
        dpotrainer.read_settings(words)
    except dpotrainer.UserError as error:
        assert str(error)


def test_null_for_any_setting_is_taken_or_refused(tmp_path):
    for field in all_fields():
        file = write_yaml(tmp_path / "n.yaml", **{field.name: None})
        try:
            dpotrainer.read_settings(["--use_cpu", "--config", str(file)])
        except dpotrainer.UserError as error:
            only(str(error).splitlines(), dpotrainer.SAME.get(field.name, field.name))


# ----------------------------------------------------------------------------- files for `trl dpo`
TRL_FILE = {
    "model_name_or_path": None,
    "dataset_name": None,
    "dataset_train_split": "train",
    "learning_rate": "5.0e-6",
    "num_train_epochs": 1,
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 8,
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "logging_steps": 25,
    "eval_strategy": "steps",
    "eval_steps": 50,
    "output_dir": "trained",
    "use_peft": True,
    "lora_r": 16,
    "lora_alpha": 16,
    "lora_target_modules": ["q_proj", "v_proj"],
    "warmup_steps": 0.1,
    "bf16": True,
    "dtype": "bfloat16",
    "report_to": "none",
    "push_to_hub": False,
    "remove_unused_columns": False,
    "do_train": True,
    "env": {"DPO_TEST": 3},
}


@pytest.mark.parametrize("world, total", [(1, 24), (2, 48), (8, 192)])
def test_a_file_written_for_trl_works_and_keeps_its_batch(
    world, total, inputs, tmp_path, monkeypatch
):
    monkeypatch.setenv("DPO_TEST", "before")
    monkeypatch.setenv("WORLD_SIZE", str(world))
    monkeypatch.setattr(
        dpotrainer, "make_job", lambda draft: draft
    )  # a process group would be made
    values = TRL_FILE | {"model_name_or_path": str(inputs[0]), "dataset_name": str(inputs[1])}
    file = write_yaml(tmp_path / "trl.yaml", **values)
    found = dpotrainer.read_settings(["--use_cpu", "--config", str(file)]).values
    assert (found["gradient_accumulation_steps"], found["global_batch_size"]) == (8, total)
    assert found["learning_rate"] == 5e-6 and os.environ["DPO_TEST"] == "3"


def test_a_mixture_of_data_sets_takes_the_place_of_the_constant(inputs, tmp_path, refuse):
    parts = [
        {"path": str(inputs[1])},
        {"path": "json", "data_files": str(inputs[1]), "split": "train[:5]"},
    ]
    file = write_yaml(tmp_path / "my.yaml", datasets=parts, test_split_size=0.1)
    job = dpotrainer.read_settings(["--use_cpu", "--config", str(file)])
    assert job.script_args.dataset_name is None and job.mixture_args.test_split_size == 0.1
    assert [dataset.path for dataset in job.mixture_args.datasets] == [str(inputs[1]), "json"]
    only(refuse("--config", file), "flag --dataset_name, dataset_name=", "`datasets:`")
    only(refuse("--test_split_size", "0.1"), "test_split_size=0.1: ", "eval_pairs")
    only(refuse("--config", file, "--dataset_config", "x", good=NO_FLAGS), "dataset_config=x")


def test_a_setting_under_its_old_and_its_new_name_is_refused(refuse, tmp_path):
    file = write_yaml(
        tmp_path / "my.yaml", gradient_checkpointing=True, activation_checkpointing=False
    )
    [line] = refuse("--config", file)
    assert "gradient_checkpointing: activation_checkpointing is the same; leave one" in line


@pytest.mark.parametrize(
    "words, name",
    [
        (["--loss_type", "foo"], "loss_type=['foo']"),
        (["--loss_type", "sigmoid", "foo"], "loss_type=['sigmoid', 'foo']"),
        (["--loss_type", "exo_pair"], "loss_type=['exo_pair']"),
        (["--loss_type", "aot", "--use_weighting"], "use_weighting=True"),
        (
            ["--loss_type", "nca_pair", "--f_divergence_type", "js_divergence"],
            "f_divergence_type=js_divergence: is for ",
        ),
        (["--f_divergence_type", "kl"], "f_divergence_type=kl: must be one of reverse_kl, "),
        (["--datasets", "foo"], "datasets=foo: must be a mapping such as {path: "),
    ],
)
def test_what_trl_would_find_after_the_weights_is_found_at_once(words, name, refuse):
    only(refuse(*words), name)


@pytest.mark.parametrize("part", [{"path": None}, {"path": 5}, {"split": "train"}])
def test_a_part_of_a_mixture_without_a_path_is_refused(part, refuse, tmp_path):
    file = write_yaml(tmp_path / "my.yaml", datasets=[part])
    assert "must be a mapping such as {path: " in refuse("--config", file)[0]


def test_every_loss_is_one_of_trl():
    source = inspect.getsource(trl.DPOTrainer)
    divergences = re.findall(r'f_divergence_type == "(\w+)"', source)
    assert set(dpotrainer.DIVERGENCES) == set(divergences)
    [diverging] = re.findall(r"f_divergence_loss_types = \{(.*?)\}", source)
    assert set(re.findall(r"\w+", diverging)) == dpotrainer.DIVERGING
    assert set(re.findall(r'loss_type == "(\w+)"', source)) == dpotrainer.LOSSES


@pytest.mark.parametrize("name", ["global_batch_size", "gradient_accumulation_steps"])
def test_a_batch_of_nothing_is_one_problem(name, refuse):
    only(refuse(f"--{name}", "0"), f"{name}=0: must be above 0")


def test_env_of_a_file_is_set_and_what_comes_too_late_is_said(tmp_path, read, monkeypatch, capsys):
    for name in ("DPO_TEST", "HF_HUB_OFFLINE", "HF_HOME"):
        monkeypatch.setenv(name, "1")
    read(
        "--config",
        write_yaml(
            tmp_path / "my.yaml", env={"DPO_TEST": 3, "HF_HUB_OFFLINE": 1, "HF_TOKEN": "hf_x"}
        ),
    )
    assert (
        os.environ["DPO_TEST"] == "3"
        and os.environ["HF_TOKEN"] == "hf_x"
        and capsys.readouterr().out == ""
    )
    read("--config", write_yaml(tmp_path / "my.yaml", env={"HF_HOME": "/elsewhere"}))
    told = capsys.readouterr().out
    assert told.startswith("! env HF_HOME: ") and told.count("\n") == 1


@pytest.mark.parametrize("env", ["A=1", ["A"], 3])
def test_an_env_that_is_no_mapping_is_refused(env, tmp_path, refuse):
    only(refuse("--config", write_yaml(tmp_path / "my.yaml", env=env)), "env")


# ----------------------------------------------------------------------------- settings.yaml again
@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--loss_type", "robust", "sft", "--loss_weights", "1", "0.5", "--label_smoothing", "0.1"],
        [
            "--columns",
            "{prompt: question}",
            "--max_steps",
            "7",
            "--activation_checkpointing",
            "true",
        ],
        ["--early_stopping_patience", "2", "--lr_scheduler_type", "cosine_with_min_lr"],
        ["--lr_scheduler_kwargs", '{"min_lr": 1e-7}', "--lora_target_modules", "q_proj", "v_proj"],
        ["--eval_strategy", "epoch", "--save_strategy", "no", "--dataset_test_split", "held_out"],
        [
            "--push_to_hub",
            "true",
            "--hub_model_id",
            "me/x",
            "--hub_token",
            "hf_secret",
            "--optim",
            "adamw_torch",
        ],
        [
            "--torch_compile",
            "true",
            "--include_num_input_tokens_seen",
            "true",
        ],
        ["--gradient_accumulation_steps", "2", "--per_device_train_batch_size", "2"],
    ],
    ids=lambda more: more[0] if more else "",
)
def test_settings_of_a_finished_run_give_the_same_job_again(more, read, tmp_path):
    job = read(*more)
    flat = dpotrainer.flat_settings(job)
    file = write_yaml(tmp_path / "settings.yaml", **flat, made_from={"pairs": "0"})
    assert "hf_secret" not in file.read_text()
    again = dpotrainer.read_settings(["--config", str(file)])
    assert dpotrainer.flat_settings(again) == flat
    for part, same in zip(job[:5], again[:5]):
        assert {**vars(part), "accelerator_config": 0, "distributed_state": 0} == {
            **vars(same),
            "accelerator_config": 0,
            "distributed_state": 0,
        }


def test_a_mixture_can_be_read_again(inputs, tmp_path):
    file = write_yaml(tmp_path / "my.yaml", datasets=[{"path": str(inputs[1]), "fraction": 0.5}])
    job = dpotrainer.read_settings(["--use_cpu", "--config", str(file)])
    again = write_yaml(tmp_path / "settings.yaml", **dpotrainer.flat_settings(job))
    assert dpotrainer.read_settings(["--config", str(again)]).mixture_args == job.mixture_args


# ------------------------------------------------------------------------------ every field of TRL
# By transformers, TRL, PEFT or this program; a field in neither list came with a new version.
HONOURED = set(
    """
    columns chat_strings eval_pairs global_batch_size share_prefixes reference
    ref_model_name_or_path early_stopping_patience sample_prompts merge dry_run overwrite
    dataset_name dataset_config dataset_train_split dataset_test_split datasets test_split_size
    model_name_or_path model_revision dtype attn_implementation lora_r lora_alpha lora_dropout
    lora_target_modules lora_target_parameters lora_modules_to_save use_rslora use_dora
    load_in_8bit load_in_4bit bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage
    output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate
    lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1
    adam_beta2 adam_epsilon optim_target_modules gradient_accumulation_steps max_grad_norm bf16
    fp16 tf32 activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing
    gradient_checkpointing_kwargs torch_compile torch_compile_backend torch_compile_mode
    torch_empty_cache_steps logging_strategy logging_steps logging_first_step log_on_each_node
    include_num_input_tokens_seen log_level log_level_replica disable_tqdm report_to run_name
    project trackio_space_id trackio_bucket_id trackio_static_space_id eval_strategy eval_steps
    eval_delay per_device_eval_batch_size eval_on_start eval_accumulation_steps save_strategy
    save_steps save_total_limit push_to_hub hub_token hub_private_repo hub_model_id hub_strategy
    hub_revision load_best_model_at_end metric_for_best_model greater_is_better
    restore_callback_states_from_checkpoint full_determinism seed data_seed use_cpu
    dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
    dataloader_prefetch_factor remove_unused_columns ddp_find_unused_parameters
    ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout
    skip_memory_metrics do_train do_eval resume_from_checkpoint local_rank router_aux_loss_coef
    disable_dropout dataset_num_proc max_length precompute_ref_log_probs
    precompute_ref_batch_size loss_type loss_weights ld_alpha f_divergence_type
    f_alpha_divergence_coef label_smoothing beta use_weighting discopop_tau
    activation_offloading pad_token
    """.split()
)


def test_every_setting_is_honoured_or_refused():
    names = [field.name for field in all_fields()]
    assert len(names) == len(set(names)), "two parts share a name"
    assert not HONOURED & dpotrainer.UNSUPPORTED.keys()
    assert HONOURED | dpotrainer.UNSUPPORTED.keys() == set(names)


OTHER_VALUES = {  # of settings that take no `true` in place of their default
    "accelerator_config": '{"split_batches": true}',
    "average_tokens_across_devices": "false",
    "dataloader_in_order": "false",
    "dataloader_multiprocessing_context": "fork",
    "debug": "underflow_overflow",
    "deepspeed": '{"zero_optimization": {"stage": 3}}',
    "eval_do_concat_batches": "false",
    "fsdp": "full_shard",
    "fsdp_config": '{"version": 2}',
    "include_for_metrics": "loss",
    "label_names": "labels",
    "label_smoothing_factor": "0.1",
    "length_column_name": "size",
    "lora_task_type": "SEQ_CLS",
    "model_init_kwargs": '{"a": 1}',
    "neftune_noise_alpha": "5",
    "pad_to_multiple_of": "8",
    "ref_model_mixup_alpha": "0.5",
    "ref_model_sync_steps": "8",
    "train_sampling_strategy": "group_by_length",
    "truncation_mode": "keep_end",
    "use_peft": "false",
}


@pytest.mark.parametrize("name", sorted(dpotrainer.UNSUPPORTED))
def test_what_would_be_ignored_is_refused_with_its_own_reason(name, tmp_path, refuse):
    if name in ("parallelism_config", "liger_kernel_config"):
        only(refuse("--config", write_yaml(tmp_path / "my.yaml", **{name: {"rope": True}})), name)
        return
    value = OTHER_VALUES.get(name, "true")
    only(
        refuse(f"--{name}={value}"),
        f"flag --{name}, {name}=",
        dpotrainer.UNSUPPORTED[name],
        "; leave it out",
    )


@pytest.mark.parametrize("name", sorted(dpotrainer.UNSUPPORTED))
def test_the_default_of_what_is_refused_may_be_written(name, tmp_path):
    values = {field.name: field.default for field in all_fields()} | dpotrainer.OUR_DEFAULTS
    default = [] if values[name] is dataclasses.MISSING else values[name]
    dpotrainer.read_settings(
        ["--use_cpu", "--config", str(write_yaml(tmp_path / "my.yaml", **{name: default}))]
    )


# ------------------------------------------------------------------------- values that are refused
OUT_OF_RANGE = {  # values: settings that refuse them
    ("0", "-0.1", "inf", "nan"): dpotrainer.ABOVE_ZERO[:6],
    ("0", "-1"): dpotrainer.ABOVE_ZERO[6:],
    ("-1",): ("eval_pairs", "sample_prompts", "seed", "data_seed"),
    ("-1", "inf", "nan"): ("warmup_steps", "max_grad_norm", "weight_decay"),
    ("0",): ("max_steps",),
    ("-0.1", "0.5", "nan"): ("label_smoothing",),
    ("-0.1", "1", "nan"): ("lora_dropout",),
    ("-0.1", "1.1", "nan"): ("ld_alpha",),
    ("0", "1", "-1"): ("save_total_limit",),
}


@pytest.mark.parametrize(
    "name, value",
    [(name, v) for values, names in OUT_OF_RANGE.items() for name in names for v in values],
)
def test_every_range_is_checked(name, value, refuse):
    lines = refuse(f"--{name}={value}", "--loss_type", "robust", "--disable_dropout", "false")
    assert lines[0].startswith(f"flag --{name}, {name}=") and len(lines) <= 2


CLASHES = [  # setting, flags that make it clash
    ("label_smoothing", ["--label_smoothing", "0.1"]),
    ("label_smoothing", ["--loss_type", "hinge", "ipo", "--label_smoothing", "0.1"]),
    ("discopop_tau", ["--discopop_tau", "0.1"]),
    ("f_alpha_divergence_coef", ["--f_alpha_divergence_coef", "0.1"]),
    (
        "gradient_checkpointing_kwargs",
        ["--gradient_checkpointing_kwargs", '{"use_reentrant": false}'],
    ),
    ("hub_model_id", ["--hub_model_id", "me/model"]),
    ("hub_private_repo", ["--hub_private_repo", "true"]),
    ("hub_revision", ["--hub_revision", "dev"]),
    ("hub_strategy", ["--push_to_hub", "--hub_strategy", "checkpoint"]),
    ("lora_dropout", ["--lora_dropout", "0.1"]),
    ("lora_dropout", ["--lora_dropout", "0.05"]),
    ("precompute_ref_batch_size", ["--precompute_ref_batch_size", "8"]),
    ("ref_model_name_or_path", ["--ref_model_name_or_path", "some/model"]),
    ("resume_from_checkpoint", ["--resume_from_checkpoint", "out/checkpoint-7"]),
    ("resume_from_checkpoint", ["--resume_from_checkpoint", "false"]),
    ("model_name_or_path", ["--model_name_or_path="]),
    ("dataset_name", ["--dataset_name="]),
    ("output_dir", ["--output_dir="]),
    ("output_dir", ["--output_dir=/dev/null/out"]),
]


@pytest.mark.parametrize(
    "name, words", CLASHES, ids=lambda x: " ".join(x) if isinstance(x, list) else ""
)
def test_settings_that_do_nothing_or_break_a_promise_are_refused(name, words, refuse):
    only(refuse(*words), f"{name}=")


@pytest.mark.parametrize("option", ["model_name_or_path", "dataset_name"])
def test_an_output_dir_that_holds_what_the_run_reads_is_refused(option, inputs, refuse, tmp_path):
    """To move it aside, as the advice is there, would move that away."""
    place = tmp_path / "work"
    (place / "inner").mkdir(parents=True)
    values = {"model_name_or_path": inputs[0], "dataset_name": inputs[1]}
    source = place / "inner" / values[option].name
    copy = shutil.copytree if values[option].is_dir() else shutil.copy
    copy(values[option], source)
    for folder in (place, place / "inner", *([source] if source.is_dir() else [])):
        lines = refuse(f"--{option}", source, "--output_dir", folder)
        only(lines, f"output_dir={folder}", f"holds {source}", "choose another")


def test_an_upload_that_cannot_be_is_told_before_anything_costs(refuse, read, monkeypatch):
    lines = refuse("--push_to_hub", "true", "--hub_model_id", "no good name")
    only(lines, "push_to_hub=True", "no good name", "`hf upload`")

    def refuse_token(self):
        raise OSError("no token found.")

    monkeypatch.setattr(huggingface_hub.HfApi, "whoami", refuse_token)
    lines = refuse("--push_to_hub", "true")
    only(lines, "push_to_hub=True: no token found; `hf auth login`", "`hf upload`")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(dpotrainer, "make_job", lambda draft: draft)  # no process group is made
    assert read("--push_to_hub", "true").values["push_to_hub"], "one process of a host asks"


def test_what_a_launcher_shards_cannot_be_precomputed(refuse, read, monkeypatch):
    assert read("--precompute_ref_log_probs", "true").training_args.precompute_ref_log_probs
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    only(refuse("--precompute_ref_log_probs", "true"), "precompute_ref_log_probs=True")


def test_what_is_idle_alone_is_taken_beside_what_it_needs(read):
    assert (
        read(
            "--loss_type", "sigmoid", "discopop", "--discopop_tau", "0.1"
        ).training_args.discopop_tau
        == 0.1
    )
    job = read(
        "--lora_dropout", "0.1", "--disable_dropout", "false", "--resume_from_checkpoint", "true"
    )
    assert job.model_args.lora_dropout == 0.1 and job.training_args.resume_from_checkpoint is None
    job = read(
        "--reference",
        "copy",
        "--ref_model_name_or_path",
        "some/model",
        "--push_to_hub",
        "--hub_strategy",
        "end",
    )
    assert job.settings.ref_model_name_or_path == "some/model" and job.training_args.push_to_hub


@pytest.mark.parametrize(
    "words, told",
    [
        (["--load_in_4bit", "true", "--load_in_8bit", "true"], "8 bit and 4 bit"),
        (["--loss_weights", "1", "2"], "loss_weights"),
        (["--bf16", "true", "--fp16", "true"], "fp16 and bf16"),
        (["--logging_steps", "2.5"], "logging_steps"),
        (["--torch_empty_cache_steps", "0"], "torch_empty_cache_steps"),
    ],
)
def test_what_a_library_refuses_is_a_mistake_of_the_settings(words, told, refuse, monkeypatch):
    monkeypatch.setattr(dpotrainer, "find_spec", lambda name: name)
    only(refuse(*words), "settings: ", told)


@pytest.mark.parametrize("name", ["model_name_or_path", "dataset_name", "ref_model_name_or_path"])
@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "~/nowhere", "two/folders/deep"])
def test_paths_that_do_not_exist_are_refused(name, path, refuse, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    only(refuse(f"--{name}={path}", "--reference", "copy"), f"{name}={os.path.expanduser(path)}: ")


def test_a_data_file_that_does_not_exist_is_refused(refuse):
    only(refuse("--dataset_name", "pairs.jsonl"), "dataset_name=pairs.jsonl: ")


def test_the_home_folder_is_meant_by_a_tilde(tmp_path, monkeypatch, read):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    job = read("--output_dir=~/out", "--model_name_or_path=~/model")
    assert (
        job.training_args.output_dir == f"{tmp_path}/out"
        and job.model_args.model_name_or_path == f"{tmp_path}/model"
    )


def test_an_output_dir_that_is_or_lies_under_a_file_is_refused(inputs, refuse):
    for path in (inputs[1], inputs[1] / "deeper" / "still"):
        only(
            refuse("--output_dir", path), f"output_dir={path}: ", "not a folder that can be written"
        )


def test_an_output_dir_without_the_right_to_write_is_refused(refuse, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    only(refuse(), f"output_dir={tmp_path / 'out'}: ")


@pytest.mark.parametrize(
    "words",
    [
        ["--hub_token", "hf_a", "hf_b"],
        ["--hub_tokn=hf_b"],
        ["--hub_tokn", "hf_b"],
        ["--hub_token", "hf_b", "--beta=0"],
    ],
)
def test_a_token_is_in_no_message(words, refuse, tmp_path):
    assert "hf_" not in "".join(refuse(*words))
    only(refuse("--config", write_yaml(tmp_path / "my.yaml", hub_token=["hf_a"])), "hub_token=...")
    file = tmp_path / "my.yaml"
    file.write_text("hub_token: hf_a: 3\n")
    assert "hf_" not in "".join(refuse("--config", file))


def test_a_token_is_where_the_hub_looks_for_it_and_nowhere_else(read):
    job = read("--hub_token", "hf_b", "--push_to_hub")
    assert os.environ["HF_TOKEN"] == "hf_b" and "hf_b" not in repr(job)


# --------------------------------------------------------------------------------------- the batch
@pytest.mark.parametrize("world, accumulation", [(1, 16), (2, 8), (8, 2)])
def test_accumulation_follows_from_the_global_batch(world, accumulation, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    draft = dpotrainer.Draft()
    draft.values |= {"global_batch_size": 64, "per_device_train_batch_size": 4}
    dpotrainer.derive_batch(draft)
    assert draft.problems == [] and draft.values["gradient_accumulation_steps"] == accumulation
    assert draft.values["per_device_eval_batch_size"] == 4


def test_accumulation_takes_the_place_of_the_constant_alone(inputs, tmp_path, refuse):
    words = [
        "--use_cpu",
        "--per_device_train_batch_size",
        "2",
        "--gradient_accumulation_steps",
        "3",
    ]
    job = dpotrainer.read_settings(words)
    assert (job.training_args.gradient_accumulation_steps, job.settings.global_batch_size) == (3, 6)
    told = "is not 2 per device x 3 accumulation x 1 processes"
    only(refuse(*words, "--global_batch_size", "8", good=[]), "global_batch_size=8: ", told)
    only(
        refuse(*words, "--config", write_yaml(tmp_path / "my.yaml", global_batch_size=8), good=[]),
        told,
    )
    program = edit_constants(tmp_path, BETA="BETA = 0.1\nGRADIENT_ACCUMULATION_STEPS = 3")
    only(
        refuse("--use_cpu", program=program, good=[]),
        "constant GLOBAL_BATCH_SIZE",
        "4 per device x 3 accumulation",
    )
    assert (
        dpotrainer.read_settings([*words, "--global_batch_size", "6"]).settings.global_batch_size
        == 6
    )


def test_a_batch_that_does_not_divide_names_what_does(refuse, monkeypatch):
    only(
        refuse("--global_batch_size", "64", "--per_device_train_batch_size", "6"),
        "global_batch_size=64",
        "per_device_train_batch_size of 1, 2, 4, 8, 16, 32, 64",
    )
    monkeypatch.setenv("WORLD_SIZE", "8")
    only(
        refuse("--global_batch_size", "64", "--per_device_train_batch_size", "3"),
        "8 processes",
        "of 1, 2, 4, 8",
    )
    only(refuse("--global_batch_size", "4"), "a multiple of 8")


# -------------------------------------------------------------------------- what gives way to what
def test_fp16_alone_takes_the_place_of_the_constant(refuse):
    job = dpotrainer.read_settings(["--use_cpu", "--fp16", "true"])
    assert (
        job.training_args.fp16
        and not job.training_args.bf16
        and job.training_args.mixed_precision == "fp16"
    )


def test_fp16_among_the_constants_takes_no_place(tmp_path, refuse):
    program = edit_constants(tmp_path, BF16="BF16 = True\nFP16 = True")
    only(refuse(program=program, good=["--use_cpu"]), "fp16 and bf16")


def test_bf16_false_wins_over_the_launcher(read, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert read("--bf16", "true").training_args.mixed_precision == "bf16"
    assert read("--bf16", "false").training_args.mixed_precision == "no"


def test_the_second_name_of_checkpointing(tmp_path):
    file = write_yaml(tmp_path / "my.yaml", activation_checkpointing=False)
    for words, expected in (
        (["--config", str(file)], False),
        (["--config", str(file), "--gradient_checkpointing", "true"], True),
        (["--activation_checkpointing", "false"], False),
    ):
        args = dpotrainer.read_settings(["--use_cpu", *words]).training_args
        assert args.gradient_checkpointing == args.activation_checkpointing == expected


def test_early_stopping_keeps_the_best(read):
    args = read("--early_stopping_patience", "3").training_args
    assert (
        args.load_best_model_at_end
        and args.metric_for_best_model == "loss"
        and not args.greater_is_better
    )
    args = read(
        "--early_stopping_patience", "3", "--metric_for_best_model", "rewards/margins"
    ).training_args
    assert args.metric_for_best_model == "rewards/margins" and args.greater_is_better


def test_several_trackers_are_a_list_in_yaml_and_words_on_the_command_line(tmp_path, monkeypatch):
    installed = ["tensorboard", "trackio"]
    monkeypatch.setattr(dpotrainer, "get_available_reporting_integrations", lambda: installed)
    file = write_yaml(tmp_path / "my.yaml", report_to=installed)
    for words in (["--config", str(file)], ["--report_to", *installed]):
        assert dpotrainer.read_settings(["--use_cpu", *words]).training_args.report_to == installed


# ------------------------------------------------------------------------------------- the machine
def test_no_gpu_is_a_mistake_of_a_run_and_a_remark_of_a_dry_run(refuse, read, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("PATH", "")
    only(refuse("--use_cpu", "false"), "no CUDA GPU for torch", "--config configs/quickstart.yaml")
    job = read("--use_cpu", "false", "--dry_run", "true", "--bf16", "true")
    assert job.missing_gpu.startswith("no CUDA GPU for torch") and job.training_args.use_cpu
    # transformers would refuse it on a CPU
    assert read("--use_cpu", "false", "--dry_run", "true", "--tf32", "true").missing_gpu
    assert read("--dry_run", "true").missing_gpu == ""
    lines = refuse("--use_cpu", "false", "--dry_run", "true", "--beta", "0")
    only(lines, "beta=0")


def test_why_there_is_no_gpu_is_told_in_the_words_of_torch(refuse, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def fail():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12020).")

    monkeypatch.setattr(torch.cuda, "init", fail)
    only(
        refuse("--use_cpu", "false"),
        f"torch {torch.__version__}: The NVIDIA driver on your system is too old (found version",
        "--index-url https://download.pytorch.org/whl/cu126",
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    only(refuse("--use_cpu", "false"), ": CUDA_VISIBLE_DEVICES hides them; `python dpotrainer.py")


def pretend_cuda(monkeypatch, gpus=1, bf16=True):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: bf16 or including_emulation,
    )


def test_bf16_on_a_gpu_without_it_is_refused(refuse, monkeypatch):
    pretend_cuda(monkeypatch, bf16=False)
    only(
        refuse("--use_cpu", "false", "--bf16", "true"),
        "bf16=True: needs an Ampere GPU",
        "--fp16 true",
    )


@pytest.mark.parametrize("dry_run", ["false", "true"])
def test_several_gpus_but_one_process_is_refused(refuse, monkeypatch, dry_run):
    pretend_cuda(monkeypatch, gpus=4)
    only(
        refuse("--use_cpu", "false", "--dry_run", dry_run),
        "several GPUs but one process",
        "accelerate launch --config_file configs/accelerate/ddp.yaml",
    )


@pytest.mark.parametrize(
    "words, package",
    [
        (["--report_to", "wandb"], "wandb"),
        (["--report_to", "all", "trackio"], "trackio"),
        (["--load_in_4bit", "true"], "bitsandbytes"),
        (["--load_in_8bit", "true"], "bitsandbytes"),
        (["--optim", "paged_adamw_8bit"], "bitsandbytes"),
        (["--optim", "lion_32bit"], "bitsandbytes"),
    ],
)
def test_a_missing_optional_package_is_named(words, package, refuse, monkeypatch):
    monkeypatch.setattr(dpotrainer, "find_spec", lambda name: None)
    monkeypatch.setattr(dpotrainer, "get_available_reporting_integrations", list)
    only(refuse(*words), f"`pip install {package}`")


def test_a_tracker_that_there_is_not_is_not_to_be_installed(refuse):
    """Whatever may be in the index under a misspelt name."""
    only(refuse("--report_to", "tensorbord"), "tensorbord is none of ", "tensorboard, ")


def test_adam_of_torchao_does_not_ask_for_bitsandbytes(read, monkeypatch):
    monkeypatch.setattr(dpotrainer, "find_spec", lambda name: None)
    assert read("--optim", "adamw_torch_8bit").training_args.optim == "adamw_torch_8bit"


def test_only_pins_of_the_file_beside_are_compared(tmp_path, capsys):
    (tmp_path / "requirements.txt").write_text(
        "# my project\nnumpy>=1.20\ntorch\n--hash==1\nyaml == 3\ndatasets==0.1\n"
    )
    program = edit_constants(tmp_path)
    program.tell_other_versions()
    told = capsys.readouterr().out
    assert told.startswith("! datasets ") and told.count("(tested: ") == 1


def test_a_library_of_another_version_is_told_in_one_line(read, monkeypatch, capsys):
    read()
    assert capsys.readouterr().out == "", "the pins are what is installed"
    real = dpotrainer.importlib.metadata.version
    monkeypatch.setattr(
        dpotrainer.importlib.metadata,
        "version",
        lambda name: "4.57.1" if name == "transformers" else real(name),
    )
    read()
    told = capsys.readouterr().out
    pinned = re.search(r"transformers==(\S+)", (tiny.ROOT / "requirements.txt").read_text())[1]
    assert (
        told.startswith(f"! transformers 4.57.1 (tested: {pinned}); `pip install -r ")
        and told.count("\n") == 1
    )


# ----------------------------------------------------------------------- all at once, in a process
def test_all_problems_come_in_one_message(tmp_path, refuse):
    program = edit_constants(tmp_path, LORA_R="LORA_R = 0", SEED="SEEED = 1")
    file = write_yaml(tmp_path / "my.yaml", learning_rte=1, max_length="long", label_smoothing=0.1)
    words = [
        "--use_cpu",
        "--bet",
        "0.2",
        "--dataset_name",
        "./none",
        "--trust_remote_code",
        "true",
        "--num_train_epochs=-1",
    ]
    lines = refuse("--config", file, *words, program=program, good=[])
    for said in (
        "constant LORA_R, lora_r=0",
        "constant SEEED, seeed",
        "constant SEED: is missing",
        "my.yaml, learning_rte",
        "my.yaml, max_length=long",
        "my.yaml, label_smoothing=0.1",
        "flag --bet",
        "dataset_name=./none",
        "trust_remote_code=True",
        "num_train_epochs=-1.0",
    ):
        assert sum(said in line for line in lines) == 1, said
    assert len(lines) == 10


def test_the_command_ends_with_status_2_and_the_help_with_0(tmp_path):
    ended = tiny.run_program(["--beta", "-1", "--use_cpu"], cwd=tmp_path)
    assert ended.returncode == 2 and ended.stdout == "" and "Traceback" not in ended.stderr
    assert "dpotrainer: flag --beta, beta=-1.0: must be above 0\n" in ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_is_asked_for_when_it_is_used_is_no_traceback(inputs, tmp_path, capsys):
    flags = tiny.settings(*inputs, tmp_path / "out", optim="schedule_free_adamw")
    assert dpotrainer.run(flags) == 2
    said = capsys.readouterr().err
    assert "dpotrainer: You need to install `schedulefree`" in said and "Traceback" not in said


def test_help_is_a_page_with_the_constants_and_what_is_ours(capsys):
    with pytest.raises(SystemExit) as ended:
        dpotrainer.read_settings(["--help"])
    assert ended.value.code == 0
    page = capsys.readouterr().out
    assert page.count("\n") < 70 and max(map(len, page.partition("Constants")[2].splitlines())) < 80
    for constant, value in dpotrainer.CONSTANTS.items():
        assert f"  {constant} " in page and f" {value}\n" in page
    for field in dataclasses.fields(dpotrainer.Settings):
        assert f"--{field.name} " in page


def test_help_all_has_every_setting_and_what_it_is_without_flags(capsys):
    with pytest.raises(SystemExit):
        dpotrainer.read_settings(["--help", "all"])
    page = capsys.readouterr().out
    lines = " ".join(page.split())
    assert f"(default: {dpotrainer.LEARNING_RATE})" in lines.rpartition("--learning_rate ")[2][:400]
    assert f"(default: {dpotrainer.EVAL_PAIRS})" in lines.rpartition("--eval_pairs ")[2][:400]
    for field in all_fields():
        assert f"--{field.name}" in page


# -------------------------------------------------------------------------------- the files beside
YAMLS = sorted((tiny.ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.name)
def test_every_config_holds_valid_settings(path, monkeypatch):
    monkeypatch.chdir(tiny.ROOT)
    monkeypatch.setattr(dpotrainer, "find_spec", lambda name: name)
    dpotrainer.read_settings(["--use_cpu", "--config", str(path)])


@pytest.mark.parametrize(
    "path", sorted((tiny.ROOT / "configs/accelerate").glob("*.yaml")), ids=lambda path: path.name
)
def test_every_accelerate_config_is_one(path):
    config = load_config_from_file(str(path))
    header = path.read_text(encoding="utf-8").split("\ncompute_environment")[0]
    assert config.num_processes >= 1 and config.mixed_precision in ("no", "bf16", "fp16")
    assert (
        f"accelerate launch --config_file configs/accelerate/{path.name}" in header
        and "Tested" in header
    )


def test_settings_of_our_own_have_the_defaults_of_the_design(tmp_path):
    settings = dpotrainer.read_settings(["--use_cpu", "--output_dir", str(tmp_path)]).settings
    assert (settings.global_batch_size, settings.eval_pairs, settings.sample_prompts) == (
        64,
        500,
        8,
    )
    assert settings.share_prefixes and settings.reference == "auto" and settings.columns is None
    assert not (settings.merge or settings.dry_run or settings.overwrite or settings.chat_strings)
