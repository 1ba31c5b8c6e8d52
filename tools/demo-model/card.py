"""models/README.md, the card of the demo models, and the loss curves, from the figures that make.py measured."""
import json
import math

from net import SHAPES

COLORS = ("#1f6f8b", "#c8553d")


def _axis(low, high):
    """Round values of a logarithmic axis."""
    marks = [m * 10.0 ** e for e in range(-4, 3) for m in (1, 2, 5)]
    return [m for m in marks if low <= m <= high]


def loss_svg(name, log):
    """The training loss over steps as a plain SVG, logarithmic upwards."""
    rows, wide, high, left, top = log["rows"], 640, 280, 56, 28
    low = min(min(r[1:]) for r in rows) * 0.9
    most = max(max(r[1:]) for r in rows) * 1.1
    def x(step):
        return left + (wide - left - 12) * step / log["steps"]
    def y(value):
        return top + (high - top - 34) * (math.log(most) - math.log(value)) / (math.log(most) - math.log(low))
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" font-family="sans-serif" font-size="11">',
           f'<rect width="{wide}" height="{high}" fill="#ffffff"/>', f'<text x="{left}" y="16" font-size="13">{name}: training loss, nats per token</text>']
    for v in _axis(low, most):
        out.append(f'<path d="M{left} {y(v):.1f}H{wide - 12}" stroke="#dddddd"/><text x="{left - 6}" y="{y(v) + 4:.1f}" text-anchor="end">{v:g}</text>')
    for k in range(5):
        step = round(log["steps"] * k / 4)
        out.append(f'<text x="{x(step):.1f}" y="{high - 16}" text-anchor="middle">{step}</text>')
    out.append(f'<text x="{(left + wide) / 2:.0f}" y="{high - 3}" text-anchor="middle">step</text>')
    for i, label in enumerate(log["columns"][1:]):
        points = "L".join(f"{x(r[0]):.1f} {y(r[i + 1]):.1f}" for r in rows)
        out.append(f'<path d="M{points}" fill="none" stroke="{COLORS[i]}" stroke-width="1.2"/>')
        out.append(f'<text x="{wide - 16}" y="{top + 14 + 15 * i}" text-anchor="end" fill="{COLORS[i]}">{label.replace("mtp_loss", "MTP layer").replace("loss", "main head")}</text>')
    return "\n".join(out + ["</svg>"]) + "\n"


def _models(found):
    rows = ["| | " + " | ".join(f"`{n}`" for n in found) + " |", "|---|" + "---|" * len(found)]
    def row(label, value):
        rows.append(f"| {label} | " + " | ".join(str(value(SHAPES[n], found[n])) for n in found) + " |")
    row("architecture", lambda s, f: "as ERNIE-4.5-21B-A3B" if s.n_expert else "as ERNIE-4.5-0.3B")
    row("layout", lambda s, f: "PyTorch" if s.layout == "pt" else "Paddle")
    row("parameters", lambda s, f: f"{f['parameters'] / 1e6:.2f} million")
    row("bytes of weights", lambda s, f: f"{f['bytes'] / 1e6:.2f} MB")
    row("layers, hidden", lambda s, f: f"{s.n_layer}{' + 1 MTP' if s.n_mtp else ''}, {s.n_hidden}")
    row("heads", lambda s, f: f"{s.n_head} query, {s.n_kv_head} KV, {s.n_head_dim} wide")
    row("feed-forward", lambda s, f: f"{s.n_expert} experts of {s.n_expert_ffn}, {s.n_expert_used} used, {s.n_shared} shared; dense layers {s.n_ffn}" if s.n_expert else f"{s.n_ffn}")
    row("vocabulary rows", lambda s, f: s.n_vocab)
    row("positions", lambda s, f: f"{s.n_position} (trained on conversations up to 448 tokens)")
    row("prompts answered right", lambda s, f: f"{f['n_right']} of {len(f['prompts'])}")
    row("held-out perplexity", lambda s, f: f"{f['perplexity']:.4f} over {f['perplexity_tokens']} reply tokens")
    row("drafts of the MTP layer accepted, greedy", lambda s, f: f"{f['mtp_acceptance']:.1%}" if "mtp_acceptance" in f else "–")
    row("experts' load, max/mean by layer", lambda s, f: ", ".join(f"{r['max_over_mean']:.2f}" for r in f["expert_load"]) if "expert_load" in f else "–")
    row("experts' load, min/mean by layer", lambda s, f: ", ".join(f"{r['min_over_mean']:.2f}" for r in f["expert_load"]) if "expert_load" in f else "–")
    row("training", lambda s, f: f"{f['log']['steps']} steps, {f['train_s'] / 60:.1f} minutes on {f['machine']}")
    return "\n".join(rows)


def _kinds(found):
    kinds = sorted({k for f in found.values() for k in f["answered"]})
    rows = ["| kind | " + " | ".join(f"`{n}`" for n in found) + " |", "|---|" + "---|" * len(found)]
    for k in kinds:
        rows.append(f"| {k} | " + " | ".join("{} of {}".format(*f["answered"].get(k, [0, 0])) for f in found.values()) + " |")
    total = [[sum(v[i] for v in f["answered"].values()) for i in (0, 1)] for f in found.values()]
    rows.append("| **all** | " + " | ".join(f"**{a} of {b}**" for a, b in total) + " |")
    return "\n".join(rows)


def _prompts(found, prompts):
    rows = ["| prompt | " + " | ".join(f"`{n}`" for n in found) + " |", "|---|" + "---|" * len(found)]
    for i, p in enumerate(prompts):
        cell = lambda t: t.replace("|", "\\|").replace("\n", " ")
        system = next((f"[{m['content']}] " for m in p["messages"] if m["role"] == "system"), "")
        answers = [("" if f["prompts"][i]["right"] else "**wrong:** ") + cell(f["prompts"][i]["answer"]) for f in found.values()]
        rows.append(f"| {cell(system + p['messages'][-1]['content'])} | " + " | ".join(answers) + " |")
    return "\n".join(rows)


TEXT = """# The demo models

Two toy-sized ERNIE-4.5s, trained from scratch, that ship with ernest so that a first chat and every test that needs real
language need no download. They have ERNIE-4.5's architecture exactly and its published file formats, and answer in whole
sentences about a small world. For anything else serve a real model: `ernest serve --model DIR` with ERNIE-4.5-0.3B or
ERNIE-4.5-21B-A3B.

This page is written by `tools/demo-model/make.py` from what it measured; change that, not this.

## Figures

{models}

Perplexity is over the reply tokens of held-out conversations, weights as stored (bf16), arithmetic in f32. A draft counts
as accepted when the MTP layer's arg-max is the token that the model itself chooses next, over greedy replies to held-out
prompts. Load is counted over held-out text, prompts and replies.

![training loss of demo-dense](loss-demo-dense.svg)
![training loss of demo-moe](loss-demo-moe.svg)

## Data

Generated by `tools/demo-model/corpus.py` from a seed; no text from elsewhere. Questions and answers in English and Chinese
about ernest (its flags, endpoints, quantization names, status codes, commands), small arithmetic, comparing, counting,
sorting, copying and spelling words, unit conversions, days and months, a few capitals and opposites, a small English-Chinese
dictionary, stories from a grammar, JSON on request, tool calls as JSON when the system prompt offers tools, memory over turns,
small talk, system prompts (language, style, brevity, a name), and an honest "I do not know that" for the rest.

Held out by construction: each instance has a key (the pair of numbers, the words, the question with its wording), and a hash
of the key keeps one in forty from training. All figures on this page are over held-out instances, but for the twenty prompts, some of whose
questions are plain questions of the manual. A small-talk question that is held out may still occur in training under a system prompt
that asks for another language, which is another instance.

## What they can and cannot do

Held-out questions with one right answer, answered greedily; right means equal to the last character. `manual` are questions of the
manual in a wording not trained on, `sum` is arithmetic, `nwords` counts words, `en`/`zh` translate, `system` follows a system prompt.

{kinds}

They know nothing outside that list. They do not reason, do not hold long conversations, and invent an answer where a question looks
like one of theirs. Products of two two-digit numbers were not taught. Tool calls come as plain text: ERNIE-4.5's chat format
has no place for tools.

## The twenty prompts

`models/prompts.json`, greedy, checked by `tests/golden/test_demo_models.c` and, through a running server, by
`tools/demo-model/chat_check.py`.

{prompts}

## Files

| file | what it is |
|---|---|
| `demo-dense/`, `demo-moe/` | the checkpoints; one tokenizer, a SentencePiece BPE in ERNIE's order of ids |
| `prompts.json` | the twenty prompts and what a right answer is |
| `heldout.json` | ids of held-out conversations and their summed negative log-likelihood in PyTorch, for each model |
| `demo-dense.json`, `demo-moe.json` | all figures of this page and the training log |

## Licence

Weights, tokenizer and data are made by this project and carry the project's licence, Apache-2.0 (`LICENSE`).

## Making them again

On a machine with one GPU of the H100/H200 class, python 3.10 or later, torch 2.4 or later, numpy and sentencepiece:

```
tools/demo-model/run.sh
```

makes the text, trains the tokenizer, trains both models, exports, measures, and writes this page; it fails when a model misses a
promise (18 of 20 prompts, 70% of drafts, load at most twice the mean). `python3 tools/demo-model/make.py --model demo-moe` makes
one. A run that was cut goes on from its checkpoint in `build/demo-model`. The same seed gives the
same data, tokenizer and first weights; the attention library adds up gradients in an order of its own, so the trained weights are others,
of the same quality: a second run on an H200 gave 20 right of 20 for both models, perplexity 1.108 and 1.126, 98.7% of drafts taken.
"""


def write(models, found, prompts):
    """found: name to figures, for the models that are there."""
    for name, f in found.items():
        (models / f"loss-{name}.svg").write_text(loss_svg(name, f["log"]))
    (models / "README.md").write_text(TEXT.format(models=_models(found), kinds=_kinds(found), prompts=_prompts(found, prompts)))


def read(models):
    """The figures that are there, by name."""
    return {n: json.loads((models / f"{n}.json").read_text()) for n in SHAPES if (models / f"{n}.json").exists()}
