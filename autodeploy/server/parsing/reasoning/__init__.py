"""Formats of reasoning: one file each, named as vLLM's --reasoning-parser names them."""
