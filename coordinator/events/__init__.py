"""The events of the cluster, for clients that follow them."""
