"""From trees to SFT and DPO rows: chains, relative length, pairs, dataset files."""
