"""The engine: a supervised child process, and the only place where TensorFlow is imported."""
