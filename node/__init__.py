"""The node daemon: one per machine. `daemon.py` puts it together."""

PART_OF = "potluck"
