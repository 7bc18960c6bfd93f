"""Performs what plans decide: leases, results and rounds; and tells clients about jobs."""
