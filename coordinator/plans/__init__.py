"""What is to be done next, for each kind of job: pure, state and view in, decisions out."""
