"""The server: OpenAI's video API over a queue on disk, and a page for people."""
