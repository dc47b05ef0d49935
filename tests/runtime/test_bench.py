"""The bench against engines whose speed is known."""

import time

import pytest
from fakes import Engine, Processor, manifest
from PIL import Image

from foveate.runtime.bench import Request, measure
from foveate.runtime.errors import RunError
from foveate.runtime.session import Session


class Slow(Engine):
    """Sleeps in prefill and decode."""

    def __init__(self, prefill: float, decode: float):
        super().__init__()
        self.times = prefill, decode

    def prefill(self, feeds, capacity):
        time.sleep(self.times[0])
        return super().prefill(feeds, capacity)

    def decode(self, cache, input_ids, position_ids):
        time.sleep(self.times[1])
        return super().decode(cache, input_ids, position_ids)


def session(prefill: float, decode: float) -> Session:
    return Session(Slow(prefill, decode), Processor(), manifest())


def request(s: Session, new_tokens: int = 4) -> Request:
    return Request.of(s, [Image.new("RGB", (8, 8), (9, 0, 0))], "<image> what ?", 1, new_tokens)


def test_speedups_are_paired_and_per_stage():
    sessions = {"artifact": session(0.02, 0.01), "baseline": session(0.06, 0.01)}
    result = measure(sessions, request(sessions["artifact"]), repeat=3, warmup=1)
    assert result.speedup("prefill") == pytest.approx(3, rel=0.35)  # sleeps overrun on a busy machine
    assert result.speedup("decode") == pytest.approx(1, rel=0.35)
    assert result.samples["artifact"].median("prefill") >= 20
    assert len(result.samples["artifact"].ms["prefill"]) == 3, "warm-up is not counted"
    assert "speed-up" in str(result) and "3 after 1 warm-up" in str(result)


def test_an_end_token_does_not_shorten_a_repetition():
    s = session(0, 0)
    measure({"artifact": s}, request(s, new_tokens=12), repeat=1, warmup=0)
    assert sum(c[0] == "decode" for c in s.engine.calls) == 11


def test_one_artifact_has_no_speedup_and_one_token_no_decode():
    s = session(0, 0)
    result = measure({"artifact": s}, request(s, new_tokens=1), repeat=2, warmup=0)
    assert result.speedup("prefill") is None
    assert result.as_dict()["stages"]["artifact"]["decode"]["median_ms"] is None
    assert "speed-up" not in str(result)


def test_ttft_includes_the_encoder():
    s = session(0.01, 0)
    result = measure({"artifact": s}, request(s), repeat=2, warmup=0)
    parts = [result.samples["artifact"].median(stage) for stage in ("preprocess", "encoder", "prefill")]
    assert result.samples["artifact"].median("ttft") == pytest.approx(sum(parts), rel=0.2)


@pytest.mark.parametrize(("arguments", "message"), [(dict(repeat=0), "repeat 0"), (dict(warmup=-1), "warm-up -1")])
def test_bad_numbers(arguments, message):
    s = session(0, 0)
    with pytest.raises(RunError, match=message):
        measure({"artifact": s}, request(s), **arguments)
    with pytest.raises(RunError, match="batch 0"):
        Request.of(s, [], "<image> a", 0, 4)
