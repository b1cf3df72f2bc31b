"""What runs in vLLM's environment, where this distribution is installed without its dependencies: torch, safetensors
and vllm are all that it imports."""
