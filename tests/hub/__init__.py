"""Tests of publishing, against a double of the Hub over real HTTP."""
