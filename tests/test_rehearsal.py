"""The rehearsal: what would fail later fails in the dry run, by name; what would run passes."""

import errno
import functools
import gc
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from matplotlib.figure import Figure
from peft import LoraConfig
from transformers import CONFIG_MAPPING

import dpotrainer

gc.freeze()  # the collections of each run then skip the libraries


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **options: Path(path).touch())


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.make_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.make_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", 24)


@pytest.fixture
def rehearse(base, data, tmp_path, capsys):
    """rehearse(status=0, model=..., **settings) -> what a dry run prints, with its errors."""

    def run(status: int = 0, model: Path = base, **changes) -> str:
        capsys.readouterr()
        changes = {"sample_prompts": 2, "dry_run": True} | changes
        folder = tmp_path / "work"
        folder.mkdir(exist_ok=True)
        ended = dpotrainer.run(tiny.settings(model, data, folder / "out", **changes))
        printed = "".join(capsys.readouterr())
        assert ended == status, printed
        assert not list(folder.iterdir()), "a dry run leaves nothing"
        return printed

    return run


def make_config(kind: str, folder: Path, **changes) -> Path:
    """A configuration of full size and a tokenizer: all that a dry run reads of a model."""
    tokenizer = tiny.make_tokenizer()
    special = {
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = CONFIG_MAPPING[kind](**{"vocab_size": len(tokenizer)} | special | changes)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


FAULTS = {  # settings that pass every check of their own, and what the refusal must name
    "divergence": ({"f_divergence_type": "kl"}, "f_divergence_type"),
    "divergence and loss": (
        {"f_divergence_type": "js_divergence", "loss_type": "nca_pair"},
        "f_divergence_type",
    ),
    "weighting and aot": ({"use_weighting": True, "loss_type": "aot"}, "use_weighting"),
    "weighting and sft": ({"use_weighting": True, "loss_type": "sft"}, "use_weighting"),
    "router of a dense model": ({"router_aux_loss_coef": 0.1}, "router_aux_loss_coef"),
    "attention": ({"attn_implementation": "foo"}, "attn_implementation"),
    "adapter on the head": ({"lora_target_modules": ["lm_head"]}, "lora_target_modules"),
    "adapter nowhere": ({"lora_target_modules": ["nothing"]}, "nothing"),
    "Adam": ({"adam_beta1": 2}, "adam_beta1"),
    "GaLore": ({"optim": "galore_adamw"}, "optim"),
    "workers": ({"dataloader_num_workers": -1}, "dataloader_num_workers"),
    "minimum of the schedule": (
        {"lr_scheduler_type": "cosine_with_min_lr"},
        "lr_scheduler_kwargs",
    ),
    "decay of the schedule": ({"lr_scheduler_type": "warmup_stable_decay"}, "lr_scheduler_type"),
    "unknown argument of the schedule": (
        {"lr_scheduler_kwargs": '{"nothing": 1}'},
        "lr_scheduler_kwargs",
    ),
    "unknown argument of checkpointing": (
        {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": '{"every_n_layers": 2}',
        },
        "gradient_checkpointing_kwargs",
    ),
    "offloading without a GPU": ({"activation_offloading": True}, "activation_offloading"),
    "debugging": ({"debug": "underflow_overflow"}, "debug"),
    "loss": ({"loss_type": "nothing"}, "loss_type"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_would_fail_later_is_refused_by_name(name, rehearse):
    changes, setting = FAULTS[name]
    printed = rehearse(status=2, **changes)
    told = printed[printed.index("dpotrainer: ") :]
    assert setting in told and "Traceback" not in printed
    assert "rehearsed " not in printed


def test_a_module_to_save_that_there_is_not_is_refused(rehearse, monkeypatch):
    told = "dpotrainer: lora_modules_to_save=no_such_head: the model has no such module\n"
    assert told in rehearse(status=2, lora_modules_to_save="no_such_head")
    monkeypatch.setenv("RANK", "1")  # no process goes on alone, to wait for one that has ended
    rehearse(status=2, lora_modules_to_save="no_such_head")
    monkeypatch.delenv("RANK")
    assert "rehearsed  in" in rehearse(lora_modules_to_save="lm_head")


def test_one_setting_is_named_where_a_message_has_its_name_or_value(rehearse):
    for changes, meant in (
        ({"adam_beta1": 2}, "flag --adam_beta1 (2.0)"),  # "Invalid beta parameter ...: 2.0"
        ({"dataloader_num_workers": -1}, "flag --dataloader_num_workers (-1)"),  # "num_workers"
    ):
        assert rehearse(status=2, **changes).endswith(f"\n  it may mean {meant}\n")


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_checkpointing": True},
        {"bf16": True, "dtype": "bfloat16"},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
        {"loss_type": "aot", "per_device_train_batch_size": 2},
        {"early_stopping_patience": 2},
        {"precompute_ref_log_probs": True, "reference": "copy"},
        {"save_strategy": "no"},
        {"save_strategy": "epoch", "eval_strategy": "epoch", "eval_delay": 1},
        {"eval_strategy": "no", "eval_pairs": 0},
        {"lr_scheduler_type": "reduce_lr_on_plateau"},
        {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 2},
        {"share_prefixes": False, "max_steps": 3, "merge": True},
    ],
    ids=str,
)
def test_what_would_run_is_rehearsed(changes, rehearse):
    printed = " ".join(rehearse(**changes).split())
    assert "rehearsed in " in printed
    assert ("merging" in printed) == ("merge" in changes)
    assert ("checkpoint, resume" in printed) == (changes.get("save_strategy") != "no")
    assert ("evaluation, " in printed) == (changes.get("eval_strategy") != "no")


def test_every_part_of_a_run_is_called_and_resumed(rehearse, monkeypatch):
    calls = []

    def record(name):
        function = getattr(dpotrainer, name)

        @functools.wraps(function)
        def recorded(*args, **kwargs):
            result = function(*args, **kwargs)
            calls.append((name, args, result))
            return result

        monkeypatch.setattr(dpotrainer, name, recorded)

    once = ("load_start", "save_adapter", "show_samples", "save_report", "merge_adapter")
    for name in (*once, "build_trainer", "train_policy"):
        record(name)
    rehearse(merge=True, eval_delay=5)
    names = [name for name, *_ in calls]
    assert [names.count(name) for name in once] == [2, 1, 1, 1, 1]  # the start: of plan, and small
    assert names.count("build_trainer") == names.count("train_policy") == 2
    first, second = [(args[0], report) for name, args, report in calls if name == "train_policy"]
    assert first[1].steps_before == 0 and second[1].steps_before == 1
    for trainer, _ in (first, second):
        assert trainer.state.global_step == 2
        assert any("eval_loss" in row for row in trainer.state.log_history)
        assert trainer.args.gradient_accumulation_steps == 2


@pytest.mark.parametrize("rounded", [False, True])
def test_a_saved_adapter_that_is_lost_is_refused(rounded, rehearse, monkeypatch):
    """As a fresh one it does nothing, and two steps of a usual learning rate hardly do more."""
    save = dpotrainer.save_adapter

    def save_a_fresh_one(trainer):
        trained = {}
        for name, weight in trainer.model.named_parameters():
            if "lora_B" in name:
                trained[name] = weight.data
                weight.data = torch.zeros_like(weight)
        save(trainer)
        for name, weight in trained.items():
            trainer.model.get_parameter(name).data = weight

    monkeypatch.setattr(dpotrainer, "save_adapter", save_a_fresh_one)
    dtype = "bfloat16" if rounded else "float32"
    printed = rehearse(status=2, learning_rate=5e-6, bf16=rounded, dtype=dtype)
    assert "the saved adapter's log-probs are" in printed


def test_lora_on_tied_embeddings_is_not_merged(rehearse):
    """At a usual learning rate, too: the run would find it out at its end."""
    modules = ["embed_tokens", "q_proj"]
    printed = rehearse(status=2, merge=True, lora_target_modules=modules, learning_rate=5e-6)
    assert "its rehearsal does in merge_adapter: merge=true: the merged model's" in printed
    rehearse(lora_target_modules=modules, learning_rate=5e-6)


def test_what_was_saved_is_loaded_as_the_run_loads_it(rehearse, monkeypatch):
    """A quantised base is another one than before: here all weights are rounded to quarters."""
    load = dpotrainer.load_causal_lm

    def load_rounded(*args, **options):
        model = load(*args, **options)
        for weight in model.parameters():
            weight.data = (4 * weight.data).round() / 4
        return model

    monkeypatch.setattr(dpotrainer, "load_causal_lm", load_rounded)
    assert "rehearsed  in " in rehearse(share_prefixes=False)


def test_a_failure_names_where_it_came_and_a_signal_keeps_its_status(rehearse, monkeypatch):
    def fail(*args):
        raise ZeroDivisionError("of a library")

    monkeypatch.setattr(dpotrainer, "make_generation_config", fail)
    told = "its rehearsal does in show_samples: ZeroDivisionError: of a library"
    assert told in rehearse(status=2)

    def stop(*args):
        raise dpotrainer.UserError("saved at step 1", status=143)

    monkeypatch.setattr(dpotrainer, "train_policy", stop)
    printed = rehearse(status=143)
    assert "the rehearsal was interrupted" in printed and "would fail" not in printed


def test_a_full_disk_is_no_odd_architecture(rehearse, monkeypatch):
    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(dpotrainer, "make_room", fail)
    assert "make room and run the same command again" in rehearse(status=1, share_prefixes=False)


def test_an_architecture_that_cannot_be_made_small_is_told(rehearse, monkeypatch):
    def fail(config):
        raise ValueError("an odd one")

    monkeypatch.setattr(dpotrainer, "make_miniature", fail)
    assert "! not rehearsed: an odd one" in rehearse(share_prefixes=False)


def test_an_adapter_in_layers_that_a_miniature_lacks_is_no_mistake(rehearse, tmp_path):
    model = make_config("qwen3", tmp_path / "model", num_hidden_layers=6)
    printed = rehearse(model=model, lora_target_modules=[r".*\.layers\.5\..*q_proj"])
    assert "! not rehearsed: " in printed


def test_generation_settings_that_fail_are_shown(rehearse, monkeypatch):
    def fail(*args):
        raise ValueError("no such cache")

    monkeypatch.setattr(dpotrainer, "generate_answers", fail)
    printed = rehearse()
    assert re.search(r"^! no samples.*no such cache", printed, re.MULTILINE)


@pytest.mark.parametrize("reference", ["auto", "copy", "adapter"])
def test_an_sft_adapter_is_rehearsed_from_its_configuration(reference, rehearse, tmp_path):
    """Neither its weights nor its base's are there."""
    base = make_config("qwen3", tmp_path / "base", num_hidden_layers=3)
    lora = LoraConfig(r=3, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    lora.base_model_name_or_path = str(base)
    lora.save_pretrained(tmp_path / "sft")
    tiny.make_tokenizer().save_pretrained(tmp_path / "sft")
    printed = rehearse(model=tmp_path / "sft", reference=reference)
    assert "rehearsed  in " in printed and "rank 3" in printed


KINDS = {
    "gpt2": {},
    "gemma3_text": {"num_hidden_layers": 6},  # windows in five layers of six
    "qwen3_moe": {"num_hidden_layers": 4},
    "bamba": {"num_hidden_layers": 4, "attn_layer_indices": [2]},  # linear attention
}
MORE_KINDS = {
    "gemma2": {},  # windows and soft-capping
    "mistral": {"sliding_window": 64},
    "deepseek_v3": {"num_hidden_layers": 6},
    "qwen3_next": {"num_hidden_layers": 8},  # linear attention and experts
    "gpt_oss": {},  # sinks
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_models_are_rehearsed(kind, rehearse, tmp_path):
    printed = rehearse(model=make_config(kind, tmp_path / "model", **KINDS[kind]))
    assert "rehearsed  in " in printed


@pytest.mark.slow
@pytest.mark.parametrize("kind", MORE_KINDS)
def test_more_kinds_of_models_are_rehearsed(kind, rehearse, tmp_path):
    printed = rehearse(model=make_config(kind, tmp_path / "model", **MORE_KINDS[kind]))
    assert "rehearsed  in " in printed


def test_what_a_gpu_alone_can_do_is_left_out_without_one(rehearse, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    printed = rehearse(
        use_cpu=False, dtype="float16", fp16=True, activation_offloading=True, torch_compile=True
    )
    assert "without a GPU not its kernels, fp16" in " ".join(printed.split())
    assert "; without torch_compile" in " ".join(printed.split())
    assert "without torch_compile" in " ".join(rehearse(torch_compile=True).split())
    for dtype in ("bfloat16", "float32"):
        assert "rehearsed  in " in rehearse(use_cpu=False, dtype=dtype, bf16=True)
    printed = rehearse(use_cpu=False, attn_implementation="flash_attention_2")
    assert "rehearsed  in " in printed and "torch_compile" not in printed


@pytest.mark.slow
def test_a_model_of_8_billion_weights_is_rehearsed_in_half_a_minute(rehearse, tmp_path):
    """The shape of Qwen3-8B, whose vocabulary is what a CPU takes its time for."""
    shape = {
        "vocab_size": 151_936,
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
    model = make_config("qwen3", tmp_path / "model", **shape)
    began_at = time.process_time()
    printed = rehearse(model=model, dtype="bfloat16", bf16=True)
    assert time.process_time() - began_at < 45  # of one thread, with the plan
    assert "rehearsed  in " in printed


@pytest.mark.slow
def test_processes_rehearse_together(base, data, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    work = tmp_path / "work"
    work.mkdir()
    for changes, status in (({}, 0), ({"adam_beta1": 2}, 1)):  # the launcher's status is 1
        flags = tiny.settings(
            base, data, work / "out", dry_run=True, per_device_train_batch_size=2, **changes
        )
        done = subprocess.run(
            [*launcher, "--nproc_per_node", "2", tiny.PROGRAM, *flags],
            env=tiny.environment(),
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == status, done.stderr
        assert done.stdout.count("rehearsed  in ") == (status == 0)
        assert ("it may mean flag --adam_beta1" in done.stderr) == (status == 1)
        assert not list(work.iterdir())
