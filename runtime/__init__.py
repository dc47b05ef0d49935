"""Artifact -> tokens, milliseconds, pictures.

in:  an artifact folder (export.artifact) and the backend that wrote it (export.backends)
out: `Session.generate(...) -> Generation` (text, tokens, timings, kept tokens), `bench` tables

    session.py      load an artifact, prefill, decode loop
    prompts.py      pictures and prompts -> what the processor makes of them, per sample
    batch.py        samples and image features -> the padded arrays of the prefill stage
    positions.py    position ids in numpy, one rule per kind
    sampling.py     the next token: greedy in numpy, sampling with transformers' logits processors
    overlay.py      kept tokens drawn on the picture
    bench.py        warm-up, medians, paired alternation

Nothing here imports torch when it is imported; the arrays are numpy.
"""
