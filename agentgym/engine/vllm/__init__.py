"""Stock vLLM servers as the engine: this side of HTTP. What runs on the other side is in `inside`."""
