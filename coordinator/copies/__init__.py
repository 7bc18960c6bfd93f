"""Who has which blob, and where copies must be."""
