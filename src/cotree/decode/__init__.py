"""Decoding by search at inference: strategies, answers to single questions, and an OpenAI-compatible server."""
