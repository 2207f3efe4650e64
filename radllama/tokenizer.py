"""Text to token ids and back, for Llama 3 and Llama 2, and the prompt formats both were trained with.

Three formats on disk, one class:

    tokenizer.json                  the `tokenizers` library's own: byte-level or SentencePiece-like BPE
    tokenizer.model, tiktoken       Meta's Llama 3: lines of "base64-token rank"; also in original/
    tokenizer.model, SentencePiece  Meta's Llama 2: a protobuf

One renderer serves training and generation: `render` gives the ids of a conversation and the mask of the
tokens that carry a label. Special tokens enter through `render` alone. The encoder does not know them, so a
report that spells out "<|eot_id|>" or "</s>" is tokenised as those characters.
"""

import base64
import binascii
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict, get_args

import sentencepiece
from tokenizers import Tokenizer as HFTokenizer
from tokenizers.pre_tokenizers import ByteLevel

PromptFormat = Literal["llama3", "llama2", "alpaca"]
StrPath = str | os.PathLike[str]
_PromptAndReply = tuple[list[int], list[int]]


class Message(TypedDict):
    role: Literal["system", "user", "assistant"]
    content: str


# Source: github.com/meta-llama/llama3, llama/tokenizer.py.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_PRE_TOKENIZER = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": LLAMA3_SPLIT}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ],
}
LLAMA3_NUM_BASE_TOKENS = 128_000
# Offsets above the base vocabulary, named as in Llama 3.1 to 3.3. Llama 3.0 calls those at 4, 8 and 10
# reserved; its other ids are the same, and tokenizer.model does not tell the two apart.
LLAMA3_SPECIALS = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}
LLAMA3_NUM_SPECIALS = 256

HEADER_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
STOP_TOKENS = ("<|eot_id|>", "<|eom_id|>")  # besides the token that ends a document
PAD_TOKENS = ("<|finetune_right_pad_id|>", "<pad>", "[PAD]", "<|pad|>")
BOS_EOS = (("<|begin_of_text|>", "<|end_of_text|>"), ("<s>", "</s>"))
CONTROL_TOKENS = {*HEADER_TOKENS, *STOP_TOKENS, *PAD_TOKENS, *BOS_EOS[0], *BOS_EOS[1], "<unk>"}

# The wording of tatsu-lab/stanford_alpaca. The line break that ends it is tloen/alpaca-lora's, whose recipe
# Radiology-GPT followed; it also parts prompt and answer cleanly in every tokenizer.
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)

LARGEST_FILE = 2**27  # bytes; Llama 3's tokenizer.json has 17 million
COPY_AGAIN = "copy it again from the checkpoint's source"

COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")


class Tokenizer:
    """Token ids for one checkpoint, and its prompt format. Made by `Tokenizer.from_dir`.

    Attributes:
        prompt_format: "llama3", "llama2" or "alpaca"
        vocab_size: highest id + 1, special tokens included
        bos_id: opens every conversation and document
        eos_id: ends the assistant's turn in this format
        end_of_text_id: ends a plain document: <|end_of_text|> or </s>
        stop_ids: generation ends on any of these
        pad_id: fills up a batch; never a stop id
        header_token_ids: special tokens of the format that a base (not instruct) checkpoint has not trained
    """

    def __init__(self, codec: "_Codec", files: dict[str, bytes], prompt_format: PromptFormat) -> None:
        specials = codec.specials
        bos, end_of_text = next((pair for pair in BOS_EOS if specials.keys() >= set(pair)), ("", ""))
        if not bos:
            raise ValueError(f"no begin and end token: expected one of {BOS_EOS} among the special tokens")
        missing = [name for name in HEADER_TOKENS if name not in specials]
        if prompt_format == "llama3" and missing:
            raise ValueError(
                f"the prompt format 'llama3' needs {', '.join(missing)}, which the special tokens lack; "
                "use 'llama2' or 'alpaca' with this checkpoint"
            )
        self.prompt_format: PromptFormat = prompt_format
        self.vocab_size: int = codec.vocab_size
        self.bos_id: int = specials[bos]
        self.end_of_text_id: int = specials[end_of_text]
        self.eos_id: int = specials["<|eot_id|>"] if prompt_format == "llama3" else self.end_of_text_id
        self.stop_ids: frozenset[int] = frozenset(
            [self.end_of_text_id, *(specials[name] for name in STOP_TOKENS if name in specials)]
        )
        self.header_token_ids: tuple[int, ...] = (
            tuple(specials[name] for name in HEADER_TOKENS) if prompt_format == "llama3" else ()
        )
        reserved = sorted(name for name in specials if name.startswith("<|reserved_special_token_"))
        self.pad_id: int = specials[next(n for n in (*PAD_TOKENS, *reserved, "<unk>", bos) if n in specials)]
        self._codec = codec
        self._files = files  # name -> content, as `save` writes them; the folder may be gone by then
        self._specials = specials
        self._special_ids = frozenset(specials.values())

    @classmethod
    def from_dir(cls, path: StrPath, *, prompt_format: PromptFormat | None = None) -> "Tokenizer":
        """Loads the tokenizer of a checkpoint folder.

        A SentencePiece tokenizer.model comes before tokenizer.json (which only imitates it), tokenizer.json
        before a tiktoken tokenizer.model (the same ids, loaded faster). Which of the two a tokenizer.model is
        shows in its content.

        Args:
            path: the folder
            prompt_format: by default "llama3" where the special tokens have Llama 3's headers, else "llama2";
                "alpaca" goes with any checkpoint and is used only when asked for

        Raises:
            ValueError: no tokenizer in the folder, a broken file, or a prompt format that does not fit it
        """
        formats = get_args(PromptFormat)
        if prompt_format is not None and prompt_format not in formats:
            raise ValueError(f"unknown prompt format {prompt_format!r}: expected one of {formats}")
        folder = Path(path)
        if not folder.is_dir():
            raise ValueError(f"{folder}: not a folder; give the one with tokenizer.json or tokenizer.model")
        source, codec, files = _load(folder)
        for name in COMPANIONS:
            if (folder / name).is_file():
                files[name] = _read(folder / name)
        by_specials: PromptFormat = "llama3" if codec.specials.keys() >= set(HEADER_TOKENS) else "llama2"
        try:
            return cls(codec, files, prompt_format or by_specials)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None

    def encode(self, text: str) -> list[int]:
        """The ids of plain text: no BOS, no EOS, and special tokens spelt out in it stay text.

        Unpaired surrogates (not valid Unicode) become U+FFFD, as in tiktoken.
        """
        return self._codec.encode(_well_formed(text))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts at once, on all cores."""
        return self._codec.encode_batch([_well_formed(text) for text in texts])

    @property
    def parts_sentences(self) -> bool:
        """Whether the ids of "A. B" are those of "A." and of " B", as Llama 3's split pattern makes sure."""
        return self._codec.parts_sentences

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special tokens and ids beyond the vocabulary give nothing.

        `decode(encode(text)) == text` holds for a byte-level BPE (all of Llama 3) unless the text has
        unpaired surrogates. For Llama 2's SentencePiece it holds, leading and repeated spaces included, but
        for U+2581 (its own sign for a space), which comes back as a space. Bytes that are not complete UTF-8
        come back as U+FFFD.

        Raises:
            ValueError: a negative id (a label mask such as -100 is not text)
        """
        ids = list(ids)
        if any(i < 0 for i in ids):
            raise ValueError(f"decode: negative id {min(ids)}; drop masked positions first")
        return self._codec.decode([i for i in ids if i < self.vocab_size and i not in self._special_ids])

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False
    ) -> tuple[list[int], list[bool]]:
        """A conversation as `(ids, loss_mask)`, both of length T.

        The mask is True on the assistant's answer and the stop token after it, and nowhere else. The ids of
        the prompt (`add_generation_prompt=True`, no answer) are an exact prefix of the ids with the answer.

        llama3: as Llama 3's own chat template; for Llama 3.1 and later without the date lines ("Cutting
            Knowledge Date", "Today Date") that their template puts into the system message.
        llama2: as Llama 2's own template. The token after <s> is "▁[", as in Meta's code and with the
            published tokenizer.json; a tokenizer.json whose Metaspace says prepend_scheme "first" (which
            transformers 5's LlamaTokenizer writes by default) gives "[", as it does there.
        alpaca: the system message is the instruction, the user message the input. Where one of them is
            missing or blank, the other is the instruction of the template without input.

        Args:
            messages: an optional system message, one user message, an optional assistant message
            add_generation_prompt: end with the header of the assistant's turn; the prompts of "llama2" and
                "alpaca" end the same way with and without

        Raises:
            ValueError: other roles or another order; a generation prompt after an answer
        """
        system, user, answer = _turns(messages)
        if add_generation_prompt and answer is not None:
            raise ValueError("render: add_generation_prompt after an answer; end with the user's message")
        match self.prompt_format:
            case "llama3":
                prompt, reply = self._llama3(system, user, answer, add_generation_prompt)
            case "llama2":
                prompt, reply = self._llama2(system, user, answer)
            case "alpaca":
                prompt, reply = self._alpaca(system, user, answer)
        # Prompt and answer are tokenised apart: a merge across their border would make the prompt's last ids
        # depend on the answer. With Llama 3's split pattern, and with Llama 2's pieces (a space only leads a
        # piece), joint tokenisation splits at the border as well, so the ids are still the template's.
        if answer is not None:
            reply.append(self.eos_id)
        return prompt + reply, [False] * len(prompt) + [True] * len(reply)

    def _llama3(self, system: str | None, user: str, answer: str | None, header: bool) -> _PromptAndReply:
        start, end, eot = self.header_token_ids
        prompt = [self.bos_id]
        for role, content in (("system", system), ("user", user)):
            if content is not None:
                prompt += [start, *self.encode(role), end, *self.encode("\n\n" + content.strip()), eot]
        if header or answer is not None:
            prompt += [start, *self.encode("assistant"), end, *self.encode("\n\n")]
        return prompt, self._continue((answer or "").strip())

    def _llama2(self, system: str | None, user: str, answer: str | None) -> _PromptAndReply:
        text = user if system is None else f"<<SYS>>\n{system}\n<</SYS>>\n\n{user}"
        text = f"[INST] {text.strip()} [/INST]"
        prompt = [self.bos_id, *(self.encode(text) if self._codec.prefix_after_bos else self._continue(text))]
        # The space before </s> is the template's: the model was trained to write it.
        return prompt, [] if answer is None else self._continue(f" {answer.strip()} ")

    def _alpaca(self, system: str | None, user: str, answer: str | None) -> _PromptAndReply:
        match [part.strip() for part in (system, user) if part and part.strip()]:
            case [instruction, given]:
                text = ALPACA_WITH_INPUT.format(instruction=instruction, input=given)
            case parts:
                text = ALPACA_WITHOUT_INPUT.format(instruction="".join(parts))
        return [self.bos_id, *self.encode(text)], self._continue((answer or "").strip())

    def _continue(self, text: str) -> list[int]:
        """The ids of text in the middle of a line: without SentencePiece's dummy space in front."""
        return self._codec.encode_continuation(_well_formed(text))

    def save(self, path: StrPath) -> None:
        """Writes the tokenizer files into a folder (made if missing), for `from_dir` and for transformers.

        The files that were loaded are copied; a tiktoken tokenizer.model gets a tokenizer.json beside it, and
        a tokenizer_config.json is written where there was none.

        Raises:
            ValueError: the folder holds the file of another tokenizer that this one would not replace
        """
        folder = Path(path)
        for name in ("tokenizer.json", "tokenizer.model"):
            if (folder / name).exists() and name not in self._files:
                raise ValueError(f"{folder / name}: of another tokenizer; remove it or choose another folder")
        folder.mkdir(parents=True, exist_ok=True)
        files = {"tokenizer_config.json": self._transformers_config(), **self._files}
        for name, content in files.items():
            temporary = folder / f".{name}.{os.getpid()}"
            temporary.write_bytes(content)
            temporary.replace(folder / name)

    def _transformers_config(self) -> bytes:
        names = {i: name for name, i in self._specials.items()}
        config: dict[str, Any] = {
            "bos_token": names[self.bos_id],
            "eos_token": names[self.eos_id],
            "pad_token": names[self.pad_id],
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
        }
        if "tokenizer.json" in self._files:
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
        else:
            config |= {"tokenizer_class": "LlamaTokenizer", "legacy": True}  # legacy: "▁[" after <s>, as here
        return (json.dumps(config, indent=2) + "\n").encode()


class _Bpe:
    """A tokenizer.json with its special tokens taken out, so that no text can be encoded to one.

    The library's `encode_special_tokens` would not do: a special token that also lies in the BPE vocabulary
    (BpeTrainer puts it there) can still be reached by merges or `ignore_merges`.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        model = config.get("model")
        if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict) or "merges" not in model:
            raise ValueError("expected a BPE model with 'vocab' and 'merges'")
        vocab: dict[str, int] = model["vocab"]
        added: list[dict[str, Any]] = config.get("added_tokens") or []
        ids = [*vocab.values(), *(token["id"] for token in added)]
        if wrong := [number for number in ids if type(number) is not int or not 0 <= number < 2**31]:
            raise ValueError(f"expected ids from 0 on, found {wrong[0]!r:.80}")
        if not all(isinstance(token["content"], str) for token in added):
            raise ValueError("added_tokens: expected texts as content")
        self.specials = {name: vocab[name] for name in sorted(CONTROL_TOKENS & vocab.keys())}
        self.specials |= {
            token["content"]: token["id"]
            for token in added
            if token.get("special") or token["content"] in CONTROL_TOKENS
        }
        if "ByteLevel" in json.dumps([config.get("pre_tokenizer"), config.get("normalizer")]):
            missing = len(set(ByteLevel.alphabet()) - vocab.keys())
            if missing:  # the library drops such bytes without a word
                raise ValueError(
                    f"the byte-level vocabulary lacks {missing} of the 256 byte symbols, whose text would be "
                    "lost; train it with initial_alphabet=ByteLevel.alphabet()"
                )

        # Other added tokens stay matchable; in the vocabulary they keep their ids.
        ordinary = [token for token in added if token["content"] not in self.specials]
        unk = model.get("unk_token")
        kept = {name: i for name, i in vocab.items() if name not in self.specials or name == unk}
        kept |= {token["content"]: token["id"] for token in ordinary}
        in_vocab = self.specials.keys() & vocab.keys()
        merges = [m for m in model["merges"] if in_vocab.isdisjoint(_pieces(m))] if in_vocab else model["merges"]
        config = config | {
            "model": model | {"vocab": kept, "merges": merges},
            "added_tokens": ordinary,
            "post_processor": None,  # would add BOS
            "truncation": None,
            "padding": None,
        }
        self.vocab_size = 1 + max([*kept.values(), *self.specials.values()], default=-1)
        self.parts_sentences = (
            config.get("pre_tokenizer") == LLAMA3_PRE_TOKENIZER and not config.get("normalizer") and not ordinary
        )
        self._tokenizer = _build(config)
        bare = _without_prefix(config)
        self._continuation = self._tokenizer if bare == config else _build(bare)
        # "first": a space only where the line begins, and templates begin it with <s>.
        self.prefix_after_bos = '"prepend_scheme": "first"' not in json.dumps(config.get("pre_tokenizer"))

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_continuation(self, text: str) -> list[int]:
        return self._continuation.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


class _SentencePiece:
    """A SentencePiece model. It never encodes text to its control tokens (<s>, </s>)."""

    prefix_after_bos = True  # as Meta's code encodes the prompt, and puts BOS in front afterwards
    parts_sentences = False

    def __init__(self, proto: bytes) -> None:
        self._model = sentencepiece.SentencePieceProcessor(model_proto=proto)
        # Fields of a protobuf message that come later override: normalizer_spec { add_dummy_prefix: false }.
        self._continuation = sentencepiece.SentencePieceProcessor(model_proto=proto + b"\x1a\x02\x18\x00")
        self.vocab_size: int = self._model.vocab_size()
        self.specials: dict[str, int] = {
            self._model.id_to_piece(i): i
            for i in range(self.vocab_size)
            if self._model.is_control(i) or self._model.is_unknown(i)
        }

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._model.encode(text)
        return ids

    def encode_continuation(self, text: str) -> list[int]:
        ids: list[int] = self._continuation.encode(text)
        return ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self._model.encode(texts)
        return ids

    def decode(self, ids: list[int]) -> str:
        text: str = self._model.decode(ids)
        return text


_Codec = _Bpe | _SentencePiece


def _turns(messages: Sequence[Message]) -> tuple[str | None, str, str | None]:
    """(system, user, assistant) of a valid conversation. Errors show roles, never content."""
    for n, message in enumerate(messages, 1):
        fields = (message.get("role"), message.get("content")) if isinstance(message, Mapping) else ()
        if not fields or not all(isinstance(field, str) for field in fields):
            raise ValueError(f"render: message {n} must be a mapping with the strings 'role' and 'content'")
    turns = {message["role"]: message["content"] for message in messages}
    roles = [message["role"] for message in messages]
    if roles not in (["user"], ["system", "user"], ["user", "assistant"], ["system", "user", "assistant"]):
        raise ValueError(f"render: expected the roles [system], user, [assistant] in this order, got {roles}")
    return turns.get("system"), turns["user"], turns.get("assistant")


def _well_formed(text: str) -> str:
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:  # pairs of surrogates join, unpaired ones become U+FFFD
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _load(folder: Path) -> tuple[Path, _Codec, dict[str, bytes]]:
    """The file a tokenizer was read from, the tokenizer, and the files that make it up."""
    json_file, model_file = folder / "tokenizer.json", folder / "tokenizer.model"
    if not json_file.is_file() and not model_file.is_file():
        model_file = folder / "original" / "tokenizer.model"
    model = _read(model_file) if model_file.is_file() else None
    kind = None if model is None else _kind(model_file, model)
    if model is not None and kind == "sentencepiece":
        try:
            sentence_piece = _SentencePiece(model)
        except (RuntimeError, ValueError):
            raise ValueError(f"{model_file}: a broken SentencePiece model; {COPY_AGAIN}") from None
        files = {"tokenizer.model": model}
        if json_file.is_file():
            files["tokenizer.json"] = json_file.read_bytes()
        return model_file, sentence_piece, files
    if json_file.is_file():
        content = _read(json_file)
        return json_file, _parse_json(json_file, content), {"tokenizer.json": content}
    if model is not None:
        config = _llama3_json(_parse_tiktoken(model_file, model))
        content = json.dumps(config, ensure_ascii=False).encode()
        return model_file, _Bpe(config), {"tokenizer.model": model, "tokenizer.json": content}
    raise ValueError(
        f"{folder}: no tokenizer; expected tokenizer.json, tokenizer.model or original/tokenizer.model. "
        "Copy it from the checkpoint's source"
    )


def _read(file: Path) -> bytes:
    if file.stat().st_size > LARGEST_FILE:
        raise ValueError(f"{file}: more than {LARGEST_FILE:,} bytes, which no tokenizer has; {COPY_AGAIN}")
    content = file.read_bytes()
    if not content:
        raise ValueError(f"{file}: empty; {COPY_AGAIN}")
    if content.startswith(b"version https://git-lfs"):
        raise ValueError(f"{file}: a Git LFS pointer, not the file; run `git lfs pull` in its repository")
    return content


def _kind(file: Path, content: bytes) -> Literal["tiktoken", "sentencepiece"]:
    if re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\s", content):
        return "tiktoken"
    if content[:1] == b"\x0a":  # the tag of the first piece in SentencePiece's protobuf
        return "sentencepiece"
    raise ValueError(
        f"{file}: neither Meta's tiktoken format (lines of 'base64 rank', Llama 3) nor a SentencePiece model "
        f"(Llama 2); {COPY_AGAIN}, or remove it if a tokenizer.json lies beside it"
    )


def _parse_json(file: Path, content: bytes) -> _Bpe:
    try:
        config = json.loads(content)
    except RecursionError:
        raise ValueError(f"{file}: not valid JSON (nested too deeply); {COPY_AGAIN}") from None
    except ValueError as error:
        where = f"line {error.lineno}" if isinstance(error, json.JSONDecodeError) else "not UTF-8"
        raise ValueError(f"{file}: not valid JSON ({where}), perhaps cut off; {COPY_AGAIN}") from None
    try:
        if not isinstance(config, dict):
            raise ValueError("expected a JSON object")
        return _Bpe(config)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file}: not a usable tokenizer.json: {error!s:.500}; {COPY_AGAIN}") from None


def _parse_tiktoken(file: Path, content: bytes) -> dict[bytes, int]:
    """Token bytes -> rank, in order of rank."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), 1):
        try:
            token, rank = line.split()
            if int(rank) != number - 1:
                raise ValueError
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(
                f"{file}, line {number}: expected a base64 token and the rank {number - 1}; {COPY_AGAIN}"
            ) from None
    if len(ranks) != LLAMA3_NUM_BASE_TOKENS:
        raise ValueError(
            f"{file}: {len(ranks):,} tokens, not {LLAMA3_NUM_BASE_TOKENS:,} as in Llama 3: cut off, or of "
            f"another model; {COPY_AGAIN}, or use a tokenizer.json"
        )
    return ranks


def _llama3_json(ranks: dict[bytes, int]) -> dict[str, Any]:
    """The tokenizer.json of Llama 3, from the ranks of its tiktoken file."""
    # The printable stand-ins for the 256 bytes (GPT-2's): printable Latin-1 stands for itself.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    symbol = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}

    def spell(token: bytes) -> str:
        return "".join(symbol[byte] for byte in token)

    # tiktoken merges any two neighbours that make a token, the lowest rank first: each way to part a token is
    # a merge, in the order of the published file. A whole word that is a token stays one, also where merges
    # would not find it: `ignore_merges`.
    merges: list[list[str]] = []
    for token in ranks:
        cuts = [c for c in range(1, len(token)) if token[:c] in ranks and token[c:] in ranks]
        cuts.sort(key=lambda c: (ranks[token[:c]], ranks[token[c:]]))
        merges += [[spell(token[:c]), spell(token[c:])] for c in cuts]
    unnamed = [n for n in range(LLAMA3_NUM_SPECIALS) if n not in LLAMA3_SPECIALS]
    names = LLAMA3_SPECIALS | {n: f"<|reserved_special_token_{k}|>" for k, n in enumerate(unnamed)}
    flags: dict[str, Any] = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    bos = LLAMA3_SPECIALS[0]
    sequence_a, sequence_b = ({"Sequence": {"id": name, "type_id": n}} for n, name in enumerate("AB"))
    bos_a, bos_b = ({"SpecialToken": {"id": bos, "type_id": n}} for n in range(2))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": len(ranks) + n, "content": names[n], **flags} for n in sorted(names)],
        "normalizer": None,
        "pre_tokenizer": LLAMA3_PRE_TOKENIZER,
        # For other readers of the file (transformers adds BOS by it); `_Bpe` drops it.
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos_a, sequence_a],
            "pair": [bos_a, sequence_a, bos_b, sequence_b],
            "special_tokens": {bos: {"id": bos, "ids": [len(ranks)], "tokens": [bos]}},
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "ignore_merges": True,
            "vocab": {spell(token): rank for token, rank in ranks.items()},
            "merges": merges,
        },
    }


def _build(config: dict[str, Any]) -> HFTokenizer:
    try:
        return HFTokenizer.from_str(json.dumps(config))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(str(error)) from None
    except BaseException as error:  # a panic in its Rust code is no Exception, and its class cannot be imported
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"the tokenizers library cannot build it ({error})") from None


def _pieces(merge: str | list[str]) -> tuple[str, str, str]:
    """Left, right and their merger. Older files write a merge "left right", newer ones ["left", "right"]."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right, left + right


def _without_prefix(config: dict[str, Any]) -> dict[str, Any]:
    """The same tokenizer, but with no space put before the text, whichever of the three ways it is done."""

    def strip(node: Any) -> Any:
        match node:
            case {"type": "Sequence"}:
                return {k: [strip(n) for n in v] if isinstance(v, list) else v for k, v in node.items()}
            case {"type": "Prepend"}:
                return {"type": "Sequence", "normalizers": []}
            case {"type": "Metaspace"}:
                return node | {"prepend_scheme": "never", "add_prefix_space": False}
            case {"type": "ByteLevel", "add_prefix_space": True}:
                return node | {"add_prefix_space": False}
        return node

    return config | {key: strip(config.get(key)) for key in ("normalizer", "pre_tokenizer")}
