"""The node daemon: one per machine. `daemon.py` puts it together."""
