"""What README and configurations say is what the program does: names, defaults, files and code."""

import ast
import dataclasses
import json
import re
from pathlib import Path

import pytest
import real_model
import tiny
import yaml

import dpotrainer

README = (tiny.ROOT / "README.md").read_text(encoding="utf-8")
NAMES = {*dpotrainer.HINTS, "config", "help"}
OF_OTHERS = {  # flags of accelerate, pip, vllm, llama.cpp, hf, sbatch, the benchmark
    *("config_file", "machine_rank", "main_process_ip", "signal", "device", "pairs", "tokenizer"),
    *("per_device", "keep_memory", "enable-lora", "max-lora-rank", "lora-modules", "outtype"),
    *("outfile", "exclude", "no-deps"),
}


def section(title):
    return README.split(f"## {title}\n")[1].split("\n## ")[0]


def code(title, language="python"):
    """The first block of a section in a language."""
    return re.search(rf"```{language}\n(.*?)```", section(title), flags=re.DOTALL)[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.make_model(tmp_path_factory.mktemp("model"))


def read(model, *flags):
    """The settings that flags make, on a machine without a GPU."""
    anywhere = ["--model_name_or_path", model, "--use_cpu", "true", "--bf16", "false"]
    return dpotrainer.read_settings([str(flag) for flag in [*flags, *anywhere]])


def test_files_that_the_readme_names_exist():
    named = set(re.findall(r"(?:configs|tests)/[\w./-]*[\w]", README))
    assert len(named) > 8
    assert not [name for name in named if not (tiny.ROOT / name).exists()]


def test_flags_and_settings_that_the_readme_names_exist():
    flags = set(re.findall(r"--([a-z][\w-]+)", README)) - OF_OTHERS
    assert {"config", "beta", "dry_run", "merge"} <= flags
    assert not flags - NAMES
    settings = re.findall(r"`(\w+): [^`]+`", README)
    assert settings and not set(settings) - NAMES


def test_own_settings_are_in_the_readme_with_their_defaults(model):
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", section("Changing a setting"), flags=re.M)
    table = dict(rows)
    job = read(model, "--per_device_train_batch_size", "4")
    assert set(table) == {field.name for field in dataclasses.fields(dpotrainer.Settings)}
    for name, shown in table.items():
        default = getattr(job.settings, name)
        expected = {True: "true", False: "false", None: "none"}.get(default, str(default))
        assert shown.strip().strip("`") == expected, name


def test_the_lora_configuration_says_what_the_constants_say():
    text = (tiny.ROOT / "configs/qwen3_8b_lora.yaml").read_text(encoding="utf-8")
    constants = dpotrainer.CONSTANTS.items()
    assert yaml.safe_load(text) == {dpotrainer.CONSTANT_NAMES[name]: v for name, v in constants}


@pytest.mark.parametrize(
    "path", sorted((tiny.ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name
)
def test_every_configuration_has_a_header_and_no_problem_of_its_own(path, model, monkeypatch):
    monkeypatch.chdir(tiny.ROOT)
    monkeypatch.setattr(dpotrainer, "check_packages", lambda draft: None)  # bitsandbytes
    assert path.read_text(encoding="utf-8").startswith("# "), "a header says what for"
    read(model, "--config", path)


def test_the_second_step_is_rehearsed_with_a_model_and_pairs_at_hand(model, tmp_path):
    """configs/smollm2_135m.yaml as it is, but for what it takes from the hub."""
    tiny.make_pairs(tmp_path / "pairs" / "train.jsonl", 40)
    values = yaml.safe_load((tiny.ROOT / "configs/smollm2_135m.yaml").read_text(encoding="utf-8"))
    values["model_name_or_path"] = str(model)
    values["datasets"][0]["path"] = str(tmp_path / "pairs")
    values["output_dir"] = str(tmp_path / "out")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    assert dpotrainer.run(["--config", str(tmp_path / "mine.yaml"), "--dry_run", "true"]) == 0


def test_sections_of_the_file_are_those_of_the_readme_and_of_the_docstring():
    source = tiny.PROGRAM.read_text(encoding="utf-8")
    rulers = re.findall(r"^# -{40,} ([a-z ]+)(?:: edit these)?$", source, flags=re.M)
    rulers.remove("end of edits")
    assert re.findall(r"^\| ([a-z ]+) \|", section("The file"), flags=re.M) == rulers
    order = " ".join(dpotrainer.__doc__.split("In reading order: ")[1].split())
    assert [name for name in order.rstrip(".").split(", ") if name != "main"] == rulers


def test_the_two_commands_are_one_line_each_and_ci_runs_the_second():
    commands = re.findall(r"^python -m venv.*$", README, flags=re.M)
    assert len(commands) == 2
    assert commands[0].endswith("python dpotrainer.py --config configs/quickstart.yaml")
    assert commands[1].endswith('python -m pytest -m "not slow and not cuda"')
    script = (tiny.ROOT / ".ci/run").read_text(encoding="utf-8")
    assert 'python -m pytest -m "not slow and not cuda"' in script


def test_readme_and_ci_fetch_the_real_model_of_the_tests():
    script = (tiny.ROOT / ".ci/run").read_text(encoding="utf-8")
    for command in real_model.COMMAND.split(" && "):
        assert command.removeprefix("pip install ") in script
    assert real_model.COMMAND in README


def test_each_metric_of_the_log_is_explained():
    text = section("Reading the metrics")
    metrics = [*dpotrainer.COLUMNS, "step", "learning_rate", "pairs/s"]
    metrics += ["rewards/accuracies_low", "rewards/accuracies_high"]
    metrics += ["nats_per_token/chosen", "nats_per_token/rejected"]
    for name in metrics:
        assert f"`{name}`" in text, name


def test_python_code_can_be_parsed():
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 3
    for block in blocks:
        ast.parse(block)


def test_the_code_that_compares_runs_prints_what_does_not_grow_with_beta(
    tmp_path, monkeypatch, capsys
):
    """Two runs with the same log-probs: rewards differ by beta, the printed figures do not."""
    for beta in (0.05, 0.5):
        folder = tmp_path / f"beta-{beta}"
        folder.mkdir()
        row = {
            "step": 100,
            "eval_loss": 0.6,
            "eval_rewards/margins": 12 * beta,
            "eval_rewards/accuracies": 0.75,
            "eval_rewards/accuracies_low": 0.71,
            "eval_rewards/accuracies_high": 0.79,
            "eval_nats_per_token/chosen": -0.25,
            "eval_nats_per_token/rejected": -0.5,
        }
        rows = [
            {"step": 100, "loss": 0.5},
            row,
            {"step": 110, "loss": 0.5},
            {"step": 110, "advice": {"flat": "!"}},
        ]
        lines = [json.dumps(row) + "\n" for row in rows]
        (folder / "metrics.jsonl").write_text("".join(lines))
    monkeypatch.chdir(tmp_path)
    exec(compile(code("Comparing runs"), "README.md", "exec"), {})
    head, *printed = capsys.readouterr().out.splitlines()
    assert "margin in nats" in head and "rewards/accuracies_low" in head
    assert [line.split()[0] for line in printed] == ["beta-0.05", "beta-0.5"]
    assert (
        printed[0].split()[1:]
        == printed[1].split()[1:]
        == ["12.0", "0.75", "0.71", "0.79", "-0.25", "-0.5"]
    )


def test_the_columns_of_the_readme_are_read(model, tmp_path):
    """The command under "Your own data", with pairs of that shape."""
    data = tmp_path / "pairs.jsonl"
    row = {"question": "Why?", "response_j": "So it is.", "response_k": "No."}
    lines = [json.dumps(row | {"question": f"Why {word}?"}) for word in tiny.WORDS]
    data.write_text("\n".join(lines))
    columns = re.search(r"--columns '(.*)'", section("Your own data"))[1]
    flags = ["--dataset_name", data, "--columns", columns, "--eval_pairs", 4, "--max_length", 96]
    job = read(model, *flags)
    preferences = dpotrainer.load_preferences(job, dpotrainer.load_start(job).tokenizer)
    assert len(preferences.held_out) == 4 and len(preferences.train) == len(tiny.WORDS) - 4


def test_the_code_that_makes_pairs_of_other_rows_makes_all_of_them(tmp_path, monkeypatch):
    """Several rejected answers in a row, and a column that names the winner."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", section("Your own data"), flags=re.DOTALL)
    question = [{"role": "user", "content": "为什么?"}]
    many = [
        {"prompt": question, "chosen": "a", "rejected": ["b", "c"]},
        {"prompt": question, "chosen": "d", "rejected": ["e"]},
    ]
    battles = [
        {"prompt": "q", "response_a": "x", "response_b": "y", "winner": "b"},
        {"prompt": "q", "response_a": "x", "response_b": "y", "winner": "tie"},
    ]
    names = {}
    for path, rows in (("many.jsonl", many), ("battles.jsonl", battles)):
        Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")

    exec(compile(blocks[0], "README.md", "exec"), names)
    made = tiny.read_pairs("pairs.jsonl")
    assert [(row["chosen"], row["rejected"]) for row in made] == [
        ("a", "b"),
        ("a", "c"),
        ("d", "e"),
    ]
    assert all(row["prompt"] == question for row in made)
    exec(compile(blocks[1], "README.md", "exec"), names)
    assert tiny.read_pairs("pairs.jsonl") == [{"prompt": "q", "chosen": "y", "rejected": "x"}]


def test_an_sft_adapter_is_merged_by_the_code_of_the_readme(model, tmp_path, monkeypatch):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(model)
    adapter = LoraConfig(
        target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
    )
    get_peft_model(base, adapter).save_pretrained(tmp_path / "my-sft")
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "my-sft")
    monkeypatch.chdir(tmp_path)
    exec(compile(code("After SFT"), "README.md", "exec"), {})
    merged = AutoModelForCausalLM.from_pretrained("my-sft-merged")
    assert not merged.get_input_embeddings().weight.isnan().any()
    assert AutoTokenizer.from_pretrained("my-sft-merged").chat_template
