"""Formats of tool calls: one file each, named as vLLM's --tool-call-parser names them."""
