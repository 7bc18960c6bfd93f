"""Weights as files, and as differences between files."""
