"""The HTTP server: OpenAI's endpoints over an AsyncLLM."""
