"""Tests of pruning: real trainings of a small real model, each in a process of its own."""
