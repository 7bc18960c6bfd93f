"""What happens in the cluster, told to whoever wants to know."""
