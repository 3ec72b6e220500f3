"""The section `preferences`: from files to tokens, what is dropped, told and refused."""

import errno
import gzip
import json
import math
import re
import socket
import time
from decimal import Decimal
from pathlib import Path

import datasets
import numpy as np
import pytest
import trl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from trl import DatasetMixtureConfig, DPOConfig, DPOTrainer, ModelConfig, ScriptArguments
from trl.trainer.dpo_trainer import DataCollatorForPreference

import dpotrainer

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
CHATML = (
    "{%- for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN3 = (TEMPLATES / "qwen3.jinja").read_text(encoding="utf-8")
# Qwen's: line breaks keep together whatever follows
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
IDS = ["prompt_ids", "chosen_ids", "rejected_ids"]


# ------------------------------------------------------------------------------------------ helpers
def make_tokenizer(template, special=(), **named):
    """Some 400 tokens, byte-level, with ChatML's special ones and Qwen3's think tags."""
    bpe = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(WORDS), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    text = "the answer to the question is that there is no answer\n\n there"
    bpe.train_from_iterator([text] * 4, trainer)
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *special]
    bpe.add_special_tokens([AddedToken(name, special=True) for name in names])
    bpe.add_tokens(["<think>", "</think>"])
    named = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"} | named
    return PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=template, **named)


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


def make_job(
    name, columns=None, chat_strings=False, eval_pairs=0, mixture=None, script=None, **training
):
    """All settings of a run, as read_settings hands them on."""
    training = {"max_length": 512, "seed": 7} | training
    return dpotrainer.Job(
        settings=dpotrainer.Settings(
            columns=columns, chat_strings=chat_strings, eval_pairs=eval_pairs
        ),
        script_args=ScriptArguments(dataset_name=name and str(name), **script or {}),
        model_args=ModelConfig(),
        training_args=DPOConfig(use_cpu=True, bf16=False, output_dir="unused", **training),
        mixture_args=mixture or DatasetMixtureConfig(),
        missing_gpu="",
        origins={},
    )


def write(folder, rows, name="pairs.jsonl"):
    path = folder / name
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def load_file(path, tokenizer, **changes):
    """(all pairs as a list, the report as one line) of a file or folder."""
    found = dpotrainer.load_preferences(make_job(path, **changes), tokenizer)
    pairs = [*found.train, *(found.held_out or [])]
    return pairs, " ".join(" ".join(found.report).split())


def load(folder, rows, tokenizer, **changes):
    return load_file(write(folder, rows), tokenizer, **changes)


def refused(folder, rows, tokenizer, **changes):
    """The message of the error that loading these rows ends in."""
    with pytest.raises(dpotrainer.UserError) as error:
        load(folder, rows, tokenizer, **changes)
    return str(error.value)


def shown(tokenizer, pair):
    return [tokenizer.decode(pair[name]) for name in IDS]


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def system(text):
    return {"role": "system", "content": text}


def pair(prompt, chosen, rejected, **more):
    """A conversational row; a prompt of one turn, and answers, may be given as text."""
    prompt = [user(prompt)] if isinstance(prompt, str) else prompt
    return {
        "prompt": prompt,
        "chosen": [assistant(chosen)],
        "rejected": [assistant(rejected)],
        **more,
    }


def text_row(prompt="q", chosen="a", rejected="b", **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


# ------------------------------------------------------------------ the same pairs, however written
SINGLE = [
    pair("What is the answer?", "42", "41"),
    pair("Line one\r\nline two", "yes\r\n\tindented", "no 🙂🙃"),
    pair("你好，世界", "你好！", "你好！你也好"),  # one answer begins with the other
    pair("Human: is this a role?", "Human: the 🇩🇪 flag", "different from the first token"),
    pair("word " * 900, "long prompt", "is dropped"),
    pair("word", "long " * 900, "long " * 899 + "answers are cut and become equal"),
    pair("same", "same", "same"),
]
MANY = [
    pair([user("one"), assistant("two"), user("three")], "four", "five"),
    pair([user("one"), assistant("one"), user("one"), assistant("one"), user("one")], "one", "two"),
]
SYSTEM = [
    pair([system("Be brief."), user("hello"), assistant("hi"), user("more")], "less", "more of it")
]
OTHER_ROLES = {"user": "human", "assistant": "gpt", "system": "system"}


def as_texts(row):
    return {side: messages[-1]["content"] for side, messages in row.items()}


def as_conversations(row):
    """trl-lib/ultrafeedback_binarized."""
    sides = {side: row["prompt"] + row[side] for side in ("chosen", "rejected")}
    return {**sides, "score_chosen": 8.5, "score_rejected": 7.0}


def as_h4(row):
    """HuggingFaceH4/ultrafeedback_binarized."""
    full = as_conversations(row)
    return {
        "prompt": row["prompt"][-1]["content"],
        "prompt_id": "ab12",
        **full,
        "messages": full["chosen"],
    }


def as_argilla(row):
    """argilla/ultrafeedback-binarized-preferences-cleaned."""
    sides = {side: row["prompt"] + row[side] for side in ("chosen", "rejected")}
    prompt = next(turn["content"] for turn in row["prompt"] if turn["role"] == "user")
    return {
        "prompt": prompt,
        **sides,
        "chosen-rating": 5.0,
        "rejected-rating": 3.0,
        "chosen-model": "a",
    }


def as_transcripts(row):
    """Anthropic/hh-rlhf."""
    names = {"user": "Human", "assistant": "Assistant"}

    def text(messages):
        return "".join(f"\n\n{names[turn['role']]}: {turn['content']}" for turn in messages)

    return {side: text(row["prompt"] + row[side]) for side in ("chosen", "rejected")}


def as_transcript_prompt(row):
    """A transcript that ends where the answer begins, and answers alone."""
    prompt = as_transcripts({**row, "chosen": [assistant("")]})["chosen"]
    return {"prompt": prompt, "chosen": row["chosen"], "rejected": row["rejected"][0]["content"]}


def as_sharegpt(row):
    """LLaMA-Factory's and axolotl's."""

    def rename(turn):
        return {"from": OTHER_ROLES[turn["role"]], "value": turn["content"]}

    return {
        "conversations": [rename(turn) for turn in row["prompt"]],
        "chosen": rename(row["chosen"][0]),
        "rejected": rename(row["rejected"][0]),
    }


def as_sharegpt_with_answer(row):
    """The same, and the conversation goes on to the chosen answer."""
    turns = as_sharegpt(row)
    return {**turns, "conversations": [*turns["conversations"], turns["chosen"]]}


def as_messages_and_texts(row):
    """ms-swift's and OpenRLHF's: messages for the prompt, answers as text."""
    return {
        "messages": row["prompt"],
        "chosen": row["chosen"][0]["content"],
        "rejected": row["rejected"][0]["content"],
    }


def as_parts(row):
    """Contents as lists of parts."""

    def split(turn):
        half = len(turn["content"]) // 2
        parts = [turn["content"][:half], turn["content"][half:]]
        return {**turn, "content": [{"type": "text", "text": text} for text in parts]}

    return {side: [split(turn) for turn in turns] for side, turns in row.items()}


def as_json_text(row):
    return {side: json.dumps(turns) for side, turns in row.items()}


def as_system_column(row):
    """A system text beside turns that do not have it."""
    return {**row, "system": row["prompt"][0]["content"], "prompt": row["prompt"][1:]}


def as_system_beside_conversations(row):
    rest = as_conversations({**row, "prompt": row["prompt"][1:]})
    return {**rest, "system": system(row["prompt"][0]["content"])}


def as_openai(row):
    return {
        "input": {"messages": row["prompt"], "tools": [], "parallel_tool_calls": True},
        "preferred_output": row["chosen"],
        "non_preferred_output": row["rejected"],
    }


OPENAI = {
    "prompt": "input.messages",
    "chosen": "preferred_output",
    "rejected": "non_preferred_output",
}
LAYOUTS = {
    "messages": (lambda row: row, SINGLE + MANY + SYSTEM),
    "texts": (as_texts, SINGLE),
    "conversations": (as_conversations, SINGLE + MANY + SYSTEM),
    "h4": (as_h4, SINGLE + MANY + SYSTEM),
    "argilla": (as_argilla, SINGLE + MANY + SYSTEM),
    "transcripts": (as_transcripts, SINGLE + MANY),
    "transcript and answers": (as_transcript_prompt, SINGLE[:3] + SINGLE[4:] + MANY),
    "sharegpt": (as_sharegpt, SINGLE + MANY + SYSTEM),
    "sharegpt with answer": (as_sharegpt_with_answer, SINGLE + MANY + SYSTEM),
    "messages and texts": (as_messages_and_texts, SINGLE + MANY + SYSTEM),
    "parts": (as_parts, SINGLE + MANY + SYSTEM),
    "json text": (as_json_text, SINGLE + MANY + SYSTEM),
    "system column": (as_system_column, SYSTEM),
    "system beside conversations": (as_system_beside_conversations, SYSTEM),
}


@pytest.mark.parametrize("template", ["tokenizer", "qwen"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_same_pairs_in_every_layout_give_the_same_tokens(name, template, tmp_path, request):
    rewrite, rows = LAYOUTS[name]
    tokenizer = request.getfixturevalue(template)
    expected, told = load(tmp_path, rows, tokenizer)
    found, report = load(
        tmp_path, [rewrite(row) for row in rows], tokenizer, chat_strings=name == "texts"
    )
    assert found == expected
    assert report == told
    if rows[: len(SINGLE)] == SINGLE:
        assert "1 chosen equals rejected (rows 7); 1 equal after truncation (rows 6)" in report
        assert "1 prompt leaves no room (rows 5)" in report


def test_openais_nested_form(qwen, tmp_path):
    expected, _ = load(tmp_path, SINGLE[:4] + MANY + SYSTEM, qwen)
    rows = [as_openai(row) for row in SINGLE[:4] + MANY + SYSTEM]
    assert load(tmp_path, rows, qwen, columns=OPENAI)[0] == expected
    assert f"--columns '{json.dumps(OPENAI)}'" in refused(tmp_path, rows, qwen)


def test_layouts_may_change_from_row_to_row(tokenizer, tmp_path):
    rows = [SINGLE[0], as_json_text(SINGLE[1]), as_parts(SINGLE[2]), MANY[0]]
    assert (
        load(tmp_path, rows, tokenizer)[0] == load(tmp_path, [*SINGLE[:3], MANY[0]], tokenizer)[0]
    )


def test_columns_and_their_values(tokenizer, tmp_path):
    (found,), _ = load(tmp_path, [pair("hi", "yes", "no", topic="x")], tokenizer)
    tokens = ["prompt_tokens", "chosen_tokens", "rejected_tokens"]
    assert sorted(found) == sorted([*IDS, *tokens, "packed_tokens", "pair_hash", "prompt_hash"])
    assert shown(tokenizer, found) == [
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
        "yes<|im_end|>\n",
        "no<|im_end|>\n",
    ]
    assert [found[name] for name in tokens] == [len(found[name]) for name in IDS]


@pytest.mark.parametrize(
    "role, read",
    [
        ("human", "user"),
        ("prompter", "user"),
        ("observation", "tool"),
        ("gpt", "assistant"),
        ("chatgpt", "assistant"),
        ("model", "assistant"),
        ("Assistant", "assistant"),
        ("developer", "developer"),
    ],
)
def test_roles_of_other_trainers(role, read, tokenizer, tmp_path):
    row = pair([{"role": role, "text": "x"}, user("q")], "a", "b")
    (found,), _ = load(tmp_path, [row], tokenizer)
    assert tokenizer.decode(found["prompt_ids"]).startswith(
        f"<|im_start|>{read}\nx<|im_end|>\n<|im_start|>user\nq"
    )


def test_a_function_call_is_a_tool_call(qwen, tmp_path):
    call = {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'}
    turns = [{"from": "human", "value": "q"}, call, {"from": "observation", "value": "5"}]
    row = {"conversations": turns, "chosen": assistant("five"), "rejected": assistant("six")}
    (found,), _ = load(tmp_path, [row], qwen)
    assert '<tool_call>\n{"name": "f", "arguments": {"x": 1}}' in qwen.decode(found["prompt_ids"])


def test_answers_of_text_that_repeat_the_prompt_lose_it(tokenizer, tmp_path):
    rows = [
        text_row(f"the answer {i}:", f"the answer {i}: a", f"the answer {i}: b") for i in range(4)
    ]
    found, _ = load(tmp_path, rows, tokenizer)
    assert (
        found
        == load(tmp_path, [text_row(f"the answer {i}:", " a", " b") for i in range(4)], tokenizer)[
            0
        ]
    )


def test_answers_that_happen_to_begin_like_the_prompt_keep_it(tokenizer, tmp_path):
    rows = [text_row("Hi", "Hi there", "Hi you"), *(text_row(f"q{i}") for i in range(3))]
    assert shown(tokenizer, load(tmp_path, rows, tokenizer)[0][0])[1] == "Hi there<|im_end|>"


def test_a_prompt_repeated_in_one_or_both_answers_is_taken_out(tokenizer, tmp_path):
    rows = SYSTEM + MANY
    both = [{**as_conversations(row), "prompt": row["prompt"]} for row in rows]
    one = [{**row, "rejected": row["prompt"] + row["rejected"]} for row in rows]
    expected = load(tmp_path, rows, tokenizer)[0]
    assert load(tmp_path, both, tokenizer)[0] == load(tmp_path, one, tokenizer)[0] == expected


def test_the_blank_after_a_transcript_is_not_of_the_answer(tokenizer, tmp_path):
    row = text_row("\n\nHuman: q\n\nAssistant:", " yes", " no")
    whole = {"chosen": row["prompt"] + " yes", "rejected": row["prompt"] + " no"}
    expected = load(tmp_path, [whole], tokenizer)[0]
    assert shown(tokenizer, expected[0])[1] == "yes<|im_end|>\n"
    assert load(tmp_path, [row], tokenizer)[0] == expected
    # nor where the transcript is in a column of conversations
    other = {"conversation": row["prompt"], "chosen": " yes", "rejected": " no"}
    assert load(tmp_path, [other], tokenizer)[0] == expected
    # a column of messages beside it does not take the place of the prompt
    row["messages"] = [user("q"), assistant("in other words")]
    assert load(tmp_path, [row], tokenizer)[0] == expected


def test_transcripts_that_part_early_keep_the_last_shared_question(tokenizer, tmp_path):
    asked = "\n\nHuman: a\n\nAssistant: "
    rows = [
        (f"{asked}b\n\nHuman: c\n\nAssistant: d", f"{asked}B\n\nHuman: C\n\nAssistant: D"),
        (f"{asked}b".replace("\n\n", "\r\n\r\n"), f"{asked}b\n\nHuman: c\n\nAssistant: d".lstrip()),
        (asked, f"{asked}b"),
        ("", f"{asked}b"),
    ]
    rows = [{"chosen": chosen, "rejected": rejected} for chosen, rejected in rows]
    found, report = load(tmp_path, rows, tokenizer)
    assert "2 empty side (rows 3, 4)" in report
    assert "2 of 4 rows: user turns inside the answers" in report
    turns = "<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n"
    prompt, chosen, rejected = shown(tokenizer, found[0])
    assert prompt == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert (chosen, rejected) == ("b" + turns.format("c", "d"), "B" + turns.format("C", "D"))
    assert shown(tokenizer, found[1])[:2] == [prompt, "b<|im_end|>\n"]


def test_a_tool_turn_can_be_the_last_of_the_prompt(tokenizer, tmp_path):
    call = assistant(None, tool_calls=[{"function": {"name": "f", "arguments": "{}"}}])
    prompt = [user("q"), call, {"role": "tool", "content": "5"}]
    row = {"chosen": [*prompt, assistant("it is 5")], "rejected": [*prompt, assistant("it is 6")]}
    assert (
        load(tmp_path, [row], tokenizer)[0]
        == load(tmp_path, [pair(prompt, "it is 5", "it is 6")], tokenizer)[0]
    )


def test_answers_of_several_turns_are_kept_whole(tokenizer, tmp_path):
    shared = {"chosen": assistant("let me see"), "rejected": assistant("let me see")}
    rows = [
        {"prompt": "q", "chosen": [assistant("hm"), assistant("a")], "rejected": "b"},
        {side: [user("q"), turn, assistant(side)] for side, turn in shared.items()},
    ]
    found, _ = load(tmp_path, rows, tokenizer)
    first, second = (shown(tokenizer, row) for row in found)
    assert first[0] == second[0] == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert first[1] == "hm<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
    assert second[1] == "let me see<|im_end|>\n<|im_start|>assistant\nchosen<|im_end|>\n"


def test_a_late_system_turn_belongs_to_the_prompt(tokenizer, tmp_path):
    prompt = [user("q"), assistant("a"), system("now in rhyme")]
    row = {"chosen": [*prompt, assistant("hey")], "rejected": [*prompt, assistant("no")]}
    assert (
        load(tmp_path, [row], tokenizer)[0]
        == load(tmp_path, [pair(prompt, "hey", "no")], tokenizer)[0]
    )


# ------------------------------------------------------------------------------ dropped and counted
BAD = {
    "tied scores": [
        as_conversations(pair("q", "a", "b")) | {"score_chosen": 7, "score_rejected": 7},
        pair("q", "a", "b", status="tie"),
    ],
    "chosen equals rejected": [
        as_conversations(pair("q", "a", "a")),
    ],
    "answers differ in white space alone": [
        pair("q", "a b", "a\n b\u200b "),
        pair("q", "a", "\ufeffa"),
    ],
    "empty side": [
        pair("q", " \n", "b"),
        pair("q", "a", ""),
        pair(" ", "a", "b"),
        pair("q", "a", "b") | {"chosen": []},
        pair("q", "a", "b") | {"rejected": None},
        pair("q", None, "b"),
        pair("q", "\u200b", "b"),
        {"chosen": [user("q")], "rejected": [user("q"), assistant("b")]},
        {"chosen": [assistant("a")], "rejected": [assistant("b")]},
    ],
    "no final assistant turn": [
        {
            "chosen": [user("q"), assistant("a"), user("thanks")],
            "rejected": [user("q"), assistant("b")],
        },
    ],
    "prompt ends in an answer": [pair([user("q"), assistant("a")], "b", "c")],
    "histories differ": [
        {"chosen": [user("q"), assistant("a")], "rejected": [user("p"), assistant("b")]},
        {"chosen": [system("s"), assistant("a")], "rejected": [system("s"), assistant("b")]},
        {"chosen": [user("q"), assistant("a")], "rejected": [assistant("b")]},
    ],
    "prompt leaves no room": [as_conversations(pair("word " * 600, "a", "b"))],
    "equal after truncation": [
        as_conversations(pair("q", "word " * 600 + "a", "word " * 600 + "b"))
    ],
}


@pytest.mark.parametrize("reason", BAD)
def test_bad_pairs_are_dropped_and_counted(reason, tokenizer, tmp_path):
    good = [as_conversations(pair(f"question {i}", "a", "b")) for i in range(9)]
    kept, report = load(tmp_path, [good[0], *BAD[reason], *good[1:]], tokenizer)
    rows = [str(2 + i) for i in range(len(BAD[reason]))]
    more = ", ..." if len(rows) > 5 else ""
    assert f"dropped train: {len(rows)} {reason} (rows {', '.join(rows[:5])}{more})" in report
    assert len(kept) == 9


def test_nothing_is_reported_where_nothing_is_wrong(tokenizer, tmp_path):
    path = write(tmp_path, [pair(f"q{i}", "a", "b", source="x") for i in range(5)])
    report = dpotrainer.load_preferences(make_job(path), tokenizer).report
    assert " ".join(" ".join(report).split()) == f"data {path}: 5 pairs to train on, 0 held out"


def test_the_report_of_everything_fits_the_screen(tokenizer, tmp_path):
    rows = [row for rows in BAD.values() for row in rows] + [
        pair(f"q{i % 22}", "a", "b") for i in range(30)
    ]
    report = dpotrainer.load_preferences(make_job(write(tmp_path, rows)), tokenizer).report
    assert max(map(len, report[2:])) <= 79  # the first names the file, which a test cannot choose
    text = " ".join(" ".join(report).split())
    assert all(f"{len(bad)} {reason} (rows" in text for reason, bad in BAD.items())
    assert "! train: 8 pairs repeat others" in text


@pytest.mark.parametrize(
    "scores", [(math.nan, math.nan), (None, None), (None, 3.0), (2, 1), ("", ""), ("a", "a")]
)
def test_only_equal_numbers_are_ties(scores, tokenizer, tmp_path):
    rows = [pair("q", "a", "b", score_chosen=scores[0], score_rejected=scores[1])]
    pairs, report = load(tmp_path, rows, tokenizer)
    assert len(pairs) == 1 and "!" not in report


@pytest.mark.parametrize(
    "names",
    [
        ("score_chosen", "score_rejected"),
        ("chosen_score", "rejected_score"),
        ("chosen-rating", "rejected-rating"),
        ("chosen_rating", "rejected_rating"),
        ("rating_chosen", "rating_rejected"),
    ],
)
def test_ties_and_contradictions_are_found_in_every_known_pair_of_score_columns(
    names, tokenizer, tmp_path
):
    scores = [("1.50", "1.5"), (1, 2), (2, 1), (3, 1)]
    rows = [
        pair(f"q{i}", "a", "b") | dict(zip(names, map(str, both))) for i, both in enumerate(scores)
    ]
    _, report = load(tmp_path, rows, tokenizer)
    assert "1 tied scores (rows 1)" in report
    assert "! train: 1 of 4 rows: the rejected answer has the higher score" in report


def test_a_tie_of_one_scorer_is_none_where_another_tells_them_apart(tokenizer, tmp_path):
    more = {"score_chosen": 5, "score_rejected": 5, "chosen_rating": 5, "rejected_rating": 2}
    assert len(load(tmp_path, [pair("q", "a", "b", **more)], tokenizer)[0]) == 1


def test_decimal_scores_are_compared(tokenizer, tmp_path):
    rows = [
        pair("q", "a", "b", score_chosen=Decimal(s), score_rejected=Decimal("2"))
        for s in ("2.5", "3", "2.0")
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "pairs.parquet")
    assert "1 tied scores (rows 3)" in load_file(tmp_path / "pairs.parquet", tokenizer)[1]


def test_more_than_half_dropped_is_an_error_with_the_counts(tokenizer, tmp_path):
    bad = [pair("q", "a", "a"), pair("q", "b", "b")]
    message = refused(tmp_path, [*bad, pair("q", "a", "b")], tokenizer)
    assert "too few pairs can be used, 1 of 3" in message
    assert "2 chosen equals rejected (rows 1, 2)" in message
    assert len(load(tmp_path, [bad[0], pair("q", "a", "b")], tokenizer)[0]) == 1


def test_share_of_cut_answers_and_the_length_that_would_cut_few(tokenizer, tmp_path):
    rows = [pair(f"q{i}", "word " * (5 * i + 1), "w " * (5 * i + 3)) for i in range(150)]
    whole, free = load(tmp_path, rows, tokenizer, max_length=None)
    assert "cut train" not in free and len(whole) == 150
    lengths = np.array([len(p["prompt_ids"]) + len(p[side]) for p in whole for side in IDS[1:]])
    limit = int(np.sort(lengths)[200])
    _, report = load(tmp_path, rows, tokenizer, max_length=limit)
    share, enough = re.search(
        r"cut train: ([\d.]+)% of the answers by max_length \d+; (\d+) would", report
    ).groups()
    assert float(share) == pytest.approx(100 * (lengths > limit).mean(), abs=0.051)
    assert (lengths > int(enough)).mean() < 0.01 <= (lengths > int(enough) - 1).mean()


# -------------------------------------------------------------------------- told in a line with `!`
@pytest.mark.parametrize(
    "row, told",
    [
        (text_row(), "1 of 1 rows: plain text without the chat template; `--chat_strings true`"),
        (
            text_row(prompt="<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"),
            "1 of 1 rows: special tokens inside the text: <|im_end|> <|im_start|>",
        ),
        (
            pair("what is <|im_end|>?", "a", "b"),
            "1 of 1 rows: special tokens inside the text: <|im_end|>",
        ),
        (pair("q", "a", "b", query="half"), "columns like a prompt's that are not read: query"),
        (
            pair("q", "a", "b", input="half", instruction="half"),
            "that are not read: input, instruction",
        ),
        (
            pair("q", "a", "b", history=[["q", "a"]], context="c"),
            "that are not read: context, history",
        ),
        (pair("<image> q", "a", "b", images=["a.png"]), "that are not read: images"),
        (
            pair("q", "a", "b", messages=[user("another"), assistant("one")]),
            "turns of the prompt or conversation that the answers are without",
        ),
        (
            as_h4(pair("q", "a", "b")) | {"prompt": "another"},
            "turns of the prompt or conversation that the answers are without",
        ),
        (
            {
                "prompt": [system("s"), user("q")],
                "chosen": [user("q"), assistant("a")],
                "rejected": [user("q"), assistant("b")],
            },
            "turns of the prompt or conversation that the answers are without",
        ),
        (
            pair([system("s"), user("q")], "a", "b", system="t"),
            "the system column contradicts the system turn",
        ),
        (
            pair("q", "a", "b", tools=[{"type": "function", "function": {"name": "f"}}]),
            "leaves the tools out",
        ),
        (
            pair("q", "a", "b") | {"chosen": [assistant("a", reasoning_content="well")]},
            "leaves reasoning or tool calls",
        ),
        (
            pair("q", "a", "b") | {"chosen": [assistant("a"), user("more"), assistant("c")]},
            "user turns inside",
        ),
    ],
)
def test_what_may_be_wrong_is_told_with_its_count(row, told, tokenizer, tmp_path):
    pairs, report = load(tmp_path, [row], tokenizer)
    assert len(pairs) == 1
    assert re.search("! train: [^!]*" + re.escape(told), report), report


@pytest.mark.parametrize(
    "row",
    [
        pair("q", "a", "b", query=None, source="x", images=[]),
        as_h4(pair("q", "a", "b")),
        as_h4(MANY[0]),
        as_argilla(SYSTEM[0]),
        as_sharegpt(SYSTEM[0]),
        pair("q", "a", "b", messages=[user("q"), assistant("a")]),
        pair([system("s"), user("q")], "a", "b", system="s"),
        pair("q", "a", "b", system=""),
        pair("q", "a", "b", tools=[]),
    ],
)
def test_what_is_right_is_not_told(row, tokenizer, tmp_path):
    pairs, report = load(tmp_path, [row], tokenizer)
    assert len(pairs) == 1 and "!" not in report, report


def test_plain_text_is_right_without_a_template(tmp_path):
    assert "!" not in load(tmp_path, [text_row()], make_tokenizer(None))[1]


def test_splits_that_are_not_read_are_told(tokenizer, tmp_path):
    for name in ("train", "test", "validation"):
        write(tmp_path, [pair(f"{name} {i}", "a", "b") for i in range(9)], f"{name}.jsonl")
    found = dpotrainer.load_preferences(make_job(tmp_path), tokenizer)
    assert (len(found.train), len(found.held_out)) == (9, 9)
    assert "test" in tokenizer.decode(found.held_out[0]["prompt_ids"])
    assert "! splits that are not read: validation (9 rows)" in found.report


# ------------------------------------------------------------------------------------------ columns
@pytest.mark.parametrize(
    "row, line",
    [
        (
            {"question": "q", "response_j": "a", "response_k": "b"},
            {"prompt": "question", "chosen": "response_j", "rejected": "response_k"},
        ),
        (
            {
                "instruction": "q",
                "chosen_response": "a",
                "rejected_response": "b",
                "system_prompt": "s",
            },
            {
                "prompt": "instruction",
                "chosen": "chosen_response",
                "rejected": "rejected_response",
                "system": "system_prompt",
            },
        ),
        ({"query": "q", "chosen": "a", "rejected": "b"}, {"prompt": "query"}),
    ],
)
def test_the_refusal_of_known_names_ends_with_a_line_that_works(row, line, tokenizer, tmp_path):
    message = refused(tmp_path, [row], tokenizer)
    assert f"it has {', '.join(row)}\n" in message
    given = json.loads(re.search("--columns '(.*)'$", message)[1])
    assert given == line
    found, report = load(tmp_path, [row], tokenizer, columns=given, chat_strings=True)
    prompt = [user("q")]
    if "system" in line:
        prompt = [system("s"), user("q")]
    assert found == load(tmp_path, [pair(prompt, "a", "b")], tokenizer)[0]
    assert "!" not in report


def test_the_advised_line_keeps_what_was_given(tokenizer, tmp_path):
    row = {"question": "q", "good": "a", "bad": "b"}
    message = refused(tmp_path, [row], tokenizer, columns={"chosen": "good"})
    advised = json.loads(re.search("--columns '(.*)'$", message)[1])
    assert advised == {"prompt": "question", "chosen": "good", "rejected": "bad"}
    assert len(load(tmp_path, [row], tokenizer, columns=advised)[0]) == 1


def test_a_column_with_a_dot_in_its_name(tokenizer, tmp_path):
    row = {"a.b": "q", "chosen": [assistant("a")], "rejected": [assistant("b")]}
    expected = load(tmp_path, [pair("q", "a", "b")], tokenizer)[0]
    assert load(tmp_path, [row], tokenizer, columns={"prompt": "a.b"})[0] == expected


def test_a_mapping_goes_before_a_column_of_that_name_which_is_told(tokenizer, tmp_path):
    rows = [pair("q", "a", "b") | {"prompt": "a template", "question": "q"}]
    found, report = load(tmp_path, rows, tokenizer, columns={"prompt": "question"})
    assert found == load(tmp_path, [pair("q", "a", "b")], tokenizer)[0]
    assert "not read: prompt" in report


@pytest.mark.parametrize(
    "columns, said",
    [
        ({"prompt": "frage"}, "has no frage for prompt; it has prompt, chosen, rejected"),
        (
            {"prompt": "prompt.text"},
            "has no prompt.text for prompt; it has prompt, chosen, rejected",
        ),
        (
            {"answer": "chosen"},
            "columns: answer is none of prompt, chosen, rejected, system, tools",
        ),
        ({"prompt": ["prompt", "chosen"]}, "columns: prompt must be the name of one column, not ["),
        ({"system": None}, "columns: system must be the name of one column, not None"),
        ({"prompt": 1}, "columns: prompt must be the name of one column, not 1"),
    ],
)
def test_a_mapping_to_what_is_not_there_is_one_line(columns, said, tokenizer, tmp_path):
    message = refused(tmp_path, [text_row()], tokenizer, columns=columns)
    assert said in message and "\n" not in message


@pytest.mark.parametrize(
    "row, said",
    [
        ({"prompt": "q", "completion": "a", "label": True}, "`trl kto`"),
        ({"prompt": "q", "response_a": "a", "response_b": "b", "winner": "a"}, "a winner column"),
        ({"prompt": "q", "chosen": "a", "rejected": ["b", "c"]}, "several answers"),
        ({"chosen": "a", "rejected": "b"}, "no column is prompt; it has chosen, rejected"),
        (
            {"text": "a"},
            "no column is prompt or chosen or rejected; it has text\nsay which columns hold what",
        ),
    ],
)
def test_what_are_no_pairs_is_named(row, said, tokenizer, tmp_path):
    assert said in refused(tmp_path, [row] * 2, tokenizer)


# ------------------------------------------------------------------------------ what cannot be read
@pytest.mark.parametrize(
    "row, said",
    [
        (
            pair([{"role": "narrator", "content": "x"}], "a", "b"),
            "'narrator' is no role; one of system, ",
        ),
        (pair([{"role": None, "content": "x"}], "a", "b"), "'none' is no role"),
        (
            pair([user([{"type": "image_url", "image_url": "x"}])], "a", "b"),
            "only text can be trained on, not {'type",
        ),
        (pair("q", "a", "b") | {"prompt": [5]}, "'5' stands where a message should be"),
        (
            pair("q", "a", "b") | {"chosen": "[{'role': 'user'}]"},
            "messages as text that is no JSON",
        ),
    ],
)
@pytest.mark.parametrize("processes", [None, 2])
def test_a_row_that_cannot_be_read_is_named(row, said, processes, tokenizer, tmp_path):
    rows = [pair("q", "a", "b")] * 3 + [row]
    message = refused(tmp_path, rows, tokenizer, dataset_num_proc=processes)
    assert "pairs.jsonl (train), row 4: " in message
    assert said in message


@pytest.mark.parametrize(
    "content, said",
    [
        (b'{"prompt": "q"}\n\n{"prompt": ', "row 3: Expecting value"),
        (b'{"prompt": "q"}\n\\\n', "row 2: Expecting value"),
        (
            '{"prompt": "q"}\n{"prompt": "你"}\n'.encode("gbk"),
            "row 2: it is not UTF-8; save it as UTF-8",
        ),
        (b"", "the file is empty"),
    ],
)
def test_a_broken_file_is_named_with_the_row(content, said, tokenizer, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(content)
    names = [path]
    if content:
        names.append(tmp_path)
    for name in names:
        with pytest.raises(dpotrainer.UserError) as error:
            load_file(name, tokenizer)
        assert "pairs.jsonl" in str(error.value) and said in str(error.value)


def test_a_csv_file_that_is_not_utf8_is_named_with_the_row(tokenizer, tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_bytes("prompt,chosen,rejected\nq,é,n\n".encode("cp1252"))
    with pytest.raises(
        dpotrainer.UserError, match=r"pairs.csv, line 2: it is not UTF-8; save it as UTF-8"
    ):
        load_file(path, tokenizer)


def test_a_late_row_that_is_not_utf8_is_named(tokenizer, tmp_path):
    lines = [json.dumps(text_row(f"q{i}")).encode() for i in range(300)]
    lines[250] = '{"prompt": "q", "chosen": "你", "rejected": "b"}'.encode("gbk")
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(dpotrainer.UserError, match=r"pairs.jsonl, row 251: it is not UTF-8"):
        load_file(path, tokenizer)


def test_an_extra_key_in_a_late_row_is_named(tokenizer, tmp_path):
    rows = [
        text_row(chosen="a" * 1000) for _ in range(12_000)
    ]  # longer than what the reader looks at first
    rows[11_000]["more"] = 1
    assert "row 11001: more is not in every row" in refused(tmp_path, rows, tokenizer)


def test_a_json_array_that_is_broken_names_the_line(tokenizer, tmp_path):
    path = tmp_path / "pairs.json"
    path.write_text('[{"prompt": "a"},\n{"prompt": }]')
    with pytest.raises(
        dpotrainer.UserError, match=r"pairs.json, row 1: Expecting value: line 2 column 12"
    ):
        load_file(path, tokenizer)


def test_what_holds_no_pairs_is_refused(tokenizer, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "header.csv").write_text("prompt,chosen,rejected\n")
    (tmp_path / "pairs.txt").write_text("x")
    said = {
        "folder": "no file ends in .json,",
        "header.csv": "no data",
        "pairs.txt": "no file ends in .json",
    }
    for name, words in said.items():
        with pytest.raises(dpotrainer.UserError, match=words) as error:
            load_file(tmp_path / name, tokenizer)
        assert name in str(error.value)


def test_messages_without_a_chat_template_are_refused_with_the_fix(tmp_path):
    bare = make_tokenizer(None)
    assert "save a chat_template.jinja" in refused(tmp_path, [pair("q", "a", "b")], bare)
    assert "save a chat_template.jinja" in refused(tmp_path, [text_row()], bare, chat_strings=True)


def test_a_template_that_refuses_a_conversation_names_the_row(tmp_path):
    refusal = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    )
    assert "row 2: no system here" in refused(
        tmp_path, [MANY[0], *SYSTEM], make_tokenizer(refusal + CHATML)
    )


# -------------------------------------------------------------------------------- files and folders
def write_as(path, rows):
    """Rows in the format that the ending of `path` says."""
    table = datasets.Dataset.from_list(rows)
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".gz":
        with gzip.open(path, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    elif path.suffix == ".ndjson":
        write(path.parent, rows, path.name)
    elif path.suffix == ".tsv":
        table.to_csv(path, sep="\t")
    elif path.suffix == "":
        table.save_to_disk(path)
    else:
        getattr(table, f"to_{path.suffix[1:]}")(path)


@pytest.mark.parametrize(
    "name",
    [
        "other.json",
        "other.ndjson",
        "other.jsonl.gz",
        "other.parquet",
        "other.csv",
        "other.tsv",
        "saved",
        "a[1].parquet",
    ],
)
def test_every_kind_of_file_gives_the_same_pairs(name, tokenizer, tmp_path):
    rows = [as_texts(row) for row in SINGLE] + [
        text_row("Which?", "None", "NA"),
        text_row("How many?", "007", "7"),
    ]
    expected, _ = load(tmp_path, rows, tokenizer)
    write_as(tmp_path / name, rows)
    assert load_file(tmp_path / name, tokenizer)[0] == expected


def test_a_saved_dict_of_splits(tokenizer, tmp_path):
    parts = {name: datasets.Dataset.from_list([pair(name, "a", "b")]) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    found = dpotrainer.load_preferences(make_job(tmp_path / "saved"), tokenizer)
    assert (len(found.train), len(found.held_out)) == (1, 1)


def test_a_folder_with_brackets_is_read(tokenizer, tmp_path):
    folder = tmp_path / "a[1]"
    folder.mkdir()
    expected, _ = load_file(write(folder, MANY, "train.jsonl"), tokenizer)
    write(folder, MANY, "test.jsonl")
    found = dpotrainer.load_preferences(make_job(folder), tokenizer)
    assert [*found.train] == [*found.held_out] == expected


def test_a_folder_of_csv_files_reads_as_a_file_does(tokenizer, tmp_path):
    path = tmp_path / "folder" / "a.csv"
    path.parent.mkdir()
    path.write_text("prompt,chosen,rejected\nq,None,no\nq,NA,no\nq,3,4\nq,,no\n")
    for name in (path.parent, path):
        pairs, report = load_file(name, tokenizer, chat_strings=True)
        assert len(pairs) == 3 and "1 empty side (rows 4)" in report
        assert shown(tokenizer, pairs[2])[1] == "3<|im_end|>\n"


def test_of_a_folder_of_several_kinds_what_is_not_read_is_told(tokenizer, tmp_path, capsys):
    rows = [pair(f"q{i}", "a", "b") for i in range(4)]
    write(tmp_path, rows[:2], "a.jsonl")
    write(tmp_path, rows[2:], "b.jsonl")
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / "README.md").write_text("what this is\n")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "x.csv").write_text("a,b\n1,2\n")
    assert len(load_file(tmp_path, tokenizer)[0]) == 4
    assert "not read" not in capsys.readouterr().out
    (tmp_path / "notes.csv").write_text("a,b\n1,2\n")
    assert len(load_file(tmp_path, tokenizer)[0]) == 4
    assert "! files that are not read: notes.csv" in capsys.readouterr().out


def test_a_folder_of_several_kinds_whose_name_is_a_pattern_is_refused(tokenizer, tmp_path):
    folder = tmp_path / "a[1]"
    folder.mkdir()
    write(folder, [pair("another", "a", "b", row=1), {"other": "keys"}], "more.json")
    write(folder, [pair("q", "a", "b")], "pairs.jsonl")
    (folder / "notes.csv").write_text("a,b\n1,2\n")
    with pytest.raises(dpotrainer.UserError, match=r"several kinds, \.csv, \.json, \.jsonl; name"):
        load_file(folder, tokenizer)


def test_files_beside_those_of_the_splits_are_told(tokenizer, tmp_path, capsys):
    rows = [pair(f"q{i}", "a", "b") for i in range(4)]
    write(tmp_path, rows, "train.jsonl")
    write(tmp_path, rows, "test.jsonl")
    (tmp_path / "stats.csv").write_text("a,b\n1,2\n")
    found = dpotrainer.load_preferences(make_job(tmp_path), tokenizer)
    assert (len(found.train), len(found.held_out)) == (4, 4)
    assert "! files that are not read: stats.csv" in capsys.readouterr().out


def test_a_folder_is_read_as_its_readme_says(tokenizer, tmp_path):
    configs = [
        {"config_name": name, "data_files": [{"split": "train", "path": f"{name}.csv"}]}
        for name in ("x", "y")
    ]
    (tmp_path / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    (tmp_path / "x.csv").write_text("prompt,chosen,rejected\nq,007,b\n")
    (tmp_path / "y.csv").write_text("id,prompt,chosen,rejected\n1,q,a,b\n1,q,c,d\n")
    more = {"chat_strings": True, "script": {"dataset_config": "x"}}
    [read], _ = load_file(tmp_path, tokenizer, **more)
    assert shown(tokenizer, read)[1] == "007<|im_end|>\n"


def test_columns_of_two_tables_may_be_in_another_order(tokenizer, tmp_path):
    (tmp_path / "train.csv").write_text('"prompt",chosen,rejected\nq,a,b\n')
    (tmp_path / "test.csv").write_text("rejected,prompt,chosen\nb,q,a\n")
    found = dpotrainer.load_preferences(make_job(tmp_path, chat_strings=True), tokenizer)
    assert [*found.train] == [*found.held_out]


def test_tables_with_different_separators_or_columns_are_refused(tokenizer, tmp_path):
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected\nq,a,b\n")
    (tmp_path / "b.tsv").write_text("prompt\tchosen\trejected\nq\ta\tb\n")
    with pytest.raises(dpotrainer.UserError, match=r"several kinds, \.csv, \.tsv"):
        load_file(tmp_path, tokenizer)
    (tmp_path / "b.tsv").unlink()
    (tmp_path / "b.csv").write_text("id,prompt,chosen,rejected\n1,q,a,b\n")
    with pytest.raises(dpotrainer.UserError, match=r"b\.csv and a\.csv have different columns"):
        load_file(tmp_path, tokenizer)


@pytest.mark.parametrize("content", [b"no gzip", gzip.compress(b'{"prompt": "q"}' * 99)[:-9]])
def test_a_broken_gzip_file_is_refused(content, tokenizer, tmp_path):
    (tmp_path / "pairs.jsonl.gz").write_bytes(content)
    with pytest.raises(dpotrainer.UserError, match="it is no whole gzip file"):
        load_file(tmp_path / "pairs.jsonl.gz", tokenizer)


def test_a_configuration_of_a_file_is_refused(tokenizer, tmp_path):
    path = write(tmp_path, MANY)
    with pytest.raises(dpotrainer.UserError, match="dataset_config=x chooses nothing there"):
        load_file(path, tokenizer, script={"dataset_config": "x"})


def test_a_full_disk_is_not_a_wrong_name(tokenizer, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(OSError, match="No space left"):
        load(tmp_path, MANY, tokenizer)


def test_a_tsv_without_quoting_keeps_its_quotes(tokenizer, tmp_path):
    """Read as Excel writes, two of these four rows would end up inside a cell."""
    rows = [
        ("q1", '"Well" is a word', "no"),
        ("q2", '"Bye now', "x"),
        ("q3", 'a "b" c', "d"),
        ("q4", '"e', "f"),
    ]
    lines = ["\t".join(row) + "\n" for row in [("prompt", "chosen", "rejected"), *rows]]
    for name in ("pairs.tsv", "pairs.tsv.gz"):
        opened = gzip.open if name.endswith(".gz") else open
        with opened(tmp_path / name, "wt", encoding="utf-8") as file:
            file.writelines(lines)
        pairs, _ = load_file(tmp_path / name, tokenizer, chat_strings=True)
        answers = [shown(tokenizer, read)[1].removesuffix("<|im_end|>\n") for read in pairs]
        assert answers == [chosen for _, chosen, _ in rows]


def test_a_tsv_with_quoting_loses_its_quotes(tokenizer, tmp_path):
    (tmp_path / "pairs.tsv").write_text(
        'prompt\tchosen\trejected\nq\t"one\n""two""\t3"\tno\nq\tb\tc\n'
    )
    pairs, _ = load_file(tmp_path / "pairs.tsv", tokenizer, chat_strings=True)
    assert len(pairs) == 2
    assert shown(tokenizer, pairs[0])[1] == 'one\n"two"\t3<|im_end|>\n'


@pytest.mark.parametrize(
    "text",
    [
        'prompt\tchosen\trejected\na\tb\t"l1\nl2"\nd\t"b" x\tc\n',  # lines are not rows
        'prompt\tchosen\trejected\na\t"b\tx"\tc\nd\t"b" x\tc\n',
    ],
)
def test_a_tsv_with_and_without_quoting_is_refused(text, tokenizer, tmp_path):
    (tmp_path / "pairs.tsv").write_text(text)
    with pytest.raises(dpotrainer.UserError, match="a quote inside a cell is written twice"):
        load_file(tmp_path / "pairs.tsv", tokenizer)


@pytest.mark.parametrize("cell", ['"Well" is a word', '"Bye now'])
def test_a_stray_quote_in_a_csv_is_refused(cell, tokenizer, tmp_path):
    (tmp_path / "pairs.csv").write_text(
        f"prompt,chosen,rejected\nq,{cell},no\nq,a,b\n", encoding="utf-8"
    )
    with pytest.raises(dpotrainer.UserError) as caught:
        load_file(tmp_path / "pairs.csv", tokenizer)
    message = str(caught.value)
    assert "pairs.csv, line " in message and "a quote inside a cell is written twice" in message


def test_the_csv_of_a_german_excel_is_read(tokenizer, tmp_path):
    text = "prompt;chosen;rejected\n" + "".join(f'q{i};"a, 1,5; x";b\n' for i in range(4))
    (tmp_path / "pairs.csv").write_text(text, encoding="utf-8-sig")
    rows = [{"prompt": f"q{i}", "chosen": "a, 1,5; x", "rejected": "b"} for i in range(4)]
    found = load_file(tmp_path / "pairs.csv", tokenizer)[0]
    assert found == load_file(write(tmp_path, rows, "same.jsonl"), tokenizer)[0]


def test_a_late_row_of_a_compressed_file_is_named(tokenizer, tmp_path):
    rows = [json.dumps(pair(f"q{i}", "a", "b")) for i in range(3)]
    rows[2] = rows[2][:-5]
    (tmp_path / "pairs.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    with pytest.raises(dpotrainer.UserError, match=r"pairs\.jsonl\.gz, row 3: "):
        load_file(tmp_path / "pairs.jsonl.gz", tokenizer)


@pytest.mark.parametrize(
    "answer",
    ['{"value": 5}', '{"from": "Paris", "to": "Rome"}', '{"content": "x"} and more', "[1, 2"],
)
def test_an_answer_that_is_json_is_text(answer, tokenizer, tmp_path):
    rows = [{"prompt": f"q{i}", "chosen": answer, "rejected": "b"} for i in range(4)]
    for found in load_file(write(tmp_path, rows), tokenizer)[0]:
        assert tokenizer.decode(found["chosen_ids"]).startswith(answer)


def test_messages_as_json_with_other_keys_first_are_messages(tokenizer, tmp_path):
    plain = [as_conversations(pair(f"q{i}", "a", "b")) for i in range(4)]
    coded = [
        {
            side: json.dumps([{"id": 1, **turn} for turn in row[side]])
            for side in ("chosen", "rejected")
        }
        for row in plain
    ]
    found = load_file(write(tmp_path, coded, "coded.jsonl"), tokenizer)[0]
    assert found == load_file(write(tmp_path, plain, "plain.jsonl"), tokenizer)[0]


def test_a_conversation_in_an_odd_form_beside_whole_answers_is_told(tokenizer, tmp_path):
    """As argilla's capybara pairs have it."""
    plain = [as_conversations(pair(f"q{i}", "a", "b")) for i in range(4)]
    rows = [row | {"conversation": [{"input": "q", "output": "a"}]} for row in plain]
    found, report = load_file(write(tmp_path, rows, "odd.jsonl"), tokenizer)
    assert found == load_file(write(tmp_path, plain, "plain.jsonl"), tokenizer)[0]
    assert "4 of 4 rows: a conversation column in a form that is not known" in report


def test_rows_without_system_text_are_chats_beside_rows_with_it(tokenizer, tmp_path):
    texts = {"chosen": "a", "rejected": "b"}
    rows = [{"prompt": f"q{i}", "system": "Be brief." if i else ""} | texts for i in range(4)]
    for found in load_file(write(tmp_path, rows), tokenizer)[0]:
        assert "<|im_start|>user" in tokenizer.decode(found["prompt_ids"])


def test_an_empty_prompt_beside_messages_is_filled_from_them(tokenizer, tmp_path):
    texts = {"prompt": "", "chosen": "a", "rejected": "b"}
    rows = [texts | {"messages": [user(f"q{i}")]} for i in range(4)]
    for i, found in enumerate(load_file(write(tmp_path, rows), tokenizer)[0]):
        assert f"q{i}" in tokenizer.decode(found["prompt_ids"])


def test_pairs_of_one_prompt_are_held_out_together(tokenizer, tmp_path):
    rows = [pair(f"q{i}", "a", f"b{j}") for i in range(50) for j in range(4)]
    found = dpotrainer.load_preferences(make_job(write(tmp_path, rows), eval_pairs=40), tokenizer)
    assert len(found.held_out) == 40
    assert not set(found.train["prompt_hash"][:]) & set(found.held_out["prompt_hash"][:])


@pytest.mark.parametrize(
    "columns, fitting",
    [
        ({"instruction": "q", "input": "more"}, "instruction"),
        ({"question": "q", "context": "c"}, "question"),
        ({"question": ""}, "..."),
    ],
)
def test_the_first_name_that_is_filled_is_advised(columns, fitting, tokenizer, tmp_path):
    rows = [columns | {"chosen": None if i == 1 else "a", "rejected": "b"} for i in range(3)]
    with pytest.raises(dpotrainer.UserError) as caught:
        load_file(write(tmp_path, rows), tokenizer)
    assert f'--columns \'{{"prompt": "{fitting}"}}\'' in str(caught.value)


# ------------------------------------------------------------------------ splits and held-out pairs
def write_splits(folder, names):
    """A folder whose card declares these splits, one pair each, named after the split."""
    files = []
    for name in names:
        datasets.Dataset.from_list([pair(name, "a", "b")]).to_parquet(folder / f"{name}.parquet")
        files.append({"split": name, "path": f"{name}.parquet"})
    card = {"configs": [{"config_name": "mine", "data_files": files}]}
    (folder / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n")


@pytest.mark.parametrize(
    "names, script, expected",
    [
        (("train", "test", "train_prefs", "test_prefs"), {}, ("train", "test")),
        (("train_prefs", "test_prefs", "train_sft"), {}, ("train_prefs", "test_prefs")),
        (("train", "validation"), {}, ("train", "validation")),
        (("train", "a", "b"), {"dataset_train_split": "a", "dataset_test_split": "b"}, ("a", "b")),
    ],
)
def test_which_splits_are_read(names, script, expected, tokenizer, tmp_path):
    write_splits(tmp_path, names)
    found = dpotrainer.load_preferences(make_job(tmp_path, script=script, eval_pairs=3), tokenizer)
    read = [tokenizer.decode(part[0]["prompt_ids"]) for part in (found.train, found.held_out)]
    assert read == [
        f"<|im_start|>user\n{name}<|im_end|>\n<|im_start|>assistant\n" for name in expected
    ]


@pytest.mark.parametrize(
    "script",
    [
        {"dataset_train_split": "training"},
        {"dataset_test_split": "validation"},
        {"dataset_train_split": "train_prefs"},
    ],
)
def test_an_unknown_split_is_refused_with_those_there_are(script, tokenizer, tmp_path):
    write_splits(tmp_path, ("train", "test"))
    with pytest.raises(dpotrainer.UserError, match="has the splits train, test, but not") as error:
        load_file(tmp_path, tokenizer, script=script)
    assert next(iter(script.values())) in str(error.value)


@pytest.mark.parametrize("count, expected", [(0, 0), (4, 4), (500, 20)])
def test_the_seed_fixes_what_is_held_out(count, expected, tokenizer, tmp_path):
    path = write(tmp_path, [pair(f"q{i}", "a", "b") for i in range(100)])

    def held_out(**changes):
        found = dpotrainer.load_preferences(make_job(path, eval_pairs=count, **changes), tokenizer)
        if not expected:
            assert found.held_out is None and len(found.train) == 100
            return set()
        hashes = set(found.held_out["pair_hash"])
        assert (len(found.train), len(found.held_out)) == (100 - expected, expected)
        assert not hashes.intersection(found.train["pair_hash"])
        return hashes

    assert held_out() == held_out()
    assert not expected or held_out() != held_out(seed=8)


def test_equal_pairs_stay_on_one_side(tokenizer, tmp_path):
    path = write(tmp_path, [pair(f"q{i % 40}", "a", "b") for i in range(100)])
    found = dpotrainer.load_preferences(make_job(path, eval_pairs=10), tokenizer)
    assert 0 < len(found.held_out) <= 10
    assert not set(found.train["pair_hash"]) & set(found.held_out["pair_hash"])
    assert "! train: 60 pairs repeat others" in found.report


def test_pairs_on_both_sides_are_told(tokenizer, tmp_path):
    write(tmp_path, [pair(f"q{i}", "a", "b") for i in range(9)], "train.jsonl")
    write(tmp_path, [pair(f"q{i}", "a", "b") for i in range(8, 12)], "test.jsonl")
    assert (
        "! 1 held-out pairs have a prompt that is trained on" in load_file(tmp_path, tokenizer)[1]
    )


def test_a_mixture_that_cannot_be_read_names_its_own_setting(tokenizer, tmp_path):
    part = trl.scripts.utils.DatasetConfig(path="json", data_files=str(tmp_path / "gone.jsonl"))
    job = make_job(None, mixture=DatasetMixtureConfig(datasets=[part]))
    with pytest.raises(dpotrainer.UserError, match=r"^datasets=json cannot be read: .*gone\.jsonl"):
        dpotrainer.load_preferences(job, tokenizer)


def test_a_mixture_is_read_as_trl_reads_it(tokenizer, tmp_path):
    first = write(
        tmp_path, [pair(f"first {i}", "a", "b", source="x") for i in range(20)], "first.jsonl"
    )
    second = write(tmp_path, [pair(f"second {i}", "a", "b") for i in range(30)], "second.jsonl")
    parts = [
        {
            "path": "json",
            "data_files": str(first),
            "columns": ["prompt", "chosen", "rejected"],
            "fraction": 0.5,
        },
        {"path": "json", "data_files": str(second), "fraction": 0.5},
    ]
    mixture = DatasetMixtureConfig(datasets=parts)
    expected = [pair(f"{name} {i}", "a", "b") for name in ("first", "second") for i in range(20)]
    assert load_file(None, tokenizer, mixture=mixture)[0] == load(tmp_path, expected, tokenizer)[0]
    for size, count in ((0.1, 4), (3, 3), (0.4, 16)):
        mixture = DatasetMixtureConfig(datasets=parts, test_split_size=size)
        found, again = (
            dpotrainer.load_preferences(make_job(None, mixture=mixture), tokenizer)
            for _ in range(2)
        )
        assert (len(found.train), len(found.held_out)) == (40 - count, count)
        assert found.held_out["pair_hash"][:] == again.held_out["pair_hash"][:]


# -------------------------------------------------------------------------------------- the network
@pytest.fixture
def silent_hub(monkeypatch):
    """A hub that takes connections and never answers."""
    server = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setattr(
        "huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}"
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    yield
    server.close()


def test_a_hub_that_does_not_answer_ends_in_ten_seconds_with_the_ways_out(silent_hub, tokenizer):
    started = time.monotonic()
    with pytest.raises(dpotrainer.UserError) as error:
        load_file("organisation/pairs", tokenizer)
    assert time.monotonic() - started < 10
    for words in ("organisation/pairs", "HF_ENDPOINT", "a local folder"):
        assert words in str(error.value)


def test_a_host_without_an_address_ends_at_once(silent_hub, tokenizer, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://no-such-host.invalid")
    started = time.monotonic()
    with pytest.raises(dpotrainer.UserError, match="HF_ENDPOINT"):
        load_file("organisation/pairs", tokenizer)
    assert time.monotonic() - started < 10


def test_a_local_file_asks_no_hub(silent_hub, tokenizer, tmp_path):
    started = time.monotonic()
    load(tmp_path, [pair("q", "a", "b")], tokenizer)
    assert time.monotonic() - started < dpotrainer.HUB_SECONDS


# ----------------------------------------------------------------------------------- chat templates
def test_qwen3_without_reasoning_has_the_empty_think_block_in_the_prompt(qwen, tmp_path):
    (found,), _ = load(tmp_path, [pair("hi", "yes", "no")], qwen)
    prompt, chosen, _ = shown(qwen, found)
    assert prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert chosen == "yes<|im_end|>\n"


def test_qwen3_with_reasoning_has_it_in_the_answer(qwen, tmp_path):
    rows = [
        {**pair("hi", "", "no"), "chosen": [assistant("yes", reasoning_content="well")]},
        pair("hi", "<think>\nwell\n</think>\n\nyes", "no"),
        pair("hi", "yes", "no"),
    ]
    found, report = load(tmp_path, rows, qwen)
    for row in found[:2]:
        prompt, chosen, rejected = shown(qwen, row)
        assert prompt.endswith("<|im_start|>assistant\n")
        assert chosen == "<think>\nwell\n</think>\n\nyes<|im_end|>\n"
        assert rejected == "<think>\n\n</think>\n\nno<|im_end|>\n"
    assert shown(qwen, found[2])[1] == "yes<|im_end|>\n"
    assert "leaves" not in report


def test_tool_calls_reach_the_template_as_they_were_written(qwen, tmp_path):
    """Parquet fills a call's arguments with those of every other call, as None."""

    def call(**arguments):
        return [assistant(None, tool_calls=[{"function": {"name": "f", "arguments": arguments}}])]

    rows = [{"prompt": [user("q")], "chosen": call(a=1), "rejected": call(b="2")}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "pairs.parquet")
    (found,), report = load_file(tmp_path / "pairs.parquet", qwen)
    assert '{"name": "f", "arguments": {"a": 1}}' in shown(qwen, found)[1]
    assert "!" not in report


def test_a_tool_call_that_the_template_drops_is_an_empty_side(tokenizer, tmp_path):
    call = [assistant("", tool_calls=[{"function": {"name": "f", "arguments": "{}"}}])]
    _, report = load(
        tmp_path, [pair("q", "a", "b"), pair("q", "a", "b") | {"chosen": call}], tokenizer
    )
    assert "1 empty once rendered (rows 2)" in report
    assert "leaves reasoning or tool calls of an answer out" in report


def test_tools_and_template_arguments_may_be_texts(qwen, tmp_path):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    with_tools = load(tmp_path, [pair("q", "a", "b", tools=tools)], qwen)[0]
    assert '"name": "f"' in qwen.decode(with_tools[0]["prompt_ids"])
    assert with_tools == load(tmp_path, [pair("q", "a", "b", tools=json.dumps(tools))], qwen)[0]
    plain = load(tmp_path, [pair("q", "a", "b")], qwen)[0]
    assert (
        plain == load(tmp_path, [pair("q", "a", "b", tools="", chat_template_kwargs="{}")], qwen)[0]
    )
    thinking = pair("q", "a", "b", chat_template_kwargs={"enable_thinking": True})
    assert load(tmp_path, [thinking], qwen)[0] != plain


def test_nulls_in_messages_as_text_are_left_out(qwen, tmp_path):
    """As OpenAI's dumps write them; arrow's structs lose theirs."""
    empty = {"tool_calls": None, "reasoning_content": None}
    row = pair("q", "a", "b")
    with_nulls = {side: json.dumps([turns[0] | empty]) for side, turns in row.items()}
    assert load(tmp_path, [with_nulls], qwen)[0] == load(tmp_path, [row], qwen)[0]


def test_tools_beside_plain_text_make_a_chat(qwen, tmp_path):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    expected = load(tmp_path, [pair("q", "a", "b", tools=tools)], qwen)[0]
    assert load(tmp_path, [text_row(tools=tools)], qwen)[0] == expected
    _, report = load(tmp_path, [text_row(tools=None)], qwen)  # an empty column makes none
    assert "plain text without the chat template" in report


@pytest.mark.parametrize(
    "more, said",
    [
        ({"chat_template_kwargs": "[1]"}, "row 1: chat_template_kwargs must be a mapping"),
        (
            {"prompt": [user("q"), {"role": "function_call", "content": ""}, user("p")]},
            "row 1: function_call must hold a call as JSON, not ''",
        ),
        (
            {"prompt": [user("q"), {"role": "function_call", "content": "[1]"}, user("p")]},
            "row 1: function_call must hold a call as JSON, not '[1]'",
        ),
    ],
)
def test_a_cell_that_is_no_call_or_mapping_is_refused_by_name(more, said, qwen, tmp_path):
    assert said in refused(tmp_path, [pair("q", "a", "b") | more], qwen)


def test_tools_in_a_struct_are_mapped(qwen, tmp_path):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    expected = load(tmp_path, [pair("q", "a", "b", tools=tools)], qwen)[0]
    row = as_openai(pair("q", "a", "b"))
    row["input"]["tools"] = tools
    columns = OPENAI | {"tools": "input.tools"}
    assert f"--columns '{json.dumps(columns)}'" in refused(tmp_path, [row], qwen)
    assert load(tmp_path, [row], qwen, columns=columns)[0] == expected


def test_a_mapped_column_may_be_empty_for_long(tokenizer, tmp_path):
    rows = [pair(f"q{i}", "a", "b", instruction=None) for i in range(150)]
    rows[120]["instruction"] = "Be brief."
    found, _ = load(tmp_path, rows, tokenizer, columns={"system": "instruction"})
    assert shown(tokenizer, found[120])[0].startswith("<|im_start|>system\nBe brief.")


def test_a_template_that_renders_a_prompt_differently_alone_is_refused_with_both(tmp_path):
    odd = make_tokenizer(CHATML + "{% if add_generation_prompt %}<think>{% endif %}")
    message = refused(tmp_path, [pair("hi", "yes", "no")], odd)
    assert "differently alone" in message
    assert r"'<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>'" in message
    assert r"'<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n'" in message


def test_trls_training_form_of_a_template_is_used_where_it_fits_and_told(tmp_path, monkeypatch):
    odd = CHATML + "{% if add_generation_prompt %}<think>{% endif %}"
    monkeypatch.setattr(trl, "get_training_chat_template", lambda tokenizer: CHATML)
    found, report = load(tmp_path, [pair("hi", "yes", "no")], make_tokenizer(odd))
    assert shown(make_tokenizer(CHATML), found[0])[1] == "yes<|im_end|>\n"
    assert "! train: 1 of 1 rows: rendered by TRL's training form of the chat template" in report


# what the assistant's turn ends in; those that refuse, and what they say
TURN_ENDS = {
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "cohere2": "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
    "gemma": "<end_of_turn>",
    "gemma3": "<end_of_turn>",
    "gemma4": "<turn|>",
    "diffusion_gemma": "<turn|>",
    "glm4moe": "<EOS>",
    "gptoss": "<|return|>",
    "lfm2": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "muse": "<|eot|>",
    "nemotron": "<|im_end|>",
    "phi3": "<EOS>",
    "qwen": "<|im_end|>",
}
REFUSALS = {
    "deepseek": "renders the prompt differently alone",
    "idefics3": "2 empty once rendered",
    "smolvlm": "2 empty once rendered",
    "llava_next": "has no attribute 'text'",
}
NAMES = sorted(
    path.stem for path in TEMPLATES.glob("*.jinja") if not path.stem.endswith("_training")
)


def by_name(table, name):
    """The entry whose key is the longest beginning of the name."""
    keys = [key for key in table if name.startswith(key)]
    return table[max(keys, key=len)] if keys else None


@pytest.mark.parametrize("name", NAMES)
def test_every_template_that_trl_ships(name, tmp_path):
    """The prompt is the beginning, one BOS, the answer ends its turn; or one clear refusal."""
    template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    special = {
        word
        for word in re.findall(r"<[|/]?\w+[|]?>", template)
        if "think" not in word and "tool" not in word
    }
    special |= {"<BOS>", "<EOS>"}
    tokenizer = make_tokenizer(template, sorted(special), bos_token="<BOS>", eos_token="<EOS>")
    rows = [pair("Hi there", "Good day", "Go away"), pair(MANY[0]["prompt"], "Good day", "Go away")]
    refusal = by_name(REFUSALS, name)
    if refusal:
        message = refused(tmp_path, rows, tokenizer, max_length=None)
        assert refusal in message
        return
    found, _ = load(tmp_path, rows, tokenizer, max_length=None)
    for row, source in zip(found, rows):
        prompt, chosen, rejected = shown(tokenizer, row)
        assert prompt.count("<BOS>") <= 1 and prompt.rfind("<BOS>") <= 0
        assert source["prompt"][-1]["content"] in prompt
        assert "Good day" not in prompt and "Good day" in chosen and "Go away" in rejected
        assert chosen.rstrip().endswith(by_name(TURN_ENDS, name)), chosen
        texts = [
            tokenizer.apply_chat_template(
                source["prompt"] + source[side], tokenize=False, enable_thinking=thinking
            )
            for side in ("chosen", "rejected")
            for thinking in (False, True)
        ]
        assert any(text.startswith((prompt + chosen).removesuffix("<EOS>")) for text in texts)


# --------------------------------------------------------------------------------------- plain text
def test_a_raw_answer_ends_in_one_eos(tokenizer, tmp_path):
    rows = [text_row("the answer", " is", " is no<|im_end|>")]
    (found,), _ = load(tmp_path, rows, tokenizer)
    assert shown(tokenizer, found) == ["the answer", " is<|im_end|>", " is no<|im_end|>"]


def test_raw_text_that_merges_across_the_boundary_keeps_the_prompt_whole(tokenizer, tmp_path):
    row = text_row("the answer to th", "e question is", "at there is no")
    prompt = tokenizer("the answer to th").input_ids
    assert tokenizer("the answer to the question is").input_ids[: len(prompt)] != prompt
    (found,), _ = load(tmp_path, [row], tokenizer)
    assert found["prompt_ids"] == prompt
    assert found["chosen_ids"] == tokenizer("e question is<|im_end|>").input_ids


def test_raw_text_starts_with_one_bos(tmp_path):
    both = make_tokenizer("<|im_start|>" + CHATML, bos_token="<|im_start|>")
    ids = [(name, both.convert_tokens_to_ids(name)) for name in ("<|im_start|>", "<|im_end|>")]
    both.backend_tokenizer.post_processor = TemplateProcessing(
        "<|im_start|> $A <|im_end|>", special_tokens=ids
    )
    for prompt in ("the answer", "<|im_start|>the answer"):
        (found,), _ = load(tmp_path, [text_row(prompt, " is", " is no")], both)
        assert shown(both, found)[:2] == ["<|im_start|>the answer", " is<|im_end|>"]
    (found,), _ = load(tmp_path, [pair("q", "a", "b")], both)
    assert both.decode(found["prompt_ids"]).startswith("<|im_start|><|im_start|>user")


def test_padding_equal_to_eos_hides_no_eos(tmp_path):
    same = make_tokenizer(CHATML, pad_token="<|im_end|>")
    found, _ = load(tmp_path, [pair("hi", "yes", "no, not at all")], same)
    batch = DataCollatorForPreference(pad_token_id=same.pad_token_id, max_length=512)(found)
    kept = batch["input_ids"][0][batch["completion_mask"][0].bool()]
    assert kept.tolist() == found[0]["chosen_ids"]
    assert same.eos_token_id in kept


# ------------------------------------------------------------------------- the tokens are TRL's own
def trl_tokens(rows, tokenizer, **arguments):
    """What TRL's own preparation makes of canonical rows."""
    if arguments:
        rows = [{**row, "chat_template_kwargs": arguments} for row in rows]
    trainer = type("Trainer", (), {"_tokenizer": tokenizer})
    args = DPOConfig(use_cpu=True, bf16=False, output_dir="unused", max_length=None)
    prepared = DPOTrainer._prepare_dataset(
        trainer, datasets.Dataset.from_list(rows), tokenizer, args, "train"
    )
    return [[row[name] for name in IDS] for row in prepared]


@pytest.mark.parametrize(
    "template, arguments", [("tokenizer", {}), ("qwen", {"enable_thinking": False})]
)
def test_tokens_are_those_of_trl_where_trl_is_right(template, arguments, tmp_path, request):
    tokenizer = request.getfixturevalue(template)
    rows = [row for row in SINGLE + MANY + SYSTEM if row["chosen"] != row["rejected"]]
    found, _ = load(tmp_path, rows, tokenizer, max_length=None)
    assert [[row[name] for name in IDS] for row in found] == trl_tokens(
        rows, tokenizer, **arguments
    )


def test_tokens_are_those_of_trl_for_a_tokenizer_that_puts_a_space_first(tmp_path):
    """As Llama 2's: an answer tokenized apart would start with a space of its own."""
    rows = [pair("the question is", "there", "no answer"), *MANY[:1], *SYSTEM]
    template = (
        "{% for m in messages %}- [{{ m.role }}]:{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}- [assistant]:{% endif %}"
    )
    spaced = make_tokenizer(template)
    for scheme in ("first", "always"):
        spaced.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        found, _ = load(tmp_path, rows, spaced)
        assert [[row[name] for name in IDS] for row in found] == trl_tokens(rows, spaced)


def test_raw_tokens_are_those_of_trl_where_nothing_merges(tokenizer, tmp_path):
    rows = [text_row("the answer", " is there", " is no"), text_row("你好。", "a", "🙂")]
    found, _ = load(tmp_path, rows, tokenizer, max_length=None)
    assert [[row[name] for name in IDS] for row in found] == trl_tokens(rows, tokenizer)


# ------------------------------------------------------------------ lengths, hashes, one pair shown
def distinct_tokens(first, second):
    """Positions with equal beginnings need one computation; each row's last its own."""
    beginnings = {tuple(row[: i + 1]) for row in (first, second) for i in range(len(row))}
    last = min(len(first), len(second))
    return len(beginnings) + (first[:last] == second[:last])


def test_packed_tokens_are_the_distinct_ones_of_the_collated_rows(tokenizer, tmp_path):
    rows = (
        SINGLE[:4]
        + MANY
        + SYSTEM
        + [pair("q", "word " * 300, "word " * 10 + "end"), pair("q", "a", "a " * 300)]
    )
    found, _ = load(tmp_path, rows, tokenizer, max_length=90)
    collate = DataCollatorForPreference(pad_token_id=0, max_length=90)
    for row in found:
        batch = collate([row])
        first, second = (
            ids[mask.bool()].tolist()
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"])
        )
        assert row["packed_tokens"] == distinct_tokens(first, second)


def test_hashes_tell_pairs_apart_and_see_only_what_is_kept(tokenizer, tmp_path):
    rows = [pair("q", "a", "b"), pair("q", "b", "a"), pair("qa", "a", "b"), pair("q", "a", "ab")]
    hashes = [row["pair_hash"] for row in load(tmp_path, rows, tokenizer)[0]]
    assert len(set(hashes)) == 4
    assert hashes == [
        row["pair_hash"] for row in load(tmp_path, rows, tokenizer, max_length=300)[0]
    ]
    # what is cut away is not trained on
    rows = [pair("q", "a " * 100, "b " * 100), pair("q", "a " * 200, "b " * 200)]
    first, second = load(tmp_path, rows, tokenizer, max_length=60)[0]
    assert first["pair_hash"] == second["pair_hash"] and first["chosen_ids"] != second["chosen_ids"]


def test_one_pair_is_shown_as_the_model_sees_it(tokenizer, tmp_path):
    (found,), _ = load(tmp_path, [pair("hi", "yes " * 300, "no")], tokenizer, max_length=100)
    prompt, chosen, rejected = dpotrainer.describe_pair(tokenizer, found, 100)
    assert r"'<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n'" in prompt
    cut = len(found["prompt_ids"]) + len(found["chosen_ids"]) - 100
    assert chosen.endswith(f"' | {cut} tokens cut by max_length 100")
    assert rejected.endswith(r"'no<|im_end|>\n'")
    whole = dpotrainer.describe_pair(tokenizer, found, None)
    assert "cut by" not in whole[1] and " [...] " in whole[1] and len(whole[1]) < 600


# --------------------------------------------------------------------------------- cache, processes
def test_a_second_call_reads_the_cache_and_another_length_or_template_does_not(
    tmp_path, monkeypatch
):
    path, calls = write(tmp_path, [pair(f"q{i}", "a", "b") for i in range(5)]), []
    tokenizer = make_tokenizer(CHATML)
    encode = dpotrainer.PairPreparer.encode
    monkeypatch.setattr(dpotrainer.PairPreparer, "encode", lambda *a: calls.append(1) or encode(*a))

    def encodes(tokenizer=tokenizer, **changes):
        calls.clear()
        load_file(path, tokenizer, **changes)
        return bool(calls)

    assert encodes()
    assert not encodes(learning_rate=1e-6, eval_pairs=1, seed=3)
    assert not encodes(make_tokenizer(CHATML))
    tokenizer(
        ["a tokenizer's state", "differs after use"], padding=True, truncation=True, max_length=3
    )
    assert not encodes()
    assert encodes(max_length=64)
    assert encodes(make_tokenizer("{# another #}" + CHATML))
    assert encodes(make_tokenizer(CHATML, eos_token="<|endoftext|>"))
    write(tmp_path, [pair(f"p{i}", "a", "b") for i in range(5)])
    assert encodes()


def test_processes_change_nothing(tokenizer, tmp_path, monkeypatch):
    rows = SINGLE * 2 + MANY + SYSTEM
    expected = load(tmp_path, rows, tokenizer)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "other"))
    assert load(tmp_path, rows, tokenizer, dataset_num_proc=2) == expected


# ---------------------------------------------------------------------------------------- any input
TEXT = st.text(st.sampled_from("ab \n\r<|>é你🙂\0"), max_size=6)
TEXT |= st.sampled_from(
    ["</think>", "<|im_end|>", "Human:", "\n\nHuman: a\n\nAssistant: b", "Human:\n\nAssistant:"]
)
ROLES = st.sampled_from(
    ["user", "assistant"] * 8 + ["system", "tool", "human", "gpt"] * 2 + ["robot", "", None, 3]
)
TURN = st.fixed_dictionaries({"role": ROLES, "content": TEXT}, optional={"reasoning_content": TEXT})
TURN |= st.fixed_dictionaries({"from": ROLES, "value": TEXT}, optional={"weight": st.floats()})
CELL = (
    TEXT
    | st.lists(TURN, max_size=4)
    | TURN
    | st.none()
    | st.integers()
    | st.lists(st.integers(), max_size=2)
)


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    row=st.fixed_dictionaries(
        {"chosen": CELL, "rejected": CELL},
        optional={"prompt": CELL, "conversation": CELL, "system": CELL},
    ),
    template=st.sampled_from(["tokenizer", "qwen"]),
    repeats=st.booleans(),
)
def test_no_row_ends_in_anything_but_a_result_or_our_own_error(row, template, repeats, request):
    names = {name: name for name in row}
    try:
        result = prepare(request.getfixturevalue(template), row, names, 64, repeats)
    except ValueError as error:
        assert str(error).startswith("row 1: ")
        return
    assert result["dropped"][0] or min(len(result[name][0]) for name in IDS) > 0


def prepare(tokenizer, row, columns, max_length, repeats=False):
    """A row as tokens, without files and caches."""
    preparer = dpotrainer.PairPreparer(
        make_job(None, max_length=max_length), tokenizer, columns, []
    )
    preparer.repeats = repeats
    prepared = preparer({name: [cell] for name, cell in row.items()}, [0])
    return {name: np.array(values).tolist() for name, values in prepared.items()}


SAID = st.text(st.sampled_from("ab你🙂"), min_size=1, max_size=4)
ANSWERS = st.lists(SAID, min_size=2, max_size=2, unique=True)


@st.composite
def canonical_rows(draw):
    """A system turn or none, turns by turns, two answers that differ."""
    prompt = [system(draw(SAID))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 2))):
        prompt += [user(draw(SAID)), assistant(draw(SAID))]
    return pair([*prompt, user(draw(SAID))], *draw(ANSWERS))


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(row=canonical_rows(), max_length=st.integers(1, 60) | st.none())
def test_every_layout_is_the_rendered_text_and_only_what_is_short_is_dropped(row, max_length, qwen):
    wholes = [
        qwen.apply_chat_template(
            row["prompt"] + row[side], enable_thinking=False, return_dict=False
        )
        for side in ("chosen", "rejected")
    ]
    for rewrite in (
        lambda row: row,
        as_conversations,
        as_h4,
        as_argilla,
        as_sharegpt_with_answer,
        as_json_text,
    ):
        cells = rewrite(row)
        names = {name: name for name in cells if name in ("prompt", "chosen", "rejected")}
        if "conversations" in cells:
            names["conversation"] = "conversations"
        result = prepare(qwen, cells, names, max_length)
        prompt, chosen, rejected = (result[name][0] for name in IDS)
        assert [prompt + chosen, prompt + rejected] == wholes
        no_room = max_length is not None and len(prompt) >= max_length
        equal = wholes[0][:max_length] == wholes[1][:max_length]
        assert bool(result["dropped"][0]) == (no_room or equal)
        if not equal:
            assert result["packed_tokens"] == [
                distinct_tokens(wholes[0][:max_length], wholes[1][:max_length])
            ]


@pytest.mark.parametrize("name", ["tools", "chat_template_kwargs"])
def test_text_that_should_be_json_is_refused_by_its_name(name, tokenizer, tmp_path):
    rows = [as_conversations(pair(f"q{i}", "a", "b")) | {name: "no JSON"} for i in range(4)]
    assert f"row 1: {name} must be JSON, not 'no JSON'" in refused(tmp_path, rows, tokenizer)
