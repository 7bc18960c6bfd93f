"""The registry of models and data sets, deployments, and the router of inference requests."""
