"""One file per token-reduction method; every file is found by `passes.base.discover`."""
