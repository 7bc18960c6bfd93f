"""Rounds of training, and the averaging of weights."""
