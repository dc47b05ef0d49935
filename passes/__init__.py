"""Rewrites: each takes a Program and answers "did I change it?".

in:  a `Program` and a recipe (a list of passes)
out: the same `Program`, shorter, with a history

Add a method: one file in `methods/` with a `score`. Add a recipe: one YAML file in `recipes/`. Nothing here imports export or runtime.
"""
