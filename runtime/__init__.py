"""Artifact -> tokens, milliseconds, pictures.

in:  an artifact folder (export.artifact) and the backend that wrote it (export.backends)
out: `Session.generate(...) -> Generation` (text, tokens, timings, kept tokens), `bench` tables

    session.py      load an artifact, prefill, decode loop
    prompts.py      pictures and prompts -> what the processor makes of them, per sample
    batch.py        samples and image features -> the padded arrays of the prefill stage
    positions.py    position ids in numpy, one rule per kind
    sampling.py     the next token: greedy in numpy, sampling with transformers' logits processors
    policies/       several artifacts of one model: which one answers which request
    overlay.py      kept tokens drawn on the picture
    bench.py        warm-up, medians, paired alternation

    datasets.py     items from a folder, JSONL, parquet, ... by a mapping;  metrics.py  scores of one answer
    evaluate.py     a session over a data set;  results.py  its per-item log, continued after a kill
    stats.py        paired test, interval, sample size, sequential bounds;  gate.py  rows -> PASS, FAIL, INCONCLUSIVE
    agreement.py    label-free: equal answers, first-token KL, log-likelihood gap;  latency.py  ratios to a baseline, percentiles, memory
    outputs.py      JUnit, step summary, annotations, metrics.json;  report/  one HTML page
    bisect.py       which pass or lowering breaks agreement;  lmms_eval_model.py, vlmevalkit_model.py  for users of those

Nothing here imports torch when it is imported; the arrays are numpy.
"""
