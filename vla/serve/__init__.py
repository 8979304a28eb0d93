"""The policy as a service: the wire's words, the server that owns the network, the client that never waits."""
