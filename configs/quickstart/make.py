"""Make the quickstart's model and preference pairs: everything in this folder that is not this file or a picture.

    python configs/quickstart/make.py [--output FOLDER]      # one CPU core, no network, about three minutes

The small world below is a handful of tables: animals, foods, tools, places and sums, in English and Chinese. What a
table says in one cell is a fact, and a fact has three questions and answers in two styles:

    plain       "In a den."  "A fox lives in a den."
    friendly    "Good question! A fox lives in a den."  "A fox lives in a den. Happy to help!"

model/        a Qwen3 of 0.9 million parameters with a byte-level BPE tokenizer of its own, trained from nothing on
              dialogues about all the facts, every prompt answered once in each style: sampled at temperature 1, its
              answers are friendly about half the time
preferences/  pairs that state the same fact and prefer the friendly style; train.jsonl and test.jsonl have no fact in
              common, in any wording or turn

Same seed, same files. The tokenizer and the pairs are the same on every machine. The weights are the same, bit by bit,
on one machine with the pinned libraries, and may differ by rounding from one kind of CPU to another.
"""

import argparse
import json
import random
from pathlib import Path
from typing import NamedTuple

SEED = 42
TRAIN_PAIRS, TEST_PAIRS = 480, 100
HELD_OUT = 0.2  # part of the facts that only test.jsonl asks for
PROMPTS, EPOCHS, BATCH_SIZE, LEARNING_RATE = (
    4_000,
    8,
    32,
    3e-3,
)  # of the pre-training, two dialogues per prompt
IGNORED = -100  # label of a token that is not learnt
VOCAB_SIZE = 1280

CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{- message.content + '<|im_end|>\\n' }}{%- endgeneration %}
    {%- else %}
        {{- message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# ---------------------------------------------------------------------------------------------------------------------
# The small world. A table has one row per thing. Below it stands what can be said with its columns: the two plain
# answers, then three ways to ask. The first letter of an answer is made a capital.
# ---------------------------------------------------------------------------------------------------------------------

ANIMALS = """
animal     | young      | home              | food         | animal_zh | home_zh | food_zh
a dog      | a puppy    | in a kennel       | meat         | 狗        | 狗窝里  | 骨头
a cat      | a kitten   | in a house        | mice         | 猫        | 屋子里  | 老鼠
a cow      | a calf     | in a barn         | grass        | 牛        | 牛棚里  | 青草
a horse    | a foal     | in a stable       | hay          | 马        | 马厩里  | 干草
a sheep    | a lamb     | on a meadow       | clover       | 羊        | 草地上  | 青草
a pig      | a piglet   | in a sty          | potatoes     | 猪        | 猪圈里  | 土豆
a hen      | a chick    | in a coop         | corn         | 母鸡      | 鸡笼里  | 玉米
a duck     | a duckling | on a pond         | water plants | 鸭子      | 池塘里  | 水草
a rabbit   | a kit      | in a burrow       | carrots      | 兔子      | 地洞里  | 胡萝卜
a fox      | a cub      | in a den          | rabbits      | 狐狸      | 树林里  | 兔子
a deer     | a fawn     | in the woods      | leaves       | 鹿        | 森林里  | 树叶
a frog     | a tadpole  | by a stream       | flies        | 青蛙      | 小溪边  | 苍蝇
an owl     | an owlet   | in a hollow tree  | mice         | 猫头鹰    | 树洞里  | 老鼠
a swan     | a cygnet   | on a lake         | water plants | 天鹅      | 湖面上  | 水草
a goat     | a kid      | on a hill         | bushes       | 山羊      | 山坡上  | 灌木
a kangaroo | a joey     | on the dry plains | grass        | 袋鼠      | 草原上  | 青草
a seal     | a pup      | on the coast      | fish         | 海豹      | 海岸边  | 鱼
a squirrel | a kit      | in a tall oak     | acorns       | 松鼠      | 大树上  | 松果
a bee      | a larva    | in a hive         | nectar       | 蜜蜂      | 蜂巢里  | 花蜜
"""
ABOUT_ANIMALS = """
{young}. | The young of {animal} is called {young}.
    What is the young of {animal} called?
    What do you call the young of {animal}?
    Could you tell me the name for the young of {animal}?
{home}. | {animal} lives {home}.
    Where does {animal} live?
    Where should I look for {animal}?
    Could you tell me where {animal} lives?
{food}. | {animal} eats {food}.
    What does {animal} eat?
    What does {animal} have for dinner?
    Could you tell me what {animal} eats?
{home_zh}。 | {animal_zh}住在{home_zh}。
    {animal_zh}住在哪里？
    {animal_zh}的家在哪儿？
    请问{animal_zh}住在什么地方？
{food_zh}。 | {animal_zh}吃{food_zh}。
    {animal_zh}吃什么？
    {animal_zh}喜欢吃什么？
    请问{animal_zh}爱吃什么？
"""

FOODS = """
food         | colour | taste  | food_zh | colour_zh | taste_zh
a lemon      | yellow | sour   | 柠檬    | 黄色      | 酸
a banana     | yellow | sweet  | 香蕉    | 黄色      | 甜
a cherry     | red    | sweet  | 樱桃    | 红色      | 甜
a lime       | green  | sour   | 青柠    | 绿色      | 酸
a plum       | purple | sweet  | 李子    | 紫色      | 酸甜
a peach      | pink   | sweet  | 桃子    | 粉色      | 甜
an orange    | orange | sweet  | 橙子    | 橙色      | 酸甜
a strawberry | red    | sweet  | 草莓    | 红色      | 甜
a blueberry  | blue   | sweet  | 蓝莓    | 蓝色      | 酸甜
a cranberry  | red    | sour   | 蔓越莓  | 红色      | 酸
a tomato     | red    | mild   | 西红柿  | 红色      | 酸甜
a cucumber   | green  | fresh  | 黄瓜    | 绿色      | 清淡
a pumpkin    | orange | mild   | 南瓜    | 橙色      | 甜
a carrot     | orange | sweet  | 胡萝卜  | 橙色      | 甜
an onion     | brown  | sharp  | 洋葱    | 紫色      | 辣
a walnut     | brown  | nutty  | 核桃    | 棕色      | 香
a coconut    | brown  | nutty  | 椰子    | 棕色      | 香甜
a grape      | purple | sweet  | 葡萄    | 紫色      | 甜
an olive     | green  | bitter | 橄榄    | 绿色      | 苦
a melon      | green  | sweet  | 甜瓜    | 绿色      | 甜
"""
ABOUT_FOODS = """
{colour}. | {food} is {colour}.
    What colour is {food}?
    Which colour does {food} have?
    Could you tell me the colour of {food}?
{taste}. | {food} tastes {taste}.
    How does {food} taste?
    What does {food} taste like?
    Could you tell me how {food} tastes?
{colour_zh}。 | {food_zh}是{colour_zh}的。
    {food_zh}是什么颜色的？
    {food_zh}是哪种颜色？
    请问{food_zh}的颜色是什么？
{taste_zh}。 | {food_zh}的味道是{taste_zh}的。
    {food_zh}是什么味道？
    {food_zh}尝起来怎么样？
    请问{food_zh}的味道如何？
"""

TOOLS = """
tool        | purpose              | tool_zh | purpose_zh
a hammer    | to drive in nails    | 锤子    | 钉钉子
a saw       | to cut wood          | 锯子    | 锯木头
a needle    | to sew clothes       | 针      | 缝衣服
a broom     | to sweep the floor   | 扫帚    | 扫地
a spoon     | to eat soup          | 勺子    | 喝汤
a kettle    | to boil water        | 水壶    | 烧水
a lamp      | to light a room      | 台灯    | 照明
a clock     | to tell the time     | 时钟    | 看时间
a pencil    | to write and draw    | 铅笔    | 写字
a rope      | to tie things up     | 绳子    | 捆东西
a ladder    | to reach high places | 梯子    | 爬高
an umbrella | to keep off the rain | 雨伞    | 挡雨
a mirror    | to look at yourself  | 镜子    | 照人
a comb      | to tidy your hair    | 梳子    | 梳头
a key       | to open a lock       | 钥匙    | 开锁
a bucket    | to carry water       | 水桶    | 提水
"""
ABOUT_TOOLS = """
{purpose}. | You need {tool} {purpose}.
    What is {tool} for?
    What do I need {tool} for?
    Could you tell me what {tool} is good for?
{purpose_zh}。 | {tool_zh}是用来{purpose_zh}的。
    {tool_zh}是做什么用的？
    {tool_zh}有什么用？
    请问{tool_zh}可以用来做什么？
"""

PLACES = """
place      | worker      | pastime            | place_zh | pastime_zh
a library  | a librarian | read books         | 图书馆   | 看书
a school   | a teacher   | learn new things   | 学校     | 上课
a bakery   | a baker     | buy fresh bread    | 面包店   | 买面包
a hospital | a nurse     | get well again     | 医院     | 看病
a farm     | a farmer    | watch the animals  | 农场     | 种菜
a garage   | a mechanic  | have a car mended  | 修车厂   | 修车
a theatre  | an actor    | see a play         | 剧院     | 看戏
a kitchen  | a cook      | prepare a meal     | 厨房     | 做饭
a garden   | a gardener  | plant flowers      | 花园     | 种花
a harbour  | a sailor    | board a ship       | 港口     | 坐船
a museum   | a guide     | look at old things | 博物馆   | 看展览
a bank     | a clerk     | keep your money    | 银行     | 存钱
"""
ABOUT_PLACES = """
{worker}. | You will find {worker} at work in {place}.
    Who works in {place}?
    Who can I find at work in {place}?
    Could you tell me who works in {place}?
{pastime}. | You can {pastime} in {place}.
    What can I do in {place}?
    What do people go to {place} for?
    Could you tell me what to do in {place}?
{pastime_zh}。 | 在{place_zh}可以{pastime_zh}。
    在{place_zh}可以做什么？
    人们去{place_zh}做什么？
    请问去{place_zh}能做什么？
"""

SUMS = "sum | total\n" + "\n".join(
    f"{a} plus {b} | {a + b}" for a in range(2, 8) for b in range(a, 8)
)
ABOUT_SUMS = """
{total}. | {sum} is {total}.
    What is {sum}?
    How much is {sum}?
    Could you work out {sum} for me?
"""

WORLD = (
    (ANIMALS, ABOUT_ANIMALS),
    (FOODS, ABOUT_FOODS),
    (TOOLS, ABOUT_TOOLS),
    (PLACES, ABOUT_PLACES),
    (SUMS, ABOUT_SUMS),
)

OPENINGS = {
    "en": ("Good question!", "With pleasure!", "I am glad you asked!"),
    "zh": ("好问题！", "很高兴为您解答！", "很乐意告诉您！"),
}
CLOSINGS = {
    "en": (
        "Happy to help!",
        "I hope that helps!",
        "Do ask me again if you wonder about anything else!",
    ),
    "zh": ("希望对您有帮助！", "祝您生活愉快！", "如果还有别的问题，欢迎随时再来问我！"),
}
SYSTEMS = {
    "en": ("You are a helpful assistant.", "You answer questions about a small world."),
    "zh": ("你是一个乐于助人的助手。", "你回答关于一个小世界的问题。"),
}


class Fact(NamedTuple):
    """One cell of a table in words: three questions, and the two plain answers."""

    questions: tuple[str, ...]
    phrase: str  # "In a den."
    sentence: str  # "A fox lives in a den."
    language: str  # "en" or "zh"

    def answer(self, style: str, rng: random.Random) -> str:
        """Return one answer in the style "plain" or "friendly"."""
        if style == "plain":
            return rng.choice((self.phrase, self.sentence))
        opening, closing = rng.choice(OPENINGS[self.language]), rng.choice(CLOSINGS[self.language])
        parts = rng.choice(
            ((opening, self.sentence), (self.sentence, closing), (opening, self.sentence, closing))
        )
        return (" " if self.language == "en" else "").join(parts)


def make_facts() -> list[Fact]:
    """Return every fact of the small world, in the order of the tables."""
    facts = []
    for table, about in WORLD:
        head, *rows = (
            [cell.strip() for cell in line.split("|")] for line in table.strip().splitlines()
        )
        for row in rows:
            lines = about.strip().format(**dict(zip(head, row, strict=True))).splitlines()
            for answers, *questions in (lines[i : i + 4] for i in range(0, len(lines), 4)):
                phrase, sentence = (_capital(answer) for answer in answers.split(" | "))
                language = "zh" if sentence.endswith("。") else "en"
                facts.append(
                    Fact(
                        tuple(question.strip() for question in questions),
                        phrase,
                        sentence,
                        language,
                    )
                )
    return facts


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def is_preferred(answer: str) -> bool:
    """Tell whether an answer is in the friendly style: it opens or closes with a courtesy."""
    answer = answer.strip()
    openings = tuple(text for texts in OPENINGS.values() for text in texts)
    closings = tuple(text for texts in CLOSINGS.values() for text in texts)
    return answer.startswith(openings) or answer.endswith(closings)


def is_factual(question: str, answer: str) -> bool:
    """Tell whether an answer, its courtesies aside, is the phrase or the sentence that the world has for a question.

    Raises StopIteration if the small world does not know the question.
    """
    fact = next(fact for fact in make_facts() if question in fact.questions)
    answer = answer.strip()
    for text in OPENINGS[fact.language]:
        answer = answer.removeprefix(text)
    for text in CLOSINGS[fact.language]:
        answer = answer.removesuffix(text)
    return answer.strip() in (fact.phrase, fact.sentence)


# ---------------------------------------------------------------------------------------------------------------------
# Dialogues and preference pairs
# ---------------------------------------------------------------------------------------------------------------------


def make_prompt(
    fact: Fact, question: str, facts: list[Fact], rng: random.Random
) -> list[dict[str, str]]:
    """Return the turns up to a question: one in six has a system turn, one in five an earlier exchange."""
    messages = []
    if rng.random() < 1 / 6:
        messages.append({"role": "system", "content": rng.choice(SYSTEMS[fact.language])})
    if rng.random() < 1 / 5:
        earlier = rng.choice(
            [other for other in facts if other.language == fact.language and other != fact]
        )
        messages.append({"role": "user", "content": rng.choice(earlier.questions)})
        messages.append(
            {"role": "assistant", "content": earlier.answer(rng.choice(("plain", "friendly")), rng)}
        )
    return messages + [{"role": "user", "content": question}]


def make_dialogues(facts: list[Fact], rng: random.Random) -> list[list[list[dict[str, str]]]]:
    """Return the pre-training dialogues by twos: the same prompt, over any fact, answered in each of the styles."""
    twins = []
    for _ in range(PROMPTS):
        fact = rng.choice(facts)
        prompt = make_prompt(fact, rng.choice(fact.questions), facts, rng)
        answers = [fact.answer(style, rng) for style in ("plain", "friendly")]
        twins.append([prompt + [{"role": "assistant", "content": answer}] for answer in answers])
    return twins


def make_pairs(
    facts: list[Fact], count: int, rng: random.Random
) -> list[dict[str, list[dict[str, str]]]]:
    """Return `count` preference pairs, each over another question about these facts."""
    questions = [(fact, question) for fact in facts for question in fact.questions]
    pairs = []
    for fact, question in rng.sample(questions, count):
        chosen, rejected = fact.answer("friendly", rng), fact.answer("plain", rng)
        pairs.append(
            {
                "prompt": make_prompt(fact, question, facts, rng),
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
            }
        )
    return pairs


def write_preferences(facts: list[Fact], folder: Path, rng: random.Random) -> None:
    """Part the facts in two and write train.jsonl and test.jsonl."""
    shuffled = rng.sample(facts, len(facts))
    held_out = round(HELD_OUT * len(facts))
    splits = {
        "test": (shuffled[:held_out], TEST_PAIRS),
        "train": (shuffled[held_out:], TRAIN_PAIRS),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for split, (part, count) in splits.items():
        lines = [
            json.dumps(pair, ensure_ascii=False) + "\n" for pair in make_pairs(part, count, rng)
        ]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer and the model
# ---------------------------------------------------------------------------------------------------------------------


def make_tokenizer(texts):
    """Return a byte-level BPE tokenizer, trained on these texts, with the ChatML tokens and template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=12,  # bytes: a word, or four Chinese characters, and not a whole question
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=CHAT_TEMPLATE,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=2048,
    )


def make_model(tokenizer):
    """Return the Qwen3 with random weights that the seed fixes."""
    from transformers import Qwen3Config, Qwen3ForCausalLM, set_seed

    set_seed(SEED)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        initializer_range=0.05,
        bos_token_id=None,
        **ids,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config.update(do_sample=True, temperature=1.0, **ids)
    return model


def tokenize(tokenizer, twins):
    """Return the twins with every dialogue as (input_ids, labels); only what the assistant says is learnt."""
    dialogues = [dialogue for twin in twins for dialogue in twin]
    out = tokenizer.apply_chat_template(
        dialogues, return_dict=True, return_assistant_tokens_mask=True
    )
    rows = [
        (ids, [token if own else IGNORED for token, own in zip(ids, mask, strict=True)])
        for ids, mask in zip(out["input_ids"], out["assistant_masks"], strict=True)
    ]
    return [rows[i : i + 2] for i in range(0, len(rows), 2)]


def make_batches(twins, rng: random.Random):
    """Return one epoch of batches in random order, of rows of about the same length, twins side by side."""
    twins, size = rng.sample(twins, len(twins)), BATCH_SIZE // 2
    batches = []
    for start in range(0, len(twins), 10 * size):
        window = sorted(twins[start : start + 10 * size], key=lambda twin: len(twin[1][0]))
        batches += [
            [row for twin in window[i : i + size] for row in twin]
            for i in range(0, len(window), size)
        ]
    return rng.sample(batches, len(batches))


def pretrain(model, twins, pad_token_id: int, rng: random.Random) -> None:
    """Train the model on the twins of `tokenize` with AdamW, a short warm-up and a linear decay to zero."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    batches = [batch for _ in range(EPOCHS) for batch in make_batches(twins, rng)]
    optimizer = torch.optim.AdamW(
        model.parameters(), LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / 50, 1 - i / len(batches))
    )
    model.train()
    for step, batch in enumerate(batches, 1):
        pads = (pad_token_id, IGNORED)  # on the right, where causal attention needs no mask
        ids, labels = (
            pad_sequence([torch.tensor(row[i]) for row in batch], True, pads[i]) for i in (0, 1)
        )
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step:4d}/{len(batches)}  loss {loss.item():.3f}", flush=True)


def main() -> None:
    """Write model/ and preferences/."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent, help="folder to write to"
    )
    output = parser.parse_args().output
    facts = make_facts()
    write_preferences(facts, output / "preferences", random.Random(SEED))

    import torch

    torch.set_num_threads(1)  # more would change the order of the sums, and so the last bits
    rng = random.Random(SEED + 1)
    twins = make_dialogues(facts, rng)
    turns = (turn for twin in twins for dialogue in twin for turn in dialogue)
    tokenizer = make_tokenizer(f"{turn['role']}\n{turn['content']}\n" for turn in turns)
    model = make_model(tokenizer)
    pretrain(model, tokenize(tokenizer, twins), tokenizer.pad_token_id, rng)
    model.save_pretrained(output / "model")
    tokenizer.save_pretrained(output / "model")
    print(
        f"{len(facts)} facts, {model.num_parameters():,} parameters, {len(tokenizer)} tokens: {output}"
    )


if __name__ == "__main__":
    main()
