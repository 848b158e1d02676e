"""Where text comes from: the endpoint client, chat templates, the embedded engine."""
