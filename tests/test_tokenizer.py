"""Ids against tiktoken and sentencepiece, prompts against transformers, and no way in for special tokens.

Llama 3's real tokenizer.model comes from the package llama-models (only that file is used). In place of Llama
2's, a model of the same make (BPE, byte fallback, split digits, no normalisation) is trained here.
"""

import base64
import io
import json
import random
import re
import shutil
from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiktoken
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as HFTokenizer
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.tokenization_utils_base import generate_merges

from radllama.tokenizer import Message, PromptFormat, Tokenizer

LLAMA3_MODEL = Path(str(distribution("llama-models").locate_file("llama_models/llama3/tokenizer.model")))
LLAMA4_MODEL = LLAMA3_MODEL.parents[1] / "llama4" / "tokenizer.model"
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# In the order of Llama 3.1's tokenizer.json, from id 128,000 on.
LLAMA31_SPECIALS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_2|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    *(f"<|reserved_special_token_{n}|>" for n in range(3, 248)),
]
# The templates of Llama 3 (Meta-Llama-3-8B-Instruct) and Llama 2 (Llama-2-7b-chat-hf).
LLAMA3_TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
    "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + "
    "'<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ "
    "content }}{% endfor %}{% if add_generation_prompt %}{{ "
    "'<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA2_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message "
    "= messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = "
    "false %}{% endif %}{% for message in loop_messages %}{% if (message['role'] == 'user') != "
    "(loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate "
    "user/assistant/user/assistant/...') }}{% endif %}{% if loop.index0 == 0 and system_message != false "
    "%}{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else "
    "%}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}{{ bos_token + "
    "'[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' '  + "
    "content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)

VOCABULARY = (
    "the lungs are clear no focal consolidation pleural effusion pneumothorax cardiac silhouette is normal "
    "in size mild moderate severe left right lower lobe opacity nodule stable since There No Heart 12 mm 3.5"
)
WORDS = VOCABULARY.split(" ")
TORTURE = [
    "",
    " ",
    "\n",
    "a",
    "  leading and trailing  ",
    "\tTab\tand\u00a0no-break\u2003em space",
    "FINDINGS:\r\n\r\nLungs:\tclear.\n\n\n  IMPRESSION:\r1. None.\n",
    " " * 300 + "x" + " " * 81,
    "\n" * 300 + "x" + "\r\n" * 41,
    "4.5 x 3.2 x 11.75 cm; 1234567890 0007 ½ ² Ⅳ ٣٤٥ १२३",
    "It's we'll THEY'RE I'D can't 'Tis \u2019s '\u017f '\u212a",
    "👩\u200d⚕\ufe0f🧑🏽\u200d🔬 👨\u200d👩\u200d👧\u200d👦 🇩🇪 ❤\ufe0f\u200d🔥",
    "צילום חזה תקין، الصدر طبيعي \u202eabc\u202c",
    "e\u0301 é ñ n\u0303 Z\u0351\u036b\u0343\u036a\u0302 \u0915\u094d\u0937\u093f",
    "胸部X線写真に異常なし。폐렴 없음. 未见异常",
    "nul\0inside\0\0",
    "\ue000\uf8ff\U000f0000\U0010fffd private",
    "\ufeffbom \ufffd \u200b \u2028line\u2029paragraph\x85next\x1c\x1f",
    "____ ==== ---- **** ####### <<<>>> {{{}}} \\\\ ////",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa abababababababab XXXX XXXXXXXX",
    "<|begin_of_text|>a<|eot_id|>b<|start_header_id|>assistant<|end_header_id|>\n\n<|end_of_text|><|python_tag|>",
    "</s><s>x</s> <unk> <pad> [INST] y [/INST] <<SYS>>\nz\n<</SYS>>",
    "▁U+2581▁▁ x",
    "\U0002ebf0 \u1c89 \U00010d40 newly assigned",
]

TEXT = st.one_of(
    st.text(max_size=40),
    st.lists(st.sampled_from(TORTURE + WORDS + [" ", "\n", ".", ":\n"]), max_size=6).map("".join),
    st.lists(st.sampled_from(WORDS), max_size=20).map(" ".join),
)
quick = settings(max_examples=60, deadline=None)


def sentences(count: int) -> list[str]:
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=rng.randint(3, 14))).capitalize() + "." for _ in range(count)]


def conversation(system: str | None, user: str, answer: str | None = None) -> list[Message]:
    messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": user})
    return messages if answer is None else [*messages, {"role": "assistant", "content": answer}]


def template_ids(hf: Any, messages: list[Message], generation: bool = False) -> list[int]:
    ids: list[int] = hf.apply_chat_template(messages, add_generation_prompt=generation, return_dict=False)
    return ids


@pytest.fixture(scope="module")
def llama3_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama3")
    shutil.copy(LLAMA3_MODEL, folder)
    return folder


@pytest.fixture(scope="module")
def llama3(llama3_dir: Path) -> Tokenizer:
    return Tokenizer.from_dir(llama3_dir)


@pytest.fixture(scope="module")
def reference() -> tiktoken.Encoding:
    lines = (line.split() for line in LLAMA3_MODEL.read_bytes().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    return tiktoken.Encoding("llama3", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens={})


@pytest.fixture(scope="module")
def hf_llama3() -> Any:
    converter = TikTokenConverter(str(LLAMA3_MODEL), SPLIT, extra_special_tokens=LLAMA31_SPECIALS)
    hf = PreTrainedTokenizerFast(tokenizer_object=converter.converted(), bos_token="<|begin_of_text|>")
    hf.chat_template = LLAMA3_TEMPLATE
    return hf


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small byte-level BPE with a few of Llama 3's special tokens, at ids of its own."""
    tokenizer = HFTokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    specials = [name for name in LLAMA31_SPECIALS if "reserved" not in name] + ["<|reserved_special_token_0|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=specials, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(sentences(300), trainer)
    bos = "<|begin_of_text|>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def llama2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prompt = "[INST] <<SYS>> Findings <</SYS>> Below is an instruction ### Response [/INST] </s>"
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*sentences(1500), *[prompt] * 50]),
        model_writer=model,
        model_type="bpe",
        vocab_size=700,
        hard_vocab_limit=False,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        allow_whitespace_only_pieces=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    folder = tmp_path_factory.mktemp("llama2")
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


@pytest.fixture(scope="module")
def llama2(llama2_dir: Path) -> Tokenizer:
    return Tokenizer.from_dir(llama2_dir)


@pytest.fixture(scope="module")
def pieces(llama2_dir: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(llama2_dir / "tokenizer.model"))


@pytest.fixture(scope="module")
def hf_llama2(pieces: sentencepiece.SentencePieceProcessor) -> Callable[..., Any]:
    def make(legacy: bool) -> Any:
        vocab = {pieces.id_to_piece(i): i for i in range(pieces.vocab_size())}
        scores = {piece: pieces.get_score(i) for piece, i in vocab.items()}
        merges = generate_merges(vocab, scores, skip_tokens=["<unk>", "<s>", "</s>"])
        hf = LlamaTokenizer(vocab=vocab, merges=merges, legacy=legacy)
        hf.chat_template = LLAMA2_TEMPLATE
        return hf

    return make


@pytest.fixture(scope="module")
def llama2_json_dirs(hf_llama2: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both layouts of Llama 2's tokenizer.json: as published, and transformers 5's own."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("published", "first")}
    hf = hf_llama2(legacy=False)
    config = json.loads(hf.backend_tokenizer.to_str())
    (folders["first"] / "tokenizer.json").write_text(json.dumps(config))
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    normalizers = [{"type": "Prepend", "prepend": "▁"}, replace]
    config |= {"normalizer": {"type": "Sequence", "normalizers": normalizers}, "pre_tokenizer": None}
    (folders["published"] / "tokenizer.json").write_text(json.dumps(config))
    return folders


@pytest.fixture(scope="module")
def every_kind(
    llama3: Tokenizer, llama2: Tokenizer, tiny_dir: Path, llama2_dir: Path, llama2_json_dirs: dict[str, Path]
) -> dict[str, Tokenizer]:
    """Each kind of file with each prompt format that fits it."""
    kinds = {"llama3": llama3, "llama2": llama2, "tiny": Tokenizer.from_dir(tiny_dir)}
    kinds |= {name: Tokenizer.from_dir(folder) for name, folder in llama2_json_dirs.items()}
    alpaca: dict[str, Path] = {"tiny": tiny_dir, "llama2": llama2_dir, **llama2_json_dirs}
    kinds |= {f"{k} alpaca": Tokenizer.from_dir(d, prompt_format="alpaca") for k, d in alpaca.items()}
    kinds["tiny llama2"] = Tokenizer.from_dir(tiny_dir, prompt_format="llama2")
    return kinds


# --- Llama 3 ------------------------------------------------------------------------------------------------


def test_llama3_ids_equal_tiktoken(llama3: Tokenizer, reference: tiktoken.Encoding) -> None:
    texts = TORTURE + sentences(300)
    expected = [reference.encode_ordinary(text) for text in texts]
    assert [llama3.encode(text) for text in texts] == expected
    assert llama3.encode_batch(texts) == expected


@given(TEXT)
@settings(max_examples=300, deadline=None)
def test_llama3_ids_equal_tiktoken_on_any_text(llama3: Tokenizer, reference: tiktoken.Encoding, text: str) -> None:
    ids = llama3.encode(text)
    assert ids == reference.encode_ordinary(text)
    assert llama3.decode(ids) == text


def test_llama3_merges_equal_tiktoken_where_words_are_no_tokens(
    llama3: Tokenizer, reference: tiktoken.Encoding
) -> None:
    # Periodic words and glued tokens: several merges of one rank compete for the same letters.
    rng = random.Random(0)
    words = [
        ("".join(rng.choices("abcdeinost-=.é中", k=k)) * 12)[rng.randrange(k) :]
        for k in range(1, 7)
        for _ in range(200)
    ]
    words += [reference.decode([rng.randrange(128_000) for _ in range(3)]) for _ in range(2000)]
    assert llama3.encode_batch(words) == [reference.encode_ordinary(word) for word in words]


def test_llama3_special_ids(llama3: Tokenizer) -> None:
    assert llama3.prompt_format == "llama3"
    assert llama3.vocab_size == 128_256
    assert llama3.bos_id == 128_000
    assert llama3.end_of_text_id == 128_001
    assert llama3.pad_id == 128_004
    assert llama3.header_token_ids == (128_006, 128_007, 128_009)
    assert llama3.eos_id == 128_009
    assert llama3.stop_ids == {128_001, 128_008, 128_009}


def test_llama3_tokenizer_json_as_published(llama3: Tokenizer, hf_llama3: Any, tmp_path: Path) -> None:
    llama3.save(tmp_path)
    written = json.loads((tmp_path / "tokenizer.json").read_text())
    expected = json.loads(hf_llama3.backend_tokenizer.to_str())
    for key in ("vocab", "merges", "ignore_merges"):
        assert written["model"][key] == expected["model"][key]
    assert written["added_tokens"] == expected["added_tokens"]
    assert written["pre_tokenizer"]["pretokenizers"][0] == expected["pre_tokenizer"]["pretokenizers"][0]


def test_llama3_golden_conversation(llama3: Tokenizer) -> None:
    ids, mask = llama3.render(
        conversation(
            "Derive the impression from findings in the radiology report.",
            "Findings: No pneumothorax.",
            "Normal chest.",
        )
    )
    prompt = [
        128000,  # <|begin_of_text|>
        128006, 9125, 128007, 271,  # <|start_header_id|> "system" <|end_header_id|> "\n\n"
        22960, 535, 279, 21455, 505, 14955, 304,  # "Der" "ive" " the" " impression" " from" " findings" " in"
        279, 12164, 2508, 1934, 13,  # " the" " radi" "ology" " report" "."
        128009,  # <|eot_id|>
        128006, 882, 128007, 271,  # <|start_header_id|> "user" <|end_header_id|> "\n\n"
        10086, 826, 25, 2360,  # "Find" "ings" ":" " No"
        57223, 8942, 269, 710, 13,  # " pneum" "oth" "or" "ax" "."
        128009,  # <|eot_id|>
        128006, 78191, 128007, 271,  # <|start_header_id|> "assistant" <|end_header_id|> "\n\n"
    ]  # fmt: skip
    answer = [12484, 15489, 13, 128009]  # "Normal" " chest" "." <|eot_id|>
    assert ids == prompt + answer
    assert mask == [False] * len(prompt) + [True] * len(answer)


@given(st.none() | TEXT, TEXT, TEXT)
@quick
def test_llama3_render_equals_its_chat_template(
    llama3: Tokenizer, hf_llama3: Any, system: str | None, user: str, answer: str
) -> None:
    assume("<|" not in f"{system}{user}{answer}")  # special tokens are what transformers takes them for
    prompt = conversation(system, user)
    assert llama3.render(prompt)[0] == template_ids(hf_llama3, prompt)
    assert llama3.render(prompt, add_generation_prompt=True)[0] == template_ids(hf_llama3, prompt, True)
    whole = conversation(system, user, answer)
    assert llama3.render(whole)[0] == template_ids(hf_llama3, whole)


# --- Llama 2 ------------------------------------------------------------------------------------------------


def test_llama2_ids_equal_sentencepiece(llama2: Tokenizer, pieces: sentencepiece.SentencePieceProcessor) -> None:
    texts = TORTURE + sentences(300)
    expected = [pieces.encode(text) for text in texts]
    assert [llama2.encode(text) for text in texts] == expected
    assert llama2.encode_batch(texts) == expected


@given(TEXT)
@quick
def test_llama2_ids_equal_sentencepiece_on_any_text(
    llama2: Tokenizer, pieces: sentencepiece.SentencePieceProcessor, text: str
) -> None:
    ids = llama2.encode(text)
    assert ids == pieces.encode(text)
    assert llama2.decode(ids) == text.replace("▁", " ")


def test_llama2_special_ids(llama2: Tokenizer, pieces: sentencepiece.SentencePieceProcessor) -> None:
    assert llama2.prompt_format == "llama2"
    assert llama2.vocab_size == pieces.vocab_size()
    assert (llama2.pad_id, llama2.bos_id, llama2.eos_id, llama2.end_of_text_id) == (0, 1, 2, 2)
    assert llama2.stop_ids == {2}
    assert llama2.header_token_ids == ()


def test_llama2_prompt_as_in_metas_code(llama2: Tokenizer, pieces: sentencepiece.SentencePieceProcessor) -> None:
    # llama/generation.py of Llama 2 encodes f"[INST] {prompt} [/INST] {answer} " with bos and eos.
    ids, mask = llama2.render(conversation("Be brief.", "Lungs clear.", "Normal."))
    text = "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nLungs clear. [/INST]"
    assert ids == [1, *pieces.encode(f"{text} Normal. "), 2]
    assert pieces.id_to_piece(ids[1]).startswith("▁[")
    assert mask.index(True) == 1 + len(pieces.encode(text))


@given(st.none() | TEXT, TEXT, TEXT)
@quick
def test_llama2_render_equals_its_chat_template(
    every_kind: dict[str, Tokenizer],
    hf_llama2: Callable[..., Any],
    llama2_json_dirs: dict[str, Path],
    system: str | None,
    user: str,
    answer: str,
) -> None:
    assume(not any(name in f"{system}{user}{answer}" for name in ("<s>", "</s>", "<unk>")))
    published = PreTrainedTokenizerFast(
        tokenizer_file=str(llama2_json_dirs["published"] / "tokenizer.json"),
        bos_token="<s>",
        eos_token="</s>",
    )
    published.chat_template = LLAMA2_TEMPLATE
    references = {"llama2": hf_llama2(legacy=True), "published": published, "first": hf_llama2(legacy=False)}
    for kind, hf in references.items():
        for messages in (conversation(system, user), conversation(system, user, answer)):
            assert every_kind[kind].render(messages)[0] == template_ids(hf, messages), kind


def test_llama2_json_first_and_published_differ_in_one_token(every_kind: dict[str, Tokenizer]) -> None:
    first, published = (every_kind[k].render(conversation(None, "x"))[0] for k in ("first", "published"))
    assert first[1] != published[1]
    assert published == every_kind["llama2"].render(conversation(None, "x"))[0]


# --- Alpaca -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        (
            conversation("Derive the impression.", "Findings: clear.", "Normal."),
            "Below is an instruction that describes a task, paired with an input that provides further "
            "context. Write a response that appropriately completes the request.\n\n"
            "### Instruction:\nDerive the impression.\n\n### Input:\nFindings: clear.\n\n"
            "### Response:\nNormal.",
        ),
        (
            conversation(None, "Name {a} lung lobe."),
            "Below is an instruction that describes a task. Write a response that appropriately completes "
            "the request.\n\n### Instruction:\nName {a} lung lobe.\n\n### Response:\n",
        ),
        (
            conversation(" \n", "Name {a} lung lobe.", ""),
            "Below is an instruction that describes a task. Write a response that appropriately completes "
            "the request.\n\n### Instruction:\nName {a} lung lobe.\n\n### Response:\n",
        ),
    ],
)
@pytest.mark.parametrize("kind", ["tiny alpaca", "llama2 alpaca", "published alpaca", "first alpaca"])
def test_alpaca_text(every_kind: dict[str, Tokenizer], kind: str, messages: list[Message], text: str) -> None:
    tokenizer = every_kind[kind]
    ids, mask = tokenizer.render(messages)
    answered = messages[-1]["role"] == "assistant"
    # The answer goes on in the prompt's last line break: no dummy space comes between.
    assert ids == [tokenizer.bos_id, *tokenizer.encode(text), *[tokenizer.end_of_text_id] * answered]
    assert tokenizer.decode(i for i, label in zip(ids, mask, strict=True) if label) == (
        messages[-1]["content"] if answered else ""
    )


# --- every kind ---------------------------------------------------------------------------------------------


@given(st.none() | TEXT, TEXT, TEXT)
@quick
def test_prompt_is_a_prefix_and_the_mask_covers_the_answer(
    every_kind: dict[str, Tokenizer], system: str | None, user: str, answer: str
) -> None:
    for kind, tokenizer in every_kind.items():
        prompt, prompt_mask = tokenizer.render(conversation(system, user), add_generation_prompt=True)
        ids, mask = tokenizer.render(conversation(system, user, answer))
        assert ids[: len(prompt)] == prompt, kind
        assert prompt_mask == [False] * len(prompt), kind
        assert mask == [False] * len(prompt) + [True] * (len(ids) - len(prompt)), kind
        assert len(ids) > len(prompt), kind
        assert ids[-1] == tokenizer.eos_id, kind
        assert tokenizer.eos_id in tokenizer.stop_ids, kind
        assert ids[0] == tokenizer.bos_id, kind
        assert ids.count(tokenizer.bos_id) == 1, kind
        assert max(ids) < tokenizer.vocab_size, kind
        if "llama2" not in kind and "published" not in kind and "first" not in kind:
            assert tokenizer.decode(ids[len(prompt) :]) == answer.strip()


@given(st.lists(st.sampled_from([*LLAMA31_SPECIALS[:12], "<s>", "</s>", "<unk>", " ", "\n", "x"]), max_size=8))
@quick
def test_special_tokens_in_text_stay_text(every_kind: dict[str, Tokenizer], parts: list[str]) -> None:
    text = "".join(parts)
    for kind, tokenizer in every_kind.items():
        special = {tokenizer.bos_id, tokenizer.end_of_text_id, tokenizer.pad_id}
        special |= tokenizer.stop_ids | set(tokenizer.header_token_ids)
        ids = tokenizer.encode(text)
        assert special.isdisjoint(ids), kind
        assert kind != "llama3" or max(ids, default=0) < 128_000
        assert tokenizer.encode_batch([text, text]) == [ids, ids], kind
        if not kind.startswith("first"):  # Metaspace "first" swallows one leading space
            assert tokenizer.decode(ids) == text, kind
        # Around the text a conversation has as many special tokens as around no text at all.
        rendered, plain = (tokenizer.render(conversation(t, t + "x", t))[0] for t in (text, "x"))
        assert [i for i in rendered if i in special] == [i for i in plain if i in special], kind


@pytest.mark.parametrize("merges", [[["no", "dule"]], ["no dule"]])
def test_special_token_that_the_vocabulary_can_reach(tiny_dir: Path, tmp_path: Path, merges: list[Any]) -> None:
    # "nodule" is one pre-token: `ignore_merges` would find it in the vocabulary, and so would the last merge.
    config = json.loads((tiny_dir / "tokenizer.json").read_text())
    for n, piece in enumerate(("no", "dule", "nodule", "s>")):
        config["model"]["vocab"].setdefault(piece, 1000 + n)
    config["model"]["merges"] = merges
    nodule = config["model"]["vocab"]["nodule"]
    special = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    config["added_tokens"].append({"id": nodule, "content": "nodule", **special})
    for ignore in (True, False):
        config["model"]["ignore_merges"] = ignore
        (tmp_path / "tokenizer.json").write_text(json.dumps(config))
        tokenizer = Tokenizer.from_dir(tmp_path)
        ids = tokenizer.encode("nodule")
        assert nodule not in ids
        assert tokenizer.decode([*ids, nodule]) == "nodule"
        assert HFTokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("nodule").ids[1] == nodule


def test_added_tokens_that_are_not_special_keep_their_ids(tiny_dir: Path, tmp_path: Path) -> None:
    hf = HFTokenizer.from_file(str(tiny_dir / "tokenizer.json"))
    hf.add_tokens([AddedToken("pneumothorax of the left", normalized=False)])
    hf.add_special_tokens(["<|more|>"])
    hf.add_tokens(["effusion"])
    hf.no_truncation()
    hf.no_padding()
    hf.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_dir(tmp_path)
    text = "A pneumothorax of the left and an effusion."
    assert tokenizer.encode(text) == hf.encode(text, add_special_tokens=False).ids
    assert hf.token_to_id("effusion") in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocab_size == hf.get_vocab_size()
    assert hf.token_to_id("<|more|>") not in tokenizer.encode("<|more|>")


def test_tiny_tokenizer_json(every_kind: dict[str, Tokenizer], tiny_dir: Path) -> None:
    tokenizer = every_kind["tiny"]
    hf = HFTokenizer.from_file(str(tiny_dir / "tokenizer.json"))
    assert tokenizer.prompt_format == "llama3"
    assert tokenizer.header_token_ids == tuple(
        hf.token_to_id(t) for t in ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    )
    assert tokenizer.pad_id == hf.token_to_id("<|finetune_right_pad_id|>")
    assert tokenizer.vocab_size == hf.get_vocab_size()
    # The file truncates and pads to 8 tokens and adds BOS; none of it applies.
    text = " ".join(sentences(3))
    assert len(hf.encode(text).ids) == 8 < len(tokenizer.encode(text))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.bos_id not in tokenizer.encode(text)


@pytest.mark.parametrize("removed", [["<|finetune_right_pad_id|>"], LLAMA31_SPECIALS[2:6]])
def test_pad_is_never_a_stop_id(tiny_dir: Path, tmp_path: Path, removed: list[str]) -> None:
    config = json.loads((tiny_dir / "tokenizer.json").read_text())
    config["added_tokens"] = [token for token in config["added_tokens"] if token["content"] not in removed]
    for name in removed:
        config["model"]["vocab"].pop(name, None)
    (tmp_path / "tokenizer.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_dir(tmp_path)
    assert tokenizer.pad_id not in tokenizer.stop_ids
    assert tokenizer.pad_id not in tokenizer.header_token_ids


def test_unpaired_surrogates_and_foreign_ids(every_kind: dict[str, Tokenizer]) -> None:
    for kind, tokenizer in every_kind.items():
        assert tokenizer.encode("a\ud800b \ud83d\ude00") == tokenizer.encode("a\ufffdb 😀"), kind
        assert tokenizer.encode_batch(["\udfff"]) == [tokenizer.encode("\ufffd")], kind
        lone, replaced = (tokenizer.render(conversation(c, c, c)) for c in ("\ud800", "\ufffd"))
        assert lone == replaced, kind
        ids = tokenizer.encode("clear")
        foreign = [tokenizer.bos_id, *ids, tokenizer.vocab_size + 7, tokenizer.eos_id, tokenizer.pad_id]
        assert tokenizer.decode(foreign) == tokenizer.decode(ids) == "clear", kind
        assert (tokenizer.decode([]), tokenizer.encode(""), tokenizer.encode_batch([])) == ("", [], []), kind
        with pytest.raises(ValueError, match="-100"):
            tokenizer.decode([-100, *ids])


def test_very_long_text(llama3: Tokenizer, llama2: Tokenizer) -> None:
    # A regular expression or a merge loop of quadratic cost would take hours here.
    for text in ("a" * 200_000, " " * 200_000 + "x", "\r\n" * 100_000, "The lungs are clear. " * 10_000):
        assert llama3.decode(llama3.encode(text)) == text
        assert llama2.decode(llama2.encode(text)) == text


def test_render_refuses_other_conversations(llama3: Tokenizer) -> None:
    user, assistant = conversation(None, "private", "private")
    system: Message = {"role": "system", "content": "private"}
    for messages in (
        [],
        [system],
        [assistant],
        [user, system],
        [user, user],
        [system, user, assistant, user],
    ):
        with pytest.raises(ValueError, match=r"expected the roles \[system\], user, \[assistant\]"):
            llama3.render(messages)
    with pytest.raises(ValueError, match="add_generation_prompt"):
        llama3.render([user, assistant], add_generation_prompt=True)
    bad: list[Any] = [
        "private",
        {"role": "user"},
        {"role": "user", "content": None},
        {"role": 1, "content": "private"},
    ]
    for message in bad:
        with pytest.raises(ValueError, match="message 2") as error:
            llama3.render([system, message])
        assert "private" not in str(error.value)


# --- files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tiktoken", "tiny", "llama2", "published"])
def test_save_and_load(
    kind: str,
    llama3_dir: Path,
    tiny_dir: Path,
    llama2_dir: Path,
    llama2_json_dirs: dict[str, Path],
    tmp_path: Path,
) -> None:
    source = {"tiktoken": llama3_dir, "tiny": tiny_dir, "llama2": llama2_dir, **llama2_json_dirs}[kind]
    folder = tmp_path / "source"
    shutil.copytree(source, folder / "original" if kind == "tiktoken" else folder)
    tokenizer = Tokenizer.from_dir(folder)
    shutil.rmtree(folder)  # a long training may outlive it
    saved = tmp_path / "deep" / "saved"
    tokenizer.save(saved)
    tokenizer.save(saved)
    assert not [file for file in saved.iterdir() if file.name.startswith(".")]
    again = Tokenizer.from_dir(saved)
    texts = TORTURE + sentences(20)
    assert again.encode_batch(texts) == tokenizer.encode_batch(texts)
    messages = conversation("Be brief.", "Findings: clear.", "Normal.")
    assert again.render(messages) == tokenizer.render(messages)
    names = ("vocab_size", "bos_id", "pad_id", "eos_id", "stop_ids", "header_token_ids", "prompt_format")
    assert [getattr(again, name) for name in names] == [getattr(tokenizer, name) for name in names]
    if kind == "llama2":
        assert (saved / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()
        return
    hf = AutoTokenizer.from_pretrained(saved)
    assert (hf.bos_token_id, hf.eos_token_id, hf.pad_token_id) == (again.bos_id, again.eos_id, again.pad_id)
    ids = hf("The lungs are clear.", add_special_tokens=False, padding=False, truncation=False).input_ids
    assert ids == again.encode("The lungs are clear.")


def test_save_keeps_the_settings_of_transformers(tiny_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_dir, tmp_path / "a")
    (tmp_path / "a" / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "x": 1}')
    (tmp_path / "a" / "chat_template.jinja").write_text("template")
    Tokenizer.from_dir(tmp_path / "a").save(tmp_path / "b")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_save_refuses_the_folder_of_another_tokenizer(
    llama2: Tokenizer, every_kind: dict[str, Tokenizer], tmp_path: Path
) -> None:
    llama2.save(tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer\.model: of another tokenizer"):
        every_kind["tiny"].save(tmp_path)
    assert Tokenizer.from_dir(tmp_path).vocab_size == llama2.vocab_size


def test_which_file_is_read(
    llama3_dir: Path, tiny_dir: Path, llama2_dir: Path, every_kind: dict[str, Tokenizer], tmp_path: Path
) -> None:
    shutil.copy(llama3_dir / "tokenizer.model", tmp_path)
    shutil.copy(tiny_dir / "tokenizer.json", tmp_path)
    # tokenizer.json before tiktoken, SentencePiece before tokenizer.json
    assert Tokenizer.from_dir(str(tmp_path)).vocab_size == every_kind["tiny"].vocab_size
    shutil.copy(llama2_dir / "tokenizer.model", tmp_path)
    assert Tokenizer.from_dir(tmp_path).vocab_size == every_kind["llama2"].vocab_size


def test_prompt_format_must_fit(llama2_dir: Path, tiny_dir: Path) -> None:
    alpaca = Tokenizer.from_dir(tiny_dir, prompt_format="alpaca")
    assert alpaca.eos_id == alpaca.end_of_text_id != Tokenizer.from_dir(tiny_dir).eos_id
    with pytest.raises(ValueError, match=r"tokenizer\.model: .*'llama3' needs <\|start_header_id\|>"):
        Tokenizer.from_dir(llama2_dir, prompt_format="llama3")
    wrong: Any = "chatml"
    with pytest.raises(ValueError, match=r"'chatml'.*'llama3', 'llama2', 'alpaca'"):
        Tokenizer.from_dir(tiny_dir, prompt_format=wrong)
    formats: list[PromptFormat] = ["llama3", "llama2", "alpaca"]
    assert [Tokenizer.from_dir(tiny_dir, prompt_format=f).prompt_format for f in formats] == formats


LLAMA3_BYTES = LLAMA3_MODEL.read_bytes()
MALFORMED: list[tuple[str, bytes, str]] = [
    ("tokenizer.json", b"", "empty; copy it again"),
    ("tokenizer.model", b"", "empty; copy it again"),
    ("tokenizer.json", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    ("tokenizer.model", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    (
        "tokenizer.json",
        b'{"model": {\n"type": "BPE", "vo',
        "not valid JSON (line 2), perhaps cut off; copy it again",
    ),
    ("tokenizer.json", b'{"model": "\xff"}', "not valid JSON (not UTF-8)"),
    ("tokenizer.json", b"[]", "expected a JSON object"),
    ("tokenizer.json", b'{"model": {"type": "Unigram", "vocab": [["a", 0]]}}', "expected a BPE model"),
    (
        "tokenizer.json",
        b'{"model": {"type": "BPE", "vocab": {"<s>": 0, "</s>": 1}, "merges": ["a b"]}}',
        "not a usable",
    ),
    (
        "tokenizer.json",
        b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}',
        "no begin and end token",
    ),
    ("tokenizer.model", b"<html>Sign in</html>", "neither Meta's tiktoken format"),
    ("tokenizer.model", bytes(range(255, 0, -1)), "neither Meta's tiktoken format"),
    ("tokenizer.model", b"\x0a\xff\xff\xff" * 9, "a broken SentencePiece model; copy it again"),
    ("tokenizer.model", LLAMA3_BYTES[:100_000], "line 7527: expected a base64 token and the rank 7526"),
    ("tokenizer.model", LLAMA3_BYTES[: LLAMA3_BYTES.index(b"7526\n")], "line 7527"),
    (
        "tokenizer.model",
        LLAMA3_BYTES[: LLAMA3_BYTES.index(b"7526\n") + 4],
        "7,527 tokens, not 128,000 as in Llama 3: cut",
    ),
    ("tokenizer.model", b"IQ== 0\n!!!! 1\n", "line 2: expected a base64 token and the rank 1; copy it again"),
    ("tokenizer.model", b"IQ== 0\nIg== 2\n", "line 2: expected a base64 token and the rank 1"),
    ("tokenizer.model", LLAMA4_MODEL.read_bytes(), "200,000 tokens, not 128,000 as in Llama 3"),
]


@pytest.mark.parametrize(("name", "content", "message"), MALFORMED, ids=[f"{n}: {m}" for n, _, m in MALFORMED])
def test_malformed_files(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        Tokenizer.from_dir(tmp_path)
    assert str(error.value).startswith(str(tmp_path / name))


def test_cut_off_sentencepiece_model(llama2_dir: Path, tmp_path: Path) -> None:
    content = (llama2_dir / "tokenizer.model").read_bytes()
    for size in range(1, len(content), 101):
        (tmp_path / "tokenizer.model").write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"tokenizer\.model: a broken SentencePiece model"):
            Tokenizer.from_dir(tmp_path)


def test_missing_folder_or_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere: not a folder; give the one with tokenizer\.json"):
        Tokenizer.from_dir(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no tokenizer; expected tokenizer\.json, tokenizer\.model or original"):
        Tokenizer.from_dir(tmp_path)


def test_bytes_missing_from_a_byte_level_vocabulary(tiny_dir: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_dir / "tokenizer.json").read_text())
    del config["model"]["vocab"]["Ń"], config["model"]["vocab"]["ą"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"lacks 2 of the 256 byte symbols.*initial_alphabet"):
        Tokenizer.from_dir(tmp_path)
