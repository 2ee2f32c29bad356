"""The trained network: building, computation, sharding and averaging."""
