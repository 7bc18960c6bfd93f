"""One connection to a broker, and what is said and asked over it."""
