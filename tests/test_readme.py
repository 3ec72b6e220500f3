"""What README, help and configurations say is what the program does: names, files and defaults in them are checked."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

import dpotrainer

ROOT = Path(dpotrainer.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
NAMES = {*vars(dpotrainer.parse_settings([])[0]), "config", "help"}


def test_files_that_the_readme_names_exist():
    named = set(re.findall(r"(?:configs|tests)/[\w./-]*[\w]", README))
    assert len(named) > 8
    assert not [name for name in named if not (ROOT / name).exists()]


def test_flags_and_settings_that_the_readme_names_exist():
    of_others = {
        "config_file",
        "machine_rank",
        "main_process_ip",
        "signal",
        "device",
        "pairs",
        "tokenizer",
        "per_device",
        "keep_memory",
    }
    flags = {name for name in re.findall(r"--(\w+)", README) if name not in of_others}
    assert {"config", "beta", "dry_run"} <= flags
    assert not flags - NAMES
    settings = re.findall(r"`(\w+): [^`]+`", README)
    assert settings and not set(settings) - NAMES


def test_own_settings_are_in_the_readme_with_their_defaults():
    table = dict(
        re.findall(
            r"^\| `(\w+)` \| ([^|]+) \|", README.split("## Changing a setting")[1].split("\n## ")[0], flags=re.M
        )
    )
    own = {field.name: field for field in dataclasses.fields(dpotrainer.Settings)}
    assert set(table) == set(own)
    defaults = vars(dpotrainer.parse_settings([])[0])
    for name, shown in table.items():
        expected = {True: "true", False: "false", None: "none"}.get(defaults[name], str(defaults[name]))
        assert shown.strip().strip("`") == expected, name


def test_the_lora_configuration_says_what_the_constants_say():
    values = yaml.safe_load((ROOT / "configs/qwen3_8b_lora.yaml").read_text(encoding="utf-8"))
    settings, problems = dpotrainer.parse_settings([])
    block = (ROOT / "dpotrainer.py").read_text(encoding="utf-8").split("end of edits")[0]
    constants = re.findall(r"^([A-Z]\w*) = ", block, flags=re.M)
    assert problems == [] and set(values) == {dpotrainer.RENAMED.get(name, name.lower()) for name in constants}
    assert {name: getattr(settings, name) for name in values} == values | {"loss_type": [values["loss_type"]]}


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_configuration_has_a_header_and_no_problem_of_its_own(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert path.read_text(encoding="utf-8").startswith("# "), "a header says what for"
    settings, problems = dpotrainer.parse_settings([f"--config={path}"])
    assert problems + dpotrainer.check_settings(settings) == []


def test_sections_of_the_file_are_those_of_the_readme():
    source = (ROOT / "dpotrainer.py").read_text(encoding="utf-8")
    rulers = [
        line.strip("# -\n").removeprefix("constants: ") for line in source.splitlines() if line.startswith("# ---")
    ]
    listed = re.findall(r"^\| ([a-z ]+) \|", README.split("## The file")[1], flags=re.M)
    for name in listed:
        assert any(name in ruler or ruler in name for ruler in rulers) or name == "constants", name


def test_functions_are_short_and_the_readme_commands_are_two_lines():
    commands = re.findall(r"^python -m venv.*$", README, flags=re.M)
    assert len(commands) == 2
    assert commands[0].endswith("python dpotrainer.py --config configs/quickstart.yaml")
    assert commands[1].endswith('python -m pytest -m "not slow and not cuda"')
    assert 'python -m pytest -m "not slow and not cuda"' in (ROOT / ".ci/run").read_text(encoding="utf-8")
