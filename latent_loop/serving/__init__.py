"""The room of the server: one thread owns the device, HTTP with the OpenAI routes around it."""
