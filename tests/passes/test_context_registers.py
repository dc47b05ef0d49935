"""Context registers: latents that are the prefix, latents nobody sees, averages by another route, batch, decode, gradients, the runtime's rule, refusals."""

from __future__ import annotations

import functools

import helpers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.graph.verify import verify
from foveate.passes import pipeline, recipe
from foveate.passes.base import PassError
from foveate.passes.insert import learned
from foveate.runtime.batch import assemble, image_groups, lay_out
from foveate.runtime.context import compressed

N = 6  # visual tokens per image of the toy
RULE = {"until": "image", "keep": 1, "tokens": 2}
FACTS = {"positions": {"kind": "linear"}, "min_visual": 1}


@functools.cache
def _built(text):
    return pipeline.run(helpers.toy(), recipe.load(text))


@pytest.fixture
def built():
    """The toy with its latents, some numbers in every learned tensor; afterwards all are as they were."""
    program = _built("context-registers{tokens=2,depth=2}")
    saved = {n: t.detach().clone() for n, t in learned(program).items()}
    yield program
    with torch.no_grad():
        for n, t in learned(program).items():
            t.copy_(saved[n])


def stir(program):
    with torch.no_grad():
        for number, tensor in enumerate(learned(program).values()):
            tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number)) * 0.1)


def layout(prefix, behind, rule=RULE):
    """[1, prefix, image, behind] as the runtime lays it out, compressed where there is a rule."""
    tokens = np.array([1, *prefix, *[helpers.IMAGE] * N, *behind])
    groups = image_groups(tokens, helpers.IMAGE, 1, N)
    whole = lay_out(tokens, groups, [N], None, FACTS["positions"])
    return compressed(whole, rule) if rule else whole


def feeds(layouts, rule=RULE, seed=0):
    rows = torch.randn(len(layouts), N, helpers.WIDTH, generator=torch.Generator().manual_seed(seed)).numpy()
    facts = FACTS | ({"context": rule} if rule else {})
    return {n: torch.from_numpy(a) for n, a in assemble(layouts, {"image_features": list(rows)}, facts, 0).feeds.items()}


def test_a_prefix_as_long_as_its_latents_is_read_as_it_was(toy, built):
    """Every part is one token, so that its average is the token: before training the logits are the model's own."""
    whole = feeds([layout([5, 7], [2, 3, 4], None)], None)
    ids = whole["input_ids"].clone()
    ids[0, 1:3] = 0
    context = {"context_ids": torch.tensor([[5, 7]]), "context_mask": torch.ones(1, 2, dtype=torch.long), "context_position_ids": torch.tensor([[1, 2]]),
               "context_at": torch.tensor([1])}
    verify(built)
    got = built["prefill"].run(whole | {"input_ids": ids} | context)
    want = toy["prefill"].run(whole)
    for name in ("logits", "k.0", "v.1", "k.2"):
        helpers.close(got[name], want[name], 1e-6)
    stir(built)
    assert (built["prefill"].run(whole | {"input_ids": ids} | context)["logits"] - want["logits"]).abs().max() > 1e-3


def test_latents_start_as_averages_of_their_parts(toy, built):
    """By another route: the same averages as image features, at the middles of the parts, which the runtime chose."""
    prefix, behind = [5, 7, 3, 2, 8], [2, 3, 4]
    short = feeds([layout(prefix, behind)])
    assert short["context_at"].tolist() == [1] and short["position_ids"][0, :4].tolist() == [0, 1, 4, 6]
    words = toy["prefill"].module.lm.embed.weight
    averages = torch.stack([words[[5, 7]].mean(0), words[[3, 2, 8]].mean(0)])
    ids = short["input_ids"].clone()
    ids[0, 1:3] = helpers.IMAGE
    plain = {"input_ids": ids, "image_features": torch.cat([averages[None], short["image_features"]], 1), "position_ids": short["position_ids"],
             "attention_mask": short["attention_mask"]}
    helpers.close(built["prefill"].run(short)["logits"], toy["prefill"].run(plain)["logits"], 3e-6)


def test_latents_that_nobody_sees_leave_the_logits_alone(toy, built):
    stir(built)
    short = feeds([layout([5, 7, 3], [2, 3, 4])])
    mask = short["attention_mask"].clone()
    mask[0, 1:3] = 0
    without = {"input_ids": short["input_ids"], "image_features": short["image_features"], "position_ids": short["position_ids"], "attention_mask": mask}
    helpers.close(built["prefill"].run(short | {"attention_mask": mask})["logits"], toy["prefill"].run(without)["logits"], 3e-6)


def test_no_latents_drop_the_prefix(toy):
    program, rule = _built("context-registers{tokens=0}"), RULE | {"tokens": 0}
    short = feeds([layout([5, 7, 3], [2, 3], rule)], rule)
    assert program.facts.context == rule and not learned(program) and short["input_ids"][0, :2].tolist() == [1, helpers.IMAGE]
    assert short["position_ids"][0, :2].tolist() == [0, 4]
    helpers.close(program["prefill"].run(short)["logits"], toy["prefill"].run(short)["logits"])


def test_a_sample_says_alone_what_it_says_in_a_batch(toy, built):
    """Prefixes of 7, 3 and 0 tokens; one of 0 is the model itself. The cache holds what is in the prompt now, and nothing of a prefix."""
    stir(built)
    samples = [layout([5, 7, 3, 2, 8, 1, 4], [2, 3]), layout([4, 4, 6], [2, 3, 4, 5]), layout([], [6])]
    together = feeds(samples)
    out = built["prefill"].run(together)
    assert out["kv_lengths"].tolist() == [[1 + 2 + N + 2, 1 + 2 + N + 4, 1 + N + 1]] * 3
    for b, sample in enumerate(samples):
        alone = feeds([sample]) | {"image_features": together["image_features"][b : b + 1]}
        helpers.close(out["logits"][b], built["prefill"].run(alone)["logits"][0], 3e-6)
    plain = {n: t for n, t in feeds(samples[2:], None).items()} | {"image_features": together["image_features"][2:]}
    helpers.close(out["logits"][2], toy["prefill"].run(plain)["logits"][0], 3e-6)


def test_decode_after_prefill_equals_prefill_of_the_longer_prompt(built):
    stir(built)
    prefix, behind = [5, 7, 3, 2, 8], [2, 3]
    first = layout(prefix, behind)
    out = built["prefill"].run(feeds([first]))
    new = [n for n in built["decode"].outputs if n != "logits"]
    past, lengths = {f"past_{n}": out[n] for n in new}, out["kv_lengths"].clone()
    for step, token in enumerate([4, 6, 1]):
        behind = [*behind, token]
        position = torch.tensor([[first.next_position + step]])
        said = built["decode"].run({"input_ids": torch.tensor([[token]]), "position_ids": position, "lengths": lengths, **past})
        past, lengths = {f"past_{n}": torch.cat([past[f"past_{n}"], said[n]], 2) for n in new}, lengths + 1
        helpers.close(said["logits"], built["prefill"].run(feeds([layout(prefix, behind)]))["logits"], 3e-5)


def test_other_passes_work_behind_it():
    """Victor's registers take over the image; the latents are text to it."""
    program = pipeline.run(helpers.toy(), recipe.load("context-registers{tokens=2,depth=1}, victor{registers=2,layer=1}"))
    out = program["prefill"].run(feeds([layout([5, 7, 3], [2, 3])]))
    assert out["kv_lengths"][:, 0].tolist() == [1 + 2 + N + 2 + 2, *[1 + 2 + 2 + 2] * 2]


def test_gradients_equal_finite_differences(built, request):
    """Of every learned tensor, the encoder's weights among them; bounds as in test_victor."""
    stir(built)
    stage = built["prefill"]
    stage.module.double()
    request.addfinalizer(stage.module.float)  # the parameters are those of every toy in this process
    feed = feeds([layout([5, 7, 3, 2, 8], [2, 3]), layout([4, 4, 6], [2, 3, 4])])
    feed["image_features"] = feed["image_features"].double()
    weight = torch.randn(2, helpers.VOCAB, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def loss():
        return (stage.run(feed)["logits"] * weight).sum()

    names, tensors = zip(*learned(built).items(), strict=True)
    assert len(names) == 2 + 2 * 2  # queries, map, and two weights in each of two layers
    for name, tensor, grad in zip(names, tensors, torch.autograd.grad(loss(), tensors), strict=True):
        place = int(grad.abs().argmax())
        flat, found = tensor.data.view(-1), []
        old = float(flat[place])
        for step in (1e-3, -1e-3):
            flat[place] = old + step
            found.append(float(loss().detach()))
        flat[place] = old
        noise = 1e-4 * float(loss().detach().abs()) + 1e-3 * float(grad.abs().max())
        assert (found[0] - found[1]) / 2e-3 == pytest.approx(float(grad.view(-1)[place]), rel=2e-2, abs=noise), name


# ---- the runtime's rule


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 8), max_size=12), st.lists(st.integers(0, 8), max_size=4), st.integers(0, 3), st.integers(0, 4), st.sampled_from(["image", 8]))
def test_what_stays_keeps_its_number_and_its_position(prefix, behind, count, keep, until):
    """Text behind the boundary, pictures and the first `keep` tokens are as they were; positions ascend in front of the boundary; prompts of a
    prefix too short, or without the boundary, are untouched."""
    tokens = np.array([1, *prefix, *[helpers.IMAGE] * N, *behind, 3])
    whole = lay_out(tokens, image_groups(tokens, helpers.IMAGE, 1, N), [N], None, FACTS["positions"])
    short = compressed(whole, {"until": until, "keep": keep, "tokens": count})
    ends = [1 + len(prefix)] if until == "image" else np.flatnonzero(tokens == until)
    if not len(ends):
        assert short is whole
        return
    end = ends[-1]
    inside = [t for t in range(keep, end) if tokens[t] != helpers.IMAGE]
    if len(inside) <= count:
        assert short is whole
        return
    assert short.context.tolist() == tokens[inside].tolist() and short.context_positions.tolist() == inside
    waiting = range(short.context_at, short.context_at + count)
    stay = [t for t in range(len(short.tokens)) if t not in waiting]
    kept = [t for t in range(len(tokens)) if t not in inside]
    assert short.tokens[stay].tolist() == tokens[kept].tolist() and short.positions[stay].tolist() == kept
    assert set(short.positions[list(waiting)]) <= set(inside) and len({*short.positions[list(waiting)]}) == count
    assert (short.tokens[short.groups[0]] == helpers.IMAGE).all() and len(short.groups[0]) == N
    assert kept[stay.index(short.context_at + count)] == end and short.next_position == whole.next_position


@pytest.mark.parametrize(("text", "message"), [
    ("context-registers{depth=3}", r"context-registers: depth=3 layers cannot be copied; this program has 3, and the last stays the model's"),
    ("context-registers{until=12}", r"context-registers: until=12 is no token that could end a text; there are 0..11, and 9 is the image"),
    ("context-registers{depth=1}, context-registers{depth=1}", r"context-registers: is in this program already; a prompt has one prefix"),
    ("victor{registers=2,layer=1}, context-registers{depth=1}", r"an earlier pass changed the sequence in front of the first layer"),
])
def test_refusals(toy, text, message):
    with pytest.raises(PassError, match=message):
        pipeline.run(toy, recipe.load(text))
