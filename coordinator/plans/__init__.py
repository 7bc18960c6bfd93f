"""What to do next, for each kind of job: pure functions from state and view to decisions."""
