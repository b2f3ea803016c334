"""What a prompt says to the video transformer: its text, its quoted words, its frame rate."""

from kinoflow.conditioning.embedding import TextEmbedding

__all__ = ["TextEmbedding"]
