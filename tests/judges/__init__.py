"""Tests of `hf_relabel.judges`."""
