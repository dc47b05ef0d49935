"""Testbed: a small LLaVA trained on generated scenes, the generator, and the questions that judge it."""
