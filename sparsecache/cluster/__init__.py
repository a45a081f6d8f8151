"""Many workers on Ray as one engine. Ray is imported here alone, and only when workers are asked for."""
