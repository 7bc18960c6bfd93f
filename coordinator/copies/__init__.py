"""Who has which blob, and where copies are to be."""
