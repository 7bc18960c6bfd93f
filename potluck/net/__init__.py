"""Finds others on the network and runs our servers: mDNS, this machine's addresses, HTTP, brokers."""
