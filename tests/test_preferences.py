"""The section `preferences`: layouts, checks, chat templates, splits, cache. Needs no network and no other file."""

import datetime
import json
import math
import re
import tracemalloc
from decimal import Decimal
from importlib.resources import files
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

import dpotrainer

CHATML = (
    "{%- for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN3 = (files("trl") / "chat_templates" / "qwen3.jinja").read_text(encoding="utf-8")
WORDS = (  # Qwen's: line breaks keep together whatever follows
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
COLUMNS = ["prompt_ids", "chosen_ids", "rejected_ids", "prompt", "chosen", "rejected", "pair_hash", "needed_tokens"]


def make_tokenizer(template, **special):
    """A byte-level BPE tokenizer of some 400 tokens with ChatML's special ones and Qwen3's think tags."""
    bpe = Tokenizer(models.BPE())
    split, to_bytes = pre_tokenizers.Split(Regex(WORDS), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=[*pre_tokenizers.ByteLevel.alphabet(), "▁"], show_progress=False
    )
    bpe.train_from_iterator(["the answer to the question is that there is no answer\n\n there"] * 4, trainer)
    bpe.add_special_tokens([AddedToken(f"<|{name}|>", special=True) for name in ("endoftext", "im_start", "im_end")])
    bpe.add_tokens(["<think>", "</think>"])
    special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", **special}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=template, **special)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(CHATML)


@pytest.fixture(scope="module")
def qwen():
    return make_tokenizer(QWEN3)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def write(folder, rows, name="pairs.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def options(name, **changes):
    defaults = {
        "dataset_name": name, "dataset_config": None, "dataset_train_split": "train", "dataset_test_split": "test",
        "chat_strings": False, "eval_pairs": 0, "max_length": 512, "seed": 7, "dataset_num_proc": None,
    }  # fmt: skip
    return SimpleNamespace(**defaults | changes)


def load(folder, rows, tokenizer, **changes):
    """Write the rows as one file and load it: (all pairs as a list, the train split's report)."""
    train, held_out, report = dpotrainer.load_preferences(options(write(folder, rows), **changes), tokenizer)
    return [*train, *(held_out or [])], report["splits"]["train"]


def dropped(report):
    """{reason: (pairs, the first of their row numbers)}."""
    return {reason: (count, report["first rows of them"][reason]) for reason, count in report["dropped"].items()}


def refused(folder, rows, tokenizer, **changes):
    """The message of the error that loading these rows ends in."""
    with pytest.raises(dpotrainer.UserError) as error:
        load(folder, rows, tokenizer, **changes)
    return str(error.value)


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def system(text):
    return {"role": "system", "content": text}


def pair(prompt, chosen, rejected, **more):
    """A conversational row: the prompt's last turn may be given as text, answers as text."""
    prompt = [user(prompt)] if isinstance(prompt, str) else prompt
    return {"prompt": prompt, "chosen": [assistant(chosen)], "rejected": [assistant(rejected)], **more}


SINGLE = [
    pair("What is the answer?", "42", "41"),
    pair("Line one\r\nline two", "yes\r\n\tindented", "no 🙂🙃"),
    pair("你好，世界", "你好！", "你好！你也好"),  # one answer begins with the other
    pair("Human: is this a role?", "the 🇩🇪 flag", "different from the first token"),
    pair("word " * 900, "long prompt", "is dropped"),
    pair("word", "long " * 900, "long " * 899 + "answers are cut and become equal"),
    pair("same", "same", "same"),
]
MANY = [
    pair([user("one"), assistant("two"), user("three")], "four", "five"),
    pair([user("one"), assistant("one"), user("one"), assistant("one"), user("one")], "one", "two"),
]
SYSTEM = [pair([system("Be brief."), user("hello"), assistant("hi"), user("more")], "less", "more of it")]


def as_standard(row):
    return {side: messages[-1]["content"] for side, messages in row.items()}


def as_conversations(row):
    """trl-lib/ultrafeedback_binarized."""
    sides = {side: row["prompt"] + row[side] for side in ("chosen", "rejected")}
    return {**sides, "score_chosen": 8.5, "score_rejected": 7.0}


def as_h4(row):
    """HuggingFaceH4/ultrafeedback_binarized."""
    full = as_conversations(row)
    return {"prompt": row["prompt"][-1]["content"], "prompt_id": "ab12", **full, "messages": full["chosen"]}


def as_argilla(row):
    """argilla/ultrafeedback-binarized-preferences-cleaned."""
    sides = {side: row["prompt"] + row[side] for side in ("chosen", "rejected")}
    prompt = next(turn["content"] for turn in row["prompt"] if turn["role"] == "user")
    return {"source": "evol", "prompt": prompt, **sides, "chosen-rating": 5.0, "rejected-rating": 3.0,
            "chosen-model": "a", "rejected-model": "b"}  # fmt: skip


def as_transcripts(row):
    """Anthropic/hh-rlhf."""
    names = {"user": "Human", "assistant": "Assistant"}

    def text(messages):
        return "".join(f"\n\n{names[turn['role']]}: {turn['content']}" for turn in messages)

    return {side: text(row["prompt"] + row[side]) for side in ("chosen", "rejected")}


def as_sharegpt(row):
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    turns = {side: [{"from": names[turn["role"]], "value": turn["content"]} for turn in row[side]] for side in row}
    return {"conversations": turns["prompt"], "chosen": turns["chosen"][0], "rejected": turns["rejected"][0]}


LAYOUTS = {
    "conversational": (lambda row: row, SINGLE + MANY + SYSTEM),
    "standard": (as_standard, SINGLE),
    "conversations": (as_conversations, SINGLE + MANY + SYSTEM),
    "prompt beside conversations": (as_h4, SINGLE + MANY + SYSTEM),
    "prompt beside conversations, argilla": (as_argilla, SINGLE + MANY + SYSTEM),
    "transcripts": (as_transcripts, SINGLE + MANY),
    "ShareGPT": (as_sharegpt, SINGLE + MANY + SYSTEM),
}


@pytest.mark.parametrize("template", ["tokenizer", "qwen"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_same_pairs_in_every_layout_give_the_same_tokens(name, template, tmp_path, request):
    rewrite, rows = LAYOUTS[name]
    tokenizer = request.getfixturevalue(template)
    expected, counts = load(tmp_path, rows, tokenizer)
    found, report = load(tmp_path, list(map(rewrite, rows)), tokenizer, chat_strings=name == "standard")
    assert report["layout"] == name.split(",")[0]
    assert found == expected
    assert report["dropped"] == counts["dropped"]
    assert set(report["dropped"]) == {"chosen equals rejected", "prompt leaves no room", "equal after truncation"}


def test_columns_and_their_values(tokenizer, tmp_path):
    (found,), _ = load(tmp_path, [pair("hi", "yes", "no", topic="x")], tokenizer)
    assert list(found) == COLUMNS
    assert tokenizer.decode(found["prompt_ids"]) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(found["chosen_ids"]) == "yes<|im_end|>\n"
    assert tokenizer.decode(found["rejected_ids"]) == "no<|im_end|>\n"


# ---- what is dropped, and that nothing is dropped uncounted

BAD = {
    "tied scores": [as_conversations(pair("q", "a", "b")) | {"score_chosen": 7, "score_rejected": 7}],
    "chosen equals rejected": [as_conversations(pair("q", "a", "a"))],
    "empty side": [
        as_conversations(pair("q", " \n", "b")), as_conversations(pair("q", "a", "")),
        as_conversations(pair(" ", "a", "b")), as_conversations(pair("q", "a", "b")) | {"chosen": []},
        {"chosen": [user("q")], "rejected": [user("q"), assistant("b")]},
    ],
    "no final assistant turn": [
        {"chosen": [user("q"), assistant("a"), user("thanks")], "rejected": [user("q"), assistant("b")]},
    ],
    "histories differ": [
        {"chosen": [user("q"), assistant("a")], "rejected": [user("p"), assistant("b")]},
        {"chosen": [assistant("a")], "rejected": [assistant("b")]},
        {"chosen": [system("s"), assistant("a")], "rejected": [system("s"), assistant("b")]},
    ],
    "prompt leaves no room": [as_conversations(pair("word " * 600, "a", "b"))],
    "equal after truncation": [as_conversations(pair("q", "word " * 600 + "a", "word " * 600 + "b"))],
}  # fmt: skip


@pytest.mark.parametrize("reason", BAD)
def test_bad_pairs_are_dropped_and_counted(reason, tokenizer, tmp_path):
    good = [as_conversations(pair(f"question {i}", "a", "b")) for i in range(6)]
    kept, report = load(tmp_path, [good[0], *BAD[reason], *good[1:]], tokenizer)
    rows = list(range(2, 2 + len(BAD[reason])))
    assert dropped(report) == {reason: (len(rows), rows)}
    assert (report["read"], report["kept"], len(kept)) == (6 + len(rows), 6, 6)


def test_counts_of_all_reasons_add_up(tokenizer, tmp_path):
    bad = [row for rows in BAD.values() for row in rows]
    good = [as_conversations(pair(f"question {i % 18}", "a", "b")) for i in range(20)]
    kept, report = load(tmp_path, bad + good, tokenizer)
    assert report["dropped"] == {reason: len(rows) for reason, rows in BAD.items()}
    assert report["read"] == report["kept"] + sum(report["dropped"].values()) == len(bad) + 20
    assert (len(kept), report["duplicates"]) == (20, 2)
    assert "empty side: [3, 4, 5, 6, 7]" in dpotrainer.as_yaml(report)
    assert "你好 " * 50 + "end" in dpotrainer.as_yaml({"data": "你好 " * 50 + "end"})


def test_only_the_first_rows_of_many_are_named(tokenizer, tmp_path):
    rows = [pair(f"question {i}", "a", "b" if i % 2 else "a") for i in range(20)]
    report = load(tmp_path, rows, tokenizer)[1]
    assert dropped(report) == {"chosen equals rejected": (10, [1, 3, 5, 7, 9])}


@pytest.mark.parametrize("scores", [(math.nan, math.nan), (None, None), (None, 3.0), (1, 2), ("", "")])
def test_only_equal_numbers_are_ties(scores, tokenizer, tmp_path):
    rows = [as_argilla(pair("q", "a", "b")) | {"chosen-rating": scores[0], "rejected-rating": scores[1]}]
    assert load(tmp_path, rows, tokenizer)[1]["kept"] == 1


@pytest.mark.parametrize("names", [*dpotrainer.SCORES, ("score_chosen", "score_rejected")])
def test_ties_are_found_in_every_known_pair_of_score_columns(names, tokenizer, tmp_path):
    rows = [pair("q", "a", "b") | dict.fromkeys(names, 4.0), *(pair("q", "a", "b") for _ in range(3))]
    assert dropped(load(tmp_path, rows, tokenizer)[1]) == {"tied scores": (1, [1])}


def test_more_than_half_dropped_is_an_error_with_the_counts(tokenizer, tmp_path):
    message = refused(tmp_path, [pair("q", "a", "a"), pair("q", "b", "b"), pair("q", "a", "b")], tokenizer)
    assert "too few pairs" in message
    assert "dropped: {chosen equals rejected: 2}" in message
    assert "chosen equals rejected: [1, 2]" in message
    assert load(tmp_path, [pair("q", "a", "a"), pair("q", "a", "b")], tokenizer)[1]["kept"] == 1


def test_share_of_cut_answers_and_the_length_that_would_cut_few(tokenizer, tmp_path):
    rows = [pair(f"q{i}", "word " * (5 * i + 1), "w " * (5 * i + 3)) for i in range(150)]
    whole, free = load(tmp_path, rows, tokenizer, max_length=None)
    assert (free["share of answers cut"], free["kept"]) == (0.0, 150)
    lengths = np.array([len(p["prompt_ids"]) + len(p[side]) for p in whole for side in ("chosen_ids", "rejected_ids")])
    limit = int(np.sort(lengths)[200])
    report = load(tmp_path, rows, tokenizer, max_length=limit)[1]
    assert report["kept"] == 150
    assert report["share of answers cut"] == pytest.approx((lengths > limit).mean(), abs=1e-4)
    enough = report["max_length that cuts less than 1%"]
    assert (lengths > enough).mean() < 0.01 <= (lengths > enough - 1).mean()
    assert free["max_length that cuts less than 1%"] == enough
    crowd = [pair("word " * 900, "a", "b"), *rows[:9]]  # dropped, yet a reason for a larger max_length
    assert load(tmp_path, crowd, tokenizer)[1]["max_length that cuts less than 1%"] > 900


# ---- layouts and their quirks


def test_answers_that_the_template_makes_equal_are_equal(qwen, tmp_path):
    rows = [pair("q", "yes", "\n\nyes"), pair("q", "yes", "no")]
    assert dropped(load(tmp_path, rows, qwen)[1]) == {"chosen equals rejected": (1, [1])}


@pytest.mark.parametrize("ids, reason", [
    (([1, 2, 3], [4], [5]), "prompt leaves no room"), (([1, 2], [4, 5], [4, 6]), "equal after truncation"),
    (([1, 2], [4, 5], [4, 5]), "chosen equals rejected"), (([1, 2], [4], [4, 5]), "equal after truncation"),
    (([1, 2], [4, 5], [5]), ""), (([1], [4], [4, 5]), ""),
])  # fmt: skip
def test_reasons_that_depend_on_max_length(ids, reason):
    assert dpotrainer.measure_pair(*ids, 3)[-1] == reason


def test_transcripts_with_other_line_ends_and_none_at_the_start(tokenizer, tmp_path):
    plain = as_transcripts(MANY[0])
    odd = {side: text.replace("\n\n", "\r\n\r\n") for side, text in plain.items()}
    bare = {side: text.lstrip() for side, text in plain.items()}
    expected = load(tmp_path, [MANY[0]], tokenizer)[0]
    for row in (plain, odd, bare):
        assert load(tmp_path, [row], tokenizer)[0] == expected


def test_transcripts_that_part_early_keep_the_last_shared_human_turn(tokenizer, tmp_path):
    asked = "\n\nHuman: a\n\nAssistant: "
    rows = [
        (f"{asked}b\n\nHuman: c\n\nAssistant: d", f"{asked}B\n\nHuman: C\n\nAssistant: D"),
        (f"{asked}b", f"{asked}b\n\nHuman: c\n\nAssistant: d"),
        (asked, f"{asked}b"),
        ("", f"{asked}b"),
    ]
    rows = [{"chosen": chosen, "rejected": rejected} for chosen, rejected in rows]
    assert load(tmp_path, rows[::-1], tokenizer)[1]["layout"] == "transcripts"  # whatever the first row
    found, report = load(tmp_path, rows, tokenizer)
    assert dropped(report) == {"empty side": (2, [3, 4])}
    for got in found:
        assert tokenizer.decode(got["prompt_ids"]) == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    turns = "<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n"
    assert tokenizer.decode(found[0]["chosen_ids"]) == "b" + turns.format("c", "d")
    assert tokenizer.decode(found[0]["rejected_ids"]) == "B" + turns.format("C", "D")
    assert tokenizer.decode(found[1]["chosen_ids"]) == "b<|im_end|>\n"


def test_a_prompt_repeated_in_the_answers_is_taken_out_once(tokenizer, tmp_path):
    rows = SYSTEM + MANY
    repeated = [{**as_conversations(row), "prompt": row["prompt"]} for row in rows]
    once = [{**row, "rejected": row["prompt"] + row["rejected"]} for row in rows]
    expected = load(tmp_path, rows, tokenizer)[0]
    assert load(tmp_path, repeated, tokenizer)[0] == load(tmp_path, once, tokenizer)[0] == expected


def test_a_tool_turn_can_be_the_last_of_the_prompt(tokenizer, tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    prompt = [user("q"), call, {"role": "tool", "content": "5"}]
    row = {"chosen": [*prompt, assistant("it is 5")], "rejected": [*prompt, assistant("it is 6")]}
    (found,), _ = load(tmp_path, [row], tokenizer)
    assert tokenizer.decode(found["chosen_ids"]) == "it is 5<|im_end|>\n"


def test_a_late_system_turn_belongs_to_the_prompt(tokenizer, tmp_path):
    prompt = [user("q"), assistant("a"), system("now in rhyme")]
    row = {"chosen": [*prompt, assistant("hey")], "rejected": [*prompt, assistant("no")]}
    assert load(tmp_path, [row], tokenizer)[0] == load(tmp_path, [pair(prompt, "hey", "no")], tokenizer)[0]


def test_sharegpt_with_lists_and_every_role_name(tokenizer, tmp_path):
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "a"}, {"from": "bot", "value": "b"},
             {"from": "user", "value": "c"}]  # fmt: skip
    answers = [{"from": "assistant", "value": "d"}], [{"from": "gpt", "value": "e"}]
    row = {"conversations": turns, "chosen": answers[0], "rejected": answers[1]}
    same = pair([system("s"), user("a"), assistant("b"), user("c")], "d", "e")
    assert load(tmp_path, [row], tokenizer)[0] == load(tmp_path, [same], tokenizer)[0]


@pytest.mark.parametrize("row, said", [
    ({"chosen": "a", "rejected": "b"}, "chosen: text, rejected: text"),
    ({"question": "q", "chosen": "a", "rejected": "b"}, "question: text, chosen: text"),
    ({"prompt": [user("q")], "chosen": "a", "rejected": "b"}, "prompt: messages, chosen: text"),
    ({"prompt": 5, "chosen": "a", "rejected": "b"}, "prompt: int"),
    ({"prompt": "q", "chosen": None, "rejected": "b"}, "chosen: NoneType"),
    ({"prompt": "q", **as_transcripts(SINGLE[0])}, "prompt: text, chosen: transcript, rejected: transcript"),
    ({**as_sharegpt(SINGLE[0]), "prompt": [user("q")]}, "conversations: messages, chosen: messages"),
])  # fmt: skip
def test_columns_that_fit_no_layout_or_two_are_shown(row, said, tokenizer, tmp_path):
    message = refused(tmp_path, [row] * 2, tokenizer)
    assert "no known layout, or more than one" in message
    assert said in message
    assert all(layout in message for layout in dpotrainer.LAYOUTS)


def test_a_raw_prompt_in_transcript_style_is_text(tokenizer, tmp_path):
    row = {"prompt": "\n\nHuman: hi\n\nAssistant:", "chosen": " yes", "rejected": " no"}
    (found,), report = load(tmp_path, [row], tokenizer)
    assert report["layout"] == "standard"
    assert tokenizer.decode(found["prompt_ids"] + found["chosen_ids"]) == row["prompt"] + " yes<|im_end|>"


# ---- wrong input is refused with file and row


@pytest.mark.parametrize("row, said", [
    ({"prompt": "q", "chosen": 5, "rejected": "b"}, "chosen holds 5, not text"),
    ({"prompt": "q", "chosen": None, "rejected": "b"}, "chosen holds None, not text"),
    ({"prompt": "q", "rejected": "b"}, "chosen holds None, not text"),
    ({"prompt": [user("q")], "chosen": "a", "rejected": "b"}, "'content': 'q'}], not text"),
])  # fmt: skip
@pytest.mark.parametrize("processes", [None, 2])
def test_a_wrong_type_names_file_and_row(row, said, processes, tokenizer, tmp_path):
    rows = [as_standard(pair("q", "a", "b"))] * 3 + [row]
    message = refused(tmp_path, rows, tokenizer, dataset_num_proc=processes)
    assert "pairs.jsonl (train), row 4: " in message
    assert said in message


@pytest.mark.parametrize("turn, said", [
    ({"role": "narrator", "content": "x"}, "narrator"), ({"role": None, "content": "x"}, "x"),
    ({"role": "user", "content": None}, "user"), ({"role": "user", "content": 3}, "3"),
    ({"role": "user", "content": [{"type": "text", "text": "x"}]}, "'type': 'text'"),
])  # fmt: skip
def test_a_wrong_message_names_file_and_row(turn, said, tokenizer, tmp_path):
    rows = [pair("q", "a", "b"), {**pair("q", "a", "b"), "prompt": [turn, user("q")]}]
    message = refused(tmp_path, rows, tokenizer)
    assert re.search(rf"pairs.jsonl \(train\), row 2: prompt holds .*{said}.*, not messages \(roles: ", message)


@pytest.mark.parametrize("line", ['{"prompt": "q", "chosen": ', '{"prompt": "q" "x"}', "\\"])
@pytest.mark.parametrize("folder", [False, True])
def test_invalid_json_names_file_and_row(line, folder, tokenizer, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(as_standard(pair("q", "a", "b"))) + f"\n\n{line}\n")
    with pytest.raises(dpotrainer.UserError, match=r"cannot be read: .*pairs.jsonl, row 3: "):
        dpotrainer.load_preferences(options(str(tmp_path if folder else path)), tokenizer)


def test_invalid_json_array_names_the_file_and_line(tokenizer, tmp_path):
    path = tmp_path / "pairs.json"
    path.write_text('[{"prompt": "a"},\n{"prompt": }]')
    with pytest.raises(dpotrainer.UserError, match=r"pairs.json, row 1: Expecting value: line 2 column 12"):
        dpotrainer.load_preferences(options(str(path)), tokenizer)


def test_a_file_or_folder_without_pairs_is_refused(tokenizer, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "header.csv").write_text("prompt,chosen,rejected\n")
    (tmp_path / "pairs.txt").write_text("x")
    for name in ("empty.jsonl", "folder", "header.csv", "pairs.txt", "missing"):
        with pytest.raises(dpotrainer.UserError, match=name):
            dpotrainer.load_preferences(options(str(tmp_path / name)), tokenizer)


@pytest.mark.parametrize("error", [
    ConnectionError("Couldn't reach 'org/name' on the Hub"),
    datasets.exceptions.DatasetNotFoundError("Dataset 'org/name' is a gated dataset on the Hub."),
    ValueError("BuilderConfig 'x' not found. Available: ['default']"),
])  # fmt: skip
def test_a_failure_of_the_hub_is_one_message_with_the_fix(error, tokenizer, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(dpotrainer.UserError) as raised:
        dpotrainer.load_preferences(options("org/name"), tokenizer)
    assert str(error) in str(raised.value)
    assert "hf auth login" in str(raised.value)
    assert "network" in str(raised.value)


def test_conversations_without_a_chat_template_are_refused_with_the_fix(tmp_path):
    bare = make_tokenizer(None)
    assert "save a chat_template.jinja" in refused(tmp_path, [pair("q", "a", "b")], bare)
    row = as_standard(pair("q", "a", "b"))
    assert "save a chat_template.jinja" in refused(tmp_path, [row], bare, chat_strings=True)
    assert load(tmp_path, [row], bare)[1]["kept"] == 1


def test_a_template_that_refuses_a_conversation_names_the_row(tmp_path):
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    strict = make_tokenizer(refusal + CHATML)
    message = refused(tmp_path, [MANY[0], *SYSTEM], strict)
    assert "row 2: no system here" in message


# ---- file types, splits


@pytest.mark.parametrize("kind", ["json", "parquet", "csv"])
def test_file_types_give_the_same_pairs(kind, tokenizer, tmp_path):
    rows = [as_standard(row) for row in SINGLE] + [{"prompt": "Which?", "chosen": "None", "rejected": "NA"}]
    expected = load(tmp_path, rows, tokenizer)[0]
    table, path = datasets.Dataset.from_list(rows), tmp_path / f"other.{kind}"
    if kind == "json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        getattr(table, f"to_{kind}")(path)
    train, _, _ = dpotrainer.load_preferences(options(str(path)), tokenizer)
    assert train.to_list() == expected


def test_scores_of_any_type_are_compared(tokenizer, tmp_path):
    rows = [as_conversations(pair("q", "a", "b")) for _ in range(3)]
    for row, score in zip(rows, ("1.50", "1.5", "2")):
        row |= {"score_chosen": Decimal(score), "score_rejected": Decimal("2")}
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "pairs.parquet")
    report = dpotrainer.load_preferences(options(str(tmp_path / "pairs.parquet")), tokenizer)[2]
    assert dropped(report["splits"]["train"]) == {"tied scores": (1, [3])}


def test_a_folder_of_csv_files_reads_as_a_file_does(tokenizer, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.csv").write_text("prompt,chosen,rejected\nq,None,no\nq,NA,no\nq,yes,no\nq,,no\n")
    for name in (tmp_path / "folder", tmp_path / "folder" / "a.csv"):
        train, _, report = dpotrainer.load_preferences(options(str(name), chat_strings=True), tokenizer)
        assert len(train) == 3 and dropped(report["splits"]["train"]) == {"empty side": (1, [4])}


def test_files_that_are_no_json_are_not_called_broken_json(tokenizer, tmp_path):
    (tmp_path / "a.csv").write_bytes("prompt,chosen,rejected\nq,\xe9,n\n".encode("latin-1"))
    (tmp_path / "b.parquet").write_bytes(b"no parquet")
    for name, said in (("a.csv", "utf-8"), ("b.parquet", "arquet")):
        with pytest.raises(dpotrainer.UserError, match=said) as error:
            dpotrainer.load_preferences(options(str(tmp_path / name)), tokenizer)
        assert "row 1" not in str(error.value)


def test_messages_written_as_json_text_are_refused(tokenizer, tmp_path):
    rows = [{name: json.dumps(side) for name, side in pair([user("q")], "a", "b").items()}] * 4
    assert "JSON in a text" in refused(tmp_path, rows, tokenizer)


def test_answers_that_are_json_are_text(tokenizer, tmp_path):
    rows = [{"prompt": f"q{i}", "chosen": '[{"name": "a"}]', "rejected": '[{"name": "b"}]'} for i in range(4)]
    assert load(tmp_path, rows, tokenizer)[1]["kept"] == 4


def test_a_csv_file_beside_jsonl_is_no_harm(tokenizer, tmp_path):
    write(tmp_path, [pair(f"q{i}", "a", "b") for i in range(4)], "train.jsonl")
    (tmp_path / "notes.csv").write_text("a,b\n1,2\n")
    train, *_ = dpotrainer.load_preferences(options(str(tmp_path)), tokenizer)
    assert len(train) == 4


def test_a_text_is_the_prompt_of_answers_that_stand_alone(tokenizer, tmp_path):
    rows = [{"prompt": f"q{i}", "chosen": [assistant("a")], "rejected": [assistant("b")]} for i in range(4)]
    beside, report = load(tmp_path, rows, tokenizer)
    messages, _ = load(tmp_path, [pair([user(f"q{i}")], "a", "b") for i in range(4)], tokenizer)
    assert report["kept"] == 4 and beside == messages


def test_columns_that_are_not_read_are_told(tokenizer, tmp_path):
    rows = [pair([user(f"q{i}")], "a", "b", system="be brief", source="x") for i in range(4)]
    assert load(tmp_path, rows, tokenizer)[1]["columns not read"] == ["source", "system"]


def test_tools_and_template_arguments_may_be_texts(qwen, tmp_path):
    row = pair([user("q")], "a", "b")
    texts = load(tmp_path, [row | {"tools": "", "chat_template_kwargs": "{}"}] * 2, qwen)[0]
    assert texts == load(tmp_path, [row] * 2, qwen)[0]


def test_an_empty_csv_cell_is_an_empty_side(tokenizer, tmp_path):
    (tmp_path / "pairs.csv").write_text("prompt,chosen,rejected\nq,a,b\nq,,b\n")
    report = dpotrainer.load_preferences(options(str(tmp_path / "pairs.csv")), tokenizer)[2]
    assert dropped(report["splits"]["train"]) == {"empty side": (1, [2])}


def test_train_and_test_come_before_other_names(tokenizer, tmp_path):
    for name in ("train", "test", "train_prefs", "test_prefs"):
        datasets.Dataset.from_list([pair(name, "a", "b")]).to_parquet(tmp_path / "pairs" / f"{name}.parquet")
    names = {name: f"{name}.parquet" for name in ("train", "test", "train_prefs", "test_prefs")}
    configs = [{"split": name, "path": path} for name, path in names.items()]
    card = {"configs": [{"config_name": "mine", "data_files": configs}]}
    (tmp_path / "pairs" / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n")
    train, held_out, report = dpotrainer.load_preferences(
        options(str(tmp_path / "pairs"), dataset_config="mine"), tokenizer
    )
    assert list(report["splits"]) == ["train", "test"]
    assert (tokenizer.decode(train[0]["prompt_ids"]), tokenizer.decode(held_out[0]["prompt_ids"])) == tuple(
        f"<|im_start|>user\n{name}<|im_end|>\n<|im_start|>assistant\n" for name in ("train", "test")
    )


@pytest.mark.parametrize("names", [("train", "test"), ("train_prefs", "test_prefs")])
def test_splits_of_a_folder(names, tokenizer, tmp_path, monkeypatch):
    first = [pair(f"q{i}", "a", "b") for i in range(30)] + MANY
    second = [pair(f"p{i}", "a", "b") for i in range(9)] + [MANY[0]]
    if names[0] == "train":
        write(tmp_path, first, "train.jsonl"), write(tmp_path, second, "test.jsonl")
    else:
        found = dict(zip(names, map(datasets.Dataset.from_list, (first, second))))
        monkeypatch.setattr(datasets, "load_dataset", lambda **_: {**found, "train_sft": None})
        with pytest.raises(dpotrainer.UserError, match="has the splits train_prefs, test_prefs, train_sft, but not"):
            dpotrainer.load_preferences(options("org/name", dataset_train_split="training"), tokenizer)
    train, held_out, report = dpotrainer.load_preferences(options(str(tmp_path), eval_pairs=3), tokenizer)
    assert (len(train), len(held_out)) == (32, 10)  # all of the test split, whatever eval_pairs
    assert list(report["splits"]) == list(names)
    assert report["data"] == f"{tmp_path}, 32 pairs to train on, 10 held out, 1 in both"


@pytest.mark.parametrize("changes", [
    {"dataset_train_split": "training"}, {"dataset_test_split": "validation"}, {"dataset_train_split": "train_prefs"},
])  # fmt: skip
def test_an_unknown_split_is_refused_with_those_there_are(changes, tokenizer, tmp_path):
    write(tmp_path, [pair("q", "a", "b")], "train.jsonl"), write(tmp_path, [pair("q", "a", "b")], "test.jsonl")
    with pytest.raises(dpotrainer.UserError, match="has the splits train, test, but not") as error:
        dpotrainer.load_preferences(options(str(tmp_path), **changes), tokenizer)
    assert next(iter(changes.values())) in str(error.value)


@pytest.mark.parametrize("count, expected", [(0, None), (4, 4), (500, 20)])
def test_the_seed_fixes_what_is_held_out(count, expected, tokenizer, tmp_path):
    name = write(tmp_path, [pair(f"q{i}", "a", "b") for i in range(100)])
    train, held_out, report = dpotrainer.load_preferences(options(name, eval_pairs=count), tokenizer)
    if expected is None:
        assert held_out is None
        assert len(train) == 100
        return
    assert (len(train), len(held_out)) == (100 - expected, expected)
    assert report["data"] == f"{name}, {100 - expected} pairs to train on, {expected} held out, 0 in both"
    assert not set(train["pair_hash"]) & set(held_out["pair_hash"])
    again = dpotrainer.load_preferences(options(name, eval_pairs=count), tokenizer)[1]
    assert again["pair_hash"][:] == held_out["pair_hash"][:]
    other = dpotrainer.load_preferences(options(name, eval_pairs=count, seed=8), tokenizer)[1]
    assert other["pair_hash"][:] != held_out["pair_hash"][:]


def test_equal_pairs_stay_on_one_side(tokenizer, tmp_path):
    name = write(tmp_path, [pair(f"q{i % 40}", "a", "b") for i in range(100)])
    train, held_out, report = dpotrainer.load_preferences(options(name, eval_pairs=10), tokenizer)
    assert 0 < len(held_out) <= 10
    assert not set(train["pair_hash"]) & set(held_out["pair_hash"])
    assert report["splits"]["train"]["duplicates"] == 60


# ---- chat templates


def test_qwen3_without_reasoning_has_the_empty_think_block_in_the_prompt(qwen, tmp_path):
    (found,), _ = load(tmp_path, [pair("hi", "yes", "no")], qwen)
    assert qwen.decode(found["prompt_ids"]).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert qwen.decode(found["chosen_ids"]) == "yes<|im_end|>\n"


def test_qwen3_with_reasoning_has_it_in_the_answer(qwen, tmp_path):
    rows = [
        {**pair("hi", "", "no"), "chosen": [assistant("yes", reasoning_content="well")]},
        pair("hi", "<think>\nwell\n</think>\n\nyes", "no"),
        pair("hi", "yes", "no"),
    ]
    found, _ = load(tmp_path, rows, qwen)
    for got in found[:2]:
        assert qwen.decode(got["prompt_ids"]).endswith("<|im_start|>assistant\n")
        assert qwen.decode(got["chosen_ids"]) == "<think>\nwell\n</think>\n\nyes<|im_end|>\n"
        assert qwen.decode(got["rejected_ids"]) == "<think>\n\n</think>\n\nno<|im_end|>\n"
    assert qwen.decode(found[2]["chosen_ids"]) == "yes<|im_end|>\n"


def test_tool_calls_reach_the_template_as_they_were_written(qwen, tmp_path):
    """Parquet fills the arguments of a call with those of every other call, as None: they must not reach the model."""

    def call(**arguments):
        calls = [{"function": {"name": "f", "arguments": arguments}}]
        return [{"role": "assistant", "content": None, "tool_calls": calls}]

    rows = [{"prompt": [user("q")], "chosen": call(a=1), "rejected": call(b="2")}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "pairs.parquet")
    train, _, _ = dpotrainer.load_preferences(options(str(tmp_path / "pairs.parquet")), qwen)
    assert '{"name": "f", "arguments": {"a": 1}}' in qwen.decode(train[0]["chosen_ids"])
    assert '{"name": "f", "arguments": {"b": "2"}}' in qwen.decode(train[0]["rejected_ids"])


def test_tools_and_template_arguments_of_a_row_are_used(qwen, tmp_path):
    tools = [{"type": "function", "function": {"name": "add_numbers"}}]
    row = pair("hi", "yes", "no", tools=tools, chat_template_kwargs={"enable_thinking": True})
    (found,), _ = load(tmp_path, [row], qwen)
    text = qwen.decode(found["prompt_ids"])
    assert "add_numbers" in text
    assert text.endswith("<|im_start|>assistant\n")


def test_a_prompt_rendered_differently_alone_is_an_error_that_shows_both(tmp_path):
    odd = make_tokenizer(CHATML.replace("<|im_start|>assistant\n{% endif", "<|im_start|>assistant\n<secret>{% endif"))
    message = refused(tmp_path, [pair("hi", "yes", "no")], odd)
    assert "row 1: the chat template renders the prompt differently alone" in message
    assert r"hi<|im_end|>\n<|im_start|>assistant\n<secret>'" in message
    assert r"hi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n'" in message


def test_an_answer_without_turn_end_gets_eos(tmp_path):
    open_ended = make_tokenizer("{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
                                "{% if add_generation_prompt %}[assistant]{% endif %}")  # fmt: skip
    (found,), _ = load(tmp_path, [pair("hi", "yes", "no")], open_ended)
    assert open_ended.decode(found["chosen_ids"]) == " yes\n<|im_end|>"


def test_raw_text_gets_eos_once(tokenizer, tmp_path):
    found, _ = load(tmp_path, [{"prompt": "q: ", "chosen": "yes", "rejected": "no<|im_end|>"}], tokenizer)
    assert tokenizer.decode(found[0]["chosen_ids"]) == "yes<|im_end|>"
    assert tokenizer.decode(found[0]["rejected_ids"]) == "no<|im_end|>"


def test_raw_text_that_merges_across_the_boundary_keeps_the_prompt_whole(tokenizer, tmp_path):
    row = {"prompt": "the answer to th", "chosen": "e question is", "rejected": "at there is no"}
    prompt = tokenizer("the answer to th").input_ids
    assert tokenizer("the answer to the question is").input_ids[: len(prompt)] != prompt
    (found,), _ = load(tmp_path, [row], tokenizer)
    assert found["prompt_ids"] == prompt
    assert found["chosen_ids"] == tokenizer("e question is<|im_end|>").input_ids


def test_raw_text_starts_with_the_tokens_the_tokenizer_puts_first(tmp_path):
    both = make_tokenizer("<|im_start|>" + CHATML, bos_token="<|im_start|>")
    ids = [("<|im_start|>", both.convert_tokens_to_ids("<|im_start|>")), ("<|im_end|>", both.eos_token_id)]
    both.backend_tokenizer.post_processor = TemplateProcessing("<|im_start|> $A <|im_end|>", special_tokens=ids)
    (found,), _ = load(tmp_path, [{"prompt": "the answer", "chosen": " is", "rejected": " is no"}], both)
    assert both.decode(found["prompt_ids"]) == "<|im_start|>the answer"
    assert both.decode(found["chosen_ids"]) == " is<|im_end|>"
    (found,), _ = load(tmp_path, [pair("q", "a", "b")], both)
    assert both.decode(found["prompt_ids"]).startswith("<|im_start|><|im_start|>user")


def test_padding_equal_to_eos_hides_no_eos(tmp_path):
    same = make_tokenizer(CHATML, pad_token="<|im_end|>")
    found, _ = load(tmp_path, [pair("hi", "yes", "no, not at all")], same)
    batch = DataCollatorForPreference(pad_token_id=same.pad_token_id, max_length=512)(found)
    kept = batch["input_ids"][0][batch["completion_mask"][0].bool()]
    assert kept.tolist() == found[0]["chosen_ids"]
    assert same.eos_token_id in kept


def trl_tokens(rows, tokenizer, **arguments):
    """What TRL's own preparation makes of canonical rows."""
    rows = [{**row, **({"chat_template_kwargs": arguments} if arguments else {})} for row in rows]
    arguments = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    prepared = DPOTrainer._prepare_dataset(trainer, datasets.Dataset.from_list(rows), tokenizer, arguments, "train")
    return [{name: row[name] for name in COLUMNS[:3]} for row in prepared]


@pytest.mark.parametrize("template, arguments", [("tokenizer", {}), ("qwen", {"enable_thinking": False})])
def test_tokens_are_those_of_trl_where_trl_is_right(template, arguments, tmp_path, request):
    tokenizer = request.getfixturevalue(template)
    rows = [row for row in SINGLE + MANY + SYSTEM if row["chosen"] != row["rejected"]]
    found, _ = load(tmp_path, rows, tokenizer, max_length=None)
    assert [{name: row[name] for name in COLUMNS[:3]} for row in found] == trl_tokens(rows, tokenizer, **arguments)
    assert len(found) == len(rows)


def test_tokens_are_those_of_trl_for_a_tokenizer_that_puts_a_space_first(tmp_path):
    """As Llama 2's: an answer tokenized apart would start with a space of its own."""
    rows = [pair("the question is", "there", "no answer"), *MANY[:1], *SYSTEM]
    spaced = make_tokenizer("{% for m in messages %}- [{{ m.role }}]:{{ m.content }}<|im_end|>{% endfor %}"
                            "{% if add_generation_prompt %}- [assistant]:{% endif %}")  # fmt: skip
    for scheme in ("first", "always", "never"):
        if scheme == "never":  # the older way: the space comes before every part that is normalized in one go
            spaced.backend_tokenizer.normalizer = normalizers.Prepend("▁")
            token = AddedToken("[assistant]", normalized=True, special=True)
            spaced.add_special_tokens({"extra_special_tokens": [token]})
        spaced.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        found, _ = load(tmp_path, rows, spaced)
        assert [{name: row[name] for name in COLUMNS[:3]} for row in found] == trl_tokens(rows, spaced)


def test_raw_tokens_are_those_of_trl_where_nothing_merges(tokenizer, tmp_path):
    rows = [("the answer", " is there", " is no"), ("你好。", "a", "🙂")]
    rows = [dict(zip(("prompt", "chosen", "rejected"), row)) for row in rows]
    found, _ = load(tmp_path, rows, tokenizer, max_length=None)
    assert [{name: row[name] for name in COLUMNS[:3]} for row in found] == trl_tokens(rows, tokenizer)


# ---- lengths, hashes, one pair shown


def test_lengths_and_needed_tokens_are_those_of_the_collated_rows(tokenizer, tmp_path):
    rows = SINGLE[:4] + MANY + SYSTEM + [pair("q", "word " * 300, "word " * 200 + "end")]
    found, _ = load(tmp_path, [*rows, pair("q", "a", "a " * 300)], tokenizer, max_length=90)
    collate = DataCollatorForPreference(pad_token_id=0, max_length=90)
    for row in found:
        batch = collate([row])
        first, second = (ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"]))
        shared = 0
        while shared < min(len(first), len(second)) - 1 and first[shared] == second[shared]:
            shared += 1
        assert row["needed_tokens"] == len(first) + len(second) - shared


def test_lengths_are_those_of_the_tokens_before_they_are_cut(tokenizer, tmp_path):
    name = write(tmp_path, [pair("q " * i, "a " * (i + 1), "b " * (2 * i + 1)) for i in range(1, 30)])
    train, held_out, _ = dpotrainer.load_preferences(options(name, eval_pairs=5, max_length=70), tokenizer)
    assert max(train["prompt"]) + max(train["rejected"]) > 70
    for row in (*train, *held_out):
        for side in ("prompt", "chosen", "rejected"):
            assert row[side] == len(row[f"{side}_ids"])


def test_dates_and_tools_as_text_are_read(tokenizer, tmp_path):
    """A turn may carry a date, which parquet keeps as one, and tools may be JSON in a string."""
    turn = user("q") | {"at": datetime.datetime(2026, 1, 2)}
    sides = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    rows = [{"prompt": [turn], **sides, "tools": "[]"}] * 3
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "pairs.parquet")
    train, _, _ = dpotrainer.load_preferences(options(str(tmp_path / "pairs.parquet")), tokenizer)
    assert len(train) == 3


def test_hashes_are_the_same_everywhere_and_tell_pairs_apart():
    def hash_of(*ids, max_length=None):
        return dpotrainer.measure_pair(*ids, max_length)[0]

    assert hash_of([1, 2], [3], [4]) == 3495640065869573133  # by another program version it would miss every cache
    ids = [([1, 2], [3], [4]), ([1, 2], [4], [3]), ([1], [2, 3], [2, 4]), ([1, 2], [3, 4], [4]), ([1, 2], [3], [3, 4])]
    assert len({hash_of(*each) for each in ids}) == len(ids)
    assert hash_of([1, 2], [3, 5], [4, 6], max_length=3) == hash_of([1, 2], [3], [4])


def test_one_pair_is_shown_as_the_model_sees_it(tokenizer, tmp_path):
    (found,), _ = load(tmp_path, [pair("hi", "yes " * 300, "no")], tokenizer, max_length=100)
    prompt, chosen, rejected = dpotrainer.describe_pair(tokenizer, found, 100).splitlines()
    assert r"'<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n'" in prompt
    cut = len(found["prompt_ids"]) + len(found["chosen_ids"]) - 100
    assert chosen.endswith(f"' | {cut} tokens cut by max_length 100")
    assert " [...] " not in chosen
    assert rejected.endswith(r"'no<|im_end|>\n'")
    whole = dpotrainer.describe_pair(tokenizer, found, None)
    assert "cut by" not in whole
    assert " [...] " in whole
    assert len(whole) < 1000


# ---- cache, memory, processes


def test_a_second_call_reads_the_cache_and_max_length_or_template_do_not(tmp_path, monkeypatch):
    name, calls = write(tmp_path, [pair(f"q{i}", "a", "b") for i in range(5)]), []
    tokenizer = make_tokenizer(CHATML)
    render = type(tokenizer).apply_chat_template
    monkeypatch.setattr(type(tokenizer), "apply_chat_template", lambda *a, **k: calls.append(1) or render(*a, **k))

    def renders(tokenizer=tokenizer, **changes):
        calls.clear()
        dpotrainer.load_preferences(options(name, **changes), tokenizer)
        return len(calls)

    assert renders() == 15
    assert renders(learning_rate=1e-6, output_dir="elsewhere", eval_pairs=1, seed=3) == 0
    assert renders(make_tokenizer(CHATML)) == 0
    tokenizer(["a tokenizer's state", "differs after use"], padding=True, truncation=True, max_length=3)
    assert renders() == 0
    larger = make_tokenizer(CHATML)
    larger.add_tokens(["q1"])
    assert renders(larger) == 15
    assert renders(max_length=64) == 15
    assert renders(make_tokenizer("{# another #}" + CHATML)) == 15
    assert renders(make_tokenizer(CHATML, eos_token="<|endoftext|>")) == 15
    write(tmp_path, [pair(f"p{i}", "a", "b") for i in range(5)])
    assert renders() == 15


def test_processes_change_nothing(tokenizer, tmp_path):
    rows = SINGLE * 2 + MANY + SYSTEM
    expected = load(tmp_path, rows, tokenizer)
    datasets.config.HF_DATASETS_CACHE += "-other"
    assert load(tmp_path, rows, tokenizer, dataset_num_proc=2) == expected


def test_memory_does_not_grow_with_the_rows(tokenizer, tmp_path):
    def peak(count):
        rows = [pair(f"question {i}", "word " * 100, "other " * 100) for i in range(count)]
        name = write(tmp_path, rows, f"{count}.jsonl")
        tracemalloc.start()
        dpotrainer.load_preferences(options(name), tokenizer)
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    peak(10)  # what is imported and compiled once
    assert peak(1030) < peak(520) + 4 * 2**20  # as lists of tokens, the 510 more rows would take 10 MB


# ---- any input

TEXT = st.text(st.sampled_from("ab \n\r<|>é你🙂\0"), max_size=6)
TEXT |= st.sampled_from(["</think>", "<|im_end|>", "Human:", "\n\nHuman: a\n\nAssistant: b"])
ROLES = st.sampled_from(["user", "assistant"] * 8 + ["system", "tool", "human", "gpt"] * 2 + ["robot", "", None, 3])
TURN = st.fixed_dictionaries({"role": ROLES, "content": TEXT}, optional={"reasoning_content": TEXT | st.none()})
TURN |= st.fixed_dictionaries({"from": ROLES, "value": TEXT}, optional={"weight": st.none() | st.floats()})
MESSAGES = st.lists(TURN, max_size=4) | TURN
TRANSCRIPT = st.lists(st.sampled_from(["\n\nHuman: ", "\n\nAssistant: "]) | TEXT, max_size=6)
TRANSCRIPT = TRANSCRIPT.map(lambda parts: "Human:" + "".join(parts))
KINDS = {"text": TEXT, "messages": MESSAGES, "transcript": TRANSCRIPT | TEXT}
WRONG = st.none() | st.integers() | st.lists(st.integers(), min_size=1, max_size=2) | TEXT | MESSAGES


@st.composite
def layouts_and_rows(draw):
    """A layout, and a row that has the right kinds in all its columns, but one in ten times."""
    layout = draw(st.sampled_from(list(dpotrainer.LAYOUTS)))
    right = draw(st.integers(0, 9)) > 0
    return layout, {name: draw(KINDS[kind] if right else WRONG) for name, kind in dpotrainer.LAYOUTS[layout].items()}


SAID = st.text(st.sampled_from("ab你🙂"), min_size=1, max_size=4)
ANSWERS = st.lists(SAID, min_size=2, max_size=2, unique=True)


@st.composite
def canonical_rows(draw):
    """Rows in canonical form: a system turn or none, turns by turns, two answers that differ."""
    prompt = [system(draw(SAID))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 2))):
        prompt += [user(draw(SAID)), assistant(draw(SAID))]
    return pair([*prompt, user(draw(SAID))], *draw(ANSWERS))


def prepare(rows, layout, tokenizer, max_length=64):
    raw = layout == "standard"
    rows = [dpotrainer.prepare_pair(row, i, layout, tokenizer, raw, max_length) for i, row in enumerate(rows)]
    return {name: [row[name] for row in rows] for name in rows[0]}


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(given_row=layouts_and_rows(), template=st.sampled_from(["tokenizer", "qwen"]))
def test_no_row_ends_in_anything_but_a_result_or_our_own_error(given_row, template, request):
    layout, row = given_row
    try:
        result = prepare([row], layout, request.getfixturevalue(template))
    except ValueError as error:
        assert str(error).startswith("row 1: ")
        return
    assert list(result) == [*COLUMNS, "dropped"]
    assert bool(result["dropped"][0]) or min(len(result[name][0]) for name in COLUMNS[:3]) > 0


@settings(max_examples=100, deadline=None)
@given(row=canonical_rows())
def test_the_canonical_form_of_a_canonical_row_is_itself(row):
    for layout in ("conversational", "conversations", "prompt beside conversations", "ShareGPT", "transcripts"):
        if layout != "transcripts" or row["prompt"][0]["role"] != "system":
            found = dpotrainer.canonical_pair(LAYOUTS[layout][0](row), layout)
            assert found == (row["prompt"], row["chosen"], row["rejected"], "")


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(canonical_rows(), min_size=1, max_size=5), max_length=st.integers(1, 60) | st.none())
def test_rows_hold_the_rendered_text_and_only_short_ones_are_dropped(rows, max_length, qwen):
    result = prepare(rows, "conversational", qwen, max_length)
    for i, row in enumerate(rows):
        prompt = result["prompt_ids"][i]
        for side in ("chosen", "rejected"):
            whole = qwen.apply_chat_template(row["prompt"] + row[side], enable_thinking=False, return_dict=False)
            assert prompt + result[f"{side}_ids"][i] == whole
        first, second = (prompt + result[f"{side}_ids"][i] for side in ("chosen", "rejected"))
        no_room = max_length is not None and len(prompt) >= max_length
        assert bool(result["dropped"][i]) == (no_room or first[:max_length] == second[:max_length])


@settings(max_examples=200, deadline=None)
@given(ids=st.tuples(*[st.lists(st.integers(0, 3), min_size=1)] * 3), max_length=st.integers(1, 12) | st.none())
def test_needed_tokens_are_distinct_beginnings_of_rows(ids, max_length):
    """Two positions need one computation if and only if all up to them is equal; each last position has its own."""
    _, needed, _ = dpotrainer.measure_pair(*ids, max_length)
    rows = [(ids[0] + answer)[:max_length] for answer in ids[1:]]
    beginnings = {tuple(row[: i + 1]) for row in rows for i in range(len(row))}
    last = min(map(len, rows))
    equal = rows[0][:last] == rows[1][:last]
    assert needed == len(beginnings) + equal
