"""The benchmark, at a size at which every path of it runs in seconds: that it runs, and that its
figures add up.
"""

import json
import runpy
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

BENCHMARK = Path(__file__).parent / "benchmarks" / "throughput.py"


@pytest.fixture
def command(tmp_path):
    """Word-level tokenizer, chat template and pairs in `tmp_path`, and the arguments that name
    them.
    """
    vocabulary = {"<pad>": 0, "<eos>": 1, "the": 2, "a": 3, "cat": 4, "dog": 5}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"
    )
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    pair = {"prompt": "the cat the dog the a", "chosen": " a cat", "rejected": " a dog the a the a"}
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for _ in range(5)))
    paths = {"tokenizer": "tokenizer", "pairs": "pairs.jsonl", "output": "out.json"}
    options = {
        "device": "cpu",
        "model": "qwen3-2x64",
        "per_device": "2",
        "steps": "3",
        "repeats": "2",
    }
    options |= {"processes": "2", "global_batch": "4"}
    options |= {name: str(tmp_path / path) for name, path in paths.items()}
    return [
        str(BENCHMARK),
        *(word for name, value in options.items() for word in (f"--{name}", value)),
        "--profile",
        "--keep_memory",
    ]


def test_benchmark_prints_and_saves_what_it_measures(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", command)
    runpy.run_path(str(BENCHMARK), run_name="__main__")
    saved = json.loads((tmp_path / "out.json").read_text())
    assert [result["checkpointing"] for result in saved["results"]] == [False, True]
    for result in saved["results"]:
        assert result["work"]["pairs"] == 6
        # chosen: 6 + 2 + end of text = 9 tokens; rejected: 6 + 6 + 1 = 13, 7 shared with chosen
        assert result["work"]["computed"] == 6 * 2 * 13
        assert result["work"]["needed"] == 6 * (9 + 13 - 7)
        assert result["work"]["scored"] == 6 * (3 + 7)
        assert result["work"]["scores"] == 6 * (9 * 10 // 2 + 6 * 7 + 6 * 7 // 2)
        stock, ours = result["table"]
        assert (stock["row"], ours["row"]) == ("stock", "+ shared prefixes")
        assert stock["times stock"] == [1, 1, 1] and stock["loss difference"] == 0
        assert (
            ours["loss difference"] < 1e-4 and min(stock["peak GiB"], ours["peak GiB"]) > 0.1
        )  # torch alone
        losses = [step[1] for step in result["steps"]["stock"][-1]]
        assert abs(losses[-1] - 0.693147) > 1e-4  # the weights moved
        seconds = [[step[0] for step in repeat] for repeat in result["steps"]["+ shared prefixes"]]
        assert ours["pairs/s"] == pytest.approx(6 / sum(sum(both) / 2 for both in zip(*seconds)))
        assert sum(ours["profile"].values()) > 0
    assert (
        saved["waiting"]["random"] == saved["waiting"]["balanced"] == [1, 1, 2 * 15]
    )  # all pairs are alike
    printed = capsys.readouterr().out
    assert printed.count("| stock |") == printed.count("| + shared prefixes |") == 2
