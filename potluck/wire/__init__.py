"""What goes over a wire: messages, their encoding, topics, tensors, and checks of what others send."""
