"""Content-addressed bytes: the store, its HTTP server, and the download from every holder at once."""
