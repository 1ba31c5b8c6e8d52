#!/usr/bin/env python3
"""Make a demo model: text, tokenizer, training, checkpoint, figures, card. See models/README.md.

    python3 tools/demo-model/make.py --model demo-dense

Exit code 1 when the model misses a promise of its card.
"""
import argparse
import json
import os
import pathlib
import sys
import time

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS: the same sums each time
import torch

import card
import evaluate
import export
import tokenizer
import train
from net import SHAPES

ROOT = pathlib.Path(__file__).resolve().parents[2]
STEPS = {"demo-dense": 6000, "demo-moe": 4500}


def say(text):
    print(text, flush=True)


def get_tokenizer(work, seed):
    """The tokenizer both models share: learned once for a work folder."""
    path = work / f"tokenizer-{seed}.model"
    if not path.exists():
        say("learning the tokenizer")
        new = path.with_suffix(f".{os.getpid()}")
        new.write_bytes(tokenizer.train(seed))
        new.replace(path)
    return path.read_bytes()


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--model", required=True, choices=SHAPES)
    a.add_argument("--seed", type=int, default=45)
    a.add_argument("--steps", type=int, help="training steps (default: enough for the promises in five minutes of an H200)")
    a.add_argument("--samples", type=int, default=2000000, help="conversations to train on")
    a.add_argument("--batch-tokens", type=int, default=32768, help="tokens of a step, padding included")
    a.add_argument("--models", type=pathlib.Path, default=ROOT / "models", help="where the checkpoint and the card go")
    a.add_argument("--work", type=pathlib.Path, default=ROOT / "build" / "demo-model", help="where the run keeps its checkpoint")
    a.add_argument("--save-every", type=float, default=60, metavar="SECONDS")
    o = a.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.use_deterministic_algorithms(True, warn_only=True)
    steps = o.steps or STEPS[o.model]
    out = o.models / o.model
    out.mkdir(parents=True, exist_ok=True)
    o.work.mkdir(parents=True, exist_ok=True)

    t0 = time.monotonic()
    model = get_tokenizer(o.work, o.seed)
    tok = tokenizer.Tokenizer(model)
    rows = train.load_rows(o.work / f"rows-{o.seed}-{o.samples}.npz", model, o.seed, o.samples)
    say(f"{o.model}: {sum(map(len, rows.values()))} samples in {time.monotonic() - t0:.0f} s: " + ", ".join(f"{len(v)} of {t}" for t, v in rows.items()))

    run = train.Run(o.model, o.seed, steps, device)
    checkpoint = o.work / f"{o.model}.pt"
    if checkpoint.exists():
        run.load(checkpoint)
        say(f"{o.model}: going on from step {run.step}")
    t1 = time.monotonic()
    train.train(run, rows, o.batch_tokens, checkpoint, o.save_every, say)
    run.save(checkpoint)
    train_s = time.monotonic() - t1

    net = run.averaged()
    n_bytes = export.write(out, net)
    tokenizer.write(out, model)
    prompts = json.loads((ROOT / "models" / "prompts.json").read_text())
    figures = evaluate.measure(net, tok, prompts, device)
    figures |= {"bytes": n_bytes, "parameters": sum(p.numel() for p in net.parameters()) + sum(b.numel() for b in net.buffers()), "seed": o.seed,
                "train_s": train_s, "machine": torch.cuda.get_device_name() if device == "cuda" else "a CPU", "torch": torch.__version__,
                "log": {"steps": steps, "columns": ["step", "loss", "mtp_loss"][:len(run.log[0])], "rows": [[r[0]] + [round(v, 5) for v in r[1:]] for r in run.log]}}
    (o.models / f"{o.model}.json").write_text(json.dumps(figures, ensure_ascii=False) + "\n")

    found = card.read(o.models)
    card.write(o.models, found, prompts)
    evaluate.write_heldout(o.models / "heldout.json", tok, {n: f for n, f in found.items()})
    for p in figures["prompts"]:
        say(f"{'right' if p['right'] else 'WRONG'}  {p['name']}: {p['answer']}")
    say(f"{o.model}: {figures['n_right']} right, perplexity {figures['perplexity']:.4f}, {n_bytes} bytes, {time.monotonic() - t0:.0f} s in all")
    say("  " + ", ".join(f"{k} {v[0]}/{v[1]}" for k, v in figures["answered"].items()))
    say("  " + json.dumps({k: figures[k] for k in ("mtp_acceptance", "expert_load") if k in figures}))
    missed = evaluate.failures(figures)
    for line in missed:
        say(f"{o.model}: {line}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
