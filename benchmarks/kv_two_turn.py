"""Second questions over the first one's cache, on the testbed: what dropping loses there, and what keeping the dropped tokens' keys and values
in few bits gives back.

    python -m benchmarks.kv_two_turn [--items 114] [--keep 36]      # writes benchmarks/results/kv_two_turn.json

The `two_turn` slice of `test`: the first question goes through prefill, the second is fed behind the first answer (`Session.conversation`):
nothing is computed twice, so what was dropped for the first question is gone for the second. Greedy, exact match, torch on the CPU.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from benchmarks.measure import machine, save
from examples.testbed import make_data
from examples.testbed.dataset import score
from examples.testbed.evaluate import CHECKPOINT
from foveate.graph.capture import capture
from foveate.in_memory import in_memory
from foveate.passes.pipeline import run
from foveate.passes.recipe import load
from foveate.runtime.session import Session
from foveate.runtime.stats import wilson


def recipes(keep: int) -> dict[str, str]:
    drop = f"drop-fastv{{layer=2,keep={keep}}}"
    return {"all tokens": "none", "dropped": drop, **{
        f"dropped, kept in {lo}": f"{drop},kv-keep-dropped{{hi=int8,lo={lo}}}" for lo in ("int4", "int2")}}


def session(program: Any, processor: Any) -> Session:
    return in_memory(program, processor, {"pad_token_id": 0})


def measure(one: Session, items: list[Any]) -> dict[str, Any]:
    marks, held, start = [], [], time.perf_counter()
    for item in items:
        talk = one.conversation(item.images)
        said = [talk.ask(turn.question, max_new_tokens=16) for turn in item.turns]
        marks.append([score(s.text, t.answer) for s, t in zip(said, item.turns, strict=True)])
        held.append(said[0].kv_bytes)
    right = np.array(marks)
    turns = [{"accuracy": float(right[:, t].mean()), "interval": list(wilson(right[:, t].sum(), len(right), 0.95))} for t in range(2)]
    return {"first": turns[0], "second": turns[1], "second_right": [int(x) for x in right[:, 1]], "cache_bytes": float(np.mean(held)),
            "seconds": round(time.perf_counter() - start, 1)}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--items", type=int, default=114)
    p.add_argument("--keep", type=int, default=36)
    args = p.parse_args()
    torch.set_num_threads(1)
    model = LlavaForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    whole = capture(model, processor)
    items = [i for i in make_data.items("test") if i.slice == "two_turn"][: args.items]
    rows = {}
    for name, recipe in recipes(args.keep).items():
        rows[name] = {"recipe": recipe} | measure(session(run(whole.clone(), load(recipe)), processor), items)
        print(f"{name:26s} first {rows[name]['first']['accuracy']:.3f}  second {rows[name]['second']['accuracy']:.3f}  "
              f"cache {rows[name]['cache_bytes'] / 1e3:.0f} kB", flush=True)
    lost = rows["all tokens"]["second"]["accuracy"] - rows["dropped"]["second"]["accuracy"]
    for row in rows.values():
        row["recovered"] = (row["second"]["accuracy"] - rows["dropped"]["second"]["accuracy"]) / lost if lost > 0 else None
    save("kv_two_turn", {"items": len(items), "keep": args.keep, "rows": rows, **machine(1)})


if __name__ == "__main__":
    main()
