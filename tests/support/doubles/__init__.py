"""Doubles of a GPU and of the modules that reach it: no test that uses them is a test on a GPU."""
