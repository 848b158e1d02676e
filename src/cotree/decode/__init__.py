"""Answering by search at inference: strategies, one question, and an OpenAI-compatible server."""
