"""The HTTP server: OpenAI's endpoints over an AsyncLLM.

Nothing is imported here: the command line reads `config` without FastAPI installed.
"""
