"""Tiny models, preference pairs and settings, and an evaluation of our own to compare the program's figures with."""

import gc
import hashlib
import json
import multiprocessing
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "dpotrainer.py"
CONFIGS = {
    "gpt2": GPT2Config,
    "qwen3": Qwen3Config,
    "qwen2": Qwen2Config,
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "gemma": GemmaConfig,
    "qwen3_moe": Qwen3MoeConfig,
}
TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
WORDS = (
    "red green blue yellow small large round square old new warm cold stone river house garden window table door lamp "
    "bread water paper horse bird fish tree leaf road bridge boat train hill cloud rain snow wind fire star moon sun "
    "one two three four five six seven eight nine ten 猫 狗 水 山 红 绿"
).split()


# ------------------------------------------------------------------------------------------------- models and pairs
def make_pair(rng: random.Random, flipped: float = 0.0) -> dict:
    """A question with a polite answer, chosen, and a curt one, rejected; a share of them is flipped."""

    def words(low, high):
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))

    history = (
        [{"role": "system", "content": f"You like {words(1, 3)}."}] if rng.random() < 0.2 else []
    )
    if rng.random() < 0.3:
        history += [
            {"role": "user", "content": f"Where is the {words(1, 3)}?"},
            {"role": "assistant", "content": f"By the {words(1, 2)}."},
        ]
    prompt, fact = [*history, {"role": "user", "content": f"What is {words(1, 12)}?"}], words(1, 6)
    polite, curt = (
        f"Good question! It is {fact}. {words(0, 8)}",
        f"It is {fact}, no more {words(0, 5)}",
    )
    answers = [[{"role": "assistant", "content": text.strip()}] for text in (polite, curt)]
    return dict(
        zip(
            ("prompt", "chosen", "rejected"),
            (prompt, *answers[:: -1 if rng.random() < flipped else 1]),
        )
    )


def make_pairs(path: Path, n: int, seed: int = 0, flipped: float = 0.2) -> Path:
    """Write n conversational preference pairs of varied lengths as jsonl."""
    rng = random.Random(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(make_pair(rng, flipped), ensure_ascii=False) + "\n" for _ in range(n)]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def make_tokenizer(vocabulary: int = 420) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a ChatML template, trained on pairs like those of make_pairs."""
    rng = random.Random(1)
    texts = [
        turn["content"]
        for pair in (make_pair(rng) for _ in range(200))
        for side in pair.values()
        for turn in side
    ]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=special[2], pad_token=special[0], chat_template=TEMPLATE
    )


def make_model(
    folder: Path, architecture: str = "qwen3", seed: int = 0, width: int = 32, **config
) -> Path:
    """Save a random causal language model of two layers, with its tokenizer; weights wide enough to have opinions."""
    tokenizer = make_tokenizer()
    shape = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "initializer_range": 0.15,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "vocab_size": len(tokenizer),
        "tie_word_embeddings": True,
    }
    shape |= {"sliding_window": None} if architecture == "mistral" else {}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        CONFIGS[architecture](**shape | config), dtype=torch.float32
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


# ------------------------------------------------------------------------------------------------------------ runs
FAST = {
    "use_cpu": True,
    "bf16": False,
    "dtype": "float32",
    "gradient_checkpointing": False,
    "max_length": 96,
    "lora_r": 4,
    "lora_alpha": 8,
    "learning_rate": 2e-3,
    "warmup_steps": 0,
    "num_train_epochs": 1,
    "global_batch_size": 4,
    "per_device_train_batch_size": 4,
    "eval_pairs": 9,
    "eval_steps": 4,
    "save_steps": 4,
    "logging_steps": 1,
    "sample_prompts": 0,
    "report_to": "none",
    "disable_tqdm": True,
}


def settings(model: Path, data: Path, output: Path, **changes) -> list[str]:
    """Flags of a run that takes seconds on a CPU, logs every step, saves and evaluates every fourth."""
    fast = dict(FAST)
    if (Path(model) / "adapter_config.json").exists():  # it has a shape of its own
        del fast["lora_r"], fast["lora_alpha"]
    values = (
        fast | {"model_name_or_path": model, "dataset_name": data, "output_dir": output} | changes
    )
    flags = []
    for name, value in values.items():
        flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return flags


def environment(**changes) -> dict[str, str]:
    """The environment of a subprocess: one thread, no hub, and none of a launcher's variables."""
    ours = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    kept = {
        k: v
        for k, v in os.environ.items()
        if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    }
    return kept | ours | {k: str(v) for k, v in changes.items()}


def run_program(
    flags: list[str], program: Path = PROGRAM, **options
) -> subprocess.CompletedProcess:
    """The program in a process of its own, with its output as text."""
    options = {"capture_output": True, "text": True, "env": environment(), "timeout": 120} | options
    return subprocess.run([sys.executable, program, *map(str, flags)], **options)


def _be_the_program(
    flags: list[str], log: Path, variables: dict, changes: tuple[Callable, ...]
) -> None:
    with open(log, "ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ.update({name: str(value) for name, value in variables.items()})
    import dpotrainer

    gc.freeze()  # collections then skip the libraries
    for change in changes:
        change(dpotrainer)
    sys.exit(dpotrainer.run(flags))


def start_program(
    flags: list[str], log: Path, *changes: Callable, **variables
) -> multiprocessing.Process:
    """The program in a process of its own, with `variables` in its environment; what it prints is added to log.

    Each of `changes` is called with the module before. The process is forked from a server that has the libraries
    loaded, which saves the seconds of their import.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dpotrainer"])
    path, os.environ["PYTHONPATH"] = (
        os.environ.get("PYTHONPATH", ""),
        os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    )
    process = context.Process(
        target=_be_the_program, args=(list(map(str, flags)), log, variables, changes)
    )
    process.start()
    os.environ["PYTHONPATH"] = path
    return process


def no_pictures(program) -> None:
    """Leave rewards.png empty: drawing takes longer than training here."""
    program.Figure.savefig = lambda self, path, **options: Path(path).touch()


def end_program(process: multiprocessing.Process, seconds: float = 90.0) -> int:
    """Its exit status, as a shell would tell it; fails and kills it when it takes longer."""
    process.join(seconds)
    if process.is_alive():
        process.kill()
        raise AssertionError(f"not over after {seconds} seconds")
    return process.exitcode


def wait_until(condition: Callable[[], bool], seconds: float = 60.0, process=None) -> None:
    """Until condition() holds; fails when the time is over, or when the process ended before."""
    end = time.monotonic() + seconds
    while not condition():
        assert process is None or process.is_alive() or condition(), (
            f"ended with {process.exitcode} too early"
        )
        assert time.monotonic() < end, f"not within {seconds} seconds"
        time.sleep(0.005)


# ------------------------------------------------------------------------------------------------- what a run left
def read_metrics(folder: Path) -> list[dict]:
    return [
        json.loads(line)
        for line in Path(folder, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def losses(folder: Path) -> dict[int, float]:
    """{step: loss} of the training steps; fails on a step that was logged twice."""
    rows = [row for row in read_metrics(folder) if "loss" in row]
    assert len(rows) == len({row["step"] for row in rows})
    return {row["step"]: row["loss"] for row in rows}


def evaluations(folder: Path) -> list[dict]:
    return [row for row in read_metrics(folder) if "eval_loss" in row]


def read_pairs(path: Path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def hash_file(path: Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def tree(folder: Path) -> dict[str, str]:
    """{file: hash of its content} of all files in a folder."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hash_file(path) for path in files}


def load_policy(model: Path, adapter: Path | None = None) -> torch.nn.Module:
    """The causal LM in float64 and evaluation mode, with the adapter on top where one is given."""
    policy = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float64, attn_implementation="eager"
    )
    if adapter:
        policy = PeftModel.from_pretrained(policy, adapter, autocast_adapter_dtype=False).to(
            torch.float64
        )
    return policy.eval()


def encode_pair(tokenizer, pair: dict, max_length: int) -> list[tuple[list[int], int]]:
    """(ids, length of the prompt) of chosen and of rejected, by the chat template, cut at max_length."""
    options = {"tokenize": True, "return_dict": False}
    prompt = tokenizer.apply_chat_template(pair["prompt"], add_generation_prompt=True, **options)
    rows = [
        tokenizer.apply_chat_template(pair["prompt"] + pair[side], **options)
        for side in ("chosen", "rejected")
    ]
    return [(row[:max_length], len(prompt)) for row in rows]


def answer_logps(policy, tokenizer, pairs: list[dict], max_length: int = 96) -> torch.Tensor:
    """Summed log-probs of the answers, (N, 2) in nats for chosen and rejected: one row at a time, no padding."""
    values = []
    for pair in pairs:
        for ids, start in encode_pair(tokenizer, pair, max_length):
            logits = policy(input_ids=torch.tensor([ids])).logits[0, :-1].double()
            every = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
            values.append(every[start - 1 :].sum())
    return torch.stack(values).view(-1, 2)


@torch.no_grad()
def evaluate_adapter(
    model: Path, adapter: Path, pairs: list[dict], beta: float = 0.1, reference=None
) -> dict:
    """The held-out figures of a saved adapter by the paper's formulas, in float64, each pair counted once."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    policy = answer_logps(load_policy(model, adapter), tokenizer, pairs)
    rewards = beta * (policy - answer_logps(reference or load_policy(model), tokenizer, pairs))
    margins = rewards[:, 0] - rewards[:, 1]
    return {
        "eval_loss": -torch.nn.functional.logsigmoid(margins).mean().item(),
        "eval_rewards/accuracies": (margins > 0).double().mean().item(),
        "eval_rewards/margins": margins.mean().item(),
        "eval_rewards/chosen": rewards[:, 0].mean().item(),
        "eval_rewards/rejected": rewards[:, 1].mean().item(),
        "eval_logps/chosen": policy[:, 0].mean().item(),
        "eval_logps/rejected": policy[:, 1].mean().item(),
    }
