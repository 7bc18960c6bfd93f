"""What goes over a wire: messages, how they are written, topics, tensors, and checks of what others send."""
