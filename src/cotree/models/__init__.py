"""Models: clients of model servers, llama.cpp in this process, weights, chat templates and token ids."""
