"""What a program is, what is true of it, and what words it may use.

in:  a loaded Hugging Face VLM (`capture`)
out: a `Program`: stages vision / prefill / decode as FX graphs over aten and the `foveate` dialect, plus facts and the KV table

Add a family: one file in `families/`. Add a dialect op: one file in `ops/`. Nothing here imports passes, export or runtime.
"""
