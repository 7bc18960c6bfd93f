"""Packing of data sets into content-addressed shards."""
