"""potluck as a system service: units, settings and drop-ins, written and removed by `potluck service`."""
