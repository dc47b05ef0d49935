"""What a generation does with its cache: limits, several answers behind one prefill, several turns over one cache."""

import numpy as np
import pytest
from fakes import EOS, Cache, Engine, Processor, Tokenizer, manifest
from PIL import Image

from foveate.export.errors import CacheFullError
from foveate.runtime.errors import RunError
from foveate.runtime.session import Session

PROMPT = 11  # <s>, six visual tokens, "what is this ?"


class Rows(Cache):
    """A cache that knows what it holds and can be copied."""

    @property
    def held(self) -> int:
        return int(self.lengths.max())

    def clip_rate(self) -> float:
        return 0.25

    def take(self, samples: np.ndarray) -> "Rows":
        return Rows(self.lengths[:, samples].copy(), self.capacity)


class Limited(Engine):
    """An engine whose caches end at `most` rows."""

    def __init__(self, most: int = 10_000, announce: bool = False) -> None:
        super().__init__()
        self.most, self.limit = most, most if announce else None

    def prefill(self, feeds, capacity):
        outputs, cache = super().prefill(feeds, capacity)
        return outputs, Rows(cache.lengths, capacity)

    def decode(self, cache, input_ids, position_ids):
        if cache.held >= self.most:
            raise CacheFullError("the cache is full")
        return super().decode(cache, input_ids, position_ids)


def red(value: int = 10) -> Image.Image:
    return Image.new("RGB", (8, 8), (value, 0, 0))


def session(engine: Engine, **facts: object) -> Session:
    return Session(engine, Processor(), manifest(**facts))


def ask(engine: Engine, **options):
    return session(engine).generate(red(), "<image> what is this ?", **options)


def test_a_generation_says_why_it_ends():
    assert ask(Limited(), max_new_tokens=8).finish == ("stop",)
    assert ask(Limited(), max_new_tokens=3).finish == ("length",)


@pytest.mark.parametrize(("engine", "options"), [
    (Limited(), {"max_cache_tokens": PROMPT + 2}), (Limited(PROMPT + 2), {}), (Limited(PROMPT + 2, announce=True), {})], ids=["asked", "refused", "announced"])
def test_a_full_cache_ends_it_with_its_text_so_far(engine, options):
    result = ask(engine, max_new_tokens=8, **options)
    assert result.finish == ("cache",)
    assert result.tokens[0].tolist() == [6, 7, 8]  # one by the prefill, one per row that fits
    assert result.text == "is this and" and result.as_dict()["finish"] == ["cache"]


def test_the_limit_may_come_from_the_artifact():
    one = session(Limited())
    one.manifest = {**one.manifest, "options": {"max_cache_tokens": PROMPT + 1}}
    assert one.generate(red(), "<image> what is this ?", max_new_tokens=8).finish == ("cache",)


def test_a_prompt_beyond_the_limit_is_refused():
    with pytest.raises(RunError, match=rf"the prompt takes {PROMPT} cache rows, and 5 are allowed; shorten it, raise max_cache_tokens"):
        ask(Limited(), max_cache_tokens=5)


@pytest.mark.parametrize(("options", "message"), [
    ({"max_cache_tokens": 0}, r"max_cache_tokens is 0; it must be a whole number of at least 1"),
    ({"max_cache_tokens": "many"}, r"max_cache_tokens is 'many'"),
    ({"num_return_sequences": 0}, r"num_return_sequences is 0; it must be a whole number of at least 1")])
def test_bad_limits_are_refused(options, message):
    with pytest.raises(RunError, match=message):
        ask(Limited(), **options)


def test_several_answers_share_one_prefill():
    engine = Limited()
    result = session(engine).generate([red(10), red(20)], ["<image> what is this ?", "<image> what ?"], num_return_sequences=2, max_new_tokens=8)
    assert [c[0] for c in engine.calls].count("prefill") == 1
    assert [t.tolist() for t in result.tokens] == [[6, 7, 8, 9, 10, EOS]] * 2 + [[7, 8, 9, 10, EOS]] * 2
    assert result.finish == ("stop",) * 4 and result.kv_clip_rate == 0.25


class Words(Tokenizer):
    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": Processor()([text])["input_ids"][0, 1:].tolist()}


class Turns(Processor):
    """Questions follow answers behind an end token."""

    chat_template = "yes"

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = Words()

    def apply_chat_template(self, turns, tokenize, add_generation_prompt):
        said = [" ".join("<image>" if c["type"] == "image" else c["text"] for c in t["content"]) + (" </s>" if t["role"] == "assistant" else "") for t in turns]
        return " ".join(said)


def test_a_conversation_feeds_only_what_is_new():
    engine = Limited()
    talk = Session(engine, Turns(), manifest()).conversation(red())
    first = talk.ask("what is this ?", max_new_tokens=8)
    assert first.tokens[0].tolist() == [6, 7, 8, 9, 10, EOS] and [c[0] for c in engine.calls].count("prefill") == 1
    before = len(engine.calls)
    second = talk.ask("and this ?", max_new_tokens=8)
    fed = [c[1][0] for c in engine.calls[before:]]
    assert fed[:4] == [EOS, 8, 7, 9], "the end of the first answer once, then the question"
    assert [c[2][0] for c in engine.calls if c[0] == "decode"] == list(range(PROMPT, PROMPT + 5 + len(fed))), "positions go on without a gap"
    assert second.tokens[0].tolist() == [10, EOS] and [c[0] for c in engine.calls].count("vision") == 1


def test_a_conversation_says_when_the_cache_is_full():
    talk = Session(Limited(), Turns(), manifest()).conversation(red())
    talk.ask("what is this ?", max_new_tokens=8)
    with pytest.raises(RunError, match=r"the question needs 4 more cache rows, 16 of 18 are taken; start anew"):
        talk.ask("and this ?", max_cache_tokens=18)


def test_a_conversation_needs_a_template():
    plain = Processor()
    plain.chat_template = None
    with pytest.raises(RunError, match="conversation: the processor has no chat template"):
        Session(Limited(), plain, manifest()).conversation(red())
