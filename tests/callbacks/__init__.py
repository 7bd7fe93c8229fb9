"""Tests of hf_relabel.callbacks; models has what they share."""
