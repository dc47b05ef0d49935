"""The learned recipes that are shipped for the testbed's checkpoint: they fit it, and they answer."""

import json
from pathlib import Path

import pytest

import foveate
from examples.testbed import make_data
from examples.testbed.evaluate import CHECKPOINT, messages
from foveate.graph.capture import capture
from foveate.graph.families import load_model
from foveate.passes import pipeline, recipe
from foveate.passes.insert import learned, load_weights

LEARNED = CHECKPOINT.parent / "learned"
NAMES = sorted(p.stem for p in LEARNED.glob("*.yaml"))
RECORD = Path(__file__).resolve().parents[2] / "benchmarks/results/distill_victor.jsonl"


@pytest.fixture(scope="module")
def program():
    model, processor = load_model(str(CHECKPOINT), dtype="auto", device="cpu")
    return capture(model, processor)


def test_what_is_shipped():
    assert {"victor-8", "prefusion-8", "space-to-depth-36", "matryoshka-mix-36", "exit-router"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_weights_fit_their_recipe(name, program):
    rewritten = pipeline.run(program.clone(), recipe.load(str(LEARNED / f"{name}.yaml")))
    assert load_weights(rewritten, LEARNED / f"{name}.safetensors") == len(learned(rewritten)) > 0


def test_registers_answer_as_recorded(tmp_path):
    """54 of the items that the record judges: the share that is right lies in the interval that so few items leave around the record's."""
    from foveate.runtime.stats import wilson

    foveate.optimize_model(str(CHECKPOINT), str(LEARNED / "victor-8.yaml"), output=tmp_path / "out", weights=LEARNED / "victor-8.safetensors")
    items = list(make_data.items("test", 54))
    with foveate.load(tmp_path / "out") as session:
        said = session.generate([list(i.sources) for i in items], messages=[messages(i, []) for i in items], max_new_tokens=12, do_sample=False).texts
    right = sum(a == i.turns[0].answer for a, i in zip(said, items, strict=True))
    rows = {r["name"]: r for r in map(json.loads, RECORD.read_text(encoding="utf-8").splitlines())}
    low, high = wilson(right, len(items), 0.999)  # one in a thousand such checks would fail by chance
    assert low <= rows["victor-m8-k2-focus"]["overall"]["score"] <= high
