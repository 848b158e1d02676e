"""SFT and DPO: rows become a student, as a transformers folder and as GGUF."""
