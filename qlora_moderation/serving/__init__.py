"""A moderation server: OpenAI's schema in front of the one score path."""
