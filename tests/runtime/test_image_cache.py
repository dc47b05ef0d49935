"""Many questions behind one picture: the same answers as `generate`, one prefill, and a refusal where the question decides what is kept."""

import numpy as np
import pytest
from PIL import Image

import foveate
from examples.testbed import make_data
from examples.testbed.evaluate import CHECKPOINT
from foveate.runtime.errors import RunError

QUESTIONS = ["what color is the object at the top left ?", "how many digits are there ?", "read the digits .", "is there a red circle ?"]


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    made = {}

    def get(recipe: str):
        if recipe not in made:
            folder = tmp_path_factory.mktemp("look") / "artifact"
            foveate.optimize_model(str(CHECKPOINT), recipe, output=folder, weights="initial" if "victor" in recipe else None)
            made[recipe] = foveate.load(folder)
        return made[recipe]

    yield get
    for session in made.values():
        session.close()


def picture() -> Image.Image:
    return next(iter(make_data.items("val", 1))).sources[0]


@pytest.mark.parametrize("recipe", ["clean-up{optional=true}", "prune-uniform{keep=0.5,by=grid}", "victor{registers=8,layer=4,question_blind=true}",
                                    "victor{registers=4,layer=2}"])
def test_answers_are_those_of_generate(opened, recipe):
    session = opened(recipe)
    seen = session.look(picture())
    together = seen.ask(QUESTIONS, max_new_tokens=6)
    alone = [session.generate(picture(), messages=[{"role": "user", "content": q}], max_new_tokens=6) for q in QUESTIONS]
    assert list(together.texts) == [a.text for a in alone]
    assert together.finish == tuple(a.finish[0] for a in alone)
    assert seen.ask(QUESTIONS[2], max_new_tokens=6).text == alone[2].text  # the cache was not touched by the others


def test_the_picture_is_read_once(opened, monkeypatch):
    session = opened("clean-up{optional=true}")
    calls = {"vision": 0, "prefill": 0}
    for name in calls:
        real = getattr(session.engine, name)
        monkeypatch.setattr(session.engine, name, lambda *a, real=real, name=name: (calls.__setitem__(name, calls[name] + 1), real(*a))[1])
    seen = session.look(picture())
    for question in QUESTIONS:
        seen.ask(question, max_new_tokens=3)
    assert calls == {"vision": 1, "prefill": 2}  # the picture, and the whole first prompt that the first answer is checked against


def test_a_recipe_that_looks_at_the_question_is_refused(opened):
    session = opened("drop-fastv{layer=2,keep=36}")
    with pytest.raises(RunError, match=r"a picture cannot be read without its question: kept\.layer2 keeps \d+ other visual tokens"):
        session.look(picture()).ask(QUESTIONS[0])


def test_visual_rows_that_text_still_needed_are_missed(opened):
    session = opened("victor{registers=8,layer=2,evict_summarised_kv=true}")
    with pytest.raises(RunError, match=r"logits of the first question differ by \d+\.\d% of their range"):
        session.look(picture()).ask(QUESTIONS[0])


def test_bad_input(opened):
    session = opened("clean-up{optional=true}")
    for pictures in ([], None, [None]):
        with pytest.raises(RunError, match="look: no pictures"):
            session.look(pictures)
    with pytest.raises(RunError, match="look: no question was given"):
        session.look(picture()).ask([])
    with pytest.raises(RunError, match="no option 'temprature'"):
        session.look(picture()).ask("what is this ?", temprature=1)


def test_sampling_and_limits(opened):
    session = opened("clean-up{optional=true}")
    seen = session.look(picture())
    one, two = (seen.ask(QUESTIONS, max_new_tokens=2, do_sample=True, seed=3) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(one.tokens, two.tokens, strict=True))
    assert all(len(t) <= 2 for t in one.tokens) and set(one.finish) <= {"stop", "length"}
