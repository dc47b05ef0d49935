"""Policies against the sessions that they are made of: on an engine that can be followed by hand, and on artifacts of a tiny model."""

import dataclasses
import shutil

import numpy as np
import pytest
from checkpoints import tiny_llava
from fakes import Engine, Processor, manifest
from PIL import Image

import foveate
from foveate.cli import execute
from foveate.runtime.errors import RunError
from foveate.runtime.policies import CoarseToFine, DensityBudget, Policy, load_policy
from foveate.runtime.policies.calibrate import between, follow
from foveate.runtime.policies.coarse_to_fine import sureness
from foveate.runtime.policies.density import SIGNALS, of_features, of_picture
from foveate.runtime.policies.region import box_of
from foveate.runtime.result import Picture
from foveate.runtime.session import Session

RECIPES = {
    "cheap": "prune-uniform{keep=0.25,by=grid}, clean-up",
    "middle": "drop-fastv{layer=1,keep=4}, clean-up",
    "full": None,
}
QUESTIONS = ["what is this ?", "what colour is the thing ?", "red in a", "the green b and c ?", "is this blue ?", "what is in d ?"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Artifacts of one model; middle and full have the same vision stage, cheap one of its own."""
    path = tmp_path_factory.mktemp("policies")
    for name, recipe in RECIPES.items():
        foveate.optimize_model(str(tiny_llava()), recipe, output=path / name, golden=False)
    return path


@pytest.fixture(scope="module")
def opened(folder):
    sessions = {name: foveate.load(folder / name) for name in RECIPES}
    yield sessions
    for session in sessions.values():
        session.close()


def pictures(count: int = 6) -> list[Image.Image]:
    """From plain to noisy."""
    rng = np.random.default_rng(5)
    return [Image.fromarray((128 + k * 20 * rng.standard_normal((48, 48, 3))).clip(0, 255).astype(np.uint8)) for k in range(count)]


def ask(session, which=range(6), **options):
    which = list(which)
    images, texts = pictures(), [f"<image> {q}" for q in QUESTIONS]
    return session.generate([images[i] for i in which], [texts[i] for i in which], max_new_tokens=5, **options)


def policies(opened) -> dict[str, Policy]:
    chain = [opened[n] for n in RECIPES]
    return {
        "margin over the answer": CoarseToFine(chain),
        "entropy of the first token": CoarseToFine(chain, measure="entropy", over="first"),
        "pixels": DensityBudget(chain, signal="detail"),
        "features": DensityBudget(chain, signal="dissimilarity"),
    }


def at(policy: Policy, thresholds: list[float]) -> Policy:
    return type(policy)(policy.buckets, thresholds, **{n: getattr(policy, n) for n in policy.settings})


# -- what answers


@pytest.mark.parametrize(("thresholds", "bucket"), [([-np.inf, -np.inf], 0), ([np.inf, -np.inf], 1), ([np.inf, np.inf], 2)])
@pytest.mark.parametrize("kind", ["margin over the answer", "entropy of the first token", "pixels", "features"])
def test_at_the_ends_of_its_thresholds_a_policy_is_one_artifact(opened, kind, thresholds, bucket):
    policy = policies(opened)[kind]
    if policy.name == "density-budget":  # a large value goes on to the next bucket; where it is sureness, a small one does
        thresholds = [-t for t in thresholds]
    made, want = ask(at(policy, thresholds)), ask(list(opened.values())[bucket])
    assert made.buckets == (bucket,) * 6
    assert [t.tolist() for t in made.tokens] == [t.tolist() for t in want.tokens]
    assert made.texts == want.texts and made.finish == want.finish
    assert made.kept.keys() == want.kept.keys()
    for site in want.kept:
        np.testing.assert_array_equal(made.kept[site], want.kept[site])
    np.testing.assert_array_equal(made.kv_rows, want.kv_rows)
    assert [[p.kept.keys() for p in s] for s in made.pictures] == [[p.kept.keys() for p in s] for s in want.pictures]


@pytest.mark.parametrize("kind", ["margin over the answer", "entropy of the first token", "pixels", "features"])
def test_a_batch_answers_as_its_requests_do(opened, kind):
    free = policies(opened)[kind]
    seen = np.sort(ask(at(free, [-np.inf] * 2)).confidence)
    policy = at(free, [float(seen[2:4].mean()), float(seen[3:5].mean())])  # in the midst of what it measures
    together, single = ask(policy), [ask(policy, [i]) for i in range(6)]
    assert len(set(together.buckets)) > 1, "the thresholds part these requests"
    assert together.buckets == tuple(s.buckets[0] for s in single)
    assert [t.tolist() for t in together.tokens] == [s.tokens[0].tolist() for s in single]
    assert together.runs == tuple(s.runs[0] for s in single)
    # padding changes the order of sums in float32: 1e-5 of values of about 1
    np.testing.assert_allclose(together.confidence, [s.confidence[0] for s in single], atol=1e-5)


def test_every_answer_is_that_of_the_artifact_named(opened):
    policy = at(policies(opened)["margin over the answer"], [0.5, 0.5])
    made, alone = ask(policy), [ask(s) for s in opened.values()]
    for i, bucket in enumerate(made.buckets):
        assert made.tokens[i].tolist() == alone[bucket].tokens[i].tolist()
        assert (made.confidence[i] >= 0.5) == (bucket < 2) or bucket == 2


def test_messages_streams_and_several_answers(opened):
    policy = at(policies(opened)["entropy of the first token"], [np.inf, -np.inf])
    pieces: list[str] = []
    asked = {"messages": [{"role": "user", "content": "what is this ?"}], "max_new_tokens": 4}
    made = policy.generate(pictures()[2], **asked, streamer=pieces.append)
    assert made.text == opened["middle"].generate(pictures()[2], **asked).text == "".join(pieces).strip()
    sampled = {"do_sample": True, "temperature": 3.0, "seed": 4, "num_return_sequences": 3}
    made, want = ask(policy, [1, 2], **sampled), ask(opened["middle"], [1, 2], **sampled)
    assert [t.tolist() for t in made.tokens] == [t.tolist() for t in want.tokens] and len(made.texts) == 6
    whole, pieces = at(policies(opened)["margin over the answer"], [-np.inf, -np.inf]), []
    assert whole.generate(pictures()[2], **asked, streamer=pieces.append).text == "".join(pieces).strip() != ""


def test_a_request_without_pictures(opened):
    for policy in policies(opened).values():
        sure = at(policy, [0.0, 0.0])
        made = sure.generate(None, "what is this ?", max_new_tokens=3)
        assert made.tokens[0].tolist() == opened["full"].generate(None, "what is this ?", max_new_tokens=3).tokens[0].tolist()


# -- what it costs


def test_costs_add_up_over_all_runs(opened):
    policy = at(policies(opened)["margin over the answer"], [np.inf, np.inf])
    made, alone = ask(policy), [ask(s) for s in opened.values()]
    price = [s.manifest["cost"]["after"] for s in opened.values()]
    for i, runs in enumerate(made.runs):
        assert [(r.bucket, r.vision) for r in runs] == [(0, True), (1, True), (2, False)], "middle and full share their vision stage"
        steps = [len(a.tokens[i]) - 1 for a in alone]
        want = sum(p["prefill_flops"] + p["decode_flops"] * n for p, n in zip(price, steps, strict=True))
        assert made.flops[i] == want + price[0]["vision_flops"] + price[1]["vision_flops"]
    first = ask(at(policies(opened)["entropy of the first token"], [np.inf, np.inf]))
    assert [r.steps for r in first.runs[0]][:2] == [0, 0], "the first token is known before any decode step"
    assert made.timings.ttft_ms < made.timings.total_ms and len(made.timings.decode_ms) > len(first.timings.decode_ms)


def test_the_vision_stage_runs_once_where_it_is_shared(opened, monkeypatch):
    calls = {}
    for name, session in opened.items():
        run = session.engine.vision

        def counted(feeds, name=name, run=run):
            calls[name] = calls.get(name, 0) + 1
            return run(feeds)

        monkeypatch.setattr(session.engine, "vision", counted)
    ask(at(CoarseToFine([opened["middle"], opened["full"]]), [np.inf]))
    assert calls == {"middle": 1}
    calls.clear()
    ask(at(DensityBudget([opened["middle"], opened["full"]], signal="rank"), [-np.inf]))
    assert calls == {"middle": 1}
    calls.clear()
    made = ask(at(policies(opened)["features"], [-np.inf, -np.inf]))
    assert calls == {"cheap": 1, "full": 1}
    price = [s.manifest["cost"]["after"] for s in opened.values()]
    looks = price[0]["vision_flops"] + price[2]["vision_flops"] + price[2]["prefill_flops"]
    assert made.flops[0] == looks + price[2]["decode_flops"] * (len(made.tokens[0]) - 1)


# -- thresholds


@pytest.mark.parametrize("kind", ["margin over the answer", "entropy of the first token", "pixels", "features"])
@pytest.mark.parametrize("agreement", [0.4, 0.8, 1.0])
def test_calibration_reaches_the_share_on_its_own_data_and_no_cheaper_thresholds_do(opened, kind, agreement):
    free, data = policies(opened)[kind], list(zip(pictures(), QUESTIONS, strict=True))
    done = free.calibrate(data, agreement=agreement, batch=4, max_new_tokens=5)
    made, full = [policy.generate(pictures(), messages=[[{"role": "user", "content": q}] for q in QUESTIONS], max_new_tokens=5)
                  for policy in (done, opened["full"])]
    equal = np.mean([a.tolist() == b.tolist() for a, b in zip(made.tokens, full.tokens, strict=True)])
    assert equal >= agreement and equal == pytest.approx(done.calibration.agreement)
    assert np.mean(made.flops) == pytest.approx(done.calibration.flops)
    trace = follow(free, data, None, 4, 5, lambda line: None)
    rng = np.random.default_rng(0)
    for _ in range(200):
        drawn = sorted(rng.choice(between(trace.signal.ravel(), 99), 2))
        share, flops, _ = trace.at(free, drawn)
        assert share < agreement or flops >= done.calibration.flops - 1e-6


def test_calibration_to_a_cost(opened):
    data = list(zip(pictures(), QUESTIONS, strict=True))
    free = policies(opened)["pixels"]
    done = [free.calibrate(data, cost=c, max_new_tokens=5) for c in (0.8, 0.9, 1.0)]
    assert all(d.calibration.cost <= c for d, c in zip(done, (0.8, 0.9, 1.0), strict=True))
    shares = [d.calibration.agreement for d in done]
    assert shares == sorted(shares) and shares[-1] == 1.0, "at the full cost the full artifact answers"


def test_another_teacher(opened):
    free = CoarseToFine([opened["cheap"], opened["middle"]])
    done = free.calibrate(list(zip(pictures(), QUESTIONS, strict=True)), agreement=0.01, teacher=opened["cheap"], max_new_tokens=5)
    assert done.thresholds == (-np.inf,) and done.calibration.agreement == 1.0, "its own teacher is never doubted"


# -- on disk and on the command line


def test_a_saved_policy_is_the_same_policy(folder, opened, tmp_path):
    done = policies(opened)["margin over the answer"].calibrate(list(zip(pictures(), QUESTIONS, strict=True)), agreement=0.8, max_new_tokens=5)
    path = done.save(folder / "policy.yaml")
    with load_policy(path) as again:
        assert again.thresholds == done.thresholds and again.calibration == done.calibration
        assert ask(again).runs == ask(done).runs
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    load_policy(moved / "policy.yaml").close()
    (moved / "middle" / "foveate.json").write_text((moved / "full" / "foveate.json").read_text())
    with pytest.raises(RunError, match=r"middle is not the artifact that policy.yaml was calibrated with"):
        load_policy(moved / "policy.yaml")
    shutil.rmtree(moved / "middle")
    with pytest.raises(RunError, match=r"names the artifact .*middle, and there is none"):
        load_policy(moved / "policy.yaml")


def test_command_line(folder, tmp_path, capsys):
    items = tmp_path / "items.jsonl"
    lines = []
    for k, (picture, question) in enumerate(zip(pictures(), QUESTIONS, strict=True)):
        picture.save(tmp_path / f"{k}.png")
        lines.append(f'{{"id": "{k}", "images": ["{k}.png"], "turns": [{{"question": "{question}"}}], "metric": null}}')
    items.write_text("\n".join(lines))
    out = folder / "by-command.yaml"
    given = ["policy", str(folder / "cheap"), str(folder / "full"), "-d", str(tmp_path), "-o", str(out), "--max-new-tokens", "5", "-q"]
    assert execute([*given, "--agreement", "1.0"]) == 0 and "6 requests, agreement of at least 1: 100.0%" in capsys.readouterr().out
    assert execute(["run", str(out), "-i", str(tmp_path / "3.png"), "-p", QUESTIONS[3], "--max-new-tokens", "5"]) == 0
    assert "answered after" in capsys.readouterr().err
    assert execute(["eval", str(out), "-d", str(tmp_path), "-o", str(tmp_path / "results.jsonl"), "-q"]) == 0
    assert execute(["eval", str(out), "-d", str(tmp_path), "-o", str(tmp_path / "more.jsonl"), "--logits", "-q"]) == 2
    assert "a policy's answers come from several artifacts" in capsys.readouterr().err
    for wrong, message in ((["-k", "other"], "no kind 'other'; there are coarse-to-fine, density-budget"),
                           (["--set", "signal=edges"], "--set signal: coarse-to-fine has measure, over, mode"),
                           ([], "give exactly one of agreement")):
        capsys.readouterr()
        assert execute([*given, *wrong]) == 2
        assert message in capsys.readouterr().err


# -- inputs from outside


def test_extra_inputs_reach_the_pictures_that_they_are_of():
    cheap, fine = fake(100, vision_extra=["text"]), fake(200, vision_extra=["text"])
    given = []
    for session in (cheap, fine):
        session.manifest["components"]["vision"]["inputs"].append({"name": "text", "dtype": "float32", "shape": ["images", 2]})
        run = session.engine.vision
        session.engine.vision = lambda feeds, run=run: (given.append(feeds["text"].tolist()), run(feeds))[1]
    reds = [Image.new("RGB", (8, 8), (r, 0, 0)) for r in (10, 40, 20)]
    rows = np.arange(6).reshape(3, 2)
    policy = DensityBudget([cheap, fine], [0.5], signal="edges")
    noisy = pictures()[5]
    policy.generate([[reds[0], noisy], reds[2]], ["<image> <image> what ?", "<image> what ?"], max_new_tokens=1, extra={"text": rows})
    assert given == [[[4.0, 5.0]], [[0.0, 1.0], [2.0, 3.0]]], "the plain picture's row to the cheap artifact, the others' to the fine one"


# -- refusals


def fake(flops: int = 100, **facts) -> Session:
    made = manifest(**facts)
    made["cost"] = {"after": {"vision_flops": flops, "prefill_flops": flops, "decode_flops": 1}}
    return Session(Engine(), Processor(), made)


def test_refusals():
    with pytest.raises(RunError, match="needs at least two of them, 1 given"):
        CoarseToFine([fake()])
    with pytest.raises(RunError, match="artifacts of different models: they differ in eos_token_ids"):
        CoarseToFine([fake(), fake(eos_token_ids=[9])])
    with pytest.raises(RunError, match="must be given cheapest first"):
        DensityBudget([fake(200), fake(100)])
    bare = fake()
    del bare.manifest["cost"]
    with pytest.raises(RunError, match="has no forecast of its cost"):
        DensityBudget([bare, fake()])
    two = [fake(100), fake(200)]
    for make, message in (
        (lambda: CoarseToFine(two, measure="luck"), "measure 'luck' is none of margin, probability, entropy"),
        (lambda: CoarseToFine(two, mode="crop-beside"), "cuts nothing by attention inside the language model; add a late cut"),
        (lambda: DensityBudget(two, signal="smell"), "signal 'smell' is none of edges"),
        (lambda: CoarseToFine(two, [1, 2]), "2 artifacts need 1 thresholds"),
        (lambda: CoarseToFine(two, [float("nan")]), "2 artifacts need 1 thresholds"),
        (lambda: DensityBudget([*two, fake(300)], [2, 1]), "thresholds must not fall"),
        (lambda: CoarseToFine(two).generate(None, "what ?"), "it has no thresholds; give them, or find them with calibrate"),
        (lambda: CoarseToFine(two).save("x.yaml"), "it has no thresholds to be saved"),
        (lambda: CoarseToFine(two, [0]).save("x.yaml"), "were not opened from a folder"),
        (lambda: CoarseToFine(two, [0]).generate(None, "what ?", extra={"text": 1}), r"no artifact of this policy has extra inputs \['text'\]"),
        (lambda: CoarseToFine(two, [0]).generate(None, "what ?", num_return_sequences=0), "num_return_sequences is 0"),
        (lambda: CoarseToFine(two).calibrate([], agreement=0.9), "there is no calibration data"),
        (lambda: CoarseToFine(two).calibrate([(None, "what ?")]), "give exactly one of agreement"),
        (lambda: CoarseToFine(two).calibrate([(None, "what ?")], agreement=1.5), "agreement is 1.5; it is a share"),
        (lambda: CoarseToFine(two).calibrate([(None, "what ?")], cost=0.1), "a cost of 0.1 cannot be reached with these artifacts, 0.5"),
    ):
        with pytest.raises(RunError, match=message):
            make()


def test_an_agreement_out_of_reach_is_refused():
    other = fake(300)
    other.engine.decode = lambda cache, ids, positions: np.eye(16, dtype=np.float32)[np.full(len(ids), 7)]
    with pytest.raises(RunError, match=r"an agreement of 0.9 cannot be reached with these artifacts, 0 can; add a finer one"):
        CoarseToFine([fake(100), fake(200)]).calibrate([(Image.new("RGB", (8, 8), (10, 0, 0)), "what ?")], agreement=0.9, teacher=other)


@pytest.mark.parametrize(("record", "message"), [
    ("[1]", "no policy file of this version"),
    ("foveate_policy: 1\npolicy: other", "of kind 'other'; there are coarse-to-fine, density-budget"),
    ("foveate_policy: 1\npolicy: density-budget\nsignal: edges\nbuckets: []", "lacks thresholds"),
    ("{", "cannot be read"),
])
def test_a_file_that_is_no_policy(tmp_path, record, message):
    (tmp_path / "p.yaml").write_text(record)
    with pytest.raises(RunError, match=message):
        load_policy(tmp_path / "p.yaml")


# -- figures by another route


def test_sureness():
    logits = np.log(np.array([[0.7, 0.2, 0.1], [0.25, 0.5, 0.25]]))
    np.testing.assert_allclose(sureness(logits, "margin"), [0.5, 0.25])
    np.testing.assert_allclose(sureness(logits + 3, "probability"), [0.7, 0.5])
    np.testing.assert_allclose(sureness(logits, "entropy"), [0.7 * np.log(0.7) + 0.2 * np.log(0.2) + 0.1 * np.log(0.1), 1.5 * np.log(0.5)])
    assert sureness(np.array([[0.0, -np.inf]]), "entropy")[0] == 0


def test_density_of_features():
    x = np.random.default_rng(0).standard_normal((12, 5))
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    pairs = [1 - unit[i] @ unit[j] for i in range(12) for j in range(12) if i != j]
    assert of_features(x, "dissimilarity") == pytest.approx(np.mean(pairs))
    assert of_features(np.eye(6), "rank") == pytest.approx(5), "six points of a simplex span five directions evenly"
    energy = sorted((float(((row - x.mean(0)) ** 2).sum()) for row in x), reverse=True)
    n = int(of_features(x, "mass"))
    assert sum(energy[: n - 1]) < 0.95 * sum(energy) <= sum(energy[:n])
    assert of_features(np.ones((7, 4)), "dissimilarity") == pytest.approx(0, abs=1e-9)


def test_density_of_pictures_rises_with_noise():
    for signal in SIGNALS[:2]:
        values = [of_picture(p, signal) for p in pictures()]
        assert values == sorted(values) and values[0] < values[-1]
    assert of_picture(Image.new("RGB", (9, 9)), "edges") == 0


def test_box_is_twice_the_peak_and_inside_the_picture():
    picture = Picture(Image.new("RGB", (120, 60)), 72, (6, 12), {"layer1": np.array([0]), "layer2": np.array([26, 27, 38, 39, 11])})
    assert box_of(picture) == (4, (10, 10, 50, 50))  # rows and columns 2..3 of 6 x 12 tokens of 10 pixels, doubled
    corner = dataclasses.replace(picture, kept={"layer2": np.array([0, 1, 12, 13])})
    assert box_of(corner) == (4, (0, 0, 40, 40))
    assert box_of(dataclasses.replace(picture, kept={"layer2": np.zeros(0, int)})) == (0, (0, 0, 120, 60))
    with pytest.raises(RunError, match="no single grid of tokens"):
        box_of(dataclasses.replace(picture, grid=None))


@pytest.mark.parametrize(("mode", "shown"), [("crop-beside", 2), ("crop-alone", 1)])
def test_a_crop_is_asked_about(opened, mode, shown):
    policy = CoarseToFine([opened["middle"], opened["full"]], [np.inf], mode=mode)
    made, first = ask(policy, [3]), ask(opened["middle"], [3])
    crop = pictures()[3].crop(box_of(first.pictures[0][0])[1])
    images = [pictures()[3], crop][-shown:]
    want = opened["full"].generate(images, "<image> " * shown + QUESTIONS[3], max_new_tokens=5)
    assert made.tokens[0].tolist() == want.tokens[0].tolist() and len(made.pictures[0]) == shown
    free, data = CoarseToFine([opened["middle"], opened["full"]], mode=mode), list(zip(pictures(), QUESTIONS, strict=True))
    plain = [opened["full"].generate(p, messages=[{"role": "user", "content": q}], max_new_tokens=5).tokens[0].tolist() for p, q in data]
    crops = [policy.generate(p, messages=[{"role": "user", "content": q}], max_new_tokens=5).tokens[0].tolist() for p, q in data]
    assert follow(free, data, None, 6, 5, lambda line: None).agree[1].tolist() == [a == b for a, b in zip(plain, crops, strict=True)]
    assert [(r.bucket, r.vision, r.scale) for r in made.runs[0]] == [(0, True, 1.0), (1, True, float(shown))], "a crop is seen anew"
