"""Who is where, and servers of our own: mDNS, this machine's addresses, HTTP, brokers."""
