"""The coordinator daemon: plans jobs, keeps the journal, routes inference. `daemon.py` puts it together."""

PART_OF = "potluck"
