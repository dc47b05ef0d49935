"""The bench against engines whose speed is known."""

import sys
import time

import pytest
from fakes import Engine, Processor, manifest
from PIL import Image

from foveate.runtime.bench import Request, Stopwatch, measure
from foveate.runtime.errors import RunError
from foveate.runtime.profile import Shares, of_events, shares
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


# -- parts of a stage


def event(name, ts, dur=0.0, cat="Node"):
    return {"cat": cat, "name": name if cat == "Session" else f"{name}_kernel_time", "ts": ts, "dur": dur}


def test_shares_by_the_names_of_operations():
    """Three rounds; the first is dear and does not count."""
    rounds = []
    for k, slow in enumerate((9, 1, 1)):
        t = 1000 * k
        rounds += [
            event("model_run", t, cat="Session"),
            event("model.multi_modal_projector.linear_1/MatMul_3", t + 1, 20 * slow),
            event("foveate.drop-fastv/TopK_9", t + 2, 10),
            event("foveate.drop-fastv/Gather_8", t + 3, 5),
            event("foveate.merge-tome/MatMul_1", t + 4, 5),
            event("model.layers.0/Add_1", t + 5, 60),
            {"cat": "Node", "name": "model.layers.0/Add_1_fence_before", "ts": t + 5, "dur": 1000},
        ]
    found = of_events(rounds)
    assert found.projector == pytest.approx(0.2) and found.added == pytest.approx({"drop-fastv": 0.15, "merge-tome": 0.05})
    assert found.selection == pytest.approx(0.2)
    assert of_events([event("model_run", 0, cat="Session")]) is None


def test_parts_are_shares_of_what_was_measured(monkeypatch):
    """of the times without a profile, repetition by repetition; an engine without a profile has none"""
    import foveate.runtime.bench as bench

    known = {"vision": Shares(0.25, {"prune": 0.1}), "prefill": Shares(0.0, {"drop": 0.5})}
    monkeypatch.setattr(bench, "shares", lambda s, run: known if s.engine.times[0] else None)
    sessions = {"artifact": session(0.004, 0), "baseline": session(0, 0)}
    result = measure(sessions, request(sessions["artifact"]), repeat=3, warmup=0)
    a = result.samples["artifact"].ms
    assert a["projector"] == pytest.approx([0.25 * e for e in a["encoder"]])
    assert a["selection"] == pytest.approx([0.1 * e + 0.5 * p for e, p in zip(a["encoder"], a["prefill"], strict=True)])
    assert result.samples["baseline"].ms["selection"] == () and result.speedup("selection") is None
    assert "  projector" in str(result) and "selection" in result.as_dict()["stages"]["artifact"]
    assert set(result.as_dict()["stages"]["artifact"]["total"]["percentiles_ms"]) == {"p10", "p50", "p90", "p99"}
    assert result.peak_rss_bytes > 1e7 and "peak host memory" in str(result)


def test_without_a_profile_there_are_no_parts():
    s = session(0, 0)
    result = measure({"artifact": s}, request(s), repeat=1, warmup=0)
    assert result.stages == ("preprocess", "encoder", "prefill", "decode", "ttft", "total") and shares(s, lambda: None) is None


class Cuda:
    """torch.cuda with a clock of its own: every record takes a millisecond, and waiting has to come before asking."""

    now = 0.0

    def __init__(self):
        cuda = self

        class Event:
            def __init__(self, enable_timing=False):
                assert enable_timing, "an event without timing cannot be asked"
                self.time, self.waited = None, False

            def record(self):
                cuda.now += 1.0
                self.time = cuda.now

            def synchronize(self):
                assert self.time is not None
                self.waited = True

            def elapsed_time(self, end):
                assert end.waited, "the end was not waited for"
                return end.time - self.time

        self.Event = Event

    @staticmethod
    def is_available():
        return True


def test_cuda_events_on_a_gpu(monkeypatch):
    import types

    s = session(0, 0)
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=Cuda()))
    assert not measure({"artifact": s}, request(s), repeat=1, warmup=0).samples["artifact"].ms["prefill on device"], "this engine is no GPU's"
    s.engine.device = "cuda:0"
    result = measure({"artifact": s}, request(s, new_tokens=3), repeat=2, warmup=1)
    ms = result.samples["artifact"].ms
    assert ms["encoder on device"] == ms["prefill on device"] == ms["decode on device"] == pytest.approx((1.0, 1.0))
    assert "decode per token on device" in str(result)
    trt = Session(s.engine, Processor(), {**manifest(), "target": "tensorrt-rtx"})
    trt.engine.device = ""
    assert Stopwatch.of(trt).cuda is not None


@pytest.mark.gpu
def test_cuda_events_of_a_real_device():
    import torch

    watch = Stopwatch(torch.cuda)
    x = torch.randn(2048, 2048, device="cuda")
    watch.lap("encoder", lambda: (x @ x @ x).cpu())
    assert 0 < watch.device()["encoder on device"] < 10
