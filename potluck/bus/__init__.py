"""One connection to a broker, and the messages and questions that go over it."""
