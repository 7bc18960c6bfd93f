"""Performs what plans decide: leases, results, rounds, and what is told of jobs."""
