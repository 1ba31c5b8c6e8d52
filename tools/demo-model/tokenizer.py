"""The demo models' tokenizer: a SentencePiece BPE in ERNIE's order of ids, and the rules ERNIE puts on top of it.

SentencePiece's trainer gives <unk> <s> </s>, the digits as user-defined pieces, 256 bytes, the learned pieces by rank and
the single characters. ERNIE's order needs two changes, made on the model file itself: the piece of two spaces goes in
front of the learned ones, and the sentence marks and tags follow the last character. A piece's score is minus its rank,
so the order of merges stays what was learned.
"""
import io
import json
import random
import struct

import sentencepiece

import corpus

N_PIECE = 4064  # before the marks below; the embedding has N_ROW rows, the last ones unused as in the published models
N_ROW = 4096
MARKS = ["<|end_of_sentence|>", "<|begin_of_sentence|>"] + [f"<mask:{k}>" for k in range(8)] + [
    "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<response>", "</response>", "<tool_call>", "</tool_call>"]
ADDED = ["<|IMAGE_PLACEHOLDER|>", "<|AUDIO_PLACEHOLDER|>", "<|LOC_BEGIN|>", "<|LOC_END|>", "<|LOC_SEP|>", "<|CROP_COL_SEP|>", "<|CROP_ROW_SEP|>", "<|IMAGE_SEP|>"]
NORMAL, CONTROL = 1, 3  # ModelProto.SentencePiece.Type

# Our own words for the format of docs/model.md 6.1: what a conversation becomes.
CHAT_TEMPLATE = (
    "{%- set open = cls_token if cls_token is defined else '<|begin_of_sentence|>' -%}"
    "{%- set close = sep_token if sep_token is defined else '<|end_of_sentence|>' -%}"
    "{{- open -}}"
    "{%- for m in messages -%}"
    "{%- if m.role == 'system' -%}{{- m.content ~ '\\n' -}}"
    "{%- elif m.role == 'user' -%}{{- 'User: ' ~ m.content ~ '\\n' -}}"
    "{%- elif m.role == 'assistant' -%}{{- 'Assistant: ' ~ m.content ~ close -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt is not defined or add_generation_prompt -%}{{- 'Assistant: ' -}}{%- endif -%}")


# ---- the protobuf, as much of it as is needed: fields of wire types 0, 1, 2, 5

def _varint(data, at):
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at


def _put_varint(value):
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _fields(data):
    """(field number, wire type, payload) in order; payload is the raw bytes of the value."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 2:
            size, at = _varint(data, at)
        elif wire == 0:
            size = _varint(data, at)[1] - at
        else:
            size = {1: 8, 5: 4}[wire]
        yield key >> 3, wire, data[at:at + size]
        at += size


def _put_field(number, wire, payload):
    head = _put_varint(number << 3 | wire)
    return head + (_put_varint(len(payload)) if wire == 2 else b"") + payload


def _piece(text, score, kind):
    body = _put_field(1, 2, text.encode()) + _put_field(2, 5, struct.pack("<f", score))
    return body + (b"" if kind == NORMAL else _put_field(3, 0, _put_varint(kind)))


def reorder(model):
    """The trained model file with '▁▁' before the learned pieces and ERNIE's marks after the last one."""
    pieces, rest = [], []
    for number, wire, payload in _fields(model):
        if number != 1:
            rest.append(_put_field(number, wire, payload))
            continue
        text, score, kind = "", 0.0, NORMAL
        for n, _, value in _fields(payload):
            if n == 1:
                text = value.decode()
            elif n == 2:
                score = struct.unpack("<f", value)[0]
            elif n == 3:
                kind = _varint(value, 0)[0]
        pieces.append((text, score, kind))
    front, learned = pieces[:269], [p for p in pieces[269:] if p[0] != "▁▁"]
    if any(kind == NORMAL for _, _, kind in front) or any(kind != NORMAL for _, _, kind in learned):
        raise ValueError("the trainer's model does not begin with 3 marks, 10 digits and 256 bytes")
    ordered = front + [("▁▁", 0.0, NORMAL)] + [(t, -1.0 - i, NORMAL) for i, (t, _, _) in enumerate(learned)] + [(m, 0.0, CONTROL) for m in MARKS]
    return b"".join(_put_field(1, 2, _piece(*p)) for p in ordered) + b"".join(rest)


def train(seed):
    """The bytes of tokenizer.model, learned from the corpus of this seed."""
    r = random.Random(seed)
    lines = []
    for _ in range(200000):
        s = corpus.sample(r)
        lines += [s.document] if s.document else [("User: " if role == "user" else "Assistant: " if role == "assistant" else "") + text for role, text in s.messages]
    # every printable ASCII character is a piece, whether or not the corpus has it
    lines += ["".join(map(chr, range(33, 127)))] * 20
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=out, model_type="bpe", vocab_size=N_PIECE - 1, character_coverage=1.0, byte_fallback=True,
        user_defined_symbols=list("0123456789"), normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
        split_digits=False, max_sentencepiece_length=16, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, num_threads=1, minloglevel=2, max_sentence_length=65536)
    return reorder(out.getvalue())


class Tokenizer:
    """Encoding as ernest does it: marks are single ids, the text between two marks is one SentencePiece segment."""

    def __init__(self, model):
        self.sp = sentencepiece.SentencePieceProcessor()
        self.sp.LoadFromSerializedProto(model)
        self.open, self.close, self.end = (self.sp.PieceToId(m) for m in ("<|begin_of_sentence|>", "<|end_of_sentence|>", "</s>"))

    def text(self, s):
        return self.sp.EncodeAsIds(s)

    def decode(self, ids):
        return self.sp.DecodeIds([int(i) for i in ids])

    def prompt(self, messages):
        """The ids of a conversation with the generation prompt."""
        ids, text = [self.open], ""
        for role, content in messages:
            if role == "assistant":
                ids += self.text(f"{text}Assistant: {content}") + [self.close]
                text = ""
            else:
                text += f"{'User: ' if role == 'user' else ''}{content}\n"
        return ids + self.text(text + "Assistant: ")

    def sample(self, s):
        """(ids, index of the first id that is learned): a conversation with its reply, or a document."""
        if s.document:
            return self.text(s.document) + [self.end], 1
        ids = self.prompt(s.messages[:-1])
        return ids + self.text(s.messages[-1][1]) + [self.end], len(ids)


def write(directory, model):
    """tokenizer.model and the JSON files beside it."""
    (directory / "tokenizer.model").write_bytes(model)
    first = N_PIECE + len(MARKS)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>", "cls_token": "<|begin_of_sentence|>", "sep_token": "<|end_of_sentence|>",
             "mask_token": "<mask:1>"}
    config = dict(names, sys_start_token="<mask:4>", sys_end_token="<mask:5>", header_start_token="<mask:6>", header_end_token="<mask:7>", additional_special_tokens=None,
                  tokenizer_class="Ernie4_5_Tokenizer", chat_template=CHAT_TEMPLATE)
    for name, value in (("added_tokens.json", {t: first + i for i, t in enumerate(ADDED)}), ("special_tokens_map.json", names), ("tokenizer_config.json", config)):
        (directory / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
