"""Plans, deploys and proves a vLLM service within a memory and latency limit."""

__version__ = "0.1.0"
